r"""RMS normalization: every row gets root mean square one.

RMSNorm: Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019, arXiv:1910.07467, eq. (4).
CRMSNorm: Jiang, Gu, Zhu and Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN
Transformers*, 2023, arXiv:2305.14858; code ZixuanJiang/pre-rmsnorm-transformer.
Differs from the authors' code: eps sits under the root as in torch, statistics are at least float32, and
CRMSNorm has a weight where the official class accepts one and ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks, row_blocks
from ..dispatch import Reference, transformed, use_kernel
from ..row_blocks import Kind
from ..row_blocks import norm_of_rows as norm_of_rows

CASTS = ("torch", "llama", "gemma")


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    offset: float = 0.0,
    cast: str = "torch",
) -> Tensor:
    r"""y = (offset + weight) · x / sqrt(mean(x²) + eps) + bias, the mean over the trailing `normalized_shape`.

    Args:
        x: (\*, \*normalized_shape), any real floating dtype.
        weight, bias: (\*normalized_shape) or None, of any floating dtype.
        eps: positive; None means the machine epsilon of the dtype the statistics are taken in (torch's rule:
            that of float32 for half precision).
        offset: added to the weight in float32; 1.0 for checkpoints that store ``w`` and apply ``1 + w``.
        cast: where low precision rounds. ``"torch"`` and ``"gemma"`` stay in float32 to the end and round
            once; ``"llama"`` rounds the normalized row to the dtype of x before the weight is applied.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit together.

    >>> import torch
    >>> rms_norm(torch.tensor([[3.0, 4.0]]), 2, eps=1e-5)
    tensor([[0.8485, 1.1314]])
    """
    shape = checks.rows("rms_norm", x, normalized_shape, weight, bias)
    eps = _options("rms_norm", x, weight, eps, offset, cast)
    if use_kernel(x, weight, bias):
        from normzoo_kernels import rows

        def again(x, weight, bias):
            return rms_norm(x, x.shape[-1:], weight, eps, bias=bias, offset=offset, cast=cast)

        how = {"eps": eps, "offset": offset, "llama": cast == "llama"}
        return rows.norm("rms", x, shape, weight, bias, **how, reference=Reference(again))

    bare = cast == "torch" and bias is None and not offset and (weight is None or weight.dtype == x.dtype)
    if bare and row_blocks.small(x, weight):
        return torch.rms_norm(x, shape, weight, eps)
    if row_blocks.fits(x, weight, bias) and (cast != "llama" or x.dtype.itemsize >= 4):

        def whole(x, weight, bias):
            return _rms(x, shape, weight, eps, bias, 0.0, cast)

        w = weight if weight is None or not offset else checks.at_least_float32(weight) + offset
        return row_blocks.normalized(Kind("rms", eps), x, len(shape), w, bias, whole)
    return _rms(x, shape, weight, eps, bias, offset, cast)


def _rms(x, shape, weight, eps, bias, offset, cast) -> Tensor:
    h = checks.at_least_float32(x)
    y = h * torch.rsqrt(sum_of_squares(h, len(shape)) / math.prod(shape) + eps)
    return _affine(y, x.dtype, weight, bias, offset, cast)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    offset: float = 0.0,
    cast: str = "torch",
) -> tuple[Tensor, Tensor]:
    r"""``total = x + residual`` and ``y = rms_norm(total)``, in one kernel where kernels run.

    Args:
        x, residual: (\*, \*normalized_shape); the sum has their promoted dtype, so a float32 residual stream
            stays float32.
        weight, eps, bias, offset, cast: as in :func:`rms_norm`.

    Returns:
        ``(y, total)``: y in the dtype of `x`, total in the dtype of ``x + residual``.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options do not fit together.
    """
    shape = checks.rows("add_rms_norm", x, normalized_shape, weight, bias, residual)
    number = _options("add_rms_norm", x, weight, eps, offset, cast)
    if use_kernel(x, weight, bias, residual=residual):
        from normzoo_kernels import rows

        def again(total, weight, bias):
            return rms_norm(total, total.shape[-1:], weight, eps, bias=bias, offset=offset, cast=cast)

        how = {"eps": number, "offset": offset, "llama": cast == "llama"}
        return rows.add_norm("rms", x, residual, shape, weight, bias, **how, reference=Reference(again))

    total = x + residual
    y = rms_norm(total, shape, weight, eps, bias=bias, offset=offset, cast=cast)
    return y.to(x.dtype), total


def crms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""RMS normalization of a zero-mean row of d entries of which only the first d − 1 are stored.

    The dropped entry is minus the sum of the others, so with s = sum(x)
    y = weight · x / sqrt((sum(x²) + s²) / d + eps).

    Args:
        x: (\*, \*normalized_shape), d − 1 entries a row, any real floating dtype.
        weight: (\*normalized_shape) or None.
        eps: positive.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> crms_norm(torch.tensor([[1.0, 1.0]]), 2)  # the row is (1, 1, -2)
    tensor([[0.7071, 0.7071]])
    """
    shape = checks.rows("crms_norm", x, normalized_shape, weight)
    checks.eps("crms_norm", eps)
    if use_kernel(x, weight):
        from normzoo_kernels import rows

        def again(x, weight, bias):
            return crms_norm(x, x.shape[-1:], weight, eps)

        return rows.norm("crms", x, shape, weight, None, eps=eps, reference=Reference(again))

    if row_blocks.fits(x, weight):

        def whole(x, weight, bias):
            return _crms(x, shape, weight, eps)

        return row_blocks.normalized(Kind("crms", eps), x, len(shape), weight, None, whole)
    return _crms(x, shape, weight, eps)


def _crms(x, shape, weight, eps) -> Tensor:
    h = checks.at_least_float32(x)
    dropped = h.sum(dim=tuple(range(-len(shape), 0)), keepdim=True)
    squares = sum_of_squares(h, len(shape)) + dropped.square()
    y = h * torch.rsqrt(squares / (math.prod(shape) + 1) + eps)
    return _affine(y, x.dtype, weight, None, 0.0, "torch")


def _options(name: str, x: Tensor, weight: Tensor | None, eps: float | None, offset: float, cast: str) -> float:
    """Checks the options of RMSNorm and returns eps as a number."""
    checks.choice(name, "cast", cast, CASTS)
    if offset and weight is None:
        raise ValueError(f"{name}: offset is {offset} but there is no weight to add it to; pass a weight")
    if eps is None:
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    checks.eps(name, eps)
    return eps


def sum_of_squares(h: Tensor, dims: int) -> Tensor:
    """Over the last `dims` dimensions, kept with size one."""
    rows = h if dims == 1 else h.flatten(-dims)
    recorded = rows.requires_grad and torch.is_grad_enabled()
    if recorded and row_blocks.small(rows):  # sooner done than a Function of Python is called
        squares = rows.square().sum(-1, keepdim=True)
    elif recorded and not (torch.compiler.is_compiling() or transformed()):
        squares = _SumOfSquares.apply(rows)
    else:
        squares = _SumOfSquares.forward(rows)
    return squares if dims == 1 else squares.reshape(h.shape[:-dims] + (1,) * dims)


class _SumOfSquares(torch.autograd.Function):
    """vector_norm squared, the fastest way on a CPU, without its NaN in second derivatives at zero."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return norm_of_rows(rows).square()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return 2 * grads[0] * rows


def _affine(
    y: Tensor, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, offset: float, cast: str
) -> Tensor:
    """(offset + weight) · y + bias, rounded to `dtype` where `cast` says."""
    if cast == "llama":
        y = y.to(dtype)
    if weight is not None:
        w = checks.at_least_float32(weight) + offset if offset else weight
        # y is ours; writing into it saves a pass over memory wherever autograd does not need it.
        own = not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        y = y.mul_(w) if own and torch.result_type(y, w) == y.dtype else y * w
    if bias is not None:
        y = y + bias
    return y if y.dtype == dtype else y.to(dtype)


class RMSNorm(nn.RMSNorm):
    r"""y = (offset + weight) · x / sqrt(mean(x²) + eps) + bias, a drop-in for :class:`torch.nn.RMSNorm`.

    Input (\*, \*normalized_shape), output alike in shape and dtype; a kernel keeps the order that the leading
    dimensions have in memory. Parameters may be of another dtype than the input.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch; ``eps=None`` is the machine
            epsilon of the dtype the statistics are taken in.
        bias: adds a bias, initialised to zero.
        offset: the layer applies ``offset + weight``; the weight starts at ``1 - offset``.
        cast: ``"torch"``, ``"llama"`` or ``"gemma"``, see :func:`normzoo.functional.rms_norm`.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> RMSNorm(4, offset=1.0, cast="gemma")(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = False,
        offset: float = 0.0,
        cast: str = "torch",
    ) -> None:
        shape = checks.normalized_shape("RMSNorm", normalized_shape)
        if eps is not None:
            checks.eps("RMSNorm", eps)
        checks.choice("RMSNorm", "cast", cast, CASTS)
        if not elementwise_affine and (bias or offset):
            raise ValueError(
                f"RMSNorm: bias={bias} and offset={offset} need elementwise_affine=True, it is False"
            )
        self.offset = float(offset)
        self.cast = cast
        super().__init__(list(shape), eps, elementwise_affine, device, dtype)
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.offset)
        bias = getattr(self, "bias", None)  # torch's constructor calls this before there is one
        if bias is not None:
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        how = {"bias": self.bias, "offset": self.offset, "cast": self.cast}
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, **how)

    def extra_repr(self) -> str:
        extra = f", bias={self.bias is not None}, offset={self.offset}, cast={self.cast!r}"
        return super().extra_repr() + extra


class CRMSNorm(nn.Module):
    r"""Compressed RMS normalization: RMSNorm of zero-mean rows stored without their last entry.

    Input and output (\*, \*normalized_shape), where `normalized_shape` is the compressed width d − 1.

    Args:
        normalized_shape: the stored width d − 1, or a shape with that many entries.
        eps: positive.
        elementwise_affine: a weight of d − 1 entries, initialised to one. The official code has none: it
            folds weights into the layers around.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> x = torch.tensor([[1.0, 1.0, -2.0]])
    >>> torch.allclose(CRMSNorm(2)(x[:, :2]), RMSNorm(3, eps=1e-5)(x)[:, :2])
    True
    """

    normalized_shape: tuple[int, ...]
    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.normalized_shape = checks.normalized_shape("CRMSNorm", normalized_shape)
        checks.eps("CRMSNorm", eps)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.weight = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return crms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
