"""Parameters that glide with the time: launchers as operators over `_glide.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._channel_calls import contiguous, row_unit
from ._glide import glide, glide_grads
from ._launch import launch
from ._op import op

_SUMS = {"RB": 32, "CB": 32, "E": 512}


def _values_like(t, parameters):
    width = len(parameters[0])
    return [t.new_empty((t.numel(), width), dtype=torch.float32) for _ in range(len(parameters) // 4)]


@op("glide(Tensor t, Tensor[] parameters) -> Tensor[]", fake=_values_like)
def values(t, parameters):
    """(N, D) float32 for every four parameters (D,), which are at most eight; t: (N,), contiguous."""
    outputs = _values_like(t, parameters)
    width, block = len(parameters[0]), 128
    blocks, unit = -(-width // block), row_unit(width)
    given: list[Tensor | None] = [contiguous(p) for p in parameters]
    missing: list[Tensor | None] = [None] * (8 - len(parameters))
    made = [*outputs, None][:2]
    tensors = (contiguous(t), *given, *missing, *made)
    launch(
        glide, t.numel() * blocks, t.device, *tensors, width // unit, blocks, UNIT=unit, E=block, num_warps=1
    )
    return outputs


def _grads_like(ups, t, parameters, time):
    made = [torch.empty_like(p).contiguous() for p in parameters]
    return [*made, torch.empty_like(t).contiguous() if time else t.new_empty(0)]


@op("glide_grads(Tensor[] ups, Tensor t, Tensor[] parameters, bool time) -> Tensor[]", fake=_grads_like)
def backward(ups, t, parameters, time):
    """Gradients of the parameters, and with `time` of t."""
    *grads, dt = outputs = _grads_like(ups, t, parameters, time)
    width = len(parameters[0])
    unit, programs = row_unit(width), -(-width // _SUMS["CB"])
    missing: list[Tensor | None] = [None] * (8 - len(parameters))
    given = [*(contiguous(p) for p in parameters), *missing]
    upper = [*(contiguous(up) for up in ups), None][:2]
    tensors = (*upper, contiguous(t), *given, *grads, *missing, dt if time else None)
    extra = t.numel() if time else 0
    numbers = (t.numel(), width // unit, programs)
    launch(glide_grads, programs + extra, t.device, *tensors, *numbers, UNIT=unit, **_SUMS)
    return outputs
