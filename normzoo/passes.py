"""The four passes of the channel engine over x, in eager PyTorch: what its kernels are tested against.

x is (N, C, \\*); statistics are (C,), or (N, C) where each sample has its own. With a mask, uint8 (N, \\*) of 0
and 1, every pixel belongs to one of two regions, and statistics have a leading axis of size 2 for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks import at_least_float32, statistics_dtype


def moments(x: Tensor, mask: Tensor | None, per_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(pivot, delta, m2): a number near the mean, mean − pivot, and the sum of (x − mean)².

    delta holds what the rounding of the pivot lost, so that x − pivot − delta keeps its digits far from zero.
    """
    h = at_least_float32(x)
    n = divisor(counts(x, mask, per_sample))
    pivot = (_total(h, mask, per_sample) / n).detach()
    h = h - _spread(pivot, x, mask)
    delta = _total(h, mask, per_sample) / n
    m2 = _total(h.square(), mask, per_sample) - n * delta.square()  # delta is tiny: nothing cancels
    return pivot, delta, m2.clamp(min=0)


def apply(x: Tensor, mask: Tensor | None, pivot: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x − pivot) · scale + shift, in the dtype of x."""
    pivot, scale, shift = (_spread(t, x, mask) for t in (pivot, scale, shift))
    return torch.addcmul(shift, at_least_float32(x) - pivot, scale).to(x.dtype)


def sums(dy: Tensor, x: Tensor, mask: Tensor | None, pivot: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy · (x − pivot)."""
    dy = at_least_float32(dy)
    away = at_least_float32(x) - _spread(pivot, x, mask)
    return _total(dy, mask, per_sample), _total(dy * away, mask, per_sample)


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
    pivot, scale, slope, offset = (_spread(t, x, mask) for t in (pivot, scale, slope, offset))
    through_statistics = torch.addcmul(offset, at_least_float32(x) - pivot, slope)
    return torch.addcmul(through_statistics, at_least_float32(dy), scale).to(x.dtype)


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
