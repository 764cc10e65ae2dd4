"""Rows as text: sm_90 in full beside the best peer, other targets a line a kernel and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .cases import peers

Row = dict[str, Any]
_COLUMNS = {
    "case": 30, "kernel": 24, "warps": 5, "regs": 4, "spill": 5, "shared": 6, "width": 5,
    "KB/SM": 19, "instr": 19, "bar": 4, "x / L2 passes": 13, "launches": 8, "allocations": 11,
    "variants": 8,
}  # fmt: skip


def _line(cells: Iterable[object]) -> str:
    padded = (str(cell).ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=False))
    return "  ".join(padded).rstrip()


def _beside_peer(text: str, measure: str, peer: dict[str, str]) -> str:
    return f"{text} ({peer[measure]} {peer[measure + '_peer']})" if peer.get(measure) else text


def _cells(row: Row, name: str, peer: dict[str, str], first: bool) -> Iterator[object]:
    yield name if first else ""
    yield from (row[key] for key in ("kernel", "warps", "registers", "spills"))
    yield f"{row['shared'] / 1024:.1f}"
    if row["tile"]:
        yield f"{row['x_width']}{'*' if row['pipelined'] else ''}"
        yield _beside_peer(f"{row['kb_in_flight']:g}", "kb_in_flight", peer)
        yield _beside_peer(f"{row['instructions']:.1f}", "instructions", peer)
    else:
        yield from ("", "", "")
    yield f"{row['barriers']:.1f}"
    if first:
        call = row["call"]
        yield f"{call['x_passes']:.2f} / {call['l2_passes'] + call['copies']:.2f}"
        yield from (call["launches"], call["allocations"], call.get("variants", "-"))


def _in_full(rows: Sequence[Row]) -> Iterator[str]:
    best, previous = peers(), ""
    yield _line(_COLUMNS)
    for row in rows:
        name = f"{row['case']}-{row['dtype']}"
        yield _line(_cells(row, name, best.get(name, {}), name != previous))
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
    full = [row for row in kernels if row["target"] == "sm_90"]
    lines = [*_in_full(full)] if full else []
    lines += _in_short([row for row in kernels if row["target"] != "sm_90"])
    lines += (
        "{target:7} {kernel:24} {dtype}  inlined by {inlined_by}".format(**row)
        for row in rows
        if "inlined_by" in row
    )
    return "\n".join(lines)
