"""Scale and shift of norms by stored statistics, and of group norm behind another norm, by kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo_kernels._op import needs_grad

from ..dispatch import KERNEL_DTYPES, insisted, or_none
from ..fused import Tensors, fused
from ..moments import Moments, standardized
from ..sets import fits

Mixed = tuple[Tensor, Tensor, Tensor, Tensor]


def mixed(
    m: Moments,
    stored: Sequence[Tensor] | None,
    share: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    n: float | None = None,
) -> Mixed | None:
    """(scale, shift, mean, var) by kernels: by `share` of a stored mean and variance (C,) and the rest of those
    of every entry, whose variance is m2 / n; without n by the stored ones alone. All of these are constants.
    None where no kernel runs."""
    given = stored or ()
    if not (m.kernels and m.unmerged and fits(weight, bias, *given)) or needs_grad(*given):
        return None
    from normzoo_kernels import stages as kernels

    own = (None, None) if n is None else (m.sets.delta.detach(), m.sets.m2.detach())
    mean, var = stored or (None, None)
    options: Any = (m.pivot, *own, mean, var, weight, bias, float(share), float(n or 0), eps)
    with torch.no_grad():
        found = or_none(insisted(), kernels.mixed, *options)
    if found is None:
        return None
    scale, shift, r, gap, mean, var = found
    scale, shift = fused(_Scaling([scale, shift]), r, gap, weight, bias)
    return scale, shift, mean, var


def second_stage(
    m: Moments,
    scale: Tensor,
    shift: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """(scale, shift) of a norm by (scale, shift) and of group norm behind it, as one map.

    weight, bias: of the group norm, one a channel or one a group.
    """
    count = m.sets.count
    stage = SecondStage(groups, count, eps)
    if len({len(t) for t in (weight, bias) if t is not None}) > 1:
        weight, bias = (t if t is None else each_channel(t, m.pivot.shape[-1]) for t in (weight, bias))
    tensors = (m.sets.delta, m.sets.m2, scale, shift, weight, bias)
    if not (m.kernels and count and fits(weight, bias)) or {scale.dtype, shift.dtype} != {torch.float32}:
        return stage.plain(tensors)
    whole = (t.expand(m.pivot.shape) for t in (scale, shift))
    return fused(stage, *tensors[:2], *whole, weight, bias)


class _Scaling:
    """scale = weight · r, shift = bias − gap · scale, both `found` already."""

    differentiable = 2

    def __init__(self, found: list[Tensor]) -> None:
        self.found = found

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        r, gap, weight, bias = tensors
        scale = r if weight is None else r * weight
        shift = -gap * scale if bias is None else bias.to(scale.dtype) - gap * scale
        return scale, shift

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        found, self.found = tuple(self.found), []  # not to be kept by their own graph
        return found, ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import stages as kernels

        r, gap, weight, bias = tensors
        asked: Any = (*grads, r, gap, weight if needs[2] else None, bias if needs[3] else None)
        return None, None, *kernels.scaling_backward(*asked)


@dataclass(frozen=True)
class SecondStage:
    """The arithmetic of :func:`second_stage`. Its tensors are delta and m2 of the entries, each of `number`
    values, scale and shift of the first norm, (N, C), and weight and bias of the second."""

    groups: int
    number: float
    eps: float

    differentiable = 2

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        delta, m2, scale, shift, weight, bias = tensors
        z = Moments(self.number, torch.zeros_like(delta), delta, m2).affine(scale, shift)
        weight, bias = (t if t is None else each_channel(t, delta.shape[-1]) for t in (weight, bias))
        groups = z.over_groups(self.groups)
        scale2, shift2 = standardized(groups.delta, groups.var, weight, bias, self.eps)
        return scale * scale2, shift * scale2 + shift2

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import stages as kernels

        options: Any = (*tensors, self.groups, float(self.number), self.eps)
        scale, shift, r, rest = kernels.second(*options)
        return (scale, shift), (r, rest)

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import stages as kernels

        options: Any = (*grads, *tensors, *kept, self.groups, float(self.number))
        return kernels.second_backward(*options)


def each_channel(t: Tensor, channels: int) -> Tensor:
    """What is one a group, for every channel."""
    if t.shape[0] == channels:
        return t
    return t.unsqueeze(1).expand(-1, channels // t.shape[0]).flatten()


def moved_first(
    mean: Tensor, var: Tensor, running: Sequence[Tensor], rate: float, early: bool
) -> tuple[Tensor, Tensor] | None:
    """Running statistics after a batch, whose variance is taken around the running mean, with `early` around
    that before it moves; None where no kernel runs."""
    if not all(t.dtype in KERNEL_DTYPES for t in running):
        return None
    from normzoo_kernels import stages as kernels

    options: Any = (mean, var, *(t.detach() for t in running), rate, early)
    return or_none(insisted(), kernels.moved, *options)
