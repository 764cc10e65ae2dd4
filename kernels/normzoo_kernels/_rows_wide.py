"""The row norms for rows that no program can hold: swept twice in chunks, the second time from the L2 cache."""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import _affine, _finish, _input_grad, _load_stats, _normalized, _read, _store_stats, _weight


@triton.jit(do_not_specialize=["rows", "x_step", "res_step"])
def norm_fwd_wide(
    x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, total_ptr, stats_ptr, rows, x_step, res_step,
    KIND: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr,
    X_UNIT: tl.constexpr, RES_UNIT: tl.constexpr, Y_STRIDE: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row of N > C columns at a time, in chunks of C."""
    lane = tl.arange(0, C)
    for tile in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64)
        x = _chunk(x_ptr, res_ptr, total_ptr, row, x_step, res_step, lane, X_UNIT, RES_UNIT, Y_STRIDE, N)
        if KIND == "layer":
            pivot, offset, m2 = first_moments(x, C)
        else:
            squares = x * x
            if KIND == "crms":
                entries = x
        for start in tl.range(C, N, C, num_stages=STAGES):
            cols = start + lane
            x = _chunk(x_ptr, res_ptr, total_ptr, row, x_step, res_step, cols, X_UNIT, RES_UNIT, Y_STRIDE, N)
            if KIND == "layer":
                offset, m2 = more_moments(x, pivot, offset, m2, start, cols, N, C)
            else:
                squares += x * x
                if KIND == "crms":
                    entries += x
        if KIND == "layer":
            first = pivot + offset
            second = pivot - first + offset  # what the rounding of `first` left over
            scale = tl.rsqrt(m2 / N + EPS)
        else:
            s2 = tl.sum(squares, axis=0)
            s1 = s2
            if KIND == "crms":
                s1 = tl.sum(entries, axis=0)
            first, second, scale = _finish(0.0, s1, s2, KIND, N, EPS)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, True, first, second, scale, KIND)
        if res_ptr is not None:
            tl.debug_barrier()  # the sums written above are read below, by other threads
        for start in tl.range(0, N, C, num_stages=STAGES):
            cols = start + lane
            if res_ptr is not None:
                again = tl.load(total_ptr + row * Y_STRIDE + cols, mask=cols < N, other=0.0)
            else:
                again = _read(x_ptr, row, x_step, X_UNIT, cols, cols < N, cols < N, False, "evict_first")
            w = None
            b = None
            if w_ptr is not None:
                w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
            if b_ptr is not None:
                b = tl.load(b_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
            h = _normalized(again.to(tl.float32), first, second, scale, KIND)
            h = _affine(h, w, b, OFFSET, ROUND, again.dtype)
            tl.store(y_ptr + row * Y_STRIDE + cols, h.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def first_moments(x, C: tl.constexpr):
    """(pivot, mean - pivot, sum of squares around the mean) of the first C entries of a row."""
    pivot = tl.sum(x, axis=0) / C
    x -= pivot
    s1, s2 = tl.split(tl.sum(tl.join(x, x * x), axis=0))
    offset = s1 / C
    return pivot, offset, s2 - offset * s1


@triton.jit
def more_moments(x, pivot, offset, m2, start, cols, N: tl.constexpr, C: tl.constexpr):
    """(mean - pivot, sum of squares around the mean) of a row up to the end of the chunk x, by Chan's formula.

    Around the mean so far, what cancels here is no larger than what that chunk adds to the spread of the row,
    so no digit of the variance is lost.
    """
    before = tl.cast(start, tl.float32)
    more = tl.cast(tl.minimum(start + C, N), tl.float32) - before
    d = x - pivot - offset
    if N % C != 0:
        d = tl.where(cols < N, d, 0.0)
    s1, s2 = tl.split(tl.sum(tl.join(d, d * d), axis=0))
    shift = s1 / more
    m2 += s2 - shift * s1 + shift * shift * (before * more / (before + more))
    return offset + shift * (more / (before + more)), m2


@triton.jit
def _chunk(
    x_ptr, res_ptr, total_ptr, row, x_step, res_step, cols,
    X_UNIT: tl.constexpr, RES_UNIT: tl.constexpr, Y_STRIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A chunk of x, or of x + residual, which is then stored; float32."""
    touch = cols < N
    x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, touch, False, "evict_last").to(tl.float32)
    if res_ptr is not None:
        res = _read(res_ptr, row, res_step, RES_UNIT, cols, touch, touch, False, "evict_first")
        total = (x + res.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * Y_STRIDE + cols, total, mask=touch)
        x = total.to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows", "dy_step", "dtotal_step", "x_step"])
def norm_bwd_wide(
    dy_ptr, dtotal_ptr, x_ptr, w_ptr, stats_ptr, dx_ptr, part_ptr, rows, dy_step, dtotal_step, x_step,
    KIND: tl.constexpr, N: tl.constexpr, OFFSET: tl.constexpr, ROUND: tl.constexpr, X_UNIT: tl.constexpr,
    DY_UNIT: tl.constexpr, DY_COL: tl.constexpr, DTOTAL_UNIT: tl.constexpr, DTOTAL_COL: tl.constexpr,
    DX_STRIDE: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """R rows at a time, swept in chunks of C columns for their sums, then for dx; shares of dw and db are
    added up in `part` itself, once per R rows."""
    lane = tl.arange(0, C)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[:, None]
        here = row < rows
        first, second, scale = _load_stats(stats_ptr, row, here, KIND)
        acc1 = tl.zeros([R, C], tl.float32)
        acc2 = tl.zeros([R, C], tl.float32)
        for start in tl.range(0, N, C, num_stages=STAGES):
            cols = start + lane
            touch = (cols < N) & here
            x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, touch, False, "evict_last")
            dy = _read(dy_ptr, row, dy_step, DY_UNIT, cols * DY_COL, touch, touch, False, "evict_last")
            g = dy.to(tl.float32)
            if w_ptr is not None:
                w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
                g *= _weight(w, OFFSET)
            acc2 += g * _normalized(x.to(tl.float32), first, second, scale, KIND)
            if KIND == "layer":
                acc1 += g
        s2 = tl.sum(acc2, axis=1)[:, None]
        s1 = s2
        if KIND == "layer":
            s1 = tl.sum(acc1, axis=1)[:, None]
        for start in tl.range(0, N, C, num_stages=STAGES):
            cols = start + lane
            touch = (cols < N) & here
            x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, touch, False, "evict_first")
            dy = _read(dy_ptr, row, dy_step, DY_UNIT, cols * DY_COL, touch, touch, False, "evict_first")
            g = dy.to(tl.float32)
            h = _normalized(x.to(tl.float32), first, second, scale, KIND)
            if w_ptr is not None:
                w = tl.load(w_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_last")
                g *= _weight(w, OFFSET)
            dx = _input_grad(g, h, s1, s2, first, scale, KIND, N)
            if dtotal_ptr is not None:
                at = cols * DTOTAL_COL
                more = _read(dtotal_ptr, row, dtotal_step, DTOTAL_UNIT, at, touch, touch, False, "evict_first")
                dx += more.to(tl.float32)
            if dx_ptr is not None:
                tl.store(dx_ptr + row * DX_STRIDE + cols, dx.to(dx_ptr.dtype.element_ty), mask=touch)
            flat = start + tl.arange(0, C)
            at = tl.program_id(0).to(tl.int64) * N + flat
            later = (flat < N) & (tile != tl.program_id(0))
            if DW:
                if ROUND:
                    h = h.to(x.dtype).to(tl.float32)
                share = tl.sum(dy.to(tl.float32) * h, axis=0)
                tl.store(part_ptr + at, share + tl.load(part_ptr + at, mask=later, other=0.0), mask=flat < N)
                at += tl.num_programs(0).to(tl.int64) * N
            if DB:
                share = tl.sum(dy.to(tl.float32), axis=0)
                tl.store(part_ptr + at, share + tl.load(part_ptr + at, mask=later, other=0.0), mask=flat < N)
        tl.debug_barrier()  # the next tile reads what other threads added to `part`
