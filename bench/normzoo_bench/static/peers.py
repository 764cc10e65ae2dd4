"""What peers' kernels are compiled to beside ours, and why a peer may be better in a figure.

The peers' figures, `peers.csv`, were counted in the same way for sm_90, from their own launchers: Liger-Kernel
0.8.5, flash-attention (0251105a), fla-core 0.6.0 and torch.compile 2.13, with Triton 3.7.1. Where a call has
several kernels as large as x: the most registers and spills, the narrowest access, the fewest bytes in flight,
and the instructions of all of them.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources
from typing import Any

from .predict import GPUS, Prediction, predict

Row = dict[str, Any]
Figures = dict[str, float]

MEASURES = {
    "registers": min, "spills": min, "x_width": max, "kb_in_flight": max, "instructions": min, "x_passes": min,
    "l2_passes": min, "launches": min, "allocations": min,
}  # fmt: skip
"""Which of two figures is better."""

ENOUGH = 26
"""KB of loads and stores on their way per multiprocessor."""

_NEAR = 0.02
"""Of a figure: less is no difference."""


@functools.cache
def known() -> dict[str, dict[str, Figures]]:
    """Figures by call (case-dtype) and peer; what was not counted is missing."""
    text = resources.files(__package__).joinpath("peers.csv").read_text()
    found: dict[str, dict[str, Figures]] = {}
    for row in csv.DictReader(text.splitlines()):
        figures = {measure: float(row[measure]) for measure in MEASURES if row[measure]}
        found.setdefault(row["case"], {})[row["peer"]] = figures
    return found


def best(call: str, measure: str) -> tuple[str, float] | None:
    """The peer that is best in a measure of a call, and its figure."""
    there = {peer: of[measure] for peer, of in known().get(call, {}).items() if measure in of}
    return MEASURES[measure](there.items(), key=lambda item: item[1]) if there else None


def calls(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows on sm_90 by call."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["target"] == "sm_90" and "call" in row:
            found.setdefault(f"{row['case']}-{row['dtype']}", []).append(row)
    return found


def ours(rows: Sequence[Row]) -> Figures:
    """The figures of one call."""
    call, large = rows[0]["call"], [row for row in rows if row["tile"]]
    return {
        "registers": max(row["registers"] for row in large),
        "spills": max(row["spills"] for row in large),
        "x_width": min(row["x_width"] for row in large),
        "kb_in_flight": min(row["kb_in_flight"] for row in large),
        "instructions": sum(row["instructions"] for row in large),
        "x_passes": call["x_passes"],
        "l2_passes": call["l2_passes"] + call["copies"],
        "launches": call["launches"],
        "allocations": call["allocations"],
    }


def better(call: str, own: Figures) -> Iterator[tuple[str, str]]:
    """(measure, the best peer in it) wherever a peer is better."""
    for measure, choose in MEASURES.items():
        found = best(call, measure)
        if found is None:
            continue
        peer, figure = found
        if abs(own[measure] - figure) > _NEAR * own[measure] and choose(own[measure], figure) != own[measure]:
            yield measure, peer


@dataclass(frozen=True)
class Beaten:
    """A call in which a peer is better in one measure."""

    call: str
    measure: str
    own: Figures
    peer: str
    figures: Figures
    """Of the peer."""
    time: Prediction
    """Of our call, on the GPU that asks most of a kernel."""

    @property
    def reason(self) -> Reason | None:
        return next((reason for reason in REASONS if reason.explains(self)), None)

    def __str__(self) -> str:
        mine, theirs = self.own[self.measure], self.figures[self.measure]
        return f"{self.call}: {self.measure} {mine:.4g}, {self.peer} {theirs:.4g}"


def beaten(rows: Iterable[Row]) -> Iterator[Beaten]:
    for name, of_call in calls(rows).items():
        if name not in known():
            continue
        own, time = ours(of_call), predict(of_call, GPUS["H200"])
        for measure, peer in better(name, own):
            yield Beaten(name, measure, own, peer, known()[name][peer], time)


@dataclass(frozen=True)
class Reason:
    """Why a peer may be better: `holds` says of each such call whether that is true of it."""

    measures: tuple[str, ...]
    why: str
    holds: Callable[[Beaten], bool]
    calls: str = "*"

    def explains(self, beaten: Beaten) -> bool:
        return beaten.measure in self.measures and fnmatch(beaten.call, self.calls) and self.holds(beaten)


def _reads_again(beaten: Beaten) -> bool:
    """Whether the rows of x go through a program twice."""
    once = 4 if beaten.call.startswith("add-") else 3 if "-bwd-" in beaten.call else 2
    return beaten.call.startswith(("add-", "rms-", "ln-")) and beaten.own["x_passes"] > once + 0.5


REASONS = (
    Reason(
        ("registers", "kb_in_flight"),
        f"with {ENOUGH} KB on their way per multiprocessor a copy is as fast as it gets: 4.3 TB/s at 0.8 us",
        lambda b: b.own["kb_in_flight"] >= ENOUGH,
    ),
    Reason(
        ("registers", "kb_in_flight", "instructions", "x_passes"),
        "x is so small that its bytes take less time than the launches",
        lambda b: b.time.memory < b.own["launches"] * GPUS["H200"].gap,
    ),
    Reason(
        ("instructions",),
        "they issue in less than 0.8 of the time of the bytes, on an H200",
        lambda b: b.time.instructions < 0.8 * b.time.memory,
    ),
    Reason(
        ("instructions",),
        "both sweeps over the row are counted, and what the compiler unrolled in one of them",
        lambda b: _reads_again(b),
    ),
    Reason(
        ("x_passes", "l2_passes"),
        "a row that would spill beside the gradients, or forward beside the weight, is read again, from L2",
        lambda b: _reads_again(b),
    ),
    Reason(
        ("allocations",),
        "what torch's own sums allocate is not counted: the peer leaves partial sums to them, in more launches",
        lambda b: b.own["launches"] < b.figures["launches"],
    ),
    Reason(
        ("allocations",),
        "the peer keeps no partial sums because it reads x and dy several times instead",
        lambda b: b.own["x_passes"] < b.figures["x_passes"],
    ),
    Reason(
        ("spills",),
        "a row of 16384 with a residual lacks a few registers; in two sweeps it would be read again, from L2",
        lambda b: b.own["spills"] <= 16,
        "add-rms-bwd-16384-bf16",
    ),
    Reason(
        ("launches",),
        "the peer has fewer, in which it reads x in narrower accesses",
        lambda b: b.own["x_width"] > b.figures["x_width"],
    ),
)
