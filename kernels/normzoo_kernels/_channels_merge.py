"""What adds up the parts of a statistic, always in the same order: moments by Chan's formula on differences of
pivots, sums plainly."""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import rebased


@triton.jit(do_not_specialize=["size", "parts"])
def merge_moments(part_ptr, pivot_ptr, delta_ptr, m2_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` moments, each of `parts` <= P parts."""
    part = tl.arange(0, P)[:, None]
    block = tl.program_id(0)
    entry = tl.cast(block, tl.int64) * E + tl.arange(0, E)[None, :]
    inside = (part < parts) & (entry < size)
    at = part_ptr + part * tl.cast(size, tl.int64) + entry
    array = tl.cast(size, tl.int64) * parts
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
    tl.store(pivot_ptr + entry, mean, mask=entry < size)
    tl.store(delta_ptr + entry, left, mask=entry < size)
    tl.store(m2_ptr + entry, m2, mask=entry < size)


@triton.jit(do_not_specialize=["size", "parts"])
def merge_sums(part_ptr, dy_sum_ptr, dyx_sum_ptr, size, parts, P: tl.constexpr, E: tl.constexpr):
    """`size` pairs of sums, each of `parts` <= P parts."""
    part = tl.arange(0, P)[:, None]
    block = tl.program_id(0)
    entry = tl.cast(block, tl.int64) * E + tl.arange(0, E)[None, :]
    inside = (part < parts) & (entry < size)
    at = part_ptr + part * tl.cast(size, tl.int64) + entry
    dy = tl.load(at, mask=inside, other=0.0)
    dyx = tl.load(at + tl.cast(size, tl.int64) * parts, mask=inside, other=0.0)
    tl.store(dy_sum_ptr + entry, tl.sum(dy, axis=0)[None, :], mask=entry < size)
    tl.store(dyx_sum_ptr + entry, tl.sum(dyx, axis=0)[None, :], mask=entry < size)


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
