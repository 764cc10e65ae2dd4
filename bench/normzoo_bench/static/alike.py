"""Which launches count as one configuration: what is shown of one of them is taken to hold for all.

A launch has a core and options. The core is what decides about registers and shared memory: the kernel, the
type of x, the kind of norm, residual and gradients, the tile, the pipeline, the warps, and of rows whether they
are whole vectors. Every core is compiled, and every value of every option with some core of its kernel, for x
of 16 and of 32 bits; not every core with every option. Not told apart at all are

- float16 and bfloat16: the same code but for the conversions;
- numbers (eps, offset, rate) that are not zero, and what is only compared with numbers found in memory;
- lengths of rows and strides, but for whether all of them are whole vectors. So two widths in one tile differ
  in where their masks end, in a divisor, and in how much narrower than a vector an access is;
- tiles of the channel kernels, [channels, samples, positions], with as many entries: the axis that lies along
  memory is rounded up to 1, 16, 256 or 4096, the others are one or more; and tiles of less than 1024 entries,
  which have registers to spare;
- how many rows, programs and parts there are: arguments, which compile nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

_LENGTHS = {"N", "PART", "WIDTH", "X_WIDTH", "DY_WIDTH", "Y_STRIDE", "DX_STRIDE", "M"}
_CHANNEL_TILE = {"CB", "NB", "L"}
_FOUND = {"WARMUP"}
_OPTIONS = {
    "OFFSET", "ROUND", "EPS", "DY_COL", "DTOTAL_COL", "PER_SAMPLE", "PIVOTS", "SCALES", "SLOPES", "LIES",
    "DY_INNER", "SCALE_ROWS", "SHIFT_ROWS", "PAPER", "GUARD", "SUMS", "RATE", "FACTOR", "CORRECTION", "OUTSIDE",
}  # fmt: skip
_DECISIVE = {"res_ptr", "dtotal_ptr", "mask_ptr", "dy_ptr"}
"""Pointers of the core: what they point to is as large as x, or parts it in two."""

Configuration = tuple[Hashable, ...]


def configurations(kernel: JITFunction, values: dict[str, Any]) -> frozenset[Configuration]:
    """The core of a launch, and each of its options."""
    constants = {p.name for p in kernel.params if p.is_constexpr} | {"num_warps"}
    pointers = {
        name: value for name, value in values.items() if isinstance(value, torch.Tensor) or value is None
    }
    present = [value for value in pointers.values() if value is not None]
    kind = (kernel.fn.__name__, *(_dtype(t) for t in present[:1]))
    core, options = [*kind], []
    vectors = ("whole vectors", _whole_vectors(constants, values, present))
    (core if "R" in constants else options).append(vectors)
    for name, value in sorted(pointers.items()):
        (core if name in _DECISIVE else options).append((name, None if value is None else _dtype(value)))
    for name in sorted(constants & values.keys() - pointers.keys()):
        if name not in _LENGTHS | _CHANNEL_TILE | _FOUND and not name.endswith("UNIT"):
            value = values[name]
            value = bool(value) if isinstance(value, float) else value
            (options if name in _OPTIONS else core).append((name, value))
    if _CHANNEL_TILE <= constants:
        core.append(_channel_tile(values))
    return frozenset([tuple(core), *((*kind, option) for option in options)])


def _dtype(t: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if t.dtype == torch.float16 else t.dtype


def _whole_vectors(constants: set[str], values: dict[str, Any], present: list[torch.Tensor]) -> bool:
    lengths = {values[name] for name in constants if name in _LENGTHS}
    # 1 is also the unit of what is not there.
    lengths |= {values[name] for name in constants if name.endswith("UNIT")} - {1}
    vector = 16 // present[0].element_size() if present else 1
    return all(length % vector == 0 for length in lengths)


def _channel_tile(values: dict[str, Any]) -> Hashable:
    channels, samples, positions = (values[name] for name in ("CB", "NB", "L"))
    inner, outer = (channels, positions) if values.get("TOKENS") else (positions, channels)
    rounded = 1 << 4 * -(-(inner.bit_length() - 1) // 4)
    entries = channels * samples * positions
    return entries if entries >= 1024 else 0, rounded, outer > 1, samples > 1
