"""The shapes that are measured, by family of layers, and the fewest bytes that a call has to move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo.zoo import Entry

SIZES = ("smoke", "default", "full")
DIRECTIONS = ("forward", "saving", "backward", "both")
"""Without gradients; with gradients, so that tensors are saved; backward alone; forward and backward."""


@dataclass(frozen=True)
class Workload:
    use: str
    """Where such shapes occur."""
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Tells the whole shape, so that two measurements of one name are of one size."""
        return f"{self.use}-{'x'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Family:
    axis: int
    """Of the width: the sum of a row or the channels."""
    shapes: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(smallest list that has it, use, shape), in order of importance; of a GPU."""
    scaling: dict[str, tuple[tuple[int, ...], ...]]


_ROWS = Family(
    axis=-1,
    shapes=(
        ("smoke", "llm", (8192, 4096)),
        ("default", "llm", (8192, 1024)),
        ("default", "llm", (8192, 2048)),
        ("default", "llm", (8192, 8192)),
        ("smoke", "qk", (8192, 32, 128)),
        ("smoke", "odd", (8192, 4095)),
        ("smoke", "vit", (256, 197, 768)),
        ("default", "wide", (4096, 16384)),
        ("smoke", "wide", (1024, 65536)),
        ("default", "vit", (256, 197, 1024)),
        ("default", "qk", (8192, 32, 64)),
        ("default", "qk", (8192, 16, 256)),
        ("default", "qk", (8192, 8, 512)),
        ("default", "odd", (8192, 1023)),
        ("smoke", "small", (64, 1024)),
        ("full", "llm", (32768, 4096)),
        ("full", "llm", (32768, 1024)),
        ("full", "wide", (2048, 32768)),
        ("full", "wide", (1024, 131072)),
        ("full", "wide", (512, 262144)),
        ("full", "odd", (8192, 8191)),
        ("full", "small", (64, 4096)),
    ),
    scaling={
        "rows": tuple((4**k, 4096) for k in range(2, 9)),
        "width": tuple((2048, 2**k) for k in range(8, 17)),
    },
)
_CHANNELS = Family(
    axis=1,
    shapes=(
        ("default", "resnet", (64, 256, 56, 56)),
        ("default", "resnet", (64, 64, 112, 112)),
        ("smoke", "resnet", (64, 2048, 7, 7)),
        ("default", "resnet", (64, 512, 28, 28)),
        ("default", "resnet", (64, 1024, 14, 14)),
        ("default", "unet", (16, 320, 64, 64)),
        ("default", "unet", (16, 1280, 16, 16)),
        ("default", "resnet", (256, 64, 56, 56)),
        ("smoke", "small", (16, 64, 8, 8)),
        ("full", "unet", (16, 640, 32, 32)),
        ("smoke", "unet", (16, 1280, 8, 8)),
    ),
    scaling={
        "rows": tuple((2**k, 256, 28, 28) for k in range(1, 9)),
        "channels": tuple((32, 2**k, 28, 28) for k in range(4, 12)),
    },
)
_RUNNING = Family(
    axis=-1,
    shapes=(
        ("default", "resnet", (64, 256, 56, 56)),
        ("smoke", "tokens", (8192, 1024)),
        ("default", "resnet", (64, 64, 112, 112)),
        ("default", "tokens", (8192, 4096)),
        ("smoke", "resnet", (64, 1024, 14, 14)),
        ("smoke", "small", (64, 1024)),
        ("default", "tokens", (256, 197, 768)),
        ("full", "tokens", (32768, 1024)),
    ),
    scaling={"rows": tuple((4**k, 1024) for k in range(2, 9))},
)
_WEIGHTS = Family(
    axis=1,
    shapes=(
        ("smoke", "conv", (512, 512, 3, 3)),
        ("default", "conv", (2048, 1024, 1, 1)),
        ("smoke", "stem", (64, 3, 7, 7)),
        ("default", "unet", (1280, 1280, 3, 3)),
        ("smoke", "small", (64, 64, 3, 3)),
        ("full", "unet", (640, 2560, 3, 3)),
    ),
    scaling={},
)
FAMILIES = {"rows": _ROWS, "channels": _CHANNELS, "running": _RUNNING, "weights": _WEIGHTS}
SCALINGS = tuple(sorted({name for family in FAMILIES.values() for name in family.scaling}))

_PLAIN = {"power_norm": {"group_num": None}}
"""What makes a running norm of images comparable to batch norm: no sums over the channels of a pixel."""

_BESIDE: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "adab2n": lambda x: {"task_ids": torch.arange(x.shape[0], device=x.device) % 2}
}
"""What a call in training mostly has and the layer can do without: here samples of two tasks."""

_TOKENS = 256
"""Of a sample, as a diffusion transformer has them."""

_SHARE = {("cpu", "smoke"): 256, ("cpu", "default"): 8, ("cpu", "full"): 4, ("cuda", "smoke"): 32}
"""The batch, of a weight the outputs, is divided by this; a CPU takes too long over what fills a GPU."""


def workloads(family: str, device: str, size: str, scaling: str | None = None) -> list[Workload]:
    """The shapes of a family, the most important first; with `scaling`, a sweep of one dimension instead.

    Empty where the family is not known here or does not have the sweep.
    """
    if family not in FAMILIES:
        return []
    share = _SHARE.get((device, size), 1)
    if scaling is not None:
        steps = FAMILIES[family].scaling.get(scaling, ())
        chosen = [(scaling, shape) for shape in (steps[::3] if size == "smoke" else steps)]
    else:
        lists = SIZES[: SIZES.index(size) + 1]
        chosen = [(use, shape) for smallest, use, shape in FAMILIES[family].shapes if smallest in lists]
    scaled = [Workload(use, (max(2, shape[0] // share), *shape[1:])) for use, shape in chosen]
    return list(dict.fromkeys(scaled))  # small batches may have become one


def memory_formats(family: str, shape: Sequence[int]) -> tuple[str, ...]:
    """Rows of odd width also come padded to a stride of 16 bytes, images also with their channels last."""
    if family == "rows":
        return ("contiguous", "padded") if shape[-1] % 8 else ("contiguous",)
    return ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",)


def fitted(entry: Entry, workload: Workload) -> tuple[tuple, dict[str, Any], tuple[int, ...]]:
    """(constructor arguments, keyword arguments, input shape) of `entry` for a workload of its family.

    The width of the entry's own sample is replaced by that of the workload wherever its arguments name it. A
    layer for volumes or sequences gets the image with as many dimensions as it takes, a running norm is told
    where the channels of an image are, and rows are tokens of samples where those share something.
    """
    family = FAMILIES[entry.family]
    sample = entry.sample()
    known = sample.shape[family.axis]
    shape = workload.shape
    if entry.family == "channels" and sample.dim() != len(shape):
        batch, channels, *space = shape
        flat = math.prod(space)
        shape = {2: (batch * flat, channels), 3: (batch, channels, flat)}.get(
            sample.dim(), (batch, channels, 1, *space)
        )
    if entry.family == "rows" and entry.layout == "(B, *, d)" and len(shape) == 2:
        rows, width = shape
        tokens = math.gcd(rows, _TOKENS)
        tokens //= 2 if tokens == rows and tokens % 2 == 0 else 1
        shape = (rows // tokens, tokens, width)
    images = entry.family == "running" and len(shape) == 4
    channels = shape[1 if images else family.axis]
    arguments = tuple(channels if a == known else a for a in entry.arguments)
    keywords = {**entry.measured, **({"channel_dim": 1, **_PLAIN.get(entry.name, {})} if images else {})}
    return arguments, keywords, shape


def beside(entry: Entry, x: Tensor) -> dict[str, Tensor]:
    """What a call of `entry` has beside x, by name."""
    return _BESIDE.get(entry.name, entry.beside)(x)


def passes(entry: Entry, mode: str, direction: str) -> int:
    """How often a tensor of the size of x has to cross the memory bus at least, reads and writes.

    Rows and weights: x and y forward; dy, x and dx backward. Channels need the whole of x before the first
    output, so they read it twice, and in the backward pass dy and x twice; with stored statistics once, and x
    not at all where there is nothing to train. Statistics that are constants for autograd need no second read
    there, and what is known before a pass needs none at all. What statistics depend on takes a read of its own.
    """
    if entry.stored:
        forward, backward = 2, 2
    elif entry.family in ("rows", "weights") or entry.swept or (mode == "eval" and not entry.eval_statistics):
        forward, backward = 2, 3
    else:
        forward, backward = 4 if entry.searches else 3, 3 if entry.constant else 5
    return {"forward": forward, "saving": forward, "backward": backward, "both": forward + backward}[direction]
