"""Gradients of parameters and statistics on their way between a combine and the passes over x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo_kernels._op import needs_grad

from .dispatch import or_none
from .fused import Tensors, fused
from .passes import divisor


def expanded(parameters: Sequence[Tensor], shape: torch.Size, kernels: bool) -> list[Tensor]:
    """All parameters in the shape of the statistics; with `kernels` the gradients of several are summed up over
    the samples at once."""
    found = [t.expand(shape) for t in parameters]
    if not kernels or len(shape) != 2:
        return found
    own = [i for i, t in enumerate(parameters) if t.dim() == 1 and t.shape == shape[1:] and needs_grad(t)]
    if len(own) > 1 and all(shape):
        expansion = _Expansion(shape)
        made = fused(expansion, *(parameters[i] for i in own[: expansion.differentiable]))
        for i, t in zip(own, made, strict=False):
            found[i] = t
    return found


@dataclass(frozen=True)
class _Expansion:
    """(C,) of every row of (N, C)."""

    shape: torch.Size

    @property
    def differentiable(self) -> int:
        from normzoo_kernels.carry import MOST

        return MOST

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        return tuple(t.expand(self.shape) for t in tensors)

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        return self.plain(tensors), ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import carry as kernels

        given = [g for g in grads if g is not None]
        totals = iter(kernels.totals(given))
        return [None if g is None else next(totals) for g in grads]


def slope_and_offset(
    d_delta: Tensor | None, d_m2: Tensor | None, delta: Tensor, count: Any, kernels: bool, strict: bool
) -> tuple[Tensor, ...]:
    """Of the gradient that x gets through its statistics: slope · (x − pivot) + offset; empty where these are
    constants. strict: whether a kernel that does not compile is an error."""
    if d_delta is None and d_m2 is None:
        return ()
    if kernels and delta.numel():
        found = or_none(strict, _by_kernel, d_delta, d_m2, delta, count)
        if found is not None:
            return found
    offset = torch.zeros_like(delta) if d_delta is None else d_delta / divisor(count)
    if d_m2 is None:
        return torch.zeros_like(delta), offset
    slope = 2 * d_m2
    return slope, torch.addcmul(offset, slope, delta, value=-1)


def _by_kernel(d_delta: Tensor | None, d_m2: Tensor | None, delta: Tensor, count: Any) -> tuple[Tensor, ...]:
    from normzoo_kernels import carry as kernels

    counts = count.expand(delta.shape) if isinstance(count, Tensor) else None
    options: Any = (d_delta, d_m2, delta, counts, 0.0 if counts is not None else float(count))
    return kernels.pull(*options)
