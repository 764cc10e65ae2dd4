"""Calls that are in the gate to stand beside those of the peers in `peers.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .case import SWEPT, Case
from .row_cases import ROWS, RowNorm
from .standardize_cases import Standardized


def peer_cases() -> Iterator[Case]:
    for backward in (False, True):
        plain = RowNorm("rms", backward, 4096, add=True)
        for width in ROWS:
            if width <= 65536:
                plan = SWEPT if width != 4096 else (("sm_90", ("fp32",)),)
                yield replace(plain, width=width).case(plan)
        for groups, size in ((0, (7, 7)), (32, (7, 7)), (32, (32, 32))):
            for last in (False, True):
                yield Standardized(backward, groups, 512, size, last=last).case(SWEPT)
