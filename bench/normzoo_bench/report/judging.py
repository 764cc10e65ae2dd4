"""What a goal is, which rows it is about, and how what was measured of them decides it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product

from ..workloads import DIRECTIONS
from .documents import Documents, Row, Source, is_sweep
from .measures import Ratio

MET, MISSED, UNDECIDED = "met", "missed", "not decided"
ELSEWHERE, ABSENT = "not measurable here", "not measured here"
VERDICTS = (MET, MISSED, UNDECIDED, ELSEWHERE, ABSENT)
_SHOWN = 3
"""Rows that miss a goal and are named, and rows that there are not."""


@dataclass(frozen=True)
class Finding:
    verdict: str
    value: str
    """What was measured, or why nothing was."""
    sources: tuple[Source, ...] = ()
    missed: tuple[str, ...] = ()
    """What misses the goal, the worst first."""


Judge = Callable[[Documents], Finding]


@dataclass(frozen=True)
class Goal:
    key: str
    section: str
    what: str
    bound: str
    judge: Judge
    command: str
    """What measures it; the documents say themselves by what they were measured."""
    ahead: str
    """The next thing to try where it is missed."""


@dataclass(frozen=True)
class Chosen:
    """Which rows a goal is about; empty means all. Of layers, widths, dtypes, memory formats and directions
    that are named, every combination has to be there."""

    layers: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    """Patterns of workloads."""
    dtypes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    modes: tuple[str, ...] = ("any", "training")
    directions: tuple[str, ...] = ()
    sweeps: bool = False
    """Whether they are of a sweep."""

    def __call__(self, row: Row) -> bool:
        return (
            all(not asked or own in asked for own, asked in zip(_of(row), self._axes, strict=True))
            and (not self.uses or any(fnmatch(row["workload"], use) for use in self.uses))
            and (not self.modes or row["mode"] in self.modes)
            and bool(is_sweep(row)) == self.sweeps
        )

    @property
    def _axes(self) -> tuple[tuple, ...]:
        return self.layers, self.widths, self.dtypes, self.formats, self.directions

    def going(self, *directions: str) -> Chosen:
        return replace(self, directions=directions)

    def lacking(self, rows: Iterable[Row]) -> Iterator[str]:
        """What is named and that none of `rows` is of, in words."""
        axes = self._axes
        there = {tuple(own if asked else "" for own, asked in zip(_of(row), axes, strict=True)) for row in rows}
        open_ = [place for place in product(*(axis or ("",) for axis in axes)) if place not in there]
        begun = {layer for layer, *_ in there}
        if without := [layer for layer in self.layers if layer not in begun]:
            yield f"{len(without)} of {len(self.layers)} layers have no rows: {', '.join(without)}"
        if partly := [place for place in open_ if place[0] in begun]:
            yield "no rows of " + ", ".join(few([_place(place) for place in partly]))


def _of(row: Row) -> tuple:
    return row["layer"], row["shape"][-1], row["dtype"], row["memory_format"], row["direction"]


def _place(words: Iterable[object]) -> str:
    told = (f"{word} wide" if isinstance(word, int) else str(word) for word in words)
    return " ".join(word for word in told if word not in ("", "contiguous"))


def number(value: float) -> str:
    """Three digits, so that what misses a bound by a little does not look like it."""
    return f"{value:#.3g}".removesuffix(".") if abs(value) < 999.5 else f"{value:.0f}"


def named(row: Row) -> str:
    words = (row["layer"], row["workload"], row["dtype"], row["memory_format"], row["mode"], row["direction"])
    return " ".join(str(word) for word in words if word not in ("contiguous", "any"))


@dataclass(frozen=True)
class Measured:
    """One number that a goal is about."""

    source: Source
    name: str
    value: float
    spread: tuple[float, float] | None = None

    def __str__(self) -> str:
        around = f" ({number(self.spread[0])}-{number(self.spread[1])})" if self.spread else ""
        value = str(self.value) if isinstance(self.value, int) else number(self.value)
        return f"{self.name}: {value}{around}"


def of_ratios(found: Sequence[Ratio]) -> list[Measured]:
    return [Measured(r.source, named(r.row), r.median, (r.p20, r.p80)) for r in found]


def decided(
    documents: Documents,
    device: str,
    found: Sequence[Measured],
    gaps: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> Finding:
    """Missed where a value is out of the bounds; met where none is and there are no gaps. The median of a row
    decides, its range is shown."""

    def off(one: Measured) -> bool:
        return (least is not None and one.value < least) or (most is not None and one.value > most)

    gaps = tuple(gaps)
    if not found:
        return nothing(documents, device, gaps)
    values = sorted(one.value for one in found)
    worst = sorted(filter(off, found), key=lambda one: one.value, reverse=most is not None)
    ends = f"median {number(statistics.median(values))}, {number(values[0])} to {number(values[-1])}"
    text = f"{ends}; {len(found) - len(worst)} of {len(found)} rows" if len(found) > 1 else str(found[0])
    verdict = MISSED if worst else UNDECIDED if gaps else MET
    return Finding(verdict, "; ".join((text, *gaps)), sources_of(found), few(list(map(str, worst))))


def nothing(documents: Documents, device: str, gaps: Sequence[str] = (), predicted: str = "") -> Finding:
    """There are no such rows: of a GPU because there is none, else because nobody ran the command, or what is
    in the `gaps`."""
    there = any(source.device == device for source in documents.sources)
    if device == "cuda" and not there:
        return Finding(ELSEWHERE, "; ".join(filter(None, ("no GPU yet", predicted))))
    without_rows = "a GPU ran, and no such row is there" if device == "cuda" else ""
    return Finding(ABSENT, "; ".join(gaps) if there and gaps else without_rows)


def sources_of(found: Iterable[Measured]) -> tuple[Source, ...]:
    return tuple({one.source.name: one.source for one in found}.values())


def few(names: Sequence[str]) -> tuple[str, ...]:
    """The first of them, and how many more there are."""
    more = len(names) - _SHOWN
    return (*names[:_SHOWN], f"and {more} more") if more > 0 else tuple(names)


def gaps(
    documents: Documents,
    device: str,
    chosen: Chosen,
    rows: Iterable[Row],
    contenders: tuple[str, ...] = ("normzoo",),
    clock: str = "",
) -> list[str]:
    """Why `rows` do not decide a goal about all that is `chosen`: what has no row, and what of it the documents
    tell as failed or not run."""
    found = list(chosen.lacking(rows))
    if found:
        found += absent(documents, device, chosen, contenders)
    return found + unfinished(documents, device, chosen, contenders, clock)


def absent(documents: Documents, device: str, chosen: Chosen, contenders: tuple[str, ...]) -> Iterator[str]:
    """Why there is no such contender."""
    reasons = {
        f"{entry['contender']}: {entry['reason']}"
        for source in documents.sources
        for entry in (source.entries("absent") if source.device == device else ())
        if entry["contender"] in contenders and (not chosen.layers or entry["layer"] in chosen.layers)
    }
    yield from sorted(reasons)


def unfinished(
    documents: Documents,
    device: str,
    concerns: Chosen | Callable[[Row], bool],
    contenders: tuple[str, ...],
    clock: str = "",
    choice: str = "",
) -> list[str]:
    """What failed and what was not run, of rows that it `concerns`; directions and clocks may not be told.

    With `choice`, of the forms of which a measurement chooses.
    """
    failed, left = [], []
    for source in documents.sources:
        if source.device != device:
            continue
        for entry in source.entries("failed"):
            if entry.get("contender") in (*contenders, "all") and _fits(entry, concerns, clock):
                failed.append(f"{named(_told(entry))} {entry['contender']}".strip())
        for text in source.document.get("not_run") or ():
            row = _not_run(str(text))
            known = row is not None and row["choice"] == choice and row["contender"] in (*contenders, "all")
            if row is not None and known and _fits(row, concerns, clock):
                left.append(str(text))
    whats = ((failed, "failed"), (left, "not run"))
    return [f"{len(names)} {what}: {', '.join(few(names))}" for names, what in whats if names]


def _told(entry: Row) -> Row:
    return {**entry, "direction": str(entry.get("direction") or "").partition(" ")[0]}


def _fits(entry: Row, concerns: Callable[[Row], bool], clock: str) -> bool:
    """Whether it may concern; a check of gradients that failed is one of every direction that has some."""
    if any(name not in entry for name in ("layer", "workload", "shape", "dtype", "memory_format", "mode")):
        return False
    direction, _, by = str(entry.get("direction") or "").partition(" ")
    if clock and by and by != clock:
        return False
    if direction == "":
        tried: Iterable[str] = DIRECTIONS
    elif direction == "backward" and not by:
        tried = [name for name in DIRECTIONS if name != "forward"]
    else:
        tried = (direction,)
    return any(concerns({**entry, "direction": one}) for one in tried)


def _not_run(text: str) -> dict | None:
    """The case that `not_run` of a document names: layer, workload, dtype and, unless usual, memory format and
    mode, then a direction or a contender; before it a choice."""
    first, *words = text.split()
    choice = first.removesuffix(":") if first.endswith(":") else ""
    words = words if choice else [first, *words]
    if len(words) < 3 or "-" not in words[1]:
        return None
    layer, workload, dtype, *rest = words
    row = {"layer": layer, "workload": workload, "dtype": dtype, "choice": choice}
    try:
        row["shape"] = [int(n) for n in workload.rpartition("-")[2].split("x")]
    except ValueError:
        return None
    for name, values, usual in (
        ("memory_format", ("padded", "channels_last"), "contiguous"),
        ("mode", ("training", "eval"), "any"),
        ("direction", DIRECTIONS, ""),
    ):
        row[name] = rest.pop(0) if rest and rest[0] in values else usual
    return {**row, "contender": rest[0] if rest else "all"}


def small(row: Row, most_bytes: float) -> bool:
    """Whether x has so few bytes, in 16 bits."""
    return 2 * math.prod(row["shape"]) <= most_bytes
