"""Collectives over the ranks of a process group: one gather of one packed tensor, for any backend.

The functional collectives are the ones that torch.compile traces.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def size(process_group: dist.ProcessGroup | None) -> int:
    """Ranks of `process_group` (None: the world); 1 where torch.distributed is not set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)


def gather(parts: tuple[Tensor, ...], process_group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Every part of every rank, with a leading axis for the ranks; the parts of one dtype."""
    from torch.distributed import _functional_collectives as functional

    gather_rows = (
        getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    )  # of torch < 2.13
    packed = torch.cat([part.reshape(-1) for part in parts])
    group: Any = dist.group.WORLD if process_group is None else process_group
    rows = gather_rows(packed.unsqueeze(0), 0, group)
    if not torch.compiler.is_compiling():
        rows = functional.wait_tensor(rows)
    pieces = rows.split([part.numel() for part in parts], dim=1)
    return tuple(piece.view(-1, *part.shape) for piece, part in zip(pieces, parts, strict=True))


def total(parts: tuple[Tensor, ...], process_group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """The sum of every part over the ranks, in the order of the ranks: the same bits on each of them."""
    return tuple(part.sum(0) for part in gather(parts, process_group))


def average(a: Tensor, b: Tensor, count: Any, process_group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """(a, b, count): the means over the ranks, weighted by the counts, and their sum."""
    if size(process_group) == 1:
        return a, b, count
    n = torch.full_like(a[:1], count)
    a, b, n = total((torch.where(n > 0, a * n, 0), torch.where(n > 0, b * n, 0), n), process_group)
    return a / n.clamp(min=1), b / n.clamp(min=1), n
