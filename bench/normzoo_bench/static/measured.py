"""What a GPU measured, beside what is predicted for the same calls: rows of documents of `normzoo bench`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normzoo.zoo import find
from normzoo_bench import results

from .case import ON_SM90, Case
from .predict import GPUS, Gpu, predict
from .row_cases import RowNorm
from .running_cases import RunningNorm
from .standardize_cases import Standardized
from .weight_cases import Standardization

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "mixed": "bf16"}
_ROWS = {"layer_norm": "ln", "rms_norm": "rms", "crms_norm": "crms"}
_RUNNING = ("power_norm", "unified_norm")
_WAYS = {"forward": (False,), "saving": (False,), "backward": (True,), "both": (False, True)}


@dataclass(frozen=True)
class Measured:
    """A row of a document and the calls of the gate that it is made of."""

    row: dict
    gpu: Gpu
    cases: tuple[Case, ...]

    @property
    def dtype(self) -> str:
        return _DTYPES[self.row["dtype"]]

    @property
    def name(self) -> str:
        parts = [self.row[key] for key in ("layer", "workload", "dtype", "memory_format", "direction")]
        return " ".join(part for part in parts if part != "contiguous")


def measured(paths: Iterable[str | Path]) -> Iterator[Measured]:
    """The rows of documents in which normzoo ran on a GPU that is known here, by its kernel clock.

    Raises:
        ValueError: a document cannot be read.
    """
    for path in paths:
        document = results.load(path)
        gpu = _gpu_of(document)
        for row in document["rows"] if gpu else ():
            if row["contender"] == "normzoo" and row["clock"] == "kernel" and (cases := cases_of(row)):
                yield Measured(row, gpu, cases)


def _gpu_of(document: dict) -> Gpu | None:
    name = document["environment"].get("gpu") or ""
    found = next((gpu for known, gpu in GPUS.items() if known in name), None)
    return found and found.copying(document["copy_bandwidth"]["median"])


def cases_of(row: dict) -> tuple[Case, ...]:
    """The calls of a row, none where the gate has no case of this kind."""
    sources = [_source(row, backward) for backward in _WAYS.get(row["direction"], ())]
    return tuple(
        Case(source.name, source.build, count, (), ON_SM90) for source, count in filter(None, sources)
    )  # fmt: skip


def _source(row: dict, backward: bool) -> tuple[Any, int] | None:
    """What builds one call of a row, and with how many rows or samples."""
    layer, shape = row["layer"], row["shape"]
    first, last = shape[0], row["memory_format"] == "channels_last"
    if layer in _ROWS:
        count, layout = math.prod(shape[:-1]), row["memory_format"]
        params = "fp32" if row["dtype"] == "mixed" and layer != "crms_norm" else None
        return RowNorm(_ROWS[layer], backward, shape[-1], count, layout, params=params), count
    if layer in ("batch_norm", "group_norm", "instance_norm") and row["mode"] != "eval":
        groups = {"batch_norm": 0, "instance_norm": shape[1]}.get(layer, find("group_norm").arguments[0])
        return Standardized(backward, groups, shape[1], tuple(shape[2:]), first, last=last), first
    if layer in _RUNNING and row["mode"] != "eval":
        unified = layer == "unified_norm"
        if len(shape) == 4:
            layout = "last" if last else "planes"
            return RunningNorm(backward, shape[1], tuple(shape[2:]), first, layout, unified=unified), first
        count = math.prod(shape[:-1])
        return RunningNorm(backward, shape[-1], (), count, groups=0 if unified else 1, unified=unified), count
    if layer == "weight_standardize":
        return Standardization(backward, first, math.prod(shape[1:])), first
    return None


def compared(found: Measured, rows: Iterable[list[dict]]) -> dict:
    """Predicted and measured seconds of a row, from the figures of its calls."""
    spent = [predict(of_call, found.gpu) for of_call in rows]
    predicted, seconds = sum(p.seconds for p in spent), found.row["seconds"]["median"]
    return {
        "name": found.name,
        "gpu": found.gpu.name,
        "predicted": predicted,
        "measured": seconds,
        "ratio": seconds / predicted,
        "share_of_copy": found.row.get("share_of_copy"),
    }
