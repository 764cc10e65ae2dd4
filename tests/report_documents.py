"""Documents made by hand for the tests of the page about speed. None of these numbers was measured."""

from __future__ import annotations

import json

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


def on_gpu(share, direction="forward", layer="rms_norm", **other):
    given = {"workload": "llm-8192x4096", "shape": [8192, 4096], "dtype": "bfloat16", "mode": "any"}
    given |= {"clock": "kernel", "share_of_copy": share, "layer": layer, "direction": direction}
    return row(**(given | other))


def document(*rows, environment=ENVIRONMENT, command="normzoo bench --planted", **other):
    settings = {"time": "2031-02-03T04:05:06+00:00", "command": command}
    whole = {"environment": environment, "settings": settings, "copy_bandwidth": {"median": 1e9}}
    return {"form": 1, **whole, "rows": list(rows), **other}


def put(folder, **documents):
    for name, content in documents.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def static(**other):
    """A document of the static gate."""
    given = {"launches": [launch("c")], "calls": [], "beaten": [], "sweep": [], "failures": []}
    return {"command": "python -m static --all", "environment": ENVIRONMENT, **given, **other}


def launch(case):
    return {"case": case, "dtype": "bf16", "target": "sm_90", "kernel": "k"}


def call(name, share):
    return {"call": name, "predicted": {"H200": {"share_of_copy": share}}}
