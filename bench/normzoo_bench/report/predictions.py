"""What the static gate predicts for calls of layers that have a goal, in the terms of the goals."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from normzoo.zoo import ZOO, find

from ..workloads import passes
from .documents import Documents, Row, Source

GPU = "H200"
_DTYPES = {"bf16": ("bfloat16", 2), "fp16": ("float16", 2), "fp32": ("float32", 4)}
_DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
_ADDED = 4
"""Of a sum and its norm: x, the residual, their sum and the norm; backward two gradients, the sum and dx."""
_CALL = re.compile(r"^(?P<family>[a-z-]+?)-(?P<way>fwd|bwd)-(?P<rest>.+)-(?P<dtype>\w+)$")
_ROWS = {
    "ln": "layer_norm", "rms": "rms_norm", "crms": "crms_norm", "add-ln": "add_layer_norm",
    "add-rms": "add_rms_norm",
}  # fmt: skip
_SIZED = {
    "alpha": "alpha_batch_norm", "pn": "power_norm", "un": "unified_norm", "bounded": "evo_norm_b0",
    "swish": "evo_norm_s0", "mod-ln": "adaptive_layer_norm", "mod-rms": "adaptive_rms_norm",
    "ws": "weight_standardize",
}  # fmt: skip
_SIZE = r"(?P<size>\d+(?:x\d+)+)"
_LAST = r"(?P<format>-last)?"
_REST = {
    **dict.fromkeys(_ROWS, re.compile(r"(?P<width>\d+)(?P<format>-padded)?")),
    **dict.fromkeys(_SIZED, re.compile(_SIZE + _LAST)),
    "pn": re.compile(rf"{_SIZE}{_LAST}(?P<group>-g1)?"),
    "mod-ln": re.compile(rf"{_SIZE}-sample"),
    "mod-rms": re.compile(rf"{_SIZE}-sample"),
    "standardize": re.compile(rf"(?P<sets>batch|groups\d+)-{_SIZE}{_LAST}"),
}
"""What tells the size and memory format of a call as layers make it; others have more in their names."""


class Prediction(NamedTuple):
    source: Source
    row: Row
    """As the row of a measurement tells it: layer, shape, dtype, memory format, direction, mode, workload."""
    case: str
    share: float
    """The fewest bytes over the predicted time, of a copy's speed."""

    @property
    def layer(self) -> str:
        return self.row["layer"]

    @property
    def direction(self) -> str:
        return self.row["direction"]


def predictions(documents: Documents) -> list[Prediction]:
    """Of the calls whose fewest bytes are known; none where Triton is not installed, which knows their rows."""
    source = documents.find("static")
    copy = (source.document.get("gpus") or {}).get(GPU, {}).get("copy") if source else None
    if source is None or not copy or importlib.util.find_spec("triton") is None:
        return []
    from ..static.row_cases import ROWS

    found = []
    for call in source.entries("calls"):
        microseconds = call.get("predicted", {}).get(GPU, {}).get("microseconds")
        row = _row(str(call.get("call")), ROWS.get)
        if microseconds and row:
            share = row["bytes"] / (copy * 1e-6 * microseconds)
            found.append(Prediction(source, row, call["call"], share))
    return found


def _row(call: str, rows: Callable[[int], int | None]) -> dict[str, Any] | None:
    """What a call is, if it is one that a layer makes; `rows` is how many of a width the gate has."""
    named = _CALL.match(call)
    rest = named and named["family"] in _REST and _REST[named["family"]].fullmatch(named["rest"])
    if not named or not rest or named["dtype"] not in _DTYPES:
        return None
    told = rest.groupdict()
    shape = (rows(int(told["width"])), int(told["width"])) if "width" in told else _numbers(told["size"])
    layer = _layer(named["family"], told, shape)
    if shape[0] is None or layer is None:
        return None
    dtype, itemsize = _DTYPES[named["dtype"]]
    row = {
        "layer": layer,
        "direction": _DIRECTIONS[named["way"]],
        "shape": list(shape),
        "dtype": dtype,
        "memory_format": {"-last": "channels_last", "-padded": "padded"}.get(told.get("format"), "contiguous"),
        "workload": f"gate-{'x'.join(map(str, shape))}",
    }
    count, mode = _passes(layer, row["direction"])
    return {**row, "mode": mode, "bytes": count * math.prod(shape) * itemsize}


def _numbers(size: str) -> tuple[int, ...]:
    return tuple(int(n) for n in size.split("x"))


def _layer(family: str, told: dict, shape: tuple) -> str | None:
    """The layer that makes such a call."""
    if family == "standardize":
        sets = told["sets"]
        return {"batch": "batch_norm", f"groups{shape[1]}": "instance_norm"}.get(sets, "group_norm")
    if family == "pn" and bool(told["group"]) == (len(shape) == 4):
        return None  # sums over the channels of a token, and none of a pixel
    return _ROWS.get(family) or _SIZED[family]


def _passes(layer: str, direction: str) -> tuple[int, str]:
    if layer in {entry.added.__name__ for entry in ZOO if entry.added}:
        return _ADDED, "any"
    entry = find(layer)
    mode = "training" if entry.couples_samples else "any"
    return passes(entry, mode, direction), mode
