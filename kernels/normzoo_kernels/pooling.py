"""Mean and maximum of the channels: launchers as operators over `_pooling.py`. Autograd is in
`normzoo/pooling.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._channel_calls import contiguous, in_place, lies, problem_of
from ._channel_forms import Problem, power_of_two
from ._channel_layout import View, view_of
from ._launch import launch, sm_count
from ._op import op
from ._pooling import channel_pool, channel_unpool

_TILE = 4096
"""Bytes."""


def _tile(p: Problem) -> dict[str, int]:
    """Channels and positions of a tile: planes are read in rows of 64 positions, or of fewer if that brings a
    program to every multiprocessor."""
    entries = _TILE // p.itemsize
    if p.tokens:
        channels = min(power_of_two(p.channels), entries)
        return {"CB": channels, "L": min(entries // channels, power_of_two(p.count))}
    width = min(64, power_of_two(p.count))
    while width > 16 and p.samples * -(-p.count // width) < sm_count(p.device):
        width //= 2
    return {"CB": min(entries // width, power_of_two(p.channels)), "L": width}


def _call(x: Tensor, view: View) -> tuple[int, tuple, dict[str, Any]]:
    """(programs, numbers, constants)."""
    problem, (view,) = problem_of(x, None, False, False, view)
    (samples, *numbers), constants = lies(problem, view)
    del constants["PER_SAMPLE"]
    tile = _tile(problem)
    programs = samples * -(-problem.count // tile["L"])
    return programs, tuple(numbers), constants | tile | {"num_warps": 4}


def _pool_like(x, save):
    size = (x.shape[0], *x.shape[2:])
    index = x.new_empty(size if save else 0, dtype=torch.int32)
    return x.new_empty((x.shape[0], 2, *x.shape[2:]), dtype=torch.float32), index


@op("channel_pool(Tensor x, bool save) -> (Tensor, Tensor)", fake=_pool_like)
def pool(x, save):
    """(N, 2, *) float32, mean and maximum over the channels of x (N, C, *), and the first channel that has the
    maximum, (N, *) int32, empty without `save`. Of NaN the first is the maximum."""
    out, index = _pool_like(x, save)
    if x.numel() == 0:
        return out, index
    x, view = in_place(x)
    programs, numbers, constants = _call(x, view)
    tensors = (x, out, index if save else None)
    launch(channel_pool, programs, x.device, *tensors, *numbers, **constants, STAGES=3)
    return out, index


def beside(x: Tensor) -> bool:
    """Whether a gradient for x is to have the channels of a position side by side."""
    view = view_of(x)
    return view is not None and view.tokens and not x.is_contiguous()


def _unpool_like(d, index, channels, dtype, tokens):
    samples, *size = index.shape
    if tokens:
        return d.new_empty((samples, *size, channels), dtype=dtype).movedim(-1, 1)
    return d.new_empty((samples, channels, *size), dtype=dtype)


@op(
    "channel_unpool(Tensor d, Tensor index, SymInt channels, ScalarType dtype, bool tokens) -> Tensor",
    fake=_unpool_like,
)
def unpool(d, index, channels, dtype, tokens):
    """The gradient of x (N, C, *) from that of what :func:`pool` gave, with `tokens` laid out (N, *, C)."""
    dx = _unpool_like(d, index, channels, dtype, tokens)
    if dx.numel() == 0:
        return dx
    programs, (channels, count, *_), constants = _call(dx, view_of(dx))
    tensors = (contiguous(d), contiguous(index), dx)
    launch(channel_unpool, programs, d.device, *tensors, channels, count, **constants, STAGES=1)
    return dx
