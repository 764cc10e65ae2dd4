r"""Instance normalization: every channel of a sample gets mean zero and variance one.

Ulyanov, Vedaldi and Lempitsky, *Instance Normalization: The Missing Ingredient for Fast Stylization*, 2016,
arXiv:1607.08022, eq. (4). Semantics of :class:`torch.nn.InstanceNorm2d`, its running statistics included:
averages over the batch of the mean and unbiased variance of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks, checks, ranks
from ..dispatch import use_kernel
from ..engine import normalize
from ..moments import Moments
from ..standardized import by_kernels
from ..state import Running, advance, of_batch
from . import native
from .batch import Statistics


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics of a channel of a sample, or stored ones.

    Args:
        x: (N, C, \*) with one spatial dimension at least, contiguous or channels_last, any real floating dtype.
        running_mean, running_var: (C,) or None. With `use_input_stats` they become (1 − momentum) · old +
            momentum · (average over the samples), in place; without it they are used.
        weight, bias: (C,) or None, of any floating dtype.
        use_input_stats: whether to take the statistics of `x`.
        momentum: weight of the new statistics.
        eps: added to the biased variance; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> instance_norm(torch.tensor([[[1.0, 3.0], [0.0, 8.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """
    checks.channels("instance_norm", x, None, weight=weight, bias=bias)
    checks.eps("instance_norm", eps)
    checks.momentum("instance_norm", momentum, average=False)
    running = checks.running("instance_norm", x, running_mean, running_var, "use_input_stats", use_input_stats)
    if not use_input_stats:
        return native.with_stored(x, running, weight, bias, eps)
    y, statistics = _with_own("instance_norm", x, weight, bias, eps, wanted=bool(running))
    advance(running, statistics, momentum)
    return y


def _with_own(
    layer: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wanted: bool
) -> tuple[Tensor, Statistics | None]:
    """(y, statistics): of samples or their means, and how many samples there are; None where not `wanted`."""
    if x.shape[2:].numel() == 1:
        raise ValueError(
            f"{layer}: Expected more than 1 spatial element when training, got input size {tuple(x.shape)}"
        )
    kernels = use_kernel(x, weight, bias, fusible=False)
    # torch's operator fails at nothing, and copies what is not contiguous.
    if not x.numel() or (not (x.is_contiguous() or kernels) and blocks.pays(x, weight, bias)):
        samples = x.shape[0] if x.numel() else 0

        def combine(m: Moments):
            statistics = (m.sets.mean, m.sets.unbiased_var, samples) if wanted else None
            return *m.standardize(weight, bias, eps), statistics

        return normalize(x, combine, per_sample=True)

    if kernels:

        def eager(x, weight, bias):
            return _with_own(layer, x, weight, bias, eps, wanted=False)[0]

        found = by_kernels(x, weight, bias, x.shape[1], eps, eager)
        if found is not None:
            return found[0], (*found[1], x.shape[0]) if wanted else None

    mean, var = native.fresh_statistics(x) if wanted else (None, None)
    weight, bias = native.in_statistics_dtype(x, weight, bias)
    if weight is None and x.dtype.itemsize < 4:
        weight = torch.ones(x.shape[1], device=x.device)  # without it torch rounds the statistics too
    # Of one dimension: that of two has wrong gradients for a batch of one and a channels_last gradient.
    y = F.instance_norm(x.flatten(2), mean, var, weight, bias, True, 1.0, eps).view(x.shape)
    return native.like(x, y), None if mean is None or var is None else (mean, var, x.shape[0])


class _InstanceNorm(Running):
    _no_batch_dim: int
    """Dimensions of an input that is one sample."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
    ) -> None:
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)

    def forward(self, input: Tensor) -> Tensor:
        layer = type(self).__name__
        checks.dimensions(layer, input, self._check_input_dim)
        if input.dim() == self._no_batch_dim:
            return self._forward(layer, input.unsqueeze(0)).squeeze(0)
        return self._forward(layer, input)

    def _forward(self, layer: str, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        checks.channels(layer, x, self.num_features, weight=self.weight, running_mean=mean, running_var=var)
        if not self.training and self.track_running_stats:
            return native.with_stored(x, self._stored(), self.weight, self.bias, self.eps)
        wanted = self.training and mean is not None
        y, statistics = _with_own(layer, x, self.weight, self.bias, self.eps, wanted)
        if statistics:
            if self.sync:
                mean, var, count = statistics
                statistics = ranks.average(of_batch(mean), of_batch(var), count, self.process_group)
            # torch counts no batches here, and takes momentum=None for zero, other than in BatchNorm.
            self._track(*statistics, batches=0, factor=self.momentum or 0.0)
        return y


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, a drop-in for :class:`torch.nn.InstanceNorm2d`.

    Same arguments, state and mathematics. Input (N, C, H, W) or (C, H, W), output alike in shape, dtype and
    memory format. Parameters may be of another dtype than the input; statistics are float32 at least.

    Args:
        sync: with `track_running_stats`, make the running statistics those of all ranks of `process_group`.
        process_group: None means the world.
        nonfinite: what NaN or infinite statistics do to the running ones: ``"propagate"`` as in torch, or
            ``"skip"``, see :class:`normzoo.BatchNorm2d`.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> InstanceNorm2d(1)(torch.tensor([[[[1.0, 3.0]]]]))
    tensor([[[[-1.0000,  1.0000]]]])
    """

    _no_batch_dim = 3


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """A drop-in for :class:`torch.nn.InstanceNorm1d`: input (N, C, L) or (C, L), else as in 2d.

    >>> import torch
    >>> InstanceNorm1d(2)(torch.tensor([[[1.0, 3.0], [0.0, 8.0]]]))
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """

    _no_batch_dim = 2


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """A drop-in for :class:`torch.nn.InstanceNorm3d`: input (N, C, D, H, W) or (C, D, H, W), else as in 2d."""

    _no_batch_dim = 4
