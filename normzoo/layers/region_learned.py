r"""Region normalization by a mask that the layer finds, RN-L; the rest is in `region.py`.

A convolution of 7 by 7 pixels over the mean and the maximum of the channels tells what is important. Where
that reaches the threshold is the hole, without a gradient; two more convolutions over it make a scale and a
shift for every pixel, the same for all channels and both regions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..dispatch import use_kernel
from ..engine import without_autocast
from ..fused import fused
from ..pooling import mean_and_max
from .region import Region, by_region
from .two_regions import Gate, PixelMap

KERNEL = 7


def region_norm_l(
    x: Tensor,
    importance: Tensor,
    gamma: tuple[Tensor, Tensor | None],
    beta: tuple[Tensor, Tensor | None],
    threshold: float = 0.8,
    eps: float = 1e-5,
    per_instance: bool = False,
) -> Tensor:
    r"""y = (1 + gamma) · norm(x) + beta, the norm by regions: where a(x) ≥ threshold, and the rest.

    a = sigmoid(conv of the mean and the maximum over the channels); gamma and beta are convolutions of a.

    Args:
        x: (N, C, H, W), contiguous or channels_last, any real floating dtype.
        importance: (1, 2, k, k), the weight of the first convolution.
        gamma, beta: weight (1, 1, k, k) and bias, (1,) or None, of the two others. k is odd.
        threshold: from 0 to 1.
        eps, per_instance: as in :class:`RegionNormL`.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> x, k = torch.tensor([[[[1.0, 3.0], [10.0, 30.0]]]]), torch.zeros(1, 1, 3, 3)
    >>> k2 = torch.zeros(1, 2, 3, 3)
    >>> region_norm_l(x, k2, (k, None), (k, None)).flatten()  # all in one region
    tensor([-0.8720, -0.6976, -0.0872,  1.6569])
    """
    checks.channels("region_norm_l", x, None)
    checks.eps("region_norm_l", eps)
    checks.share("region_norm_l", "threshold", threshold)
    how = {"eps": eps, "per_instance": per_instance}
    return _found("region_norm_l", x, importance, gamma, beta, threshold, how)[0]


def _found(
    layer: str,
    x: Tensor,
    importance: Tensor,
    gamma: tuple[Tensor, Tensor | None],
    beta: tuple[Tensor, Tensor | None],
    threshold: float,
    how: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, statistics of the regions), of a floating x."""
    if x.dim() != 4 or not x.shape[1]:
        raise ValueError(f"{layer}: the input has shape {tuple(x.shape)}; it must be (N, C, H, W), C not 0")
    _check(layer, "importance", (importance, None), 2, x)
    _check(layer, "gamma", gamma, 1, x)
    _check(layer, "beta", beta, 1, x)
    # Inductor fuses arithmetic on pixels itself.
    kernels = use_kernel(x, fusible=False) and not torch.compiler.is_compiling()
    with without_autocast(x.device.type):
        found = _conv(mean_and_max(x), importance)
        gate = Gate(threshold)
        a, again, hole = fused(gate, found) if kernels else gate.plain((found,))
        scale, shift = _conv(a, *gamma), _conv(again, *beta)
    how = {"sync": False, "process_group": None} | how
    y, statistics = by_region(layer, x, hole.squeeze(1), (None,) * 4, False, **how)
    (y,) = fused(PixelMap(), y, scale, shift) if kernels else PixelMap().plain((y, scale, shift))
    return y, statistics


def _check(layer: str, name: str, both: tuple[Tensor, Tensor | None], channels: int, x: Tensor) -> None:
    """Weight (1, `channels`, k, k), k odd, and bias (1,) or None of a convolution that keeps the size."""
    if not isinstance(both, tuple) or len(both) != 2:
        raise TypeError(
            f"{layer}: {name} is a {type(both).__name__}; it must be a tuple, (weight, bias or None)"
        )
    weight, bias = both
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    size = shape[-1] if shape else 0
    if isinstance(weight, Tensor) and (shape != (1, channels, size, size) or not size % 2):
        raise ValueError(
            f"{layer}: {name} has a weight of shape {shape}; it must be (1, {channels}, k, k), k odd"
        )
    checks.beside(layer, name, weight, x, shape)
    if bias is not None:
        checks.beside(layer, f"the bias of {name}", bias, x, (1,))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[-1] // 2)


class Importance(nn.Module):
    """The three convolutions, under the names of the authors' code."""

    def __init__(self, *, device=None, dtype=None) -> None:
        super().__init__()
        where = {"padding": KERNEL // 2, "device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(2, 1, KERNEL, bias=False, **where)
        self.gamma_conv = nn.Conv2d(1, 1, KERNEL, **where)
        self.beta_conv = nn.Conv2d(1, 1, KERNEL, **where)


class RegionNormL(Region):
    r"""Region normalization by a mask that the layer finds itself, RN-L, with a scale and a shift a pixel.

    Input (N, C, H, W) alone: it takes no mask, neither by a call nor by :class:`normzoo.inputs`. The output is
    like the input in shape, dtype and memory format, the same in training and eval mode: there are no running
    statistics. The importance of a pixel is the sigmoid of a convolution over the mean and the maximum of the
    channels; where it reaches the threshold is the hole. That has no gradient; the convolutions learn by what
    they do to scale and shift. With default initialisation little reaches the threshold, and then this is batch
    norm by the statistics of the batch. Checkpoints of the authors' code load.

    Args:
        num_features: channels, C.
        threshold: from 0 to 1; a pixel whose importance reaches it is in the hole.
        eps: positive; in a region of S of N pixels it counts as eps · N / S, as in the authors' code.
        per_instance: take the statistics of each image (the paper) and not of the batch (the code).
        sync, process_group, nonfinite: as in :class:`RegionNormB`.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> RegionNormL(8)(torch.randn(2, 8, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        num_features: int,
        threshold: float = 0.8,
        eps: float = 1e-5,
        *,
        per_instance: bool = False,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        device=None,
        dtype=None,
    ) -> None:
        checks.share("RegionNormL", "threshold", threshold)
        options = {"sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, per_instance, **options, device=device)
        self.threshold = threshold
        self.sa = Importance(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for module in self.modules():  # none yet where torch's constructor calls this
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        checks.channels("RegionNormL", x, self.num_features)
        gamma, beta = ((c.weight, c.bias) for c in (self.sa.gamma_conv, self.sa.beta_conv))
        own = (self.sa.conv1.weight, gamma, beta, self.threshold, self._how())
        y, statistics = _found("RegionNormL", x, *own)
        self._counted(statistics)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}{self._options()}"
