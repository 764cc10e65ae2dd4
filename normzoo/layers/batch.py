r"""Batch normalization: every channel gets mean zero and variance one over the batch.

Ioffe and Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift*, 2015, arXiv:1502.03167, algorithm 1. Semantics of :class:`torch.nn.BatchNorm2d`: the biased variance
normalizes, the unbiased one is averaged.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, ranks
from ..dispatch import use_kernel
from ..engine import normalize
from ..moments import Moments
from ..standardized import by_kernels
from ..state import Running, advance
from . import native

Statistics = tuple[Tensor, Tensor, Any]
"""Mean and unbiased variance of a batch, and how many values (or samples) they were taken over."""


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics over the batch or stored ones.

    Args:
        x: (N, C, \*) or (N, C), contiguous or channels_last, any real floating dtype.
        running_mean, running_var: (C,) or None. In training they become (1 − momentum) · old + momentum · new,
            in place; otherwise they take the place of the statistics of the batch.
        weight, bias: (C,) or None, of any floating dtype.
        training: whether to take the statistics of the batch.
        momentum: weight of the new statistics.
        eps: added to the biased variance; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True)
    tensor([[-1.0000],
            [ 1.0000]])
    """
    checks.channels("batch_norm", x, None, weight=weight, bias=bias)
    checks.eps("batch_norm", eps)
    checks.momentum("batch_norm", momentum, average=False)
    running = checks.running("batch_norm", x, running_mean, running_var, "training", training)
    if not training:
        return native.with_stored(x, running, weight, bias, eps)
    y, statistics = with_batch("batch_norm", x, weight, bias, eps, wanted=bool(running))
    advance(running, statistics, momentum)
    return y


def with_batch(
    layer: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sync: bool = False,
    process_group: Any = None,
    wanted: bool = True,
) -> tuple[Tensor, Statistics | None]:
    """(y, statistics) with the statistics of the batch, across ranks with `sync`; None where not `wanted`."""
    sync = sync and ranks.size(process_group) > 1
    count = x.numel() // x.shape[1] if x.numel() else 0
    if not sync:
        checks.several_values(layer, x, " or eval mode")
    kernels = use_kernel(x, weight, bias, fusible=False)
    if sync or (kernels and not x.numel()):

        def combine(m: Moments):
            m = m.across_ranks(process_group) if sync else m
            statistics = (m.mean, m.sets.unbiased_var, m.sets.count) if wanted else None
            return *m.standardize(weight, bias, eps), statistics

        return normalize(x, combine)

    if kernels:

        def eager(x, weight, bias):
            return with_batch(layer, x, weight, bias, eps, wanted=False)[0]

        found = by_kernels(x, weight, bias, 0, eps, eager)
        if found is not None:
            return found[0], (*found[1], count) if wanted else None

    mean, var = native.fresh_statistics(x) if wanted else (None, None)
    weight, bias = native.in_statistics_dtype(x, weight, bias)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return y, None if mean is None or var is None else (mean, var, count)


class _BatchNorm(Running):
    def forward(self, input: Tensor) -> Tensor:
        layer = type(self).__name__
        checks.dimensions(layer, input, self._check_input_dim)
        mean, var, weight = self.running_mean, self.running_var, self.weight
        checks.channels(layer, input, self.num_features, weight=weight, running_mean=mean, running_var=var)
        if not self.training and not (mean is None and var is None):
            return native.with_stored(input, self._stored(), weight, self.bias, self.eps)
        how = {"sync": self.sync and self.training, "process_group": self.process_group}
        how["wanted"] = self.training and self.track_running_stats and mean is not None
        if how["wanted"] and not self.sync:
            checks.several_values(layer, input, " or eval mode")
            y = native.tracked_by_torch(self, input, (input,), self.momentum)
            if y is not None:
                return y
        y, statistics = with_batch(layer, input, weight, self.bias, self.eps, **how)
        if statistics:
            self._track(*statistics)
        return y


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, a drop-in for :class:`torch.nn.BatchNorm2d`.

    Same arguments, state and mathematics. Input (N, C, H, W), output alike in shape, dtype and memory format.
    Parameters and buffers may be of another dtype than the input; statistics are float32 at least.

    Args:
        sync: in training, take the statistics over all ranks of `process_group`. Any backend, gloo on a CPU
            included, batches of different sizes and empty ones; also under ``torch.compile(fullgraph=True)``.
            Gradients of weight and bias stay those of the rank, for DDP to average.
        process_group: None means the world.
        nonfinite: what a batch with NaN or infinite statistics does to the state: ``"propagate"`` (as in torch,
            the running averages stay NaN from then on) or ``"skip"`` (the state stays as it is, and
            ``batches_skipped`` counts; the output is NaN in both cases).

    In training one value per channel is an error, unless it is one on each of several ranks. Activation
    checkpointing counts a batch once, where torch counts it twice.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> BatchNorm2d(1)(torch.tensor([[[[1.0, 3.0]]]])).detach()
    tensor([[[[-1.0000,  1.0000]]]])
    """


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """A drop-in for :class:`torch.nn.BatchNorm1d`: input (N, C) or (N, C, L), else as :class:`BatchNorm2d`.

    >>> import torch
    >>> BatchNorm1d(1)(torch.tensor([[1.0], [3.0]])).detach()
    tensor([[-1.0000],
            [ 1.0000]])
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """A drop-in for :class:`torch.nn.BatchNorm3d`: input (N, C, D, H, W), else as :class:`BatchNorm2d`."""
