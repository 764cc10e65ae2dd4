"""One caught launch, compiled for one target and turned into numbers."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from . import fake, sass, ttir
from .traffic import Launched

Row = dict[str, Any]


def _bytes_in_flight(module: ttir.Module, ptx: Sequence[sass.Access], shared: int, x_args: set[str]) -> int:
    """Bytes of x-sized loads one program has issued before it must wait for the first of them.

    One iteration of the innermost loop that loads; a software pipeline (cp.async) holds as many
    iterations as its buffers in shared memory have room for.
    """
    loads = [a for a in module.accesses if a.kind == "load" and a.args & x_args]
    iteration = collections.Counter()
    for access in loads:
        iteration[access.loops] += access.tile_bytes
    depth = max(map(len, iteration), default=0)
    in_flight = max((size for nest, size in iteration.items() if len(nest) == depth), default=0)
    piped = frozenset().union(*(a.args for a in ptx if a.kind == "async"))
    if piped & x_args:
        buffer = sum(a.tile_bytes for a in module.accesses if a.kind == "load" and a.loops and a.args & piped)
        in_flight *= max(1, shared // buffer)
    return in_flight


def _traffic(launch: fake.Launch, moved: dict[str, float]) -> dict[int, tuple[float, float]]:
    """By memory that the launch touches: the bytes it asks for, and how many of them are different at most."""
    found: dict[int, tuple[float, float]] = {}
    for number, (name, asked) in enumerate(moved.items()):
        tensor = launch.tensors.get(name)
        place, size = -number, asked
        if tensor is not None:
            storage = tensor.untyped_storage()
            place, size = storage._cdata, min(tensor.numel() * tensor.element_size(), storage.nbytes())
        before = found.get(place, (0.0, 0.0))
        found[place] = before[0] + asked, before[1] + min(asked, size)
    return found


def measure(launch: fake.Launch, x: torch.Tensor, target: fake.Target, loads: dict[str, int]) -> Row:
    """Everything static about one launch; `code` is left for `add_instructions`.

    loads: what is found in memory where an argument points, by its name.
    """
    compiled = launch.compile(target)
    names = [name for name, kind in launch.signature.items() if kind != "constexpr"]
    x_args = fake.x_arguments(launch, x)
    x_bytes = x.numel() * x.element_size()
    module = ttir.parse(compiled.asm["ttir"])
    launched = Launched(module, launch.scalars, launch.grid, loads)
    x_moved, moved = 0.0, collections.Counter()
    for access in module.accesses:
        size = launched.moved(access)
        moved[min(access.args)] += size
        x_moved += size if access.args & x_args else 0
    tiles = [a for a in module.accesses if a.args & x_args]
    row = {
        "kernel": launch.name,
        "grid": launch.grid,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "shared_excess": max(0, compiled.metadata.shared - target.shared_per_program),
        "arguments": len(names),
        "x_passes": x_moved / x_bytes,
        "l2_passes": moved.total() / x_bytes,
        "traffic": _traffic(launch, moved),
        "atomics": sum(a.kind.startswith("atomic") for a in module.accesses),
        "narrow_offsets": sorted(launched.narrow_offsets(x.numel()) & x_args),
        "unread": sorted(module.unread | launched.unknown),
        "helpers": launch.helpers,
        "elements": x.numel(),
        "x_bytes": x_bytes,
        "tile": max((math.prod(a.dims) for a in tiles), default=0),
    }
    if target.gpu.backend == "hip":
        return row | sass.amd(compiled.asm["amdgcn"])
    ptx = sass.accesses(compiled.asm["ptx"], names)
    row |= sass.usage(compiled.asm["cubin"])
    programs = sass.resident(row["registers"], row["warps"], row["shared"], target)
    programs = min(programs, -(-math.prod(launch.grid) // target.sm_count))
    on_x = [a for a in ptx if a.args & x_args]
    row |= {
        "x_width": min((a.width for a in on_x), default=0),
        "pipelined": bool(x_args & frozenset().union(*(a.args for a in ptx if a.kind == "async"))),
        "kb_in_flight": _bytes_in_flight(module, ptx, row["shared"], x_args) * programs / 1024,
        "atomics": max(row["atomics"], sum(a.kind in ("atom", "red") for a in ptx)),
        "f64": sass.double_instructions(compiled.asm["ptx"]),
    }
    if target.name == "sm_90":
        row["code"] = sass.text_section(compiled.asm["cubin"])
        row["loads"] = sum(a.kind == "ld" for a in ptx)
    return row


def double_scalars(launch: fake.Launch, target: fake.Target) -> int:
    """f64 instructions of a launch whose Python floats arrive as fp64, as Inductor passes them."""
    return sass.double_instructions(launch.compile(target, fp64_scalars=True).asm["ptx"])


def add_instructions(rows: Sequence[Row]) -> None:
    """Replaces the machine code of `rows` by instructions per element and barriers per tile."""
    rows = [row for row in rows if "code" in row]
    if not rows:
        return
    codes = [row.pop("code") for row in rows]
    distinct = list(dict.fromkeys(codes))
    counts = dict(zip(distinct, sass.disassemble(distinct, "SM90"), strict=True))
    for row, code in zip(rows, codes, strict=True):
        instructions = counts[code]
        loads = row.pop("loads")
        # ptxas may unroll the loop that PTX has: more loads than were asked for.
        unrolled = 1.0
        if loads and not row["pipelined"]:
            unrolled = max(1.0, instructions.wide_loads / loads)
        row["barriers"] = instructions.barriers / unrolled
        if row["tile"]:
            threads = row["warps"] * 32
            row["instructions"] = instructions.count / unrolled * threads / row["tile"]


def profile_call(
    call: Callable[[], object],
    x: torch.Tensor,
    target: str = "sm_90",
    loads: dict[str, int] | None = None,
    wanted: Callable[[fake.Launch], bool] = bool,
) -> tuple[list[Row], fake.Caught]:
    """Rows of the `wanted` launches that `call` makes with meta tensors, and what else it does."""
    caught = fake.catch(call, fake.TARGETS[target])
    launches = filter(wanted, caught.launches)
    return [measure(launch, x, fake.TARGETS[target], loads or {}) for launch in launches], caught


def profile_kernel(
    kernel: JITFunction, grid: tuple, args: tuple, x: torch.Tensor, target="sm_90", **options
) -> Row:
    """The row of a single kernel launched as `kernel[grid](*args, **options)` on meta tensors."""
    rows, _ = profile_call(lambda: kernel[grid](*args, **options), x, target)
    add_instructions(rows)
    return rows[0]
