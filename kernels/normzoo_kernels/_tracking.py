"""Running averages of statistics, moved in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _moved(new_ptr, old_ptr, c, C, K, factor, R: tl.constexpr, B: tl.constexpr):
    """What the averages of channels c [1, B] become, each by the mean of K new values; in their dtype."""
    inside = c < C
    total = tl.zeros([R, B], tl.float32)
    for first in tl.range(0, K, R):
        row = first + tl.arange(0, R)[:, None]
        total += tl.load(new_ptr + row.to(tl.int64) * C + c, mask=(row < K) & inside, other=0.0)
    new = tl.sum(total, axis=0)[None, :] / K
    old = tl.load(old_ptr + c, mask=inside, other=0.0).to(tl.float32)
    return (old * (1.0 - factor) + factor * new).to(old_ptr.dtype.element_ty)


@triton.jit
def _lost(value, inside):
    """1 where something is not finite."""
    lost = inside & ~(tl.abs(value.to(tl.float32)) < float("inf"))
    return tl.max(tl.max(lost.to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=["C", "K", "batches", "factor"])
def track_statistics(
    a_ptr, b_ptr, running_a_ptr, running_b_ptr, tracked_ptr, skipped_ptr, factor_ptr,
    C, K, batches, factor, PLAIN: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Moves the averages by `factor`, or what lies at factor_ptr, or with PLAIN so that all batches count
    alike, and the number of batches. With skipped_ptr, a batch that would leave something not finite moves
    nothing and is counted there. One program does all of it then, and with PLAIN, where all need the number.
    """
    number = tl.cast(0, tl.int64)
    if tracked_ptr is not None:
        number = tl.load(tracked_ptr) + batches
    if factor_ptr is not None:
        factor = tl.load(factor_ptr).to(tl.float32)
    if PLAIN:
        factor = tl.cast(batches, tl.float32) / number.to(tl.float32)
    lost = 0
    if skipped_ptr is not None:
        for block in tl.range(0, tl.cdiv(C, B)):
            c = block * B + tl.arange(0, B)[None, :]
            lost = tl.maximum(lost, _lost(_moved(b_ptr, running_b_ptr, c, C, K, factor, R, B), c < C))
            if a_ptr is not None:
                lost = tl.maximum(lost, _lost(_moved(a_ptr, running_a_ptr, c, C, K, factor, R, B), c < C))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + lost)
    for block in tl.range(tl.program_id(0), tl.cdiv(C, B), tl.num_programs(0)):
        c = block * B + tl.arange(0, B)[None, :]
        stored = (c < C) & (lost == 0)
        b = _moved(b_ptr, running_b_ptr, c, C, K, factor, R, B)
        tl.store(running_b_ptr + c, b, mask=stored)
        if a_ptr is not None:
            a = _moved(a_ptr, running_a_ptr, c, C, K, factor, R, B)
            tl.store(running_a_ptr + c, a, mask=stored)
    if tracked_ptr is not None:
        tl.store(tracked_ptr, number, mask=(tl.program_id(0) == 0) & (lost == 0))
