"""Tiles and grids of the modulated row norms: those of the row norms, the rows shared out sample by sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ._forms import Form, backward_form, forward_form

WIDEST = 8192
"""Widest row that a program holds in the backward pass."""

_WAVES = 8
"""Programs at most, as a multiple of those that run at a time, that a sample is cut into runs for."""


@dataclass(frozen=True)
class Runs:
    """How `samples` of `tokens` rows each become programs."""

    samples: int
    each: int
    """Runs of a sample."""
    constants: dict[str, Any]

    @property
    def grid(self) -> int:
        return self.samples * self.each


def forward_runs(
    width: int, itemsize: int, scalar: bool, samples: int, tokens: int, device: torch.device
) -> Runs:
    """`scalar`: as for :func:`forward_form`."""
    return _runs(forward_form(width, itemsize, scalar, device), samples, tokens)


def backward_runs(
    kind: str, width: int, itemsize: int, scalar: bool, samples: int, tokens: int, device: torch.device,
    tensors: int,
) -> Runs:  # fmt: skip
    """`tensors`: read by the kernel, as large as x."""
    runs = _runs(backward_form(kind, width, itemsize, scalar, device, tensors, 0), samples, tokens)
    del runs.constants["PACKED"]  # only of wider rows
    return runs


def _runs(form: Form, samples: int, tokens: int) -> Runs:
    # Beside narrow rows scale and shift take registers. No more rows in a tile than a sample has.
    rows = form.rows if form.constants["C"] > 128 else max(1, form.rows // 2)
    rows = min(rows, triton.next_power_of_2(tokens))
    each = _share(form.programs, samples, triton.cdiv(tokens, rows))
    return Runs(samples, each, form.constants | {"R": rows})


@functools.lru_cache(maxsize=256)
def _share(programs: int, samples: int, tiles: int) -> int:
    """Runs of a sample for the least time, if `programs` run at a time and starting one costs a tile."""
    shares = [min(tiles, wave * programs // samples) for wave in range(1, _WAVES + 1)]
    return min(
        (share for share in shares if share),
        key=lambda share: triton.cdiv(samples * share, programs) * (triton.cdiv(tiles, share) + 1),
        default=1,
    )
