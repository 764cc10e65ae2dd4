"""The row norms whose scale and shift belong to a sample or to a token, for rows that stay on chip.

Rows are numbered sample by sample, `tokens` of each; where nothing belongs to a sample all rows are the tokens
of one. A program takes every `runs`-th tile of one sample and reads what belongs to the sample once.

Tiles, statistics and strides are as in `_rows.py`. PART: of how many entries, the first, the mean square is
taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import (
    _input_grad,
    _inside,
    _load_stats,
    _normalized,
    _own,
    _read,
    _row_stats,
    _row_sum,
    _row_sums,
    _store_stats,
    _sum_part,
    _weight,
)


@triton.jit
def _head(x, cols, N: tl.constexpr, PART: tl.constexpr):
    """The first PART entries of the rows, zeros behind."""
    if PART < N:
        return tl.where(cols < PART, x, 0.0)
    else:
        return x


@triton.jit(do_not_specialize=["tokens", "runs", "x_step", "scale_step", "shift_step"])
def modulated_fwd(
    x_ptr, scale_ptr, shift_ptr, y_ptr, stats_ptr, tokens, runs, x_step, scale_step, shift_step,
    KIND: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    X_UNIT: tl.constexpr, SCALE_UNIT: tl.constexpr, SHIFT_UNIT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr, Y_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """SCALE_ROWS, SHIFT_ROWS: whether each token has its own. WIDTH: as in `norm_fwd`."""
    cols = tl.arange(0, K)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    valid = cols < N
    own = _own(cols, K, R)
    sample = (tl.program_id(0) // runs).to(tl.int64)
    if not SCALE_ROWS:
        w = tl.load(scale_ptr + sample * scale_step * SCALE_UNIT + own, mask=valid, other=0.0)
    if shift_ptr is not None and not SHIFT_ROWS:
        b = tl.load(shift_ptr + sample * shift_step * SHIFT_UNIT + own, mask=valid, other=0.0)
    for tile in tl.range(tl.program_id(0) % runs, tl.cdiv(tokens, R), runs):
        token = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[None, :, None]
        row = sample * tokens + token
        touch = _inside(cols, WIDTH, token, tokens, R)
        x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, valid, WIDTH != N, "evict_first").to(tl.float32)
        if SCALE_ROWS:
            w = _read(scale_ptr, row, scale_step, SCALE_UNIT, cols, touch, valid, False, "evict_first")
        if shift_ptr is not None and SHIFT_ROWS:
            b = _read(shift_ptr, row, shift_step, SHIFT_UNIT, cols, touch, valid, False, "evict_first")
        head = _head(x, cols, N, PART)
        first, second, scale = _row_stats(head, valid, KIND, PART, EPS, K * C != N)
        h = _normalized(x, first, second, scale, KIND) * _weight(w, OFFSET)
        if shift_ptr is not None:
            h += b.to(tl.float32)
        tl.store(y_ptr + row * Y_STRIDE + cols, h.to(y_ptr.dtype.element_ty), mask=touch)
        if stats_ptr is not None:
            _store_stats(stats_ptr, row, token < tokens, first, second, scale, KIND)


@triton.jit(do_not_specialize=["tokens", "runs", "dy_step", "x_step", "scale_step"])
def modulated_bwd(
    dy_ptr, x_ptr, scale_ptr, stats_ptr, dx_ptr, dscale_ptr, dshift_ptr,
    tokens, runs, dy_step, x_step, scale_step,
    KIND: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, OFFSET: tl.constexpr, X_UNIT: tl.constexpr,
    DY_UNIT: tl.constexpr, DY_COL: tl.constexpr, SCALE_UNIT: tl.constexpr, SCALE_ROWS: tl.constexpr,
    DX_STRIDE: tl.constexpr, WIDTH: tl.constexpr, DY_WIDTH: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx; dscale of the rows, or this program's share of that of its sample; its share of dshift.

    Shares lie in the order of the programs. WIDTH: entries of x and scale that may be touched.
    """
    cols = tl.arange(0, K)[:, None, None] * C + tl.arange(0, C)[None, None, :]
    valid = cols < N
    sample = (tl.program_id(0) // runs).to(tl.int64)
    if not SCALE_ROWS:
        own = _own(cols, K, R)
        w = tl.load(scale_ptr + sample * scale_step * SCALE_UNIT + own, mask=valid, other=0.0)
    dscale = tl.zeros([K, R, C], tl.float32)
    dshift = tl.zeros([K, R, C], tl.float32)
    for tile in tl.range(tl.program_id(0) % runs, tl.cdiv(tokens, R), runs, num_stages=STAGES):
        token = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[None, :, None]
        row = sample * tokens + token
        touch = _inside(cols, WIDTH, token, tokens, R)
        x = _read(x_ptr, row, x_step, X_UNIT, cols, touch, valid, WIDTH != N, "evict_first")
        inside = _inside(cols, DY_WIDTH, token, tokens, R)
        dy = _read(dy_ptr, row, dy_step, DY_UNIT, cols * DY_COL, inside, valid, DY_WIDTH != N, "evict_first")
        dy = dy.to(tl.float32)
        if SCALE_ROWS:
            w = _read(scale_ptr, row, scale_step, SCALE_UNIT, cols, touch, valid, WIDTH != N, "evict_first")
        first, second, scale = _load_stats(stats_ptr, row, token < tokens, KIND)
        h = _normalized(x.to(tl.float32), first, second, scale, KIND)
        if dscale_ptr is not None and SCALE_ROWS:
            share = (dy * h).to(dscale_ptr.dtype.element_ty)
            tl.store(dscale_ptr + row * DX_STRIDE + cols, share, mask=touch)
        elif dscale_ptr is not None:
            dscale += dy * h
        if dshift_ptr is not None:
            dshift += dy
        if dx_ptr is not None:
            g = dy * _weight(w, OFFSET)
            if KIND == "layer":
                s1, s2 = _row_sums(g, g * h)
            else:
                s2 = _row_sum(g * h)
                s1 = s2
            dx = _input_grad(g, _head(h, cols, N, PART), s1, s2, first, scale, KIND, PART)
            tl.store(dx_ptr + row * DX_STRIDE + cols, dx.to(dx_ptr.dtype.element_ty), mask=touch)
    flat = tl.arange(0, K)[:, None] * C + tl.arange(0, C)[None, :]
    at = tl.program_id(0).to(tl.int64) * N + flat
    if dscale_ptr is not None and not SCALE_ROWS:
        tl.store(dscale_ptr + at, tl.sum(dscale, axis=1).to(dscale_ptr.dtype.element_ty), mask=flat < N)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + at, tl.sum(dshift, axis=1).to(dshift_ptr.dtype.element_ty), mask=flat < N)


@triton.jit(do_not_specialize=["runs"])
def sum_runs(
    scale_part_ptr, shift_part_ptr, dscale_ptr, dshift_ptr, runs,
    N: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The shares of each sample, (samples, runs, N) float32, always in the same order; one may be None."""
    blocks: tl.constexpr = (N + C - 1) // C
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * C + tl.arange(0, C)[None, :]
    if dscale_ptr is not None:
        at = scale_part_ptr + sample * runs * N + cols
        _sum_part(at, dscale_ptr + sample * N, runs, cols, N, P, C)
    if dshift_ptr is not None:
        at = shift_part_ptr + sample * runs * N + cols
        _sum_part(at, dshift_ptr + sample * N, runs, cols, N, P, C)
