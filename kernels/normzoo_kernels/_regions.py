"""What RN-B and RN-L do beside the passes over regions: scale and shift of both, importance of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from ._sets import divisor, optional


@triton.jit
def _place(blocks, rows, C, E: tl.constexpr):
    """(offset in a region, offset to the other, channels, whether they are there) of a program."""
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.cast(tl.program_id(0) % blocks, tl.int64) * E + tl.arange(0, E)
    return row * C + c, tl.cast(rows, tl.int64) * C, c, c < C


@triton.jit
def _deviation(count_ptr, m2_ptr, at, other, there, EPS: tl.constexpr):
    """(values, variance, 1 / deviation) of a region: eps counts as if all pixels were in it."""
    n = divisor(tl.load(count_ptr + at, mask=there, other=1.0))
    whole = divisor(
        tl.load(count_ptr + at, mask=there, other=1.0) + tl.load(count_ptr + other, mask=there, other=0.0)
    )
    var = tl.load(m2_ptr + at, mask=there, other=0.0) / n
    return n, var, tl.rsqrt(var + EPS / (n / whole))


@triton.jit(do_not_specialize=["rows", "C", "blocks"])
def region_scaling(
    count_ptr, pivot_ptr, delta_ptr, m2_ptr, w0_ptr, b0_ptr, w1_ptr, b1_ptr,
    scale_ptr, shift_ptr, mean_ptr, var_ptr, rows, C, blocks,
    EPS: tl.constexpr, APART: tl.constexpr, UNIT: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Of both regions: scale = (1 + w) / deviation, shift = b - delta scale, with the b of the region if APART,
    else with those of both."""
    C *= UNIT
    at, step, c, there = _place(blocks, rows, C, E)
    b0, b1 = optional(b0_ptr, c, there, 0.0), optional(b1_ptr, c, there, 0.0)
    for region in tl.static_range(2):
        own = at + region * step
        _n, var, r = _deviation(count_ptr, m2_ptr, own, at + (1 - region) * step, there, EPS)
        w = optional(w1_ptr if region else w0_ptr, c, there, 0.0)
        b = b0 + b1
        if APART:
            b = b1 if region else b0
        delta = tl.load(delta_ptr + own, mask=there, other=0.0)
        scale = (1.0 + w) * r
        tl.store(scale_ptr + own, scale, mask=there)
        tl.store(shift_ptr + own, b - delta * scale, mask=there)
        tl.store(mean_ptr + own, tl.load(pivot_ptr + own, mask=there, other=0.0) + delta, mask=there)
        tl.store(var_ptr + own, var, mask=there)


@triton.jit
def _entry_grads(
    dscale_ptr, dshift_ptr, count_ptr, delta_ptr, m2_ptr, w0_ptr, w1_ptr, ddelta_ptr, dm2_ptr, rows, C, blocks,
    EPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    at, step, c, there = _place(blocks, rows, C, E)
    for region in tl.static_range(2):
        own = at + region * step
        n, _var, r = _deviation(count_ptr, m2_ptr, own, at + (1 - region) * step, there, EPS)
        w = 1.0 + optional(w1_ptr if region else w0_ptr, c, there, 0.0)
        dshift = optional(dshift_ptr, own, there, 0.0)
        delta = tl.load(delta_ptr + own, mask=there, other=0.0)
        dr = w * (optional(dscale_ptr, own, there, 0.0) - delta * dshift)
        tl.store(ddelta_ptr + own, -dshift * w * r, mask=there)
        tl.store(dm2_ptr + own, -0.5 * r * r * r * dr / n, mask=there)


@triton.jit
def _parameter_grads(
    dscale_ptr, dshift_ptr, count_ptr, delta_ptr, m2_ptr, dw0_ptr, db0_ptr, dw1_ptr, db1_ptr, rows, C, programs,
    EPS: tl.constexpr, APART: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    c = tl.cast(tl.program_id(0) - programs, tl.int64) * CB + tl.arange(0, CB)[None, :]
    dw0 = tl.zeros([1, CB], tl.float32)
    db0 = tl.zeros([1, CB], tl.float32)
    dw1 = tl.zeros([1, CB], tl.float32)
    db1 = tl.zeros([1, CB], tl.float32)
    step = tl.cast(rows, tl.int64) * C
    for start in tl.range(0, rows, RB):
        row = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
        at = row * C + c
        there = (row < rows) & (c < C)
        for region in tl.static_range(2):
            own = at + region * step
            _n, _var, r = _deviation(count_ptr, m2_ptr, own, at + (1 - region) * step, there, EPS)
            dshift = optional(dshift_ptr, own, there, 0.0)
            pulled = optional(dscale_ptr, own, there, 0.0)
            pulled -= tl.load(delta_ptr + own, mask=there, other=0.0) * dshift
            dw = tl.sum(tl.where(there, pulled * r, 0.0), axis=0)[None, :]
            db = tl.sum(tl.where(there, dshift, 0.0), axis=0)[None, :]
            if region == 1:
                dw1 += dw
                db1 += db
            else:
                dw0 += dw
                db0 += db
    if not APART:
        db0 += db1
        db1 = db0
    there = c < C
    if dw0_ptr is not None:
        tl.store(dw0_ptr + c, dw0.to(dw0_ptr.dtype.element_ty), mask=there)
    if db0_ptr is not None:
        tl.store(db0_ptr + c, db0.to(db0_ptr.dtype.element_ty), mask=there)
    if dw1_ptr is not None:
        tl.store(dw1_ptr + c, dw1.to(dw1_ptr.dtype.element_ty), mask=there)
    if db1_ptr is not None:
        tl.store(db1_ptr + c, db1.to(db1_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "C", "blocks", "programs"])
def region_scaling_grads(
    dscale_ptr, dshift_ptr, count_ptr, delta_ptr, m2_ptr, w0_ptr, w1_ptr,
    ddelta_ptr, dm2_ptr, dw0_ptr, db0_ptr, dw1_ptr, db1_ptr, rows, C, blocks, programs,
    EPS: tl.constexpr, APART: tl.constexpr, UNIT: tl.constexpr, E: tl.constexpr, RB: tl.constexpr,
    CB: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs go by entries, the others by parameters."""
    C *= UNIT
    if tl.program_id(0) < programs:
        _entry_grads(
            dscale_ptr, dshift_ptr, count_ptr, delta_ptr, m2_ptr, w0_ptr, w1_ptr, ddelta_ptr, dm2_ptr,
            rows, C, blocks, EPS, E,
        )  # fmt: skip
    else:
        _parameter_grads(
            dscale_ptr, dshift_ptr, count_ptr, delta_ptr, m2_ptr, dw0_ptr, db0_ptr, dw1_ptr, db1_ptr,
            rows, C, programs, EPS, APART, RB, CB,
        )  # fmt: skip


@triton.jit(do_not_specialize=["size", "threshold"])
def importance_gate(x_ptr, a_ptr, hole_ptr, size, threshold, UNIT: tl.constexpr, E: tl.constexpr):
    """a = sigmoid(x), and whether that reaches the threshold."""
    size *= UNIT
    at = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    apart = tl.exp(-tl.abs(x))
    a = tl.where(x >= 0.0, 1.0, apart) / (1.0 + apart)
    a = tl.where(x == x, a, x)
    tl.store(a_ptr + at, a, mask=at < size)
    tl.store(hole_ptr + at, tl.where(a >= threshold, 1, 0).to(tl.uint8), mask=at < size)


@triton.jit(do_not_specialize=["size"])
def importance_grad(first_ptr, second_ptr, a_ptr, dx_ptr, size, UNIT: tl.constexpr, E: tl.constexpr):
    """Of x, from two gradients of a."""
    size *= UNIT
    at = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    da = optional(first_ptr, at, at < size, 0.0) + optional(second_ptr, at, at < size, 0.0)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0)
    tl.store(dx_ptr + at, da * a * (1.0 - a), mask=at < size)
