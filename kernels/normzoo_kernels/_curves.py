"""Maps of the channel engine that are no affine ones: y from x, dx from dy and x, and the sums between them.

    CURVE "bounded"   y = scale * x / m + offset, m = max(bound, line), line = slope * x + level
          "swish"     y = scale * x * sigmoid(slope * x) + offset

dx is scale * dy * rise + tilt * (x - pivot) + offset, where rise is the derivative at x of what is scaled; the
last two terms come through the statistics and are left out where there is no pivot. The glossary is that of
`_channels.py`; every sample is a population.

LIES holds two bits for each of scale, slope, bound, level, offset, pivot and tilt, in this order: whether it is
0 one number for all, 1 one a channel, 2 one a channel of each sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._channels import columns, entries, gradient, offsets, sizes, sum_pair, work_of
from ._channels_map import flat_work_of


@triton.jit
def _parameter(ptr, n, c, C, inside, LIES: tl.constexpr, PLACE: tl.constexpr):
    """A parameter of the map, or 0 where there is none; 1 outside, so that nothing is divided by 0 there."""
    KIND: tl.constexpr = (LIES >> (2 * PLACE)) & 3
    if ptr is None:
        return 0.0
    elif KIND == 0:
        return tl.load(ptr)
    elif KIND == 1:
        return tl.load(ptr + c, mask=inside, other=1.0)
    else:
        return tl.load(ptr + n * C + c, mask=inside, other=1.0)


@triton.jit
def _gates(z):
    """sigmoid(z) and sigmoid(-z), which neither overflow nor cancel."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * r, r), tl.where(z < 0.0, r, e * r)


@triton.jit
def _bounded(line, bound):
    """(m, how much of it is the line): 1, 0, or a half where both meet."""
    beyond = tl.where(line > bound, 1.0, tl.where(line == bound, 0.5, 0.0))
    return tl.maximum(line, bound, propagate_nan=tl.PropagateNan.ALL), beyond


@triton.jit
def _curve(x, slope, bound, level, CURVE: tl.constexpr):
    if CURVE == "swish":
        gate, _rest = _gates(slope * x)
        return x * gate
    else:
        m, _beyond = _bounded(slope * x + level, bound)
        return x / m


@triton.jit
def _rise(x, slope, bound, level, CURVE: tl.constexpr):
    """The derivative of `_curve`. Of the line, m - slope * x is the level, without cancellation."""
    if CURVE == "swish":
        z = slope * x
        gate, rest = _gates(z)
        return gate * (1.0 + z * rest)
    else:
        line = slope * x + level
        m, _beyond = _bounded(line, bound)
        top = tl.where(line > bound, level, tl.where(line == bound, 0.5 * level + 0.5 * bound, bound))
        return top / m / m


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def curve_map(
    x_ptr, dy_ptr, scale_ptr, slope_ptr, bound_ptr, level_ptr, offset_ptr, pivot_ptr, tilt_ptr, out_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    CURVE: tl.constexpr, LIES: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles and parts as in the statistics. y without dy_ptr, else dx."""
    C, S = sizes(C, S, UNIT, TOKENS)
    _part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L
    )  # fmt: skip
    scale = _parameter(scale_ptr, population, c, C, c < C, LIES, 0)
    slope = _parameter(slope_ptr, population, c, C, c < C, LIES, 1)
    bound = _parameter(bound_ptr, population, c, C, c < C, LIES, 2)
    level = _parameter(level_ptr, population, c, C, c < C, LIES, 3)
    offset = _parameter(offset_ptr, population, c, C, c < C, LIES, 4)
    pivot = _parameter(pivot_ptr, population, c, C, c < C, LIES, 5)
    tilt = _parameter(tilt_ptr, population, c, C, c < C, LIES, 6)
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, valid, _ = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, 0, NB, L)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if dy_ptr is None:
            out = scale * _curve(x, slope, bound, level, CURVE) + offset
        else:
            dy = gradient(
                dy_ptr, n, c, s, here, at, valid, N, C, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS
            )  # fmt: skip
            out = scale * dy * _rise(x, slope, bound, level, CURVE)
            if pivot_ptr is not None:
                out += tilt * (x - pivot) + offset
        to = offsets(n, c, s, tl.cast(C, tl.int64) * S, C if TOKENS else S, 1, 1, TOKENS)
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N", "S", "total", "x_sample", "dy_sample", "parts"])
def curve_map_flat(
    x_ptr, dy_ptr, scale_ptr, slope_ptr, bound_ptr, level_ptr, offset_ptr, pivot_ptr, tilt_ptr, out_ptr,
    N, S, total, x_sample, dy_sample, parts,
    CURVE: tl.constexpr, LIES: tl.constexpr,
    UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr,
    PER_SAMPLE: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for samples whose planes lie side by side but start on no vector, as in `_channels_map.py`."""
    total = tl.cast(total, tl.int64) * UNIT
    C = total // S
    n, c, first, inside, _low, _high = flat_work_of(N, S, total, parts, UNIT, PER_SAMPLE, B)
    q = tl.arange(0, B)
    scale = _parameter(scale_ptr, n, c, C, inside, LIES, 0)
    slope = _parameter(slope_ptr, n, c, C, inside, LIES, 1)
    bound = _parameter(bound_ptr, n, c, C, inside, LIES, 2)
    level = _parameter(level_ptr, n, c, C, inside, LIES, 3)
    offset = _parameter(offset_ptr, n, c, C, inside, LIES, 4)
    x = tl.load(x_ptr + n * x_sample * UNIT + first + q, mask=inside, other=0.0).to(tl.float32)
    if dy_ptr is None:
        out = scale * _curve(x, slope, bound, level, CURVE) + offset
    else:
        if dy_sample is None:
            dy = tl.load(dy_ptr + n * x_sample * UNIT + first + q, mask=inside, other=0.0)
        elif DY_INNER:
            dy = tl.load(dy_ptr + n * dy_sample * DY_UNIT + first + q, mask=inside, other=0.0)
        else:
            dy = tl.load(dy_ptr + n * dy_sample * DY_UNIT)
        out = scale * dy.to(tl.float32) * _rise(x, slope, bound, level, CURVE)
        if pivot_ptr is not None:
            pivot = _parameter(pivot_ptr, n, c, C, inside, LIES, 5)
            tilt = _parameter(tilt_ptr, n, c, C, inside, LIES, 6)
            out += tilt * (x - pivot) + offset
    tl.store(out_ptr + n * total + first + q, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def curve_sums(
    x_ptr, dy_ptr, scale_ptr, slope_ptr, bound_ptr, level_ptr, sum_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    CURVE: tl.constexpr, LIES: tl.constexpr,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr, V: tl.constexpr,
    PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters: of scale, bound, slope, level and offset, (parts, 5, N, C), or of scale,
    slope and offset, (parts, 3, N, C)."""
    C, S = sizes(C, S, UNIT, TOKENS)
    part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L
    )  # fmt: skip
    scale = _parameter(scale_ptr, population, c, C, c < C, LIES, 0)
    slope = _parameter(slope_ptr, population, c, C, c < C, LIES, 1)
    bound = _parameter(bound_ptr, population, c, C, c < C, LIES, 2)
    level = _parameter(level_ptr, population, c, C, c < C, LIES, 3)
    of_scale = tl.zeros([CB, NB * L], tl.float32)
    of_slope = tl.zeros([CB, NB * L], tl.float32)
    of_shift = tl.zeros([CB, NB * L], tl.float32)
    if CURVE == "bounded":
        of_bound = tl.zeros([CB, NB * L], tl.float32)
        of_level = tl.zeros([CB, NB * L], tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, touch, valid = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, V, NB, L)
        x = tl.load(x_ptr + at, mask=touch, other=0.0).to(tl.float32)
        dy = gradient(
            dy_ptr, n, c, s, here, at, touch, N, C, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS
        )  # fmt: skip
        if V or dy_sample is not None:  # else all that is not valid was loaded as zero
            dy = tl.where(valid, dy, 0.0)
            x = tl.where(valid, x, 0.0)
        of_shift += dy
        if CURVE == "swish":
            gate, rest = _gates(slope * x)
            pull = dy * (x * gate)
            of_scale += pull
            of_slope += pull * (x * rest)  # neither factor overflows
        else:
            m, beyond = _bounded(slope * x + level, bound)
            m = tl.where(valid, m, 1.0)  # a map without a bound may divide by 0 there
            r = 1.0 / m
            dyr = dy * r
            pull = dyr * (x * r)
            of_line = pull * beyond
            of_scale += dyr * x
            of_bound += pull - of_line
            of_level += of_line
            of_slope += of_line * x
    size = tl.cast(N, tl.int64) * C
    at = part * size + population * C + c
    if CURVE == "swish":
        at += part * 2 * size
        of_scale, of_slope = sum_pair(of_scale, of_slope)
        tl.store(sum_ptr + at, of_scale, mask=c < C)
        tl.store(sum_ptr + at + size, scale * of_slope, mask=c < C)
        tl.store(sum_ptr + at + 2 * size, tl.sum(of_shift, axis=1)[:, None], mask=c < C)
    else:
        at += part * 4 * size
        of_scale, of_shift = sum_pair(of_scale, of_shift)
        of_bound, of_level = sum_pair(of_bound, of_level)
        of_slope = tl.sum(of_slope, axis=1)[:, None]
        tl.store(sum_ptr + at, of_scale, mask=c < C)
        tl.store(sum_ptr + at + size, -scale * of_bound, mask=c < C)
        tl.store(sum_ptr + at + 2 * size, -scale * of_slope, mask=c < C)
        tl.store(sum_ptr + at + 3 * size, -scale * of_level, mask=c < C)
        tl.store(sum_ptr + at + 4 * size, of_shift, mask=c < C)
