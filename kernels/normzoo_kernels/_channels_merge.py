"""What adds up the parts of a statistic, always in the same order: moments by Chan's formula on differences of
pivots, sums plainly."""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import rebased


@triton.jit
def added_moments(part_ptr, entry, size, parts, P: tl.constexpr):
    """(pivot, delta, m2) of the entries [1, E], each of `parts` <= P parts."""
    part = tl.arange(0, P)[:, None]
    inside = (part < parts) & (entry < size)
    size = tl.cast(size, tl.int64)
    at = part_ptr + part * size + entry
    array = size * parts
    count = tl.load(at, mask=inside, other=0.0)
    pivot = tl.load(at + array, mask=inside, other=0.0)
    delta = tl.load(at + 2 * array, mask=inside, other=0.0)
    m2 = tl.load(at + 3 * array, mask=inside, other=0.0)
    total = tl.sum(count, axis=0)[None, :]
    weight = count / tl.maximum(total, 1.0)
    mean = tl.sum(weight * pivot, axis=0)[None, :]
    gap = tl.where(count > 0.0, (pivot - mean) + delta, 0.0)
    left = tl.sum(weight * gap, axis=0)[None, :]
    m2 = tl.sum(m2 + count * (gap - left) * (gap - left), axis=0)[None, :]
    mean, left = rebased(mean, left)
    return mean, left, m2


@triton.jit
def added_sums(part_ptr, entry, size, parts, P: tl.constexpr):
    """Two sums of the entries [1, E], each of `parts` <= P parts."""
    part = tl.arange(0, P)[:, None]
    inside = (part < parts) & (entry < size)
    size = tl.cast(size, tl.int64)
    at = part_ptr + part * size + entry
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + size * parts, mask=inside, other=0.0)
    return tl.sum(first, axis=0)[None, :], tl.sum(second, axis=0)[None, :]


@triton.jit(do_not_specialize=["size", "parts"])
def merge_moments(part_ptr, pivot_ptr, delta_ptr, m2_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` moments, each of `parts` <= P parts."""
    entry = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)[None, :]
    pivot, delta, m2 = added_moments(part_ptr, entry, size, parts, P)
    tl.store(pivot_ptr + entry, pivot, mask=entry < size)
    tl.store(delta_ptr + entry, delta, mask=entry < size)
    tl.store(m2_ptr + entry, m2, mask=entry < size)


@triton.jit(do_not_specialize=["size", "parts"])
def merge_sums(part_ptr, dy_sum_ptr, dyx_sum_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` pairs of sums, each of `parts` <= P parts."""
    entry = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)[None, :]
    dy, dyx = added_sums(part_ptr, entry, size, parts, P)
    tl.store(dy_sum_ptr + entry, dy, mask=entry < size)
    tl.store(dyx_sum_ptr + entry, dyx, mask=entry < size)


@triton.jit(do_not_specialize=["size", "parts"])
def merge_rows(part_ptr, out_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` sums, each of `parts` <= P parts."""
    part = tl.arange(0, P)[:, None]
    block = tl.program_id(0)
    entry = tl.cast(block, tl.int64) * E + tl.arange(0, E)[None, :]
    found = tl.load(
        part_ptr + part * tl.cast(size, tl.int64) + entry, mask=(part < parts) & (entry < size), other=0.0
    )
    tl.store(out_ptr + entry, tl.sum(found, axis=0)[None, :], mask=entry < size)
