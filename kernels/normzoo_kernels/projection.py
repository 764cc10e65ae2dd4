"""Normalize-and-Project on the GPU: launcher over `_projection.py`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import launch
from ._layout import VECTOR
from ._projection import project_scale, project_sums

_PIECE = 32768
"""Entries that one program reads."""
_PARTS = 1024
"""Sums of pieces that are added up at once."""


class Table(NamedTuple):
    addresses: Tensor
    sizes: Tensor
    owners: Tensor
    """The set of each piece."""
    firsts: Tensor
    """The first piece of each set; those of a set follow one another."""
    counts: Tensor
    ragged: bool
    """Whether some piece is not whole vectors."""


@functools.lru_cache(maxsize=16)
def _table(
    addresses: tuple[int, ...], sizes: tuple[int, ...], sets: tuple[int, ...], device: torch.device
) -> Table:
    """The pieces of tensors at `addresses`: nothing but numbers, so it stays true when memory is used again."""
    owner = torch.tensor(sets)
    order = owner.argsort(stable=True)
    owner, size = owner[order], torch.tensor(sizes)[order]
    pieces = -(-size // _PIECE)
    before = pieces.cumsum(0) - pieces
    inside = (torch.arange(int(pieces.sum())) - before.repeat_interleave(pieces)) * _PIECE
    left = size.repeat_interleave(pieces) - inside
    address = torch.tensor(addresses)[order].repeat_interleave(pieces) + 4 * inside
    owners = owner.repeat_interleave(pieces)
    counts = owners.bincount(minlength=max(sets) + 1)
    firsts = counts.cumsum(0) - counts
    size = left.clamp(max=_PIECE)
    columns = (column.to(device, torch.int32) for column in (size, owners, firsts, counts))
    return Table(address.to(device), *columns, bool((address % VECTOR).any() | (size % 4).any()))


def project(tensors: Sequence[Tensor], sets: Sequence[int], radii: Tensor) -> None:
    """Scales in place: the tensors of set k by radii[k] / sqrt(sum of squares over all of them).

    A set whose norm is zero or not finite, or whose radius is zero, stays as it is; so does one whose squares
    leave the range of float32.

    tensors: float32, on one device, of any shape and size, their entries filling their memory; sets: of each
    the set that it belongs to; radii: float32, (number of sets,), on the device. Autograd sees nothing of it.

    Raises:
        KernelUnavailable: a kernel does not compile here; nothing was changed.
    """
    addresses, sizes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    if not any(sizes):
        return
    table = _table(addresses, sizes, tuple(sets), radii.device)
    project_pieces(table, radii)


def project_pieces(table: Table, radii: Tensor) -> None:
    *columns, ragged = table
    grid = len(table.sizes)
    parts = radii.new_empty(grid)
    constants = {"RAGGED": ragged, "TILE": 4096, "num_warps": 8}
    launch(project_sums, grid, radii.device, table.addresses, table.sizes, parts, **constants)
    launch(project_scale, grid, radii.device, *columns, parts, radii, PARTS=_PARTS, **constants)
