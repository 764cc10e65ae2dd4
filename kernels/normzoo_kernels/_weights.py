"""Standardization of the rows of a weight: (row - mean) / d, times a factor and a gain for each row.

Rows are dense, N apart. Where N <= K * C they stay on chip, R of them a tile [K, R, C] as in `_rows.py`; a
wider row is swept twice in chunks of C, the second time from the L2 cache. Statistics of a row, float32, side
by side: a pivot (the mean as first computed), the mean of what is left after subtracting it, 1 / d, and the
slope, by which the derivative of 1 / d enters the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import _inside, _normalized, _row_sum, _row_sums
from ._rows_wide import first_moments, more_moments


@triton.jit
def _divisor(m2, N: tl.constexpr, CORRECTION: tl.constexpr, OUTSIDE: tl.constexpr, EPS: tl.constexpr):
    """(1 / d, slope) from the sum of squares around the mean."""
    var = m2 / (N - CORRECTION)
    if OUTSIDE:
        root = tl.sqrt(var)
        d = root + EPS
        # The root of zero has no derivative; any slope does for a row without spread.
        return 1 / d, d / (tl.where(root == 0.0, 1.0, root) * (N - CORRECTION))
    else:
        return tl.rsqrt(var + EPS), tl.zeros_like(var) + 1 / (N - CORRECTION)


@triton.jit
def _store_stats(ptr, row, mask, pivot, left, scale, slope):
    tl.store(ptr + row * 4, pivot, mask=mask)
    tl.store(ptr + row * 4 + 1, left, mask=mask)
    tl.store(ptr + row * 4 + 2, scale, mask=mask)
    tl.store(ptr + row * 4 + 3, slope, mask=mask)


@triton.jit
def _load_stats(ptr, row, mask):
    pivot = tl.load(ptr + row * 4, mask=mask, other=0.0)
    left = tl.load(ptr + row * 4 + 1, mask=mask, other=0.0)
    scale = tl.load(ptr + row * 4 + 2, mask=mask, other=0.0)
    return pivot, left, scale, tl.load(ptr + row * 4 + 3, mask=mask, other=0.0)


@triton.jit
def _multiplied(scale, gain_ptr, row, mask, FACTOR: tl.constexpr):
    """scale * FACTOR * gain."""
    if FACTOR != 1.0:
        scale *= FACTOR
    if gain_ptr is not None:
        scale *= tl.load(gain_ptr + row, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _columns(N: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    if N <= K * C:
        return tl.arange(0, K)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    else:
        return tl.arange(0, C)


@triton.jit
def _rows_of(tile, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    first = tl.cast(tile, tl.int64) * R
    if N <= K * C:
        return first + tl.arange(0, R)[None, :, None]
    else:
        return first


@triton.jit
def _load(ptr, at, mask, policy: tl.constexpr):
    return tl.load(ptr + at, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def _row_grad(dw_ptr, at, mask, g, h, s1, s2, scale, slope, N: tl.constexpr):
    dw = scale * (g - s1 / N - h * (s2 * slope))
    tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def standardize_fwd(
    w_ptr, gain_ptr, y_ptr, stats_ptr, rows,
    N: tl.constexpr, CORRECTION: tl.constexpr, OUTSIDE: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = _columns(N, K, C)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = _rows_of(tile, N, K, R, C)
        here, touch = row < rows, _inside(cols, N, row, rows, R)
        if N <= K * C:
            w = _load(w_ptr, row * N + cols, touch, "evict_first")
            pivot = _row_sum(w) / N
            w -= pivot
            if K * C != N:
                w = tl.where(cols < N, w, 0.0)
            s1, s2 = _row_sums(w, w * w)
            left = s1 / N
            m2 = s2 - left * s1
        else:
            pivot, left, m2 = first_moments(_load(w_ptr, row * N + cols, touch, "evict_last"), C)
            for start in tl.range(C, N, C, num_stages=STAGES):
                w = _load(w_ptr, row * N + (start + cols), start + cols < N, "evict_last")
                left, m2 = more_moments(w, pivot, left, m2, start, start + cols, N, C)
        scale, slope = _divisor(m2, N, CORRECTION, OUTSIDE, EPS)
        factor = _multiplied(scale, gain_ptr, row, here, FACTOR)
        if N <= K * C:
            y = (w - left) * factor
            tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=touch)
        else:
            for start in tl.range(0, N, C, num_stages=STAGES):
                at, touch = row * N + (start + cols), start + cols < N
                y = (_load(w_ptr, at, touch, "evict_first") - pivot - left) * factor
                tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=touch)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, here, pivot, left, scale, slope)


@triton.jit(do_not_specialize=["rows"])
def standardize_bwd(
    dy_ptr, w_ptr, stats_ptr, gain_ptr, dw_ptr, dgain_ptr, rows,
    N: tl.constexpr, FACTOR: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = _columns(N, K, C)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = _rows_of(tile, N, K, R, C)
        here, touch = row < rows, _inside(cols, N, row, rows, R)
        pivot, left, scale, slope = _load_stats(stats_ptr, row, here)
        if N <= K * C:
            w = _load(w_ptr, row * N + cols, touch, "evict_first")
            g = _load(dy_ptr, row * N + cols, touch, "evict_first")
            h = _normalized(w, pivot, left, scale, "layer")
            s1, s2 = _row_sums(g, g * h)
        else:
            s1 = tl.zeros([C], tl.float32)
            s2 = tl.zeros([C], tl.float32)
            for start in tl.range(0, N, C, num_stages=STAGES):
                at, touch = row * N + (start + cols), start + cols < N
                w, g = _load(w_ptr, at, touch, "evict_last"), _load(dy_ptr, at, touch, "evict_last")
                s1 += g
                s2 += g * _normalized(w, pivot, left, scale, "layer")
            s1, s2 = tl.split(tl.sum(tl.join(s1, s2), axis=0))
        if dgain_ptr is not None:
            tl.store(dgain_ptr + row, (s2 * FACTOR).to(dgain_ptr.dtype.element_ty), mask=here)
        if dw_ptr is not None:
            factor = _multiplied(scale, gain_ptr, row, here, FACTOR)
            if N <= K * C:
                _row_grad(dw_ptr, row * N + cols, touch, g, h, s1, s2, factor, slope, N)
            else:
                for start in tl.range(0, N, C, num_stages=STAGES):
                    at, touch = row * N + (start + cols), start + cols < N
                    w, g = _load(w_ptr, at, touch, "evict_first"), _load(dy_ptr, at, touch, "evict_first")
                    h = _normalized(w, pivot, left, scale, "layer")
                    _row_grad(dw_ptr, at, touch, g, h, s1, s2, factor, slope, N)
