"""(N, C, *) tensors as the channel kernels address them: a stride each for samples, channels, positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._launch import remembered
from ._layout import one_stride, unit_of


@dataclass(frozen=True)
class View:
    """Strides in entries. `tokens`: the channels lie side by side, else the positions of a channel do.

    `step` is the stride of the other of the two axes; `inner` is 1, or 0 where an expanded axis has one entry
    for all.
    """

    tokens: bool
    sample: int
    step: int
    inner: int = 1


def positions(x: Tensor) -> int:
    return x.shape[2:].numel()


def view_as(x: Tensor, tokens: bool, *, broadcast: bool = False) -> View | None:
    """x in this order of axes, if it lies so. `broadcast` also takes an inner axis that is one entry."""
    return _view_as(x.shape, x.stride(), tokens, broadcast)


@remembered
def _view_as(sizes: torch.Size, strides: tuple[int, ...], tokens: bool, broadcast: bool) -> View | None:
    step = one_stride(sizes[2:], strides[2:])
    if step is None:
        return None
    sample = strides[0] if sizes[0] > 1 else 0
    channel, alone = strides[1], (sizes[1] == 1, sizes[2:].numel() == 1)
    if tokens:
        inner, alone_inner, step = channel, alone[0], step
    else:
        inner, alone_inner, step = step, alone[1], 0 if alone[0] else channel
    if alone_inner:
        inner = 1
    return View(tokens, sample, step, inner) if inner == 1 or (broadcast and inner == 0) else None


def view_of(x: Tensor) -> View | None:
    """x in the order of axes that suits it; None where it has to be copied."""
    return _view_of(x.shape, x.stride())


@remembered
def _view_of(sizes: torch.Size, strides: tuple[int, ...]) -> View | None:
    # A single position: the channels are what can lie side by side.
    first = sizes[2:].numel() == 1
    found = _view_as(sizes, strides, first, False)
    return found or (None if first and sizes[1] > 1 else _view_as(sizes, strides, not first, False))


def one_sample(view: View, samples: int, count: int) -> View | None:
    """All rows of tokens as positions of one sample, where one stride leads through them."""
    if not view.tokens:
        return None
    if count == 1:
        return replace(view, sample=0, step=view.sample)
    together = samples == 1 or view.sample == count * view.step
    return replace(view, sample=0) if together else None


def unit(view: View, itemsize: int, extent: int) -> int:
    """What strides and the extent of the inner axis are multiples of, up to a vector."""
    return min(unit_of(n, itemsize) for n in (view.sample, view.step, extent))


def reads_past(x: Tensor, view: View, vector: int) -> bool:
    """Whether the vectors in which the last plane of x ends may be read without leaving its storage."""
    samples, channels = x.shape[:2]
    entries = (samples - 1) * view.sample + (channels - 1) * view.step + positions(x)
    end = x.storage_offset() + -(-entries // vector) * vector
    return end * x.element_size() <= x.untyped_storage().nbytes()


def like(x: Tensor) -> Tensor:
    """An output for x: dense, in the memory order of x."""
    if x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_strided(x.shape, _dense(x.shape, x.stride()), dtype=x.dtype, device=x.device)


@remembered
def _dense(sizes: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    view = _view_of(sizes, strides)
    tokens = view is not None and view.tokens
    inner, outer = [], sizes[1] if tokens else 1
    for size in reversed(sizes[2:]):
        inner.insert(0, outer)
        outer *= max(size, 1)
    steps = (outer, 1) if tokens else (outer * sizes[1], outer)
    return (*steps, *inner)
