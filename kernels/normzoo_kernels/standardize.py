"""Batch, group and instance norm on the GPU: three or four launches each way, over the passes of `channels.py`
and what `_standardize.py` does between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._channel_calls import beside, contiguous, in_place, merge
from ._channel_forms import merge_tile, power_of_two
from ._channel_layout import like, positions
from ._channels_merge import merge_moments, merge_sums
from ._launch import KernelUnavailable, launch, warn_once
from ._op import differentiated, needs_grad, op, through_reference
from ._standardize import (
    batch_standardize_grad,
    channel_standardize,
    group_standardize,
    group_standardize_grad,
)
from .channels import find_moments, find_sums, write_map

_TILE = 1024
"""Channels that a program for groups has at a time."""


def _numbers(x: Tensor, groups: int, count: int) -> Tensor:
    """Arrays of float32 numbers: one a channel for a batch (`groups` 0), else one a channel of each sample."""
    of = x.shape[:2] if groups else x.shape[1:2]
    return torch.empty((count, *of), dtype=torch.float32, device=x.device)


def _group_tile(width: int) -> dict[str, int]:
    lanes = min(power_of_two(width), _TILE)
    return {"G": _TILE // lanes, "W": lanes}


def _group_programs(x: Tensor, groups: int, tile: dict[str, int]) -> int:
    return x.shape[0] * -(-groups // tile["G"])


def _outputs(x, weight, bias, groups, eps):
    return like(x), _numbers(x, groups, 5)


@op(
    "channel_standardize(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor)",
    fake=_outputs,
)
def forward(x, weight, bias, groups, eps):
    """(y, stats) for x (N, C, *), not empty; weight, bias: (C,).

    groups: of the channels of a sample, each standardized on its own; 0 standardizes channels over the batch.
    stats, float32 (5, C) or (5, N, C): pivot, delta, 1 / std, and, unless several channels share these, the
    mean and the unbiased variance.
    """
    y, stats = _outputs(x, weight, bias, groups, eps)
    x, view = in_place(x)
    count, channels = positions(x), x.shape[1]
    found = _numbers(x, groups, 2)
    own = (stats[0], stats[1], stats[4])
    form, parts = find_moments(x, view, None, groups > 0, own)
    parameters = (contiguous(weight), contiguous(bias), found)
    if groups in (0, channels):
        tile, size = merge_tile(form.parts), stats[0].numel()
        numbers = (size, channels, count if groups else x.shape[0] * count, form.parts)
        tensors = (parts, stats, *parameters)
        launch(channel_standardize, -(-size // tile["E"]), x.device, *tensors, *numbers, EPS=eps, **tile)
    else:
        merge(merge_moments, form, parts, own)
        tile = _group_tile(channels // groups)
        tensors = (stats, *parameters, x.shape[0], channels, count, channels // groups)
        programs = _group_programs(x, groups, tile)
        launch(group_standardize, programs, x.device, *tensors, EPS=eps, **tile)
    scale, shift = found
    write_map(y, x, view, None, view, None, stats[0], None, scale, shift)
    return y, stats


def _gradients(dy, x, stats, weight, bias, groups, needs):
    dx = like(x) if needs[0] else x.new_empty(0)
    dw = torch.empty_like(weight) if needs[1] else x.new_empty(0)
    return dx, dw, torch.empty_like(bias) if needs[2] else x.new_empty(0)


@op(
    "channel_standardize_grad(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, int groups,"
    " bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def backward(dy, x, stats, weight, bias, groups, needs):
    """(dx, dw, db), empty where not in `needs`."""
    dx, dw, db = _gradients(dy, x, stats, weight, bias, groups, needs)
    gradients = (dw if needs[1] else None, db if needs[2] else None)
    x, view = in_place(x)
    dy, dy_view = beside(dy, x, view.tokens)
    stats = stats.contiguous()
    count, channels = positions(x), x.shape[1]
    sums, found = _numbers(x, groups, 2), _numbers(x, groups, 3)
    form, parts = find_sums(dy, dy_view, x, view, None, stats[0], groups > 0, tuple(sums))
    if groups == 0:
        tile = merge_tile(form.parts)
        tensors = (parts, sums, stats, contiguous(weight), found, *gradients)
        numbers = (channels, x.shape[0] * count, form.parts)
        launch(batch_standardize_grad, -(-channels // tile["E"]), x.device, *tensors, *numbers, **tile)
    else:
        merge(merge_sums, form, parts, tuple(sums))
        tile = _group_tile(channels // groups) | {"R": 32, "E": 32}
        maps = _group_programs(x, groups, tile) if needs[0] else 0
        programs = maps + (-(-channels // tile["E"]) if any(needs[1:]) else 0)
        tensors = (sums, stats, contiguous(weight), found, *gradients)
        numbers = (x.shape[0], channels, count, channels // groups, maps)
        launch(group_standardize_grad, programs, x.device, *tensors, *numbers, **tile)
    if needs[0]:
        scale, slope, offset = found
        write_map(dx, x, view, dy, dy_view, None, stats[0], scale, slope, offset)
    return dx, dw, db


class _Standardize(torch.autograd.Function):
    """y, and the statistics, which have no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, reference):
        y, stats = forward(x, weight, bias, groups, eps)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups, ctx.reference = groups, reference
        return y, stats

    @staticmethod
    def backward(ctx, *grads):
        dy = grads[0]
        if dy is None:
            return (None,) * 6
        x, weight, bias, stats = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if differentiated(dy):
            found = through_reference(ctx.reference, (x, weight, bias), needs, dy.to(x.dtype))
        else:
            try:
                found = backward(dy, x, stats, weight, bias, ctx.groups, needs)
            except KernelUnavailable as error:
                if ctx.reference.strict:
                    raise
                warn_once(str(error))
                found = through_reference(ctx.reference, (x, weight, bias), needs, dy.to(x.dtype))
        return *(t if need else None for t, need in zip(found, needs, strict=True)), None, None, None


def standardize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    reference: Any,
) -> tuple[Tensor, Tensor]:
    """(y, stats) as :func:`forward`, differentiable.

    `reference` (x, weight, bias) is the eager body, for double backward and for a backward kernel that does not
    compile; its attribute ``strict`` makes the latter an error.

    Raises:
        KernelUnavailable: a forward kernel does not compile.
    """
    if needs_grad(x, weight, bias):
        return _Standardize.apply(x, weight, bias, groups, float(eps), reference)
    return forward(x, weight, bias, groups, float(eps))
