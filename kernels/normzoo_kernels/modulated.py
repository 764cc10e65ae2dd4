"""Row norms whose scale and shift come with the input: launchers, operators and autograd over `_modulated.py`.

x is (B, *, d); scale and shift are (B, d), of the samples, or shaped like x, of the tokens, each by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import rows as row_norms
from ._launch import KernelUnavailable, launch
from ._layout import empty_rows, like_rows, order_of, output_stride, rows_in, touched_width
from ._modulated import modulated_bwd, modulated_fwd, sum_runs
from ._modulated_forms import WIDEST, backward_runs, forward_runs
from ._op import differentiated, needs_grad, op, through_reference
from .rows import _entry_stride, _scalar, _strided, _without

STATS = {"layer": 3, "root": 2, "rms": 1}
"""Float32 statistics kept for each row."""


def _of_samples(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether one of them belongs to the samples of x."""
    return any(p is not None and p.dim() < x.dim() for p in parameters)


def _order(x: Tensor, *parameters: Tensor | None) -> list[int]:
    """The leading dimensions of x as its rows are taken; samples come first where something belongs to them."""
    order = order_of(x)
    return [0, *(i for i in order if i)] if _of_samples(x, *parameters) else order


def _samples(x: Tensor, *parameters: Tensor | None) -> tuple[int, int]:
    """(samples, tokens of each), all rows as one sample where nothing belongs to the samples."""
    count = x.numel() // x.shape[-1]
    samples = x.shape[0] if _of_samples(x, *parameters) else 1
    return samples, count // samples


def _beside(x: Tensor, order: list[int], p: Tensor | None) -> Tensor | None:
    """A parameter as the kernels take it: its rows as those of x, or one a sample."""
    return p if p is None else rows_in(order if p.dim() == x.dim() else [0], p)


def _of_tokens(x: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    return [p for p in parameters if p is not None and p.dim() == x.dim()]


def _outputs(x, scale, shift, kind, eps, offset, part, save):
    order = _order(x, scale, shift)
    return _allocate(rows_in(order, x), order, kind, save)


def _allocate(rows, order, kind, save):
    y = like_rows(rows, order, rows.dtype)
    if not save:
        return y, rows.new_empty(0, dtype=torch.float32)
    return y, empty_rows(rows, order, STATS[kind], STATS[kind], torch.float32)


@op(
    "modulated_norm_fwd(Tensor x, Tensor scale, Tensor? shift, str kind, float eps, float offset, int part,"
    " bool save) -> (Tensor, Tensor)",
    fake=_outputs,
)
def forward(x, scale, shift, kind, eps, offset, part, save):
    """(y, stats): y like x; stats (B, *, k), float32, k = STATS[kind], empty without `save`."""
    order = _order(x, scale, shift)
    rows = rows_in(order, x)
    y, stats = _allocate(rows, order, kind, save)
    if not x.numel():
        return y, stats
    width = x.shape[-1]
    samples, tokens = _samples(x, scale, shift)
    scale, shift = _beside(x, order, scale), _beside(x, order, shift)
    x_step, x_unit = _strided("X", rows)
    scale_step, scale_unit = _strided("SCALE", scale)
    shift_step, shift_unit = _strided("SHIFT", shift)
    alike = _of_tokens(x, scale, shift)
    runs = forward_runs(width, x.element_size(), _scalar(rows, *alike), samples, tokens, x.device)
    constants = {"KIND": kind, "N": width, "PART": part, "EPS": eps, "OFFSET": offset}
    constants |= x_unit | scale_unit | shift_unit | runs.constants
    constants |= {"SCALE_ROWS": scale.dim() == x.dim(), "SHIFT_ROWS": bool(_of_tokens(x, shift))}
    constants |= {"Y_STRIDE": output_stride(rows), "WIDTH": touched_width(rows, *alike)}
    pointers = (rows, scale, shift, y, stats if save else None)
    steps = (x_step, scale_step, shift_step)
    launch(modulated_fwd, runs.grid, x.device, *pointers, tokens, runs.each, *steps, **constants)
    return y, stats


def _gradients(dy, x, stats, scale, shift, kind, offset, part, needs):
    order = _order(x, scale, shift)
    found = _empty_gradients(rows_in(order, x), order, scale, shift, needs)
    return tuple(x.new_empty(0) if g is None else g.zero_() for g in found)


def _empty_gradients(rows, order, scale, shift, needs):
    """dx, dscale, dshift where in `needs`, None elsewhere; of samples they are contiguous."""
    dx = like_rows(rows, order, rows.dtype) if needs[0] else None
    dscale = dshift = None
    if needs[1]:
        of_tokens = scale.dim() == rows.dim()
        dscale = like_rows(rows, order, scale.dtype) if of_tokens else scale.new_empty(scale.shape)
    if needs[2]:
        dshift = shift.new_empty(shift.shape)
    return dx, dscale, dshift


@op(
    "modulated_norm_bwd(Tensor dy, Tensor x, Tensor stats, Tensor scale, Tensor? shift, str kind, float offset,"
    " int part, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def backward(dy, x, stats, scale, shift, kind, offset, part, needs):
    """(dx, dscale, dshift), empty where not in `needs`. shift: one of the samples; that of tokens has dy."""
    if not x.numel():
        return _gradients(dy, x, stats, scale, shift, kind, offset, part, needs)
    order = _order(x, scale, shift)
    rows, dy = rows_in(order, x), rows_in(order, dy, broadcast=True)
    width = x.shape[-1]
    samples, tokens = _samples(x, scale, shift)
    dx, dscale, dshift = _empty_gradients(rows, order, scale, shift, needs)
    scale = _beside(x, order, scale)
    # A copy only where a hook brought x back in another order than it was saved in.
    stats = stats.permute(*order, x.dim() - 1).contiguous()
    x_step, x_unit = _strided("X", rows)
    dy_step, dy_unit = _strided("DY", dy)
    scale_step, scale_unit = _strided("SCALE", scale)
    alike = _of_tokens(x, scale)
    scalar = _scalar(rows, dy, *alike)
    runs = backward_runs(kind, width, x.element_size(), scalar, samples, tokens, x.device, 2 + len(alike))
    constants = {"KIND": kind, "N": width, "PART": part, "OFFSET": offset, "DY_COL": _entry_stride(dy)}
    constants |= x_unit | dy_unit | scale_unit | runs.constants
    constants |= {"SCALE_ROWS": bool(alike), "DX_STRIDE": output_stride(rows)}
    constants["WIDTH"] = touched_width(rows, *alike)
    constants["DY_WIDTH"] = touched_width(dy) if constants["DY_COL"] else width
    summed = [None if alike else dscale, dshift]
    shares = summed
    if runs.each > 1:
        shape = (samples, runs.each, width)
        shares = [None if g is None else x.new_empty(shape, dtype=torch.float32) for g in summed]
    pointers = (dy, rows, scale, stats, dx, dscale if alike else shares[0], shares[1])
    steps = (dy_step, x_step, scale_step)
    launch(modulated_bwd, runs.grid, x.device, *pointers, tokens, runs.each, *steps, **constants)
    if runs.each > 1 and any(g is not None for g in summed):
        columns, at_once = 64, min(32, triton.next_power_of_2(runs.each))
        grid = samples * -(-width // columns)
        launch(sum_runs, grid, x.device, *shares, *summed, runs.each, N=width, P=at_once, C=columns)
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dscale, dshift))


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, kind, eps, offset, part, reference):
        y, stats = forward(x, scale, shift, kind, eps, offset, part, True)
        ctx.set_materialize_grads(False)
        ctx.shift = None if shift is None else shift.dtype
        # As large as x, and not needed: nothing but its own gradient depends on a shift.
        ctx.save_for_backward(x, scale, shift if _of_samples(x, shift) else None, stats)
        ctx.options = kind, offset, part
        ctx.reference = reference
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 8
        x, scale, shift, stats = ctx.saved_tensors
        wants_x, wants_scale, wants_shift = ctx.needs_input_grad[:3]
        dx = dscale = dshift = None
        needs = [wants_x, wants_scale, wants_shift and shift is not None]
        if differentiated(dy):
            dx, dscale, dshift = _by_reference(ctx, x, scale, shift, needs, dy)
        elif any(needs):
            try:
                found = backward(dy, x, stats, scale, shift, *ctx.options, needs)
                dx, dscale, dshift = (g if need else None for g, need in zip(found, needs, strict=True))
            except KernelUnavailable as error:
                _without(error, ctx.reference)
                dx, dscale, dshift = _by_reference(ctx, x, scale, shift, needs, dy)
        if wants_shift and shift is None:
            dshift = dy.to(ctx.shift)
        return dx, dscale, dshift, None, None, None, None, None


def _by_reference(ctx, x, scale, shift, needs, dy):
    if not any(needs):
        return None, None, None
    return through_reference(ctx.reference, (x, scale, shift), needs, dy.to(x.dtype))


class _Unmodulated:
    """The norm alone, out of a reference of (x, scale, shift); called as one of (x, weight, bias)."""

    def __init__(self, reference: Any, offset: float) -> None:
        self.reference, self.offset = reference, offset
        self.strict = reference.strict

    def __call__(self, x: Tensor, weight: None, bias: None) -> Tensor:
        scale = x.new_full((), 1 - self.offset).expand(x.shape[0], x.shape[-1])
        return self.reference(x, scale, None)


def _wide(kind, x, scale, shift, eps, offset, reference):
    """Rows that no program holds: the norm by its own kernels, in float32, then what is left by torch."""
    wide, dtype = x.float(), x.dtype
    h = row_norms.norm(kind, wide, x.shape[-1:], None, None, eps=eps, reference=_Unmodulated(reference, offset))
    between = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    scale, shift = (p if p is None or p.dim() == x.dim() else p.reshape(between) for p in (scale, shift))
    scale = scale.float() + offset
    return (h * scale if shift is None else torch.addcmul(shift.float(), h, scale)).to(dtype)


def norm(
    kind: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    eps: float,
    offset: float,
    part: int,
    reference: Any,
) -> Tensor:
    """(offset + scale) * norm(x) + shift over the last dimension of x.

    Args:
        kind: "layer", "rms", or "root": x / (rms + eps).
        part: of how many entries, the first, the mean square is taken; all of them for "layer".
        reference: (x, scale, shift) -> y in eager PyTorch, for double backward and for kernels that do not
            compile; its attribute ``strict`` makes the latter an error.
    """
    width = x.shape[-1]
    if width > WIDEST:
        if kind == "root" or part < width:
            return reference(x, scale, shift)
        return _wide(kind, x, scale, shift, float(eps), offset, reference)
    options = (kind, float(eps), float(offset), part)
    try:
        if needs_grad(x, scale, shift):
            return _Modulated.apply(x, scale, shift, *options, reference)
        return forward(x, scale, shift, *options, False)[0]
    except KernelUnavailable as error:
        _without(error, reference)
        return reference(x, scale, shift)
