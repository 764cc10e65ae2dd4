"""Parameters that glide from one value to another with the time of a sample, and their gradients.

value = s first + (1 - s) second, with s = sigmoid((1 + w) t + b): (samples, D) from four parameters (D,).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._sets import optional


@triton.jit
def _share(z):
    """(sigmoid of z, of -z)."""
    apart = tl.exp(-tl.abs(z))
    most, least = 1.0 / (1.0 + apart), apart / (1.0 + apart)
    return tl.where(z >= 0.0, most, tl.where(z < 0.0, least, z)), tl.where(z >= 0.0, least, most)


@triton.jit
def _gate(t, w_ptr, b_ptr, d, there):
    return _share(optional(b_ptr, d, there, 0.0) + (1.0 + optional(w_ptr, d, there, 0.0)) * t)


@triton.jit
def _glided(out_ptr, first_ptr, second_ptr, w_ptr, b_ptr, t, at, d, there):
    s, rest = _gate(t, w_ptr, b_ptr, d, there)
    first, second = optional(first_ptr, d, there, 0.0), optional(second_ptr, d, there, 0.0)
    # From the end that is nearer, as torch.lerp does.
    step = first - second
    tl.store(out_ptr + at, tl.where(s < 0.5, second + s * step, first - rest * step), mask=there)


@triton.jit(do_not_specialize=["D", "blocks"])
def glide(
    t_ptr, g0_ptr, g1_ptr, gw_ptr, gb_ptr, b0_ptr, b1_ptr, bw_ptr, bb_ptr, gamma_ptr, beta_ptr, D, blocks,
    UNIT: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One parameter, gamma, or two."""
    D *= UNIT
    n = tl.cast(tl.program_id(0) // blocks, tl.int64)
    d = tl.cast(tl.program_id(0) % blocks, tl.int64) * E + tl.arange(0, E)
    t = tl.load(t_ptr + n).to(tl.float32)
    _glided(gamma_ptr, g0_ptr, g1_ptr, gw_ptr, gb_ptr, t, n * D + d, d, d < D)
    if beta_ptr is not None:
        _glided(beta_ptr, b0_ptr, b1_ptr, bw_ptr, bb_ptr, t, n * D + d, d, d < D)


@triton.jit
def _pull(up_ptr, first_ptr, second_ptr, w_ptr, b_ptr, t, at, d, inside, there):
    """(gradient of the value, its shares for both ends, gradient of what the sigmoid is taken of)."""
    up = optional(up_ptr, at, inside, 0.0)
    s, rest = _gate(t, w_ptr, b_ptr, d, there)
    step = optional(first_ptr, d, there, 0.0) - optional(second_ptr, d, there, 0.0)
    return up * s, up * rest, up * step * s * rest


@triton.jit
def _of_channels(
    up_ptr, t_ptr, first_ptr, second_ptr, w_ptr, b_ptr, dfirst_ptr, dsecond_ptr, dw_ptr, db_ptr, d, samples, D,
    RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    if up_ptr is not None:
        dfirst = tl.zeros([RB, CB], tl.float32)
        dsecond = tl.zeros([RB, CB], tl.float32)
        dw = tl.zeros([RB, CB], tl.float32)
        db = tl.zeros([RB, CB], tl.float32)
        for start in tl.range(0, samples, RB):
            n = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
            t = tl.load(t_ptr + n, mask=n < samples, other=0.0).to(tl.float32)
            inside = (n < samples) & (d < D)
            to_first, to_second, dz = _pull(
                up_ptr, first_ptr, second_ptr, w_ptr, b_ptr, t, n * D + d, d, inside, d < D
            )  # fmt: skip
            dfirst += tl.where(inside, to_first, 0.0)
            dsecond += tl.where(inside, to_second, 0.0)
            dw += tl.where(inside, dz * t, 0.0)
            db += tl.where(inside, dz, 0.0)
        there = d < D
        tl.store(dfirst_ptr + d, tl.sum(dfirst, axis=0)[None, :].to(dfirst_ptr.dtype.element_ty), mask=there)
        tl.store(dsecond_ptr + d, tl.sum(dsecond, axis=0)[None, :].to(dsecond_ptr.dtype.element_ty), mask=there)
        tl.store(dw_ptr + d, tl.sum(dw, axis=0)[None, :].to(dw_ptr.dtype.element_ty), mask=there)
        tl.store(db_ptr + d, tl.sum(db, axis=0)[None, :].to(db_ptr.dtype.element_ty), mask=there)


@triton.jit
def _of_time(
    up_ptr, first_ptr, second_ptr, w_ptr, b_ptr, t, n, D, E: tl.constexpr
):  # fmt: skip
    total = tl.zeros([E], tl.float32)
    if up_ptr is not None:
        for start in tl.range(0, D, E):
            d = tl.cast(start, tl.int64) + tl.arange(0, E)
            there = d < D
            _first, _second, dz = _pull(
                up_ptr, first_ptr, second_ptr, w_ptr, b_ptr, t, n * D + d, d, there, there
            )  # fmt: skip
            total += tl.where(there, dz * (1.0 + optional(w_ptr, d, there, 0.0)), 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["samples", "D", "programs"])
def glide_grads(
    gamma_up_ptr, beta_up_ptr, t_ptr, g0_ptr, g1_ptr, gw_ptr, gb_ptr, b0_ptr, b1_ptr, bw_ptr, bb_ptr,
    dg0_ptr, dg1_ptr, dgw_ptr, dgb_ptr, db0_ptr, db1_ptr, dbw_ptr, dbb_ptr, dt_ptr, samples, D, programs,
    UNIT: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs sum up over the samples, the others over the channels, for the time."""
    D *= UNIT
    if tl.program_id(0) < programs:
        d = tl.cast(tl.program_id(0), tl.int64) * CB + tl.arange(0, CB)[None, :]
        _of_channels(
            gamma_up_ptr, t_ptr, g0_ptr, g1_ptr, gw_ptr, gb_ptr, dg0_ptr, dg1_ptr, dgw_ptr, dgb_ptr,
            d, samples, D, RB, CB,
        )  # fmt: skip
        _of_channels(
            beta_up_ptr, t_ptr, b0_ptr, b1_ptr, bw_ptr, bb_ptr, db0_ptr, db1_ptr, dbw_ptr, dbb_ptr,
            d, samples, D, RB, CB,
        )  # fmt: skip
    elif dt_ptr is not None:
        n = tl.cast(tl.program_id(0) - programs, tl.int64)
        t = tl.load(t_ptr + n).to(tl.float32)
        dt = _of_time(gamma_up_ptr, g0_ptr, g1_ptr, gw_ptr, gb_ptr, t, n, D, E)
        dt += _of_time(beta_up_ptr, b0_ptr, b1_ptr, bw_ptr, bb_ptr, t, n, D, E)
        tl.store(dt_ptr + n, dt.to(dt_ptr.dtype.element_ty))
