"""How eager PyTorch goes over a tensor on a CPU: block by block, each of which stays in the cache meanwhile.

Operators that go over a block one after another, in place, cost memory one pass, where one after another over
the whole tensor they cost one each. Autograd and transforms record what happens to whole tensors; there, and
for other layouts than contiguous and channels_last, nothing is cut.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo_kernels._op import needs_grad

from .checks import statistics_dtype
from .dispatch import eager_on_cpu, plain

_GRAIN = 1 << 15
"""Entries that torch gives to a thread at least."""

_FEWEST = 8
"""Grains in a block, at least: a megabyte in float32, beside which the time to start operators is little."""

_WORTH = 1 << 19
"""Entries from which a combine in Python takes little beside the passes."""

Block = tuple[slice, slice]


def unrecorded(*tensors: Tensor | None) -> bool:
    """Whether nobody sees what is done to these in place: ordinary tensors on a CPU, outside of any graph."""
    return not needs_grad(*tensors) and eager_on_cpu(*tensors)


def large(x: Tensor) -> bool:
    """Whether x is large enough for blocks to be worth their while."""
    return x.numel() >= _GRAIN


def pays(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x is so large that the engine in blocks can be faster than an operator of torch that does not go
    in blocks."""
    return eager_on_cpu(x, *parameters) and x.numel() >= _WORTH and Grid.of(x, False) is not None


@dataclass(frozen=True)
class Grid:
    """x (N, C, \\*) as (S, L, D), with statistics over L: (N · C, pixels, 1), or (N or 1, positions, C) where
    channels are last."""

    samples: int
    channels: int
    last: bool
    shape: tuple[int, int, int]

    @staticmethod
    def of(x: Tensor, per_sample: bool) -> Grid | None:
        """None where x is small, so that nothing has to be cut, or lies otherwise in memory."""
        n, c = x.shape[:2]
        pixels = math.prod(x.shape[2:])
        if not large(x):
            return None
        if pixels > 1 and x.is_contiguous():
            return Grid(n, c, False, (n * c, pixels, 1))
        if x.movedim(1, -1).is_contiguous():
            return Grid(n, c, True, (n, pixels, c) if per_sample else (1, n * pixels, c))
        return None

    def view(self, t: Tensor) -> Tensor:
        """t, shaped like x, as (S, L, D); a copy where it does not lie like x."""
        return (t.movedim(1, -1) if self.last else t).reshape(self.shape)

    def spread(self, statistic: Tensor) -> Tensor:
        """A statistic, (C,) or (N, C), as (S, 1, D)."""
        if not self.last:
            return statistic.expand(self.samples, self.channels).reshape(-1, 1, 1)
        return statistic.reshape(-1, 1, self.channels)

    @property
    def one(self) -> bool:
        """Whether all of it is one block."""
        return math.prod(self.shape) <= _most()

    def blocks(self) -> Iterator[Block]:
        """Slices of S and of L."""
        (s, rows, d), most = self.shape, _most()
        if rows * d <= most:
            step = most // (rows * d)
            for i in range(0, s, step):
                yield slice(i, i + step), slice(0, rows)
            return
        step = max(1, most // d)
        for i in range(s):
            for j in range(0, rows, step):
                yield slice(i, i + 1), slice(j, min(j + step, rows))

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor | None:
        """scale · x + shift for statistics, by one operator of torch; None where it has none for this."""
        wide = x.dtype == scale.dtype
        if not self.last and (wide or x.dtype in (torch.bfloat16, torch.float16)):
            s = self.shape[0]
            scale, shift = (self.spread(t).view(-1) for t in (scale, shift))
            rows = x.view(1, s, -1)  # batch norm with a mean of zero and a deviation of one
            standard = (scale.new_zeros(s), scale.new_ones(s))
            y = torch.batch_norm(rows, scale, shift, *standard, False, 0.0, 0.0, False)
            return shaped(y, x)
        if not wide:
            return None
        made = torch.empty_like(x)
        torch.addcmul(self.spread(shift), self.view(x), self.spread(scale), out=self.view(made))
        return made


def _memory(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # for calls outside of it too
        return torch.empty(size, dtype=dtype, device="cpu")


def _most() -> int:
    """Entries of a block."""
    return _GRAIN * max(_FEWEST, torch.get_num_threads())


class _Free(threading.local):
    """Memory of rooms that are gone: the first touch of new memory takes longer than what is done there."""

    def __init__(self) -> None:
        self.of: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.float64: []}


_free = _Free()
_KEPT = 6


class Room:
    """Memory for a block in the dtype of the statistics, used again for every block, and by later rooms."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = statistics_dtype(x)
        free = _free.of[self.dtype]
        self.whole = free.pop() if free else _memory(0, self.dtype)
        self.held = self.whole

    def __del__(self) -> None:
        free = _free.of[self.dtype]
        if len(free) < _KEPT and plain(self.whole) and self.whole.numel() <= _most():
            free.append(self.whole)

    def like(self, block: Tensor) -> Tensor:
        if self.held.shape != block.shape:
            if self.whole.numel() < block.numel():
                self.whole = _memory(block.numel(), self.dtype)
            self.held = self.whole[: block.numel()].view(block.shape)
        return self.held

    def wide(self, block: Tensor) -> Tensor:
        """The block in the dtype of the statistics: itself, or a copy here."""
        return block if block.dtype == self.dtype else self.like(block).copy_(block)


def less(out: Tensor, block: Tensor, statistic: Tensor) -> Tensor:
    """block − statistic, in `out`, which has the dtype of the statistic."""
    if block.dtype == out.dtype:
        return torch.sub(block, statistic, out=out)
    return out.copy_(block).sub_(statistic)


def mapped(like: Tensor, grid: Grid, tensors: Sequence[Tensor], body: Callable[..., object]) -> Tensor:
    """A tensor like `like`, which ``body(out, statistics, *blocks)`` fills from the blocks of others shaped so.

    `out` has the dtype of the statistics. `statistics` is the slice of S that tells which belong to the blocks.
    """
    made = torch.empty_like(like)
    target, views, room = grid.view(made), [grid.view(t) for t in tensors], Room(like)
    for s, rows in grid.blocks():
        part = target[s, rows]
        if part.dtype == room.dtype:
            body(part, s, *(view[s, rows] for view in views))
        else:
            out = room.like(part)
            body(out, s, *(view[s, rows] for view in views))
            part.copy_(out)
    return made


def summed(
    grid: Grid, tensors: Sequence[Tensor], body: Callable[..., tuple[Tensor, ...]], per_sample: bool
) -> list[Tensor]:
    """The sums, (N, C) with `per_sample` or else (C,), of what ``body(statistics, *blocks)`` finds in each
    block, (s, 1, D)."""
    views = [grid.view(t) for t in tensors]
    found = [body(s, *(view[s, rows] for view in views)) for s, rows in grid.blocks()]
    made = []
    for parts in zip(*found, strict=True):
        whole = parts[0] if len(parts) == 1 else torch.cat([*parts])
        # (S, pieces of L, D), then (N or 1, C).
        of_samples = whole.view(grid.shape[0], -1, grid.shape[2]).sum(1).view(-1, grid.channels)
        made.append(of_samples if per_sample else of_samples.sum(0))
    return made


def shaped(made: Tensor, like: Tensor) -> Tensor:
    """A new tensor in the shape of another; no view, for what a Function returns may be changed in place."""
    return torch.ops.aten._unsafe_view(made, like.shape)


def near_zero(of_mean: Tensor, squares: Tensor) -> bool:
    """Whether sums of squares around zero are as good as around means, whose part of them is `of_mean`: at most
    half of it cancels then, and none is too large for its dtype."""
    return bool(((2 * of_mean <= squares) & squares.isfinite()).all())


def total(block: Tensor) -> Tensor:
    """The sum over L."""
    return block.sum(1, keepdim=True)
