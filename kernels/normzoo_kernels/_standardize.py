"""What lies between the passes of batch, group and instance norm, and its gradient: numbers of channels, not x.

y = w * (x - mean) * r + b with r = 1 / sqrt(var + EPS). An entry is (sample, channel), or a channel where the
statistics are those of the batch; arrays of float32 numbers have one of each entry.

    stats   pivot; delta, the mean of the entry's set less the pivot; r; where each entry is a set, its mean and
            unbiased variance; scale and shift of y = (x - pivot) * scale + shift. Before, the second is delta
            of the entry alone and the fifth its m2
    found   the sums of dy and of dy * (x - pivot); scale, slope and offset of
            dx = scale * dy + slope * (x - pivot) + offset
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels_merge import added_moments, added_sums


@triton.jit
def _parameter(ptr, c, inside, otherwise: tl.constexpr):
    if ptr is None:
        return otherwise
    else:
        return tl.load(ptr + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_map(stats_ptr, w_ptr, b_ptr, at, c, inside, size, delta, r):
    scale = _parameter(w_ptr, c, inside, 1.0) * r
    tl.store(stats_ptr + size + at, delta, mask=inside)
    tl.store(stats_ptr + 2 * size + at, r, mask=inside)
    tl.store(stats_ptr + 5 * size + at, scale, mask=inside)
    tl.store(stats_ptr + 6 * size + at, _parameter(b_ptr, c, inside, 0.0) - delta * scale, mask=inside)


@triton.jit(do_not_specialize=["size", "C", "count", "parts"])
def channel_standardize(
    part_ptr, stats_ptr, w_ptr, b_ptr, size, C, count, parts,
    EPS: tl.constexpr, P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A set an entry, of `count` values, in `parts` <= P parts, or without part_ptr as one in `stats`."""
    at = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)[None, :]
    inside = at < size
    size = tl.cast(size, tl.int64)
    if part_ptr is not None:
        pivot, delta, m2 = added_moments(part_ptr, at, size, parts, P)
        tl.store(stats_ptr + at, pivot, mask=inside)
    else:
        pivot = tl.load(stats_ptr + at, mask=inside, other=0.0)
        delta = tl.load(stats_ptr + size + at, mask=inside, other=0.0)
        m2 = tl.load(stats_ptr + 4 * size + at, mask=inside, other=0.0)
    n = tl.cast(count, tl.float32)
    _store_map(stats_ptr, w_ptr, b_ptr, at, at % C, inside, size, delta, tl.rsqrt(m2 / n + EPS))
    tl.store(stats_ptr + 3 * size + at, pivot + delta, mask=inside)
    tl.store(stats_ptr + 4 * size + at, m2 / tl.maximum(n - 1.0, 1.0), mask=inside)


@triton.jit
def _groups_of(C, width, G: tl.constexpr, W: tl.constexpr):
    """(sample, first channel of the groups of this program, whether there are such groups, lanes)."""
    groups = C // width
    blocks = tl.cdiv(groups, G)
    group = tl.program_id(0) % blocks * G + tl.arange(0, G)[:, None]
    return (
        tl.cast(tl.program_id(0) // blocks, tl.int64),
        group * width,
        group < groups,
        tl.arange(0, W)[None, :],
    )


@triton.jit
def _away(pivot_ptr, c, inside, size, mean):
    """Means of channels, less `mean`; 0 outside."""
    pivot = tl.load(pivot_ptr + c, mask=inside, other=0.0)
    delta = tl.load(pivot_ptr + size + c, mask=inside, other=0.0)
    return tl.where(inside, (pivot - mean) + delta, 0.0)


@triton.jit(do_not_specialize=["N", "C", "count", "width"])
def group_standardize(
    stats_ptr, w_ptr, b_ptr, N, C, count, width,
    EPS: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A set a group of `width` channels of a sample, of `count` values each. A program has G groups, W channels
    at a time, which it merges by the formula of Chan, Golub and LeVeque."""
    size = tl.cast(N, tl.int64) * C
    n, base, there, lane = _groups_of(C, width, G, W)
    stats_ptr += n * C
    values = tl.cast(count, tl.float32) * tl.cast(width, tl.float32)
    total = tl.zeros([G, W], tl.float32)
    for start in tl.range(0, width, W):
        inside = there & (start + lane < width)
        total += tl.load(stats_ptr + base + start + lane, mask=inside, other=0.0)
    mean = tl.sum(total, axis=1)[:, None] / width
    total = tl.zeros([G, W], tl.float32)
    for start in tl.range(0, width, W):
        total += _away(stats_ptr, base + start + lane, there & (start + lane < width), size, mean)
    left = tl.sum(total, axis=1)[:, None] / width
    total = tl.zeros([G, W], tl.float32)
    for start in tl.range(0, width, W):
        c, inside = base + start + lane, there & (start + lane < width)
        gap = tl.where(inside, _away(stats_ptr, c, inside, size, mean) - left, 0.0)
        total += tl.load(stats_ptr + 4 * size + c, mask=inside, other=0.0) + count * (gap * gap)
    m2 = tl.sum(total, axis=1)[:, None]
    r = tl.rsqrt(m2 / values + EPS)
    for start in tl.range(0, width, W):
        c, inside = base + start + lane, there & (start + lane < width)
        delta = (mean - tl.load(stats_ptr + c, mask=inside, other=0.0)) + left
        _store_map(stats_ptr, w_ptr, b_ptr, c, c, inside, size, delta, r)


@triton.jit(do_not_specialize=["C", "count", "parts"])
def batch_standardize_grad(
    part_ptr, found_ptr, stats_ptr, w_ptr, dw_ptr, db_ptr, C, count, parts,
    P: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """From the sums of dy and of dy * (x - pivot), in parts or as one in `found`."""
    c = tl.program_id(0) * E + tl.arange(0, E)[None, :]
    inside = c < C
    if part_ptr is not None:
        s1, s2 = added_sums(part_ptr, c, C, parts, P)
    else:
        s1 = tl.load(found_ptr + c, mask=inside, other=0.0)
        s2 = tl.load(found_ptr + C + c, mask=inside, other=0.0)
    delta = tl.load(stats_ptr + C + c, mask=inside, other=0.0)
    r = tl.load(stats_ptr + 2 * C + c, mask=inside, other=0.0)
    dr = s2 - delta * s1  # the sum of dy * (x - mean)
    scale = _parameter(w_ptr, c, inside, 1.0) * r
    slope = -scale * r * r * dr / count
    tl.store(found_ptr + 2 * C + c, scale, mask=inside)
    tl.store(found_ptr + 3 * C + c, slope, mask=inside)
    tl.store(found_ptr + 4 * C + c, -scale * s1 / count - slope * delta, mask=inside)
    if dw_ptr is not None:
        tl.store(dw_ptr + c, (dr * r).to(dw_ptr.dtype.element_ty), mask=inside)
    if db_ptr is not None:
        tl.store(db_ptr + c, s1.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sums_of(found_ptr, stats_ptr, c, inside, size):
    """(sum of dy, sum of dy * (x - mean), delta, r) of entries."""
    s1 = tl.load(found_ptr + c, mask=inside, other=0.0)
    s2 = tl.load(found_ptr + size + c, mask=inside, other=0.0)
    delta = tl.load(stats_ptr + size + c, mask=inside, other=0.0)
    return s1, s2 - delta * s1, delta, tl.load(stats_ptr + 2 * size + c, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N", "C", "count", "width", "maps"])
def group_standardize_grad(
    found_ptr, stats_ptr, w_ptr, dw_ptr, db_ptr, N, C, count, width, maps,
    G: tl.constexpr, W: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The first `maps` programs have G groups of a sample each, the others E channels of all samples, R at a
    time, whose parameters get their gradient."""
    size = tl.cast(N, tl.int64) * C
    if tl.program_id(0) < maps:
        n, base, there, lane = _groups_of(C, width, G, W)
        found_ptr += n * C
        stats_ptr += n * C
        of_mean = tl.zeros([G, W], tl.float32)
        of_r = tl.zeros([G, W], tl.float32)
        for start in tl.range(0, width, W):
            c, inside = base + start + lane, there & (start + lane < width)
            s1, dr, _delta, _r = _sums_of(found_ptr, stats_ptr, c, inside, size)
            w = _parameter(w_ptr, c, inside, 1.0)
            of_mean += w * s1
            of_r += w * dr
        values = tl.cast(count, tl.float32) * tl.cast(width, tl.float32)
        of_mean = tl.sum(of_mean, axis=1)[:, None] / values
        of_r = tl.sum(of_r, axis=1)[:, None] / values
        for start in tl.range(0, width, W):
            c, inside = base + start + lane, there & (start + lane < width)
            _s1, _dr, delta, r = _sums_of(found_ptr, stats_ptr, c, inside, size)
            slope = -r * r * r * of_r
            tl.store(found_ptr + 2 * size + c, _parameter(w_ptr, c, inside, 1.0) * r, mask=inside)
            tl.store(found_ptr + 3 * size + c, slope, mask=inside)
            tl.store(found_ptr + 4 * size + c, -r * of_mean - slope * delta, mask=inside)
    else:
        c = (tl.program_id(0) - maps) * E + tl.arange(0, E)[None, :]
        row = tl.arange(0, R)[:, None]
        dw = tl.zeros([R, E], tl.float32)
        db = tl.zeros([R, E], tl.float32)
        for first in tl.range(0, N, R):
            at = (first + row).to(tl.int64) * C + c
            s1, dr, _delta, r = _sums_of(found_ptr, stats_ptr, at, (first + row < N) & (c < C), size)
            dw += dr * r
            db += s1
        if dw_ptr is not None:
            tl.store(dw_ptr + c, tl.sum(dw, axis=0)[None, :].to(dw_ptr.dtype.element_ty), mask=c < C)
        if db_ptr is not None:
            tl.store(db_ptr + c, tl.sum(db, axis=0)[None, :].to(db_ptr.dtype.element_ty), mask=c < C)
