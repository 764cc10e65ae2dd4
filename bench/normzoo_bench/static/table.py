"""Rows as text: sm_90 in full beside the best peer, other targets a line a kernel and dtype; peers; times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import peers
from .predict import GPUS, predict

Row = dict[str, Any]
_COLUMNS = {
    "case": 30, "kernel": 24, "warps": 5, "regs": 4, "spill": 5, "shared": 6, "width": 5,
    "KB/SM": 19, "instr": 19, "bar": 4, "x / L2 passes": 13, "launches": 8, "allocations": 11,
    "variants": 8,
}  # fmt: skip


def _line(cells: Iterable[object]) -> str:
    padded = (str(cell).ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=False))
    return "  ".join(padded).rstrip()


def _beside_peer(text: str, measure: str, name: str) -> str:
    found = peers.best(name, measure)
    return f"{text} ({found[1]:g} {found[0]})" if found else text


def _cells(row: Row, name: str, first: bool) -> Iterator[object]:
    yield name if first else ""
    yield from (row[key] for key in ("kernel", "warps", "registers", "spills"))
    yield f"{row['shared'] / 1024:.1f}"
    if row["tile"]:
        yield f"{row['x_width']}{'*' if row['pipelined'] else ''}"
        yield _beside_peer(f"{row['kb_in_flight']:g}", "kb_in_flight", name)
        yield _beside_peer(f"{row['instructions']:.1f}", "instructions", name)
    else:
        yield from ("", "", "")
    yield f"{row['barriers']:.1f}"
    if first:
        call = row["call"]
        yield f"{call['x_passes']:.2f} / {call['l2_passes'] + call['copies']:.2f}"
        yield from (call["launches"], call["allocations"], call.get("variants", "-"))


def _in_full(rows: Sequence[Row]) -> Iterator[str]:
    previous = ""
    yield _line(_COLUMNS)
    for row in rows:
        name = f"{row['case']}-{row['dtype']}"
        yield _line(_cells(row, name, name != previous))
        previous = name


def _in_short(rows: Sequence[Row]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["kernel"], row["dtype"]), []).append(row)
    for place, group in groups.items():
        registers, spills = (max(row[key] for row in group) for key in ("registers", "spills"))
        text = f"{len(group)} cases, registers <= {registers}, spills {spills}"
        if widths := [row["x_width"] for row in group if row["tile"]]:
            text += f", narrowest access of x {min(widths)} bytes"
        yield "{:7} {:24} {}  ".format(*place) + text


def table(rows: Sequence[Row]) -> str:
    kernels = [row for row in rows if "inlined_by" not in row]
    full = [row for row in kernels if row["target"] == "sm_90" and "call" in row]
    lines = [*_in_full(full)] if full else []
    lines += _in_short([row for row in kernels if row["target"] != "sm_90" or "call" not in row])
    lines += (
        "{target:7} {kernel:24} {dtype}  inlined by {inlined_by}".format(**row)
        for row in rows
        if "inlined_by" in row
    )
    return "\n".join(lines)


def beside_peers(rows: Iterable[Row]) -> str:
    """Our figures and those of each peer; `!` where one is better, with the reason below."""
    calls = {name: of_call for name, of_call in peers.calls(rows).items() if name in peers.known()}
    beaten: dict[str, list[peers.Beaten]] = {}
    for found in peers.beaten(rows):
        beaten.setdefault(found.call, []).append(found)
    widths = [max(12, len(measure) + 1) for measure in peers.MEASURES]
    lines = [f"{'':12}" + "".join(m.rjust(w) for m, w in zip(peers.MEASURES, widths, strict=True))]
    for name, of_call in calls.items():
        lines.append(name)
        best = {(b.peer, b.measure) for b in beaten.get(name, ())}
        for who, figures in {"normzoo": peers.ours(of_call), **peers.known()[name]}.items():
            cells = (
                _figure(figures.get(m), (who, m) in best).rjust(w)
                for m, w in zip(peers.MEASURES, widths, strict=True)
            )
            lines.append(f"  {who:10}" + "".join(cells))
        reasons: dict[str, list[str]] = {}
        for b in beaten.get(name, ()):
            why = b.reason.why if b.reason else "NO REASON"
            reasons.setdefault(why, []).append(f"{b.measure} ({b.peer})")
        lines += [f"  ! {', '.join(where)}: {why}" for why, where in reasons.items()]
    alone = sorted(peers.known().keys() - calls.keys())
    return "\n".join([*lines, f"Of the peers alone, or not among these rows: {', '.join(alone)}"])


def _figure(value: float | None, marked: bool) -> str:
    return ("-" if value is None else f"{value:.4g}") + "!" * marked


def predicted(rows: Iterable[Row]) -> str:
    """The time of each call from its bytes, and the share of a copy's bandwidth, on every GPU that is known."""
    lines = [f"{gpu.name}: copy {gpu.copy / 1e12:g} TB/s, {gpu.source}" for gpu in GPUS.values()]
    lines.append(
        f"{'':44}{'MB':>9}" + "".join(f"{f'{name} us':>10}{'of copy':>9}  {'bound by':12}" for name in GPUS)
    )
    for name, of_call in peers.calls(rows).items():
        of = {gpu: predict(of_call, GPUS[gpu]) for gpu in GPUS}
        cells = (
            f"{p.seconds * 1e6:10.1f}{p.share_of_copy(GPUS[gpu]):9.2f}  {p.bound:12}" for gpu, p in of.items()
        )
        lines.append(f"{name:44}{next(iter(of.values())).bytes / 1e6:9.1f}" + "".join(cells).rstrip())
    return "\n".join(lines)


def against_measured(found: Sequence[dict]) -> str:
    """Predicted beside measured: what `measured.compared` gives."""
    if not found:
        return "Measured: none. No document of a GPU was given, or none that has calls of the gate."
    lines = [f"{'':64}{'GPU':6}{'predicted us':>13}{'measured us':>13}{'ratio':>7}{'of copy':>9}"]
    for row in found:
        times = f"{row['predicted'] * 1e6:13.1f}{row['measured'] * 1e6:13.1f}{row['ratio']:7.2f}"
        lines.append(f"{row['name']:64}{row['gpu']:6}{times}{row['share_of_copy'] or 0:9.2f}")
    return "\n".join(lines)
