"""The forms that only a measurement can choose (`_choices.py` of the kernels), in sizes where they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import _choices

from . import fake
from .case import EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan
from .row_cases import ROWS, RowNorm
from .standardize_cases import Standardized


def _under(call: Call, **values: int | bool) -> Call:
    def chosen() -> None:
        with _choices.trying(**values):
            call()

    return chosen


@dataclass(frozen=True)
class OnChip(Standardized):
    """Of sets that a program holds, in sizes where it does."""

    @property
    def name(self) -> str:
        return f"on-chip-{super().name}"

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        call, x = super().build(samples, dtype, target)
        return _under(call, on_chip=True), x

    def bounds(self) -> Iterator[Bound]:
        yield Bound("x_passes", most=3 if self.backward else 2)
        yield Bound("launches", most=2 if self.backward and self.groups else 1)
        yield Bound("copies", most=0)
        yield Bound("arguments", most=15)
        beside = self.channels // max(self.groups, 1) if self.last else math.prod(self.size)
        yield Bound("x_width", least=2 * math.gcd(beside, 8), dtypes=("bf16",))

    def case(self, plan: Plan) -> Case:
        bounds = tuple(b for b in self.bounds() if plan != EVERYWHERE or b.measure != "x_width")
        return Case(self.name, self.build, self.samples, bounds, plan)


@dataclass(frozen=True)
class Reversed:
    """The map that begins where the statistics have ended."""

    norm: Standardized

    @property
    def name(self) -> str:
        return f"reversed-{self.norm.name}"

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        call, x = self.norm.build(samples, dtype, target)
        return _under(call, reversed_map=True), x

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.norm.samples, tuple(self.norm.bounds()), plan)


@dataclass(frozen=True)
class RowGroup:
    """A backward pass of wide rows, more of them in a step."""

    norm: RowNorm
    rows: int

    @property
    def name(self) -> str:
        return f"row-group{self.rows}-{self.norm.name}"

    def build(self, rows: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        call, x = self.norm.build(rows, dtype, target)
        return _under(call, row_group=self.rows), x

    def case(self, plan: Plan) -> Case:
        most = (("x_passes", 5.01), ("launches", 2), ("copies", 0))
        bounds = (Bound("x_width", least=16), *(Bound(name, most=value) for name, value in most))
        return Case(self.name, self.build, ROWS[self.norm.width], bounds, plan)


def choice_cases() -> Iterator[Case]:
    for backward in (False, True):
        batch = OnChip(backward, 0, 1024, (14, 14))
        yield batch.case(SWEPT)
        if not backward:  # of 16-bit numbers a forward pass holds more
            yield replace(batch, channels=256, size=(28, 28)).case(ON_SM90)
            yield OnChip(backward, 32, 640, (32, 32), samples=16).case(ON_SM90)
        yield replace(batch, channels=2048, size=(7, 7)).case(SWEPT)
        yield replace(batch, channels=4096, size=(4, 4), last=True).case(SWEPT)
        yield replace(batch, channels=512, size=(4, 4), samples=64).case(EVERYWHERE)
        for groups, channels, size in ((32, 1280, (16, 16)), (32, 640, (8, 8)), (64, 64, (64, 64))):
            group = OnChip(backward, groups, channels, size, samples=32)
            # As float32 a group of 40 such planes leaves too few registers in the backward pass.
            yield group.case(ON_SM90 if size == (16, 16) else SWEPT)
            if size != (64, 64):
                yield replace(group, last=True).case(ON_SM90 if size == (16, 16) else SWEPT)
        yield OnChip(backward, 32, 512, (16, 16), samples=16).case(EVERYWHERE)
        for layer in (
            Standardized(backward, 0, 256, (56, 56)),
            Standardized(backward, 0, 256, (56, 56), last=True),
            Standardized(backward, 32, 320, (64, 64), samples=16),
            Standardized(backward, 0, 2048, (7, 7)),
        ):
            yield Reversed(layer).case(ON_SM90)
        yield Reversed(Standardized(backward, 0, 256, (56, 56), samples=8)).case(EVERYWHERE)
    for width in (16384, 32768, 65536):
        for rows in (8, 16):
            yield RowGroup(RowNorm("ln", True, width), rows).case(SWEPT)
    yield RowGroup(RowNorm("rms", True, 16384), 8).case(EVERYWHERE)
    yield RowGroup(RowNorm("rms", True, 16384), 16).case(SWEPT)
