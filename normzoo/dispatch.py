"""Which body runs: the Triton kernel or the eager reference.

The choice is made once, in the forward pass, from the input and from :class:`backend`; the graph carries it
to the backward pass, which runs in another thread on CUDA and never asks again.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("auto", "reference", "triton")
_TRITON = importlib.util.find_spec("triton") is not None  # without importing it


# A threading.local rather than a ContextVar: dynamo traces the former and breaks the graph at the latter.
class _State(threading.local):
    name = "auto"


_state = _State()


class backend:
    """Choose what runs inside a ``with`` block, for this thread.

    ``"auto"`` (default) uses the Triton kernels for CUDA and ROCm tensors of float16, bfloat16 and float32,
    and eager PyTorch for everything else; ``"reference"`` always uses eager PyTorch; ``"triton"`` insists on
    the kernels and raises where they cannot run. On a CPU they run in Triton's interpreter, which needs
    ``TRITON_INTERPRET=1`` in the environment before the first kernel is loaded.

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
        self.previous = _state.name
        _state.name = self.name

    def __exit__(self, *_) -> None:
        _state.name = self.previous


class Reference:
    """A function that always runs on eager PyTorch.

    Kernels take one along for what they leave to it: double backward, and a failed compilation unless the
    user insists on the kernels (``strict``).
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.strict = _state.name == "triton"

    def __call__(self, *args: Tensor | None) -> Tensor:
        with backend("reference"):
            return self.function(*args)


def _transformed() -> bool:
    """Whether functorch transforms, forward-mode AD or export look through the op: they need eager code."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_exporting()
    )


def use_kernel(x: Tensor, *, fuses: bool = True) -> bool:
    """Whether the kernel runs for `x`. `fuses`: under torch.compile Inductor does as well on the eager body.

    Raises:
        RuntimeError: ``backend("triton")`` was asked for and `x` cannot run there.
    """
    name = _state.name
    if name == "reference" or (type(x) is not Tensor and type(x) is not torch.nn.Parameter):
        return False
    if _transformed():
        return False
    if name == "triton":
        _insist(x)
        return True
    return x.is_cuda and x.dtype in KERNEL_DTYPES and _TRITON and not (fuses and torch.compiler.is_compiling())


def _insist(x: Tensor) -> None:
    if not _TRITON:
        raise RuntimeError('backend("triton"): Triton is not installed; `pip install normzoo[triton]`')
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
