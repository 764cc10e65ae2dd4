"""The ways in which timings, launches and bytes decide about a goal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .documents import Documents, Source
from .judging import (
    MET,
    MISSED,
    UNDECIDED,
    Chosen,
    Finding,
    Judge,
    Measured,
    decided,
    few,
    gaps,
    named,
    nothing,
    number,
    of_ratios,
    small,
    sources_of,
    unfinished,
)
from .measures import EMPTY, Ratio, across, launches, memory, ratios, shares, smallest
from .predictions import predictions


def bandwidth(chosen: Chosen, direction: str, least: float) -> Judge:
    """The share of the copy's speed on a GPU; without one, what the bytes of the static gate allow."""
    chosen = chosen.going(direction)

    def judge(documents: Documents) -> Finding:
        rows = [(s, row) for s, row in shares(documents, "cuda") if chosen(row)]
        found = [Measured(s, named(row), row["share_of_copy"]) for s, row in rows]
        if found or any(source.device == "cuda" for source in documents.sources):
            lacking = gaps(documents, "cuda", chosen, [row for _, row in rows], clock="kernel")
            return decided(documents, "cuda", found, lacking, least=least)
        # The gate has names of its own for its workloads.
        alike = replace(chosen, uses=())
        allowed = [p for p in predictions(documents) if alike(p.row)]
        ends = sorted(p.share for p in allowed)[:: max(1, len(allowed) - 1)]
        said = "predicted " + " to ".join(dict.fromkeys(map(number, ends))) if ends else ""
        return replace(nothing(documents, "cuda", predicted=said), sources=tuple(p.source for p in allowed[:1]))

    return judge


def faster(
    chosen: Chosen, directions: Sequence[str], others: Sequence[str], least: float, device: str = "cuda"
) -> Judge:
    """How many times as fast as another contender, the first of `others` of which there are rows."""
    chosen, clock = chosen.going(*directions), {"cuda": "kernel"}.get(device, "wall")

    def judge(documents: Documents) -> Finding:
        wanted, other = [], others[0]
        for other in others:
            wanted = [r for r in ratios(documents, device, other, clock=clock) if chosen(r.row)]
            if wanted:
                break
        lacking = gaps(documents, device, chosen, _rows(wanted), ("normzoo", other), clock)
        finding = decided(documents, device, of_ratios(wanted), lacking, least=least)
        said = f"against {other}: " if wanted and len(others) > 1 else ""
        return replace(finding, value=said + finding.value)

    return judge


def along_sweeps(sweeps: Mapping[str, tuple[str, ...]], other: str, least: float) -> Judge:
    """The same along sweeps: of each the layers that have to be there."""

    def judge(documents: Documents) -> Finding:
        wanted, lacking = [], []
        every = ratios(documents, "cpu", other, clock="wall")
        for sweep, layers in sweeps.items():
            chosen = Chosen(layers, (f"{sweep}-*",), sweeps=True)
            of_sweep = [r for r in every if chosen(r.row)]
            told = gaps(documents, "cpu", chosen, _rows(of_sweep), ("normzoo", other), "wall")
            lacking += [f"{sweep}: {gap}" for gap in told]
            wanted += of_sweep
        return decided(documents, "cpu", of_ratios(wanted), lacking, least=least)

    return judge


def than_another(chosen: Chosen, other: str, direction: str, least: float) -> Judge:
    """How many times as fast on a GPU as another layer, of torch, on the same input."""
    chosen = chosen.going(direction)
    theirs = replace(chosen, layers=(other,))

    def judge(documents: Documents) -> Finding:
        (layer,) = chosen.layers
        wanted = [r for r in across(documents, "cuda", layer, other, clock="kernel") if chosen(r.row)]
        lacking = gaps(documents, "cuda", chosen, _rows(wanted), clock="kernel")
        lacking += unfinished(documents, "cuda", theirs, ("torch",), "kernel")
        return decided(documents, "cuda", of_ratios(wanted), lacking, least=least)

    return judge


def slower(chosen: Chosen, most: float) -> Judge:
    """The host's time of forward and backward on a GPU's machine, in torch's."""
    chosen = chosen.going("both")

    def judge(documents: Documents) -> Finding:
        wanted = [r.inverse for r in ratios(documents, "cuda", "torch", clock="host") if chosen(r.row)]
        lacking = gaps(documents, "cuda", chosen, _rows(wanted), ("normzoo", "torch"), "host")
        return decided(documents, "cuda", of_ratios(wanted), lacking, most=most)

    return judge


def short_calls(chosen: Chosen, most: float) -> Judge:
    """Microseconds of the host for a call without gradients."""
    chosen = chosen.going("forward")

    def judge(documents: Documents) -> Finding:
        rows = documents.rows("cuda", contender="normzoo", clock="host")
        rows = [(s, row) for s, row in rows if chosen(row)]
        found = [Measured(s, named(row), 1e6 * row["seconds"]["median"]) for s, row in rows]
        lacking = gaps(documents, "cuda", chosen, [row for _, row in rows], clock="host")
        return decided(documents, "cuda", found, lacking, most=most)

    return judge


def beyond_a_copy(chosen: Chosen, times: float, seconds: float) -> Judge:
    """The kernels' time, in `times` that of a copy of the fewest bytes and `seconds`."""
    chosen = chosen.going("forward")

    def judge(documents: Documents) -> Finding:
        found, rows = [], []
        for source, row in documents.rows("cuda", contender="normzoo", clock="kernel"):
            if chosen(row) and row.get("bytes"):
                allowed = times * row["bytes"] / source.document["copy_bandwidth"]["median"] + seconds
                found.append(Measured(source, named(row), row["seconds"]["median"] / allowed))
                rows.append(row)
        lacking = gaps(documents, "cuda", chosen, rows, clock="kernel")
        return decided(documents, "cuda", found, lacking, most=1.0)

    return judge


def in_one_launch(layer: str, most_bytes: float, least: float) -> Judge:
    """How many times as fast a small layer is where one launch holds a set on chip, of what takes several."""

    def of_goal(row: Mapping[str, Any]) -> bool:
        return row["layer"] == layer and small(row, most_bytes)

    def judge(documents: Documents) -> Finding:
        found = []
        for source in documents.sources:
            rows = (source.document.get("extra") or {}).get("choices") or ()
            for row in rows if source.device == "cuda" else ():
                tried = row["choice"] == "on_chip" and row["value"] is True and row["speedup"]
                if tried and of_goal(row):
                    speedup = row["speedup"]
                    around = speedup["p20"], speedup["p80"]
                    found.append(Measured(source, named(row), speedup["median"], around))
        lacking = unfinished(documents, "cuda", of_goal, ("on_chip=True",), choice="on_chip")
        return decided(documents, "cuda", found, lacking, least=least)

    return judge


def host(layers: tuple[str, ...], most: float) -> Judge:
    """Host time of forward and backward with empty kernels on the smallest tensors, in that of torch."""
    chosen = Chosen(layers, directions=("both",))

    def judge(documents: Documents) -> Finding:
        every = ratios(documents, "cpu", "torch", own=EMPTY)
        wanted = smallest(r for r in every if chosen(r.row))
        lacking = gaps(documents, "cpu", chosen, _rows(wanted), (EMPTY, "torch"))
        finding = decided(documents, "cpu", of_ratios([r.inverse for r in wanted]), lacking, most=most)
        if not (spent := [1e6 * seconds for seconds in map(_of_triton, wanted) if seconds is not None]):
            return finding
        ends = " to ".join(dict.fromkeys((number(min(spent)), number(max(spent)))))
        return replace(finding, value=f"{finding.value}; Triton's own part, which is apart, {ends} µs a call")

    return judge


def _of_triton(found: Ratio) -> float | None:
    """Seconds from the start of the kernels of a call to the driver; None where the document does not tell."""
    each: dict[str, float] = {}
    for one in (found.source.document.get("extra") or {}).get("triton") or ():
        each[one["kernel"]] = max(each.get(one["kernel"], 0.0), one["seconds"]["median"])
    kernels = found.row.get("kernels") or ()
    return sum(each[name] for name in kernels) if kernels and set(kernels) <= set(each) else None


def launched(direction: str, most: int, layers: tuple[str, ...]) -> Judge:
    def judge(documents: Documents) -> Finding:
        counted = [c for c in launches(documents) if c.direction == direction and c.layer in layers]
        found = [Measured(c.source, f"{c.layer} {c.direction}", c.launches) for c in counted]
        without = sorted(set(layers) - {c.layer for c in counted})
        told = f"{len(without)} of {len(layers)} layers are not counted: {', '.join(without)}"
        lacking = [told] if without else []
        finding = decided(documents, "cpu", found, lacking, most=most)
        if not found:
            return finding
        values = [c.launches for c in counted]  # whole numbers
        text = f"{min(values)} to {max(values)} in {len(values)} layers" if len(values) > 1 else str(values[0])
        return replace(finding, value="; ".join((text, *lacking)))

    return judge


def remembered(what: str, layers: tuple[str, ...]) -> Judge:
    """Whether the bytes are there for every layer and row of normzoo, and how they stand to torch's."""
    chosen = Chosen(layers, directions=("both",))

    def judge(documents: Documents) -> Finding:
        rows = [(s, row) for s, row in documents.rows("cpu", contender="normzoo") if chosen(row)]
        told = gaps(documents, "cpu", chosen, [row for _, row in rows])
        if not rows:
            return nothing(documents, "cpu", told)
        lacking = [named(row) for _, row in rows if row.get(what) is None]
        beside = [value for *_, value in memory(documents, "cpu", what, "both")]
        text = f"{len(rows) - len(lacking)} of {len(rows)} rows have it"
        if beside:
            ends = number(min(beside)), number(statistics.median(beside)), number(max(beside))
            text += "; of torch's {1} as the median, {0} to {2}".format(*ends)
        sources = sources_of([Measured(s, "", 0.0) for s, _ in rows])
        verdict = MISSED if lacking else UNDECIDED if told else MET
        return Finding(verdict, "; ".join((text, *told)), sources, few(lacking))

    return judge


def covered(what: str, wanted: Iterable[tuple[Any, ...]], present: Callable[[Documents], dict]) -> Judge:
    """Whether there is a number for each of `wanted`; `present` gives those that there are, with documents."""
    wanted = tuple(wanted)

    def judge(documents: Documents) -> Finding:
        there: dict[tuple, Source] = present(documents)
        lacking = [" ".join(map(str, one)).removesuffix(" contiguous") for one in wanted if one not in there]
        sources = tuple({there[one].name: there[one] for one in wanted if one in there}.values())
        if not sources:
            return nothing(documents, "cpu")
        text = f"{len(wanted) - len(lacking)} of {len(wanted)} {what}"
        return Finding(MISSED if lacking else MET, text, sources, tuple(lacking))

    return judge


def _rows(found: Iterable[Ratio]) -> list[Any]:
    return [r.row for r in found]
