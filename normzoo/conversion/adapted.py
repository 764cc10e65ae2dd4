"""Layers of this library in the manner of the norm they replace: over channels, of any rank, then activated."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


class _Adapted:
    """Beside a layer: forward brings the channels to the end and back, then goes on through other children."""

    over_channels: bool
    then: tuple[str, ...]
    any_rank: bool

    def forward(self, x: Tensor, *side: Any, **named: Any) -> Tensor:
        layer = super().forward  # type: ignore[misc]
        y = layer(x.movedim(1, -1) if self.over_channels else x, *side, **named)
        y = y.movedim(-1, 1) if self.over_channels else y
        for name in self.then:
            y = getattr(self, name)(y)
        return y

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle cannot find it by name; the state may leave something out.
        state = super().__reduce_ex__(protocol)[2]
        return _empty, (bare_class(type(self)), self.over_channels, self.then, self.any_rank), state


class _AnyRank:
    """Beside a layer for images of so many dimensions: takes (N, C, \\*)."""

    _no_batch_dim = -1  # an InstanceNorm would take it for an image without a batch

    def _check_input_dim(self, input: Tensor) -> None:
        """The layer's own checks see to the rest."""


@functools.cache
def adapted(
    cls: type[nn.Module], over_channels: bool, then: tuple[str, ...], any_rank: bool
) -> type[nn.Module]:
    """`cls`, or a subclass of it.

    Args:
        over_channels: it normalises dimension 1, as in (N, C, H, W), in place of the last.
        then: children that it applies to the normalized values, in this order.
        any_rank: it takes (N, C, \\*), and not images of so many dimensions alone.
    """
    if not over_channels and not then and not any_rank:
        return cls
    name = cls.__name__ + "OverChannels" * over_channels + "OfAnyRank" * any_rank
    bases = (_Adapted, _AnyRank, cls) if any_rank else (_Adapted, cls)
    about = {"over_channels": over_channels, "then": then, "any_rank": any_rank}
    return type(name + "".join(f"And{child.title()}" for child in then), bases, about)


def bare_class(cls: type[Any]) -> type[nn.Module]:
    """The layer that `cls` adapts; `cls` where it is none of :func:`adapted`."""
    if not issubclass(cls, _Adapted):
        return cls
    return next(base for base in cls.__mro__[1:] if base not in (_Adapted, _AnyRank))


def manner(module: nn.Module) -> dict[str, Any]:
    """In what manner `module` applies its layer, in the terms of a :class:`~normzoo.conversion.Norm`."""
    if not isinstance(module, _Adapted):
        return {}
    found: dict[str, Any] = {"after": module.then}
    if module.over_channels:
        found["axis"] = 1
    if module.any_rank:
        found["dims"] = None
    return found


def _empty(cls: type[nn.Module], over_channels: bool, then: tuple[str, ...], any_rank: bool) -> nn.Module:
    made = adapted(cls, over_channels, then, any_rank)
    return made.__new__(made)
