"""What torch's own operators need so that they keep this library's promises about dtypes and memory formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo_kernels._op import batched

from .. import blocks, checks
from ..dispatch import eager_on_cpu, use_kernel
from ..state import Running, recomputing

_LARGE_PLANE = 1 << 10
"""Pixels over which the engine in blocks takes less time than torch's operators, in float32 and wider."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_statistics_dtype(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """Parameters in the dtype of the statistics of x: float32, or float64 for float64."""
    dtype = checks.statistics_dtype(x)
    return tuple(p if p is None or p.dtype == dtype else p.to(dtype) for p in parameters)


def in_one_dtype(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """x, weight and bias as they are where torch's operators take them together, else all in the dtype of the
    statistics.

    Layer and group norm take one dtype everywhere, and in eager PyTorch on a CPU half precision beside float32.
    """
    given = {p.dtype for p in parameters if p is not None}
    mixed = given == {torch.float32} and parameters[0] is not None and x.dtype.itemsize < 4
    if given <= {x.dtype} or (mixed and eager_on_cpu(x, *parameters)):
        return (x, *parameters)
    return in_statistics_dtype(x, x, *parameters)


def outruns(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether torch's operators of batch norm take x, on a CPU, and are faster than the engine."""
    if use_kernel(x, *parameters) or not eager_on_cpu(x, *parameters) or not x.numel():
        return False
    if x.dtype.itemsize < 2 or not (x.is_contiguous() or channels_last(x)):
        return False
    planes = x.dtype.itemsize >= 4 and x.shape[2:].numel() >= _LARGE_PLANE and x.is_contiguous()
    return not (planes and blocks.pays(x))


def fresh_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance that with momentum 1 become those of the batch."""
    dtype = checks.statistics_dtype(x)
    return x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch, constants for autograd."""
    with torch.no_grad():
        return torch.batch_norm_update_stats(x, *fresh_statistics(x), 0.0)


def channels_last(x: Tensor) -> bool:
    """Whether x lies in one of torch's memory formats of that name."""
    memory_format = _CHANNELS_LAST.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def like(x: Tensor, y: Tensor) -> Tensor:
    """y in the dtype and memory format of x: CUDA autocast gives float32, some operators lose channels_last."""
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    memory_format = _CHANNELS_LAST.get(x.dim())
    if memory_format is None or x.is_contiguous():
        return y
    if not torch.compiler.is_compiling() and batched(x):
        return y  # vmap knows of no other memory format than contiguous
    return y.contiguous(memory_format=memory_format) if x.is_contiguous(memory_format=memory_format) else y


def with_stored(
    x: Tensor, statistics: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """x normalized by a given mean and variance: torch's operator, on every backend."""
    mean, var, weight, bias = in_statistics_dtype(x, *statistics, weight, bias)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def by_pieces(
    x: Tensor,
    pieces: Sequence[Tensor],
    running: Sequence[Tensor | None],
    momenta: Sequence[float],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm of each of the pieces that x is cut into, put together again; each moves `running`."""
    weight, bias = in_statistics_dtype(x, weight, bias)
    mean, var = running
    made = [
        F.batch_norm(piece, mean, var, weight, bias, True, momentum, eps)
        for piece, momentum in zip(pieces, momenta, strict=True)
    ]
    return made[0] if len(made) == 1 else like(x, torch.cat(made))


def tracked_by_torch(
    layer: Running, x: Tensor, pieces: Sequence[Tensor], momentum: float | None
) -> Tensor | None:
    """:func:`by_pieces` where torch's operator can move the running statistics of the layer too, which on a CPU
    spares a dozen others; None where it cannot.

    momentum: of one piece; None averages all.
    """
    running, tracked, parameters = layer._stored(), layer.num_batches_tracked, (layer.weight, layer.bias)
    if layer.batches_skipped is not None or not x.numel():
        return None
    if use_kernel(x, *parameters) or not eager_on_cpu(x, tracked, *running, *parameters):
        return None
    if {t.dtype for t in running} != {checks.statistics_dtype(x)}:
        return None
    again = recomputing()
    momenta = [0.0 if momentum is None else momentum] * len(pieces)
    if momentum is None and tracked is not None:
        momenta = [1 / (int(tracked) + i) for i in range(1, len(pieces) + 1)]
    # What autograd keeps of them in training it never reads, so they may change before the backward pass.
    stored = [t.clone() if again else t.data for t in running]
    y = by_pieces(x, pieces, stored, momenta, *parameters, layer.eps)
    if not again:
        torch.autograd.graph.increment_version(running)  # for graphs of eval mode, which do read them
        if tracked is not None:
            tracked.add_(len(pieces))
    return y
