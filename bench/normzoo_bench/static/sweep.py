"""The calls that together show every configuration the static tables of forms can choose.

What a call is made of comes from the cases of the gate: the options that occur there, each with every width,
or with every number of channels, samples and positions. A new kernel is swept as soon as it has a case whose
fields go by these names.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from . import fake
from .alike import Configuration, configurations
from .case import Case
from .row_cases import PARAMETERS, RowNorm

_MOST = 1 << 17
"""Widest row."""

_SHAPE = {
    "width", "channels", "size", "samples", "rows", "outputs", "tokens", "pieces", "part", "groups", "window",
}  # fmt: skip
"""Fields of a case that say how large it is; the others are options."""

_CHANNELS = (1, 3, 8, 20, 64, 149, 256, 442, 2048)
_SAMPLES = (1, 5, 32)
_FEW_AND_MANY = (7, 4096)
_GROUPS = (1, 4, 32)

# What holds at any size; other bounds of a case may be of the shape that it has there.
_OF_ANY = ("copies", "arguments", "allocations", "raises")


@dataclass(frozen=True)
class Call:
    """`source`, a case of some kind, built with `rows`."""

    source: Any
    rows: int
    dtype: str
    target: str

    def configurations(self) -> set[Configuration]:
        target = fake.TARGETS[self.target]
        call, _ = self.source.build(self.rows, self.dtype, target)
        return set().union(*(configurations(*launch) for launch in fake.chosen(call, target)))


@dataclass(frozen=True)
class Job:
    """A call of the sweep as a case, and the hashes of the configurations that are to be compiled."""

    call: Call
    case: Case
    wanted: frozenset[int]


def widths() -> list[int]:
    """Both ends of every tile of rows, in each alignment."""
    found = set()
    block = 1
    while block <= _MOST:
        found |= {block, block - 1, block - 2, block - 4, block - 8, 3 * block // 4}
        block *= 2
    return sorted(width for width in found if width > 0)


def counts() -> list[int]:
    """Positions that fill a tile of planes, and that just need it, in each alignment."""
    found = {1}
    block = 4
    while block <= 1 << 13:
        found |= {block, block - 1, block - 2, block // 2 + 2, 5 * block // 8 // 8 * 8, 5 * block // 8 | 1}
        block *= 2
    return sorted(count for count in found if count > 0)


def _wider(source: Any) -> Iterator[tuple[Any, int]]:
    most = 8192 if hasattr(source, "tokens") else _MOST
    for width in (width for width in widths() if width <= most):
        if hasattr(source, "tokens"):
            part = source.part and max(1, width // 4)
            for tokens in (1, 4, 256):
                yield replace(source, width=width, tokens=tokens, part=part), source.samples
        else:
            yield replace(source, width=width), 2048


def _larger(source: Any) -> Iterator[tuple[Any, int]]:
    flat = not getattr(source, "size", None)
    sizes = (None,) if flat else [(count, *[1] * (len(source.size) - 1)) for count in counts()]
    for channels, size, samples in product(_CHANNELS, sizes, _FEW_AND_MANY if flat else _SAMPLES):
        larger = replace(source, channels=channels)
        if size and samples * min(channels, max(size)) == 1:
            continue  # a parameter, or a plane, is as large as x: they are told apart by their sizes
        if size:
            larger = replace(larger, size=size)
        if getattr(source, "groups", 0):
            for groups in {*_GROUPS, channels}:
                if channels % groups == 0 and (samples > 1 or groups < channels):  # statistics as large as x
                    yield replace(larger, groups=groups), samples
        else:
            yield larger, samples


def variations(source: Any, rows: int) -> Iterator[tuple[Any, int]]:
    """(a case of other size, its rows) over all sizes."""
    if hasattr(source, "width"):
        return _wider(source)
    if hasattr(source, "channels"):
        return _larger(source)
    return iter([(source, rows)])


def _options(source: Any) -> tuple:
    """The fields of a case that are no sizes, and which sizes it has."""
    of = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    sizes = (bool(of.get(name)) for name in ("size", "groups", "rows", "part"))
    return type(source), *sizes, *((name, value) for name, value in of.items() if name not in _SHAPE)


def _row_norms(backward: bool) -> Iterator[RowNorm]:
    """Every kind with every number of parameters and of gradients, with and without a residual."""
    for kind, parameters in PARAMETERS.items():
        for without, add, frozen in product({"", parameters[1:], parameters}, (False, True), (False, backward)):
            yield RowNorm(kind, backward, 4096, add=add, frozen=frozen, without=without)


def templates(cases: Iterable[Case]) -> list[tuple[Case, Any]]:
    """One case for each set of options, and what builds it; of the row norms every number of gradients."""
    found: dict[tuple, tuple[Case, Any]] = {}
    for case in cases:
        source = case.source
        found.setdefault(_options(source), (case, source))
        if isinstance(source, RowNorm):
            for other in _row_norms(source.backward):
                found.setdefault(_options(other), (other.case(case.plan), other))
    return list(found.values())


def calls(cases: Iterable[Case], target: str, seed: int) -> list[tuple[Case, Call]]:
    """All calls of the sweep on one target, in an order that `seed` decides, each with the case it is from."""
    grid = [
        (case, Call(varied, rows, dtype, target))
        for case, source in templates(cases)
        for varied, rows in variations(source, case.rows)
        for dtype in ("bf16", "fp32")
    ]
    random.Random(seed).shuffle(grid)
    return grid


def planned(cases: Iterable[Case]) -> Iterator[Call]:
    """The calls of the cases themselves."""
    for case in cases:
        for target, dtypes in case.plan:
            for dtype in dtypes:
                yield Call(case.source, case.rows, dtype, target)


def jobs(cases: Iterable[Case], targets: Iterable[str], seed: int, most: int | None = None) -> list[Job]:
    """Calls of the sweep that together have every configuration that the cases leave out; `most` of them.

    sm_90 stands for all targets; on another one only the configurations are compiled that sm_90 does not have,
    as far as a quarter of the calls shows them.
    """
    cases = list(cases)
    seen = set().union(*(call.configurations() for call in planned(cases)))
    chosen: list[Job] = []
    for target in sorted(targets, key=lambda name: name != "sm_90"):
        swept = calls(cases, target, seed)[:: 1 if target == "sm_90" else 4]
        alone = _that_differ(swept if most is None else swept[: 5 * most])
        for least in (8, 4, 2, 1):  # first those that show much at once
            for found, (like, call) in alone.items():
                new = set(found) - seen
                if len(new) >= least:
                    seen |= new
                    chosen.append(_job(like, call, new))
    return chosen[:most]


def _that_differ(swept: Iterable[tuple[Case, Call]]) -> dict[tuple[Configuration, ...], tuple[Case, Call]]:
    """One call for each set of configurations, each of which is kept once."""
    known: dict[Configuration, Configuration] = {}
    found: dict[tuple[Configuration, ...], tuple[Case, Call]] = {}
    for like, call in swept:
        of_call = {known.setdefault(one, one) for one in call.configurations()}
        found.setdefault(tuple(sorted(of_call, key=id)), (like, call))
    return found


def _job(like: Case, call: Call, new: Iterable[Configuration]) -> Job:
    bounds = tuple(bound for bound in like.bounds if bound.measure in _OF_ANY)
    name = f"{call.source.name}~{call.rows}"
    case = Case(name, call.source.build, call.rows, bounds, ((call.target, (call.dtype,)),), like.loads)
    return Job(call, case, frozenset(map(hash, new)))
