"""Rows of a tensor without a copy: any view whose rows lie at one stride, in any order of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR = 16
"""Bytes of the widest access."""


def one_stride(sizes: Sequence[int], strides: Sequence[int], alone: int = 0) -> int | None:
    """Entries from one place to the next over these dimensions taken as one; `alone` for a single place, None
    where no one number describes it."""
    stride = expected = None
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        if size <= 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return alone if stride is None else stride


def row_stride(x: Tensor) -> int | None:
    """Elements from one row (last dimension) to the next where one number describes it, else None."""
    return one_stride(x.shape[:-1], x.stride()[:-1], alone=x.shape[-1])


def leading(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The leading dimensions in an order that gives the rows one stride where there is any."""
    lead = list(range(len(sizes) - 1))
    if one_stride(sizes[:-1], strides[:-1]) is None:
        lead.sort(key=strides.__getitem__, reverse=True)
    return lead


def order_of(x: Tensor) -> list[int]:
    """The leading dimensions of x in the order of its rows."""
    return leading(x.shape, x.stride())


class Rows(NamedTuple):
    """How a kernel takes the rows of a tensor."""

    step: int
    """Entries from one row to the next."""
    column: int
    """Entries from one entry of a row to the next: 0 where all are one, as in the gradient of a sum."""
    itemsize: int
    copied: bool
    """Whether they lie so in a copy alone."""

    @property
    def single(self) -> bool:
        """Whether 16-bit entries have to be read one by one."""
        return self.step % 2 == 1 and self.itemsize == 2


def rows_of(
    order: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    *,
    broadcast: bool = False,
) -> Rows:
    """The rows of a tensor with its leading dimensions in `order`: at one stride, their entries side by side.

    `broadcast` also takes rows whose entries are all one (stride 0).
    """
    width, step = sizes[-1], None
    if width == 1 or strides[-1] == 1 or (broadcast and strides[-1] == 0):
        step = one_stride([sizes[i] for i in order], [strides[i] for i in order], alone=width)
    if step is None:
        return Rows(width, 1, dtype.itemsize, copied=True)
    return Rows(step, 1 if width == 1 else strides[-1], dtype.itemsize, copied=False)


def rows_in(order: Sequence[int], x: Tensor, *, broadcast: bool = False) -> Tensor:
    """x with its leading dimensions in `order`, as :func:`rows_of` tells."""
    x = x.resolve_neg()
    copied = rows_of(order, x.shape, x.stride(), x.dtype, broadcast=broadcast).copied
    x = x.permute(*order, x.dim() - 1)
    return x.contiguous() if copied else x


def output_step(width: int, step: int | None, itemsize: int) -> int:
    """Row stride of an output for rows at stride `step`: their width, padded to whole vectors where they are so
    padded.

    Keeping the padding of rows of odd width keeps wide accesses from one kernel to the next.
    """
    unit = VECTOR // itemsize
    whole = -(-width // unit) * unit
    return whole if step == whole else width


def output_stride(x: Tensor) -> int:
    """Row stride of an output for the rows of `x`."""
    return output_step(x.shape[-1], row_stride(x), x.element_size())


def touched_width(x: Tensor, *others: Tensor | None) -> int:
    """Entries of a row that an access may touch: those of the padding too where all storages have them."""
    padded = output_stride(x)
    return padded if all(_covers(padded, t) for t in (x, *others) if t is not None) else x.shape[-1]


def _covers(width: int, x: Tensor) -> bool:
    """Whether the last row of x may be read `width` entries wide without leaving the storage."""
    last = x.storage_offset() + (x.numel() // x.shape[-1] - 1) * row_stride(x) + width
    return last * x.element_size() <= x.untyped_storage().nbytes()


class Output(NamedTuple):
    """A tensor to be made."""

    sizes: Sequence[int]
    strides: Sequence[int]
    dtype: torch.dtype
    entries: int | None
    """Of its storage, where rows are padded."""

    def empty(self, device: torch.device) -> Tensor:
        if self.entries is None:
            return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=device)
        # as_strided_ makes no view, which autograd would treat differently.
        whole = torch.empty(self.entries, dtype=self.dtype, device=device)
        return whole.as_strided_(self.sizes, self.strides)


def rows_like(order: Sequence[int], lead: Sequence[int], width: int, step: int, dtype: torch.dtype) -> Output:
    """Rows of `width` entries, `step` apart: as many as the sizes `lead`, in `order`, say."""
    sizes, strides, outer = [*lead, width], [1] * (len(lead) + 1), step
    for place in reversed(order):
        strides[place] = outer
        outer *= max(lead[place], 1)
    # The last row needs its padding too.
    return Output(tuple(sizes), tuple(strides), dtype, None if step == width else outer)


def like_rows(x: Tensor, order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output for the rows of `x`, taken in `order`: dense or padded as x is, in the caller's dimensions."""
    return empty_rows(x, order, x.shape[-1], output_stride(x), dtype)


def empty_rows(x: Tensor, order: Sequence[int], width: int, step: int, dtype: torch.dtype) -> Tensor:
    """`width` entries for each row of `x`, `step` apart, the rows in `order`, in the caller's dimensions."""
    lead = [0] * len(order)
    for size, place in zip(x.shape, order, strict=False):
        lead[place] = size
    return rows_like(order, lead, width, step, dtype).empty(x.device)


def unit_of(stride: int, itemsize: int) -> int:
    """The largest power of two, up to a vector, that divides `stride`: a constant the compiler may rely on."""
    return min(stride & -stride, VECTOR // itemsize) if stride else VECTOR // itemsize
