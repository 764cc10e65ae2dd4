"""Bytes that a launch moves: the tiles of its IR times loop trips times the share of mask lanes."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np

from .ttir import Access, Guard, Loop, Module

_COMPARE = {
    "slt": np.less, "ult": np.less, "sle": np.less_equal, "ule": np.less_equal, "eq": np.equal,
    "sgt": np.greater, "ugt": np.greater, "sge": np.greater_equal, "uge": np.greater_equal,
    "ne": np.not_equal,
}  # fmt: skip
_ARITHMETIC = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor, "minsi": np.minimum, "maxsi": np.maximum,
    "minui": np.minimum, "maxui": np.maximum, "shli": np.left_shift, "shrsi": np.right_shift,
    "divsi": np.floor_divide, "divui": np.floor_divide, "remsi": np.remainder,
    "remui": np.remainder, "ceildivsi": lambda x, y: -(-x // y),
}  # fmt: skip
_SAME = {
    "tt.splat", "tt.broadcast", "arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast",
    "tt.reshape",
}  # fmt: skip


# What a bound or mask raises that depends on loaded data or on an operation not known here.
_UNKNOWN = (KeyError, TypeError, ValueError)


class Launched:
    """A module with the scalars and grid of one launch, so that bounds and masks have values.

    loads: what is found where an argument points, by its name; other loaded data is not known.
    """

    def __init__(
        self, module: Module, scalars: dict[str, int], grid: tuple[int, int, int], loads: dict[str, int]
    ) -> None:
        self.module, self.scalars, self.grid, self.loads = module, scalars, grid, loads
        self.programs = math.prod(grid)
        self.unknown: set[str] = set()

    def _value(self, ref: str, env: dict[str, Any]) -> Any:
        if ref not in env:
            env[ref] = self._compute(*self.module.definitions[ref], env=env)
        return env[ref]

    def _compute(self, op: str, refs: Any, rest: str = "", *, env: dict[str, Any]) -> Any:
        if op == "argument":
            return self.scalars[refs]
        if op in ("copy", "loop"):  # what a loop carries counts as what it starts with
            return self._value(refs, env)
        if op == "arith.constant":
            text = re.search(r"dense<([^>]+)>|^(\S+)", rest)
            text = text.group(1) or text.group(2)
            return text == "true" if text in ("true", "false") else int(text, 0)
        if op == "tt.get_program_id":
            return env["pid"]["xyz".index(rest[0])]
        if op == "tt.get_num_programs":
            return self.grid["xyz".index(rest[0])]
        if op == "tt.make_range":
            start, end = (int(re.search(rf"{k} = (\d+)", rest).group(1)) for k in ("start", "end"))
            return np.arange(start, end, dtype=np.int64)
        if op == "tt.load":
            return self.loads[self._pointed(refs[0])]
        args = [self._value(ref, env) for ref in refs]
        if op in _SAME:
            return args[0]
        if op == "tt.expand_dims":
            axis = int(re.search(r"axis = (\d+)", rest).group(1))
            return np.expand_dims(args[0], axis) if np.ndim(args[0]) else args[0]
        if op == "arith.select":
            return np.where(*args)
        if op == "arith.cmpi":
            return _COMPARE[rest.split(",")[0].split()[0]](*args)
        return _ARITHMETIC[op.removeprefix("arith.")](*args)

    def _pointed(self, ref: str) -> str:
        """The argument that a pointer comes from."""
        op, refs, *_ = self.module.definitions[ref]
        return refs if op == "argument" else self._pointed(refs[0])

    def _spread(self, most: int) -> np.ndarray:
        return np.unique(np.linspace(0, self.programs - 1, min(self.programs, most)).astype(int))

    def _environment(self, program: Any) -> dict[str, Any]:
        x, y, _ = self.grid
        return {"pid": (program % x, program // x % y, program // (x * y))}

    def _trips(self, loop: Loop, env: dict[str, Any]) -> Any:
        try:
            low, high, step = (self._value(ref, env) for ref in (loop.low, loop.high, loop.step))
            return np.maximum(0, -(-(high - low) // step))
        except _UNKNOWN as error:
            self.unknown.add(f"loop bound {error}")
            return 1

    def _density(self, access: Access, program: int) -> tuple[float, int]:
        """The share of lanes that a program's mask lets through, and how often it runs.

        Of each loop the first and the last iteration are looked at; others count as the first.
        """
        trips = [int(self._trips(loop, self._environment(program))) for loop in access.loops]
        if not math.prod(trips):
            return 0.0, 0
        density = 0.0
        for last in itertools.product((False, True), repeat=len(trips)):
            weight, env = 1.0, self._environment(program)
            for loop, count, at_end in zip(access.loops, trips, last, strict=True):
                weight *= (1 if at_end else count - 1) / count
                step = int(self._value(loop.step, env))
                env[loop.variable] = int(self._value(loop.low, env)) + at_end * (count - 1) * step
            if not weight:
                continue
            for guard in access.blocks:
                if isinstance(guard, Guard):
                    weight *= bool(self._value(guard.condition, env)) == guard.taken
            if access.mask:
                mask = np.asarray(self._value(access.mask, env), dtype=bool)
                weight *= float(np.broadcast_to(mask, access.dims).mean())
            density += weight
        return density, math.prod(trips)

    def _mean_density(self, access: Access) -> float:
        """Over a few programs; the last one, whose tile may be partial, stands for itself alone."""
        picks = self._spread(8)
        share = np.full(len(picks), (self.programs - 1) / max(1, len(picks) - 1))
        share[-1] = 1
        density, runs = np.transpose([self._density(access, int(program)) for program in picks])
        total = np.sum(runs * share)
        return float(np.sum(density * runs * share) / total) if total else 0.0

    def moved(self, access: Access) -> float:
        """Bytes over the whole launch, unmasked lanes only."""
        env = self._environment(self._spread(4096))
        runs = math.prod((self._trips(loop, env) for loop in access.loops), start=np.int64(1))
        density = 1.0
        if access.mask or access.blocks:
            try:
                density = self._mean_density(access)
            except _UNKNOWN as error:
                self.unknown.add(f"mask {error}")
        return access.tile_bytes * density * float(np.mean(runs)) * self.programs

    def narrow_offsets(self, numel: int) -> set[str]:
        """Arguments addressed through a 32-bit product that grows with the whole of x."""
        found = set()
        for arg, products in self.module.products.items():
            for product, blocks in products:
                env = self._environment(self.programs - 1)
                try:
                    for loop in blocks:
                        if isinstance(loop, Loop):
                            env[loop.variable] = int(self._value(loop.high, env)) - 1
                    largest = int(np.max(self._value(product, env)))
                except _UNKNOWN:
                    found.add(arg)
                else:
                    if largest > numel // 2:
                        found.add(arg)
        return found
