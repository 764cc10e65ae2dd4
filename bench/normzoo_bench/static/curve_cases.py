"""The calls of the channel engine's curves that the gate profiles: what EvoNorm-B0 and S0 are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import channels, curves

from . import fake
from .case import DTYPES, EVERYWHERE, SWEPT, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class Curve:
    """moments and apply, or sums and dx, of x (samples, channels, *size)."""

    backward: bool
    curve: str
    channels: int = 256
    size: tuple[int, int] = (56, 56)
    samples: int = 32
    layout: str = "planes"  # or last: the channels of a position side by side

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.samples, self.channels, *self.size)))
        end = "" if self.layout == "planes" else f"-{self.layout}"
        return f"{self.curve}-{'bwd' if self.backward else 'fwd'}-{size}{end}"

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        shape = (samples, self.channels, *self.size)
        x, dy = (torch.empty(shape, dtype=DTYPES[dtype], device="meta") for _ in range(2))
        if self.layout == "last":
            sizes = (samples, *self.size, self.channels)
            x, dy = (torch.empty(sizes, dtype=x.dtype, device="meta").movedim(-1, 1) for _ in range(2))
        sample = torch.empty(shape[:2], device="meta")
        channel = torch.empty(self.channels, device="meta").expand(shape[:2])
        # scale, bound, slope, level of EvoNorm-B0; scale, slope of S0
        carried = [channel, channel, channel, sample] if self.curve == "bounded" else [sample, channel]

        def forward() -> None:
            launcher(channels.moments)(x, None, True)
            launcher(curves.curve_apply)(x, self.curve, [*carried, channel])

        def backward() -> None:
            launcher(curves.curve_sums)(dy, x, self.curve, carried)
            launcher(curves.curve_dx)(dy, x, self.curve, carried, [sample, sample, sample])

        return (backward if self.backward else forward), x

    def bounds(self, plan: Plan) -> Iterator[Bound]:
        reads = 2 if self.backward else 1
        # As in the channel cases: planes of 49 are read from whole vectors.
        edges = 0.15 * reads if self.size == (7, 7) and self.layout == "planes" else 0
        yield Bound("x_passes", most=2 * reads + 1 + edges + 0.03)
        parts = self.layout == "last" or self.samples == 1
        yield Bound("launches", most=2 + parts)
        yield Bound("copies", most=0)
        yield Bound("arguments", most=17)
        if plan != EVERYWHERE:
            yield Bound("x_width", least=16)
            yield Bound("variants", most=3)
            if self.size == (56, 56):
                yield Bound("kb_in_flight", least=32, dtypes=("bf16",))
                yield Bound("instructions", most=34, dtypes=("bf16",))

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds(plan)), plan)


def curve_cases() -> Iterator[Case]:
    for backward in (False, True):
        for curve in ("bounded", "swish"):
            large = Curve(backward, curve)
            small = replace(large, channels=512, size=(7, 7))
            for case in (large, small):
                yield case.case(SWEPT)
                yield replace(case, layout="last").case(SWEPT)
        # Every function for every target.
        large, small = Curve(backward, "bounded", 8, (256, 256), 1), Curve(backward, "swish", 512, (7, 7), 8)
        for case in (large, small):
            yield case.case(EVERYWHERE)
