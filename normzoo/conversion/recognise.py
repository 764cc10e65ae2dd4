"""Finding the norms of a model and telling what each of them computes.

In this order: an adapter of the user, the exact class, a subclass that inherits the forward of a known class,
and last a test run of what calls itself a norm. A name alone decides nothing.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..layers.alpha import AlphaBatchNorm
from ..layers.balance import AdaB2N
from ..layers.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..layers.batch_channel import BatchChannelNorm
from ..layers.evo_batch import EvoNormB0, EvoNormB1, EvoNormB2
from ..layers.evo_sample import EvoNormS0, EvoNormS1, EvoNormS2
from ..layers.frozen import FrozenBatchNorm
from ..layers.ghost import GhostBatchNorm
from ..layers.group import GroupNorm
from ..layers.instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from ..layers.layer import LayerNorm
from ..layers.modulated import AdaptiveLayerNorm, AdaptiveRMSNorm
from ..layers.power import PowerNorm
from ..layers.region import RegionNormB
from ..layers.region_learned import RegionNormL
from ..layers.rms import CRMSNorm, RMSNorm
from ..layers.time_dependent import TimeDependentLayerNorm, TimeDependentRMSNorm
from ..layers.unified import UnifiedNorm
from . import report
from .adapted import bare_class, manner
from .following import Following, Surroundings
from .norm import Norm
from .probe import Unrecognised, identify
from .surgery import places

Adapter = Callable[[nn.Module], Norm | None]
Known = tuple[Norm | None, str, str]
Look = Callable[[nn.Module], Known]

# RemovableHandle wants a dict that can be weakly referenced.
_adapters: OrderedDict[int, tuple[type[nn.Module] | Callable[[nn.Module], bool], Adapter]] = OrderedDict()

_BLANK = vars(nn.Module()).keys()

# "Normalize" is about norms, "normal" is not.
_NAMED_NORM = re.compile("norm(?!al(?!i))", re.IGNORECASE)


def register_adapter(
    source: type[nn.Module] | Callable[[nn.Module], bool], adapter: Adapter
) -> RemovableHandle:
    """Teach :func:`normzoo.inspect` and :func:`normzoo.convert` a norm that they do not recognise.

    Args:
        source: the exact class of the modules that `adapter` describes, or a function that picks them.
        adapter: returns the :class:`normzoo.conversion.Norm` that a module computes, or None to say that it
            is to be left alone. What it says is still held against a test run of module and replacement.

    Returns:
        A handle; its ``remove()`` forgets the adapter. The adapter registered last is asked first.

    Raises:
        TypeError: `source` or `adapter` cannot be called.

    >>> import torch, normzoo
    >>> class Unit(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    >>> handle = normzoo.register_adapter(Unit, lambda module: normzoo.conversion.Norm("rms", (8,), 1e-6))
    >>> type(normzoo.convert(Unit(), "rms_norm")).__name__
    'RMSNorm'
    >>> handle.remove()
    """
    for name, value in (("source", source), ("adapter", adapter)):
        if not callable(value):
            raise TypeError(
                f"register_adapter: {name} is {report.a(type(value).__name__)}; it must be callable"
            )
    handle = RemovableHandle(_adapters)
    _adapters[handle.id] = source, adapter
    return handle


@dataclass
class Site:
    """A norm of a model: where it is, and what it computes."""

    names: tuple[str, ...]
    """Every name it has; a module may be registered more than once. The root's is empty."""
    module: nn.Module
    norm: Norm | None
    """What it computes; None where that is unknown."""
    how: str
    """Recognised by ``adapter``, ``class``, ``subclass`` or ``probe``."""
    note: str = ""
    """Why it is unknown."""
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    """The modules that hold it, and its name there."""
    shared: tuple[str, ...] = ()
    """Its parameters that other modules hold too."""
    outside: str = ""
    """An attribute beside the module tree that holds it too."""
    flags: list[str] = field(default_factory=list)
    """What else to know about it."""
    kind: ClassVar[str] = "norm"
    """What it is: a norm, or a layer that a norm may follow."""
    look: ClassVar[Look | None] = None
    """What :func:`recognise` tells what it computes by."""
    following: Callable[[], Following] = field(default=Following, repr=False, compare=False)
    """Tells what the model does with its output, by a look at the code of its parents."""

    def check(self, cls: type[nn.Module] | None) -> None:
        """Raises Refused where its surroundings forbid that it becomes a `cls`."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def family(self) -> str:
        return self.norm.family if self.norm else "unknown"

    @property
    def cls(self) -> type[nn.Module]:
        return parametrize.type_before_parametrizations(self.module)

    @property
    def source(self) -> str:
        """The class, with its module."""
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    def describe(self) -> str:
        """What it computes, in a few words."""
        return self.norm.describe() if self.norm else "unknown"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        norm = None if self.norm is None else asdict(self.norm)
        about = {"name": self.name, "aliases": self.names[1:], "class": self.source, "norm": norm}
        return about | {"recognised_by": self.how or None, "note": self.note or None, "flags": self.flags}


def sites(model: nn.Module) -> list[Site]:
    """The norms of `model` in the order of its modules; each module once."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    parents, around = places(model), Surroundings(model)
    norms = [module for module in names if _looks_like_a_norm(module)]
    return [
        Site(
            tuple(names[module]),
            module,
            *known,
            parents.get(module, []),
            following=functools.partial(around.after, module),
        )
        for module, known in zip(norms, recognise(norms), strict=True)
    ]


def recognise(modules: Iterable[nn.Module], look: Look | None = None) -> Iterator[Known]:
    """Of each module: what it computes, how that is known, and why it is unknown.

    Args:
        look: tells it of one module; None means that they are norms.
    """
    known: dict[tuple, Known] = {}
    for module in modules:
        alike = _alike(module)
        if alike not in known:
            known[alike] = (look or _recognise)(module)
        yield known[alike]


def _looks_like_a_norm(module: nn.Module) -> bool:
    cls = parametrize.type_before_parametrizations(module)
    if cls.__module__.startswith("torch.nn.utils"):  # weight norm as a parametrization
        return False
    if bare_class(cls) in KNOWN or _adapter(module) or isinstance(module, _BASES):
        return True
    tag = getattr(cls, "kernel_layer_name", None)  # Hugging Face kernels
    named = any(_NAMED_NORM.search(base.__name__) for base in cls.__mro__) or "Norm" in str(tag)
    # A module around norms has parameters below it; an activation has none.
    within = [child for child in _children(module) if any(True for _ in child.parameters())]
    # A second stage around a norm, as in batch-channel norm, has a weight of its own too.
    own = getattr(module, "weight", None) is not None
    return named and (own or not within) and all(map(_looks_like_a_norm, within))


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for name, child in module.named_children() if name != "parametrizations"]


def _alike(module: nn.Module) -> tuple:
    """Equal for modules that a look at one of them tells about."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    layout = tuple((name, None if is_lazy(t) else tuple(t.shape), t.dtype, t.device) for name, t in tensors)
    plain = (bool, int, float, str, tuple, type(None))
    # Of a list or a function only the object itself says that it is the same.
    settings = [
        (key, repr(value) if isinstance(value, plain) else id(value))
        for key, value in vars(module).items()
        if key not in _BLANK
    ]
    return (type(module), layout, tuple(settings), _adapter(module), *map(_alike, _children(module)))


def _adapter(module: nn.Module) -> Adapter | None:
    for source, adapter in reversed(_adapters.values()):
        if type(module) is source if isinstance(source, type) else source(module):
            return adapter
    return None


def _recognise(module: nn.Module) -> Known:
    cls = parametrize.type_before_parametrizations(module)
    try:
        if adapter := _adapter(module):
            norm = adapter(module)
            if not isinstance(norm, (Norm, type(None))):
                raise TypeError(
                    f"register_adapter: the adapter of {cls.__qualname__} returned "
                    f"{report.a(type(norm).__name__)}; it must return a normzoo.conversion.Norm or None"
                )
            return norm, "adapter" if norm else "", "" if norm else "its adapter leaves it alone"
        if "forward" in vars(module):
            raise Unrecognised("its forward was replaced on the instance")
        if isinstance(module, _LazyNormBase) or any(map(is_lazy, module.parameters())):
            raise Unrecognised("it has no shape yet; run the model once")
        if bare_class(cls) in KNOWN:
            return replace(KNOWN[bare_class(cls)](module), **manner(module)), "class", ""
        for base in cls.__mro__:
            if base in KNOWN and cls.forward is base.forward:
                return KNOWN[base](module), "subclass", ""
        if parametrize.is_parametrized(module):
            raise Unrecognised("it is parametrized, so that no copy of it can be run")
        return identify(module), "probe", ""
    except Unrecognised as reason:
        return None, "", str(reason)


def _held(module: Any, *names: str) -> dict[str, Any]:
    """Weight and bias by the names they have everywhere, or None."""
    return {name: name if getattr(module, name, None) is not None else None for name in names}


def _shape(module: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in module.normalized_shape)  # NumPy's integers are none to JSON


def _eps(module: Any) -> float | None:
    return None if module.eps is None else float(module.eps)


def _layer(module: Any) -> Norm:
    return Norm("layer", _shape(module), _eps(module), **_held(module, "weight", "bias"))


def _rms(module: Any) -> Norm:
    how = {"offset": getattr(module, "offset", 0.0), "cast": getattr(module, "cast", "torch")}
    return Norm("rms", _shape(module), _eps(module), **_held(module, "weight", "bias"), **how)


def _crms(module: Any) -> Norm:
    return Norm("crms", _shape(module), _eps(module), **_held(module, "weight"))


def _group(module: Any) -> Norm:
    held = _held(module, "weight", "bias")
    return Norm("group", (int(module.num_channels),), _eps(module), **held, axis=1, groups=module.num_groups)


def _stored(family: str) -> Callable[[Any], Norm]:
    def describe(module: Any) -> Norm:
        dims = next((DIMENSIONS[base] for base in type(module).__mro__ if base in DIMENSIONS), None)
        names = ("running_mean", "running_var", "num_batches_tracked")
        stored = tuple(name for name in names if getattr(module, name, None) is not None)
        how: dict[str, Any] = _held(module, "weight", "bias") | {"statistics": stored, "axis": 1, "dims": dims}
        if family not in ("frozen_batch", "alpha_batch"):  # whose statistics never move
            how["momentum"] = None if module.momentum is None else float(module.momentum)
        return Norm(family, (int(module.num_features),), _eps(module), **how)

    return describe


def _batch_channel(module: Any) -> Norm:
    return replace(_stored("batch_channel")(module), groups=module.num_groups)


def _evo(family: str) -> Callable[[Any], Norm]:
    def describe(module: Any) -> Norm:
        how: dict[str, Any] = _held(module, "weight", "bias") | {"apply_act": module.apply_act}
        if family.startswith("evo_b"):
            how |= {"statistics": ("running_var",), "momentum": float(module.momentum)}
        how["groups"] = int(getattr(module, "groups", 1))
        return Norm(family, (int(module.num_features),), _eps(module), **how, axis=1)

    return describe


def _region(family: str, *arguments: str) -> Callable[[Any], Norm]:
    return lambda module: Norm(family, (int(module.num_features),), _eps(module), axis=1, arguments=arguments)


def _conditioned(family: str, *arguments: str) -> Callable[[Any], Norm]:
    return lambda module: Norm(family, (int(module.dim),), _eps(module), arguments=arguments)


def _power(module: Any) -> Norm:
    norm = _by_mean_square("power", module, "running_phi", module.alpha_fwd)
    return replace(norm, groups=module.group_num or 0)


def _unified(module: Any) -> Norm:
    return _by_mean_square("unified", module, "running_var", module.decay)


def _by_mean_square(family: str, module: Any, statistic: str, decay: float) -> Norm:
    how: dict[str, Any] = _held(module, "weight", "bias") | {"statistics": (statistic,)}
    how |= {"axis": module.channel_dim, "momentum": round(1 - decay, 12)}  # 1 - 0.9 is no 0.1
    return Norm(family, (int(module.num_features),), _eps(module), **how)


DIMENSIONS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.InstanceNorm1d, BatchNorm1d, InstanceNorm1d), 1),
    **dict.fromkeys((nn.BatchNorm2d, nn.InstanceNorm2d, BatchNorm2d, InstanceNorm2d), 2),
    **dict.fromkeys((nn.BatchNorm3d, nn.InstanceNorm3d, BatchNorm3d, InstanceNorm3d), 3),
}
"""Classes that take images of so many dimensions alone."""

KNOWN: dict[type[nn.Module], Callable[[Any], Norm]] = {
    nn.LayerNorm: _layer,
    nn.RMSNorm: _rms,
    nn.GroupNorm: _group,
    nn.BatchNorm1d: _stored("batch"),
    nn.BatchNorm2d: _stored("batch"),
    nn.BatchNorm3d: _stored("batch"),
    nn.SyncBatchNorm: _stored("batch"),
    nn.InstanceNorm1d: _stored("instance"),
    nn.InstanceNorm2d: _stored("instance"),
    nn.InstanceNorm3d: _stored("instance"),
    BatchNorm1d: _stored("batch"),
    BatchNorm2d: _stored("batch"),
    BatchNorm3d: _stored("batch"),
    InstanceNorm1d: _stored("instance"),
    InstanceNorm2d: _stored("instance"),
    InstanceNorm3d: _stored("instance"),
    GroupNorm: _group,
    FrozenBatchNorm: _stored("frozen_batch"),
    GhostBatchNorm: _stored("ghost_batch"),
    AlphaBatchNorm: _stored("alpha_batch"),
    AdaB2N: _stored("adab2n"),
    BatchChannelNorm: _batch_channel,
    PowerNorm: _power,
    UnifiedNorm: _unified,
    EvoNormB0: _evo("evo_b0"),
    EvoNormB1: _evo("evo_b1"),
    EvoNormB2: _evo("evo_b2"),
    EvoNormS0: _evo("evo_s0"),
    EvoNormS1: _evo("evo_s1"),
    EvoNormS2: _evo("evo_s2"),
    RegionNormB: _region("region_b", "mask"),
    RegionNormL: _region("region_l"),
    AdaptiveLayerNorm: _conditioned("adaptive_layer", "scale", "shift"),
    AdaptiveRMSNorm: _conditioned("adaptive_rms", "scale", "shift"),
    TimeDependentLayerNorm: _conditioned("time_layer", "t"),
    TimeDependentRMSNorm: _conditioned("time_rms", "t"),
    LayerNorm: _layer,
    RMSNorm: _rms,
    CRMSNorm: _crms,
}
"""Classes whose mathematics is known, and what describes one of them."""

_BASES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase, TimeDependentLayerNorm, TimeDependentRMSNorm)
