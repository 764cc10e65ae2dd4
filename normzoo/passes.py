"""The four passes of the channel engine over x, in eager PyTorch: what its kernels are tested against.

x is (N, C, \\*); statistics are (C,), or (N, C) where each sample has its own. With a mask, uint8 (N, \\*) of 0
and 1, every pixel belongs to one of two regions, and statistics have a leading axis of size 2 for them.

On a CPU, where nothing is recorded, the passes go in blocks, and the pivots are zero where no mean lies further
from zero than a deviation: this is near, and spares a subtraction in every pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import regions
from .blocks import Grid, Room, less, mapped, near_zero, summed, total, unrecorded
from .checks import at_least_float32, statistics_dtype
from .regions import Slabs


def moments(x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(pivot, delta, m2): a number near the mean, mean − pivot, and the sum of (x − mean)².

    delta holds what the rounding of the pivot lost, so that x − pivot − delta keeps its digits far from zero.
    """
    if mask is None and unrecorded(x) and (grid := Grid.of(x, per_sample)):
        return _moments_of_blocks(x, grid, per_sample)
    n = divisor(counts(x, mask, per_sample))
    if mask is not None and (slabs := Slabs.of(x, mask, per_sample)):
        return regions.moments(slabs, n)
    h = at_least_float32(x)
    pivot = (_total(h, mask, per_sample) / n).detach()
    h = h - _spread(pivot, x, mask)
    delta = _total(h, mask, per_sample) / n
    m2 = _total(h.square(), mask, per_sample) - n * delta.square()  # delta is tiny: nothing cancels
    return pivot, delta, m2.clamp(min=0)


def _moments_of_blocks(x: Tensor, grid: Grid, per_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, room, memory = x.numel() // (x.shape[1] * (x.shape[0] if per_sample else 1)), Room(x), Room(x)

    def around_zero(s, h):
        h = room.wide(h)
        return total(h), total(torch.mul(h, h, out=memory.like(h)))

    mean, squares = summed(grid, (x,), around_zero, per_sample)
    mean.div_(n)
    of_mean = mean.square().mul_(n)
    if near_zero(of_mean, squares):
        return torch.zeros_like(mean), mean, squares.sub_(of_mean)
    spread = grid.spread(mean)

    def around_mean(s, h):
        away = less(memory.like(h), h, spread[s])
        return total(away), total(away.mul_(away))

    delta, squares = summed(grid, (x,), around_mean, per_sample)
    delta.div_(n)
    return mean, delta, squares.sub_(delta.square().mul_(n)).clamp_(min=0)


def apply(x: Tensor, mask: Tensor | None, pivot: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x − pivot) · scale + shift, in the dtype of x."""
    if mask is None and unrecorded(x, pivot, scale, shift) and (grid := Grid.of(x, pivot.dim() == 2)):
        return _applied_to_blocks(x, grid, pivot, scale, shift)
    if slabs := _slabs(x, mask, pivot, scale, shift):
        return regions.apply(slabs, pivot, scale, shift)
    pivot, scale, shift = (_spread(t, x, mask) for t in (pivot, scale, shift))
    return torch.addcmul(shift, at_least_float32(x) - pivot, scale).to(x.dtype)


def _applied_to_blocks(x: Tensor, grid: Grid, pivot: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    at_zero = not pivot.any()
    if at_zero and (y := grid.affine(x, scale, shift)) is not None:
        return y
    pivot, scale, shift = (grid.spread(t) for t in (pivot, scale, shift))

    def body(out, s, h):
        away = out.copy_(h) if at_zero else less(out, h, pivot[s])
        away.mul_(scale[s]).add_(shift[s])

    return mapped(x, grid, (x,), body)


def sums(dy: Tensor, x: Tensor, mask: Tensor | None, pivot: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy · (x − pivot)."""
    if mask is None and unrecorded(dy, x, pivot) and (grid := Grid.of(x, per_sample)):
        return _sums_of_blocks(dy, x, grid, pivot, per_sample)
    if mask is not None and (slabs := Slabs.of(x, mask, per_sample, dy, pivot)):
        return regions.sums(slabs, dy, pivot)
    dy = at_least_float32(dy)
    away = at_least_float32(x) - _spread(pivot, x, mask)
    return _total(dy, mask, per_sample), _total(dy * away, mask, per_sample)


def _sums_of_blocks(
    dy: Tensor, x: Tensor, grid: Grid, pivot: Tensor, per_sample: bool
) -> tuple[Tensor, Tensor]:
    at_zero, pivot = not pivot.any(), grid.spread(pivot)
    rooms = [Room(x) for _ in range(3)]

    def body(s, dy, h):
        dy, memory = rooms[0].wide(dy), rooms[1].like(h)
        away = rooms[2].wide(h) if at_zero else less(memory, h, pivot[s])
        return total(dy), total(torch.mul(away, dy, out=memory))

    d_shift, d_scale = summed(grid, (dy, x), body, per_sample)
    return d_shift, d_scale


def dx(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    """scale · dy + slope · (x − pivot) + offset, in the dtype of x."""
    statistics = (pivot, scale, slope, offset)
    if mask is None and unrecorded(dy, x, *statistics) and (grid := Grid.of(x, pivot.dim() == 2)):
        return _dx_of_blocks(dy, x, grid, *statistics)
    if slabs := _slabs(x, mask, *statistics, dy):
        return regions.dx(slabs, dy, *statistics)
    pivot, scale, slope, offset = (_spread(t, x, mask) for t in statistics)
    through_statistics = torch.addcmul(offset, at_least_float32(x) - pivot, slope)
    return torch.addcmul(through_statistics, at_least_float32(dy), scale).to(x.dtype)


def _dx_of_blocks(dy: Tensor, x: Tensor, grid: Grid, *statistics: Tensor) -> Tensor:
    at_zero = not statistics[0].any()
    pivot, scale, slope, offset = (grid.spread(t) for t in statistics)
    rooms = [Room(x) for _ in range(3)]

    def body(out, s, dy, h):
        dy = rooms[0].wide(dy)
        away = rooms[1].wide(h) if at_zero else less(out, h, pivot[s])
        if grid.last:  # where torch has a fast path for such parameters
            torch.addcmul(offset[s], away, slope[s], out=out)
            torch.addcmul(out, dy, scale[s], out=out)
        else:
            torch.mul(away, slope[s], out=out).add_(offset[s])
            out.add_(torch.mul(dy, scale[s], out=rooms[2].like(out)))

    return mapped(x, grid, (dy, x), body)


def _slabs(x: Tensor, mask: Tensor | None, pivot: Tensor, *others: Tensor) -> Slabs | None:
    """What :mod:`.regions` needs, where it can bring these finite statistics to their pixels."""
    if mask is None or not (slabs := Slabs.of(x, mask, pivot.dim() == 3, pivot, *others)):
        return None
    finite = all(bool(t.isfinite().all()) for t in (pivot, *others) if t.shape == pivot.shape)
    return slabs if finite else None


def counts(x: Tensor, mask: Tensor | None, per_sample: bool) -> int | Tensor:
    """How many values of x each statistic is taken over: a number, or a tensor that broadcasts with them."""
    full = math.prod(x.shape[2:]) * (1 if per_sample else x.shape[0])
    if mask is None:
        return full
    hole = mask.unsqueeze(-1).flatten(1).sum(1) if per_sample else mask.sum()
    return torch.stack((full - hole, hole)).unsqueeze(-1).to(statistics_dtype(x))


def divisor(n: Any) -> Any:
    """n, or 1 where it is not positive: of nothing, the statistics are zero."""
    return torch.where(n > 0, n, 1) if isinstance(n, Tensor) else max(n, 1)


def _spread(statistic: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """A statistic at every pixel: that of its sample, channel and region; laid out like x."""
    if mask is not None and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        wide = statistic.reshape(*statistic.shape[:-1], *(1,) * (x.dim() - 2), statistic.shape[-1])
        return torch.where(mask.unsqueeze(-1) != 0, wide[1], wide[0]).movedim(-1, 1)
    wide = statistic.reshape(*statistic.shape, *(1,) * (x.dim() - 2))
    return wide if mask is None else torch.where(mask.unsqueeze(1) != 0, wide[1], wide[0])


def _total(v: Tensor, mask: Tensor | None, per_sample: bool) -> Tensor:
    """The sum of v for every statistic. What lies in another region is left out, also where it is NaN."""
    parts = [v] if mask is None else [torch.where(mask.unsqueeze(1) == r, v, 0.0) for r in (0, 1)]
    dims = (*(() if per_sample else (0,)), *range(2, v.dim()))
    found = [part.sum(dims) if dims else part for part in parts]
    return found[0] if mask is None else torch.stack(found)
