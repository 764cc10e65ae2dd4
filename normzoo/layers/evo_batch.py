r"""EvoNorm-B: normalization and activation in one, by statistics of the batch and of each image.

Liu, Brock, Simonyan and Le, *Evolving Normalization-Activation Layers*, 2020, arXiv:2004.02967, table 3; names,
arguments and numbers are those of timm. The authors' own code (tensorflow/tpu, B0 alone) has
``eps=1e-5, running_var_unbiased=False``.

    B0    y = weight · x / max(std of the batch, v · x + std of the image) + bias
    B1    y = weight · x / max(std of the batch, (x + 1) · rms of the image) + bias
    B2    y = weight · x / max(std of the batch, rms of the image − x) + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ranks
from ..engine import normalize
from ..moments import Moments
from ..state import Guarded, advance, moved, moved_by_kernel, recomputing


def evo_norm_b0(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-3,
    running_var_unbiased: bool = True,
) -> Tensor:
    r"""y = weight · x / max(sqrt(var + eps), v · x + sqrt(var of the image + eps)) + bias.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        running_var: (C,), the variance that stands for that of the batch unless `training`, and that moves
            if so.
        weight, bias, v: (C,) or None, for one, zero and one.
        training: whether var is the variance of the batch.
        momentum: weight of the batch in the running variance.
        eps: added to every variance; positive.
        running_var_unbiased: whether the running variance is the unbiased one, as in timm.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> evo_norm_b0(torch.tensor([[[-3.0, 3.0]]]), torch.tensor([9.0])).round(decimals=2)
    tensor([[[-1.0000,  0.5000]]])
    """
    affine = (weight, bias, v)
    return _functional("b0", x, running_var, affine, training, momentum, eps, running_var_unbiased)


def evo_norm_b1(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    running_var_unbiased: bool = True,
) -> Tensor:
    r"""y = weight · x / max(sqrt(var + eps), (x + 1) · sqrt(mean of x² over the image + eps)) + bias.

    Args, Returns, Raises: as for :func:`evo_norm_b0`.

    >>> import torch
    >>> evo_norm_b1(torch.tensor([[[-3.0, 3.0]]]), torch.tensor([9.0])).round(decimals=2)
    tensor([[[-1.0000,  0.2500]]])
    """
    affine = (weight, bias, None)
    return _functional("b1", x, running_var, affine, training, momentum, eps, running_var_unbiased)


def evo_norm_b2(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    running_var_unbiased: bool = True,
) -> Tensor:
    r"""y = weight · x / max(sqrt(var + eps), sqrt(mean of x² over the image + eps) − x) + bias.

    Args, Returns, Raises: as for :func:`evo_norm_b0`.

    >>> import torch
    >>> evo_norm_b2(torch.tensor([[[-3.0, 3.0]]]), torch.tensor([9.0])).round(decimals=2)
    tensor([[[-0.5000,  1.0000]]])
    """
    affine = (weight, bias, None)
    return _functional("b2", x, running_var, affine, training, momentum, eps, running_var_unbiased)


def _functional(form, x, running_var, affine, training, momentum, eps, unbiased) -> Tensor:
    layer = f"evo_norm_{form}"
    checks.channels(layer, x, None, running_var=running_var, **dict(zip(_AFFINE, affine, strict=True)))
    checks.momentum(layer, momentum, average=False)
    checks.eps(layer, eps)
    if not training and running_var is None:
        raise ValueError(f"{layer}: without training=True it needs running_var")
    stored = None if training else running_var
    y, batch = _bounded(layer, form, x, affine, eps, stored, unbiased)
    advance(() if running_var is None else (running_var,), batch, momentum)
    return y


_AFFINE = ("weight", "bias", "v")


def _bounded(
    layer: str,
    form: str,
    x: Tensor,
    affine: tuple[Tensor | None, ...],
    eps: float,
    stored: Tensor | None,
    unbiased: bool,
    sync: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, tuple[Any, ...] | None]:
    """(y, variance and count of the batch), these None with `stored`, a variance in their place."""
    weight, bias, v = affine
    sync = sync and ranks.size(process_group) > 1
    if stored is None and not sync:
        checks.several_values(layer, x, " or eval mode")

    def combine(m: Moments):
        found = None
        if stored is None:
            batch = m.over_batch()
            batch = batch.across_ranks(process_group) if sync else batch
            bound = batch.deviation(eps)
            found = (batch.sets.unbiased_var if unbiased else batch.sets.var, batch.sets.count)
        else:
            bound = torch.sqrt(stored.to(m.pivot.dtype) + eps)
        one = m.pivot.new_ones(())
        if form == "b0":
            slope, level = one if v is None else v, m.deviation(eps)
        else:
            level = m.deviation(eps, about_zero=True)
            slope = level if form == "b1" else -one
        scale, shift = one if weight is None else weight, 0 * one if bias is None else bias
        return scale, bound, slope, level, shift, found

    return normalize(x, combine, per_sample=True, curve="bounded")


class _EvoNormB(Guarded):
    """What the three share."""

    running_var: Tensor | None
    v: nn.Parameter | None
    _form: str

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        *,
        running_var_unbiased: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
    ) -> None:
        layer = type(self).__name__
        checks.flag(layer, "apply_act", apply_act)
        checks.flag(layer, "running_var_unbiased", running_var_unbiased)
        checks.momentum(layer, momentum, average=False)
        self.apply_act, self.running_var_unbiased = apply_act, running_var_unbiased
        options = {"bias": True, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, True, False, device, dtype, **options)
        self._keep_others()
        where = {"device": device, "dtype": dtype}
        v = nn.Parameter(torch.ones(num_features, **where)) if self._form == "b0" and apply_act else None
        self.register_parameter("v", v)
        self.register_buffer("running_var", torch.ones(num_features, **where))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.running_var is not None:  # torch's constructor calls this before there is one
            self.running_var.fill_(1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        v = self._parameters.get("v")
        if v is not None:
            nn.init.ones_(v)

    def forward(self, x: Tensor) -> Tensor:
        layer = type(self).__name__
        checks.channels(layer, x, self.num_features, weight=self.weight)
        if not self.apply_act:
            return affine(x, self.weight, self.bias)
        checks.momentum(layer, self.momentum, average=False)  # it may have been set since
        stored = None if self.training else self.running_var
        own = ((self.weight, self.bias, self.v), self.eps, stored, self.running_var_unbiased)
        y, batch = _bounded(layer, self._form, x, *own, self.sync, self.process_group)
        if batch and self.running_var is not None and not recomputing():
            (var, count), momentum = batch, self.momentum or 0.0
            pairs = [(self.running_var, var.detach())]
            if not moved_by_kernel(pairs, count, momentum, skipped=self.batches_skipped):
                self._commit(moved(pairs, count, momentum))
        return y

    def extra_repr(self) -> str:
        said = f"{self.num_features}, apply_act={self.apply_act}, momentum={self.momentum}, eps={self.eps}"
        unbiased = "" if self.running_var_unbiased else ", running_var_unbiased=False"
        return f"{said}{unbiased}{self._options()}"


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight · x + bias in the dtype of x: all that is left without the activation."""
    weight, bias = (p.to(checks.statistics_dtype(x)).view(-1, *(1,) * (x.dim() - 2)) for p in (weight, bias))
    return torch.addcmul(bias, checks.at_least_float32(x), weight).to(x.dtype)


class EvoNormB0(_EvoNormB):
    r"""EvoNorm-B0: y = weight · x / max(std of the batch, v · x + std of the image) + bias.

    In place of a batch norm and the activation behind it. Input (N, C, \*), output alike in shape, dtype and
    memory format. In eval mode the running variance stands for that of the batch; what is of the image stays.
    State and arguments as in timm: ``weight``, ``bias``, ``v``, ``running_var``.

    Args:
        num_features: channels, C.
        apply_act: False leaves weight · x + bias alone, and the state as it is, as in timm.
        momentum: weight of the variance of a batch in the running one.
        eps: added to every variance; positive.
        running_var_unbiased: False keeps the biased variance, as the authors' code does.
        sync: take the variance of the batch over all ranks of `process_group`.
        process_group: None means the world.
        nonfinite: what a batch with NaN or infinite statistics does to the state: ``"propagate"`` (it stays
            NaN) or ``"skip"`` (it stays as it is, and ``batches_skipped`` counts).

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> EvoNormB0(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _form = "b0"

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device=None,
        dtype=None,
        *,
        running_var_unbiased: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
    ) -> None:
        options = {"sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        options["running_var_unbiased"] = running_var_unbiased
        super().__init__(num_features, apply_act, momentum, eps, device, dtype, **options)


class EvoNormB1(_EvoNormB):
    r"""EvoNorm-B1: y = weight · x / max(std of the batch, (x + 1) · rms of the image) + bias.

    Input, arguments and the rest as for :class:`EvoNormB0`; there is no ``v``.

    >>> import torch
    >>> EvoNormB1(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _form = "b1"


class EvoNormB2(EvoNormB1):
    r"""EvoNorm-B2: y = weight · x / max(std of the batch, rms of the image − x) + bias.

    Input, arguments and the rest as for :class:`EvoNormB0`; there is no ``v``.

    >>> import torch
    >>> EvoNormB2(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    _form = "b2"
