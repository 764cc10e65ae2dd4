r"""Layer and RMS normalization whose scale and shift come from a condition: each sample or token has its own.

``y = (1 + scale) · norm(x) + shift`` is the adaptive norm of Peebles and Xie, *Scalable Diffusion Models with
Transformers*, 2022, arXiv:2212.09748 (DiT), and of what followed; the norm has no weight of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, row_blocks
from ..dispatch import Reference, use_kernel
from .rms import sum_of_squares


def adaptive_layer_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""y = (1 + scale) · (x − mean) / sqrt(var + eps) + shift, statistics over the last dimension.

    Args:
        x: (B, \*, d), any real floating dtype.
        scale: (B, d), one a sample, also as (B, 1, …, d); or the shape of `x`, one a token.
        shift: likewise, or None; scale and shift may differ in this.
        eps: added to the biased variance; positive.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> adaptive_layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[-2.0000,  1.0000]])
    """
    check_input("adaptive_layer_norm", x)
    return modulated("adaptive_layer_norm", "layer", x, scale, shift, eps, offset=1.0)


def adaptive_rms_norm(x: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    r"""y = (1 + scale) · x / sqrt(mean(x²) + eps) + shift, the mean over the last dimension.

    Args, Returns, Raises: as for :func:`adaptive_layer_norm`.

    >>> import torch
    >>> adaptive_rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[0.8485, 2.2627]])
    """
    check_input("adaptive_rms_norm", x)
    return modulated("adaptive_rms_norm", "rms", x, scale, shift, eps, offset=1.0)


def modulated(
    layer: str,
    kind: str,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    offset: float,
    part: int | None = None,
) -> Tensor:
    """(offset + scale) · norm(x) + shift over the last dimension of x, which is checked already.

    Args:
        kind: ``"layer"``, ``"rms"``, or ``"root"``: x / (rms + eps), eps outside of the root.
        part: of how many entries, the first, the mean square is taken; None for all.
    """
    checks.eps(layer, eps)
    scale = _beside(layer, "scale", scale, x)
    shift = None if shift is None else _beside(layer, "shift", shift, x)
    if use_kernel(x, scale, shift):
        from normzoo_kernels.modulated import norm

        def again(x, scale, shift):
            return modulated(layer, kind, x, scale, shift, eps, offset=offset, part=part)

        how = {"eps": eps, "offset": offset, "part": part or x.shape[-1]}
        return norm(kind, x, scale, shift, **how, reference=Reference(again))

    of_samples = scale.dim() == 2 and (shift is None or shift.dim() == 2)
    if of_samples and row_blocks.fits(x, scale, shift):

        def whole(x, scale, shift):
            return _modulated(x, kind, scale, shift, eps, 0.0, part)

        s = checks.at_least_float32(scale) + offset if offset else scale
        return row_blocks.normalized(row_blocks.Kind(kind, eps, part), x, 1, s, shift, whole)
    return _modulated(x, kind, scale, shift, eps, offset, part)


def _modulated(x, kind, scale, shift, eps, offset, part) -> Tensor:
    h = _normalized(checks.at_least_float32(x), kind, eps, part)
    scale = _between(scale.to(h.dtype) + offset, x)
    y = h * scale if shift is None else torch.addcmul(_between(shift, x).to(h.dtype), h, scale)
    return y.to(x.dtype)


def check_input(layer: str, x: Tensor, dim: int | None = None) -> None:
    """x (B, \\*, d) of a floating dtype, d = `dim`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: the input is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dim() < 2:
        raise ValueError(f"{layer}: the input has shape {tuple(x.shape)}; it must be (B, *, d)")
    if dim is not None and x.shape[-1] != dim:
        raise ValueError(
            f"{layer}: dim is {dim} but the input has shape {tuple(x.shape)}; its last dimension must match"
        )
    checks.rows(layer, x, x.shape[-1])


def _normalized(h: Tensor, kind: str, eps: float, part: int | None) -> Tensor:
    if kind == "layer":
        return F.layer_norm(h, h.shape[-1:], eps=eps)
    if kind == "rms" and part is None and row_blocks.small(h):
        return torch.rms_norm(h, h.shape[-1:], eps=eps)
    first = h if part is None else h[..., :part]
    square = sum_of_squares(first, 1) / first.shape[-1]
    if kind == "rms":
        return h * torch.rsqrt(square + eps)
    # The root of zero has no derivative; what divides a row of zeros makes no difference.
    zero = square == 0
    return h / (torch.where(zero, 1, square).sqrt() * ~zero + eps)


def _beside(layer: str, name: str, p: Tensor, x: Tensor) -> Tensor:
    """`p` as (B, d), of samples, or in the shape of x, of tokens."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{layer}: {name} is a {type(p).__name__}; it must be a torch.Tensor")
    whole, sample = tuple(x.shape), (x.shape[0], x.shape[-1])
    between = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    if p.dim() == x.dim() and p.shape != whole and p.shape == between:
        p = p.reshape(sample)
    if p.shape not in (whole, sample):
        wanted = f"{sample}, one a sample"
        if whole != sample:
            wanted += f", or {whole}, one a token"
            wanted += f"; {between} will do too" if between != whole else ""
        raise ValueError(
            f"{layer}: {name} has shape {tuple(p.shape)}; for an input of shape {whole} it must be {wanted}; "
            "else expand it"
        )
    if not p.is_floating_point():
        raise TypeError(f"{layer}: {name} is {p.dtype}; it must be of a real floating-point dtype")
    checks.same_device(layer, name, p, x)
    return p


def _between(p: Tensor, x: Tensor) -> Tensor:
    """(B, d) as it broadcasts with x."""
    return p if p.dim() == x.dim() else p.reshape(p.shape[0], *(1,) * (x.dim() - 2), p.shape[-1])


class _Adaptive(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        checks.positive(type(self).__name__, "dim", dim)
        checks.eps(type(self).__name__, eps)
        self.dim, self.eps = dim, eps

    def reset_parameters(self) -> None:
        """There are none."""

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class AdaptiveLayerNorm(_Adaptive):
    r"""Layer normalization whose scale and shift come with the input: (1 + scale) · norm(x) + shift.

    Input (B, \*, d), with scale and shift, (B, d) or the shape of the input each; the output is like the input
    in shape and dtype. It has no parameters: what makes scale and shift from a condition is the model's, such
    as DiT's ``Linear(SiLU(c))``, whose outputs come in an order of their own.

    Args:
        dim: entries of a row, d.
        eps: added to the biased variance; positive.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> x, scale, shift = torch.randn(2, 7, 4), torch.zeros(2, 4), torch.zeros(2, 4)
    >>> torch.allclose(AdaptiveLayerNorm(4)(x, scale, shift), torch.nn.LayerNorm(4)(x))
    True
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        check_input("AdaptiveLayerNorm", x, self.dim)
        return modulated("AdaptiveLayerNorm", "layer", x, scale, shift, self.eps, offset=1.0)


class AdaptiveRMSNorm(_Adaptive):
    r"""RMS normalization whose scale and shift come with the input: (1 + scale) · norm(x) + shift.

    Input and the rest as for :class:`AdaptiveLayerNorm`, without the mean.

    Args:
        dim: entries of a row, d.
        eps: added to the mean square; positive.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> AdaptiveRMSNorm(2)(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[0.8485, 2.2627]])
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        check_input("AdaptiveRMSNorm", x, self.dim)
        return modulated("AdaptiveRMSNorm", "rms", x, scale, shift, self.eps, offset=1.0)
