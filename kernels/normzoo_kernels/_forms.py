"""Which form of a row kernel runs, and how large its tiles are: a static table, so that nothing is tuned at
run time and the order of every sum depends on the shape and the device alone.

The numbers come from the compiled code (`python -m normzoo_bench.static`): no spills, 16-byte accesses, enough
bytes on their way to hide the latency of memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ._choices import chosen
from ._launch import shared_memory, sm_count
from ._layout import VECTOR
from ._rows import norm_bwd, norm_fwd
from ._rows_wide import norm_bwd_wide, norm_fwd_wide

_ON_CHIP = 16384
"""Widest row that a program holds in registers."""

_L2 = 40 << 20
"""Bytes that a second sweep may hope to find in the L2 cache."""

_ROW_GROUP = 4
"""Rows of `_ROW_BYTES` in a step of two sweeps: as many on every multiprocessor nearly fit the L2 cache."""

_ROW_BYTES = 32 << 10

_NARROWEST = 8
"""Entries of a row of a tile, at least: a thread that has many rows spills."""

_IN_FLIGHT = 48 << 10
"""Bytes of x and dy that a multiprocessor should have on their way."""


@dataclass(frozen=True)
class Form:
    kernel: Any
    programs: int
    """At most; one program does several tiles."""
    rows: int
    """Rows of a tile."""
    constants: dict[str, Any] = field(default_factory=dict)

    def grid(self, count: int) -> int:
        """Programs for `count` rows."""
        return min(triton.cdiv(count, self.rows), self.programs)


def forward_form(width: int, itemsize: int, scalar: bool, device: torch.device) -> Form:
    """`scalar`: rows lie so that 16-bit entries are read one by one, which asks for smaller tiles."""
    block, sms = max(triton.next_power_of_2(width), _NARROWEST), sm_count(device)
    if block > _ON_CHIP:
        chunk, warps = 8192, 8
        if itemsize == 4 and width % 4:
            chunk, warps = 4096, 16  # entry by entry, more of them spill
        stages = _stages(device, chunk * itemsize, 3 * chunk * itemsize)
        return Form(norm_fwd_wide, 2 * sms, 1, {"C": chunk, "STAGES": stages, "num_warps": warps})
    warps = max(4, block // 1024)
    elements = 8192 if itemsize == 2 and not scalar else 4096
    if block <= 128 and itemsize == 4:
        elements = 2048  # more and ptxas spills a register
    tile = _tile(block, itemsize, elements, warps, owned=4096 // itemsize)
    return Form(norm_fwd, sms * max(1, 16 // warps), tile["R"], tile | {"num_warps": warps})


def backward_form(
    kind: str, width: int, itemsize: int, scalar: bool, device: torch.device, tensors: int, gradients: int
) -> Form:
    """`tensors`: read by the kernel, as large as x. `gradients`: of parameters, 0 to 2."""
    block, sms = max(triton.next_power_of_2(width), _NARROWEST), sm_count(device)
    group = int(chosen("row_group")) if itemsize == 2 else min(int(chosen("row_group")), 8)  # more would spill
    packed = 8192 < block <= _ON_CHIP and itemsize == 2 and kind == "rms" and group == _ROW_GROUP
    packed = packed and width * itemsize % VECTOR == 0
    if block > 8192 and not packed:
        elements = 16384 // itemsize
        if scalar or (itemsize == 4 and width % 4):
            elements //= 4 if scalar else 2  # entry by entry, more of them spill
        rows = max(1, min(group, group * _ROW_BYTES // (block * itemsize)))
        # The second sweep also reads the weight and what the program has of the gradients so far.
        buffer = tensors * elements * itemsize + elements // rows * 4 * (1 + gradients)
        stages = min(2, _stages(device, elements * itemsize, buffer))
        held = rows * 2 * width * itemsize + gradients * 4 * width
        constants = {"R": rows, "C": elements // rows, "STAGES": stages, "num_warps": 8}
        cache = _L2 if group == _ROW_GROUP else _l2(device)
        return Form(norm_bwd_wide, min(sms, max(1, cache // held)), rows, constants)
    light = kind != "layer" and itemsize == 2 and 128 < block <= 4096
    warps = 16 if packed else 4 if light else 8
    programs, elements = sms, 1024 * warps
    if scalar and block <= 4096:
        # Nothing runs ahead of accesses so narrow: a second program has its rows on their way meanwhile.
        programs, warps, elements = 2 * sms, 4, 4096
    if (block <= 128 and (scalar or itemsize == 4)) or (block == 256 and not light):
        elements //= 2  # more and ptxas spills
    tile = _tile(block, itemsize, elements, warps, owned=1024)
    # Packed rows have the registers of the multiprocessor to themselves; there is no room to run ahead.
    tile_bytes = max(block, elements) * itemsize
    stages = 1 if packed else _stages(device, tile_bytes, tensors * tile_bytes)
    constants = tile | {"PACKED": packed, "STAGES": stages, "num_warps": warps}
    return Form(norm_bwd, programs, tile["R"], constants)


@functools.cache
def _l2(device: torch.device) -> int:
    """As `_L2`, or four fifths of the cache of `device` where that is more."""
    if device.type != "cuda":
        return _L2
    return max(_L2, getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) * 4 // 5)


def _tile(block: int, itemsize: int, elements: int, warps: int, owned: int) -> dict[str, int]:
    """A tile of about `elements` in rows of `block`; rows up to `owned` belong to one warp each."""
    vectors = 32 * VECTOR // itemsize
    if vectors < block <= owned:
        return {"K": block // vectors, "R": warps, "C": vectors}
    return {"K": 1, "R": max(1, elements // block), "C": block}


def _stages(device: torch.device, tile_bytes: int, buffer_bytes: int) -> int:
    """Depth of the software pipeline, as far as shared memory holds its buffers."""
    ahead = -(-_IN_FLIGHT // (2 * tile_bytes))
    return 1 + min(ahead, shared_memory(device) // buffer_bytes)
