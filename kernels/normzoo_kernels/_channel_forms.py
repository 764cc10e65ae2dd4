"""Which form of a channel kernel runs, how large its tiles are and how many parts there are: a static table,
so that the order of every sum depends on the shape, the layout and the device alone.

The numbers come from the compiled code (`python -m normzoo_bench.static`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ._channels import channel_moments, channel_sums
from ._channels_map import channel_map, channel_map_flat
from ._channels_masked import channel_moments_masked
from ._launch import remembered, sm_count
from ._layout import VECTOR

_PROGRAMS = 8
"""Programs a multiprocessor holds; parts are made until there are that many."""

_READERS = 4
"""The same of the statistics, and of a map that goes back over their parts."""

_PARTS = 512
"""Most parts of a population."""

_LEAST = 8
"""Fewest tiles of a part in the statistics."""

_FLAT = 1 << 20
"""Entries up to which float32 tells the planes of a flat tile apart, dividing with an error of two units."""


@dataclass(frozen=True)
class Problem:
    """A call as the kernels see it: x of (samples, channels, count), as `tokens` or planes."""

    samples: int
    channels: int
    count: int
    itemsize: int
    tokens: bool
    per_sample: bool
    masked: bool
    device: torch.device

    @property
    def vector(self) -> int:
        return VECTOR // self.itemsize


@dataclass(frozen=True)
class Form:
    kernel: Any
    programs: int
    parts: int
    """Parts of a population; see `_channels.py`."""
    constants: dict[str, Any]


def power_of_two(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _chunk(count: int, most: int) -> int:
    """The width of chunks that leaves the fewest columns idle."""
    widths = [width for width in (most, most // 2, most // 4) if width >= 128]
    return min(widths, key=lambda width: -(-count // width) * width)


def tile_of(problem: Problem, elements: int, *, vectors: bool = False, spread: int = 0) -> dict[str, Any]:
    """Channels, samples and positions of a tile of `elements`; `spread`: programs that should have one."""
    p = problem
    if p.tokens:
        channels = min(power_of_two(p.channels), 64 if p.itemsize == 2 else 32)
        chunk = elements // channels
        if p.samples > 1:
            chunk = min(chunk, power_of_two(p.count))
        elif p.count <= chunk // 4:
            chunk //= 4  # few rows: wider ones
        if p.per_sample or p.samples == 1:
            channels = min(power_of_two(p.channels), elements // chunk)
        chunked = p.samples == 1 or p.count > chunk
    else:
        whole = power_of_two(p.count + (p.vector - 1 if vectors else 0))
        chunked = whole > elements or (whole > 512 and 3 * p.count < 2 * whole and not vectors)
        chunk = _chunk(p.count, min(elements, whole // 2)) if chunked else whole
        channels = min(power_of_two(p.channels), elements // chunk)
    samples = 1
    if not (chunked or p.per_sample) and p.samples > 3:
        # Fewer channels and more samples a tile, if that brings a program to every multiprocessor.
        while (
            channels > 1 and triton.cdiv(p.channels, channels) < spread and elements // (channels * chunk) < 16
        ):
            channels //= 2
        samples = elements // (channels * chunk)
    return {"CB": channels, "NB": samples, "L": chunk, "CHUNKED": chunked}


def tiles_in(p: Problem, tile: dict[str, Any]) -> int:
    """Tiles of a population."""
    chunks = triton.cdiv(p.count, tile["L"])
    return chunks if p.per_sample else triton.cdiv(p.samples, tile["NB"]) * chunks


def parts_of(tiles: int, undivided: int, least: int, wanted: int) -> int:
    """Into how many parts a population of `tiles` goes for `wanted` jobs, of at least `least` tiles each.

    `undivided`: how many jobs there are where a population is one part.
    """
    parts = max(1, min(wanted // max(undivided, 1), tiles // least, _PARTS))
    return triton.cdiv(tiles, triton.cdiv(tiles, parts))


@remembered
def moments_form(problem: Problem, vectors: bool) -> Form:
    """`vectors`: planes start anywhere and may be read in whole vectors."""
    return _statistics_form(channel_moments_masked if problem.masked else channel_moments, problem, vectors)


@remembered
def sums_form(problem: Problem, vectors: bool) -> Form:
    return _statistics_form(channel_sums, problem, vectors)


def _statistics_form(kernel: Any, problem: Problem, vectors: bool) -> Form:
    p, sms = problem, sm_count(problem.device)
    tile = tile_of(p, 2048, vectors=vectors, spread=sms)
    if p.per_sample and not (p.masked or tile["CHUNKED"]):
        tile = tile_of(p, 4096, vectors=vectors)  # a tile is all there is to a program
    undivided = triton.cdiv(p.channels, tile["CB"]) * (p.samples if p.per_sample else 1)
    parts = parts_of(tiles_in(p, tile), undivided, _LEAST, _READERS * sms)
    # Where two regions or the edges of planes are kept apart, there are no registers to run ahead.
    apart = kernel is channel_moments_masked
    constants = tile | {"STAGES": 1 if vectors or apart else 3, "V": p.vector if vectors else 0}
    constants["num_warps"] = 8 if p.masked else 4
    return Form(kernel, undivided * parts, parts, constants)


def may_read_vectors(problem: Problem) -> bool:
    """Whether planes start anywhere but are short enough to be read in one tile of whole vectors."""
    p = problem
    return not (p.tokens or p.masked) and p.count % p.vector != 0 and p.count + p.vector <= 2048


@remembered
def map_form(problem: Problem, backward: bool, back: bool = False) -> Form:
    """`back`: from the last tile of a part of the statistics to the first."""
    p, sms = problem, sm_count(problem.device)
    tile = tile_of(p, 2048 if backward else 4096)
    undivided = triton.cdiv(p.channels, tile["CB"]) * (p.samples if p.per_sample else 1)
    parts = parts_of(tiles_in(p, tile), undivided, 1, (_READERS if back else _PROGRAMS) * sms)
    # Parameters of two regions, or of many channels beside few positions, need registers of their own.
    warps = 8 if p.masked or (not p.tokens and tile["L"] <= 64) else 4
    constants = tile | {"STAGES": 1, "num_warps": warps} | _order(back)
    return Form(channel_map, undivided * parts, parts, constants)


def _order(back: bool) -> dict[str, Any]:
    return {"REVERSED": True} if back else {}


@remembered
def flat_form(problem: Problem, back: bool = False) -> Form | None:
    """The form for planes that start on no vector but lie side by side, where there is one; `back` as above."""
    p, sms = problem, sm_count(problem.device)
    width = 2048
    if p.tokens or p.masked or p.count % p.vector == 0 or p.count + width > _FLAT:
        return None
    if 2 * p.channels * p.count < width:  # most of a tile would be idle
        return None
    undivided = triton.cdiv(p.channels * p.count, width) * (p.samples if p.per_sample else 1)
    parts = parts_of(1 if p.per_sample else p.samples, undivided, 1, (_READERS if back else _PROGRAMS) * sms)
    constants = {"B": width, "STAGES": 1, "num_warps": 4} | _order(back)
    return Form(channel_map_flat, undivided * parts, parts, constants)


def merge_tile(parts: int) -> dict[str, int]:
    """Parts and entries of a tile of the kernels that merge."""
    most = 32 if parts <= 32 else _PARTS
    return {"P": most, "E": 2048 // most}
