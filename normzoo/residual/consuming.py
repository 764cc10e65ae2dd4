"""What reads the output of a norm, where that may be written in another basis: weights of linear maps alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..conversion.layouts import layout_of
from ..conversion.norm import tensor
from ..conversion.recognise import Site
from ..conversion.report import a
from ..conversion.tying import holders
from .finding import Found
from .operators import passes_to, source
from .recording import NORM, Call, Recording, Value


@dataclass(frozen=True)
class Consumer:
    """A parameter that is multiplied with what a norm returns."""

    name: str
    axis: int
    """The one that is summed over."""
    norm: str
    """The norm, or one of several of the same weight and bias."""


class Unread(Exception):
    """Why the output of a norm cannot be written in another basis."""


def consumers(recording: Recording, found: Found, sites: Sequence[Site]) -> set[Consumer]:
    """The weights that read the outputs of norms, and nothing else does.

    Raises:
        Unread: something else reads them too, or there is a norm that stays.
    """
    by_name = {site.name: site for site in sites}
    for site in sites:
        if site.norm is None or site.norm.axis != -1:
            raise Unread(f"{site.name} normalizes channels")
    weights: dict[Value, Site] = {}
    products: dict[Call, Value] = {}
    axes: dict[Value, int] = {}
    for call in recording.calls:
        if not found.members.isdisjoint(call.operands()):
            _check_reader(call, by_name)
        if call.operator != NORM or call.module not in by_name:
            continue
        (out,) = call.outputs
        site = by_name[call.module]
        for user, value, axis in _read(recording, out, len(out.shape) - 1, site.name):
            leaf, own = _weight(user, value, axis, site.name)
            other = weights.setdefault(leaf, site)
            if axes.setdefault(leaf, own) != own or not _alike(other, site):
                raise Unread(f"{leaf.name} reads both {other.name} and {site.name}, which differ")
            products[user] = leaf
    for leaf, site in weights.items():
        own = {user for user, read in products.items() if read is leaf}
        _check_alone(leaf, axes[leaf], own, site.name)
    return {Consumer(leaf.name, axes[leaf], site.name) for leaf, site in weights.items()}


def check_owner(model: nn.Module, consumer: Consumer, untied: Collection[str]) -> None:
    """Raises Unread where the module of a weight cannot take another size, or the bias of a norm.

    Args:
        untied: modules that will have a weight of their own.
    """
    prefix, _, leaf = consumer.name.rpartition(".")
    owner: Any = model.get_submodule(prefix)
    kind = type(owner).__name__
    if leaf != "weight" or layout_of(owner) is None:
        raise Unread(f"{consumer.name} reads {consumer.norm}, and {a(kind)} cannot take another size")
    if isinstance(owner, _ConvNd) and (isinstance(owner.padding, str) or any(owner.padding)):
        raise Unread(f"{prefix} reads {consumer.norm}, and pads with zeros, which its bias would not reach")
    for own in ("weight", "bias"):
        held = owner._parameters.get(own)
        others = [] if held is None else [name for name, _ in holders(model, held) if name not in untied]
        if len(others) > 1:
            raise Unread(f"{prefix} reads {consumer.norm}, and its {own} belongs to {' and '.join(others)}")


def _check_reader(call: Call, sites: Mapping[str, Site]) -> None:
    """Raises Unread where a norm of the stream goes on with all entries."""
    if call.operator == "native_layer_norm" or (call.operator == NORM and call.module not in sites):
        raise Unread(f"a norm of {call.module or 'the model'} reads the stream and stays")


def _alike(one: Site, other: Site) -> bool:
    """Whether two norms have the same weight and bias."""
    return one is other or all(a is b for a, b in zip(_held(one), _held(other), strict=True))


def _held(site: Site) -> list[Tensor | None]:
    """The weight and the bias of a norm."""
    names = () if site.norm is None else (site.norm.weight, site.norm.bias)
    return [tensor(site.module, name) for name in names]


def _read(recording: Recording, start: Value, axis: int, norm: str) -> list[tuple[Call, Value, int]]:
    """The products that take a value, or what is a rearrangement of it."""
    products: list[tuple[Call, Value, int]] = []
    queue, seen = deque([(start, axis)]), {start}
    while queue:
        value, axis = queue.popleft()
        if value in recording.returned:
            raise Unread(f"the model returns the output of {norm}")
        for user in dict.fromkeys(value.users):
            if user.operator in _PRODUCTS:
                products.append((user, value, axis))
                continue
            rearranged = passes_to(user, value, axis)
            if not rearranged or source(user) is not value:
                raise Unread(f"{user.module or 'the model'} reads the output of {norm} ({user.operator})")
            queue.extend((v, own) for v, own in rearranged if v not in seen)
            seen.update(v for v, _ in rearranged)
    return products


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution")


def _weight(user: Call, value: Value, axis: int, norm: str) -> tuple[Value, int]:
    """The parameter that a product multiplies with the value, and the axis of it that is summed over."""
    first, second, *_ = user.args[user.operator.startswith(("add", "badd")) :]
    dims = len(value.shape)
    if user.operator == "convolution":
        other, own = (user.args[1], 1) if axis == 1 and value is first and not user.args[6] else (None, 0)
        if user.args[8] != 1:
            other = None
    elif value is first and axis == dims - 1 and value is not second:
        other, own = second, dims - 2
    elif value is second and axis == dims - 2 and value is not first:
        other, own = first, dims - 1
    else:
        other, own = None, 0
    while other is not None and other.leaf != "parameter":
        other, own = _back(other, own)
    if other is None:
        raise Unread(f"{user.module or 'the model'} multiplies the output of {norm} with what is no weight")
    return other, own


def _back(value: Value, axis: int) -> tuple[Value | None, int]:
    """What a value is a rearrangement of, and the axis there."""
    from_one = None if value.call is None else source(value.call)
    for own in range(0 if from_one is None else len(from_one.shape)):
        if from_one is not None and value.call is not None:
            if (value, axis) in passes_to(value.call, from_one, own):
                return from_one, own
    return None, 0


def _check_alone(leaf: Value, axis: int, products: Collection[Call], norm: str) -> None:
    """Raises Unread where anything but `products` reads the parameter."""
    queue = deque([(leaf, axis)])
    while queue:
        value, own = queue.popleft()
        for user in dict.fromkeys(value.users):
            if user in products:
                continue
            rearranged = passes_to(user, value, own)
            if not rearranged or source(user) is not value:
                raise Unread(f"{leaf.name} reads {norm}, and is read elsewhere too ({user.operator})")
            queue.extend(rearranged)
