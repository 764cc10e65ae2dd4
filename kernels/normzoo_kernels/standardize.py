"""Batch, group and instance norm on the GPU: three or four launches each way, over the passes of `channels.py`
and what `_standardize.py` does between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._channel_calls import beside, contiguous, in_place, merge
from ._channel_forms import merge_tile, power_of_two
from ._channel_layout import like
from ._channels_merge import merge_moments, merge_sums
from ._choices import chosen
from ._launch import KernelUnavailable, launch, remembered, warn_once
from ._op import differentiated, needs_grad, op, through_reference
from ._standardize import (
    batch_standardize_grad,
    channel_standardize,
    group_standardize,
    group_standardize_grad,
)
from .channels import find_moments, find_sums, write_map
from .on_chip import backward_on_chip, forward_on_chip

_KEPT = 7
"""Arrays of numbers that a forward pass leaves."""

_TILE = 1024
"""Channels that a program for groups has at a time."""


def _numbers(x: Tensor, groups: int, count: int) -> Tensor:
    """Arrays of float32 numbers: one a channel for a batch (`groups` 0), else one a channel of each sample."""
    of = x.shape[:2] if groups else x.shape[1:2]
    return torch.empty((count, *of), dtype=torch.float32, device=x.device)


def _outputs(x, weight, bias, groups, eps):
    return like(x), _numbers(x, groups, _KEPT)


class _Between(NamedTuple):
    """The launch between two passes, but for its tensors."""

    kernel: Any
    programs: int
    numbers: tuple[int, ...]
    tile: dict[str, Any]


@remembered
def _between(shape: torch.Size, groups: int, parts: int, eps: float) -> _Between:
    samples, channels, count = shape[0], shape[1], shape[2:].numel()
    if groups in (0, channels):
        tile, size = merge_tile(parts), channels * (samples if groups else 1)
        numbers = (size, channels, count * (1 if groups else samples), parts)
        return _Between(channel_standardize, -(-size // tile["E"]), numbers, tile | {"EPS": eps})
    width, tile = channels // groups, _group_tile(channels // groups)
    programs = samples * -(-groups // tile["G"])
    return _Between(group_standardize, programs, (samples, channels, count, width), tile | {"EPS": eps})


@remembered
def _between_back(shape: torch.Size, groups: int, parts: int, dx: bool, parameters: bool) -> _Between:
    samples, channels, count = shape[0], shape[1], shape[2:].numel()
    if groups == 0:
        tile, numbers = merge_tile(parts), (channels, samples * count, parts)
        return _Between(batch_standardize_grad, -(-channels // tile["E"]), numbers, tile)
    width, tile = channels // groups, _group_tile(channels // groups) | {"R": 32, "E": 32}
    maps = samples * -(-groups // tile["G"]) if dx else 0
    programs = maps + (-(-channels // tile["E"]) if parameters else 0)
    return _Between(group_standardize_grad, programs, (samples, channels, count, width, maps), tile)


def _group_tile(width: int) -> dict[str, Any]:
    lanes = min(power_of_two(width), _TILE)
    return {"G": _TILE // lanes, "W": lanes}


@op(
    "channel_standardize(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor)",
    fake=_outputs,
)
def forward(x, weight, bias, groups, eps):
    """(y, stats) for x (N, C, *), not empty; weight, bias: (C,).

    groups: of the channels of a sample, each standardized on its own; 0 standardizes channels over the batch.
    stats, float32 (7, C) or (7, N, C): pivot, delta, 1 / std; unless several channels share these, the mean and
    the unbiased variance; and, where x was read twice, the scale and shift that y was made by.
    """
    y, stats = _outputs(x, weight, bias, groups, eps)
    x, view = in_place(x)
    if chosen("on_chip") and forward_on_chip(x, view, weight, bias, groups, eps, y, stats):
        return y, stats
    pivot, delta, _, _, m2, scale, shift = stats.unbind()
    own = (pivot, delta, m2)
    form, parts = find_moments(x, view, None, groups > 0, own)
    between = _between(x.shape, groups, form.parts, eps)
    tensors = (stats, contiguous(weight), contiguous(bias), *between.numbers)
    if between.kernel is channel_standardize:
        tensors = (parts, *tensors)
    else:
        merge(merge_moments, form, parts, own)
    launch(between.kernel, between.programs, x.device, *tensors, **between.tile)
    write_map(y, x, view, None, view, None, pivot, None, scale, shift)
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
    pivot, found = stats[0], _numbers(x, groups, 5)
    if chosen("on_chip") and backward_on_chip(
        dy, dy_view, x, view, stats, weight, groups, dx if needs[0] else None, found, *gradients
    ):
        if groups and (needs[1] or needs[2]):
            between = _between_back(x.shape, groups, 1, False, True)
            tensors = (found, stats, contiguous(weight), *gradients, *between.numbers)
            launch(between.kernel, between.programs, x.device, *tensors, **between.tile)
        return dx, dw, db
    dy_sum, dyx_sum, scale, slope, offset = found.unbind()
    sums = (dy_sum, dyx_sum)
    form, parts = find_sums(dy, dy_view, x, view, None, pivot, groups > 0, sums)
    between = _between_back(x.shape, groups, form.parts, needs[0], needs[1] or needs[2])
    tensors = (found, stats, contiguous(weight), *gradients, *between.numbers)
    if between.kernel is batch_standardize_grad:
        tensors = (parts, *tensors)
    else:
        merge(merge_sums, form, parts, sums)
    launch(between.kernel, between.programs, x.device, *tensors, **between.tile)
    if needs[0]:
        write_map(dx, x, view, dy, dy_view, None, pivot, scale, slope, offset)
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
