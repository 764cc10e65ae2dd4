"""Plots with a band a layer: its rows as ticks in the order of their values, direction by direction."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..figures import INK, Drawn, sheet
from .documents import Source, places

COLORS = {
    "forward": "#0b7a75",
    "saving": "#7a5f00",
    "backward": "#d1682a",
    "both": "#5b5ea6",
    "inference": "#0b7a75",
    "step": "#5b5ea6",
}
_SAID = {"both": "forward and backward", "saving": "forward, with gradients", "step": "training step"}
WIDTH = 4.5  # inches; on a phone letters of 9 points are still read
MOST = 10
"""Ticks of one direction of a layer."""
_STEPS = (1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.2, 1.4, 1.7, 2, 3, 4, 5, 6, 7, 8, 9), range(10, 100)
_BAND = 0.36
_EDGES = 1.45
"""Inches above and below the bands."""


class Tick(NamedTuple):
    value: float
    low: float
    high: float


Band = Mapping[str, Sequence[Tick]]
"""By direction."""


class Mark(NamedTuple):
    """A point beside the ticks of a band, such as a goal."""

    layer: str
    direction: str
    value: float
    kind: str


LOOKS: dict[str, dict[str, Any]] = {
    "goal": {"marker": "|", "markersize": 13, "markeredgewidth": 2, "markeredgecolor": INK},
    "predicted": {"marker": "D", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 1},
}


def bands(
    found: Mapping[str, Band],
    xlabel: str,
    sources: Sequence[Source],
    lines: Sequence[tuple[float, str]] = (),
    marks: Sequence[Mark] = (),
    log: bool = True,
    limits: tuple[float, float] | None = None,
) -> Drawn:
    """A figure of ticks at the values of each layer, thin lines from low to high; `lines` are (value, dash)."""
    layers = [*found, *dict.fromkeys(mark.layer for mark in marks if mark.layer not in found)]
    directions = _directions(found, marks)
    with sheet(_EDGES + _BAND * len(layers), WIDTH, background="white") as (axes, drawn):
        for value, dash in lines:
            axes.axvline(value, color=INK, linewidth=1, linestyle=dash)
        for i in range(1, len(layers), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#f1f4f6", linewidth=0)
        for k, direction in enumerate(directions):
            _ticks(
                axes, [found.get(name, {}).get(direction, ()) for name in layers], direction, k, len(directions)
            )
        for mark in marks:
            at = layers.index(mark.layer) + _lane(directions.index(mark.direction), len(directions))
            color = {"markeredgecolor": COLORS[mark.direction]} | LOOKS[mark.kind]
            axes.plot(mark.value, at, linestyle="none", **color, zorder=4)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(*(limits or _limits(found)))
            plain_numbers(axes.xaxis, _STEPS)
        elif limits:
            axes.set_xlim(*limits)
            axes.locator_params(axis="x", integer=limits[1] > 2, nbins=8)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(xlabel)
        _legend(axes, directions, marks)
        foot(axes.figure, sources)
    return drawn


def _directions(found: Mapping[str, Band], marks: Sequence[Mark]) -> list[str]:
    there = {direction for band in found.values() for direction in band} | {mark.direction for mark in marks}
    return [name for name in COLORS if name in there]


def _lane(k: int, count: int) -> float:
    """The middle of the place of a direction in a band, which goes from -0.42 to 0.42."""
    return 0.84 * ((k + 0.5) / count - 0.5)


def _ticks(axes: Any, of_layers: Sequence[Sequence[Tick]], direction: str, k: int, count: int) -> None:
    """One path for all ranges and one for all medians: a marker each would make a file of megabytes."""
    height = 0.84 / count * 0.9
    ranges: list[tuple[float, float]] = []
    medians: list[tuple[float, float]] = []
    gap = (math.nan, math.nan)
    for i, ticks in enumerate(of_layers):
        ticks, middle = _thinned(sorted(ticks)), i + _lane(k, count)
        for j, tick in enumerate(ticks):
            y = middle + height * ((j + 0.5) / len(ticks) - 0.5)
            half = max(height / len(ticks) / 2, 0.05)
            ranges += [(tick.low, y), (tick.high, y), gap]
            medians += [(tick.value, y - half), (tick.value, y + half), gap]
    if medians:
        axes.plot(*zip(*ranges, strict=True), color=COLORS[direction], linewidth=0.5, alpha=0.55)
        axes.plot(*zip(*medians, strict=True), color=COLORS[direction], linewidth=1.6, solid_capstyle="butt")


def _thinned(ticks: Sequence[Tick]) -> Sequence[Tick]:
    """At most `MOST` of them, evenly by rank, from the least to the most."""
    if len(ticks) <= MOST:
        return ticks
    return [ticks[round(i * (len(ticks) - 1) / (MOST - 1))] for i in range(MOST)]


def _limits(found: Mapping[str, Band]) -> tuple[float, float]:
    """Of the medians; a range that goes farther is cut off."""
    values = [tick.value for band in found.values() for ticks in band.values() for tick in ticks] or [1.0]
    return min(0.8, min(values) / 1.15), max(1.25, max(values) * 1.15)


def plain_numbers(axis: Any, steps: Sequence[Sequence[float]]) -> None:
    """Numbers as one says them on a logarithmic axis: of the `steps` in a decade, the first that are enough."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_view_interval()
    shown: list[float] = []
    for in_decade in steps:
        shown = [m * 10.0**e for e in range(-6, 9) for m in in_decade if low <= m * 10.0**e <= high]
        if len(shown) >= 3:
            break
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any, directions: Sequence[str], marks: Sequence[Mark]) -> None:
    from matplotlib.lines import Line2D

    shown = [
        Line2D([], [], color=COLORS[name], linewidth=2.5, label=_SAID.get(name, name)) for name in directions
    ]
    for kind in dict.fromkeys(mark.kind for mark in marks):
        look = {"markeredgecolor": INK} | LOOKS[kind]
        words = {"goal": "goal", "predicted": "predicted from bytes"}[kind]
        shown.append(Line2D([], [], linestyle="none", label=words, **look))
    columns = 2 if sum(len(line.get_label()) for line in shown) > 36 else 3
    axes.figure.legend(handles=shown, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.2)


def foot(figure: Any, sources: Sequence[Source]) -> None:
    """Machine, versions, date and commit below a figure."""
    figure.supxlabel("\n".join(_broken(places(sources))), fontsize=7.5, x=0.01, ha="left", color="#5b6973")


def _broken(said: Sequence[str]) -> Iterator[str]:
    for line in said:
        yield from textwrap.wrap(line, 72)
