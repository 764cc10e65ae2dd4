r"""Weight standardization: every output unit's weights get mean zero and standard deviation one.

Qiao, Wang, Liu, Shen and Yuille, *Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization*, 2019, arXiv:1903.10520; code joe-siyuan-qiao/WeightStandardization.
Five denominators are in use under one name; `DENOMINATORS` has them. For a transposed convolution, which the
authors do not treat, a unit is what contributes to one output channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from ..dispatch import Reference, use_kernel
from .rms import norm_of_rows


class Denominator(NamedTuple):
    eps: float
    """Default."""
    correction: int
    """Of the variance: its sum of n squares is divided by n - correction."""
    outside: bool
    """Whether eps is added to the standard deviation rather than to the variance."""
    source: str


DENOMINATORS = {
    "ws": Denominator(1e-5, 1, True, "the authors' snippet and most of their code"),
    "var": Denominator(1e-5, 1, False, "the authors' ImageNet code for Batch-Channel Normalization"),
    "bit": Denominator(1e-10, 0, False, "Big Transfer, composer"),
    "timm": Denominator(1e-6, 0, False, "timm's StdConv2d"),
    "scaled": Denominator(1e-6, 0, False, "timm's ScaledStdConv2d, of NFNets: times gain · gamma / sqrt(n)"),
}


def weight_standardize(
    weight: Tensor,
    variant: str = "ws",
    eps: float | None = None,
    *,
    gain: Tensor | None = None,
    gamma: float = 1.0,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    r"""(W − mean) / d over the n weights of each output unit, with var = sum((W − mean)²) / (n − 1 or n).

    ========== ========= ================= ==============
    `variant`  var over  d                 eps by default
    ========== ========= ================= ==============
    ``ws``     n − 1     sqrt(var) + eps   1e-5
    ``var``    n − 1     sqrt(var + eps)   1e-5
    ``bit``    n         sqrt(var + eps)   1e-10
    ``timm``   n         sqrt(var + eps)   1e-6
    ``scaled`` n         sqrt(var + eps)   1e-6
    ========== ========= ================= ==============

    ``scaled`` multiplies the result by gain · gamma / sqrt(n).

    Args:
        weight: (out, in / groups, \*) of a convolution, (out, in) of a linear map; of a transposed convolution
            (in, out / groups, \*).
        variant: one of `DENOMINATORS`.
        eps: positive; None means the default of the variant.
        gain: (out,), or that many in any shape; ``scaled`` only.
        gamma: a factor, such as the gain of the nonlinearity that follows; ``scaled`` only.
        transposed: whether `weight` is that of a transposed convolution.
        groups: of the transposed convolution, whose weight does not show them.

    Returns:
        Shape, dtype and memory format of `weight`; contiguous if `transposed`.

    Raises:
        ValueError, TypeError: an argument does not fit; a unit has one weight only, whose standardized value
            would be 0 / 0.

    >>> import torch
    >>> weight_standardize(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-1.0000,  0.0000,  1.0000]])
    """
    name = "weight_standardize"
    eps = options(name, variant, eps, gamma)
    _check(name, weight, variant, gain, transposed, groups)
    if transposed:
        apart = weight.unflatten(0, (groups, -1)).transpose(1, 2)
        rows = apart.flatten(0, 1).flatten(1)
        y = _standardize(rows, variant, eps, gain, gamma)
        return y.view(apart.shape).transpose(1, 2).flatten(0, 1).contiguous()
    # The order in memory, so that channels_last weights are rows without a copy too.
    order = [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]
    laid = weight.permute(order)
    y = _standardize(laid.flatten(1), variant, eps, gain, gamma).view(laid.shape)
    return y.permute([order.index(place) for place in range(weight.dim())])


def options(name: str, variant: str, eps: float | None, gamma: float, argument: str = "eps") -> float:
    """The checked eps."""
    checks.choice(name, "variant", variant, tuple(DENOMINATORS))
    eps = DENOMINATORS[variant].eps if eps is None else eps
    checks.eps(name, eps, argument)
    checks.number(name, "gamma", gamma)
    if gamma != 1 and variant != "scaled":
        raise ValueError(f"{name}: gamma is {gamma!r} but variant is {variant!r}; only 'scaled' has a factor")
    return eps


def _check(name: str, weight: Tensor, variant: str, gain: Tensor | None, transposed: bool, groups: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: the input is a {type(weight).__name__}; it must be a torch.Tensor")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: the input is {weight.dtype}; it must be of a real floating-point dtype")
    if weight.dim() < 2:
        raise ValueError(f"{name}: the input has shape {tuple(weight.shape)}; it must be (out, in, *)")
    checks.positive(name, "groups", groups)
    if groups > 1 and not transposed:
        raise ValueError(
            f"{name}: groups is {groups}, but the weight of a convolution that is not transposed shows its "
            "groups itself; leave the argument out"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"{name}: groups is {groups}, which does not divide weight {tuple(weight.shape)}")
    outputs = outputs_of(name, weight, transposed, groups)
    if gain is None:
        return
    if variant != "scaled":
        raise ValueError(f"{name}: there is a gain but variant is {variant!r}; only 'scaled' has one")
    checks.beside(name, "gain", gain.flatten(), weight, (outputs,))


def outputs_of(name: str, weight: Tensor, transposed: bool, groups: int) -> int:
    """The number of units; `groups` are those of a transposed convolution. Refuses units of one weight."""
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if weight.numel() // max(outputs, 1) == 1:
        raise ValueError(
            f"{name}: a weight of shape {tuple(weight.shape)} has one entry for each output, and the "
            "standardized value of a single number is 0 / 0; keep this layer as it is"
        )
    return outputs


def _standardize(rows: Tensor, variant: str, eps: float, gain: Tensor | None, gamma: float) -> Tensor:
    """`rows` (out, n), each a unit."""
    _, correction, outside, _ = DENOMINATORS[variant]
    n = rows.shape[1]
    factor = gamma / math.sqrt(max(n, 1)) if variant == "scaled" else 1.0
    if use_kernel(rows, gain):
        from normzoo_kernels.weights import standardize

        def again(rows, gain):
            return _standardize(rows, variant, eps, gain, gamma)

        how = {"correction": correction, "outside": outside, "eps": eps, "factor": factor}
        return standardize(rows, None if gain is None else gain.flatten(), **how, reference=Reference(again))

    h = checks.at_least_float32(rows)
    if rows.numel() == 0:
        return rows
    if outside:
        h = h - h.mean(1, keepdim=True)
        y = h / (norm_of_rows(h) / math.sqrt(n - correction) + eps)
    else:
        share = (n - correction) / n
        factor *= math.sqrt(share)
        y = F.layer_norm(h, (n,), None if factor == 1 else h.new_full((n,), factor), eps=eps * share)
    if gain is not None:
        y = y * gain.view(-1, 1)
    return y.to(rows.dtype)


class WeightStandardization(nn.Module):
    r"""The weight of a layer, standardized: a parametrization for :mod:`torch.nn.utils.parametrize`.

    Input: a weight, (out, in / groups, \*); output alike in shape, dtype and memory format.
    What it computes is in :func:`normzoo.functional.weight_standardize`. A parametrized layer stores its weight
    as ``parametrizations.weight.original``; :class:`WSConv2d` and its like keep the key ``weight``.

    Args:
        variant: ``"ws"``, ``"var"``, ``"bit"``, ``"timm"`` or ``"scaled"``.
        eps: None means the default of the variant.
        outputs: number of outputs, for the learned gain of ``"scaled"``; None means no gain.
        gamma: a factor of ``"scaled"``.
        transposed, groups: whether the layer is a transposed convolution, and its groups.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> conv = torch.nn.Conv2d(3, 4, 3)
    >>> conv = torch.nn.utils.parametrize.register_parametrization(conv, "weight", WeightStandardization())
    >>> conv.weight.detach().std((1, 2, 3)).round(decimals=2)
    tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        variant: str = "ws",
        eps: float | None = None,
        *,
        outputs: int | None = None,
        gamma: float = 1.0,
        transposed: bool = False,
        groups: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.variant, self.gamma, self.transposed, self.groups = variant, gamma, transposed, groups
        self.eps = options(name, variant, eps, gamma)
        checks.flag(name, "transposed", transposed)
        checks.positive(name, "groups", groups)
        self.gain = None
        if outputs is not None:
            checks.positive(name, "outputs", outputs)
            if variant != "scaled":
                raise ValueError(
                    f"{name}: outputs is {outputs} but variant is {variant!r}; only 'scaled' has a gain"
                )
            self.gain = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(self, weight: Tensor) -> Tensor:
        how = {"gain": self.gain, "gamma": self.gamma, "transposed": self.transposed, "groups": self.groups}
        return weight_standardize(weight, self.variant, self.eps, **how)

    def extra_repr(self) -> str:
        text = f"variant={self.variant!r}, eps={self.eps}"
        if self.variant == "scaled":
            text += f", gamma={self.gamma}, outputs={None if self.gain is None else len(self.gain)}"
        return text + (f", transposed=True, groups={self.groups}" if self.transposed else "")
