r"""Layer normalization: every row gets mean zero and variance one.

Ba, Kiros and Hinton, *Layer Normalization*, 2016, arXiv:1607.06450, eq. (3) and (4).
The eager body is torch's own operator; the kernels take the variance around the mean and correct it for the
rounding of that mean, which keeps the digits that a large mean costs elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..dispatch import Reference, use_kernel
from . import native


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics over the trailing `normalized_shape`.

    Args:
        x: (\*, \*normalized_shape), any real floating dtype.
        weight, bias: (\*normalized_shape) or None, of any floating dtype.
        eps: added to the biased variance; positive.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> layer_norm(torch.tensor([[1.0, 3.0]]), 2)
    tensor([[-1.0000,  1.0000]])
    """
    shape = checks.rows("layer_norm", x, normalized_shape, weight, bias)
    checks.eps("layer_norm", eps)
    if use_kernel(x, weight, bias):
        from normzoo_kernels import rows

        def again(x, weight, bias):
            return layer_norm(x, x.shape[-1:], weight, bias, eps)

        return rows.norm("layer", x, shape, weight, bias, eps=eps, reference=Reference(again))

    h, weight, bias = native.in_one_dtype(x, weight, bias)
    y = F.layer_norm(h, shape, weight, bias, eps)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # CUDA autocast returns float32


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""``total = x + residual`` and ``y = layer_norm(total)``, in one kernel where kernels run.

    Args:
        x, residual: (\*, \*normalized_shape); the sum has their promoted dtype, so a float32 residual stream
            stays float32.
        weight, bias, eps: as in :func:`layer_norm`.

    Returns:
        ``(y, total)``: y in the dtype of `x`, total in the dtype of ``x + residual``.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.
    """
    shape = checks.rows("add_layer_norm", x, normalized_shape, weight, bias, residual)
    checks.eps("add_layer_norm", eps)
    if use_kernel(x, weight, bias, residual=residual):
        from normzoo_kernels import rows

        def again(total, weight, bias):
            return layer_norm(total, total.shape[-1:], weight, bias, eps)

        return rows.add_norm("layer", x, residual, shape, weight, bias, eps=eps, reference=Reference(again))

    total = x + residual
    return layer_norm(total, shape, weight, bias, eps).to(x.dtype), total


class LayerNorm(nn.LayerNorm):
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, a drop-in for :class:`torch.nn.LayerNorm`.

    Same arguments, state and mathematics; eps must be positive, which torch does not ask. Input
    (\*, \*normalized_shape), output alike in shape and dtype; a kernel keeps the order that the leading
    dimensions have in memory. Parameters may be of another dtype than the input.

    A parent module that reads ``weight`` and ``bias`` itself, such as the fast path of
    :class:`torch.nn.TransformerEncoderLayer` in eval mode, never calls this forward.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> LayerNorm(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        shape = checks.normalized_shape("LayerNorm", normalized_shape)
        checks.eps("LayerNorm", eps)
        super().__init__(list(shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
