"""The arithmetic of combines that the gate profiles: on statistics of 256 channels, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normzoo_kernels import sets

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, Bound, Call, Case, Plan, launcher

_CHANNELS = 256


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Small:
    """A call of launchers on the statistics of so many samples, with parameters of a dtype."""

    name: str
    calls: Callable[[int, torch.dtype], Call]
    samples: int = 32
    launches: int = 1
    passes: float = 0
    """Over one array of statistics."""
    vectors: bool = True

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, Tensor]:
        return self.calls(samples, DTYPES[dtype]), _empty(samples, _CHANNELS)

    def case(self, plan: Plan) -> Case:
        bounds = [Bound("launches", most=self.launches), Bound("copies", most=0), Bound("variants", most=2)]
        if self.passes:
            bounds.append(Bound("x_passes", most=self.passes + 0.001))
        if self.vectors and plan != EVERYWHERE:
            bounds.append(Bound("x_width", least=16))
        return Case(self.name, self.build, self.samples, tuple(bounds), plan)


@dataclass(frozen=True)
class _Union:
    """A union and, by `kind`, what becomes of its entries, or the gradients of all of it."""

    how: str
    kind: str = "standardize"
    square: bool = False
    weighted: bool = False
    backward: bool = False

    def __call__(self, samples: int, dtype: torch.dtype) -> Call:
        several = 4 if samples % 4 == 0 else 1
        size = {"batch": samples, "groups": 8}.get(self.how, several)
        shape = {"batch": (1, _CHANNELS), "groups": (samples, _CHANNELS // 8)}.get(
            self.how, (samples // several, _CHANNELS)
        )
        scaled, unions = self.kind != "none", self.how != "own"
        shifted = self.kind == "standardize"
        parameters = [_empty(_CHANNELS, dtype=dtype) if shifted else None for _ in range(2)]
        weights = (_empty(samples, _CHANNELS), _empty(samples), _empty()) if self.weighted else (None,) * 3
        entries = [_empty(samples, _CHANNELS) for _ in range(3)]
        given = (*entries, *weights, *parameters)
        how = (49.0, self.how, size, self.kind, self.square, 1e-5)

        def forward() -> None:
            launcher(sets.forward)(*given, *how)

        def backward() -> None:
            dscale, dshift = (_empty(samples, _CHANNELS) if there else None for there in (scaled, shifted))
            grads = [_empty(*shape) if unions else None for _ in range(5)]
            kept = [_empty(*shape)] * 4
            needs = [True, True, self.weighted, shifted, shifted]
            launcher(sets.backward)(dscale, dshift, *grads, *given, *kept, *how, needs)

        return backward if self.backward else forward


def sets_cases() -> Iterator[Case]:
    for backward in (False, True):
        end = "bwd" if backward else "fwd"
        for how in ("own", "batch", "chunks", "interleaved", "groups"):
            yield Small(f"sets-{how}-{end}", _Union(how, backward=backward)).case(ON_SM90)
        weighted = _Union("batch", weighted=True, backward=backward)
        yield Small(f"sets-weighted-{end}", weighted, launches=1 + backward).case(EVERYWHERE)
        roots = _Union("groups", "root", True, backward=backward)
        yield Small(f"sets-root-{end}", roots).case(EVERYWHERE)
        yield replace(Small(f"sets-none-{end}", _Union("batch", "none", backward=backward)), samples=8).case(
            ON_SM90
        )
