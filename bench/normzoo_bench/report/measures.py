"""What the goals and the plots ask the documents: ratios, shares of the copy, launches, memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..results import KEY
from ..workloads import DIRECTIONS
from .documents import Documents, Row, Source, is_sweep

LAYER_DIRECTIONS = DIRECTIONS
EMPTY = "normzoo-empty"
"""The contender whose kernels do nothing."""
_BUT_CONTENDER = tuple(name for name in KEY if name != "contender")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another, with the range of it."""

    source: Source
    row: Row
    """Of normzoo."""
    median: float
    p20: float
    p80: float

    @property
    def inverse(self) -> Ratio:
        """How many times as long."""
        return Ratio(self.source, self.row, 1 / self.median, 1 / self.p80, 1 / self.p20)


class Counted(NamedTuple):
    source: Source
    layer: str
    direction: str
    launches: int


def ratios(documents: Documents, device: str, other: str, own: str = "normzoo", **wanted: Any) -> list[Ratio]:
    """The ratios of `own` to `other` in all rows where both are; `wanted` as in :meth:`Documents.rows`."""
    theirs = {
        (source.name, *_place(row)): row for source, row in documents.rows(device, contender=other, **wanted)
    }
    found = []
    for source, row in documents.rows(device, contender=own, **wanted):
        if other_row := theirs.get((source.name, *_place(row))):
            found.append(_ratio(source, row, other_row))
    return found


def _place(row: Row) -> tuple:
    return tuple(row[name] for name in _BUT_CONTENDER)


def _ratio(source: Source, row: Row, other: Row) -> Ratio:
    """Round by round where the document has it, else of the two summaries, as wide as these allow."""
    name = other["contender"]
    paired = row.get("speedup") if row.get("baseline") == name else (row.get("speedups") or {}).get(name)
    if paired:
        return Ratio(source, row, *(paired[name] for name in ("median", "p20", "p80")))
    return _of_times(source, row, other)


def _of_times(source: Source, row: Row, other: Row) -> Ratio:
    own, their = row["seconds"], other["seconds"]
    return Ratio(
        source,
        row,
        their["median"] / own["median"],
        their["p20"] / own["p80"],
        their["p80"] / own["p20"],
    )


def across(documents: Documents, device: str, layer: str, other: str, **wanted: Any) -> list[Ratio]:
    """The ratios of normzoo's `layer` to torch's `other` on the same input in the same document. They did not
    take turns, so these are ratios of medians."""
    theirs = {
        (source.name, *_input(row)): row
        for source, row in documents.rows(device, layer=other, contender="torch", **wanted)
        if row["mode"] != "eval"
    }
    found = []
    for source, row in documents.rows(device, layer=layer, contender="normzoo", **wanted):
        other_row = theirs.get((source.name, *_input(row)))
        if other_row and row["mode"] != "eval":
            found.append(_of_times(source, row, other_row))
    return found


def _input(row: Row) -> tuple:
    return (tuple(row["shape"]), *(row[name] for name in ("dtype", "memory_format", "direction", "clock")))


def smallest(found: Iterable[Ratio]) -> list[Ratio]:
    """Of every layer the ratios of its smallest shape alone."""
    found = list(found)
    least: dict[tuple[str, str], int] = {}
    for r in found:
        key = r.source.name, r.row["layer"]
        least[key] = min(least.get(key, math.prod(r.row["shape"])), math.prod(r.row["shape"]))
    return [r for r in found if math.prod(r.row["shape"]) == least[r.source.name, r.row["layer"]]]


def shares(documents: Documents, device: str, **wanted: Any) -> list[tuple[Source, Row]]:
    """Rows of normzoo that tell of memory: by a GPU's clock of kernels, with buffers that exceed the cache."""
    clock = {"cuda": "kernel", "cpu": "wall"}[device]
    found = documents.rows(device, contender="normzoo", clock=clock, **wanted)
    return [(source, row) for source, row in found if row.get("share_of_copy") and row.get("cold")]


def without_sweeps(rows: Iterable[Any]) -> list[Any]:
    return [entry for entry in rows if not is_sweep(entry.row if isinstance(entry, Ratio) else entry[1])]


def launches(documents: Documents) -> list[Counted]:
    """Kernels and torch's own operators that a call starts, the most that was counted of each layer."""
    most: dict[tuple[str, str], Counted] = {}
    for source in documents.sources:
        for row in source.entries("rows") if source.name == "launches" else ():
            for direction in ("forward", "backward"):
                number = _count(row, direction)
                if number is not None:
                    counted = Counted(source, str(row["layer"]), direction, number)
                    key = counted.layer, direction
                    most[key] = max(most.get(key, counted), counted, key=lambda one: one.launches)
    return list(most.values())


def _count(row: Row, direction: str) -> int | None:
    """Of a row for a direction, or of one with both; kernels and operators of torch together."""
    found = row.get("launches") if row.get("direction") == direction else None
    found = row.get(direction) if "direction" not in row else found
    if isinstance(found, Mapping):
        found = found.get("launches", sum(n for n in found.values() if isinstance(n, int)))
    return found if isinstance(found, int) else None


def memory(documents: Documents, device: str, what: str, direction: str) -> list[tuple[Source, Row, float]]:
    """(document, row of normzoo, `what` of it in that of torch); no sweeps."""
    by_place: dict[tuple, dict[str, tuple[Source, Row]]] = defaultdict(dict)
    for source, row in without_sweeps(documents.rows(device, direction=direction)):
        by_place[(source.name, *_place(row))][row["contender"]] = source, row
    found = []
    for of in by_place.values():
        if {"normzoo", "torch"} <= set(of):
            source, row = of["normzoo"]
            theirs = of["torch"][1].get(what)
            if row.get(what) and theirs:
                found.append((source, row, row[what] / theirs))
    return found
