"""A case: one layer on one workload in one dtype, layout and mode; its module, its inputs, its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normzoo.zoo import Entry

from .workloads import FAMILIES, Workload, beside, fitted, memory_formats, passes, workloads

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
}
"""Of the input and of the parameters."""

_MOST_SETS = 256


class Buffers(NamedTuple):
    x: Tensor
    dy: Tensor | tuple[Tensor, ...]
    """Of every output."""


class Conditioned(nn.Module):
    """A layer with what a call of it needs beside x: parameters, which get gradients as in training, except for
    side inputs such as a mask."""

    def __init__(self, layer: nn.Module, beside: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.names = layer, tuple(beside)
        for name, t in beside.items():
            if name in getattr(layer, "side_inputs", ()):
                self.register_buffer(name, t)
            else:
                self.register_parameter(name, nn.Parameter(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **{name: getattr(self, name) for name in self.names})


class Summed(nn.Module):
    """The norm of a sum, and the sum: (y, total) of x, with a residual that gets a gradient as well."""

    def __init__(self, norm: nn.Module, residual: Tensor, call: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.norm, self.residual, self.call = norm, nn.Parameter(residual), call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.call(self.norm, x, self.residual)


_OF_SUM = {"forward": 2, "saving": 2, "backward": 1, "both": 3}
"""More passes: residual and sum forward, the gradient of the sum backward; x and residual share theirs."""


@dataclass(frozen=True)
class Case:
    entry: Entry
    workload: Workload
    dtype: str
    memory_format: str
    mode: str
    """``training`` or ``eval``; ``any`` for a layer that does the same in both."""
    added: bool = False
    """The layer's function with a residual instead of the layer."""

    @property
    def key(self) -> dict:
        """What tells this case from others, as it stands in a row of results."""
        return {
            "layer": self.entry.added.__name__ if self.added and self.entry.added else self.entry.name,
            "workload": self.workload.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "mode": self.mode,
        }

    def __str__(self) -> str:
        words = [self.key["layer"], self.workload.name, self.dtype, self.memory_format, self.mode]
        return " ".join(word for word in words if word not in ("contiguous", "any"))

    @cached_property
    def _fitted(self) -> tuple[tuple, dict[str, Any], tuple[int, ...]]:
        return fitted(self.entry, self.workload)

    @property
    def arguments(self) -> tuple:
        """Positional constructor arguments of the layer, and of torch's class."""
        return self._fitted[0]

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the layer."""
        return self._fitted[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._fitted[2]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Batch statistics are float32 under AMP, and cuDNN takes no others."""
        return DTYPES[self.dtype][1] if self.entry.family == "rows" else torch.float32

    def bytes(self, direction: str) -> int:
        """The fewest that a call can move."""
        count = passes(self.entry, self.mode, direction) + self.added * _OF_SUM[direction]
        return count * math.prod(self.shape) * DTYPES[self.dtype][0].itemsize

    def module(self, cls: type[nn.Module], device: torch.device) -> nn.Module:
        """The layer as `cls`, which is the entry's class or another with its arguments."""
        made = cls(*self.arguments, **self.keywords, device=device, dtype=self.parameter_dtype)
        return made.train(self.mode != "eval")

    def layer(self, device: torch.device) -> nn.Module:
        """The entry's layer, for calls with x alone; its parameters are off their initial values, so that each
        of them matters."""
        with torch.random.fork_rng(devices=()):  # some draw weights
            torch.manual_seed(0)
            made = self.module(self.entry.cls, device)
        x = torch.empty((), device=device, dtype=self.parameter_dtype).expand(self.shape)
        if found := beside(self.entry, x):
            made = Conditioned(made, found).train(made.training)
        chance = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=chance).to(p))
        if self.added:
            residual = torch.arange(self.shape[-1], device=device) % 3 - 1
            made = Summed(made, residual.to(DTYPES[self.dtype][0]).expand(self.shape).clone(), self._sum)
        return made

    def _sum(self, norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        shape, weight, bias = norm.normalized_shape, norm.weight, norm.bias
        assert self.entry.added is not None
        return self.entry.added(x, residual, shape, weight, bias=bias, eps=norm.eps)

    def buffers(self, device: torch.device, cache: int) -> list[Buffers]:
        """Inputs and upstream gradients in so many copies that their turn comes after the cache has forgotten
        them; fewer where that takes more than 256."""
        chance = torch.Generator(device).manual_seed(1)
        drawn = (torch.randn(self.shape, device=device, generator=chance) for _ in range(2 + self.added))
        x, *dys = (_laid_out((2 * t + 0.5).to(DTYPES[self.dtype][0]), self.memory_format) for t in drawn)
        count = min(max(2, math.ceil(2 * cache / (x.numel() * x.element_size()))), _MOST_SETS)
        sets = [(_copy(x).requires_grad_(), tuple(map(_copy, dys))) for _ in range(count)]
        return [Buffers(x, dy if self.added else dy[0]) for x, dy in sets]


def _laid_out(t: Tensor, memory_format: str) -> Tensor:
    if memory_format == "padded":
        *lead, width = t.shape
        return t.new_empty(*lead, width + -width % 8)[..., :width].copy_(t)
    if memory_format == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    return t


def _copy(t: Tensor) -> Tensor:
    """A copy with the same strides, which clone() does not keep where rows are padded."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def plan(
    entries: Sequence[Entry],
    device: str,
    size: str = "default",
    dtypes: Sequence[str] = ("float32",),
    patterns: Sequence[str] = (),
    scaling: str | None = None,
    added: bool = False,
) -> list[Case]:
    """The cases to measure, the most important first: all layers on a workload before the next workload.

    `patterns` are names of workloads, with wildcards or cut after the use ("llm"). A layer of a family that has
    no workloads here has no cases. With `added`, of the layers' functions with a residual.

    Raises:
        ValueError: no workload fits a pattern, or no layer has workloads or the sweep.
    """
    lists = {family: workloads(family, device, size, scaling) for family in {e.family for e in entries}}
    names = {workload.name for chosen in lists.values() for workload in chosen}
    if not names:
        asked = ", ".join(entry.name for entry in entries)
        what = f"the scaling {scaling!r}" if scaling else "workloads"
        having = [name for name, family in FAMILIES.items() if scaling is None or scaling in family.scaling]
        raise ValueError(f"none of {asked} has {what}; layers of the family {' or '.join(having)} have")
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise ValueError(f"there is no workload {pattern!r}; there are {', '.join(sorted(names))}")
    cases = []
    for place in range(max(map(len, lists.values()))):
        for entry in entries:
            for workload in lists[entry.family][place : place + 1]:
                if patterns and not any(_fits(workload.name, pattern) for pattern in patterns):
                    continue
                shape = fitted(entry, workload)[2]
                cases += [
                    Case(entry, workload, dtype, memory_format, mode, added)
                    for dtype in dtypes
                    for memory_format in memory_formats(entry.family, shape)
                    for mode in (("training", "eval") if entry.couples_samples else ("any",))
                ]
    return cases


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.partition("-")[0] == pattern
