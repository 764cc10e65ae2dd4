"""Norms in front of activations that have none; the keys of state dicts stay."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..conversion import report
from ..conversion.following import is_activation
from ..conversion.recognise import sites
from ..conversion.surgery import places, references, refuse_wrapped
from ..conversion.trial import short
from ..layers.group import GroupNorm
from ..layers.layer import LayerNorm
from .refusals import CALLER, outside
from .rehearsing import Rehearsal, Unfit, arguments

_NONE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)
"""In torch's module of activations, and none."""
_CLASSES = tuple(
    cls
    for cls in vars(activation).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == activation.__name__
    if cls not in (nn.Module, *_NONE)
)
_FUNCTIONS = frozenset(
    "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu "
    "sigmoid silu softplus softsign tanh".split()
)
_SHORTCUT = "activation_relu_or_gelu"
"""If not 0, torch's TransformerEncoderLayer in eval mode computes the activation itself."""
_SHAPES = frozenset(
    "alpha_dropout clone contiguous dropout dropout1d dropout2d dropout3d expand feature_alpha_dropout flatten "
    "float getitem movedim permute reshape squeeze swapaxes to transpose type_as unflatten unsqueeze view "
    "view_as".split()
)
"""Functions that leave what an activation made what it is."""
_SCALINGS = frozenset("add div mul radd rmul rsub sub truediv".split())
"""Likewise, by numbers and buffers, as the range of an action."""
_NARROW = 2
"""A norm of so few numbers returns signs, or zero."""
_TRANSPARENT = (nn.Identity, _DropoutNd)
_NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
"""Whose own calls of functions are none of an activation."""


@dataclass
class _Call:
    """What an activation got."""

    x: Tensor
    maker: str | None
    """Name of the module that made it; None for code between modules."""


@dataclass
class _Seen:
    """One run of a model."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)
    """By the names of activations."""
    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Activations that are called as functions: (function, class that calls it)."""
    made: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    """By id, every tensor that a module returned, which stays alive, and the name of the module."""
    running: list[nn.Module] = field(default_factory=list)
    carried: dict[int, tuple[Tensor, str, int]] = field(default_factory=dict)
    """By id, every tensor that an activation made, the name of the activation, and the tensor's version."""
    last: set[str] = field(default_factory=set)
    """Activations that make an output of the model."""

    def carry(self, y: Any, name: str) -> None:
        if isinstance(y, Tensor):
            self.carried[id(y)] = y, name, y._version

    def carrier(self, y: Any) -> str | None:
        """The activation that made `y`, unless it was changed in place since."""
        _, name, version = self.carried.get(id(y), (None, None, None))
        return name if name is not None and version == y._version else None


@dataclass(frozen=True)
class _Insertion:
    """A norm to be put in front of the activation `name`."""

    name: str
    norm: nn.Module
    group: dict[str, Any]
    """The param group that it joins."""


def insert_norms(
    model: nn.Module, optimizer: Optimizer, example: Any, affine: bool
) -> tuple[Callable[[], None], list[str]]:
    """Turns activations without a norm in front into ``Sequential(norm, activation)``.

    Returns:
        What takes it back, and notes for a report.

    Raises:
        ValueError: an activation cannot have a norm, or there is none. Nothing is changed.
    """
    refuse_wrapped(model, CALLER, "insert norms into")
    norms = {name for site in sites(model) for name in site.names}
    activations = {
        name: module for name, module in model.named_modules() if _is_activation(module) and name not in norms
    }
    seen = _look(model, activations, norms, example)
    if not activations:
        raise ValueError(f"{CALLER}: insert=True finds no activation module in the model{_functional(seen)}")
    refusals = [*_refusals(model, activations, seen)]
    if refusals:
        raise ValueError(f"{CALLER}: insert=True: {'; '.join(refusals)}. Nothing was inserted")
    if seen.functions:
        reached = f"{CALLER}: insert=True reaches activation modules alone{_functional(seen)}"
        warnings.warn(reached, stacklevel=outside())
    wanted = []
    notes = [
        f"{name} did not run on the example and got no norm" for name in activations if name not in seen.calls
    ]
    for name, calls in seen.calls.items():
        if calls[0].maker in norms:
            continue
        kind = type(activations[name]).__name__
        if name in seen.last:
            notes.append(f"{name} ({kind}) makes the output and got no norm")
            continue
        each, width = _insertion(model, optimizer, name, calls[0], affine)
        if width <= _NARROW:
            few = report.count(width, "number")
            notes.append(f"{name} ({kind}) got no norm, which would be one of {few}")
        else:
            wanted.append(each)
    for each in wanted:
        notes.append(f"a {type(each.norm).__name__} was inserted in front of {each.name}")
    return _insert(model, optimizer, wanted), notes or ["every activation had a norm in front"]


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, (*_TRANSPARENT, *_NONE)):
        return False
    known = isinstance(module, _CLASSES) or type(module).__module__ == "transformers.activations"
    return known or is_activation(module)  # a class of the model's own


def _functional(seen: _Seen) -> str:
    if not seen.functions:
        return ""
    listed = ", ".join(f"{function} in {cls}" for function, cls in seen.functions)
    return f"; called as functions, without a place for a norm: {listed}. Make them modules, such as nn.ReLU()"


def _look(model: nn.Module, activations: dict[str, nn.Module], norms: set[str], example: Any) -> _Seen:
    seen = _Seen()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.running.append(module)
            if name in activations:
                x = args[0] if args else next(iter(kwargs.values()))
                maker = seen.made.get(id(x), (x, None))[1]
                seen.calls.setdefault(name, []).append(_Call(x, maker))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            seen.running.pop()
            if name in activations:
                seen.carry(y, name)
            if not isinstance(y, Tensor):
                return
            maker: str | None = name
            if isinstance(module, _TRANSPARENT):
                maker = seen.made.get(id(args[0]), (y, None))[1] if args else None
            # A container returns what its last module made.
            if id(y) not in seen.made or name in norms or not any(True for _ in module.children()):
                seen.made.pop(id(y), None)
                if maker is not None:
                    seen.made[id(y)] = y, maker

        return hook

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "").rstrip("_")
            inside = seen.running[-1] if seen.running else None
            if name in _FUNCTIONS and inside is not None and inside not in own:
                if not any(isinstance(module, _NORMS) for module in seen.running):
                    seen.functions[name, type(inside).__name__] += 1
            carriers = [seen.carrier(a) for a in args[:2]] if _keeps(name.strip("_"), args, buffers) else []
            y = func(*args, **kwargs or {})
            for carrier in filter(None, carriers):
                seen.carry(y, carrier)
            return y

    rehearsal = Rehearsal(model, *arguments(example))
    buffers = {id(b) for b in rehearsal.model.buffers()}
    own = {module for name, module in rehearsal.model.named_modules() if name in activations}
    for name, module in rehearsal.model.named_modules():
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        module.register_forward_hook(leave(name))
    try:
        returned = rehearsal(Functions())
    except Exception as error:
        raise Unfit(
            f"{CALLER}: the model does not run on the example ({short(error)}); pass other inputs"
        ) from error
    leaves = pytree.tree_leaves(returned)
    leaves += [value for leaf in leaves if hasattr(leaf, "__dict__") for value in vars(leaf).values()]
    seen.last = {name for leaf in leaves if (name := seen.carrier(leaf)) is not None}
    return seen


def _keeps(function: str, args: Sequence[Any], buffers: Collection[int]) -> bool:
    """Whether what an activation made is still that behind the function, but for its shape and range."""
    if function in _SCALINGS:
        return any(isinstance(a, (int, float)) or id(a) in buffers for a in args[:2])
    return function in _SHAPES


def _refusals(model: nn.Module, activations: dict[str, nn.Module], seen: _Seen) -> Iterator[str]:
    held = places(model)
    beside = references(model, [*activations.values()])
    for name, module in activations.items():
        kind = type(module).__name__
        calls = len(seen.calls.get(name, ()))
        if not name:
            yield f"the model itself is {report.a(kind)}, with nothing in front"
        elif calls > 1 or len(held[module]) > 1:
            how = f"runs {calls} times" if calls > 1 else f"is registered {len(held[module])} times"
            yield f"{name} ({kind}) {how}, and each place needs a norm of its own: give each its own {kind}"
        elif module in beside:
            yield f"{name} ({kind}) is held by {beside[module]} too, which would go on without the norm"
        elif name in seen.last:
            continue
        elif calls and (any(True for _ in module.parameters()) or any(True for _ in module.buffers())):
            yield f"{name} ({kind}) has tensors of its own, whose keys in the state dict would change"
        elif calls and seen.calls[name][0].x.dim() < 2:
            yield f"{name} ({kind}) gets a tensor of one dimension; make the example a batch"


def _insertion(
    model: nn.Module, optimizer: Optimizer, name: str, call: _Call, affine: bool
) -> tuple[_Insertion, int]:
    """The norm, and how many numbers it goes over at least."""
    maker = None if call.maker is None else model.get_submodule(call.maker)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    near = [p for p in maker.parameters() if id(p) in trained] if maker is not None else []
    group = _group(optimizer, near or [p for p in model.parameters() if id(p) in trained])
    near += [p for p in model.parameters() if id(p) in trained]
    made = {"device": near[0].device, "dtype": near[0].dtype}
    x = call.x
    channels = isinstance(maker, _ConvNd) or (not isinstance(maker, nn.Linear) and x.dim() in (4, 5))
    if channels:
        norm = GroupNorm(1, x.shape[1], affine=affine, **made)
    else:
        norm = LayerNorm(x.shape[-1], elementwise_affine=affine, **made)
    return _Insertion(name, norm, group), x[0].numel() if channels else x.shape[-1]


def _group(optimizer: Optimizer, near: list[nn.Parameter]) -> dict[str, Any]:
    """That of the biases `near`, or of other vectors with the same learning rate, whose weight decay suits
    norms; else that of what is near."""
    groups = optimizer.param_groups

    def of(p: nn.Parameter) -> dict[str, Any]:
        return next(group for group in groups if any(p is each for each in group["params"]))

    home = of(next((p for p in near if p.dim() == 1), near[0]))
    alike = [home, *(group for group in groups if group.get("lr") == home.get("lr"))]
    return next((group for group in alike if any(p.dim() == 1 for p in group["params"])), home)


def _insert(model: nn.Module, optimizer: Optimizer, wanted: list[_Insertion]) -> Callable[[], None]:
    undone: list[Callable[[], object]] = []
    for each in wanted:
        act = model.get_submodule(each.name)
        parent_name, _, leaf = each.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        parent._modules[leaf] = nn.Sequential(each.norm, act).train(act.training)
        undone.append(lambda parent=parent, leaf=leaf, act=act: parent._modules.update({leaf: act}))
        if before := getattr(parent, _SHORTCUT, 0):
            setattr(parent, _SHORTCUT, 0)
            undone.append(lambda parent=parent, before=before: setattr(parent, _SHORTCUT, before))
        group = each.group
        for name, p in each.norm.named_parameters():
            group["params"].append(p)
            if "param_names" in group:
                group["param_names"].append(f"{each.name}.0.{name}")
                undone.append(group["param_names"].pop)
            undone.append(group["params"].pop)

    def undo() -> None:
        for back in reversed(undone):
            back()

    return undo
