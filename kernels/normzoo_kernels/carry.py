"""Gradients of statistics and parameters between the passes of the channel engine: launchers as operators over
`_carry.py`. All of them are float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._carry import statistics_pull, sum_rows
from ._channel_calls import contiguous, row_unit
from ._launch import launch
from ._op import op

MOST = 5
"""Arrays that are summed up at once."""


def _pull_like(d_delta, d_m2, delta, count, number):
    return torch.empty_like(delta).contiguous(), torch.empty_like(delta).contiguous()


@op(
    "statistics_pull(Tensor? d_delta, Tensor? d_m2, Tensor delta, Tensor? count, float number)"
    " -> (Tensor, Tensor)",
    fake=_pull_like,
)
def pull(d_delta, d_m2, delta, count, number):
    """(slope, offset) of what x gets through its statistics, slope * (x - pivot) + offset.

    delta: (*, C); count: of every entry of it, or None for `number`.
    """
    outputs = _pull_like(d_delta, d_m2, delta, count, number)
    channels, block = delta.shape[-1], 128
    blocks, unit = -(-channels // block), row_unit(channels)
    tensors = [contiguous(t) for t in (d_delta, d_m2, delta, count)]
    grid = delta.numel() // channels * blocks
    numbers = (channels // unit, blocks, max(number, 1.0))
    launch(statistics_pull, grid, delta.device, *tensors, *outputs, *numbers, UNIT=unit, E=block, num_warps=1)
    return outputs


def _totals_like(arrays):
    return [t.new_empty(t.shape[-1]) for t in arrays]


@op("sum_rows(Tensor[] arrays) -> Tensor[]", fake=_totals_like)
def totals(arrays):
    """The sums (C,) of up to `MOST` arrays (N, C) over their rows, each in a fixed order."""
    outputs = _totals_like(arrays)
    rows, channels = arrays[0].shape
    rest: list[Tensor | None] = [None] * (MOST - len(arrays))
    tensors = [*(contiguous(t) for t in arrays), *rest, *outputs, *rest]
    unit, grid = row_unit(channels), -(-channels // 32)
    launch(sum_rows, grid, arrays[0].device, *tensors, rows, channels // unit, UNIT=unit, RB=32, CB=32)
    return outputs
