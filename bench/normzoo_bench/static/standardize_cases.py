"""The calls of batch, group and instance norm that the gate profiles: all launches of a step, and the one that
moves running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import standardize, tracking

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class Standardized:
    """x (samples, channels, *size), with weight and bias; `groups` as the launchers take them."""

    backward: bool
    groups: int
    channels: int
    size: tuple[int, ...]
    samples: int = 32
    last: bool = False  # the channels of a position side by side

    @property
    def name(self) -> str:
        size = "x".join(map(str, (self.samples, self.channels, *self.size)))
        kind = f"groups{self.groups}" if self.groups else "batch"
        return "-".join(("standardize", "bwd" if self.backward else "fwd", kind, size, *["last"] * self.last))

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        sizes = (samples, *self.size, self.channels) if self.last else (samples, self.channels, *self.size)
        x, dy = (torch.empty(sizes, dtype=DTYPES[dtype], device="meta") for _ in range(2))
        if self.last:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        weight, bias = (torch.empty(self.channels, device="meta") for _ in range(2))
        stats = torch.empty(
            (7, *x.shape[: 2 if self.groups else 0], *[self.channels] * (not self.groups)), device="meta"
        )

        def forward() -> None:
            launcher(standardize.forward)(x, weight, bias, self.groups, 1e-5)

        def backward() -> None:
            launcher(standardize.backward)(dy, x, stats, weight, bias, self.groups, [True] * 3)

        return (backward if self.backward else forward), x

    def bounds(self) -> Iterator[Bound]:
        small = self.size == (7, 7) and not self.last  # planes that start on no vector
        yield Bound("x_passes", most=(5 if self.backward else 3) + 0.3 * small * (1 + self.backward) + 0.03)
        yield Bound("launches", most=4)
        yield Bound("copies", most=0)
        yield Bound("arguments", most=16)

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds()), plan)


@dataclass(frozen=True)
class Tracking:
    """Running statistics of `channels`, with those of `samples` where these are averaged."""

    channels: int
    samples: int = 1
    skipping: bool = False
    plain: bool = False

    @property
    def name(self) -> str:
        ends = ["skipping"] * self.skipping + ["plain"] * self.plain
        return "-".join(("track", f"{self.samples}x{self.channels}", *ends))

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        running = [torch.empty(self.channels, dtype=DTYPES[dtype], device="meta") for _ in range(2)]
        new = torch.empty((samples, self.channels), device="meta")
        number = torch.empty((), dtype=torch.long, device="meta")
        skipped, factor = number if self.skipping else None, None if self.plain else 0.1

        def call() -> None:
            launcher(tracking.track)(running[0], new, running[1], new, number, skipped, None, factor, 1)

        return call, torch.empty((samples, 1 << 20), device="meta")  # of which nothing is read

    def case(self, plan: Plan) -> Case:
        bounds = (Bound("launches", most=1), Bound("copies", most=0), Bound("variants", most=2))
        return Case(self.name, self.build, self.samples, bounds, plan)


def standardize_cases() -> Iterator[Case]:
    for backward in (False, True):
        batch = Standardized(backward, 0, 256, (56, 56))
        yield batch.case(SWEPT)
        yield replace(batch, last=True).case(SWEPT)
        yield replace(batch, channels=2048, size=(7, 7)).case(ON_SM90)
        yield replace(batch, samples=8).case(EVERYWHERE)
        for groups, channels, size in ((32, 320, (64, 64)), (1, 1280, (16, 16)), (640, 640, (32, 32))):
            group = Standardized(backward, groups, channels, size, samples=16)
            yield group.case(ON_SM90)
            yield replace(group, last=True).case(ON_SM90)
        yield Standardized(backward, 32, 512, (32, 32), samples=8).case(EVERYWHERE)
        yield Standardized(backward, 32, 512, (128, 128), samples=2).case(ON_SM90)
    yield Tracking(2048).case(EVERYWHERE)
    yield Tracking(256, skipping=True).case(ON_SM90)
    yield Tracking(64, plain=True).case(ON_SM90)
    yield Tracking(512, samples=64).case(ON_SM90)
