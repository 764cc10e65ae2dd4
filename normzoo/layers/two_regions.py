"""Arithmetic of region normalization: scale and shift of both regions, and what belongs to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..fused import Tensors
from ..passes import divisor
from . import native


@dataclass(frozen=True)
class RegionScaling:
    """(scale, shift, mean, var) of two regions, statistics (2, C) or (2, N, C).

    The tensors are count, pivot, delta and m2, and gamma and beta, (C,) or None, of what is around and of the
    hole. A scale is (1 + gamma) / sqrt(var + eps · N / S), in a region of S of the N values; a shift adds the
    beta of the region, or without `separate` those of both.
    """

    eps: float
    separate: bool

    differentiable = 2

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        count, pivot, delta, m2, gamma0, beta0, gamma1, beta1 = tensors
        n = divisor(count)
        var = m2 / n
        share = n / divisor(count.sum(0, keepdim=True))
        scale = torch.rsqrt(var + self.eps / share)
        weight, bias = _of_regions(m2, gamma0, gamma1), _of_regions(m2, beta0, beta1)
        if weight is not None:
            scale = scale * (1 + weight)
        shift = -delta * scale
        if bias is not None:
            # Not their sum over the regions, whose backward pass would give both one memory for a gradient.
            shift = shift + (bias if self.separate else bias[:1] + bias[1:])
        return scale, shift, pivot + delta, var

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import pixels as kernels

        count, pivot, delta, *others = tensors
        options: Any = (count.expand(delta.shape), pivot, delta, *others, self.eps, self.separate)
        return kernels.scaling(*options), ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import pixels as kernels

        count, _, delta, *others = tensors
        options: Any = (*grads[:2], count.expand(delta.shape), delta, *others, self.eps, self.separate)
        return None, None, *kernels.scaling_backward(*options)


def _of_regions(statistics: Tensor, around: Tensor | None, inside: Tensor | None) -> Tensor | None:
    """(2, C), or (2, 1, C) where samples have their own statistics, in the dtype of these."""
    if around is None and inside is None:
        return None
    given = [statistics.new_zeros(statistics.shape[-1]) if p is None else p for p in (around, inside)]
    both = torch.stack([p.to(statistics.dtype) for p in given])
    return both.unsqueeze(1) if statistics.dim() == 3 else both


@dataclass(frozen=True)
class Gate:
    """(a, a, hole) with a = sigmoid(x) and the hole where that reaches the threshold, for x float32.

    a is given twice, so that what comes back from each of its uses is added up on the way.
    """

    threshold: float

    differentiable = 2

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        (x,) = tensors
        a = torch.sigmoid(x)
        return a, a, a.detach() >= self.threshold

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import pixels as kernels

        (x,) = tensors
        a, hole = kernels.gate(x, self.threshold)
        return (a, a.view_as(a), hole.view(torch.bool)), (a,)

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import pixels as kernels

        return (kernels.gate_backward(*grads[:2], *kept),)


class PixelMap:
    """x · (1 + scale) + shift in the dtype of x (N, C, \\*), scale and shift (N, 1, \\*)."""

    differentiable = 1

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        x, scale, shift = tensors
        return (native.like(x, torch.addcmul(shift, checks.at_least_float32(x), 1 + scale)),)

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import pixels as kernels

        return (kernels.apply(*tensors),), ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import pixels as kernels

        x, scale, _ = tensors
        return kernels.apply_backward(grads[0], x, scale)
