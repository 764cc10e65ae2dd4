"""Standardization of weights on the GPU: launchers, operators and autograd over `_weights.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ._forms import _ON_CHIP, _stages, _tile
from ._launch import KernelUnavailable, launch, sm_count
from ._layout import VECTOR
from ._op import differentiated, needs_grad, op, through_reference
from ._weights import standardize_bwd, standardize_fwd
from .rows import _contiguous, _without


def _form(rows: Tensor, tensors: int) -> tuple[int, dict[str, Any]]:
    """(programs at most, constants) for a kernel that reads `tensors` as large as `rows`."""
    width, itemsize, device = rows.shape[1], rows.element_size(), rows.device
    block, sms = triton.next_power_of_2(width), sm_count(device)
    if block > _ON_CHIP:
        chunk = 16384 // itemsize
        if width * itemsize % VECTOR:
            chunk //= 4  # entry by entry, more of them spill
        stages = _stages(device, chunk * itemsize, tensors * chunk * itemsize)
        return 2 * sms, {"K": 1, "R": 1, "C": chunk, "STAGES": stages, "num_warps": 8}
    warps = max(4, block // 1024)
    tile = _tile(block, itemsize, 2048, warps, owned=1024)
    return sms * max(1, 32 // warps), tile | {"STAGES": 1, "num_warps": warps}


def _outputs(rows, gain, correction, outside, eps, factor, save):
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return y, rows.new_empty((rows.shape[0], 4) if save else 0, dtype=torch.float32)


@op(
    "weight_standardize_fwd(Tensor rows, Tensor? gain, int correction, bool outside, float eps, float factor,"
    " bool save) -> (Tensor, Tensor)",
    fake=_outputs,
)
def forward(rows, gain, correction, outside, eps, factor, save):
    """(y, stats) for rows (out, n) and gain (out,); stats is empty without `save`."""
    y, stats = _outputs(rows, gain, correction, outside, eps, factor, save)
    if rows.numel() == 0:
        return y, stats
    programs, form = _form(rows, 1)
    how = {"N": rows.shape[1], "CORRECTION": correction, "OUTSIDE": outside, "EPS": eps, "FACTOR": factor}
    tensors = (_contiguous(rows), _contiguous(gain), y, stats if save else None)
    grid = min(triton.cdiv(len(rows), form["R"]), programs)
    launch(standardize_fwd, grid, rows.device, *tensors, len(rows), **how, **form)
    return y, stats


def _gradients(dy, rows, stats, gain, factor, needs):
    dw = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs[0] else rows.new_empty(0)
    return dw, torch.empty_like(gain) if needs[1] else rows.new_empty(0)


@op(
    "weight_standardize_bwd(Tensor dy, Tensor rows, Tensor stats, Tensor? gain, float factor, bool[] needs)"
    " -> (Tensor, Tensor)",
    fake=_gradients,
)
def backward(dy, rows, stats, gain, factor, needs):
    """(gradient of rows, of gain), empty where not in `needs`."""
    dw, dgain = _gradients(dy, rows, stats, gain, factor, needs)
    if rows.numel() == 0:
        return dw, dgain.zero_()
    programs, form = _form(rows, 2)
    tensors = tuple(map(_contiguous, (dy, rows, stats, gain)))
    tensors += (dw if needs[0] else None, dgain if needs[1] else None)
    grid = min(triton.cdiv(len(rows), form["R"]), programs)
    how = {"N": rows.shape[1], "FACTOR": factor, **form}
    launch(standardize_bwd, grid, rows.device, *tensors, len(rows), **how)
    return dw, dgain


class _Standardized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gain, correction, outside, eps, factor, reference):
        y, stats = forward(rows, gain, correction, outside, eps, factor, True)
        ctx.save_for_backward(rows, gain, stats)
        ctx.factor, ctx.reference = factor, reference
        return y

    @staticmethod
    def backward(ctx, dy):
        rows, gain, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if differentiated(dy):
            grads = through_reference(ctx.reference, (rows, gain), needs, dy)
        else:
            try:
                grads = backward(dy, rows, stats, gain, ctx.factor, list(needs))
            except KernelUnavailable as error:
                _without(error, ctx.reference)
                grads = through_reference(ctx.reference, (rows, gain), needs, dy)
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return *grads, None, None, None, None, None


def standardize(
    rows: Tensor,
    gain: Tensor | None,
    *,
    correction: int,
    outside: bool,
    eps: float,
    factor: float,
    reference: Any,
) -> Tensor:
    """factor * gain * (row - mean) / d for rows (out, n) and gain (out,), contiguous.

    d is sqrt(var) + eps if `outside`, else sqrt(var + eps), with var the sum of squares around the mean divided
    by n - correction. `reference` (rows, gain) is the eager body, for double backward and for kernels that do
    not compile; its attribute ``strict`` makes the latter an error.
    """
    options = int(correction), bool(outside), float(eps), float(factor)
    try:
        if needs_grad(rows, gain):
            return _Standardized.apply(rows, gain, *options, reference)
        return forward(rows, gain, *options, False)[0]
    except KernelUnavailable as error:
        _without(error, reference)
        return reference(rows, gain)
