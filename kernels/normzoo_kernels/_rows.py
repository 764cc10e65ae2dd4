"""The row norms for rows that stay on chip between their statistics and the result.

A tile is [K, R, C]: R rows of K pieces of C columns. Narrow rows take C as wide as the vectors of one warp, so
that a warp owns whole rows and reduces them without a barrier; wider rows take K = 1 and spread over the
warps.

Statistics of a row, float32, side by side: LayerNorm keeps a pivot (the mean as first computed), the mean
of what is left after subtracting it, and 1 / std; the two means stay apart because their sum would round
away what the second one knows. CRMSNorm keeps the sum of the row and 1 / rms, RMSNorm 1 / rms, and the kind
"root", whose eps lies outside of the root, rms and 1 / (rms + eps).

Row strides come as multiples of a constexpr UNIT: the compiler then knows their alignment, and no stride
compiles a kernel anew. Rows are counted in int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_sum(a):
    return tl.sum(tl.sum(a, axis=0), axis=1)[None, :, None]


@triton.jit
def _row_sums(a, b):
    """Both sums in one reduction: half the barriers of two."""
    a, b = tl.split(tl.sum(tl.sum(tl.join(a, b), axis=0), axis=1))
    return a[None, :, None], b[None, :, None]


@triton.jit
def _row_stats(x, valid, KIND: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, TAIL: tl.constexpr):
    """(first, second, 1 / scale) of the rows of x: see the top of the file."""
    if KIND == "rms" or KIND == "root":
        s2 = _row_sum(x * x)
        return _finish(0.0, s2, s2, KIND, N, EPS)
    pivot = 0.0
    if KIND == "layer":
        pivot = _row_sum(x) / N
        x = x - pivot
        if TAIL:
            x = tl.where(valid, x, 0.0)
    s1, s2 = _row_sums(x, x * x)
    return _finish(pivot, s1, s2, KIND, N, EPS)


@triton.jit
def _finish(pivot, s1, s2, KIND: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr):
    """Statistics from the sum and the sum of squares of x - pivot."""
    if KIND == "layer":
        left = s1 / N
        return pivot, left, tl.rsqrt(s2 / N - left * left + EPS)
    elif KIND == "crms":
        return s1, s1, tl.rsqrt((s2 + s1 * s1) / (N + 1) + EPS)
    elif KIND == "root":
        root = tl.sqrt(s2 / N)
        return root, root, 1 / (root + EPS)
    else:
        return s2, s2, tl.rsqrt(s2 / N + EPS)


@triton.jit
def _store_stats(ptr, row, mask, first, second, scale, KIND: tl.constexpr):
    if KIND == "layer":
        tl.store(ptr + row * 3, first, mask=mask)
        tl.store(ptr + row * 3 + 1, second, mask=mask)
        tl.store(ptr + row * 3 + 2, scale, mask=mask)
    elif KIND == "crms" or KIND == "root":
        tl.store(ptr + row * 2, first, mask=mask)
        tl.store(ptr + row * 2 + 1, scale, mask=mask)
    else:
        tl.store(ptr + row, scale, mask=mask)


@triton.jit
def _load_stats(ptr, row, mask, KIND: tl.constexpr):
    if KIND == "layer":
        first = tl.load(ptr + row * 3, mask=mask, other=0.0)
        second = tl.load(ptr + row * 3 + 1, mask=mask, other=0.0)
        return first, second, tl.load(ptr + row * 3 + 2, mask=mask, other=0.0)
    elif KIND == "crms" or KIND == "root":
        first = tl.load(ptr + row * 2, mask=mask, other=0.0)
        return first, first, tl.load(ptr + row * 2 + 1, mask=mask, other=0.0)
    else:
        scale = tl.load(ptr + row, mask=mask, other=0.0)
        return scale, scale, scale


@triton.jit
def _normalized(x, first, second, scale, KIND: tl.constexpr):
    if KIND == "layer":
        return (x - first) * scale - second * scale
    else:
        return x * scale


@triton.jit
def _weight(w, OFFSET: tl.constexpr):
    if OFFSET != 0.0:  # adding zero is an instruction too: it turns -0 into 0
        return w.to(tl.float32) + OFFSET
    else:
        return w.to(tl.float32)


@triton.jit
def _affine(h, w, b, OFFSET: tl.constexpr, ROUND: tl.constexpr, dtype: tl.constexpr):
    if ROUND:
        h = h.to(dtype).to(tl.float32)
    if w is not None:
        h *= _weight(w, OFFSET)
    if b is not None:
        h += b.to(tl.float32)
    return h


@triton.jit
def _inside(cols, WIDTH: tl.constexpr, row, rows, R: tl.constexpr):
    if R > 1:
        return (cols < WIDTH) & (row < rows)
    else:  # the loop ends with the rows
        return cols < WIDTH


@triton.jit
def _own(cols, K: tl.constexpr, R: tl.constexpr):
    """Columns of the parameters: one copy a row where that gives them the layout of x, else broadcast."""
    if K > 1 or R == 2:
        return cols + tl.zeros([1, R, 1], tl.int32)
    else:
        return cols


@triton.jit
def _read(ptr, row, step, UNIT: tl.constexpr, cols, touch, valid, CLEAR: tl.constexpr, policy: tl.constexpr):
    """A tile as stored. CLEAR: entries outside `valid` that were touched are padding and become zero."""
    v = tl.load(ptr + row * step * UNIT + cols, mask=touch, other=0.0, eviction_policy=policy)
    if CLEAR:
        v = tl.where(valid, v, 0.0)
    return v


@triton.jit(do_not_specialize=["rows", "x_step", "res_step"])
def norm_fwd(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, total_ptr, stats_ptr, rows, x_step, res_step,
    KIND: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr,
    X_UNIT: tl.constexpr, RES_UNIT: tl.constexpr, Y_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows of N <= K * C columns. WIDTH: columns that may be touched, N or N with its padding."""
    cols = tl.arange(0, K)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    valid = cols < N
    own = _own(cols, K, R)
    w = None
    b = None
    if w_ptr is not None:
        w = tl.load(w_ptr + own, mask=valid, other=0.0)
    if b_ptr is not None:
        b = tl.load(b_ptr + own, mask=valid, other=0.0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[None, :, None]
        touch = _inside(cols, WIDTH, row, rows, R)
        x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, valid, WIDTH != N, "evict_first").to(tl.float32)
        if res_ptr is not None:
            res = _read(res_ptr, row, res_step, RES_UNIT, cols, touch, valid, WIDTH != N, "evict_first")
            total = (x + res.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * Y_STRIDE + cols, total, mask=touch)
            x = total.to(tl.float32)
            rounded: tl.constexpr = total_ptr.dtype.element_ty
        else:
            rounded: tl.constexpr = x_ptr.dtype.element_ty
        first, second, scale = _row_stats(x, valid, KIND, N, EPS, K * C != N)
        h = _affine(_normalized(x, first, second, scale, KIND), w, b, OFFSET, ROUND, rounded)
        tl.store(y_ptr + row * Y_STRIDE + cols, h.to(y_ptr.dtype.element_ty), mask=touch)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, row < rows, first, second, scale, KIND)


@triton.jit(do_not_specialize=["rows", "dy_step", "dtotal_step", "x_step"])
def norm_bwd(
    dy_ptr, dtotal_ptr, x_ptr, w_ptr, stats_ptr, dx_ptr, part_ptr, rows, dy_step, dtotal_step, x_step,
    KIND: tl.constexpr, N: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, X_UNIT: tl.constexpr,
    DY_UNIT: tl.constexpr, DY_COL: tl.constexpr, DTOTAL_UNIT: tl.constexpr, DTOTAL_COL: tl.constexpr,
    DX_STRIDE: tl.constexpr, X_WIDTH: tl.constexpr, DY_WIDTH: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    PACKED: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and this program's share of dw and db as float32 rows of `part`: dw for all programs, then db."""
    cols = tl.arange(0, K)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    valid = cols < N
    own = _own(cols, K, R)
    w = None
    if w_ptr is not None:
        w = tl.load(w_ptr + own, mask=valid, other=0.0)
    dw = tl.zeros([K, R, C], tl.float32)
    db = tl.zeros([K, R, C], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[None, :, None]
        touch = _inside(cols, X_WIDTH, row, rows, R)
        x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, valid, X_WIDTH != N, "evict_first")
        inside = _inside(cols, DY_WIDTH, row, rows, R)
        dy = _read(dy_ptr, row, dy_step, DY_UNIT, cols * DY_COL, inside, valid, DY_WIDTH != N, "evict_first")
        first, second, scale = _load_stats(stats_ptr, row, row < rows, KIND)
        h = _normalized(x.to(tl.float32), first, second, scale, KIND)
        g = dy.to(tl.float32)
        if w_ptr is not None:
            g *= _weight(w, OFFSET)
        if KIND == "layer":
            s1, s2 = _row_sums(g, g * h)
        else:
            s2 = _row_sum(g * h)
            s1 = s2
        if PACKED:
            # Hold the row as 16-bit words across the reduction, not as float32, which would not fit. The
            # compiler merges both conversions unless something it cannot foresee (a zero) lies between.
            zero = ((s2 != s2) & (rows < 0)).to(tl.int16)
            x = (x.to(tl.int16, bitcast=True) ^ zero).to(x.dtype, bitcast=True)
            dy = (dy.to(tl.int16, bitcast=True) ^ zero).to(dy.dtype, bitcast=True)
            h = _normalized(x.to(tl.float32), first, second, scale, KIND)
            g = dy.to(tl.float32)
            if w_ptr is not None:
                g *= _weight(w, OFFSET)
        dx = _input_grad(g, h, s1, s2, first, scale, KIND, N)
        if dtotal_ptr is not None:
            at = cols * DTOTAL_COL
            inside = _inside(cols, N, row, rows, R)
            dtotal = _read(dtotal_ptr, row, dtotal_step, DTOTAL_UNIT, at, inside, valid, False, "evict_first")
            dx += dtotal.to(tl.float32)
        if dx_ptr is not None:
            tl.store(dx_ptr + row * DX_STRIDE + cols, dx.to(dx_ptr.dtype.element_ty), mask=touch)
        if DW:
            if ROUND:
                h = h.to(x.dtype).to(tl.float32)
            dw += dy.to(tl.float32) * h
        if DB:
            db += dy.to(tl.float32)
    flat = tl.arange(0, K)[:, None] * C + tl.arange(0, C)[None, :]
    at = tl.program_id(0).to(tl.int64) * N + flat
    if DW:
        tl.store(part_ptr + at, tl.sum(dw, axis=1), mask=flat < N)
        at += tl.num_programs(0).to(tl.int64) * N
    if DB:
        tl.store(part_ptr + at, tl.sum(db, axis=1), mask=flat < N)


@triton.jit
def _input_grad(g, h, s1, s2, first, scale, KIND: tl.constexpr, N: tl.constexpr):
    if KIND == "layer":
        return scale * (g - s1 / N - h * (s2 / N))
    elif KIND == "crms":
        return scale * (g - (h + first * scale) * (s2 / (N + 1)))
    elif KIND == "root":
        # The root of zero has no derivative; what divides a row of zeros makes no difference.
        return scale * g - h * (s2 / (N * tl.where(first == 0.0, 1.0, first)))
    else:
        return scale * (g - h * (s2 / N))


@triton.jit(do_not_specialize=["parts"])
def sum_parts(part_ptr, dw_ptr, db_ptr, parts, N: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """dw and db from the shares of all programs, always in the same order, each in its own dtype."""
    cols = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)[None, :]
    at = part_ptr + cols
    if dw_ptr is not None:
        _sum_part(at, dw_ptr, parts, cols, N, P, C)
        at += tl.cast(parts, tl.int64) * N
    if db_ptr is not None:
        _sum_part(at, db_ptr, parts, cols, N, P, C)


@triton.jit
def _sum_part(at, out_ptr, parts, cols, N: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    acc = tl.zeros([P, C], tl.float32)
    for start in tl.range(0, parts, P):
        part = tl.cast(start, tl.int64) + tl.arange(0, P)[:, None]
        acc += tl.load(at + part * N, mask=(part < parts) & (cols < N), other=0.0)
    total = tl.sum(acc, axis=0)[None, :]
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < N)
