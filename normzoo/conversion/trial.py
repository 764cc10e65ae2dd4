"""Test runs of modules that nobody here has seen: copies, inputs, and how far apart two outputs are."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapted import bare_class
from .norm import Norm, Weighted

_MOST_AT_ONCE = 1 << 20
"""Entries of an input that is larger than it has to be."""

_one_thread = threading.RLock()
"""Held by the thread that is :func:`alone`."""


def row_inputs(shape: Sequence[int], device: torch.device) -> Tensor:
    """(2, 3, \\*shape) in float32: rows off zero and of many sizes, so that eps, centring and 1 + w show."""
    x = 0.02 + 0.05 * noise((2, 3, *shape), chance())
    sizes = torch.logspace(0, -3, 6, device="cpu", dtype=torch.float32)
    return (x * sizes.reshape(2, 3, *(1 for _ in shape))).to(device)


def inputs_for(norm: Norm, device: torch.device) -> Tensor:
    """What shows a norm: rows, or (N, C, H, W) and the like."""
    if isinstance(norm, Weighted):
        return noise((3, *norm.example), chance()).to(device)
    shape = norm.shape or (48,)
    if norm.axis == -1:
        return row_inputs(shape, device)
    x = channel_inputs(shape[0], device, norm.dims or 2)
    return x if norm.axis == 1 else x.movedim(1, norm.axis)


def channel_inputs(channels: int, device: torch.device, dims: int = 2) -> Tensor:
    """(3, channels, 2, 2) in float32, every pixel of another size; with other `dims` the same pixels."""
    x = row_inputs((2, channels), device).permute(1, 3, 0, 2).contiguous()
    if dims == 0:
        return x.movedim(1, -1).flatten(0, 2)
    return x.reshape(3, channels, *{1: (4,), 2: (2, 2), 3: (2, 2, 1)}[dims])


def other_inputs(norm: Norm, device: torch.device) -> Iterator[Tensor]:
    """Large inputs of several ranks, with a second dimension as wide as the normalized one where that is not
    too much: forward may look at the shape."""
    shape = norm.shape or (48,)
    side = shape[-1] if shape[-1] * math.prod(shape) <= _MOST_AT_ONCE else 2
    if norm.axis == -1:
        sizes = [(*lead, *shape) for lead in ((6,), (1, side), (1, side, 1))]
    else:
        sizes = [(6, shape[0]), *((1, shape[0], *rest) for rest in ((side,), (1, side)))]
    for size in sizes:
        yield (20 + 50 * noise(size, chance())).to(device)


def channel_batches(channels: int, device: torch.device) -> Iterator[Tensor]:
    """Large inputs of every rank, with a last dimension as wide as the channels where that is not too much, and
    of many samples: forward may look at the shape."""
    side = channels if 2 < channels <= 256 else 3
    many = max(4, min(520, _MOST_AT_ONCE // channels))  # more than a ghost batch has
    for size in ((many,), (2, side), (2, 2, side), (2, 1, 2, side)):
        yield (20 + 50 * noise((size[0], channels, *size[1:]), chance())).to(device)


def chance() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def noise(shape: Sequence[int], numbers: torch.Generator) -> Tensor:
    """Normal, in float32 on the CPU, whatever the defaults of the caller."""
    return torch.randn(tuple(shape), generator=numbers, device="cpu", dtype=torch.float32)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Batch norms find no other ranks: a test run on one of them must not wait for the others.

    torch's batch norms ask ``dist.is_initialized``, which is replaced for the whole process: meanwhile other
    threads find no ranks either, and one that wants to be alone too waits.
    """
    if not dist.is_available():
        yield
        return
    with _one_thread:
        before = dist.is_initialized
        dist.is_initialized = lambda: False
        try:
            yield
        finally:
            dist.is_initialized = before


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """The code under test leaves no gradients, warnings or drawn random numbers behind."""
    with (
        alone(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def run(module: nn.Module, x: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    """The output of `module` for x and those of `beside` that its forward takes."""
    takes = inspect.signature(bare_class(type(module)).forward).parameters
    return module(x, **{name: value for name, value in beside.items() if name in takes})


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers that the module itself holds."""
    own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {name: t for name, t in own if t.is_floating_point()}


def bare(module: nn.Module) -> nn.Module:
    """A copy that shares the tensors and has no hooks, nor have its children.

    A hook may be a method of something large, which deepcopy would follow.
    """
    made = type(module).__new__(type(module))  # copy.copy refuses parametrized modules
    vars(made).update(vars(module))
    for key, value in vars(made).items():
        if key.endswith("_hooks"):
            vars(made)[key] = type(value)()
        elif isinstance(value, Tensor):  # an output of an earlier run, which deepcopy refuses
            vars(made)[key] = value.detach()
        elif type(value).__name__ == "ProcessGroup":  # which deepcopy refuses too
            vars(made)[key] = None
    vars(made)["_modules"] = {
        name: None if child is None else bare(child) for name, child in module._modules.items()
    }
    return made


def stand_in(module: nn.Module) -> nn.Module:
    """A copy in float32 and eval mode, without hooks, with random parameters; on the CPU in place of meta."""
    twin = copy.deepcopy(bare(module))
    if any(t.is_meta for t in own_tensors(twin).values()):
        twin = twin.to_empty(device="cpu")
        for counter in twin.buffers():
            counter.zero_()
    twin = twin.float().eval()
    numbers = chance()
    for name, t in own_tensors(twin).items():
        drawn = noise(t.shape, numbers)
        place = torch.arange(t.numel(), device="cpu").reshape(t.shape)
        if "var" in name or "phi" in name:  # small ones too, so that eps shows
            drawn = (drawn.abs() + 0.5) * 1e-6 * 10.0 ** (place % 7)
        else:
            # Every second weight is negative, so that abs() or clamp() of it shows.
            drawn = 0.2 * drawn if shifts(name) else (0.7 + 0.3 * drawn) * (1 - 3 * (place % 2))
        t.data.copy_(drawn)
    return twin


def shifts(name: str) -> bool:
    return re.search("bias|beta|shift|mean", name, re.IGNORECASE) is not None


def distance(a: Tensor, b: Tensor, span: tuple[int, ...]) -> float:
    """Largest difference, relative to the largest finite entry over the dimensions `span`.

    Infinite where one of the two is NaN or infinite and the other is not.
    """
    if a.shape != b.shape:
        return math.inf
    apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    relative = apart.amax(span) / b.nan_to_num(0.0, 0.0, 0.0).abs().amax(span).clamp_min(1e-30)
    return relative.nan_to_num(math.inf).max().item()


def short(error: Exception) -> str:
    """What went wrong in code that is not ours, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
