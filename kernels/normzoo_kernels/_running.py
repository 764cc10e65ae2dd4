"""The passes of the running engine: one sweep over x forward, one over dy and x backward.

Tiles, units, parts and jobs are those of `_channels.py`, with the whole batch for a population. A group is
GROUP channels that every position scales to a root mean square of one, W is that as a power of two, and a block
holds whole groups. GROUP 0: nothing is scaled, and u is x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, gradient, job_of, offsets, region_of, sizes, span_of, store_sums, tiles_of


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


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "parts"])
def running_forward(
    x_ptr, pad_ptr, d_ptr, w_ptr, b_ptr, iters_ptr, y_ptr, valid_sum_ptr, sum_ptr, part_ptr,
    N, C, S, x_sample, x_step, parts,
    WARMUP: tl.constexpr, SUMS: tl.constexpr, EPS: tl.constexpr, GROUP_EPS: tl.constexpr, GROUP: tl.constexpr,
    W: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = w * u / sqrt(d + EPS) + b, or w * u * d + b without EPS, and, with SUMS, the sums of u * u, first
    those of what is no padding.

    With iters, the phase is chosen here: a sweep that sums stores y only after the warm-up, when d is known
    before, and one that does not sum runs only in the warm-up.
    """
    C, S = sizes(C, S, UNIT, TOKENS)
    part, c, there, span, low, high = _work(N, C, S, parts, GROUP, W, TOKENS, UNIT, CHUNKED, CB, NB, L)
    steady = True
    if iters_ptr is not None:
        steady = tl.load(iters_ptr) >= WARMUP
        if not SUMS:
            high = tl.where(steady, low, high)
    if y_ptr is not None:
        r = tl.load(d_ptr + c, mask=there, other=1.0)
        if EPS is not None:
            r = tl.rsqrt(r + EPS)
        scale = r * _row(w_ptr, c, there, 1.0)
        shift = _row(b_ptr, c, there, 0.0)
    if SUMS:
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
            if SUMS and iters_ptr is not None:
                inside = inside & steady
            tl.store(y_ptr + to, (u * scale + shift).to(y_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            s1 += u * u
            if pad_ptr is not None:
                s2 += tl.where(region_of(pad_ptr, n, s, here, S), 0.0, u * u)
    if SUMS:
        whole = tl.sum(s1, axis=1)[:, None]
        valid = whole
        if pad_ptr is not None:
            valid = tl.sum(s2, axis=1)[:, None]
        store_sums(valid_sum_ptr, sum_ptr, part_ptr, c, part, parts, tl.cast(C, tl.int64), there, valid, whole)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def running_backward(
    dy_ptr, x_ptr, a_ptr, b_ptr, w_ptr, ema_ptr, dx_ptr, dy_sum_ptr, dyu_sum_ptr, part_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    RATE: tl.constexpr, SUMS: tl.constexpr, GROUP_EPS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    CHUNKED: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of x where that of u is a * dy + b * u and, with SUMS, the sums of dy and of dy * u.

    With ema the two come from it: a is the inverse root that g = w * dy is divided by, b that of u, and the
    correction is RATE * ema.
    """
    C, S = sizes(C, S, UNIT, TOKENS)
    part, c, there, span, low, high = _work(N, C, S, parts, GROUP, W, TOKENS, UNIT, CHUNKED, CB, NB, L)
    if dx_ptr is not None:
        a = tl.load(a_ptr + c, mask=there, other=0.0)
        b = tl.load(b_ptr + c, mask=there, other=0.0)
        if ema_ptr is not None:
            b *= -RATE * tl.load(ema_ptr + c, mask=there, other=0.0) * a
            a *= _row(w_ptr, c, there, 1.0)
    if SUMS:
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
        if SUMS:
            s1 += dy
            s2 += dy * u
        if dx_ptr is not None:
            dx = a * dy + b * u
            if GROUP:
                dx = (dx - u * _over_group(dx * u, GROUP, W, CB, NB * L)) * inverse
            to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
            tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        s1, s2 = tl.sum(s1, axis=1)[:, None], tl.sum(s2, axis=1)[:, None]
        store_sums(dy_sum_ptr, dyu_sum_ptr, part_ptr, c, part, parts, tl.cast(C, tl.int64), there, s1, s2)
