"""Arithmetic of norms by stored statistics, and of a group norm behind another norm. Entries are rows of C
channels, float32."""

from __future__ import annotations

import triton
import triton.language as tl

from ._sets import optional


@triton.jit
def _columns(blocks, C, E: tl.constexpr):
    """(row, channels, whether they are there) of a program."""
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.cast(tl.program_id(0) % blocks, tl.int64) * E + tl.arange(0, E)
    return row, c, c < C


@triton.jit(do_not_specialize=["C", "blocks", "share", "rest", "n"])
def mixed_scaling(
    pivot_ptr, delta_ptr, m2_ptr, mean_ptr, var_ptr, w_ptr, b_ptr,
    scale_ptr, shift_ptr, r_ptr, gap_ptr, own_mean_ptr, own_var_ptr, C, blocks, share, rest, n,
    EPS: tl.constexpr, UNIT: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """scale = w r and shift = b - gap scale, by `share` of a stored mean and variance (C,) and `rest` of those
    of the entry, whose variance is m2 / n. Without mean_ptr by the latter alone, without m2_ptr by these."""
    C *= UNIT
    row, c, there = _columns(blocks, C, E)
    at = row * C + c
    pivot = tl.load(pivot_ptr + at, mask=there, other=0.0)
    if m2_ptr is not None:
        gap = tl.load(delta_ptr + at, mask=there, other=0.0)
        var = tl.load(m2_ptr + at, mask=there, other=0.0) / n
        tl.store(own_mean_ptr + at, pivot + gap, mask=there)
        tl.store(own_var_ptr + at, var, mask=there)
        if mean_ptr is not None:
            gap = share * (optional(mean_ptr, c, there, 0.0) - pivot) + rest * gap
            var = share * optional(var_ptr, c, there, 0.0) + rest * var
    else:
        gap = optional(mean_ptr, c, there, 0.0) - pivot
        var = optional(var_ptr, c, there, 0.0)
    r = tl.rsqrt(var + EPS)
    scale = r * optional(w_ptr, c, there, 1.0)
    tl.store(r_ptr + at, r, mask=there)
    tl.store(gap_ptr + at, gap, mask=there)
    tl.store(scale_ptr + at, scale, mask=there)
    tl.store(shift_ptr + at, optional(b_ptr, c, there, 0.0) - gap * scale, mask=there)


@triton.jit(do_not_specialize=["rows", "C"])
def scaling_grads(
    dscale_ptr, dshift_ptr, r_ptr, gap_ptr, dw_ptr, db_ptr, rows, C,
    UNIT: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Of w and b, from all rows."""
    C *= UNIT
    c = tl.cast(tl.program_id(0), tl.int64) * CB + tl.arange(0, CB)[None, :]
    dw = tl.zeros([1, CB], tl.float32)
    db = tl.zeros([1, CB], tl.float32)
    for start in tl.range(0, rows, RB):
        row = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
        at = row * C + c
        inside = (row < rows) & (c < C)
        dshift = optional(dshift_ptr, at, inside, 0.0)
        pulled = optional(dscale_ptr, at, inside, 0.0) - optional(gap_ptr, at, inside, 0.0) * dshift
        dw += tl.sum(tl.where(inside, pulled * optional(r_ptr, at, inside, 0.0), 0.0), axis=0)[None, :]
        db += tl.sum(tl.where(inside, dshift, 0.0), axis=0)[None, :]
    if dw_ptr is not None:
        tl.store(dw_ptr + c, dw.to(dw_ptr.dtype.element_ty), mask=c < C)
    if db_ptr is not None:
        tl.store(db_ptr + c, db.to(db_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["C", "rate", "rest"])
def moved_statistics(
    mean_ptr, var_ptr, old_mean_ptr, old_var_ptr, new_mean_ptr, new_var_ptr, C, rate, rest,
    EARLY: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Stored statistics moved by `rate` towards a batch, whose variance counts from the stored mean, EARLY from
    that before it moves."""
    c = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    there = c < C
    mean = tl.load(mean_ptr + c, mask=there, other=0.0)
    old = optional(old_mean_ptr, c, there, 0.0)
    new = old * rest + rate * mean
    around = mean - (old if EARLY else new)
    var = tl.load(var_ptr + c, mask=there, other=0.0) + around * around
    moved = optional(old_var_ptr, c, there, 0.0) * rest + rate * var
    tl.store(new_mean_ptr + c, new.to(new_mean_ptr.dtype.element_ty), mask=there)
    tl.store(new_var_ptr + c, moved.to(new_var_ptr.dtype.element_ty), mask=there)


@triton.jit
def _groups(sets, GB: tl.constexpr):
    """(group of a sample, whether it is there) of a program, one a row."""
    s = tl.cast(tl.program_id(0), tl.int64) * GB + tl.arange(0, GB)[:, None]
    return s, s < sets


@triton.jit
def _members(start, s, there, size, groups, each, L: tl.constexpr):
    """(offset, whether it is there, place of the parameter) of a tile; `each`: channels to a parameter."""
    m = tl.cast(start, tl.int64) + tl.arange(0, L)[None, :]
    inside = (m < size) & there
    return s * size + m, inside, ((s % groups) * size + m) // each


@triton.jit(do_not_specialize=["sets", "size", "groups", "number"])
def second_stage(
    delta_ptr, m2_ptr, scale_ptr, shift_ptr, w_ptr, b_ptr, new_scale_ptr, new_shift_ptr, r_ptr, rest_ptr,
    sets, size, groups, each, number, EPS: tl.constexpr, UNIT: tl.constexpr, GB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Scale and shift of a norm, and of group norm behind it, as one map: z = delta scale + shift are the means
    of its output, of `number` values each. r and the mean of a group are kept, (sets,) each."""
    size *= UNIT
    s, there = _groups(sets, GB)
    total = tl.zeros([GB, L], tl.float32)
    for start in tl.range(0, size, L):
        at, inside, p = _members(start, s, there, size, groups, each, L)
        z = optional(delta_ptr, at, inside, 0.0) * optional(scale_ptr, at, inside, 0.0)
        total += tl.where(inside, z + optional(shift_ptr, at, inside, 0.0), 0.0)
    rest = tl.sum(total, axis=1)[:, None] / size
    total = tl.zeros([GB, L], tl.float32)
    for start in tl.range(0, size, L):
        at, inside, p = _members(start, s, there, size, groups, each, L)
        scale = optional(scale_ptr, at, inside, 0.0)
        away = optional(delta_ptr, at, inside, 0.0) * scale + optional(shift_ptr, at, inside, 0.0) - rest
        square = optional(m2_ptr, at, inside, 0.0) * (scale * scale)
        total += tl.where(inside, square + number * (away * away), 0.0)
    r = tl.rsqrt(tl.sum(total, axis=1)[:, None] / (number * size) + EPS)
    tl.store(r_ptr + s, r, mask=there)
    tl.store(rest_ptr + s, rest, mask=there)
    for start in tl.range(0, size, L):
        at, inside, p = _members(start, s, there, size, groups, each, L)
        second = r * optional(w_ptr, p, inside, 1.0)
        away = optional(shift_ptr, at, inside, 0.0) - rest
        tl.store(new_scale_ptr + at, optional(scale_ptr, at, inside, 0.0) * second, mask=inside)
        tl.store(new_shift_ptr + at, away * second + optional(b_ptr, p, inside, 0.0), mask=inside)


@triton.jit
def _stage_grads(
    dscale_ptr, dshift_ptr, delta_ptr, m2_ptr, scale_ptr, shift_ptr, w_ptr, r_ptr, rest_ptr,
    ddelta_ptr, dm2_ptr, dold_scale_ptr, dold_shift_ptr, sets, size, groups, each, number,
    GB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    s, there = _groups(sets, GB)
    r = tl.load(r_ptr + s, mask=there, other=0.0)
    rest = tl.load(rest_ptr + s, mask=there, other=0.0)
    of_r = tl.zeros([GB, L], tl.float32)
    of_rest = tl.zeros([GB, L], tl.float32)
    for start in tl.range(0, size, L):
        at, inside, p = _members(start, s, there, size, groups, each, L)
        w = optional(w_ptr, p, inside, 1.0)
        dshift = optional(dshift_ptr, at, inside, 0.0)
        pulled = optional(dscale_ptr, at, inside, 0.0) * optional(scale_ptr, at, inside, 0.0)
        pulled += dshift * (optional(shift_ptr, at, inside, 0.0) - rest)
        of_r += tl.where(inside, w * pulled, 0.0)
        of_rest += tl.where(inside, w * dshift, 0.0)
    mean = -r * tl.sum(of_rest, axis=1)[:, None] / size
    square = -0.5 * r * r * r * tl.sum(of_r, axis=1)[:, None] / (number * size)
    for start in tl.range(0, size, L):
        at, inside, p = _members(start, s, there, size, groups, each, L)
        second = r * optional(w_ptr, p, inside, 1.0)
        delta = optional(delta_ptr, at, inside, 0.0)
        scale = optional(scale_ptr, at, inside, 0.0)
        away = delta * scale + optional(shift_ptr, at, inside, 0.0) - rest
        dz = mean + 2.0 * number * away * square
        of_scale = delta * dz + 2.0 * optional(m2_ptr, at, inside, 0.0) * scale * square
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + at, scale * dz, mask=inside)
        if dm2_ptr is not None:
            tl.store(dm2_ptr + at, scale * scale * square, mask=inside)
        tl.store(dold_scale_ptr + at, optional(dscale_ptr, at, inside, 0.0) * second + of_scale, mask=inside)
        tl.store(dold_shift_ptr + at, optional(dshift_ptr, at, inside, 0.0) * second + dz, mask=inside)


@triton.jit
def _stage_parameters(
    dscale_ptr, dshift_ptr, scale_ptr, shift_ptr, r_ptr, rest_ptr, dw_ptr, db_ptr,
    sets, size, groups, each, programs, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Of CB parameters, each from `each` channels of every sample, RB at a time."""
    p = tl.cast(tl.program_id(0) - programs, tl.int64) * CB + tl.arange(0, CB)[None, :]
    C = tl.cast(groups, tl.int64) * size
    there = p < C // each
    dw = tl.zeros([1, CB], tl.float32)
    db = tl.zeros([1, CB], tl.float32)
    for start in tl.range(0, sets // groups * each, RB):
        j = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
        inside = (j < sets // groups * each) & there
        at = (j // each) * C + p * each + j % each
        s = at // size
        dshift = optional(dshift_ptr, at, inside, 0.0)
        pulled = optional(dscale_ptr, at, inside, 0.0) * optional(scale_ptr, at, inside, 0.0)
        pulled += dshift * (optional(shift_ptr, at, inside, 0.0) - optional(rest_ptr, s, inside, 0.0))
        dw += tl.sum(tl.where(inside, pulled * optional(r_ptr, s, inside, 0.0), 0.0), axis=0)[None, :]
        db += tl.sum(tl.where(inside, dshift, 0.0), axis=0)[None, :]
    if dw_ptr is not None:
        tl.store(dw_ptr + p, dw.to(dw_ptr.dtype.element_ty), mask=there)
    if db_ptr is not None:
        tl.store(db_ptr + p, db.to(db_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["sets", "size", "groups", "number", "programs"])
def second_stage_grads(
    dscale_ptr, dshift_ptr, delta_ptr, m2_ptr, scale_ptr, shift_ptr, w_ptr, r_ptr, rest_ptr,
    ddelta_ptr, dm2_ptr, dold_scale_ptr, dold_shift_ptr, dw_ptr, db_ptr,
    sets, size, groups, each, number, programs,
    UNIT: tl.constexpr, GB: tl.constexpr, L: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs go by groups, the others by parameters."""
    size *= UNIT
    if tl.program_id(0) < programs:
        _stage_grads(
            dscale_ptr, dshift_ptr, delta_ptr, m2_ptr, scale_ptr, shift_ptr, w_ptr, r_ptr, rest_ptr,
            ddelta_ptr, dm2_ptr, dold_scale_ptr, dold_shift_ptr, sets, size, groups, each, number, GB, L,
        )  # fmt: skip
    elif dw_ptr is not None or db_ptr is not None:
        _stage_parameters(
            dscale_ptr, dshift_ptr, scale_ptr, shift_ptr, r_ptr, rest_ptr, dw_ptr, db_ptr,
            sets, size, groups, each, programs, RB, CB,
        )  # fmt: skip
