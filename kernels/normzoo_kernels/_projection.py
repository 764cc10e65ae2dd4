"""Sets of tensors scaled to given norms: one launch sums up squares, the next scales.

A program has one piece of one tensor, whose address it reads from a table: any number of tensors is one launch.
Each program of the second launch adds up the parts of its own set, all in the same order, so no program waits
for another and nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _whole(address, size):
    """Whether a piece is whole vectors of 16 bytes."""
    return (address % 16 == 0) & (size % 4 == 0)


@triton.jit
def _tile(address, size, start, UNIT: tl.constexpr, TILE: tl.constexpr):
    """(pointers to a tile of a piece, which of them it has), both multiples of UNIT entries to the compiler."""
    at = start + tl.arange(0, TILE)
    x_ptr = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(x_ptr + at, 4 * UNIT), at < size // UNIT * UNIT


@triton.jit
def _squares(address, size, UNIT: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, size, TILE):
        at, here = _tile(address, size, start, UNIT, TILE)
        x = tl.load(at, mask=here, other=0.0)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def _scale(address, size, factor, UNIT: tl.constexpr, TILE: tl.constexpr):
    for start in tl.range(0, size, TILE):
        at, here = _tile(address, size, start, UNIT, TILE)
        tl.store(at, tl.load(at, mask=here, other=0.0) * factor, mask=here)


@triton.jit
def project_sums(x_ptrs, size_ptr, part_ptr, RAGGED: tl.constexpr, TILE: tl.constexpr):
    """part: the sum of squares of each piece. RAGGED: not every piece is whole."""
    piece = tl.program_id(0)
    address, size = tl.load(x_ptrs + piece), tl.load(size_ptr + piece)
    if not RAGGED or _whole(address, size):
        total = _squares(address, size, 4, TILE)
    else:
        total = _squares(address, size, 1, TILE)
    tl.store(part_ptr + piece, total)


@triton.jit
def project_scale(
    x_ptrs, size_ptr, owner_ptr, first_ptr, count_ptr, part_ptr, radius_ptr,
    RAGGED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scales the pieces of set k by radius[k] / sqrt(sum of its parts, from first[k] on).

    The last piece comes first: it was read last and may still be in the L2 cache.
    """
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    address, size = tl.load(x_ptrs + piece), tl.load(size_ptr + piece)
    k = tl.load(owner_ptr + piece)
    first, count, radius = tl.load(first_ptr + k), tl.load(count_ptr + k), tl.load(radius_ptr + k)
    total = tl.zeros([PARTS], tl.float32)
    for start in tl.range(0, count, PARTS):
        at = start + tl.arange(0, PARTS)
        total += tl.load(part_ptr + first + at, mask=at < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    # Comparing with NaN is false.
    usual = (norm > 0.0) & (norm < float("inf")) & (radius > 0.0)
    factor = tl.div_rn(tl.where(usual, radius, 1.0), tl.where(usual, norm, 1.0))
    if not RAGGED or _whole(address, size):
        _scale(address, size, factor, 4, TILE)
    else:
        _scale(address, size, factor, 1, TILE)
