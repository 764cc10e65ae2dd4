"""The passes of the channel engine with a mask, in eager PyTorch on a CPU where nothing is recorded.

The pixels of a region are gathered where they are summed up, so that what is in the other, be it NaN, cannot
reach its statistics. Statistics are brought to their pixels by products with the mask, for a selection by it
takes torch ten times as long on a CPU. That needs finite statistics; :mod:`.passes` knows the other case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import near_zero, unrecorded
from .checks import at_least_float32, statistics_dtype

_LEAST = 1 << 14
"""Entries of a slab; where they are fewer, starting operators takes longer than what they save."""


@dataclass(frozen=True)
class Slabs:
    """The samples of x, (N, C, pixels), or (N, pixels, C) where channels are last."""

    x: Tensor
    mask: Tensor
    """(N, pixels)."""
    along: int
    """The dimension of the pixels in a slab: 1 or 0."""
    per_sample: bool

    @staticmethod
    def of(x: Tensor, mask: Tensor, per_sample: bool, *others: Tensor) -> Slabs | None:
        """None where something is recorded, or where slabs are too small or lie otherwise in memory."""
        if not unrecorded(x, *others) or not x.numel():
            return None
        n = x.shape[0]
        last = not x.is_contiguous()
        if x.numel() < _LEAST * n or (last and not x.movedim(1, -1).is_contiguous()):
            return None
        return Slabs(x, mask.reshape(n, -1), 0 if last else 1, per_sample)

    def view(self, t: Tensor) -> Tensor:
        """t, shaped like x, as slabs; a copy where it does not lie like x."""
        if self.along:
            return t.reshape(*t.shape[:2], -1)
        return t.movedim(1, -1).reshape(*self.mask.shape, t.shape[1])

    def sums(self, body: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> list[Tensor]:
        """(2, C), or (2, N, C) with `per_sample`: the sums of what ``body((region, slab), *pixels)`` makes of
        the pixels of a region, gathered, in the dtype of the statistics."""
        views = [self.view(t) for t in tensors]
        found: list[list[Tensor]] = []
        for region in (0, 1):
            for i, own in enumerate(self.mask):
                index = (own == region).nonzero().squeeze(1)
                parts = (at_least_float32(v[i].index_select(self.along, index)) for v in views)
                found.append([t.sum(self.along) for t in body((region, i), *parts)])
        made = (torch.stack(parts).unflatten(0, (2, -1)) for parts in zip(*found, strict=True))
        return [t if self.per_sample else t.sum(1) for t in made]

    def at(self, statistic: Tensor, place: tuple[int, int]) -> Tensor:
        """The statistic (C,) of a region and slab, as it broadcasts with pixels."""
        region, i = place
        own = statistic[region, i] if self.per_sample else statistic[region]
        return own.unsqueeze(self.along)

    def spreading(self, *statistics: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """The slabs, and for each the statistics at every pixel, in memory that the next slab uses again."""
        dtype = statistics_dtype(self.x)
        inside = self.mask.to(dtype).unsqueeze(2 - self.along)
        outside = 1 - inside
        shape = self.view(self.x).shape[1:]
        made = [torch.empty(shape, dtype=dtype, device="cpu") for _ in statistics]
        beside = torch.empty(shape, dtype=dtype, device="cpu")
        for i in range(len(self.mask)):
            for t, out in zip(statistics, made, strict=True):
                torch.mul(self.at(t, (1, i)), inside[i], out=out)
                out.add_(torch.mul(self.at(t, (0, i)), outside[i], out=beside))
            yield i, made


def moments(slabs: Slabs, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pivot, delta, m2), of regions of n pixels."""

    def around_zero(_, h):
        return h, h.square()

    mean, squares = slabs.sums(around_zero, slabs.x)
    mean = mean / n
    of_mean = n * mean.square()
    if near_zero(of_mean, squares):
        return torch.zeros_like(mean), mean, squares - of_mean

    def around_mean(place, h):
        away = h - slabs.at(mean, place)
        return away, away.square()

    delta, squares = slabs.sums(around_mean, slabs.x)
    delta = delta / n
    return mean, delta, (squares - n * delta.square()).clamp_(min=0)


def sums(slabs: Slabs, dy: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy · (x − pivot)."""

    def body(place, dy, h):
        return dy, (h - slabs.at(pivot, place)).mul_(dy)

    d_shift, d_scale = slabs.sums(body, dy, slabs.x)
    return d_shift, d_scale


def apply(slabs: Slabs, pivot: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(x − pivot) · scale + shift."""
    made = torch.empty_like(slabs.x)
    x, y, away = slabs.view(slabs.x), slabs.view(made), pivot.any()
    for i, spread in slabs.spreading(scale, shift, *([pivot] if away else [])):
        h = torch.sub(x[i], spread[2], out=spread[2]) if away else x[i]
        y[i] = spread[0].mul_(h).add_(spread[1])
    return made


def dx(slabs: Slabs, dy: Tensor, pivot: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """scale · dy + slope · (x − pivot) + offset."""
    made = torch.empty_like(slabs.x)
    x, dy, out, away = slabs.view(slabs.x), slabs.view(dy), slabs.view(made), pivot.any()
    for i, spread in slabs.spreading(scale, slope, offset, *([pivot] if away else [])):
        scales, slopes, offsets = spread[:3]
        slopes.mul_(torch.sub(x[i], spread[3], out=spread[3]) if away else x[i])
        out[i] = slopes.add_(offsets).add_(scales.mul_(dy[i]))
    return made
