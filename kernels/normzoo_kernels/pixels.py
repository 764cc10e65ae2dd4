"""What belongs to regions and to pixels: launchers as operators over `_regions.py` and `_pixels.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._channel_calls import SUMS, beside, contiguous, in_place, lies, row_unit
from ._channel_forms import Problem, power_of_two
from ._channel_layout import View, like, positions
from ._launch import launch, sm_count
from ._op import op
from ._pixels import pixel_map, pixel_map_grads
from ._regions import importance_gate, importance_grad, region_scaling, region_scaling_grads

_TILE = 4096
"""Bytes."""
_ROW = {"E": 128, "num_warps": 1}


def _rows(t: Tensor) -> tuple[int, int, dict[str, int]]:
    """(rows of a region, blocks of a row, constants) of statistics (2, *, C)."""
    channels = t.shape[-1]
    rows, unit = t.numel() // channels // 2, row_unit(channels)
    return rows, -(-channels // _ROW["E"]), {"UNIT": unit, **_ROW}


def _scaling_like(count, pivot, delta, m2, *_):
    return tuple(torch.empty_like(m2).contiguous() for _ in range(4))


@op(
    "region_scaling(Tensor count, Tensor pivot, Tensor delta, Tensor m2, Tensor? w0, Tensor? b0, Tensor? w1,"
    " Tensor? b1, float eps, bool apart) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_scaling_like,
)
def scaling(count, pivot, delta, m2, w0, b0, w1, b1, eps, apart):
    """(scale, shift, mean, var) of two regions, (2, C) or (2, N, C).

    scale = (1 + w) / sqrt(var + eps * values of both / values of the region); the shift adds b of the region,
    or unless `apart` that of both.
    """
    outputs = _scaling_like(count, pivot, delta, m2)
    rows, blocks, constants = _rows(m2)
    tensors = [contiguous(t) for t in (count, pivot, delta, m2, w0, b0, w1, b1)]
    numbers = (rows, m2.shape[-1] // constants["UNIT"], blocks)
    constants |= {"EPS": eps, "APART": apart}
    launch(region_scaling, rows * blocks, m2.device, *tensors, *outputs, *numbers, **constants)
    return outputs


def _scaling_grads_like(dscale, dshift, count, delta, m2, w0, b0, w1, b1, *_):
    made = [torch.empty_like(m2).contiguous() for _ in range(2)]
    return *made, *(m2.new_empty(0) if p is None else torch.empty_like(p) for p in (w0, b0, w1, b1))


@op(
    "region_scaling_grads(Tensor? dscale, Tensor? dshift, Tensor count, Tensor delta, Tensor m2, Tensor? w0,"
    " Tensor? b0, Tensor? w1, Tensor? b1, float eps, bool apart)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_scaling_grads_like,
)
def scaling_backward(dscale, dshift, count, delta, m2, w0, b0, w1, b1, eps, apart):
    """Gradients of (delta, m2, w0, b0, w1, b1), empty for parameters that are not there."""
    outputs = _scaling_grads_like(dscale, dshift, count, delta, m2, w0, b0, w1, b1)
    rows, blocks, constants = _rows(m2)
    channels, programs = m2.shape[-1], rows * blocks
    extra = -(-channels // SUMS["CB"]) if any(p is not None for p in (w0, b0, w1, b1)) else 0
    tensors = [contiguous(t) for t in (dscale, dshift, count, delta, m2, w0, w1)]
    tensors += [t if t.numel() else None for t in outputs]
    numbers = (rows, channels // constants["UNIT"], blocks, programs)
    constants |= {"EPS": eps, "APART": apart, **SUMS}
    launch(region_scaling_grads, programs + extra, m2.device, *tensors, *numbers, **constants)
    return outputs


def _flat(t: Tensor) -> tuple[int, int, dict[str, int]]:
    """(programs, units, constants) of a kernel over all entries."""
    unit = row_unit(t.numel())
    return -(-t.numel() // 1024), t.numel() // unit, {"UNIT": unit, "E": 1024}


def _gate_like(x, threshold):
    return torch.empty_like(x).contiguous(), torch.empty_like(x, dtype=torch.uint8).contiguous()


@op("importance_gate(Tensor x, float threshold) -> (Tensor, Tensor)", fake=_gate_like)
def gate(x, threshold):
    """(sigmoid of x, 1 where it reaches the threshold)."""
    outputs = _gate_like(x, threshold)
    if x.numel():
        grid, size, constants = _flat(x)
        launch(importance_gate, grid, x.device, contiguous(x), *outputs, size, threshold, **constants)
    return outputs


def _gate_grad_like(first, second, a):
    return torch.empty_like(a).contiguous()


@op("importance_grad(Tensor? first, Tensor? second, Tensor a) -> Tensor", fake=_gate_grad_like)
def gate_backward(first, second, a):
    """The gradient of x from two of a, its sigmoid."""
    dx = _gate_grad_like(first, second, a)
    if a.numel():
        tensors = [contiguous(t) for t in (first, second, a)]
        grid, size, constants = _flat(a)
        launch(importance_grad, grid, a.device, *tensors, dx, size, **constants)
    return dx


def _tile(p: Problem) -> dict[str, int]:
    """As that of the pooling: rows of 64 positions, or fewer for a program on every multiprocessor."""
    entries = _TILE // p.itemsize
    if p.tokens:
        channels = min(power_of_two(p.channels), entries)
        return {"CB": channels, "L": min(entries // channels, power_of_two(p.count))}
    width = min(64, power_of_two(p.count))
    while width > 16 and p.samples * -(-p.count // width) < sm_count(p.device):
        width //= 2
    return {"CB": min(entries // width, power_of_two(p.channels)), "L": width}


def _call(x: Tensor, view: View, dy_view: View | None = None) -> tuple[int, tuple, dict[str, Any]]:
    """(programs, numbers, constants)."""
    samples, count = x.shape[0], positions(x)
    problem = Problem(samples, x.shape[1], count, x.element_size(), view.tokens, True, False, x.device)
    (_, *numbers), constants = lies(problem, view, dy_view)
    del constants["PER_SAMPLE"]
    tile = _tile(problem)
    return samples * -(-count // tile["L"]), tuple(numbers), constants | tile | {"num_warps": 4}


@op("pixel_map(Tensor x, Tensor scale, Tensor shift) -> Tensor", fake=lambda x, scale, shift: like(x))
def apply(x, scale, shift):
    """x * (1 + scale) + shift, rounded once; scale and shift (N, 1, *) float32."""
    y = like(x)
    if x.numel() == 0:
        return y
    x, view = _as(x, y)
    programs, numbers, constants = _call(x, view)
    tensors = (x, contiguous(scale), contiguous(shift), y)
    launch(pixel_map, programs, x.device, *tensors, *numbers, **constants, STAGES=2)
    return y


def _as(x: Tensor, y: Tensor) -> tuple[Tensor, View]:
    """x where it lies as its output does, else a copy that does."""
    return in_place(x if x.stride() == y.stride() else torch.empty_like(y).copy_(x))


def _apply_grads_like(dy, x, scale):
    return like(x), torch.empty_like(scale).contiguous(), torch.empty_like(scale).contiguous()


@op("pixel_map_grads(Tensor dy, Tensor x, Tensor scale) -> (Tensor, Tensor, Tensor)", fake=_apply_grads_like)
def apply_backward(dy, x, scale):
    """Gradients of (x, scale, shift)."""
    dx, dscale, dshift = _apply_grads_like(dy, x, scale)
    if x.numel() == 0:
        return dx, dscale.zero_(), dshift.zero_()
    x, view = _as(x, dx)
    dy, dy_view = beside(dy, x, view.tokens)
    programs, numbers, constants = _call(x, view, dy_view)
    tensors = (dy, x, contiguous(scale), dx, dscale, dshift)
    launch(pixel_map_grads, programs, x.device, *tensors, *numbers, **constants, STAGES=2)
    return dx, dscale, dshift
