"""Moments that are put together from those of tiles and of shares, by Chan's formula on differences of
pivots."""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import (
    columns,
    entries,
    job_of,
    rebased,
    region_of,
    sizes,
    span_of,
    store_moments,
    sum_pair,
    tiles_of,
)


@triton.jit
def _join(count, pivot, delta, m2, k, mean, left, square):
    """Moments of two sets: pivot and delta count from the larger one, so the smaller, which may lie far off,
    costs them no digits."""
    total = count + k
    ours = count >= k
    gap = tl.where(ours, (mean - pivot) + (left - delta), (pivot - mean) + (delta - left))
    share = tl.where(ours, k, count) / tl.maximum(total, 1.0)
    apart = tl.where(share > 0.0, gap, 0.0)  # a region not met so far has no distance
    m2 += square + apart * apart * share * tl.where(ours, count, k)
    delta = tl.where(ours, delta, left) + apart * share
    return total, tl.where(ours, pivot, mean), delta, m2


@triton.jit
def _with(count, pivot, delta, m2, x, keep):
    """Moments with those of the entries of the tile x that are to `keep`."""
    k = tl.sum(keep.to(tl.float32), axis=1)[:, None]
    some = tl.maximum(k, 1.0)
    mean = tl.sum(tl.where(keep, x, 0.0), axis=1)[:, None] / some
    x = tl.where(keep, x - mean, 0.0)
    s1, s2 = sum_pair(x, x * x)
    left = s1 / some
    square = s2 - s1 * left
    return _join(count, pivot, delta, m2, k, mean, left, tl.where(square < 0.0, 0.0, square))


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "parts"])
def channel_moments_masked(
    x_ptr, mask_ptr, pivot_ptr, delta_ptr, m2_ptr, part_ptr, N, C, S, x_sample, x_step, parts,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of both regions. A region may begin anywhere, with few entries, so that no slab stands for it: every tile
    counts from its own mean."""
    C, S = sizes(C, S, UNIT, TOKENS)
    tiles = tiles_of(N, S, PER_SAMPLE, CHUNKED, NB, L)
    per, blocks = tl.cdiv(tiles, parts), tl.cdiv(C, CB)
    groups = N if PER_SAMPLE else 1
    span = span_of(S, 1 if TOKENS else UNIT, L)
    part, group, block = job_of(parts, blocks)
    c = block * CB + tl.arange(0, CB)[:, None]
    low = part * per
    zero = tl.zeros([CB, 1], tl.float32)
    count0, pivot0, delta0, square0 = zero, zero, zero, zero
    count1, pivot1, delta1, square1 = zero, zero, zero, zero
    for i in tl.range(low, tl.minimum(low + per, tiles), num_stages=STAGES):
        n, s, here = columns(i, group, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, touch, valid = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, V, NB, L)
        x = tl.load(x_ptr + at, mask=touch, other=0.0).to(tl.float32)
        region = region_of(mask_ptr, n, s, here, S)
        count0, pivot0, delta0, square0 = _with(count0, pivot0, delta0, square0, x, valid & (region == 0))
        count1, pivot1, delta1, square1 = _with(count1, pivot1, delta1, square1, x, valid & region)
    size = tl.cast(groups, tl.int64) * C
    at = group * C + c
    pivot0, delta0 = rebased(pivot0, delta0)
    store_moments(
        pivot_ptr, delta_ptr, m2_ptr, part_ptr,
        at, part, parts, 2 * size, c < C, count0, pivot0, delta0, square0,
    )  # fmt: skip
    pivot1, delta1 = rebased(pivot1, delta1)
    store_moments(
        pivot_ptr, delta_ptr, m2_ptr, part_ptr,
        size + at, part, parts, 2 * size, c < C, count1, pivot1, delta1, square1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "parts"])
def merge_moments(part_ptr, pivot_ptr, delta_ptr, m2_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` moments of `parts` <= P shares each."""
    part = tl.arange(0, P)[:, None]
    block = tl.program_id(0)
    entry = tl.cast(block, tl.int64) * E + tl.arange(0, E)[None, :]
    inside = (part < parts) & (entry < size)
    at = part_ptr + part * tl.cast(size, tl.int64) + entry
    plane = tl.cast(size, tl.int64) * parts
    count = tl.load(at, mask=inside, other=0.0)
    pivot = tl.load(at + plane, mask=inside, other=0.0)
    delta = tl.load(at + 2 * plane, mask=inside, other=0.0)
    m2 = tl.load(at + 3 * plane, mask=inside, other=0.0)
    total = tl.sum(count, axis=0)[None, :]
    share = count / tl.maximum(total, 1.0)
    mean = tl.sum(share * pivot, axis=0)[None, :]
    gap = tl.where(count > 0.0, (pivot - mean) + delta, 0.0)
    left = tl.sum(share * gap, axis=0)[None, :]
    m2 = tl.sum(m2 + count * (gap - left) * (gap - left), axis=0)[None, :]
    mean, left = rebased(mean, left)
    tl.store(pivot_ptr + entry, mean, mask=entry < size)
    tl.store(delta_ptr + entry, left, mask=entry < size)
    tl.store(m2_ptr + entry, m2, mask=entry < size)


@triton.jit(do_not_specialize=["size", "parts"])
def merge_sums(part_ptr, dy_sum_ptr, dyx_sum_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` pairs of sums of `parts` <= P shares each."""
    part = tl.arange(0, P)[:, None]
    block = tl.program_id(0)
    entry = tl.cast(block, tl.int64) * E + tl.arange(0, E)[None, :]
    inside = (part < parts) & (entry < size)
    at = part_ptr + part * tl.cast(size, tl.int64) + entry
    dy = tl.load(at, mask=inside, other=0.0)
    dyx = tl.load(at + tl.cast(size, tl.int64) * parts, mask=inside, other=0.0)
    tl.store(dy_sum_ptr + entry, tl.sum(dy, axis=0)[None, :], mask=entry < size)
    tl.store(dyx_sum_ptr + entry, tl.sum(dyx, axis=0)[None, :], mask=entry < size)
