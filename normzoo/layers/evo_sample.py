r"""EvoNorm-S: normalization and activation in one, by statistics of groups of channels of each sample.

Liu, Brock, Simonyan and Le, *Evolving Normalization-Activation Layers*, 2020, arXiv:2004.02967, table 3; names,
arguments and numbers are those of timm. The authors' own code (tensorflow/tpu, S0 alone) counts the groups down
from 32 until they divide the channels, ``groups="auto"``.

    S0    y = weight · x · sigmoid(v · x) / std of the group + bias
    S1    y = weight · silu(x) / std of the group + bias
    S2    y = weight · silu(x) / rms of the group + bias
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks, passes
from ..dispatch import insisted
from ..engine import normalize
from ..moments import Moments
from .evo_batch import affine

MOST_GROUPS = 32


def evo_norm_s0(
    x: Tensor,
    groups: int = MOST_GROUPS,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = weight · x · sigmoid(v · x) / sqrt(var + eps) + bias, var over a group of channels of a sample.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        groups: into how many groups the channels fall.
        weight, bias, v: (C,) or None, for one, zero and one.
        eps: added to the biased variance; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or groups do not divide C.

    >>> import torch
    >>> evo_norm_s0(torch.tensor([[[-1.0, 1.0]]]), 1)
    tensor([[[-0.2689,  0.7311]]])
    """
    return _functional("s0", x, groups, weight, bias, v, eps)


def evo_norm_s1(
    x: Tensor,
    groups: int = MOST_GROUPS,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""y = weight · silu(x) / sqrt(var + eps) + bias, var over a group of channels of a sample.

    Args, Returns, Raises: as for :func:`evo_norm_s0`; `act` is another activation, in place of SiLU.

    >>> import torch
    >>> evo_norm_s1(torch.tensor([[[-1.0, 1.0]]]), 1)
    tensor([[[-0.2689,  0.7311]]])
    """
    return _functional("s1", x, groups, weight, bias, None, eps, act)


def evo_norm_s2(
    x: Tensor,
    groups: int = MOST_GROUPS,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""y = weight · silu(x) / sqrt(mean(x²) + eps) + bias, the mean over a group of channels of a sample.

    Args, Returns, Raises: as for :func:`evo_norm_s0`; `act` is another activation, in place of SiLU.

    >>> import torch
    >>> evo_norm_s2(torch.tensor([[[-1.0, 1.0]]]), 1)
    tensor([[[-0.2689,  0.7311]]])
    """
    return _functional("s2", x, groups, weight, bias, None, eps, act)


def _functional(form, x, groups, weight, bias, v, eps, act=None) -> Tensor:
    layer = f"evo_norm_{form}"
    checks.channels(layer, x, None, weight=weight, bias=bias, v=v)
    checks.eps(layer, eps)
    checks.positive(layer, "groups", groups)
    if x.shape[1] % groups:
        raise ValueError(f"{layer}: groups is {groups}; it must divide the {x.shape[1]} channels")
    return _by_groups(form, x, groups, weight, bias, v, eps, act)


def _by_groups(form, x, groups, weight, bias, v, eps, act) -> Tensor:
    def combine(m: Moments):
        scale = m.over_groups(groups).inverse_deviation(weight, eps, about_zero=form == "s2")
        one = m.pivot.new_ones(())
        return scale, one if v is None else v, 0 * one if bias is None else bias

    if act is None:
        return normalize(x, combine, per_sample=True, curve="swish")[0]
    if insisted():
        raise RuntimeError(
            f'backend("triton"): the kernels of evo_norm_{form} have no other activation than SiLU; use '
            'backend("auto")'
        )
    m = Moments(passes.counts(x, None, True), *passes.moments(x, None, True))
    scale, _, shift = (t.view((*t.shape, *(1,) * (x.dim() - 2 if t.dim() else 0))) for t in combine(m))
    # Of its own, for it may work in place.
    return torch.addcmul(shift, act(x.to(checks.statistics_dtype(x), copy=True)), scale).to(x.dtype)


class EvoNormS0(nn.Module):
    r"""EvoNorm-S0: y = weight · x · sigmoid(v · x) / std of the group + bias.

    In place of a group norm and the activation behind it. Input (N, C, \*), output alike in shape, dtype and
    memory format, the same in training and eval mode. State and arguments as in timm: ``weight``, ``bias``,
    ``v``.

    Args:
        num_features: channels, C.
        groups: into how many groups the channels fall; ``"auto"``: the most, up to 32, that divide them.
        group_size: channels of a group, in place of `groups`.
        apply_act: False leaves weight · x + bias alone, as in timm.
        eps: added to the biased variance; positive.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> EvoNormS0(20, groups="auto")
    EvoNormS0(20, groups=20, apply_act=True, eps=1e-05)
    """

    weight: nn.Parameter
    bias: nn.Parameter
    v: nn.Parameter | None
    _form = "s0"

    def __init__(
        self,
        num_features: int,
        groups: int | str = MOST_GROUPS,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        checks.positive(layer, "num_features", num_features)
        checks.flag(layer, "apply_act", apply_act)
        checks.eps(layer, eps)
        self.num_features, self.apply_act, self.eps = num_features, apply_act, eps
        self.groups = _groups(layer, num_features, groups, group_size)
        self.act: nn.Module | None = None
        for name in ("weight", "bias", "v"):
            has = name != "v" or (apply_act and self._form == "s0")
            made = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if has else None
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.v is not None:
            nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        checks.channels(type(self).__name__, x, self.num_features, weight=self.weight)
        if not self.apply_act:
            return affine(x, self.weight, self.bias)
        own = (self.groups, self.weight, self.bias, self.v, self.eps, self.act)
        return _by_groups(self._form, x, *own)

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, apply_act={self.apply_act}, eps={self.eps}"


def _groups(layer: str, channels: int, groups: int | str, group_size: int | None) -> int:
    if group_size is not None:
        checks.positive(layer, "group_size", group_size)
        if channels % group_size:
            raise ValueError(f"{layer}: group_size is {group_size}; it must divide num_features = {channels}")
        return channels // group_size
    if groups == "auto":
        return max(n for n in range(1, MOST_GROUPS + 1) if channels % n == 0)
    if groups is None or isinstance(groups, str):
        raise ValueError(f"{layer}: groups is {groups!r}; it must be a positive int or 'auto'")
    checks.positive(layer, "groups", groups)
    if channels % groups:
        raise ValueError(
            f"{layer}: groups is {groups}; it must divide num_features = {channels}; groups='auto' takes the "
            f"most, up to {MOST_GROUPS}, that do"
        )
    return groups


class EvoNormS1(EvoNormS0):
    r"""EvoNorm-S1: y = weight · silu(x) / std of the group + bias.

    Input, arguments and the rest as for :class:`EvoNormS0`; there is no ``v``, and

    Args:
        act_layer: makes the activation, in place of :class:`torch.nn.SiLU`; another one has no kernel.

    >>> import torch
    >>> EvoNormS1(8, 4)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _form = "s1"

    def __init__(
        self,
        num_features: int,
        groups: int | str = MOST_GROUPS,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype)
        if act_layer is not None and (isinstance(act_layer, nn.Module) or not callable(act_layer)):
            raise TypeError(
                f"{type(self).__name__}: act_layer is {act_layer!r}; it must be a class such as torch.nn.ReLU, "
                "or None for SiLU"
            )
        if act_layer is not None and act_layer is not nn.SiLU and apply_act:
            self.act = act_layer()


class EvoNormS2(EvoNormS1):
    r"""EvoNorm-S2: y = weight · silu(x) / rms of the group + bias.

    Input, arguments and the rest as for :class:`EvoNormS1`.

    >>> import torch
    >>> EvoNormS2(8, 4)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _form = "s2"
