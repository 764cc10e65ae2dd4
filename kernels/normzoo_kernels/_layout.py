"""Rows of a tensor without a copy: any view whose rows lie at one stride, in any order of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

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


def order_of(x: Tensor) -> list[int]:
    """The leading dimensions in an order that gives the rows one stride where there is any."""
    lead = list(range(x.dim() - 1))
    if row_stride(x) is None:
        lead.sort(key=x.stride, reverse=True)
    return lead


def rows_in(order: list[int], x: Tensor, *, broadcast: bool = False) -> Tensor:
    """x with its leading dimensions in `order`, its rows at one stride and their entries side by side.

    A copy only where the layout has no such form. `broadcast` also takes rows whose entries are all one
    (stride 0), as in the gradient of a sum.
    """
    x = x.resolve_neg().permute(*order, x.dim() - 1)
    beside = x.stride(-1) == 1 or x.shape[-1] == 1 or (broadcast and x.stride(-1) == 0)
    return x if beside and row_stride(x) is not None else x.contiguous()


def output_stride(x: Tensor) -> int:
    """Row stride of an output for `x`: its width, or that padded to whole vectors where x is laid out so.

    Keeping the padding of rows of odd width keeps wide accesses from one kernel to the next.
    """
    unit = VECTOR // x.element_size()
    whole = -(-x.shape[-1] // unit) * unit
    return whole if row_stride(x) == whole else x.shape[-1]


def touched_width(x: Tensor, *others: Tensor | None) -> int:
    """Entries of a row that an access may touch: those of the padding too where all storages have them."""
    padded = output_stride(x)
    return padded if all(_covers(padded, t) for t in (x, *others) if t is not None) else x.shape[-1]


def _covers(width: int, x: Tensor) -> bool:
    """Whether the last row of x may be read `width` entries wide without leaving the storage."""
    last = x.storage_offset() + (x.numel() // x.shape[-1] - 1) * row_stride(x) + width
    return last * x.element_size() <= x.untyped_storage().nbytes()


def like_rows(x: Tensor, order: list[int], dtype: torch.dtype) -> Tensor:
    """An output for the rows of `x`, taken in `order`: dense or padded as x is, in the caller's dimensions."""
    return empty_rows(x, order, x.shape[-1], output_stride(x), dtype)


def empty_rows(x: Tensor, order: list[int], width: int, step: int, dtype: torch.dtype) -> Tensor:
    """`width` entries for each row of `x`, `step` apart, the rows in `order`, in the caller's dimensions."""
    sizes, strides = [width] * x.dim(), [1] * x.dim()
    outer = step
    for place in reversed(range(x.dim() - 1)):
        sizes[order[place]], strides[order[place]] = x.shape[place], outer
        outer *= max(x.shape[place], 1)
    if step == width:
        return torch.empty_strided(sizes, strides, dtype=dtype, device=x.device)
    # The last row needs its padding too; as_strided_ makes no view, which autograd would treat differently.
    return torch.empty(outer, dtype=dtype, device=x.device).as_strided_(sizes, strides)


def unit_of(stride: int, itemsize: int) -> int:
    """The largest power of two, up to a vector, that divides `stride`: a constant the compiler may rely on."""
    return min(stride & -stride, VECTOR // itemsize) if stride else VECTOR // itemsize
