"""Batch, group and instance norm of sets that one program holds in its registers: x is read once.

The numbers are those of `_standardize.py`, the layouts those of `_channels.py`. A set is `width` channels of a
sample, or a channel of the batch. A tile is [G * W, NB * L]: G sets of width <= W, and the positions of NB
samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, offsets, rebased, sizes, sum_pair
from ._standardize import _parameter


@triton.jit
def _place(C, width, PER_SAMPLE: tl.constexpr, WU: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """(population, channels, whether there are such channels) of this program."""
    q = tl.arange(0, G * W)[:, None]
    width = width * WU
    sets = C // width
    blocks = tl.cdiv(sets, G)
    population = tl.cast(0, tl.int64)
    block = tl.program_id(0)
    if PER_SAMPLE:
        population = tl.cast(block // blocks, tl.int64)
        block = block % blocks
    if W == 1:
        c = tl.cast(block, tl.int64) * G + q
        there = c < C
    else:
        of = block * G + q // W
        there = (q % W < width) & (of < sets)
        c = tl.cast(of, tl.int64) * width + q % W
    return population, c, there


@triton.jit
def _of_set(a, G: tl.constexpr, W: tl.constexpr):
    """Sums over the channels [G * W, 1] of each set, at each of them."""
    if W == 1:
        return a
    else:
        total = tl.sum(tl.reshape(a, (G, W)), axis=1)[:, None]
        return tl.reshape(tl.broadcast_to(total, (G, W)), (G * W, 1))


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "width"])
def standardize_on_chip(
    x_ptr, w_ptr, b_ptr, y_ptr, stats_ptr, N, C, S, x_sample, x_step, width,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, PER_SAMPLE: tl.constexpr, EPS: tl.constexpr,
    WU: tl.constexpr, G: tl.constexpr, W: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """y and its `stats`."""
    C, S = sizes(C, S, UNIT, TOKENS)
    population, c, there = _place(C, width, PER_SAMPLE, WU, G, W)
    n, s, here = columns(0, population, N, S, S, PER_SAMPLE, False, NB, L)
    valid = here & there
    x = tl.load(x_ptr + offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS), mask=valid, other=0.0)
    count = tl.cast(S, tl.float32)
    if not PER_SAMPLE:
        count *= N
    count *= width * WU
    pivot = _of_set(tl.sum(x.to(tl.float32), axis=1)[:, None], G, W) / count
    d = tl.where(valid, x.to(tl.float32) - pivot, 0.0)
    s1, s2 = sum_pair(d, d * d)
    if W > 1:
        s1 = _of_set(s1, G, W)
        s2 = _of_set(s2, G, W)
    delta = s1 / count
    m2 = s2 - s1 * delta
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # and NaN stays NaN
    pivot, delta = rebased(pivot, delta)
    r = tl.rsqrt(m2 / count + EPS)
    scale = _parameter(w_ptr, c, there, 1.0) * r
    shift = _parameter(b_ptr, c, there, 0.0) - delta * scale
    y = (x.to(tl.float32) - pivot) * scale + shift
    to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=valid)
    size = tl.cast(C, tl.int64)
    if PER_SAMPLE:
        size *= N
    at = population * C + c
    tl.store(stats_ptr + at, pivot, mask=there)
    tl.store(stats_ptr + size + at, delta, mask=there)
    tl.store(stats_ptr + 2 * size + at, r, mask=there)
    if W == 1:
        tl.store(stats_ptr + 3 * size + at, pivot + delta, mask=there)
        tl.store(stats_ptr + 4 * size + at, m2 / tl.maximum(count - 1.0, 1.0), mask=there)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "width"])
def standardize_on_chip_grad(
    dy_ptr, x_ptr, stats_ptr, w_ptr, dx_ptr, found_ptr, dw_ptr, db_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, width,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    PER_SAMPLE: tl.constexpr, WU: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dx and, for a batch, dw and db; else `found`, the sums of dy and of dy * (x - pivot) for each sample."""
    C, S = sizes(C, S, UNIT, TOKENS)
    population, c, there = _place(C, width, PER_SAMPLE, WU, G, W)
    n, s, here = columns(0, population, N, S, S, PER_SAMPLE, False, NB, L)
    valid = here & there
    lies = offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS)
    x = tl.load(x_ptr + lies, mask=valid, other=0.0)
    if dy_sample is None:
        dy = tl.load(dy_ptr + lies, mask=valid, other=0.0)
    else:
        lies = offsets(n, c, s, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS)
        dy = tl.load(dy_ptr + lies, mask=valid, other=0.0)
    size = tl.cast(C, tl.int64)
    if PER_SAMPLE:
        size *= N
    at = population * C + c
    pivot = tl.load(stats_ptr + at, mask=there, other=0.0)
    delta = tl.load(stats_ptr + size + at, mask=there, other=0.0)
    r = tl.load(stats_ptr + 2 * size + at, mask=there, other=0.0)
    g = dy.to(tl.float32)
    s1, s2 = sum_pair(g, g * (x.to(tl.float32) - pivot))
    if found_ptr is not None:
        tl.store(found_ptr + at, s1, mask=there)
        tl.store(found_ptr + size + at, s2, mask=there)
    dr = s2 - delta * s1  # the sum of dy * (x - mean)
    if dw_ptr is not None:
        tl.store(dw_ptr + c, (dr * r).to(dw_ptr.dtype.element_ty), mask=there)
    if db_ptr is not None:
        tl.store(db_ptr + c, s1.to(db_ptr.dtype.element_ty), mask=there)
    if dx_ptr is not None:
        count = tl.cast(S, tl.float32)
        if not PER_SAMPLE:
            count *= N
        count *= width * WU
        w = _parameter(w_ptr, c, there, 1.0)
        of_mean = _of_set(w * s1, G, W) / count
        of_r = _of_set(w * dr, G, W) / count
        slope = -r * r * r * of_r
        dx = (w * r) * dy.to(tl.float32) + slope * (x.to(tl.float32) - pivot) + (-r * of_mean - slope * delta)
        to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
        tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=valid)
