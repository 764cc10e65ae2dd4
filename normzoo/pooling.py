"""The mean and the maximum of the channels at every pixel: one read of x, and one write of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad

from .checks import at_least_float32
from .dispatch import insisted, or_none, use_kernel


def mean_and_max(x: Tensor) -> Tensor:
    """(N, 2, \\*) of x (N, C, \\*), in the dtype of its statistics. Of equal maxima one gets the gradient, and
    NaN is the maximum."""
    if not use_kernel(x, fusible=False):
        return _eager(x)
    from normzoo_kernels import pooling as kernels

    strict = insisted()
    if needs_grad(x):
        out = or_none(strict, _MeanAndMax.apply, x, strict)
    else:
        out = or_none(strict, lambda: kernels.pool(x, False)[0])
    return _eager(x) if out is None else out


def _eager(x: Tensor) -> Tensor:
    h = at_least_float32(x)
    return torch.stack((h.mean(1), h.max(1).values), 1)


class _MeanAndMax(Function):
    """A linear map where the index of the maximum stays, so that the backward pass needs nothing of x."""

    @staticmethod
    def forward(ctx, x, strict):
        from normzoo_kernels import pooling as kernels

        out, index = kernels.pool(x, True)
        ctx.save_for_backward(index)
        ctx.like = x.shape[1], x.dtype, kernels.beside(x)
        ctx.strict = strict
        return out

    @staticmethod
    def backward(ctx, *grads):
        from normzoo_kernels import pooling as kernels

        (d,) = grads
        (index,) = ctx.saved_tensors
        dx = None if differentiated(d) else or_none(ctx.strict, kernels.unpool, d, index, *ctx.like)
        channels, dtype, _ = ctx.like
        return _spread(d, index, channels, dtype) if dx is None else dx, None


def _spread(d: Tensor, index: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """The gradient of x from that of its mean and maximum."""
    mean, top = d.unbind(1)
    share = (mean / channels).unsqueeze(1).expand(-1, channels, *[-1] * (d.dim() - 2))
    dx = share.scatter_add(1, index.long().unsqueeze(1), top.unsqueeze(1))
    return dx.to(dtype)
