"""Which norms run in the kernels that hold whole sets on chip, and how many sets a program has: a function of
the shape, the layout and the device alone."""

from __future__ import annotations

from typing import Any

import triton

from ._channel_forms import Form, Problem, power_of_two
from ._launch import sm_count
from ._on_chip import standardize_on_chip

_MOST = 16384
"""Entries of a tile that the registers of a program mostly hold, in the backward pass of x and of dy."""

_LEAST = 4096
"""Entries of a tile below which a program takes more sets, if others are left for all multiprocessors."""

_SECTOR, _LINE = 32, 64
"""Bytes of channels side by side: the fewest, and as many as are wanted."""


def on_chip_form(problem: Problem, width: int, kernel: Any) -> Form | None:
    """The form for sets of `width` channels of a sample, or of one of the batch. None where a set does not fit,
    where most of the bytes a program fetches are not its own, or where a quarter of the multiprocessors had no
    program."""
    p, sms = problem, sm_count(problem.device)
    sets, wide = p.channels // width, power_of_two(width)
    columns = {"NB": 1 if p.per_sample else power_of_two(p.samples), "L": power_of_two(p.count)}
    entries = wide * columns["NB"] * columns["L"]
    most = _most(p, wide, kernel)

    def programs(group: int) -> int:
        return triton.cdiv(sets, group) * (p.samples if p.per_sample else 1)

    def wants_more(group: int, line: int, least: int) -> bool:
        narrow = p.tokens and min(group, sets) * width * p.itemsize < line
        return group < sets and 2 * group * entries <= most and (narrow or 2 * group * entries <= least)

    group = 1
    while wants_more(group, _SECTOR, 0):
        group *= 2
    while wants_more(group, _LINE, _LEAST) and programs(2 * group) >= 4 * sms:
        group *= 2
    narrow = p.tokens and min(group, sets) * width * p.itemsize < _SECTOR and group < sets
    if narrow or group * entries > most or 4 * programs(group) < 3 * sms:
        return None
    constants = {"G": group, "W": wide, **columns, "num_warps": _warps(group * entries)}
    return Form(kernel, programs(group), 1, constants)


def _most(p: Problem, wide: int, kernel: Any) -> int:
    """Entries of a tile for which there are registers."""
    aligned = p.tokens or p.count % p.vector == 0
    if kernel is standardize_on_chip:
        return 2 * _MOST if p.itemsize == 2 and aligned and not p.tokens else _MOST
    if wide == 1:
        return _MOST
    return 2 * _MOST // p.itemsize if aligned else _MOST // 4


def _warps(elements: int) -> int:
    return min(max(elements // 1024, 4), 16)
