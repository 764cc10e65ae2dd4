r"""Group normalization: every group of channels of a sample gets mean zero and variance one.

Wu and He, *Group Normalization*, 2018, arXiv:1803.08494, eq. (1) to (7). Semantics of
:class:`torch.nn.GroupNorm`; channels_last input gives channels_last output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks, checks
from ..dispatch import eager_on_cpu, use_kernel
from ..engine import normalize
from ..moments import Moments
from ..standardized import by_kernels
from . import native


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics over each group of channels of a sample.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        num_groups: into how many blocks of consecutive channels C falls; must divide it.
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to the biased variance; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or there is one value a group.

    >>> import torch
    >>> group_norm(torch.tensor([[1.0, 3.0, 0.0, 8.0]]), 2)
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    return _group_norm("group_norm", x, num_groups, weight, bias, eps)


def _group_norm(
    layer: str,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_channels: int | None = None,
) -> Tensor:
    checks.channels(layer, x, num_channels, "num_channels", weight=weight, bias=bias)
    checks.eps(layer, eps)
    checks.positive(layer, "num_groups", num_groups)
    if x.shape[1] % num_groups:
        raise ValueError(
            f"{layer}: num_groups is {num_groups} but the input has shape {tuple(x.shape)}; it must divide the "
            f"{x.shape[1]} channels"
        )
    if x.numel() == num_groups:
        raise ValueError(
            f"{layer}: Expected more than 1 value per group, got input size {tuple(x.shape)} for {num_groups} "
            "groups; use fewer groups"
        )
    kernels = use_kernel(x, weight, bias, fusible=False)
    if not x.numel():  # torch: NaN gradients of nothing
        return _by_engine(x, num_groups, weight, bias, eps)

    if kernels:

        def eager(x, weight, bias):
            return group_norm(x, num_groups, weight, bias, eps)

        found = by_kernels(x, weight, bias, num_groups, eps, eager)
        if found is not None:
            return found[0]

    if weight is None and bias is not None:  # torch's operator has no gradient for a bias alone
        weight = torch.ones_like(bias)
    h, weight, bias = native.in_one_dtype(x, weight, bias)
    if not x.is_contiguous() and native.channels_last(x) and eager_on_cpu(x):
        n, c = x.shape[:2]
        y, mean, inverse = torch.native_group_norm(h, weight, bias, n, c, x.numel() // (n * c), num_groups, eps)
        # Of channels_last it sums squares around zero, which is as good where no mean is beyond a deviation.
        if (mean.detach() * inverse.detach()).abs().amax() <= 1:
            return native.like(x, y)
        if blocks.pays(x, weight, bias):
            return _by_engine(x, num_groups, weight, bias, eps)
    return native.like(x, F.group_norm(h.contiguous(), num_groups, weight, bias, eps))


def _by_engine(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    def combine(m: Moments):
        return m.over_groups(num_groups).standardize(weight, bias, eps)

    return normalize(x, combine, per_sample=True)[0]


class GroupNorm(nn.GroupNorm):
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, a drop-in for :class:`torch.nn.GroupNorm`.

    Same arguments, state and mathematics. Input (N, C, \*), output alike in shape, dtype and memory format.
    Parameters may be of another dtype than the input; statistics are float32 at least.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 0.0, 8.0]])).detach()
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        checks.positive("GroupNorm", "num_groups", num_groups)
        checks.positive("GroupNorm", "num_channels", num_channels)
        checks.eps("GroupNorm", eps)
        if num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups}; it must divide num_channels = {num_channels}"
            )
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # torch 2.11 has no such argument
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        how = (self.num_groups, self.weight, self.bias, self.eps, self.num_channels)
        return _group_norm("GroupNorm", input, *how)
