"""Mean and maximum over the channels at every position, and the gradient of both.

A tile is [CB, L]: CB channels at L positions of a sample, planes or TOKENS as in `_channels.py`. A program goes
through all channels of its positions, and keeps a sum and a maximum for every entry of a tile until the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import offsets, sizes


@triton.jit
def _place(S, L: tl.constexpr):
    """(sample, positions [L]) of this program."""
    blocks = tl.cdiv(S, L)
    job = tl.program_id(0)
    n = tl.cast(job // blocks, tl.int64)
    return n, tl.cast(job % blocks, tl.int64) * L + tl.arange(0, L)


@triton.jit(do_not_specialize=["C", "S", "x_sample", "x_step"])
def channel_pool(
    x_ptr, out_ptr, index_ptr, C, S, x_sample, x_step,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, CB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (N, 2, S), index (N, S): the first channel that has the maximum, or is NaN."""
    C, S = sizes(C, S, UNIT, TOKENS)
    n, s = _place(S, L)
    row = tl.arange(0, CB)[:, None]
    total = tl.zeros([CB, L], tl.float32)
    best = tl.full([CB, L], float("-inf"), tl.float32)
    tile = tl.zeros([CB, L], tl.int32)
    for i in tl.range(0, tl.cdiv(C, CB), num_stages=STAGES):
        c = tl.cast(i, tl.int64) * CB + row
        at = offsets(n, c, s[None, :], x_sample, x_step, UNIT, 1, TOKENS)
        valid = (c < C) & (s < S)[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        total += x
        x = tl.where(valid, x, float("-inf"))
        above = (x > best) | ((x != x) & (best == best))
        best = tl.where(above, x, best)
        tile = tl.where(above, i, tile)
    mean = tl.sum(total, axis=0) / tl.cast(C, tl.float32)
    nan = best != best
    top = tl.max(tl.where(nan, float("-inf"), best), axis=0)
    # NaN come before all others, in the order of their channels.
    c = tile * CB + row
    least = tl.min(tl.where(nan, c + -2147483648, tl.where(best == top[None, :], c, 2147483647)), axis=0)
    top = tl.where(least < 0, float("nan"), top)
    tl.store(out_ptr + 2 * n * S + s, mean, mask=s < S)
    tl.store(out_ptr + (2 * n + 1) * S + s, top, mask=s < S)
    if index_ptr is not None:
        tl.store(index_ptr + n * S + s, tl.where(least < 0, least - -2147483648, least), mask=s < S)


@triton.jit(do_not_specialize=["C", "S"])
def channel_unpool(
    d_ptr, index_ptr, dx_ptr, C, S,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, CB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx from d (N, 2, S), the gradients of mean and maximum."""
    C, S = sizes(C, S, UNIT, TOKENS)
    n, s = _place(S, L)
    share = tl.load(d_ptr + 2 * n * S + s, mask=s < S, other=0.0)[None, :] / tl.cast(C, tl.float32)
    whole = tl.load(d_ptr + (2 * n + 1) * S + s, mask=s < S, other=0.0)[None, :] + share
    index = tl.load(index_ptr + n * S + s, mask=s < S, other=0)[None, :]
    row = tl.arange(0, CB)[:, None]
    for i in tl.range(0, tl.cdiv(C, CB), num_stages=STAGES):
        c = tl.cast(i, tl.int64) * CB + row
        at = offsets(n, c, s[None, :], tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
        dx = tl.where(c == index, whole, share)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=(c < C) & (s < S)[None, :])
