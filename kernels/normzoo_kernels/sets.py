"""Unions of sets and what follows from them: launchers as operators over `_sets.py`. Autograd is in
`normzoo/fused.py`, the arithmetic in `normzoo/sets.py`.

Statistics are float32 and contiguous, (*, C), taken as rows of C columns. `how` says which entries are one:

    "own"          each by itself
    "batch"        those of one column in `size` rows
    "chunks"       likewise, of which the last may have fewer
    "interleaved"  `size` of one column whose rows are as far apart as there are unions of it
    "groups"       `size` neighbours in a row
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._channel_calls import SUMS, contiguous, row_unit
from ._channel_forms import merge_tile
from ._channels_merge import merge_rows
from ._launch import launch, remembered, sm_count
from ._op import op
from ._sets import sets_backward, sets_forward

HOW = ("own", "batch", "chunks", "interleaved", "groups")
_TILE = 1024
_PARTS = 512
"""Most parts of a sum."""


class _Plan(NamedTuple):
    rows: int
    columns: int
    """Of the statistics; of a group, where there are groups. In units."""
    members: int
    outer_rows: int
    member_rows: int
    unions: int
    blocks: int
    groups: int
    programs: int
    period: int
    cycle: int
    shape: tuple[int, int]
    """Of the unions."""
    constants: dict[str, int | bool]

    @property
    def numbers(self) -> tuple[int, ...]:
        return self[:8]


def _plan(t: Tensor, how: str, size: int) -> _Plan:
    columns = t.shape[-1]
    return _plan_of(t.numel() // columns, columns, how, size, t.device)


@remembered
def _plan_of(rows: int, columns: int, how: str, size: int, device: torch.device) -> _Plan:
    if how == "groups":
        groups, tall = columns // size, min(triton.next_power_of_2(size), _TILE)
        wide = max(_TILE // 4 // tall, 1)
        unions = rows * groups
        unit = row_unit(size)
        constants = {
            "GROUPED": True,
            "OWN": False,
            "UNIT": unit,
            "MB": tall,
            "E": wide,
            "num_warps": 4 if tall > 256 else 1,
        }
        numbers = (rows, size // unit, size, 0, 0, unions, 1, groups)
        return _Plan(*numbers, -(-unions // wide), 1, rows, (rows, groups), constants)
    members, outer, outer_rows, member_rows = {
        "own": (1, rows, 1, 0),
        "interleaved": (size, rows // size if size else 0, 1, rows // size if size else 0),
    }.get(how) or (size, -(-rows // size), size, 1)
    wide = 128 if how == "own" else _columns_at_once(columns, sm_count(device))
    blocks = -(-columns // wide)
    unit = row_unit(columns)
    constants = {"GROUPED": False, "OWN": how == "own", "UNIT": unit, "MB": 1, "E": wide, "num_warps": 1}
    if how != "own":
        constants |= {"MB": max(_TILE // wide, 1), "num_warps": 4}
    numbers = (rows, columns // unit, members, outer_rows, member_rows, outer * columns, blocks, 1)
    period = 1 if how in ("own", "interleaved") else size
    return _Plan(*numbers, outer * blocks, period, outer, (outer, columns), constants)


def _columns_at_once(columns: int, sms: int) -> int:
    """Fewer, where that brings a program to every multiprocessor; more, where there were too many parts."""
    wide = 32
    while wide > 8 and -(-columns // wide) < sms:
        wide //= 2
    while -(-columns // wide) * 2 > _PARTS:
        wide *= 2
    return wide


def _forward_like(pivot, delta, m2, count, weights, lost, weight, bias, number, how, size, kind, square, eps):
    plan = _plan(m2, how, size)
    scale = torch.empty_like(m2) if kind != "none" else m2.new_empty(0)
    shift = torch.empty_like(m2) if kind == "standardize" else m2.new_empty(0)
    unions = (m2.new_empty(0 if how == "own" else plan.shape) for _ in range(6))
    return scale, shift, *unions


@op(
    "sets_forward(Tensor pivot, Tensor delta, Tensor m2, Tensor? count, Tensor? weights, Tensor? lost,"
    " Tensor? weight, Tensor? bias, float number, str how, int size, str kind, bool square, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_like,
)
def forward(pivot, delta, m2, count, weights, lost, weight, bias, number, how, size, kind, square, eps):
    """(scale, shift) of the entries, by `kind`, and (n, base, rest, m2, mean, var) of the unions; what is not
    asked for is empty, and the unions where they are the entries.

    Args:
        count: values of each entry, or None for `number` of them.
        weights: one for each of the samples that are united.
        lost: a number, the share of the weights that a union has lost.
        weight, bias: one a column.
        kind: "none", "standardize", "inverse" for 1 / root as the scale, or "root" for the root of var + eps.
        square: whether the root is taken of the mean square instead.
    """
    outputs = _forward_like(
        pivot, delta, m2, count, weights, lost, weight, bias, number, how, size, kind, square, eps
    )
    scale, shift, *unions = outputs
    plan = _plan(m2, how, size)
    tensors = [contiguous(t) for t in (pivot, delta, m2, count, weights, lost, weight, bias)]
    tensors += [t if t.numel() else None for t in (scale, shift, *unions)]
    constants = {"KIND": kind, "SQUARE": square, "EPS": eps, **plan.constants}
    launch(sets_forward, plan.programs, m2.device, *tensors, number, *plan.numbers, **constants)
    return outputs


def _backward_like(dscale, dshift, dn, drest, dunion, dmean, dvar, pivot, delta, m2, count, weights, *rest):
    weight, bias, needs = *rest[1:3], rest[-1]
    sizes = (m2.shape, m2.shape, 0 if weights is None else len(weights) + 1)
    made = [m2.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=False)]
    for p, need in zip((weight, bias), needs[3:], strict=True):
        made.append(m2.new_empty(m2.shape[-1] if need else 0, dtype=None if p is None else p.dtype))
    return tuple(made)


@op(
    "sets_backward(Tensor? dscale, Tensor? dshift, Tensor? dn, Tensor? drest, Tensor? dunion, Tensor? dmean,"
    " Tensor? dvar, Tensor pivot, Tensor delta, Tensor m2, Tensor? count, Tensor? weights, Tensor? lost,"
    " Tensor? weight, Tensor? bias, Tensor n, Tensor base, Tensor rest, Tensor union, float number, str how,"
    " int size, str kind, bool square, float eps, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_like,
)
def backward(
    dscale, dshift, dn, drest, dunion, dmean, dvar, pivot, delta, m2, count, weights, lost, weight, bias,
    n, base, rest, union, number, how, size, kind, square, eps, needs,
):  # fmt: skip
    """Gradients of (delta, m2, weights and lost as one tensor, weight, bias), empty where not in `needs`."""
    outputs = _backward_like(
        dscale, dshift, dn, drest, dunion, dmean, dvar, pivot, delta, m2, count, weights, lost, weight, bias,
        needs,
    )  # fmt: skip
    ddelta, dm2, dweights, dweight, dbias = (t if t.numel() else None for t in outputs)
    plan = _plan(m2, how, size)
    parts = None if dweights is None else m2.new_empty((plan.programs, len(dweights)))
    unions = (count, pivot, delta, m2) if how == "own" else (n, base, rest, union)
    tensors = (
        dscale, dshift, dn, drest, dunion, dmean, dvar, pivot, delta, m2, count, weights, lost, weight, *unions,
        ddelta, dm2, parts, dweight, dbias,
    )  # fmt: skip
    tensors = [contiguous(t) for t in tensors]
    programs = plan.programs
    if dweight is not None or dbias is not None:
        programs += -(-m2.shape[-1] // SUMS["CB"])
    constants = {"KIND": kind, "SQUARE": square, "EPS": eps, **plan.constants, **SUMS}
    numbers = (number, *plan.numbers, plan.programs, plan.period, plan.cycle)
    launch(sets_backward, programs, m2.device, *tensors, *numbers, **constants)
    if parts is not None:
        tile = merge_tile(len(parts))
        grid = -(-len(dweights) // tile["E"])
        launch(merge_rows, grid, m2.device, parts, dweights, len(dweights), len(parts), **tile)
    return outputs
