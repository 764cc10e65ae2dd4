"""Row norms on the GPU: launchers, operators and autograd over `_rows.py` and `_rows_wide.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._forms import backward_form, forward_form
from ._launch import KernelUnavailable, launch, warn_once
from ._layout import empty_rows, like_rows, order_of, output_stride, row_stride, rows_in, touched_width, unit_of
from ._op import differentiated, needs_grad, op, through_reference
from ._rows import norm_bwd, norm_fwd, sum_parts

STATS = {"layer": 3, "crms": 2, "rms": 1}
"""Float32 statistics kept for each row."""


def _scalar(x: Tensor, *others: Tensor | None) -> bool:
    """Whether rows lie so that 16-bit entries are read one by one."""
    return any(t is not None and row_stride(t) % 2 and t.element_size() == 2 for t in (x, *others))


def _strided(prefix: str, x: Tensor | None) -> tuple[int | None, dict[str, int]]:
    """Row stride of x in units, and the unit as the kernel's constant."""
    if x is None:
        return None, {f"{prefix}_UNIT": 1}
    stride = row_stride(x)
    unit = unit_of(stride, x.element_size())
    return stride // unit, {f"{prefix}_UNIT": unit}


def _contiguous(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.resolve_neg().contiguous()


def _outputs(x, residual, weight, bias, kind, eps, offset, llama, save):
    order = order_of(x)
    return _allocate(rows_in(order, x), order, residual, kind, save)


def _allocate(rows, order, residual, kind, save):
    y = like_rows(rows, order, rows.dtype)
    total = rows.new_empty(0)
    if residual is not None:
        total = like_rows(rows, order, torch.promote_types(rows.dtype, residual.dtype))
    if not save:
        return y, total, rows.new_empty(0, dtype=torch.float32)
    return y, total, empty_rows(rows, order, STATS[kind], STATS[kind], torch.float32)


@op(
    "row_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps, float offset,"
    " bool llama, bool save) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def forward(x, residual, weight, bias, kind, eps, offset, llama, save=True):
    """(y, total, stats) for the rows of x, or of total = x + residual.

    x, residual: (*, d); weight, bias: (d,). y and total are like x; stats are the STATS[kind] float32 numbers
    of each row, (*, k), empty without `save`; total is empty without a residual.
    """
    order = order_of(x)
    rows = rows_in(order, x)
    y, total, stats = _allocate(rows, order, residual, kind, save)
    width = x.shape[-1]
    count = x.numel() // width
    if count == 0:
        return y, total, stats
    residual = None if residual is None else rows_in(order, residual)
    x_step, x_unit = _strided("X", rows)
    res_step, res_unit = _strided("RES", residual)
    form = forward_form(width, x.element_size(), _scalar(rows, residual), x.device)
    constants = {"KIND": kind, "N": width, "EPS": eps, "OFFSET": offset, "ROUND": llama, **x_unit, **res_unit}
    constants |= form.constants | {"Y_STRIDE": output_stride(rows)}
    if form.kernel is norm_fwd:
        constants["WIDTH"] = touched_width(rows, residual)
    pointers = (rows, residual, _contiguous(weight), _contiguous(bias), y)
    pointers += (None if residual is None else total, stats if save else None)
    launch(form.kernel, form.grid(count), x.device, *pointers, count, x_step, res_step, **constants)
    return y, total, stats


def _gradients(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs):
    order = order_of(x)
    dx = like_rows(rows_in(order, x), order, x.dtype) if needs[0] else x.new_empty(0)
    dw = torch.zeros_like(weight) if needs[1] else x.new_empty(0)
    return dx, dw, torch.zeros_like(bias) if needs[2] else x.new_empty(0)


@op(
    "row_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, str kind,"
    " float offset, bool llama, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def backward(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs):
    """(dx, dw, db), empty where not in `needs`.

    x is the input of the norm, that is the sum where there was a residual; dtotal is the gradient that the sum
    has from elsewhere, added to dx.
    """
    width = x.shape[-1]
    count = x.numel() // width
    if count == 0:
        return _gradients(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs)
    order = order_of(x)
    rows = rows_in(order, x)
    dx = like_rows(rows, order, x.dtype) if needs[0] else None
    dy = rows_in(order, dy, broadcast=True)
    dtotal = None if dtotal is None else rows_in(order, dtotal, broadcast=True)
    # A copy only where a hook brought x back in another order than it was saved in.
    stats = stats.permute(*order, x.dim() - 1).contiguous()
    x_step, x_unit = _strided("X", rows)
    dy_step, dy_unit = _strided("DY", dy)
    dtotal_step, dtotal_unit = _strided("DTOTAL", dtotal)
    tensors, gradients = 2 if dtotal is None else 3, sum(needs[1:])
    form = backward_form(kind, width, x.element_size(), _scalar(rows, dy), x.device, tensors, gradients)
    constants = {"KIND": kind, "N": width, "OFFSET": offset, "ROUND": llama, **x_unit, **dy_unit, **dtotal_unit}
    constants |= {"DY_COL": _entry_stride(dy), "DTOTAL_COL": _entry_stride(dtotal)}
    constants |= form.constants | {"DX_STRIDE": output_stride(rows), "DW": needs[1], "DB": needs[2]}
    if form.kernel is norm_bwd:
        constants["X_WIDTH"] = touched_width(rows)
        constants["DY_WIDTH"] = touched_width(dy) if constants["DY_COL"] else width
    grid = form.grid(count)
    parts = x.new_empty((gradients, grid, width), dtype=torch.float32) if gradients else None
    pointers = (dy, dtotal, rows, _contiguous(weight), stats, dx, parts)
    launch(form.kernel, grid, x.device, *pointers, count, dy_step, dtotal_step, x_step, **constants)
    dw = torch.empty_like(weight) if needs[1] else None
    db = torch.empty_like(bias) if needs[2] else None
    if parts is not None:
        columns = 64
        blocks = -(-width // columns)
        launch(sum_parts, blocks, x.device, parts, dw, db, grid, N=width, P=32, C=columns)
    return tuple(x.new_empty(0) if t is None else t for t in (dx, dw, db))


def _entry_stride(x: Tensor | None) -> int:
    """0 where all entries of a row are one, as in the gradient of a sum."""
    return 1 if x is None or x.shape[-1] == 1 else x.stride(-1)


class _Norm(torch.autograd.Function):
    """y, and the sum where there is a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, kind, eps, offset, llama, reference):
        y, total, stats = forward(x, residual, weight, bias, kind, eps, offset, llama, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else total, weight, bias, stats)
        ctx.options = kind, offset, llama
        ctx.reference = reference
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx, dy, dtotal=None):
        x, weight, bias, stats = ctx.saved_tensors
        wants_x, wants_residual, *wants = ctx.needs_input_grad[:4]
        needs = (wants_x or wants_residual, *wants)
        if dy is None:
            dx, dw, db = dtotal, None, None
        elif differentiated(dy):
            dx, dw, db = _by_reference(ctx, x, weight, bias, needs, dy, dtotal)
        else:
            try:
                dx, dw, db = backward(dy, dtotal, x, stats, weight, bias, *ctx.options, list(needs))
            except KernelUnavailable as error:
                _without(error, ctx.reference)
                dx, dw, db = _by_reference(ctx, x, weight, bias, needs, dy, dtotal)
        grads = [dx if wants_x else None, dx if wants_residual else None]
        grads = [g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        grads += [g if need else None for g, need in zip((dw, db), wants, strict=True)]
        return *grads, None, None, None, None, None


def _by_reference(ctx, x, weight, bias, needs, dy, dtotal):
    dx, dw, db = through_reference(ctx.reference, (x, weight, bias), needs, dy.to(x.dtype))
    return dx if dtotal is None else dx + dtotal, dw, db


def _without(error: KernelUnavailable, reference: Any) -> None:
    """What a kernel that does not compile means: an error where the user insisted on it, else a warning."""
    if reference.strict:
        raise error
    warn_once(str(error))


def norm(
    kind: str,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    llama: bool = False,
    reference: Any,
) -> Tensor:
    """The norm `kind` ("layer", "rms", "crms") of x over its trailing `shape`.

    `reference` (x, weight, bias) is the eager body over the last dimension, for double backward and for
    kernels that do not compile; its attribute ``strict`` makes the latter an error.
    """
    x, weight, bias = _flat(len(shape), x, weight, bias)
    y, _ = _run(x, None, weight, bias, (kind, float(eps), float(offset), llama), reference)
    return y if len(shape) == 1 else y.unflatten(-1, shape)


def add_norm(
    kind: str,
    x: Tensor,
    residual: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    llama: bool = False,
    reference: Any,
) -> tuple[Tensor, Tensor]:
    """(norm of total, total) with total = x + residual; the rest as in :func:`norm`."""
    x, residual, weight, bias = _flat(len(shape), x, residual, weight, bias)
    y, total = _run(x, residual, weight, bias, (kind, float(eps), float(offset), llama), reference)
    return (y, total) if len(shape) == 1 else (y.unflatten(-1, shape), total.unflatten(-1, shape))


def _flat(dims: int, *tensors: Any) -> tuple[Any, ...]:
    return tensors if dims == 1 else tuple(None if t is None else t.flatten(-dims) for t in tensors)


def _run(x, residual, weight, bias, options, reference):
    try:
        if needs_grad(x, residual, weight, bias):
            outputs = _Norm.apply(x, residual, weight, bias, *options, reference)
            return (outputs, None) if residual is None else outputs
        return forward(x, residual, weight, bias, *options, False)[:2]
    except KernelUnavailable as error:
        _without(error, reference)
        total = x if residual is None else x + residual
        return reference(total, weight, bias).to(x.dtype), total
