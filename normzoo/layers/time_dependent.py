r"""Time-dependent layer and RMS normalization: weight and bias glide between two values with the time.

Liu, Zhou, Yang et al., *Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models*,
2024, arXiv:2406.09416 (DiMR); code qihao067/DiMR. As there each channel has its own gate, w counts from one,
and the RMS form adds eps after the root. The time comes with the call or by :class:`normzoo.inputs`, and
nothing of it stays in the layer, where the authors' code walks the model and leaves it in every module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..dispatch import use_kernel
from ..fused import Tensors, fused
from ..sets import fits
from ..side_inputs import side_input
from .modulated import check_input, modulated


def time_dependent_layer_norm(
    x: Tensor, t: Tensor, weight: Iterable[Tensor], bias: Iterable[Tensor] | None = None, eps: float = 1e-5
) -> Tensor:
    r"""y = gamma(t) · (x − mean) / sqrt(var + eps) + beta(t), statistics over the last dimension.

    gamma(t) = s · param0 + (1 − s) · param1 with s = sigmoid((1 + w) · t + b); beta(t) likewise.

    Args:
        x: (B, \*, d), any real floating dtype.
        t: (B,) or (B, 1, …): the time of every sample, scaled already (DiMR: log-SNR / 4).
        weight: the four (d,) tensors (param0, param1, w, b) of gamma, such as a :class:`TimeDependent`.
        bias: those of beta, or None.
        eps: added to the biased variance; positive.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> one, zero = torch.ones(2), torch.zeros(2)
    >>> time_dependent_layer_norm(torch.tensor([[1.0, 3.0]]), torch.zeros(1), (one, 3 * one, zero, zero))
    tensor([[-2.0000,  2.0000]])
    """
    check_input("time_dependent_layer_norm", x)
    return _by_time("time_dependent_layer_norm", "layer", x, t, weight, bias, eps)


def time_dependent_rms_norm(
    x: Tensor,
    t: Tensor,
    scale: Iterable[Tensor],
    offset: Iterable[Tensor] | None = None,
    eps: float = 1e-8,
    partial: float | None = None,
) -> Tensor:
    r"""y = scale(t) · x / (sqrt(mean(x²)) + eps) + offset(t), the mean over the last dimension.

    Args:
        x, t: as for :func:`time_dependent_layer_norm`.
        scale, offset: as its weight and bias.
        eps: added to the root mean square; positive.
        partial: the share of the d entries, from the first, of which the mean is taken; None for all.

    Returns, Raises: as for :func:`time_dependent_layer_norm`.

    >>> import torch
    >>> one, zero = torch.ones(2), torch.zeros(2)
    >>> time_dependent_rms_norm(torch.tensor([[3.0, 4.0]]), torch.zeros(1), (one, one, zero, zero))
    tensor([[0.8485, 1.1314]])
    """
    check_input("time_dependent_rms_norm", x)
    return _by_time("time_dependent_rms_norm", "root", x, t, scale, offset, eps, partial)


def _by_time(layer, kind, x, t, weight, bias, eps, partial=None) -> Tensor:
    names = ("scale", "offset") if kind == "root" else ("weight", "bias")
    t = _time(layer, t, x)
    given = _four(layer, names[0], weight, x)
    if bias is not None:
        given += _four(layer, names[1], bias, x)
    values = _Glide()
    # Inductor fuses this with its neighbours.
    kernels = fits(*given) and x.numel() and use_kernel(x, t, *given) and not torch.compiler.is_compiling()
    made = fused(values, t, *given) if kernels else values.plain((t, *given))
    gamma, *rest = made
    beta = rest[0] if rest else None
    return modulated(layer, kind, x, gamma, beta, eps, offset=0.0, part=_part(layer, partial, x.shape[-1]))


class _Glide:
    """The values (B, d) of one or two parameters, four tensors (d,) each, at the times t (B, 1)."""

    differentiable = 2

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        t, *parts = tensors
        parts = [part.to(t.dtype) for part in parts]

        def value(first: Tensor, second: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return torch.lerp(second, first, torch.sigmoid(torch.addcmul(b, 1 + w, t)))

        return tuple(value(*parts[i : i + 4]) for i in range(0, len(parts), 4))

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import gliding as kernels

        t, *parts = tensors
        return tuple(kernels.values(t, parts)), ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import gliding as kernels

        t, *parts = tensors
        some = grads[: len(parts) // 4]
        # The norm has a gradient for both, or for none.
        ups = [torch.zeros_like(t).expand(-1, len(parts[0])) if g is None else g for g in some]
        *found, dt = kernels.backward(ups, t, parts, needs[0])
        return dt, *found


def _part(layer: str, partial: float | None, width: int) -> int | None:
    """The first ⌊partial · width⌋ entries."""
    if partial is None:
        return None
    checks.share(layer, "partial", partial)
    part = math.floor(partial * width)
    if not part:
        raise ValueError(f"{layer}: partial is {partial}, which of {width} entries is none; it must reach one")
    return part if part < width else None


def _time(layer: str, t: Tensor, x: Tensor) -> Tensor:
    """t as (B, 1), in the dtype of the statistics of x."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{layer}: t is a {type(t).__name__}; it must be a torch.Tensor of shape ({x.shape[0]},)"
        )
    if t.is_complex() or t.dim() == 0 or t.shape != (x.shape[0], *(1,) * (t.dim() - 1)):
        raise ValueError(
            f"{layer}: t is {t.dtype} of shape {tuple(t.shape)}; for an input of shape {tuple(x.shape)} it "
            f"must be real and ({x.shape[0]},), the time of every sample"
        )
    checks.same_device(layer, "t", t, x)
    return t.reshape(-1, 1).to(checks.statistics_dtype(x))


def _four(layer: str, name: str, p: Iterable[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The tensors (d,) of a parameter."""
    four = tuple(p) if isinstance(p, Iterable) else ()
    if len(four) != 4:
        came = f"has {len(four)} tensors" if isinstance(p, Iterable) else f"is a {type(p).__name__}"
        raise ValueError(
            f"{layer}: {name} {came}; it must have four tensors: param0, param1, and the weight and bias of "
            "the gate"
        )
    for place, part in enumerate(four):
        _check_part(layer, f"{name}[{place}]", part, x)
    return four


def _check_part(layer: str, name: str, part: Tensor, x: Tensor) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{layer}: {name} is a {type(part).__name__}; it must be a torch.Tensor")
    if part.shape != x.shape[-1:]:
        raise ValueError(
            f"{layer}: {name} has shape {tuple(part.shape)}; for an input of shape {tuple(x.shape)} it must "
            f"be ({x.shape[-1]},)"
        )
    if not part.is_floating_point():
        raise TypeError(f"{layer}: {name} is {part.dtype}; it must be of a real floating-point dtype")
    checks.same_device(layer, name, part, x)


class TimeDependent(nn.Module):
    """A parameter (d,) that glides from one value to another with the time, each channel at its own pace.

    Its parameters are ``param0``, ``param1``, ``nodecay_weight`` and ``nodecay_bias``, all (d,), in this order
    when iterated over. Weight decay should leave out the last two, as the names say.
    """

    param0: nn.Parameter
    param1: nn.Parameter
    nodecay_weight: nn.Parameter
    nodecay_bias: nn.Parameter

    def __init__(self, dim: int, start: float, *, device=None, dtype=None) -> None:
        super().__init__()
        self.start = start
        for name in ("param0", "param1", "nodecay_weight", "nodecay_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(dim, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.param0, self.start)
        nn.init.constant_(self.param1, self.start)
        nn.init.zeros_(self.nodecay_weight)
        nn.init.zeros_(self.nodecay_bias)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.parameters(recurse=False)

    def extra_repr(self) -> str:
        return f"{len(self.param0)}"


class _ByTime(nn.Module):
    side_inputs = ("t",)

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        checks.positive(type(self).__name__, "dim", dim)
        checks.eps(type(self).__name__, eps)
        self.dim, self.eps = dim, eps

    def reset_parameters(self) -> None:
        for child in self.children():
            if isinstance(child, TimeDependent):
                child.reset_parameters()

    def _checked(self, x: Tensor, t: Tensor | None) -> Tensor:
        check_input(type(self).__name__, x, self.dim)
        return side_input(self, "t") if t is None else t


class TimeDependentLayerNorm(_ByTime):
    r"""Layer normalization with a weight and a bias that depend on the time of each sample.

    Input x (B, \*, d) and t (B,), or x alone inside of ``with normzoo.inputs(model, t=t)``. The
    output is like x in shape and dtype. Checkpoints of DiMR load: the state is ``weight.param0``,
    ``weight.param1``, ``weight.nodecay_weight``, ``weight.nodecay_bias``, and those of ``bias``.

    Args:
        dim: entries of a row, d.
        eps: added to the biased variance; positive.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    At first both values of a parameter are the same, so that the gates get no gradient in the first step.

    >>> import torch
    >>> TimeDependentLayerNorm(2)(torch.tensor([[1.0, 3.0]]), torch.zeros(1)).detach()
    tensor([[-1.0000,  1.0000]])
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__(dim, eps)
        self.weight = TimeDependent(dim, 1.0, device=device, dtype=dtype)
        self.bias = TimeDependent(dim, 0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        t = self._checked(x, t)
        return _by_time("TimeDependentLayerNorm", "layer", x, t, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class TimeDependentRMSNorm(_ByTime):
    r"""RMS normalization with a scale, and perhaps an offset, that depend on the time of each sample.

    Input and the rest as for :class:`TimeDependentLayerNorm`; the state is ``scale.param0`` and so on,
    and ``offset.param0``.

    Args:
        dim: entries of a row, d.
        eps: added to the root mean square, after the root; positive.
        partial: the share of the d entries, from the first, of which the mean square is taken; None for all.
        bias: whether there is an offset.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> TimeDependentRMSNorm(2)(torch.tensor([[3.0, 4.0]]), torch.zeros(1)).detach()
    tensor([[0.8485, 1.1314]])
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-8,
        partial: float | None = None,
        bias: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, eps)
        checks.flag("TimeDependentRMSNorm", "bias", bias)
        _part("TimeDependentRMSNorm", partial, dim)
        self.partial = partial
        self.scale = TimeDependent(dim, 1.0, device=device, dtype=dtype)
        self.offset = TimeDependent(dim, 0.0, device=device, dtype=dtype) if bias else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        t = self._checked(x, t)
        own = (self.scale, self.offset, self.eps, self.partial)
        return _by_time("TimeDependentRMSNorm", "root", x, t, *own)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, partial={self.partial}, bias={self.offset is not None}"
