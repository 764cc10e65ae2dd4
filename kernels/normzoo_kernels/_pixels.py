"""A map whose scale and shift belong to the pixels, the same for all channels, and its gradients.

A tile is [CB, L] as in `_pooling.py`: CB channels at L positions of a sample, planes or TOKENS. A program goes
through all channels of its positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import offsets, sizes


@triton.jit
def _place(S, L: tl.constexpr):
    """(sample, positions [1, L]) of this program."""
    blocks = tl.cdiv(S, L)
    job = tl.program_id(0)
    n = tl.cast(job // blocks, tl.int64)
    return n, tl.cast(job % blocks, tl.int64) * L + tl.arange(0, L)[None, :]


@triton.jit(do_not_specialize=["C", "S", "x_sample", "x_step"])
def pixel_map(
    x_ptr, scale_ptr, shift_ptr, y_ptr, C, S, x_sample, x_step,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, CB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x (1 + scale) + shift, laid out like x, which is dense."""
    C, S = sizes(C, S, UNIT, TOKENS)
    n, s = _place(S, L)
    scale = 1.0 + tl.load(scale_ptr + n * S + s, mask=s < S, other=0.0)
    shift = tl.load(shift_ptr + n * S + s, mask=s < S, other=0.0)
    for i in tl.range(0, tl.cdiv(C, CB), num_stages=STAGES):
        c = tl.cast(i, tl.int64) * CB + tl.arange(0, CB)[:, None]
        at = offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS)
        there = (c < C) & (s < S)
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (x * scale + shift).to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["C", "S", "x_sample", "x_step", "dy_sample", "dy_step"])
def pixel_map_grads(
    dy_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr, dshift_ptr, C, S, x_sample, x_step, dy_sample, dy_step,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    CB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and the gradients of scale and shift, summed over the channels."""
    C, S = sizes(C, S, UNIT, TOKENS)
    n, s = _place(S, L)
    scale = 1.0 + tl.load(scale_ptr + n * S + s, mask=s < S, other=0.0)
    dscale = tl.zeros([CB, L], tl.float32)
    dshift = tl.zeros([CB, L], tl.float32)
    for i in tl.range(0, tl.cdiv(C, CB), num_stages=STAGES):
        c = tl.cast(i, tl.int64) * CB + tl.arange(0, CB)[:, None]
        at = offsets(n, c, s, x_sample, x_step, UNIT, 1, TOKENS)
        there = (c < C) & (s < S)
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        dy_at = at
        if dy_sample is not None:
            dy_at = offsets(n, c, s, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS)
        dy = tl.load(dy_ptr + dy_at, mask=there, other=0.0).to(tl.float32)
        dscale += dy * x
        dshift += dy
        tl.store(dx_ptr + at, (dy * scale).to(dx_ptr.dtype.element_ty), mask=there)
    tl.store(dscale_ptr + n * S + s, tl.sum(dscale, axis=0)[None, :], mask=s < S)
    tl.store(dshift_ptr + n * S + s, tl.sum(dshift, axis=0)[None, :], mask=s < S)
