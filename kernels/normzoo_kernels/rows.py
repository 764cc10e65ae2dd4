from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._forms import backward_form, forward_form
from ._launch import KernelUnavailable, launch, remembered, warn_once
from ._layout import (
    Output,
    Rows,
    leading,
    output_step,
    rows_in,
    rows_like,
    rows_of,
    touched_width,
    unit_of,
)
from ._op import differentiated, needs_grad, op, through_reference
from ._rows import norm_bwd, norm_fwd, sum_parts

STATS = {"layer": 3, "crms": 2, "rms": 1}
"""Float32 statistics kept for each row."""

Lie = tuple[tuple[int, ...], torch.dtype]
"""Strides and dtype of a tensor."""


def _lie(x: Tensor | None) -> Lie | None:
    return None if x is None else (x.stride(), x.dtype)


def _scalar(x: Tensor, *others: Tensor | None) -> bool:
    """Whether rows lie so that 16-bit entries are read one by one."""
    return any(t is not None and _taken(t).single for t in (x, *others))


def _strided(prefix: str, x: Tensor | None) -> tuple[int | None, dict[str, int]]:
    """Row stride of x in units, and the unit as the kernel's constant."""
    return _in_units(prefix, None if x is None else _taken(x))


def _entry_stride(x: Tensor | None) -> int:
    """0 where all entries of a row are one, as in the gradient of a sum."""
    return 1 if x is None else _taken(x).column


def _taken(x: Tensor) -> Rows:
    """Of what `rows_in` gives."""
    return rows_of(range(x.dim() - 1), x.shape, x.stride(), x.dtype, broadcast=True)


def _in_units(prefix: str, rows: Rows | None) -> tuple[int | None, dict[str, int]]:
    if rows is None:
        return None, {f"{prefix}_UNIT": 1}
    unit = unit_of(rows.step, rows.itemsize)
    return rows.step // unit, {f"{prefix}_UNIT": unit}


def _contiguous(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.resolve_neg().contiguous()


class _Laid(NamedTuple):
    """How tensors of one shape are taken, the first of which decides."""

    shape: Sequence[int]
    order: tuple[int, ...]
    """Of the leading dimensions."""
    direct: bool
    """Whether the kernel takes them as they are, neither copied nor padded."""
    step: int
    """Row stride of an output like the first."""
    rows: list[Rows | None]

    def like(self, dtype: torch.dtype) -> Output:
        return rows_like(self.order, self.shape[:-1], self.shape[-1], self.step, dtype)

    def stats(self, kind: str) -> Output:
        return rows_like(self.order, self.shape[:-1], STATS[kind], STATS[kind], torch.float32)


class _Plan(NamedTuple):
    """All of a call but its addresses. It costs more host time than a launch, and most calls are alike."""

    laid: _Laid
    outputs: tuple[Output | None, ...]
    """As many as there can be; None where one is not wanted."""
    kernel: Any
    """None where there are no rows."""
    grid: int
    numbers: tuple
    constants: dict[str, Any]


def _laid(shape: Sequence[int], x: Lie, *others: Lie | None, broadcast: bool = False) -> _Laid:
    order, width = tuple(leading(shape, x[0])), shape[-1]
    rows = [rows_of(order, shape, *x)]
    rows += [lie and rows_of(order, shape, *lie, broadcast=broadcast) for lie in others]
    dense = (output_step(width, own.step, own.itemsize) == width for own in rows if own)
    direct = all(dense) and not any(own.copied for own in rows if own)
    return _Laid(shape, order, direct, output_step(width, rows[0].step, rows[0].itemsize), rows)


def _forward_outputs(laid: _Laid, x: Lie, residual: Lie | None, kind: str, save: bool):
    """y, total, stats."""
    total = None if residual is None else laid.like(torch.promote_types(x[1], residual[1]))
    return laid.like(x[1]), total, laid.stats(kind) if save else None


@remembered
def _forward_plan(shape, x, residual, kind, eps, offset, llama, save, device) -> _Plan:
    laid = _laid(shape, x, residual)
    outputs = _forward_outputs(laid, x, residual, kind, save)
    width, count = shape[-1], math.prod(shape[:-1])
    if count == 0:
        return _Plan(laid, outputs, None, 0, (), {})
    (x_step, x_unit), (res_step, res_unit) = map(_in_units, ("X", "RES"), laid.rows)
    single = any(own.single for own in laid.rows if own)
    form = forward_form(width, x[1].itemsize, single, device)
    constants = {"KIND": kind, "N": width, "EPS": eps, "OFFSET": offset, "ROUND": llama, **x_unit, **res_unit}
    constants |= form.constants | {"Y_STRIDE": laid.step}
    if form.kernel is norm_fwd:
        constants["WIDTH"] = width
    numbers = (count, x_step, res_step)
    return _Plan(laid, outputs, form.kernel, form.grid(count), numbers, constants)


def _outputs(x, residual, weight, bias, kind, eps, offset, llama, save):
    lies = _lie(x), _lie(residual)
    outputs = _forward_outputs(_laid(x.shape, *lies), *lies, kind, save)
    return [output and output.empty(x.device) for output in outputs]


@op(
    "row_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, float eps, float offset,"
    " bool llama, bool save) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def forward(x, residual, weight, bias, kind, eps, offset, llama, save=True):
    """(y, total, stats) for the rows of x, or of total = x + residual.

    x, residual: (*, d); weight, bias: (d,). y and total are like x; stats are the STATS[kind] float32 numbers
    of each row, (*, k), None without `save`; total is None without a residual.
    """
    x, residual, device = _resolved(x), _resolved(residual), x.device
    plan = _forward_plan(x.shape, _lie(x), _lie(residual), kind, eps, offset, llama, save, device)
    outputs = [output and output.empty(device) for output in plan.outputs]
    if plan.kernel is None:
        return outputs
    constants = plan.constants
    if not plan.laid.direct:
        x, residual = (None if t is None else rows_in(plan.laid.order, t) for t in (x, residual))
        if "WIDTH" in constants:
            constants = {**constants, "WIDTH": touched_width(x, residual)}
    pointers = (x, residual, _contiguous(weight), _contiguous(bias), *outputs)
    launch(plan.kernel, plan.grid, device, *pointers, *plan.numbers, **constants)
    return outputs


@remembered
def _backward_plan(shape, x, dy, dtotal, kind, offset, llama, needs, device) -> _Plan:
    """The outputs are dx, the parts of the gradients of parameters, and the statistics as they should lie."""
    laid, gradients = _laid(shape, x, dy, dtotal, broadcast=True), sum(needs[1:])
    width, count = shape[-1], math.prod(shape[:-1])
    dx, stats = laid.like(x[1]) if needs[0] else None, laid.stats(kind)
    if count == 0:
        return _Plan(laid, (dx, None, stats), None, 0, (), {})
    _, of_dy, of_dtotal = laid.rows
    steps, units = zip(*map(_in_units, ("DY", "DTOTAL", "X"), (of_dy, of_dtotal, laid.rows[0])), strict=True)
    single, tensors = laid.rows[0].single or of_dy.single, 2 if dtotal is None else 3
    form = backward_form(kind, width, x[1].itemsize, single, device, tensors, gradients)
    constants = {"KIND": kind, "N": width, "OFFSET": offset, "ROUND": llama, **units[0], **units[1], **units[2]}
    constants |= {"DY_COL": of_dy.column, "DTOTAL_COL": of_dtotal.column if of_dtotal else 1}
    constants |= form.constants | {"DX_STRIDE": laid.step, "DW": needs[1], "DB": needs[2]}
    if form.kernel is norm_bwd:
        constants |= {"X_WIDTH": width, "DY_WIDTH": width}
    grid, parts = form.grid(count), None
    if gradients:
        parts = Output((gradients, grid, width), (grid * width, width, 1), torch.float32, None)
    return _Plan(laid, (dx, parts, stats), form.kernel, grid, (count, *steps), constants)


def _gradients(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs):
    dx = _laid(x.shape, _lie(x)).like(x.dtype).empty(x.device) if needs[0] else None
    return dx, *(
        torch.zeros_like(p) if need else None for p, need in zip((weight, bias), needs[1:], strict=True)
    )


@op(
    "row_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, str kind,"
    " float offset, bool llama, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_gradients,
)
def backward(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs):
    """(dx, dw, db), None where not in `needs`.

    x is the input of the norm, that is the sum where there was a residual; dtotal is the gradient that the sum
    has from elsewhere, added to dx.
    """
    dy, dtotal, x, device = _resolved(dy), _resolved(dtotal), _resolved(x), x.device
    lies = _lie(x), _lie(dy), _lie(dtotal)
    plan = _backward_plan(x.shape, *lies, kind, offset, llama, tuple(needs), device)
    if plan.kernel is None:
        return _gradients(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs)
    *outputs, saved = plan.outputs
    dx, parts = (output and output.empty(device) for output in outputs)
    if stats.stride() != saved.strides:
        # A copy only where a hook brought x back in another order than it was saved in.
        stats = stats.permute(*plan.laid.order, x.dim() - 1).contiguous()
    constants = plan.constants
    if not plan.laid.direct:
        x, dy, dtotal = (
            None if t is None else rows_in(plan.laid.order, t, broadcast=t is not x) for t in (x, dy, dtotal)
        )
        if "X_WIDTH" in constants:
            dy_width = touched_width(dy) if constants["DY_COL"] else constants["N"]
            constants = {**constants, "X_WIDTH": touched_width(x), "DY_WIDTH": dy_width}
    pointers = (dy, dtotal, x, _contiguous(weight), stats, dx, parts)
    launch(plan.kernel, plan.grid, device, *pointers, *plan.numbers, **constants)
    dw = torch.empty_like(weight) if needs[1] else None
    db = torch.empty_like(bias) if needs[2] else None
    if parts is not None:
        width, columns = constants["N"], 64
        launch(sum_parts, -(-width // columns), device, parts, dw, db, plan.grid, N=width, P=32, C=columns)
    return dx, dw, db


def _resolved(x: Tensor | None) -> Tensor | None:
    """Without the bit that says that what lies in memory is negated."""
    return None if x is None else x.resolve_neg()


class _Norm(torch.autograd.Function):
    """y, and the sum where there is a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, options, reference):
        y, total, stats = forward(x, residual, weight, bias, *options, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else total, weight, bias, stats)
        ctx.options, ctx.reference = options, reference
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx, dy, dtotal=None):
        x, weight, bias, stats = ctx.saved_tensors
        wants_x, wants_residual, *wants = ctx.needs_input_grad[:4]
        needs = (wants_x or wants_residual, *wants)
        kind, _, offset, llama = ctx.options
        if dy is None:
            dx, dw, db = dtotal, None, None
        elif differentiated(dy):
            dx, dw, db = _by_reference(ctx, x, weight, bias, needs, dy, dtotal)
        else:
            try:
                dx, dw, db = backward(dy, dtotal, x, stats, weight, bias, kind, offset, llama, needs)
            except KernelUnavailable as error:
                _without(error, ctx.reference)
                dx, dw, db = _by_reference(ctx, x, weight, bias, needs, dy, dtotal)
        of_x, of_residual = ctx.dtypes
        return (
            _in_dtype(dx, of_x) if wants_x else None,
            _in_dtype(dx, of_residual) if wants_residual else None,
            dw if wants[0] else None,
            db if wants[1] else None,
            None,
            None,
        )


def _in_dtype(g: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return g if g is None or g.dtype == dtype else g.to(dtype)


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
            outputs = _Norm.apply(x, residual, weight, bias, options, reference)
            return (outputs, None) if residual is None else outputs
        return forward(x, residual, weight, bias, *options, False)[:2]
    except KernelUnavailable as error:
        _without(error, reference)
        total = x if residual is None else x + residual
        return reference(total, weight, bias).to(x.dtype), total
