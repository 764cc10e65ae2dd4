"""Norms by stored statistics, and group norm behind another norm: launchers as operators over `_stages.py`.

Statistics are float32 and contiguous, (N, C) or (C,); parameters (C,) of any dtype of the kernels, those of the
second stage also one a group.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._channel_calls import SUMS, contiguous, row_unit
from ._launch import launch
from ._op import op
from ._stages import mixed_scaling, moved_statistics, scaling_grads, second_stage, second_stage_grads


def _given(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _mixed_like(pivot, delta, m2, *rest):
    own = 0 if m2 is None else pivot.shape
    return *(torch.empty_like(pivot) for _ in range(4)), pivot.new_empty(own), pivot.new_empty(own)


@op(
    "mixed_scaling(Tensor pivot, Tensor? delta, Tensor? m2, Tensor? mean, Tensor? var, Tensor? weight,"
    " Tensor? bias, float share, float n, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_mixed_like,
)
def mixed(pivot, delta, m2, mean, var, weight, bias, share, n, eps):
    """(scale, shift, r, gap) for the entries of `pivot`, and their own mean and variance, m2 / n.

    mean, var: stored ones (C,), which count with `share`; with m2 None there is nothing else.
    """
    outputs = _mixed_like(pivot, delta, m2)
    channels = pivot.shape[-1]
    rows, unit, block = pivot.numel() // channels, row_unit(channels), 128
    blocks = -(-channels // block)
    tensors = [contiguous(t) for t in (pivot, delta, m2, mean, var, weight, bias)]
    numbers = (channels // unit, blocks, share, 1 - share, max(n, 1.0))
    tile = {"EPS": eps, "UNIT": unit, "E": block, "num_warps": 1}
    launch(mixed_scaling, rows * blocks, pivot.device, *tensors, *map(_given, outputs), *numbers, **tile)
    return outputs


def _like_parameters(t: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients to be written, empty for what is not there."""
    return tuple(t.new_empty(0) if p is None else torch.empty_like(p).contiguous() for p in parameters)


def _scaling_like(dscale, dshift, r, gap, weight, bias):
    return _like_parameters(r, weight, bias)


@op(
    "scaling_grads(Tensor? dscale, Tensor? dshift, Tensor r, Tensor gap, Tensor? weight, Tensor? bias)"
    " -> (Tensor, Tensor)",
    fake=_scaling_like,
)
def scaling_backward(dscale, dshift, r, gap, weight, bias):
    """Gradients of (weight, bias), empty where they are not given, from those of scale = weight * r and shift =
    bias - gap * scale."""
    made = _like_parameters(r, weight, bias)
    channels = r.shape[-1]
    tensors = [contiguous(t) for t in (dscale, dshift, r, gap)]
    unit, grid = row_unit(channels), -(-channels // SUMS["CB"])
    numbers = (r.numel() // channels, channels // unit)
    launch(scaling_grads, grid, r.device, *tensors, *map(_given, made), *numbers, UNIT=unit, **SUMS)
    return made


def _moved_like(mean, var, old_mean, old_var, rate, early):
    return torch.empty_like(old_mean).contiguous(), torch.empty_like(old_var).contiguous()


@op(
    "moved_statistics(Tensor mean, Tensor var, Tensor old_mean, Tensor old_var, float rate, bool early)"
    " -> (Tensor, Tensor)",
    fake=_moved_like,
)
def moved(mean, var, old_mean, old_var, rate, early):
    """(mean, var), stored ones (C,) that have moved towards those of a batch, whose variance is taken around
    the stored mean, with `early` around that before it moved."""
    outputs = _moved_like(mean, var, old_mean, old_var, rate, early)
    tensors = [contiguous(t) for t in (mean, var, old_mean, old_var)]
    block = 128
    tile = {"EARLY": early, "E": block, "num_warps": 1}
    grid = -(-len(mean) // block)
    launch(moved_statistics, grid, mean.device, *tensors, *outputs, len(mean), rate, 1 - rate, **tile)
    return outputs


def _stage(delta: Tensor, groups: int, parameter: Tensor | None):
    """(programs, numbers, constants)."""
    channels = delta.shape[-1]
    size, rows = channels // groups, delta.numel() // channels
    sets, wide = rows * groups, min(triton.next_power_of_2(size), 1024)
    tall = max(256 // wide, 1)
    unit = row_unit(size)
    each = channels // len(parameter) if parameter is not None else 1
    constants = {"UNIT": unit, "GB": tall, "L": wide, "num_warps": 4 if wide > 256 else 1}
    return -(-sets // tall), (sets, size // unit, groups, each), constants


def _second_like(delta, m2, scale, shift, weight, bias, groups, number, eps):
    sets = (*delta.shape[:-1], groups)
    return torch.empty_like(delta), torch.empty_like(delta), delta.new_empty(sets), delta.new_empty(sets)


@op(
    "second_stage(Tensor delta, Tensor m2, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias,"
    " int groups, float number, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_second_like,
)
def second(delta, m2, scale, shift, weight, bias, groups, number, eps):
    """(scale, shift, r, mean of the groups) of a norm by (scale, shift) and group norm behind it.

    Args:
        delta, m2, scale, shift: (N, C), of the norm; all statistics of `number` values.
        weight, bias: (C,) or (groups,), both alike.
    """
    outputs = _second_like(delta, m2, scale, shift, weight, bias, groups, number, eps)
    programs, numbers, tile = _stage(delta, groups, bias if weight is None else weight)
    tensors = [contiguous(t) for t in (delta, m2, scale, shift, weight, bias)]
    launch(second_stage, programs, delta.device, *tensors, *outputs, *numbers, number, EPS=eps, **tile)
    return outputs


def _second_grads_like(dscale, dshift, delta, m2, scale, shift, weight, bias, *_):
    return *(torch.empty_like(delta) for _ in range(4)), *_like_parameters(delta, weight, bias)


@op(
    "second_stage_grads(Tensor? dscale, Tensor? dshift, Tensor delta, Tensor m2, Tensor scale, Tensor shift,"
    " Tensor? weight, Tensor? bias, Tensor r, Tensor rest, int groups, float number)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_second_grads_like,
)
def second_backward(dscale, dshift, delta, m2, scale, shift, weight, bias, r, rest, groups, number):
    """Gradients of (delta, m2, scale, shift, weight, bias)."""
    outputs = _second_grads_like(dscale, dshift, delta, m2, scale, shift, weight, bias)
    parameter = bias if weight is None else weight
    programs, numbers, tile = _stage(delta, groups, parameter)
    extra = 0 if parameter is None else -(-len(parameter) // SUMS["CB"])
    tensors = [contiguous(t) for t in (dscale, dshift, delta, m2, scale, shift, weight, r, rest)]
    tensors += map(_given, outputs)
    numbers = (*numbers, number, programs)
    launch(second_stage_grads, programs + extra, delta.device, *tensors, *numbers, **tile, **SUMS)
    return outputs
