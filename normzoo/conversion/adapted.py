"""Layers of this library in the manner of the norm they replace: over channels, with an activation after."""

from __future__ import annotations

import functools

from torch import Tensor, nn


class _Adapted:
    """Beside a layer: forward brings the channels to the end and back, then goes on through other children."""

    over_channels: bool
    then: tuple[str, ...]

    def forward(self, x: Tensor) -> Tensor:
        layer = super().forward  # type: ignore[misc]
        y = layer(x.movedim(1, -1)).movedim(-1, 1) if self.over_channels else layer(x)
        for name in self.then:
            y = getattr(self, name)(y)
        return y

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle cannot find it by name.
        return _empty, (type(self).__mro__[2], self.over_channels, self.then), vars(self)


@functools.cache
def adapted(cls: type[nn.Module], over_channels: bool, then: tuple[str, ...]) -> type[nn.Module]:
    """`cls`, or a subclass of it.

    Args:
        over_channels: it normalises dimension 1, as in (N, C, H, W), in place of the last.
        then: children that it applies to the normalized values, in this order.
    """
    if not over_channels and not then:
        return cls
    name = cls.__name__ + "OverChannels" * over_channels + "".join(f"And{child.title()}" for child in then)
    return type(name, (_Adapted, cls), {"over_channels": over_channels, "then": then})


def _empty(cls: type[nn.Module], over_channels: bool, then: tuple[str, ...]) -> nn.Module:
    made = adapted(cls, over_channels, then)
    return made.__new__(made)
