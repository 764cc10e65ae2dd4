"""Moments of the two regions of a mask, put together from those of tiles by Chan's formula."""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, entries, rebased, region_of, sizes, store_moments, sum_pair, work_of
from ._channels_merge import added_moments


@triton.jit
def _join(count, pivot, delta, m2, k, mean, left, square):
    """Moments of two sets: pivot and delta count from the larger one, so the smaller, which may lie far off,
    costs them no digits."""
    total = count + k
    ours = count >= k
    gap = tl.where(ours, (mean - pivot) + (left - delta), (pivot - mean) + (delta - left))
    weight = tl.where(ours, k, count) / tl.maximum(total, 1.0)
    apart = tl.where(weight > 0.0, gap, 0.0)  # a region not met so far has no distance
    m2 += square + apart * apart * weight * tl.where(ours, count, k)
    delta = tl.where(ours, delta, left) + apart * weight
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
    x_ptr, mask_ptr, pivot_ptr, delta_ptr, m2_ptr, count_ptr, part_ptr, N, C, S, x_sample, x_step, parts,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of both regions. A region may begin anywhere, with few entries, so that no slab stands for it: every tile
    counts from its own mean."""
    C, S = sizes(C, S, UNIT, TOKENS)
    part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L
    )  # fmt: skip
    populations = N if PER_SAMPLE else 1
    zero = tl.zeros([CB, 1], tl.float32)
    count0, pivot0, delta0, square0 = zero, zero, zero, zero
    count1, pivot1, delta1, square1 = zero, zero, zero, zero
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, touch, valid = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, V, NB, L)
        x = tl.load(x_ptr + at, mask=touch, other=0.0).to(tl.float32)
        region = region_of(mask_ptr, n, s, here, S)
        count0, pivot0, delta0, square0 = _with(count0, pivot0, delta0, square0, x, valid & (region == 0))
        count1, pivot1, delta1, square1 = _with(count1, pivot1, delta1, square1, x, valid & region)
    size = tl.cast(populations, tl.int64) * C
    at = population * C + c
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
    if count_ptr is not None:
        tl.store(count_ptr + at, count0, mask=c < C)
        tl.store(count_ptr + size + at, count1, mask=c < C)


@triton.jit(do_not_specialize=["size", "parts"])
def merge_regions(
    part_ptr, pivot_ptr, delta_ptr, m2_ptr, count_ptr, size, parts, P: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """As `merge_moments`, and how many values there were."""
    entry = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)[None, :]
    there = entry < size
    pivot, delta, m2 = added_moments(part_ptr, entry, size, parts, P)
    part = tl.arange(0, P)[:, None]
    at = part * tl.cast(size, tl.int64) + entry
    count = tl.sum(tl.load(part_ptr + at, mask=(part < parts) & there, other=0.0), axis=0)[None, :]
    tl.store(pivot_ptr + entry, pivot, mask=there)
    tl.store(delta_ptr + entry, delta, mask=there)
    tl.store(m2_ptr + entry, m2, mask=there)
    tl.store(count_ptr + entry, count, mask=there)
