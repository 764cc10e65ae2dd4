"""What a model computes on a sample, as a graph of torch's operators, with its norms as boxes.

Symbolic tracing does not get through most transformers; a run does. torch.fx's make_fx would show the operators
inside of a norm and not which module makes a tensor.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..conversion.samples import opened

NORM = "norm"
"""The operator of a box."""


@dataclass(eq=False)
class Value:
    """A tensor as it was between two operators."""

    shape: tuple[int, ...]
    call: Call | None = None
    """What made it; None for a leaf."""
    leaf: str = ""
    """``parameter``, ``buffer``, ``input``, or what else a leaf is."""
    name: str = ""
    """That of a parameter or buffer."""
    users: list[Call] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    """Modules that return it, the innermost first."""


@dataclass(eq=False)
class Call:
    """An operator that ran, or a norm."""

    operator: str
    """Without overload: ``addmm``."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    """The module whose forward called it, or the norm."""
    outputs: list[Value] = field(default_factory=list)
    narrows: bool = False
    """Whether it makes float32, or less, of float64."""

    def operands(self) -> list[Value]:
        """The values that it takes."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Value)]


@dataclass
class Recording:
    """A run of a model."""

    calls: list[Call]
    returned: list[Value]
    """What the model returned."""
    outputs_of: dict[str, list[Value | None]]
    """For each module what its calls returned, None where that was no single tensor."""
    unread: list[str]
    """Parameters that nothing took."""


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, inputs: Collection[Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.stack = [""]
        self.boxes = 0
        self.narrowed = False  # in a box
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id is that of one tensor only as long as this lives
        self._sharing: dict[int, list[Tensor]] = defaultdict(list)
        for name, p in model.named_parameters():
            self._know(p, Value(tuple(p.shape), leaf="parameter", name=name))
        for name, b in model.named_buffers():
            self._know(b, Value(tuple(b.shape), leaf="buffer", name=name))
        for x in inputs:
            self._know(x, Value(tuple(x.shape), leaf="input"))

    def _know(self, tensor: Tensor, value: Value) -> Value:
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        if tensor.layout == torch.strided:
            self._sharing[tensor.untyped_storage()._cdata].append(tensor)
        return value

    def value(self, tensor: Tensor) -> Value:
        found = self._values.get(id(tensor))
        if found is not None:
            return found
        kin = self._kin(tensor)
        if not kin:
            return self._know(tensor, Value(tuple(tensor.shape), leaf="constant"))
        # Such as x.data, which no operator makes.
        same = [value for other, value in kin if _geometry(other) == _geometry(tensor)][:1]
        made = Call("alias" if same else "data", tuple(same or (value for _, value in kin)), {}, self.stack[-1])
        self.add(made, tensor)
        return made.outputs[0]

    def _kin(self, tensor: Tensor) -> list[tuple[Tensor, Value]]:
        """What has the memory of `tensor`."""
        if tensor.layout != torch.strided:
            return []
        return [(t, self._values[id(t)]) for t in self._sharing.get(tensor.untyped_storage()._cdata, ())]

    def read(self, tensor: Tensor, how: str) -> None:
        """Notes that the code of the model looks at the numbers."""
        if not self.boxes:
            self.add(Call(how, (self.value(tensor),), {}, self.stack[-1]), ())

    def unread(self, norms: Collection[str]) -> list[str]:
        """The parameters that no operator takes, but for those of `norms` that ran."""
        ran = {call.module for call in self.calls if call.operator == NORM}
        leaves = (value for value in self._values.values() if value.leaf == "parameter" and not value.users)
        return [value.name for value in leaves if value.name.rpartition(".")[0] not in ran & {*norms}]

    def add(self, call: Call, outputs: Any, written: Tensor | None = None) -> None:
        for operand in dict.fromkeys(call.operands()):
            operand.users.append(call)
        if written is not None:
            for other in self._sharing[written.untyped_storage()._cdata]:
                if other is not written:
                    self._values[id(other)] = Value(tuple(other.shape), leaf="overwritten")
        for tensor in (t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)):
            call.outputs.append(self._know(tensor, Value(tuple(tensor.shape), call)))
        self.calls.append(call)

    def symbols(self, tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.boxes:
            outputs = func(*args, **kwargs)
            self.narrowed |= _narrows(args, outputs)
            return outputs
        taken, named = self.symbols((args, kwargs))
        call = Call(func.overloadpacket.__name__, taken, named, self.stack[-1])
        outputs = func(*args, **kwargs)
        call.narrows = _narrows(args, outputs)
        writes = bool(func._schema.arguments) and func._schema.arguments[0].is_write
        self.add(call, outputs, args[0] if writes and isinstance(args[0], Tensor) else None)
        return outputs


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


class _Looks(TorchFunctionMode):
    """Tells a recorder of numbers that leave torch, for which there is no operator."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist", "__array__", "__dlpack__") and isinstance(args[0], Tensor):
            self._recorder.read(args[0], name)
        return func(*args, **(kwargs or {}))


def _narrows(args: Any, outputs: Any) -> bool:
    return torch.float64 in _floats(args) and _floats(outputs) not in ([], [torch.float64])


def _floats(tree: Any) -> list[torch.dtype]:
    tensors = (t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))
    return list({t.dtype for t in tensors if t.is_floating_point()})


@contextlib.contextmanager
def _watched(
    model: nn.Module, norms: Collection[str], recorder: _Recorder, outputs_of: dict[str, list[Value | None]]
) -> Iterator[None]:
    """While it lasts, the recorder knows which module runs."""

    def before(name: str):
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            recorder.stack.append(name)
            recorder.boxes += name in norms

        return hook

    def after(name: str):
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.stack.pop()
            if name in norms:
                recorder.boxes -= 1
                if not recorder.boxes:
                    taken, named = recorder.symbols((args, kwargs))
                    call = Call(NORM, (*taken, *named.values()), {}, name, narrows=recorder.narrowed)
                    recorder.add(call, output)
                    recorder.narrowed = False
            single = isinstance(output, Tensor) and not recorder.boxes
            outputs_of[name].append(recorder.value(output) if single else None)
            if single:
                recorder.value(output).returned_by.append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        # First and last: hooks of the user run inside.
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, run: Any, inputs: Collection[Tensor], norms: Collection[str]) -> Recording:
    """The operators of one call of `model`.

    Args:
        run: a function that calls the model and returns what it returns.
        inputs: the tensors that it calls it with.
        norms: the names of modules to be taken as boxes.
    """
    recorder = _Recorder(model, inputs)
    outputs_of: dict[str, list[Value | None]] = defaultdict(list)
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        for context in (_watched(model, norms, recorder, outputs_of), recorder, _Looks(recorder)):
            stack.enter_context(context)
        returned = run()
    leaves = pytree.tree_leaves(pytree.tree_map(opened, returned))
    found = [recorder.value(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    return Recording(recorder.calls, found, outputs_of, recorder.unread(norms))


def narrowed(recording: Recording, values: Collection[Value]) -> bool:
    """Whether what is made of `values` goes through less than float64 on its way."""
    reached = {*values}
    for call in recording.calls:
        if not reached.isdisjoint(call.operands()):
            if call.narrows:
                return True
            reached.update(call.outputs)
    return False
