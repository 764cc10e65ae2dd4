"""A device that is not there: runs launchers on meta tensors and catches what they would launch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from normzoo_kernels._launch import forget


@dataclass(frozen=True)
class Target:
    """What a launcher may ask of a device, and what bounds the programs that live on one SM."""

    name: str
    gpu: GPUTarget
    sm_count: int
    shared_per_sm: int

    @property
    def shared_per_program(self) -> int:
        return self.shared_per_sm - (1024 if self.gpu.backend == "cuda" else 0)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 108, 164 << 10),
        Target("sm_90", GPUTarget("cuda", 90, 32), 132, 228 << 10),
        Target("sm_100", GPUTarget("cuda", 100, 32), 148, 228 << 10),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 304, 64 << 10),
    )
}


@contextlib.contextmanager
def _noting_helpers(found: set[tuple[str, str]]) -> Iterator[None]:
    """Collects the jit functions that a compilation inlines: once inlined, they may leave no trace."""
    call = CodeGenerator.call_JitFunction

    def noting(self, fn, *args, **kwargs):
        found.add((inspect.getfile(fn.fn), fn.fn.__name__))
        return call(self, fn, *args, **kwargs)

    with mock.patch.object(CodeGenerator, "call_JitFunction", noting):
        yield


@dataclass
class Launch:
    """One caught launch, specialised by Triton's own binder as the real one would be."""

    kernel: JITFunction
    grid: tuple[int, int, int]
    values: dict[str, Any]  # arguments and constants by name
    signature: dict[str, str]
    constants: dict
    attrs: dict
    options: dict[str, Any]
    helpers: set[tuple[str, str]] = field(default_factory=set)  # (file, name), known once compiled

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def scalars(self) -> dict[str, int]:
        return {name: int(value) for name, value in self.values.items() if isinstance(value, int)}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.values.items() if isinstance(value, torch.Tensor)}

    @property
    def variant(self) -> str:
        """Two launches of equal variant share one compiled kernel."""
        return str((self.name, self.signature, self.constants, self.attrs, self.options))

    def compile(self, target: Target, fp64_scalars: bool = False):
        signature = self.signature
        if fp64_scalars:
            signature = {k: "fp64" if v == "fp32" else v for k, v in signature.items()}
        source = ASTSource(self.kernel, signature, self.constants, self.attrs)
        with _noting_helpers(self.helpers):
            return triton.compile(source, target=target.gpu, options=dict(self.options))


@dataclass
class Caught:
    """What one call of a launcher does: launches, allocations, torch ops and the bytes they move."""

    launches: list[Launch] = field(default_factory=list)
    allocations: int = 0
    torch_ops: list[tuple[str, int]] = field(default_factory=list)


class _Driver:
    """Answers Triton's questions to the active driver without a device."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.target.name  # the key under which Triton keeps its binders


class _Pointer(MockTensor):
    """A tensor argument as Triton's binder sees it; the offset in its storage decides alignment."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.dtype, list(tensor.shape))
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FILLS = {"zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like", "ones"}


class _Ops(TorchDispatchMode):
    """Counts the allocations and copies that a launcher makes through torch."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is traced here, and loading dynamo takes seconds

    def __init__(self, caught: Caught) -> None:
        super().__init__()
        self.caught = caught

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATIONS:
            self.caught.allocations += out.numel() > 0
        elif not (func.is_view or torch.Tag.inplace_view in func.tags or name == "_unsafe_view"):
            moved = tree_leaves(out) if name in _FILLS else tree_leaves((args, kwargs, out))
            size = sum(t.numel() * t.element_size() for t in moved if isinstance(t, torch.Tensor))
            if size:  # else no kernel runs, as in promote_types
                self.caught.torch_ops.append((name, size))
        return out


def _argument(value: Any) -> Any:
    return _Pointer(value) if isinstance(value, torch.Tensor) else value


def _bind(kernel: JITFunction, args: tuple, kwargs: dict, grid: Any) -> Launch:
    """What JITFunction.run does before it compiles."""
    bound = _named(kernel, args, kwargs)
    sizes = tuple(grid(bound) if callable(grid) else grid)
    kwargs = {"debug": False, "instrumentation_mode": ""} | kwargs
    kwargs = {k: _argument(v) for k, v in kwargs.items()}
    *_, backend, binder = kernel.device_caches[driver.active.get_current_device()]
    values, specialization, options = binder(*map(_argument, args), **kwargs)
    options, signature, constants, attrs = kernel._pack_args(backend, kwargs, values, specialization, options)
    grid3 = tuple(int(n) for n in (*sizes, 1, 1)[:3])
    return Launch(kernel, grid3, bound, signature, constants, attrs, options.__dict__)


def _named(kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What a kernel is given, by name, with the options of the compiler."""
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    return defaults | dict(zip(kernel.arg_names, args, strict=False)) | kwargs


def _of_cuda(helper: Callable[[torch.device], int]) -> Callable[[torch.device], int]:
    return lambda device: inspect.unwrap(helper)(torch.device("cuda"))


@functools.lru_cache(maxsize=1)
def _that_ask(_: int) -> list[tuple[types.ModuleType, str]]:
    """Modules that ask about a device, and through which helper; the argument tells when there are new ones."""
    modules = [module for name, module in sys.modules.items() if name.startswith("normzoo_kernels")]
    return [(m, helper) for m in modules for helper in ("sm_count", "shared_memory") if hasattr(m, helper)]


@contextlib.contextmanager
def _device(target: Target, run: Callable) -> Iterator[None]:
    """Puts the absent device under Triton and torch.cuda for the length of one call; launches go to `run`."""
    properties = types.SimpleNamespace(
        multi_processor_count=target.sm_count,
        shared_memory_per_block_optin=target.shared_per_program,
    )

    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(  # noqa: E731
            mock.patch.object(owner, name, value)
        )
        patch(JITFunction, "run", run)
        patch(torch.cuda, "get_device_properties", lambda *a, **k: properties)
        patch(torch.cuda, "device", lambda *a, **k: contextlib.nullcontext())
        # What launchers ask about a device, they ask through cached helpers that take meta for the CPU.
        for module, helper in _that_ask(len(sys.modules)):
            patch(module, helper, _of_cuda(getattr(module, helper)))
        patch(driver, "_active", _Driver(target))
        # Plans of launches are remembered for a device, which here is another one each time.
        forget()
        stack.callback(forget)
        yield


def catch(call: Callable[[], object], target: Target) -> Caught:
    """Runs a launcher call on meta tensors as if on `target`; nothing is compiled or executed."""
    caught = Caught()

    def run(kernel, *args, grid, warmup, **kwargs):
        caught.launches.append(_bind(kernel, args, kwargs, grid))

    with torch.no_grad(), _device(target, run), _Ops(caught):
        call()
    return caught


def chosen(call: Callable[[], object], target: Target) -> list[tuple[JITFunction, dict[str, Any]]]:
    """The kernels that a call would launch, with their arguments by name: fast, for nothing is specialised."""
    found = []

    def run(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, _named(kernel, args, kwargs)))

    with torch.no_grad(), _device(target, run):
        call()
    return found


def x_arguments(launch: Launch, x: torch.Tensor) -> set[str]:
    """The pointer arguments as large as x: those whose traffic is counted in passes.

    Partial sums (`part_ptr`) and masks are none of them, though few rows or one channel can have as many. Where
    addresses are given (`x_ptrs`), x is what lies there.
    """
    as_large = {name for name, t in launch.tensors.items() if t.numel() == x.numel() and t.element_size() > 1}
    found = as_large - {"part_ptr"}
    return found | {f"*{name}" for name in launch.tensors if name.endswith("_ptrs")}
