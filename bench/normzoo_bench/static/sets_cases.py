"""The arithmetic of combines that the gate profiles: on statistics of 256 channels, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normzoo_kernels import balance, carry, gliding, pixels, sets, stages

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


def _mixed(samples: int, dtype: torch.dtype) -> Call:
    entries = [_empty(samples, _CHANNELS) for _ in range(3)]
    rows = [_empty(_CHANNELS, dtype=dtype) for _ in range(4)]
    return lambda: launcher(stages.mixed)(*entries, *rows, 0.3, 49.0, 1e-5)


def _stored(samples: int, dtype: torch.dtype) -> Call:
    pivot, rows = _empty(samples, _CHANNELS), [_empty(_CHANNELS, dtype=dtype) for _ in range(4)]
    return lambda: launcher(stages.mixed)(pivot, None, None, *rows, 1.0, 1.0, 1e-5)


def _scaling_grads(samples: int, dtype: torch.dtype) -> Call:
    entries = [_empty(samples, _CHANNELS) for _ in range(4)]
    rows = [_empty(_CHANNELS, dtype=dtype) for _ in range(2)]
    return lambda: launcher(stages.scaling_backward)(*entries, *rows)


def _moved(samples: int, dtype: torch.dtype) -> Call:
    rows = [_empty(_CHANNELS), _empty(_CHANNELS), *(_empty(_CHANNELS, dtype=dtype) for _ in range(2))]
    return lambda: launcher(stages.moved)(*rows, 0.1, True)


@dataclass(frozen=True)
class _Second:
    """Group norm behind another norm, with so many `parameters` of each kind."""

    parameters: int
    backward: bool = False

    def __call__(self, samples: int, dtype: torch.dtype) -> Call:
        entries = [_empty(samples, _CHANNELS) for _ in range(6)]
        second = [_empty(self.parameters, dtype=dtype) for _ in range(2)]
        kept = [_empty(samples, 32) for _ in range(2)]
        if self.backward:
            return lambda: launcher(stages.second_backward)(*entries, *second, *kept, 32, 49.0)
        return lambda: launcher(stages.second)(*entries[2:], *second, 32, 49.0, 1e-5)


def _ghosts(samples: int, dtype: torch.dtype) -> Call:
    ghosts = [_empty(-(-samples // 4), _CHANNELS) for _ in range(4)]
    return lambda: launcher(balance.follow)(*ghosts, 0.9, 3.2)


def _shares(samples: int, dtype: torch.dtype) -> Call:
    ids, psi = _empty(samples, dtype=torch.long), _empty(10, dtype=dtype)
    return lambda: launcher(balance.shares)(ids, psi, _empty(dtype=torch.long), -1, 49.0)


def _shares_grad(samples: int, dtype: torch.dtype) -> Call:
    ids, psi = _empty(samples, dtype=torch.long), _empty(10, dtype=dtype)
    grads = (_empty(samples), _empty())
    return lambda: launcher(balance.shares_backward)(*grads, ids, psi, _empty(dtype=torch.long), -1, 49.0)


def _targets(samples: int, dtype: torch.dtype) -> Call:
    rows = [_empty(_CHANNELS), _empty(_CHANNELS), *(_empty(_CHANNELS, dtype=dtype) for _ in range(2))]
    return lambda: launcher(balance.targets)(*rows, _empty(dtype=torch.long), 0.0, -0.1, 3.0, -0.1)


def _pull(samples: int, dtype: torch.dtype) -> Call:
    entries = [_empty(samples, _CHANNELS) for _ in range(3)]
    return lambda: launcher(carry.pull)(*entries, None, 49.0)


def _totals(samples: int, dtype: torch.dtype) -> Call:
    return lambda: launcher(carry.totals)([_empty(samples, _CHANNELS) for _ in range(4)])


@dataclass(frozen=True)
class _Regions:
    """Scale and shift of two regions, by statistics of samples, or all gradients."""

    backward: bool = False

    def __call__(self, samples: int, dtype: torch.dtype) -> Call:
        count, pivot, delta, m2, dscale, dshift = (_empty(2, samples, _CHANNELS) for _ in range(6))
        parameters = [_empty(_CHANNELS, dtype=dtype) for _ in range(4)]
        if self.backward:
            given = (dscale, dshift, count, delta, m2, *parameters, 1e-5, False)
            return lambda: launcher(pixels.scaling_backward)(*given)
        return lambda: launcher(pixels.scaling)(count, pivot, delta, m2, *parameters, 1e-5, False)


@dataclass(frozen=True)
class _Glide:
    """Two parameters at the times of all samples, or all gradients."""

    backward: bool = False

    def __call__(self, samples: int, dtype: torch.dtype) -> Call:
        t, parameters = _empty(samples, 1), [_empty(_CHANNELS, dtype=dtype) for _ in range(8)]
        ups = [_empty(samples, _CHANNELS) for _ in range(2)]
        if self.backward:
            return lambda: launcher(gliding.backward)(ups, t, parameters, True)
        return lambda: launcher(gliding.values)(t, parameters)


def _gate(samples: int, dtype: torch.dtype) -> Call:
    return lambda: launcher(pixels.gate)(_empty(samples, 1, 16, 16), 0.8)


def _gate_grad(samples: int, dtype: torch.dtype) -> Call:
    pixel = [_empty(samples, 1, 16, 16) for _ in range(3)]
    return lambda: launcher(pixels.gate_backward)(*pixel)


@dataclass(frozen=True)
class Pixels:
    """The map by pixels of x (samples, 256, 56, 56), in one sweep each way."""

    backward: bool
    last: bool
    samples: int = 16

    @property
    def name(self) -> str:
        return f"pixel-map-{'bwd' if self.backward else 'fwd'}{'-last' * self.last}-{self.samples}"

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, Tensor]:
        size = (samples, 56, 56, _CHANNELS) if self.last else (samples, _CHANNELS, 56, 56)
        x, dy = (_empty(*size, dtype=DTYPES[dtype]) for _ in range(2))
        if self.last:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        scale, shift = (_empty(samples, 1, 56, 56) for _ in range(2))
        if self.backward:
            return lambda: launcher(pixels.apply_backward)(dy, x, scale), x
        return lambda: launcher(pixels.apply)(x, scale, shift), x

    def case(self, plan: Plan) -> Case:
        bounds = [Bound("x_passes", most=(3 if self.backward else 2) + 0.001), Bound("launches", most=1)]
        bounds += [Bound("copies", most=0), Bound("variants", most=3)]  # fewer samples: narrower rows
        if plan != EVERYWHERE:
            bounds.append(Bound("x_width", least=16))
        return Case(self.name, self.build, self.samples, tuple(bounds), plan)


_OTHERS = {
    "mixed-scaling": _mixed,
    "stored-scaling": _stored,
    "scaling-grads": _scaling_grads,
    "second-stage-fwd": _Second(_CHANNELS),
    "second-stage-bwd": _Second(_CHANNELS, True),
    "statistics-pull": _pull,
    "sum-rows": _totals,
    "region-scaling-fwd": _Regions(),
    "region-scaling-bwd": _Regions(True),
    "glide-fwd": _Glide(),
    "glide-bwd": _Glide(True),
    "importance-fwd": _gate,
    "importance-bwd": _gate_grad,
}
_OF_FEW = {
    "second-stage-groups-fwd": _Second(32),
    "second-stage-groups-bwd": _Second(32, True),
    "moved-statistics": _moved,
    "follow-ghosts": _ghosts,
    "task-shares-fwd": _shares,
    "task-shares-bwd": _shares_grad,
    "task-targets": _targets,
}
"""Whose tensors are not as large as the statistics of all samples, or are read in single entries."""


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
    for name, calls in _OTHERS.items():
        yield Small(name, calls).case(ON_SM90)
        yield Small(f"{name}-few", calls, samples=8).case(EVERYWHERE)
    for name, calls in _OF_FEW.items():
        yield Small(name, calls, vectors=False).case(EVERYWHERE)
    for backward in (False, True):
        for last in (False, True):
            yield Pixels(backward, last).case(ON_SM90)
        yield Pixels(backward, False, samples=2).case(EVERYWHERE)
