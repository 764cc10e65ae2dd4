"""Which body runs: the Triton kernel or the eager reference.

The choice is made once, in the forward pass, from the input and from :class:`backend`; the graph carries it
to the backward pass, which runs in another thread on CUDA and never asks again.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normzoo_kernels._op import batched

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "reference", "triton")
_TRITON = importlib.util.find_spec("triton") is not None  # without importing it


# A threading.local rather than a ContextVar: dynamo traces the former and breaks the graph at the latter.
class _State(threading.local):
    def __init__(self) -> None:
        self.names = ["auto"]


_state = _State()


class backend:
    """Choose what runs inside a ``with`` block, for this thread.

    ``"auto"`` (default) uses the Triton kernels for CUDA and ROCm tensors of float16, bfloat16 and float32,
    and eager PyTorch for everything else; ``"reference"`` always uses eager PyTorch; ``"triton"`` insists on
    the kernels and raises where they cannot run. On a CPU they run in Triton's interpreter, which needs
    ``TRITON_INTERPRET=1`` in the environment before the first kernel is loaded.

    It acts as a context manager only; a call without ``with`` changes nothing.

    >>> import torch, normzoo
    >>> with normzoo.backend("reference"):
    ...     y = normzoo.RMSNorm(4)(torch.ones(2, 4))

    Under torch.compile, ``"auto"`` lets Inductor fuse the row norms with their neighbours;
    ``"triton"`` keeps them as opaque operators.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: name is {name!r}; it must be one of {', '.join(BACKENDS)}")
        self.name = name

    def __enter__(self) -> None:
        _state.names.append(self.name)

    def __exit__(self, *_) -> None:
        _state.names.pop()


class Reference:
    """A function that always runs on eager PyTorch.

    Kernels take one along for what they leave to it: double backward, and a failed compilation unless the
    user insists on the kernels (``strict``).
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.strict = insisted()

    def __call__(self, *args: Tensor | None) -> Tensor:
        with backend("reference"):
            return self.function(*args)


def plain(*tensors: Tensor | None) -> bool:
    """Whether none is of a subclass of tensors, such as a DTensor; None is plain."""
    for t in tensors:
        if not (t is None or type(t) is Tensor or type(t) is torch.nn.Parameter):
            return False
    return True


def transformed() -> bool:
    """Whether functorch transforms, forward-mode AD, export or tracing look through: they need eager code."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
    )


def eager_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors on a CPU, at whose values code may look: no compiler, transform or mode
    sees what is done to them."""
    if torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or (plain(t) and t.device.type == "cpu" and not batched(t)) for t in tensors)


def insisted() -> bool:
    """Whether the user asked for kernels, so that one that does not compile is an error."""
    return _state.names[-1] == "triton"


def or_none(strict: bool, body: Callable[..., Any], *args: Any) -> Any:
    """What `body` returns; None where a kernel of it does not compile, unless the user insists (`strict`)."""
    from normzoo_kernels._launch import KernelUnavailable, warn_once

    try:
        return body(*args)
    except KernelUnavailable as error:
        if strict:
            raise
        warn_once(str(error))
    return None


def use_kernel(
    x: Tensor, *parameters: Tensor | None, residual: Tensor | None = None, fusible: bool = True
) -> bool:
    """Whether the kernel runs. Under torch.compile "auto" leaves a `fusible` body to Inductor, which fuses it.

    Raises:
        RuntimeError: ``backend("triton")`` was asked for and the inputs cannot run there.
    """
    name = _state.names[-1]
    if name == "auto" and not x.is_cuda:  # first, for tiny tensors on a CPU feel every question
        return False
    if name == "reference" or not plain(x, residual, *parameters) or transformed():
        return False
    if name == "triton":
        _insist(x)
        if residual is not None:
            _insist(residual)
        return True
    if residual is not None and residual.dtype not in KERNEL_DTYPES:
        return False
    fused = fusible and torch.compiler.is_compiling()
    return x.dtype in KERNEL_DTYPES and _TRITON and not fused


def _insist(x: Tensor) -> None:
    if not _TRITON:
        raise RuntimeError('backend("triton"): Triton is not installed; `pip install triton`')
    if x.dtype not in KERNEL_DTYPES:
        raise RuntimeError(
            f'backend("triton"): the kernels take float16, bfloat16 and float32, the input is {x.dtype}; '
            'convert it or use backend("auto")'
        )
    if not x.is_cuda and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            f'backend("triton"): the input is on {x.device}; move it to a GPU, or set TRITON_INTERPRET=1 '
            "before starting Python to run the kernels on a CPU tensor"
        )
