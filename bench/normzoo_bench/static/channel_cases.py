"""The calls of the channel engine that the gate profiles: statistics and map, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import channels

from . import fake
from .cases import DTYPES, EVERYWHERE, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class ChannelNorm:
    """moments and apply, or sums and dx, of x (samples, channels, *size)."""

    backward: bool
    channels: int
    size: tuple[int, ...]
    samples: int = 32
    layout: str = "planes"  # or last: the channels of a position side by side
    per_sample: bool = False
    masked: bool = False
    expanded: bool = False

    @property
    def name(self) -> str:
        kind = "gn" if self.per_sample else "bn"
        size = "x".join(map(str, (self.samples, self.channels, *self.size)))
        parts = [kind, "bwd" if self.backward else "fwd", size]
        parts += [self.layout] if self.layout != "planes" else []
        parts += ["masked"] if self.masked else []
        parts += ["expanded"] if self.expanded else []
        return "-".join(parts)

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        shape = (samples, self.channels, *self.size)
        x, dy = (torch.empty(shape, dtype=DTYPES[dtype], device="meta") for _ in range(2))
        if self.layout == "last":
            sizes = (samples, *self.size, self.channels)
            x, dy = (torch.empty(sizes, dtype=x.dtype, device="meta").movedim(-1, 1) for _ in range(2))
        if self.expanded:
            dy = torch.empty((), dtype=x.dtype, device="meta").expand(shape)
        mask = None
        if self.masked:
            mask = torch.empty((samples, *self.size), dtype=torch.uint8, device="meta")
        of = (2,) * self.masked + ((samples,) if self.per_sample else ()) + (self.channels,)
        pivot, scale, shift = (torch.empty(of, device="meta") for _ in range(3))

        def forward() -> None:
            launcher(channels.moments)(x, mask, self.per_sample)
            launcher(channels.apply)(x, mask, pivot, scale, shift)

        def backward() -> None:
            launcher(channels.sums)(dy, x, mask, pivot, self.per_sample)
            launcher(channels.dx)(dy, x, mask, pivot, scale, shift, shift)

        return (backward if self.backward else forward), x

    def bounds(self) -> Iterator[Bound]:
        """What the channel engine must reach in this call."""
        yield Bound("launches", most=3)
        yield Bound("copies", most=0)

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds()), plan)


def channel_cases() -> Iterator[Case]:
    for backward in (False, True):
        large, small = ChannelNorm(backward, 256, (56, 56)), ChannelNorm(backward, 512, (7, 7))
        yield large.case(EVERYWHERE)
        yield small.case(EVERYWHERE)
        yield replace(large, masked=True).case(EVERYWHERE)
