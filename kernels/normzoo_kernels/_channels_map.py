"""The affine maps of the channel engine: y from x, and dx from dy and x.

Both are scale * dy + slope * (x - pivot) + offset, without the first term where there is no dy. For y, the
engine's scale and shift are the slope and the offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, entries, gradient, job_of, offsets, region_of, sizes, work_of


@triton.jit
def _parameter(ptr, n, c, N, C, EACH: tl.constexpr, REGION: tl.constexpr, inside):
    """One number a channel, or with EACH one a channel of each sample; of the second region with REGION."""
    at = c
    if EACH:
        at += (n + REGION * N) * C
    else:
        at += REGION * C
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def channel_map(
    x_ptr, dy_ptr, mask_ptr, pivot_ptr, scale_ptr, slope_ptr, offset_ptr, out_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    PER_SAMPLE: tl.constexpr, PIVOTS: tl.constexpr, SCALES: tl.constexpr, SLOPES: tl.constexpr,
    CHUNKED: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
    REVERSED: tl.constexpr = False,
):  # fmt: skip
    """Tiles, populations and parts as in the statistics. PIVOTS, SCALES, SLOPES: each sample has its own.
    REVERSED: what the statistics have read last, the L2 cache may still have, comes first."""
    C, S = sizes(C, S, UNIT, TOKENS)
    _part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L, REVERSED
    )  # fmt: skip
    pivot = _parameter(pivot_ptr, population, c, N, C, PIVOTS, 0, c < C)
    slope = _parameter(slope_ptr, population, c, N, C, SLOPES, 0, c < C)
    offset = _parameter(offset_ptr, population, c, N, C, SLOPES, 0, c < C)
    if dy_ptr is not None:
        scale = _parameter(scale_ptr, population, c, N, C, SCALES, 0, c < C)
    if mask_ptr is not None:
        pivot1 = _parameter(pivot_ptr, population, c, N, C, PIVOTS, 1, c < C)
        slope1 = _parameter(slope_ptr, population, c, N, C, SLOPES, 1, c < C)
        offset1 = _parameter(offset_ptr, population, c, N, C, SLOPES, 1, c < C)
        if dy_ptr is not None:
            scale1 = _parameter(scale_ptr, population, c, N, C, SCALES, 1, c < C)
    for i in tl.range(low, high, num_stages=STAGES):
        tile = low + high - 1 - i if REVERSED else i
        n, s, here = columns(tile, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, valid, _ = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, 0, NB, L)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            dy = gradient(
                dy_ptr, n, c, s, here, at, valid, N, C, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS
            )  # fmt: skip
        if mask_ptr is not None:
            region = region_of(mask_ptr, n, s, here, S)
            out = tl.where(region, slope1, slope) * (x - tl.where(region, pivot1, pivot))
            out += tl.where(region, offset1, offset)
            if dy_ptr is not None:
                out += tl.where(region, scale1, scale) * dy
        else:
            out = slope * (x - pivot) + offset
            if dy_ptr is not None:
                out += scale * dy
        to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def flat_work_of(
    N, S, total, parts,
    UNIT: tl.constexpr, PER_SAMPLE: tl.constexpr, B: tl.constexpr, REVERSED: tl.constexpr = False,
):  # fmt: skip
    """(population, channels, first entry, what is inside, first tile, end of the tiles) of this program.

    A tile is B entries anywhere in a sample of `total`, whatever channels they belong to; a block too.
    """
    blocks = tl.cdiv(total, B)
    span = tl.cdiv(total // UNIT, blocks) * UNIT  # all tiles about as wide
    tiles = 1 if PER_SAMPLE else N
    per = tl.cdiv(tiles, parts)
    part, population, block = job_of(parts, blocks, REVERSED)
    first = block * span
    channel = first // S
    q = tl.arange(0, B)
    # Half an entry from the nearest border of two channels, so that rounding the quotient does no harm.
    c = ((q + (first - channel * S).to(tl.int32)).to(tl.float32) + 0.5) / S
    c = c.to(tl.int32) + channel
    low = part * per
    return population, c, first, (q < span) & (q < total - first), low, tl.minimum(low + per, tiles)


@triton.jit(do_not_specialize=["N", "S", "total", "x_sample", "dy_sample", "parts"])
def channel_map_flat(
    x_ptr, dy_ptr, pivot_ptr, scale_ptr, slope_ptr, offset_ptr, out_ptr,
    N, S, total, x_sample, dy_sample, parts,
    UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    PER_SAMPLE: tl.constexpr, PIVOTS: tl.constexpr, SCALES: tl.constexpr, SLOPES: tl.constexpr, B: tl.constexpr,
    STAGES: tl.constexpr, REVERSED: tl.constexpr = False,
):  # fmt: skip
    """The same for samples whose planes lie side by side but start on no vector."""
    total = tl.cast(total, tl.int64) * UNIT
    C = total // S
    population, c, first, inside, low, high = flat_work_of(
        N, S, total, parts, UNIT, PER_SAMPLE, B, REVERSED
    )  # fmt: skip
    q = tl.arange(0, B)
    pivot = _parameter(pivot_ptr, population, c, N, C, PIVOTS, 0, inside)
    slope = _parameter(slope_ptr, population, c, N, C, SLOPES, 0, inside)
    offset = _parameter(offset_ptr, population, c, N, C, SLOPES, 0, inside)
    if dy_ptr is not None:
        scale = _parameter(scale_ptr, population, c, N, C, SCALES, 0, inside)
    for i in tl.range(low, high, num_stages=STAGES):
        n = population + (low + high - 1 - i if REVERSED else i)
        x = tl.load(x_ptr + n * x_sample * UNIT + first + q, mask=inside, other=0.0).to(tl.float32)
        out = slope * (x - pivot) + offset
        if dy_ptr is not None:
            if dy_sample is None:
                dy = tl.load(dy_ptr + n * x_sample * UNIT + first + q, mask=inside, other=0.0)
            elif DY_INNER:
                dy = tl.load(dy_ptr + n * dy_sample * DY_UNIT + first + q, mask=inside, other=0.0)
            else:
                dy = tl.load(dy_ptr + n * dy_sample * DY_UNIT)
            out += scale * dy.to(tl.float32)
        tl.store(out_ptr + n * total + first + q, out.to(out_ptr.dtype.element_ty), mask=inside)
