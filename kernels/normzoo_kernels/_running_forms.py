"""Tiles and parts of the running engine's sweeps: a static table, like `_channel_forms.py`."""

from __future__ import annotations

from typing import Any

import triton

from ._channel_forms import Form, Problem, parts_of, power_of_two, tile_of, tiles_in
from ._launch import sm_count

_LEAST = 4
"""Fewest tiles of a part."""

_MOST = 8192
"""Entries of a tile for which there are registers."""


def running_form(kernel: Any, problem: Problem, group: int, two: bool) -> Form:
    """`group`: channels that are scaled together, 0 for none. `two`: tensors to read, or sums of x to keep."""
    p, sms = problem, sm_count(problem.device)
    elements = 2048 if two else 4096
    if p.itemsize == 4 and (p.channels % 32 if p.tokens else p.count % p.vector and not two):
        elements //= 2  # what lies beyond the edge costs registers
    if group:
        tile, blocks = _group_tile(p, group, elements)
    else:
        tile = tile_of(p, elements)
        blocks = triton.cdiv(p.channels, tile["CB"])
    parts = parts_of(max(tiles_in(p, tile), 1), blocks, _LEAST, 4 * sms)
    # Entries of a warp: with more of them the gradient of wide groups spills.
    warps = tile["CB"] * tile["NB"] * tile["L"] // (512 if two else 1024)
    if (tile["CB"] * p.itemsize < 128) if p.tokens else tile["L"] <= 64:
        warps = max(warps, 8)  # narrow pieces leave a thread many channels, or many positions
    constants = tile | {"GROUP": group, "W": power_of_two(group) if group else 0}
    constants |= {"STAGES": 3 if warps < 16 else 2, "num_warps": min(max(4, warps), 16)}
    return Form(kernel, blocks * parts, parts, constants)


def _group_tile(p: Problem, group: int, elements: int) -> tuple[dict[str, Any], int]:
    """A tile of whole groups, and how many blocks of such there are."""
    width, groups = power_of_two(group), p.channels // group
    together = 1
    if p.tokens:  # narrow groups side by side, up to a cache line
        together = min(max(1, 64 // width), power_of_two(groups))
    channels = width * together
    # In planes positions lie side by side: a few of them at least, if the registers hold as many channels.
    chunk = max(1, elements // channels, 0 if p.tokens else min(8, _MOST // channels))
    whole = power_of_two(p.count)
    samples = 1
    if p.samples > 1 and whole < chunk:
        samples = min(chunk // whole, power_of_two(p.samples))
        chunk = whole
    tile = {"CB": channels, "NB": samples, "L": chunk, "CHUNKED": p.samples == 1 or p.count > chunk}
    return tile, triton.cdiv(groups, together)
