"""Runs of a copy of a model that leave no traces: no hooks of users, random numbers, buffers or gradients."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..conversion.samples import fresh
from ..conversion.trial import noise, undisturbed
from ..dispatch import backend
from ..radial import sharded
from ..side_inputs import entered, inputs

_LARGEST_EPS = 1e-3


class Unfit(ValueError):
    """The model cannot be tried out."""


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from an `example`."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


class Rehearsal:
    """A copy of a model, and a call of it that gives the same each time.

    Args:
        moving: names of parameters that may change; those that have one value throughout, as at the start of
            training, get others, for a bias of zero shows nothing of what it will do, nor does what a gate of
            zero hides.
        dtype: of the copy; None leaves it as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        moving: Collection[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        if getattr(model.forward, "__func__", None) is nn.Module.forward:
            raise Unfit(
                f"normalize_and_project: {type(model).__name__} has no forward, so that it cannot be run; wrap "
                "it in a module whose forward calls what is trained"
            )
        given = (args, dict(kwargs), entered(model))
        with torch.inference_mode(False):
            self.model, self.tensors = _copied(model, moving, dtype)
            if dtype is not None:
                given = pytree.tree_map_only(
                    Tensor, lambda t: t.detach().to(dtype) if t.is_floating_point() else t, given
                )
        self.args, self.kwargs, self.beside = given
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})

    def __call__(self, mode: Any) -> Any:
        """What the copy returns inside of `mode`; its buffers are as before."""
        beside = inputs(self.model, **self.beside) if self.beside else contextlib.nullcontext()
        with _quiet(self.devices), beside, mode:
            args, kwargs = pytree.tree_map(fresh, (self.args, self.kwargs))
            returned = self.model(*args, **kwargs)
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                if name in self.buffers:
                    b.copy_(self.buffers[name])
        return returned


class EpsAside(TorchDispatchMode):
    """Runs operators with an eps that is next to nothing, whoever computes the norm.

    An operator's argument of that name, and a positive constant of at most 1e-3 that is added to a tensor.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        like = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        if like is not None:
            tiny = _tiny(like.dtype)
            args = list(args)
            for i, argument in enumerate(func._schema.arguments):
                if argument.name in ("eps", "epsilon"):
                    if i < len(args):
                        args[i] = tiny
                    else:
                        kwargs[argument.name] = tiny
            if func.overloadpacket in _ADDITIONS and len(args) > 1 and isinstance(args[1], float):
                args[1] = tiny if 0 < args[1] <= _LARGEST_EPS else args[1]
        return func(*args, **kwargs)


_ADDITIONS = (torch.ops.aten.add, torch.ops.aten.add_)


@contextlib.contextmanager
def _quiet(devices: Sequence[int]) -> Iterator[None]:
    """Random numbers are drawn, and given back, so that the next time has the same; no autocast, no kernels."""
    state = random.getstate()
    kinds = ("cpu", "cuda") if devices else ("cpu",)
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(backend("reference"))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(state)


def _copied(
    model: nn.Module, moving: Collection[str], dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in `dtype`, without hooks of users, and its parameters by the names that they have in `model`."""
    with _bared(model):
        made = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    _gather(made)
    for parent in list(made.modules()):
        for name, child in parent._modules.items():
            if type(child).__name__ == "OptimizedModule":  # whose forward is that of the original
                parent._modules[name] = child._orig_mod  # type: ignore[union-attr]
    if dtype is not None:
        made = made.to(dtype)
    if not model.training:
        made.train()
    _put_eps_aside(made)
    tensors: dict[str, Tensor] = dict(zip(names, made.parameters(), strict=True))
    chance = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name in moving:
            p = tensors[name]
            if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                p.add_(0.1 * noise(p.shape, chance).to(p))
    return made, tensors


def _put_eps_aside(model: nn.Module) -> None:
    """Of modules that know theirs, for it may be more than a constant by the time that it is added."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in model.modules():
        for key in ("eps", "epsilon", "variance_epsilon"):
            if isinstance(vars(module).get(key), float):
                vars(module)[key] = _tiny(dtype)


def _tiny(dtype: torch.dtype) -> float:
    """An eps that is next to nothing; the root of its inverse is a number."""
    return math.sqrt(torch.finfo(dtype).tiny)


def _gather(model: nn.Module) -> None:
    """Puts whole tensors in place of DTensors; ties stay."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and sharded(p):
                if p not in whole:
                    full = p.detach().full_tensor().clone()  # type: ignore[attr-defined]
                    whole[p] = nn.Parameter(full, p.requires_grad)
                module._parameters[name] = whole[p]
        for name, b in module._buffers.items():
            if b is not None and sharded(b):
                module._buffers[name] = b.full_tensor()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _bared(model: nn.Module) -> Iterator[None]:
    """Meanwhile a deep copy of `model` is possible, and has what computes alone.

    Hooks of torch's own, such as that of weight_norm, stay; others may count, log, or hold what is large.
    fully_shard forbids copies by a class of its own, and has its state among the attributes. Neither outputs of
    an earlier run, such as the weight that a hook computes, nor process groups can be copied.
    """
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, cls, held in before:
            for key, value in held.items():
                if key.endswith("_hooks") and value:
                    vars(module)[key] = type(value)((i, hook) for i, hook in value.items() if _is_torchs(hook))
                elif key.startswith("__composable_api"):
                    del vars(module)[key]
                elif isinstance(value, Tensor) and value.grad_fn is not None:
                    vars(module)[key] = value.detach()
                elif type(value).__name__ == "ProcessGroup":
                    vars(module)[key] = None
            if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
                # Not by the module's own __setattr__, which may hand it on to a module inside.
                object.__setattr__(module, "__class__", cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)])
        yield
    finally:
        for module, cls, held in before:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
            vars(module).clear()
            vars(module).update(held)


def _is_torchs(hook: Any) -> bool:
    return any(cls.__module__.startswith("torch.nn.utils") for cls in type(hook).__mro__)


def user_hooks(model: nn.Module) -> int:
    """How many forward hooks the check leaves out."""
    return sum(
        not (_is_torchs(hook) or type(hook).__module__.startswith("normzoo.nap"))
        for module in model.modules()
        for key in ("_forward_hooks", "_forward_pre_hooks")
        for hook in vars(module)[key].values()
    )


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module inside of DDP, DataParallel and torch.compile, and the process groups of DDP."""
    groups = ()
    while True:
        kind = type(model).__name__
        if kind == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            groups = (model.process_group,) if kind == "DistributedDataParallel" else groups
            model = model.module
        else:
            return model, groups
