"""The passes of the running engine: one sweep over x forward, one over dy and x backward.

Tiles, units, parts and jobs are those of `_channels.py`, with the whole batch for a population. A group is
GROUP channels that every position scales to a root mean square of one, W is that as a power of two, and a block
holds whole groups. GROUP 0: nothing is scaled, and u is x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, entries_before, gradient, job_of, offsets, region_of, sizes, span_of, tiles_of


@triton.jit
def _work(
    N, C, S, parts, GROUP: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr,
    CHUNKED: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(part, channels, whether there are such, span of a chunk, first tile, end of tiles) of this program."""
    tiles = tiles_of(N, S, False, CHUNKED, NB, L)
    per = tl.cdiv(tiles, parts)
    blocks = tl.cdiv(C // GROUP, CB // W) if GROUP else tl.cdiv(C, CB)
    part, _population, block = job_of(parts, blocks)
    j = tl.arange(0, CB)[:, None]
    c = block * CB + j
    there = c < C
    if GROUP != 0 and GROUP != W:  # channels of a block are not side by side
        c = (block * (CB // W) + j // W) * GROUP + j % W
        there = (j % W < GROUP) & (c < C)
    low = part * per
    return part, c, there, span_of(S, 1 if TOKENS else UNIT, L), low, tl.minimum(low + per, tiles)


@triton.jit
def _over_group(a, GROUP: tl.constexpr, W: tl.constexpr, CB: tl.constexpr, Q: tl.constexpr):
    """The mean over the group, at all of its channels."""
    if CB == W:
        return tl.sum(a, axis=0)[None, :] / GROUP
    else:
        mean = tl.sum(tl.reshape(a, [CB // W, W, Q]), axis=1, keep_dims=True) / GROUP
        return tl.reshape(tl.broadcast_to(mean, [CB // W, W, Q]), [CB, Q])


@triton.jit
def _row(ptr, c, there, otherwise: tl.constexpr):
    """A parameter of the channels; without one, what stands for it."""
    if ptr is None:
        return otherwise
    else:
        return tl.load(ptr + c, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(ptr, part, size, at, inside, first, second):
    """Into the two rows of this part."""
    ptr += tl.cast(part, tl.int64) * 2 * size
    tl.store(ptr + at, first, mask=inside)
    tl.store(ptr + size + at, second, mask=inside)


@triton.jit
def _store_counts(sum_ptr, pad_ptr, first, end, part, parts, size):
    """Of the positions of this part: how many are no padding, and how many there are."""
    if tl.program_id(0) < parts:  # the first block of channels
        left = tl.zeros([1024], tl.float32)
        for start in tl.range(first, end, 1024):
            at = start + tl.arange(0, 1024)
            left += tl.where(tl.load(pad_ptr + at, mask=at < end, other=1) == 0, 1.0, 0.0)
        _store_pair(sum_ptr, part, size, size - 1, True, tl.sum(left, axis=0), tl.cast(end - first, tl.float32))


@triton.jit
def _commit(
    rows_ptr, flags_ptr, mean_ptr, window_ptr, iters_ptr, outliers_ptr, skipped_ptr, part, c, there, C,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Writes the state that a rule made, which lies in the last two of its rows and in its flags.

    A program of the first part writes the channels it has, the first program the counters. Nothing of the same
    launch reads what is written here.
    """
    if part == 0:
        stored = tl.load(flags_ptr + 1)
        mine = there & (stored != 0)
        if window_ptr is not None:
            slot = (tl.load(flags_ptr) + 1) % WINDOW
            entry = tl.load(rows_ptr + 2 * C + c, mask=mine, other=0.0)
            tl.store(window_ptr + slot * C + c, entry, mask=mine)
        mean = tl.load(rows_ptr + 3 * C + c, mask=mine, other=0.0)
        tl.store(mean_ptr + c, mean, mask=mine)
        once = tl.program_id(0) == 0
        if iters_ptr is not None:
            tl.store(iters_ptr, tl.load(iters_ptr) + stored, mask=once)
        if outliers_ptr is not None:
            tl.store(outliers_ptr, tl.load(outliers_ptr) + tl.load(flags_ptr + 3), mask=once)
        if skipped_ptr is not None:
            tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.load(flags_ptr + 4), mask=once)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "parts"])
def running_forward(
    x_ptr, pad_ptr, d_ptr, w_ptr, b_ptr, iters_ptr, y_ptr, sum_ptr,
    flags_ptr, mean_ptr, window_ptr, steps_ptr, outliers_ptr, skipped_ptr,
    N, C, S, x_sample, x_step, parts,
    WARMUP: tl.constexpr, EPS: tl.constexpr, WINDOW: tl.constexpr, GROUP_EPS: tl.constexpr,
    GROUP: tl.constexpr, W: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = w * u / sqrt(d + EPS) + b, or w * u * d + b without EPS; into sum_ptr (parts, 2, C + 1) the sums of
    u * u and last the positions, first those of what is no padding.

    With iters, the phase is chosen here: a sweep that sums stores y only after the warm-up, when d is known
    before, and one that does not sum writes y only in the warm-up. With flags, d is the first of the rows of a
    rule, and the state goes where the other pointers say.
    """
    C, S = sizes(C, S, UNIT, TOKENS)
    part, c, there, span, low, high = _work(N, C, S, parts, GROUP, W, TOKENS, UNIT, CHUNKED, CB, NB, L)
    if flags_ptr is not None:
        _commit(
            d_ptr, flags_ptr, mean_ptr, window_ptr, steps_ptr, outliers_ptr, skipped_ptr, part, c, there, C,
            WINDOW,
        )  # fmt: skip
    if pad_ptr is not None:  # before the loop, which has no registers for it
        first = entries_before(low, N, S, span, False, CHUNKED, NB, L)
        end = entries_before(high, N, S, span, False, CHUNKED, NB, L)
        _store_counts(sum_ptr, pad_ptr, first, end, part, parts, tl.cast(C, tl.int64) + 1)
    steady = True
    if iters_ptr is not None:
        steady = tl.load(iters_ptr) >= WARMUP
        if sum_ptr is None:
            high = tl.where(steady, low, high)
    if y_ptr is not None:
        r = tl.load(d_ptr + c, mask=there, other=1.0)
        if EPS is not None:
            r = tl.rsqrt(r + EPS)
        scale = r * _row(w_ptr, c, there, 1.0)
        shift = _row(b_ptr, c, there, 0.0)
    if sum_ptr is not None:
        s1 = tl.zeros([CB, NB * L], tl.float32)
        if pad_ptr is not None:
            s2 = tl.zeros([CB, NB * L], tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, 0, N, S, span, False, CHUNKED, NB, L)
        at = offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS)
        u = tl.load(x_ptr + at, mask=here & there, other=0.0).to(tl.float32)
        if GROUP:
            u *= tl.rsqrt(_over_group(u * u, GROUP, W, CB, NB * L) + GROUP_EPS)
        if y_ptr is not None:
            to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
            inside = here & there
            if sum_ptr is not None and iters_ptr is not None:
                inside = inside & steady
            tl.store(y_ptr + to, (u * scale + shift).to(y_ptr.dtype.element_ty), mask=inside)
        if sum_ptr is not None:
            s1 += u * u
            if pad_ptr is not None:
                s2 += tl.where(region_of(pad_ptr, n, s, here, S), 0.0, u * u)
    if sum_ptr is not None:
        size = tl.cast(C, tl.int64) + 1
        whole = tl.sum(s1, axis=1)[:, None]
        valid = whole
        if pad_ptr is not None:
            valid = tl.sum(s2, axis=1)[:, None]
        _store_pair(sum_ptr, part, size, c, there, valid, whole)
        if pad_ptr is None:
            count = tl.where(part == 0, tl.cast(tl.cast(N, tl.int64) * S, tl.float32), 0.0)
            _store_pair(sum_ptr, part, size, size - 1, tl.program_id(0) < parts, count, count)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def running_backward(
    dy_ptr, x_ptr, rows_ptr, w_ptr, ema_ptr, dx_ptr, sum_ptr, flags_ptr, mean_ptr, window_ptr, skipped_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    RATE: tl.constexpr, WINDOW: tl.constexpr, GROUP_EPS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    CHUNKED: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of x where that of u is a * dy + b * u, and into sum_ptr (parts, 2, C) the sums of dy and of
    dy * u. The rows begin with b and a.

    With ema the two come from it: a is the inverse root that g = w * dy is divided by, b that of u, and the
    correction is RATE * ema. With flags, the state goes where the other pointers say.
    """
    C, S = sizes(C, S, UNIT, TOKENS)
    part, c, there, span, low, high = _work(N, C, S, parts, GROUP, W, TOKENS, UNIT, CHUNKED, CB, NB, L)
    if flags_ptr is not None:
        _commit(
            rows_ptr, flags_ptr, mean_ptr, window_ptr, None, None, skipped_ptr, part, c, there, C, WINDOW
        )  # fmt: skip
    if dx_ptr is None and sum_ptr is None:  # the state is all there is to do
        high = low
    if dx_ptr is not None:
        a = tl.load(rows_ptr + C + c, mask=there, other=0.0)
        b = tl.load(rows_ptr + c, mask=there, other=0.0)
        if ema_ptr is not None:
            b *= -RATE * tl.load(ema_ptr + c, mask=there, other=0.0) * a
            a *= _row(w_ptr, c, there, 1.0)
    if sum_ptr is not None:
        s1 = tl.zeros([CB, NB * L], tl.float32)
        s2 = tl.zeros([CB, NB * L], tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, 0, N, S, span, False, CHUNKED, NB, L)
        at = offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS)
        inside = here & there
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = gradient(
            dy_ptr, n, c, s, here, at, inside, N, C, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS
        )  # fmt: skip
        if dy_sample is not None:  # else all that is not inside was loaded as zero
            dy = tl.where(inside, dy, 0.0)
        if GROUP:
            inverse = tl.rsqrt(_over_group(u * u, GROUP, W, CB, NB * L) + GROUP_EPS)
            u *= inverse
        if sum_ptr is not None:
            s1 += dy
            s2 += dy * u
        if dx_ptr is not None:
            dx = a * dy + b * u
            if GROUP:
                dx = (dx - u * _over_group(dx * u, GROUP, W, CB, NB * L)) * inverse
            to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
            tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if sum_ptr is not None:
        s1, s2 = tl.sum(s1, axis=1)[:, None], tl.sum(s2, axis=1)[:, None]
        _store_pair(sum_ptr, part, tl.cast(C, tl.int64), c, there, s1, s2)
