"""Documents made by hand for the tests of the page about speed. None of these numbers was measured."""

from __future__ import annotations

import json

from normzoo_bench.report import asked
from normzoo_bench.report.documents import read
from normzoo_bench.report.goals import goals
from normzoo_bench.report.table import lines
from normzoo_bench.workloads import DIRECTIONS

ENVIRONMENT = {
    "normzoo": "0.0.9",
    "torch": "7.7.7",
    "cpu": "Planted CPU",
    "threads": 1,
    "commit": "feedface00112233",
    "changed": False,
    "device": "cpu",
}
GPU = ENVIRONMENT | {"device": "cuda", "gpu": "Planted GPU"}


def spread(median):
    return {"median": median, "p20": 0.98 * median, "p80": 1.02 * median}


def row(contender="normzoo", speedup=1.0, **other):
    """A row of `normzoo bench`, beside torch."""
    given = {
        "layer": "batch_norm",
        "contender": contender,
        "workload": "resnet-8x64x8x8",
        "shape": [8, 64, 8, 8],
        "dtype": "float32",
        "memory_format": "contiguous",
        "direction": "forward",
        "mode": "training",
        "clock": "wall",
        "seconds": spread(1e-4 / speedup),
        "error": {},
        "baseline": "torch",
        "speedup": spread(speedup),
        "bytes": 100_000,
        "gigabytes_a_second": 1.0 * speedup,
        "share_of_copy": 0.5 * speedup,
        "saved_bytes": 2000,
        "peak_bytes": 3000,
        "cold": True,
    }
    return given | other


def pair(speedup, **other):
    return [row(speedup=speedup, **other), row("torch", **other)]


def pairs(layers=asked.WITH_TORCH, speedup=1.1, other="torch", directions=DIRECTIONS, **known):
    """Of every layer in every direction, so that no row of a goal is lacking."""
    known = {"workload": "resnet-9x64x8x8"} | known
    each = [{"layer": layer, "direction": direction, **known} for layer in layers for direction in directions]
    ours = [row(speedup=speedup, baseline=other, **one) for one in each]
    return [*ours, *(row(other, **one) for one in each)]


def along_sweeps(speedup=1.0):
    swept = [(f"{sweep}-8x64x8x8", layer) for sweep, layers in asked.SWEEPS.items() for layer in layers]
    return [one for use, layer in swept for one in pair(speedup, workload=use, layer=layer)]


def on_gpu(share, direction="forward", layer="rms_norm", width=4096, **other):
    given = {"workload": f"llm-8192x{width}", "shape": [8192, width], "dtype": "bfloat16", "mode": "any"}
    given |= {"clock": "kernel", "share_of_copy": share, "layer": layer, "direction": direction}
    return row(**(given | other))


def of_widths(share, widths=(1024, 2048, 4096, 8192), **other):
    """Both layers of the goals of row norms in each width."""
    return [on_gpu(share, layer=name, width=w, **other) for name in ("rms_norm", "layer_norm") for w in widths]


def document(*rows, environment=ENVIRONMENT, command="normzoo bench --planted", **other):
    settings = {"time": "2031-02-03T04:05:06+00:00", "command": command}
    whole = {"environment": environment, "settings": settings, "copy_bandwidth": {"median": 1e9}}
    return {"form": 1, **whole, "rows": list(rows), **other}


def judged(folder, key):
    """The line of one goal, as a folder of documents decides it."""
    (found,) = lines(read(folder), [goal for goal in goals() if goal.key == key])
    return found


def put(folder, **documents):
    for name, content in documents.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def static(**other):
    """A document of the static gate."""
    given = {"launches": [launch("c")], "calls": [], "beaten": [], "sweep": [], "failures": []}
    gpus = {"H200": {"copy": 1e12}}
    return {"command": "python -m static --all", "environment": ENVIRONMENT, "gpus": gpus, **given, **other}


def launch(case):
    return {"case": case, "dtype": "bf16", "target": "sm_90", "kernel": "k"}


def call(name, microseconds):
    return {"call": name, "predicted": {"H200": {"microseconds": microseconds, "share_of_copy": 0.01}}}
