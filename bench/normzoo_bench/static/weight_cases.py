"""The calls of the kernels for weights that the gate profiles: standardization, and projection to a norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import projection, weights

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class Standardization:
    """A weight of `outputs` rows of `width` entries, with a gain, or the gradients of both."""

    backward: bool
    outputs: int
    width: int

    @property
    def name(self) -> str:
        return f"ws-{'bwd' if self.backward else 'fwd'}-{self.outputs}x{self.width}"

    def build(self, rows: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        w, dy = (torch.empty((rows, self.width), dtype=DTYPES[dtype], device="meta") for _ in range(2))
        gain, stats = torch.empty(rows, device="meta"), torch.empty((rows, 4), device="meta")

        def forward() -> None:
            launcher(weights.forward)(w, gain, 1, True, 1e-5, 0.5, True)

        def backward() -> None:
            launcher(weights.backward)(dy, w, stats, gain, 0.5, [True, True])

        return (backward if self.backward else forward), w

    def bounds(self) -> Iterator[Bound]:
        # A row too wide for registers is read once more, from L2.
        again = (2 if self.backward else 1) * (self.width > 16384)
        yield Bound("x_passes", most=(3 if self.backward else 2) + again + 0.001)
        yield Bound("launches", most=1)
        yield Bound("copies", most=0)
        yield Bound("allocations", most=2)
        yield Bound("arguments", most=7 if self.backward else 5)
        yield Bound("variants", most=1)
        if self.width % 8 == 0:
            yield Bound("x_width", least=16)

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.outputs, tuple(self.bounds()), plan)


_PIECE = 32768


@dataclass(frozen=True)
class Projection:
    """Float32 tensors of `pieces` programs together, to one norm."""

    ragged: bool = False  # with tensors that are not whole vectors
    pieces: int = 2048

    @property
    def name(self) -> str:
        return f"project-{self.pieces}{'-ragged' * self.ragged}"

    def build(self, pieces: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        addresses, sizes, owners = (torch.empty(pieces, dtype=d, device="meta") for d in _COLUMNS)
        first, count = (torch.empty(1, dtype=torch.int32, device="meta") for _ in range(2))
        table = projection.Table(addresses, sizes, owners, first, count, self.ragged)
        radii = torch.empty(1, device="meta")
        return lambda: projection.project_pieces(table, radii), torch.empty((pieces, _PIECE), device="meta")

    def bounds(self) -> Iterator[Bound]:
        yield Bound("x_passes", least=2.999, most=3.001)
        yield Bound("launches", most=2)
        yield Bound("copies", most=0)
        yield Bound("allocations", most=1)
        yield Bound("arguments", most=7)
        yield Bound("variants", most=1)
        yield Bound("kb_in_flight", least=64)
        if not self.ragged:
            yield Bound("x_width", least=16)

    def case(self, plan: Plan) -> Case:
        found = {"x_ptrs": 0, "size_ptr": _PIECE, "owner_ptr": 0, "first_ptr": 0, "count_ptr": self.pieces}
        return Case(self.name, self.build, self.pieces, tuple(self.bounds()), plan, tuple(found.items()))


_COLUMNS = (torch.int64, torch.int32, torch.int32)


def weight_cases() -> Iterator[Case]:
    for backward in (False, True):
        small = Standardization(backward, 2048, 1024)
        yield small.case(EVERYWHERE)
        yield replace(small, outputs=640, width=23040).case(SWEPT)
        yield replace(small, outputs=512, width=4608).case(SWEPT)
        yield replace(small, outputs=64, width=147).case(ON_SM90)
    yield Projection().case((("sm_90", ("fp32",)),))
    yield Projection(ragged=True).case(EVERYWHERE)
