"""The plots of the page, each with what it shows in words, or with the command that would make it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..figures import INK, Drawn, sheet
from .asked import FEW_LAUNCHES
from .bands import WIDTH, Band, Mark, Tick, bands, foot, plain_numbers
from .documents import COMMANDS, Documents, Row, Source, is_sweep
from .goals import share_goals
from .measures import (
    EMPTY,
    LAYER_DIRECTIONS,
    Ratio,
    launches,
    memory,
    ratios,
    shares,
    smallest,
    without_sweeps,
)
from .predictions import predictions

_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 2))
_HUES = ("#0b7a75", "#d1682a", "#5b5ea6", "#97478a", "#7a5f00", "#0067a5")
_PREFERRED = ("rms_norm", "layer_norm", "batch_norm", "group_norm", "power_norm", "batch_channel_norm")


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    says: str
    """What it shows and how to read it."""
    command: str
    """What measures it."""
    draw: Callable[[Documents], Drawn | None]


def _sources(found: Iterable[tuple[Source, ...]]) -> list[Source]:
    return list({entry[0].name: entry[0] for entry in found}.values())


def _banded(entries: Iterable[tuple[str, str, Tick]]) -> dict[str, Band]:
    """By layer and direction, in the order of appearance."""
    found: dict[str, dict[str, list[Tick]]] = {}
    for layer, direction, tick in entries:
        found.setdefault(layer, defaultdict(list))[direction].append(tick)
    return found


def roofline_cpu(documents: Documents) -> Drawn | None:
    rows = without_sweeps(shares(documents, "cpu", direction={"forward", "backward"}))
    if not rows:
        return None
    found = _banded((row["layer"], row["direction"], _share(row)) for _, row in rows)
    label = "fewest bytes / time, of the speed of a copy"
    return bands(found, label, _sources(rows), lines=[(1.0, "-")])


def _share(row: Row) -> Tick:
    share, seconds = row["share_of_copy"], row["seconds"]
    low, high = (share * seconds["median"] / seconds[name] for name in ("p80", "p20"))
    return Tick(share, low, high)


def roofline_gpu(documents: Documents) -> Drawn | None:
    rows = without_sweeps(shares(documents, "cuda", direction={"forward", "backward"}))
    found = _banded((row["layer"], row["direction"], _share(row)) for _, row in rows)
    predicted = [p for p in predictions(documents) if p.row["dtype"] == "bfloat16"]
    marks = [
        Mark(p.layer, p.direction, p.share, "predicted")
        for p in predicted
        if p.direction not in found.get(p.layer, {})
    ]
    if not rows and not marks:
        return None
    goals = [Mark(layer, direction, least, "goal") for layer, direction, least in share_goals()]
    shown = {*found, *(mark.layer for mark in marks)}
    marks += [mark for mark in goals if mark.layer in shown]
    label = "fewest bytes / time, of the speed of a copy"
    sources = _sources([*rows, *((p.source,) for p in predicted)])
    return bands(found, label, sources, [(1.0, "-")], marks, log=False, limits=(0.4, 1.1))


def against(other: str, device: str = "cpu") -> Callable[[Documents], Drawn | None]:
    """How many times as fast as `other`."""

    def draw(documents: Documents) -> Drawn | None:
        clock = "kernel" if device == "cuda" else "wall"
        every = ratios(documents, device, other, clock=clock, direction=set(LAYER_DIRECTIONS))
        rows = without_sweeps(every)
        if not rows:
            return None
        found = _banded((r.row["layer"], r.row["direction"], _tick(r)) for r in rows)
        label = f"times as fast as {_WORDS.get(other, other)}"
        return bands(found, label, _sources((r.source,) for r in rows), [(1.0, "-"), (0.9, _DASHED)])

    return draw


_WORDS = {"official": "the authors' code"}


def _tick(ratio: Ratio) -> Tick:
    return Tick(ratio.median, ratio.p20, ratio.p80)


def launch_counts(documents: Documents) -> Drawn | None:
    found = launches(documents)
    if not found:
        return None
    entries = [(c.layer, c.direction, Tick(c.launches, c.launches, c.launches)) for c in found]
    order = sorted(entries, key=lambda entry: (entry[0] not in FEW_LAUNCHES, entry[0]))
    most = max(14.0, 1.05 * max(c.launches for c in found))
    lines = [(4.0, _DASHED), (12.0, "-")]
    sources = _sources((c.source,) for c in found)
    return bands(_banded(order), "launches of a call", sources, lines, log=False, limits=(0, most))


def host_times(documents: Documents) -> Drawn | None:
    found = [r.inverse for r in smallest(ratios(documents, "cpu", "torch", own=EMPTY))]
    if not found:
        return None
    entries = [(r.row["layer"], r.row["direction"], _tick(r)) for r in found]
    order = sorted(entries, key=lambda entry: entry[0] not in FEW_LAUNCHES)
    label = "host time with empty kernels, in torch's"
    lines = [(1.0, "-"), (1.2, _DASHED), (1.5, _DOTTED)]
    return bands(_banded(order), label, _sources((r.source,) for r in found), lines)


def models(documents: Documents) -> Drawn | None:
    found = []
    for other in ("torch", "torch.compile"):
        names = dict.fromkeys(row["contender"] for _, row in documents if row["contender"] != other)
        for own in names:
            compiled = own.endswith(("compiled", "opaque"))
            if own != "torch.compile" and compiled == (other == "torch.compile"):
                found += ratios(documents, "cpu", other, own=own, direction={"step", "inference"})
    if not found:
        return None
    entries = [
        (f"{_model(r.row)}, {r.row['contender'].removeprefix('normzoo-')}", r.row["direction"], _tick(r))
        for r in sorted(found, key=lambda r: (r.row["workload"], r.row["contender"]))
    ]
    label = "times as fast as torch's norms"
    return bands(_banded(entries), label, _sources((r.source,) for r in found), [(1.0, "-")])


def _model(row: Row) -> str:
    return str(row["workload"]).partition("-")[0]


def saved(documents: Documents) -> Drawn | None:
    return _memory(documents, "saved_bytes", "bytes kept for the backward pass, of torch's")


def peak(documents: Documents) -> Drawn | None:
    return _memory(documents, "peak_bytes", "most bytes of a call, of torch's")


def _memory(documents: Documents, what: str, label: str) -> Drawn | None:
    entries, sources = [], []
    for direction in ("both", "backward", "step", "inference"):
        for source, row, value in memory(documents, "cpu", what, direction):
            name = row["layer"] if direction in LAYER_DIRECTIONS else _model(row)
            entries.append((name, direction, Tick(value, value, value)))
            sources.append((source,))
    if not entries:
        return None
    return bands(_banded(entries), label, _sources(sources), [(1.0, "-")])


def scaling(sweep: str) -> Callable[[Documents], Drawn | None]:
    """Time and speed against one size, of normzoo and of torch."""

    def draw(documents: Documents) -> Drawn | None:
        rows = [
            (source, row)
            for source, row in documents
            if is_sweep(row) == sweep and row["contender"] in ("normzoo", "torch") and row["mode"] != "eval"
        ]
        chosen = _most_of(rows)
        if not chosen:
            return None
        with sheet(5.6, WIDTH, rows=2, background="white", share="x") as (panels, drawn):
            _curves(panels, chosen, sweep)
            foot(panels[0].figure, _sources(chosen))
        return drawn

    return draw


def _most_of(rows: Sequence[tuple[Source, Row]]) -> list[tuple[Source, Row]]:
    """One direction, dtype, memory format and clock: forward and backward together where that was measured."""
    direction = "both" if any(row["direction"] == "both" for _, row in rows) else "forward"
    layers = dict.fromkeys(row["layer"] for _, row in rows)
    kept = sorted(layers, key=lambda name: _PREFERRED.index(name) if name in _PREFERRED else 99)[: len(_HUES)]
    return [
        (source, row)
        for source, row in rows
        if row["direction"] == direction
        and row["layer"] in kept
        and row["dtype"] == rows[0][1]["dtype"]
        and row["memory_format"] == "contiguous"
        and row["clock"] == rows[0][1]["clock"]
    ]


def _curves(panels: Any, chosen: Sequence[tuple[Source, Row]], sweep: str) -> None:
    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for _, row in chosen:
        lines[row["layer"], row["contender"]].append(row)
    colors = dict(zip(dict.fromkeys(layer for layer, _ in lines), _HUES, strict=False))
    axis = {"rows": 0, "width": -1, "channels": 1}[sweep]
    for (layer, contender), of_line in lines.items():
        ordered = sorted(of_line, key=lambda row: row["shape"][axis])
        sizes = [row["shape"][axis] for row in ordered]
        look = {"color": colors[layer], "linewidth": 1.4, "markersize": 3}
        look |= {"marker": "o"} if contender == "normzoo" else {"linestyle": _DASHED}
        panels[0].plot(sizes, [1e6 * row["seconds"]["median"] for row in ordered], **look)
        panels[1].plot(sizes, [row["gigabytes_a_second"] for row in ordered], **look)
    source, row = chosen[0]
    bandwidth = source.document["copy_bandwidth"]["median"] / 1e9
    panels[1].axhline(bandwidth, color=INK, linewidth=1, linestyle=_DOTTED)
    panels[0].set(xscale="log", yscale="log", ylabel="time (µs)")
    panels[1].set(xscale="log", ylabel="GB/s", ylim=(0, None))
    for axis in (panels[0].xaxis, panels[0].yaxis):
        plain_numbers(axis, [(1,), (1, 2, 5)])
    panels[1].set_xlabel({"rows": "rows, or samples of a batch"}.get(sweep, sweep))
    what = "forward and backward" if row["direction"] == "both" else row["direction"]
    panels[0].set_title(f"{what}, {row['dtype']}", fontsize=9, loc="left")
    _legend(panels[0].figure, colors)


def _legend(figure: Any, colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    shown = [Line2D([], [], color=color, linewidth=2.5, label=layer) for layer, color in colors.items()]
    shown += [
        Line2D([], [], color=INK, marker="o", markersize=3, label="normzoo"),
        Line2D([], [], color=INK, linestyle=_DASHED, label="torch"),
        Line2D([], [], color=INK, linestyle=_DOTTED, label="a copy"),
    ]
    figure.legend(handles=shown, loc="outside upper left", ncols=3, frameon=False, handlelength=1.8)


_TICKS = "A tick is a shape in a dtype and memory format, the thin line its 20th to 80th percentile."
PLOTS = (
    Plot(
        "roofline-gpu",
        "Roofline of a GPU",
        "The fewest bytes that a call can move over its time, as a share of a copy's speed: 1 is the limit of "
        "memory. Bars are the goals, of different shapes. Hollow diamonds are no measurements: their time is "
        "predicted for an H200 from the bytes, instructions and launches of what is compiled, in bfloat16.",
        COMMANDS["gpu"],
        roofline_gpu,
    ),
    Plot(
        "roofline-cpu",
        "Roofline of this CPU",
        "The same on a CPU, where layers are torch's operators, with a copy in the same process as 1. "
        f"{_TICKS} Only buffers that exceed the cache.",
        COMMANDS["cpu-layers"],
        roofline_cpu,
    ),
    Plot(
        "ratios-torch",
        "Beside torch on this CPU",
        f"How many times as fast normzoo is, round by round in turns; the goal is 0.9 (dashed). {_TICKS}",
        COMMANDS["cpu-layers"],
        against("torch"),
    ),
    Plot(
        "ratios-official",
        "Beside the authors' code on this CPU",
        f"The same operators as the official code, written anew. {_TICKS}",
        COMMANDS["cpu-layers"],
        against("official"),
    ),
    *(
        Plot(
            f"ratios-gpu-{other}",
            f"Beside {name} on a GPU",
            f"Time of kernels, how many times as fast. {_TICKS}",
            COMMANDS["gpu"],
            against(other, "cuda"),
        )
        for other, name in (
            ("torch", "torch"),
            ("torch.compile", "torch.compile"),
            ("liger", "Liger-Kernel"),
            ("quack", "quack"),
        )
    ),
    *(
        Plot(
            f"scaling-{sweep}",
            f"Against {sweep}",
            "Time, and the fewest bytes over it. Where GB/s stops rising, memory is the limit; where the time "
            "does not fall with the size, the call is.",
            COMMANDS["cpu-scaling"],
            scaling(sweep),
        )
        for sweep in ("rows", "width", "channels")
    ),
    Plot(
        "launches",
        "Launches of a call",
        "Kernels and operators of torch that a forward or backward pass starts on a GPU, counted without one. "
        "The goal is 4 for batch, group and instance norm and PowerNorm (dashed), and 12 for all others.",
        COMMANDS["launches"],
        launch_counts,
    ),
    Plot(
        "host",
        "Time of the host",
        "With kernels that do nothing, on the smallest tensor of each layer, where torch's layers are host "
        "time too; less is better. Triton's own part of a launch is apart. The goal is 1.2 for row norms "
        "(dashed) and 1.5 for batch, group and instance norm (dotted).",
        COMMANDS["host"],
        host_times,
    ),
    Plot(
        "models",
        "Whole models",
        "A GPT, a vision transformer and a ResNet-50 with torch's norms, and after conversion: training step "
        "and inference. Compiled models are set against the compiled one.",
        COMMANDS["cpu-models"],
        models,
    ),
    Plot(
        "saved",
        "Memory that the backward pass needs",
        "What autograd keeps, in bytes of torch's; less is better.",
        COMMANDS["cpu-layers"],
        saved,
    ),
    Plot(
        "peak",
        "Peak of memory",
        "The most bytes that a call holds at once, in torch's; less is better.",
        COMMANDS["cpu-layers"],
        peak,
    ),
)
