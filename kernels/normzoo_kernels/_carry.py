"""What the channel engine does with gradients of statistics and of parameters on their way to the passes."""

from __future__ import annotations

import triton
import triton.language as tl

from ._sets import divisor, optional


@triton.jit(do_not_specialize=["C", "blocks", "number"])
def statistics_pull(
    ddelta_ptr, dm2_ptr, delta_ptr, count_ptr, slope_ptr, offset_ptr, C, blocks, number,
    UNIT: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """slope and offset, of what x - pivot gets through its statistics. count: of every entry, or `number`."""
    C *= UNIT
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.cast(tl.program_id(0) % blocks, tl.int64) * E + tl.arange(0, E)
    there = c < C
    at = row * C + c
    n = number
    if count_ptr is not None:
        n = divisor(tl.load(count_ptr + at, mask=there, other=1.0))
    slope = 2.0 * optional(dm2_ptr, at, there, 0.0) + tl.zeros([E], tl.float32)
    offset = optional(ddelta_ptr, at, there, 0.0) / n - slope * tl.load(delta_ptr + at, mask=there, other=0.0)
    tl.store(slope_ptr + at, slope, mask=there)
    tl.store(offset_ptr + at, offset, mask=there)


@triton.jit
def _sum_rows(ptr, out_ptr, c, rows, C, RB: tl.constexpr, CB: tl.constexpr):
    if ptr is not None:
        total = tl.zeros([RB, CB], tl.float32)
        for start in tl.range(0, rows, RB):
            row = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
            total += tl.load(ptr + row * C + c, mask=(row < rows) & (c < C), other=0.0)
        tl.store(out_ptr + c, tl.sum(total, axis=0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=["rows", "C"])
def sum_rows(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, a_out_ptr, b_out_ptr, c_out_ptr, d_out_ptr, e_out_ptr, rows, C,
    UNIT: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """The sums over the rows of up to five arrays."""
    C *= UNIT
    c = tl.cast(tl.program_id(0), tl.int64) * CB + tl.arange(0, CB)[None, :]
    _sum_rows(a_ptr, a_out_ptr, c, rows, C, RB, CB)
    _sum_rows(b_ptr, b_out_ptr, c, rows, C, RB, CB)
    _sum_rows(c_ptr, c_out_ptr, c, rows, C, RB, CB)
    _sum_rows(d_ptr, d_out_ptr, c, rows, C, RB, CB)
    _sum_rows(e_ptr, e_out_ptr, c, rows, C, RB, CB)
