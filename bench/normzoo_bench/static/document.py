"""The gate as one JSON document: what every launch is compiled to, its peers, its predicted time."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normzoo.files import whole
from normzoo_bench.environment import environment, now

from . import peers
from .gates import Failure
from .predict import GPUS, predict

Row = dict[str, Any]

_EVERYWHERE = ("case", "dtype", "target", "kernel", "registers", "spills", "x_width", "shared")
_ON_SM90 = ("warps", "grid", "tile", "pipelined", "kb_in_flight", "instructions", "barriers", "arguments")


def document(
    rows: Sequence[Row], swept: Sequence[Row], failures: Iterable[Failure], measured: Sequence[dict]
) -> dict[str, Any]:
    """Ready for JSON. `swept`: of the sweep over configurations, told by kernel only."""
    compiled = [row for row in rows if "inlined_by" not in row]
    return {
        "command": "python -m normzoo_bench.static " + " ".join(sys.argv[1:]),
        "time": now(),
        "environment": environment(),
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "launches": [_launch(row) for row in compiled],
        "calls": [_call(name, of_call) for name, of_call in peers.calls(compiled).items()],
        "beaten": [
            {"call": b.call, "measure": b.measure, "peer": b.peer, "reason": b.reason and b.reason.why}
            for b in peers.beaten(compiled)
        ],
        "sweep": _by_kernel(swept),
        "failures": [asdict(failure) for failure in failures],
        "measured": list(measured),
    }


def _launch(row: Row) -> dict[str, Any]:
    keys = _EVERYWHERE + (_ON_SM90 if row["target"] == "sm_90" else ())
    return {key: _short(row[key]) for key in keys if key in row}


def _call(name: str, of_call: Sequence[Row]) -> dict[str, Any]:
    times = {gpu: predict(of_call, gpu) for gpu in GPUS.values()}
    predicted = {
        gpu.name: {
            "microseconds": _short(time.seconds * 1e6),
            "megabytes": _short(time.bytes / 1e6),
            "share_of_copy": _short(time.share_of_copy(gpu)),
            "bound": time.bound,
        }
        for gpu, time in times.items()
    }
    figures = {key: _short(value) for key, value in of_call[0]["call"].items()}
    found = {"call": name, **figures, "predicted": predicted}
    return found | ({"peers": peers.known()[name]} if name in peers.known() else {})


def _by_kernel(rows: Sequence[Row]) -> list[dict[str, Any]]:
    counts = Counter((row["kernel"], row["target"]) for row in rows)
    most: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        of = most.setdefault((row["kernel"], row["target"]), {"registers": 0, "spills": 0})
        for key in of:
            of[key] = max(of[key], row[key])
    return [
        {"kernel": kernel, "target": target, "launches": counts[kernel, target], **of}
        for (kernel, target), of in sorted(most.items())
    ]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(path: str | Path, contents: dict[str, Any]) -> None:
    """A line an entry, so that two documents can be compared by line."""
    parts = []
    for key, value in contents.items():
        if isinstance(value, list):
            entries = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f'"{key}": [\n{entries}\n]')
        else:
            parts.append(f'"{key}": {json.dumps(value)}')
    with whole(Path(path)) as part:
        part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
