"""What a goal is, and the ways in which the documents decide about one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from .documents import Documents, Row, Source
from .measures import (
    EMPTY,
    LAYER_DIRECTIONS,
    Ratio,
    launches,
    memory,
    predictions,
    ratios,
    shares,
    without_sweeps,
)

MET, MISSED, ELSEWHERE, ABSENT = "met", "missed", "not measurable here", "not measured here"
_SHOWN = 3
"""Rows that miss a goal and are named."""


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
    """Which rows a goal is about; empty means all."""

    layers: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    """Patterns of workloads."""
    dtypes: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    widths: tuple[float, float] = (0, float("inf"))
    modes: tuple[str, ...] = ("any", "training")

    def __call__(self, row: Row) -> bool:
        return (
            (not self.layers or row["layer"] in self.layers)
            and (not self.uses or any(fnmatch(row["workload"], use) for use in self.uses))
            and (not self.dtypes or row["dtype"] in self.dtypes)
            and (not self.formats or row["memory_format"] in self.formats)
            and self.widths[0] <= row["shape"][-1] <= self.widths[1]
            and (not self.modes or row["mode"] in self.modes)
        )


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


def decided(found: Sequence[Measured], least: float | None = None, most: float | None = None) -> Finding:
    """Met where every value is within the bounds. The median of a row decides, its range is shown."""

    def off(one: Measured) -> bool:
        return (least is not None and one.value < least) or (most is not None and one.value > most)

    low = most is None
    values = sorted(one.value for one in found)
    worst = sorted(filter(off, found), key=lambda one: one.value, reverse=not low)
    ends = f"median {number(statistics.median(values))}, {number(values[0])} to {number(values[-1])}"
    text = f"{ends}; {len(found) - len(worst)} of {len(found)} rows" if len(found) > 1 else str(found[0])
    return Finding(MISSED if worst else MET, text, _sources(found), _few(worst))


def _sources(found: Iterable[Measured]) -> tuple[Source, ...]:
    return tuple({one.source.name: one.source for one in found}.values())


def _few(worst: Sequence[Measured]) -> tuple[str, ...]:
    return (*map(str, worst[:_SHOWN]), *_more(len(worst)))


def _more(count: int) -> tuple[str, ...]:
    return (f"and {count - _SHOWN} more",) if count > _SHOWN else ()


def nothing(device: str, predicted: str = "", sources: tuple[Source, ...] = ()) -> Finding:
    """There are no such rows: of a GPU because there is none, of a CPU because nobody ran the command."""
    if device == "cuda":
        return Finding(ELSEWHERE, predicted or "no GPU", sources)
    return Finding(ABSENT, "")


def of_ratios(found: Sequence[Ratio]) -> list[Measured]:
    return [Measured(r.source, named(r.row), r.median, (r.p20, r.p80)) for r in found]


def bandwidth(chosen: Chosen, direction: str, least: float) -> Judge:
    """The share of the copy's speed on a GPU; without one, what the bytes of the static gate allow."""

    def judge(documents: Documents) -> Finding:
        rows = without_sweeps(shares(documents, "cuda", direction=direction))
        found = [Measured(s, named(row), row["share_of_copy"]) for s, row in rows if chosen(row)]
        if found:
            return decided(found, least=least)
        allowed = [p for p in predictions(documents) if p.layer in chosen.layers and p.direction == direction]
        if not allowed:
            return nothing("cuda")
        ends = min(p.share for p in allowed), max(p.share for p in allowed)
        said = "no GPU; predicted " + " to ".join(dict.fromkeys(map(number, ends)))
        return nothing("cuda", said, (allowed[0].source,))

    return judge


def faster(chosen: Chosen, direction: str, other: str, least: float, device: str = "cuda") -> Judge:
    """How many times as fast as another contender."""

    def judge(documents: Documents) -> Finding:
        clock = "kernel" if device == "cuda" else "wall"
        all_of_them = ratios(documents, device, other, clock=clock)
        there = {name for name in LAYER_DIRECTIONS if fnmatch(name, direction)}
        wanted = [r for r in all_of_them if chosen(r.row) and r.row["direction"] in there]
        found = of_ratios(without_sweeps(wanted))
        return decided(found, least=least) if found else nothing(device)

    return judge


def slower(chosen: Chosen, most: float) -> Judge:
    """The host's time of forward and backward on a GPU's machine, in torch's."""

    def judge(documents: Documents) -> Finding:
        found = ratios(documents, "cuda", "torch", clock="host", direction="both")
        mine = of_ratios([r.inverse for r in found if chosen(r.row)])
        return decided(mine, most=most) if mine else nothing("cuda")

    return judge


def short_calls(chosen: Chosen, most: float) -> Judge:
    """Microseconds of the host for a call without gradients."""

    def judge(documents: Documents) -> Finding:
        rows = documents.rows("cuda", contender="normzoo", clock="host", direction="forward")
        found = [Measured(s, named(row), 1e6 * row["seconds"]["median"]) for s, row in rows if chosen(row)]
        return decided(found, most=most) if found else nothing("cuda")

    return judge


def beyond_a_copy(chosen: Chosen, times: float, seconds: float) -> Judge:
    """The kernels' time, in `times` that of a copy of the fewest bytes and `seconds`."""

    def judge(documents: Documents) -> Finding:
        found = []
        for source, row in documents.rows("cuda", contender="normzoo", clock="kernel", direction="forward"):
            if chosen(row) and row.get("bytes"):
                allowed = times * row["bytes"] / source.document["copy_bandwidth"]["median"] + seconds
                found.append(Measured(source, named(row), row["seconds"]["median"] / allowed))
        return decided(found, most=1.0) if found else nothing("cuda")

    return judge


def in_one_launch(layer: str, most_bytes: float, least: float) -> Judge:
    """How many times as fast a small layer is where one launch holds a set on chip, of what takes several."""

    def judge(documents: Documents) -> Finding:
        found = []
        for source in documents.sources:
            rows = (source.document.get("extra") or {}).get("choices") or ()
            for row in rows if source.device == "cuda" else ():
                small = 2 * math.prod(row["shape"]) <= most_bytes  # of 16 bits
                tried = row["choice"] == "on_chip" and row["value"] is True and row["speedup"]
                if tried and small and row["layer"] == layer:
                    speedup = row["speedup"]
                    around = speedup["p20"], speedup["p80"]
                    found.append(Measured(source, named(row), speedup["median"], around))
        return decided(found, least=least) if found else nothing("cuda")

    return judge


def gates() -> Judge:
    """What falls in the static gate, beside what is excused with a reason."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None:
            return nothing("cpu")
        failures = source.entries("failures")
        fallen = [f for f in failures if not f.get("exception")]
        names = [f"{f['case']} {f['target']}: {f['measure']} {f['measured']:g}, {f['bound']}" for f in fallen]
        text = f"{len(fallen)} fall, {len(failures) - len(fallen)} are excused with a reason"
        return _static(source, text, names)

    return judge


def unbeaten() -> Judge:
    """Figures in which a kernel of a peer is better than ours, and why that is so."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None or "beaten" not in source.document:
            return nothing("cpu")
        beaten = source.entries("beaten")
        names = [f"{b['call']}: {b['measure']} of {b['peer']}" for b in beaten if not b.get("reason")]
        calls = [call for call in source.entries("calls") if call.get("peers")]
        text = f"{len(names)} without, {len(beaten) - len(names)} with one, in {len(calls)} calls"
        return _static(source, text, names)

    return judge


def compiled(cases: str = "") -> Judge:
    """Whether everything was compiled: all that the forms can choose or, with a pattern, some cases."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None:
            return nothing("cpu")
        launches = [one for one in source.entries("launches") if fnmatch(str(one.get("case")), cases or "*")]
        fallen = [f for f in source.entries("failures") if fnmatch(str(f["case"]), cases or "*")]
        names = [f"{f['case']} {f['target']}: {f['measure']}" for f in fallen if not f.get("exception")]
        text = f"{len(launches)} launches of cases"
        if not cases:
            swept = sum(one.get("launches", 0) for one in source.entries("sweep"))
            text += f", {swept} of the sweep over configurations"
            if "--all" not in source.command.split():
                names.append("only a sample of the configurations, without `--all`")
        return _static(source, text, names if launches else ["no such case"])

    return judge


def _static(source: Source, text: str, missed: Sequence[str]) -> Finding:
    shown = (*missed[:_SHOWN], *_more(len(missed)))
    return Finding(MISSED if missed else MET, text, (source,), shown)


def predicted_beside_measured() -> Judge:
    def judge(documents: Documents) -> Finding:
        rows = shares(documents, "cuda")
        if not rows:
            return nothing("cuda")
        sources = tuple({source.name: source for source, _ in rows}.values())
        return Finding(MET, f"{len(rows)} rows in the table below", sources)

    return judge


def along_sweeps(other: str, least: float) -> Judge:
    def judge(documents: Documents) -> Finding:
        every = ratios(documents, "cpu", other, clock="wall")
        apart = {id(r) for r in without_sweeps(every)}
        found = of_ratios([r for r in every if id(r) not in apart])
        return decided(found, least=least) if found else nothing("cpu")

    return judge


def host(layers: tuple[str, ...], most: float) -> Judge:
    """Host time of forward and backward with empty kernels, in that of torch."""

    def judge(documents: Documents) -> Finding:
        found = ratios(documents, "cpu", "torch", own=EMPTY, direction="both")
        mine = of_ratios([r.inverse for r in found if r.row["layer"] in layers])
        return decided(mine, most=most) if mine else nothing("cpu")

    return judge


def launched(direction: str, most: int, layers: tuple[str, ...] = (), but: tuple[str, ...] = ()) -> Judge:
    def judge(documents: Documents) -> Finding:
        counted = [
            c
            for c in launches(documents)
            if c.direction == direction and c.layer not in but and (not layers or c.layer in layers)
        ]
        found = [Measured(c.source, f"{c.layer} {c.direction}", c.launches) for c in counted]
        if not found:
            return nothing("cpu")
        if lacking := set(layers) - {c.layer for c in counted}:
            return Finding(ABSENT, f"not counted: {', '.join(sorted(lacking))}", _sources(found))
        return _whole(decided(found, most=most), found)

    return judge


def _whole(finding: Finding, found: Sequence[Measured]) -> Finding:
    """Launches are whole numbers."""
    values = [int(one.value) for one in found]
    text = f"{min(values)} to {max(values)} in {len(values)} layers" if len(values) > 1 else str(values[0])
    return replace(finding, value=text)


def remembered(what: str, direction: str) -> Judge:
    """Whether the bytes are there for every row of normzoo, and how they stand to torch's."""

    def judge(documents: Documents) -> Finding:
        rows = without_sweeps(documents.rows("cpu", contender="normzoo", direction=direction))
        if not rows:
            return nothing("cpu")
        sources = tuple({source.name: source for source, _ in rows}.values())
        lacking = [named(row) for _, row in rows if row.get(what) is None]
        beside = [value for *_, value in memory(documents, "cpu", what, direction)]
        text = f"{len(rows) - len(lacking)} of {len(rows)} rows have it"
        if beside:
            ends = number(min(beside)), number(statistics.median(beside)), number(max(beside))
            text += "; of torch's {1} as the median, {0} to {2}".format(*ends)
        return Finding(MISSED if lacking else MET, text, sources, tuple(lacking[:_SHOWN]))

    return judge


def covered(what: str, wanted: Iterable[tuple[Any, ...]], present: Callable[[Documents], dict]) -> Judge:
    """Whether there is a number for each of `wanted`; `present` gives those that there are, with documents."""
    wanted = tuple(wanted)

    def judge(documents: Documents) -> Finding:
        there = present(documents)
        lacking = [" ".join(map(str, one)) for one in wanted if one not in there]
        sources = tuple({there[one].name: there[one] for one in wanted if one in there}.values())
        if not sources:
            return nothing("cpu")
        text = f"{len(wanted) - len(lacking)} of {len(wanted)} {what}"
        return Finding(MISSED if lacking else MET, text, sources, tuple(lacking))

    return judge
