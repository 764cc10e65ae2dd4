"""The one place where kernels start: counting, device, and what a failed compilation means."""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

launches: collections.Counter[str] = collections.Counter()
"""Launches by kernel name since the start: a test that compares a kernel sees here that it ran."""

_memories: list[Any] = []


def remembered(function: Callable) -> Callable:
    """Keeps what `function` returns for the latest arguments: a pure function of what a call looks like, which
    takes longer than to look it up."""
    kept = functools.lru_cache(maxsize=2048)(function)
    _memories.append(kept)

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():  # Dynamo looks into no cache
            return function(*args)
        try:
            return kept(*args)
        except TypeError:  # sizes of a graph that serves many have no hash
            return function(*args)

    call.cache_info = kept.cache_info
    return call


def forget() -> None:
    """Empties what :func:`remembered` keeps, for tests that change what it comes from."""
    for memory in _memories:
        memory.cache_clear()


# Programs of a persistent grid on a CPU, where the interpreter runs them one after another.
_INTERPRETED_PROGRAMS = 4


# What Triton says with a plain RuntimeError
_NOT_COMPILED = ("PassManager::run failed", "Failed to find C compiler")


_broken: dict[tuple, str] = {}
"""Variants of kernels that do not compile, and why: trying again would cost a compilation a call."""


class KernelUnavailable(RuntimeError):
    """The kernel did not compile; the reference can still do the work."""


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of `device`. Grids of reductions depend on it and on shapes, on nothing else."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use on `device`, less what reductions need."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 65536) - 8192


def launch(kernel, grid: int, device: torch.device, *args, **meta) -> None:
    """Runs ``kernel[(grid,)](*args, **meta)`` on `device`.

    Raises:
        KernelUnavailable: it does not compile here. Errors of the device itself, such as out of memory or an
            illegal access, pass through as they are.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # which takes longer than to see that there is nothing to change
            _start(kernel, grid, device, args, meta)
    else:
        _start(kernel, grid, device, args, meta)


def _start(kernel, grid: int, device: torch.device, args: tuple, meta: dict) -> None:
    launches[kernel.__name__] += 1
    if _broken and _variant(kernel, device, args, meta) in _broken:
        raise KernelUnavailable(_broken[_variant(kernel, device, args, meta)])
    try:
        kernel[(grid,)](*args, **meta)
    except Exception as error:
        if not _of_compiler(error):
            raise
        cause = f"{kernel.__name__}: {type(error).__name__}: {error}"
        if not isinstance(error, OSError):  # a cache that failed to open may open next time
            _broken[_variant(kernel, device, args, meta)] = cause
        raise KernelUnavailable(cause) from error


def _of_compiler(error: Exception) -> bool:
    if isinstance(error, (CompilationError, OutOfResources, PTXASError, CalledProcessError, OSError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NOT_COMPILED)


def _variant(kernel, device: torch.device, args: tuple, meta: dict) -> tuple:
    dtypes = tuple(a.dtype if isinstance(a, torch.Tensor) else None for a in args)
    return (device, kernel.__name__, dtypes, *sorted(meta.items()))


@functools.cache
def warn_once(cause: str) -> None:
    warnings.warn(
        f"normzoo: a Triton kernel did not compile and eager PyTorch runs instead ({cause}). "
        f"Triton {triton.__version__}; a damaged cache is cured by emptying TRITON_CACHE_DIR.",
        RuntimeWarning,
        stacklevel=2,
    )
