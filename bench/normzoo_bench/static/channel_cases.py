"""The calls of the channel engine that the gate profiles: statistics and map, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import channels

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher


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
    constant: bool = False  # the statistics are: the gradient of x is a map of dy alone

    @property
    def name(self) -> str:
        kind = "gn" if self.per_sample else "alpha" if self.constant else "bn"
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
            if mask is None:
                launcher(channels.moments)(x, mask, self.per_sample)
            else:
                launcher(channels.region_moments)(x, mask, self.per_sample)
            launcher(channels.apply)(x, mask, pivot, scale, shift)

        def backward() -> None:
            launcher(channels.sums)(dy, x, mask, pivot, self.per_sample)
            if self.constant:
                launcher(channels.apply)(dy, mask, pivot, scale, shift)
            else:
                launcher(channels.dx)(dy, x, mask, pivot, scale, shift, shift)

        return (backward if self.backward else forward), x

    def bounds(self, plan: Plan) -> Iterator[Bound]:
        """What the channel engine must reach in this call."""
        bf16, small = ("bf16",), self.size == (7, 7)
        planes = self.layout == "planes"
        reads = 1 if not self.backward or self.expanded else 2
        # Planes of 49 start anywhere: the statistics read the vectors in which one ends and the next starts
        # for both, one right after the other.
        edges = 0.15 * reads if small and planes else 0
        yield Bound("x_passes", most=2 * reads + (not self.constant) + edges + 0.03)
        yield Bound("launches", most=2 if planes and (small or self.per_sample) else 3)
        yield Bound("copies", most=0)
        yield Bound("arguments", most=13 + self.masked + 2 * self.expanded)
        if plan != EVERYWHERE and not self.expanded:  # on gfx942 the widest store of statistics is one number
            yield Bound("x_width", least=16)
        if not (self.masked or self.expanded):
            # One part or several; planes of a single sample, and few rows of tokens, have tiles of their own.
            yield Bound("variants", most=2 if planes and not small and self.size else 3)
        if planes and not self.masked and not (small and self.per_sample):
            yield Bound("instructions", most=20, dtypes=bf16)
        if self.size == (56, 56) and not self.masked:
            yield Bound("kb_in_flight", least=32, dtypes=bf16)

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds(plan)), plan)


def channel_cases() -> Iterator[Case]:
    for backward in (False, True):
        large, small = ChannelNorm(backward, 256, (56, 56)), ChannelNorm(backward, 512, (7, 7))
        middle = ChannelNorm(backward, 512, (32, 32), per_sample=True)
        for case in (large, small):
            yield case.case(SWEPT)
            yield replace(case, layout="last").case(SWEPT)
        yield middle.case(SWEPT)
        yield replace(small, per_sample=True).case(SWEPT)
        yield replace(middle, layout="last").case(ON_SM90)
        yield ChannelNorm(backward, 768, (), samples=32 * 197).case(ON_SM90)
        for layout in ("planes", "last"):  # adab2n with task ids, batch_channel_norm
            yield replace(large, per_sample=True, layout=layout).case(ON_SM90)
            if backward:
                yield replace(large, constant=True, layout=layout).case(ON_SM90)
        yield replace(large, masked=True).case(ON_SM90)
        yield replace(middle, masked=True).case(ON_SM90)
        # Every function for every target.
        yield replace(large, samples=8).case(EVERYWHERE)
        yield replace(small, samples=8).case(EVERYWHERE)
        yield replace(large, samples=8, masked=True).case(EVERYWHERE)
        if backward:
            yield replace(large, expanded=True).case(ON_SM90)
