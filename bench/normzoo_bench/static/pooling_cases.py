"""The calls of RN-L's pooling that the gate profiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import pooling

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class Pooling:
    """Mean and maximum over the channels of x (samples, channels, *size), or the gradient of both."""

    backward: bool
    channels: int = 256
    size: tuple[int, ...] = (64, 64)
    samples: int = 14
    layout: str = "planes"  # or last: the channels of a position side by side

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.samples, self.channels, *self.size)))
        parts = ["pool", "bwd" if self.backward else "fwd", size]
        return "-".join(parts + [self.layout] * (self.layout != "planes"))

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        sizes = samples, self.channels, *self.size
        x = torch.empty(sizes, dtype=DTYPES[dtype], device="meta")
        if self.layout == "last":
            x = torch.empty((samples, *self.size, self.channels), dtype=x.dtype, device="meta").movedim(-1, 1)
        d = torch.empty((samples, 2, *self.size), device="meta")
        index = torch.empty((samples, *self.size), dtype=torch.int32, device="meta")

        def forward() -> None:
            launcher(pooling.pool)(x, True)

        def backward() -> None:
            launcher(pooling.unpool)(d, index, self.channels, x.dtype, self.layout == "last")

        return (backward if self.backward else forward), x

    def bounds(self, plan: Plan) -> Iterator[Bound]:
        yield Bound("x_passes", most=1.001)
        yield Bound("l2_passes", most=1.001 + 12 / (2 * self.channels))  # and the small maps, once
        yield Bound("launches", most=1)
        yield Bound("copies", most=0)
        yield Bound("allocations", most=1 if self.backward else 2)
        yield Bound("arguments", most=7)
        yield Bound("variants", most=3)  # fewer samples: narrower rows
        if plan != EVERYWHERE:
            yield Bound("x_width", least=16)
            yield Bound("instructions", most=10 if self.backward else 20)
            if not self.backward:
                yield Bound("kb_in_flight", least=32)

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds(plan)), plan)


def pooling_cases() -> Iterator[Case]:
    for backward in (False, True):
        image = Pooling(backward)
        for layout in ("planes", "last"):
            yield replace(image, layout=layout).case(ON_SM90)
        yield replace(image, samples=2, channels=64, size=(16, 16)).case(EVERYWHERE)
