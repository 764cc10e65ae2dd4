"""How much each sample of a batch counts by its task, and where statistics are drawn to: for AdaB2N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..dispatch import insisted, or_none, use_kernel
from ..fused import Tensors, fused
from ..moments import Moments
from ..sets import fits
from ..state import average, snapshot


def shares_of(
    m: Moments,
    ids: Tensor,
    psi: Tensor,
    ended: int | Tensor,
    values: int,
    group: tuple[Any] | None,
) -> tuple[Tensor, Tensor]:
    """(w, lost): how much each of the `values` of a sample counts, and what the absent ones of the tasks
    0 … `ended` take with them.

    ids: (N,); psi: (tasks,), the logarithms of prior counts; group: a process group to count tasks over.
    """
    if m.kernels and group is None and fits(psi) and _few(psi):
        # A copy, for the number of a layer counts on.
        cur = ended.to(psi.device, copy=True) if isinstance(ended, Tensor) else None
        of_samples, lost = fused(_Shares(-1 if isinstance(ended, Tensor) else ended, values), ids, cur, psi)
        return of_samples, lost
    own = _own(ids, psi)
    n = own.sum(0).to(m.pivot.dtype)
    n = n if group is None else ranks.total((n,), group[0])[0]
    w, lost = _shares(own, n, psi.to(n.dtype), ended)
    return w / values, lost


def _few(psi: Tensor) -> bool:
    """Whether a kernel can hold so many tasks."""
    from normzoo_kernels.balance import MOST_TASKS

    return len(psi) <= MOST_TASKS


@dataclass(frozen=True)
class _Shares:
    """The arithmetic of :func:`shares_of`. Its tensors are the ids, how many tasks have ended, or None for
    `ended`, and psi."""

    ended: int
    values: int

    differentiable = 2

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        ids, cur, psi = tensors
        own, wide = _own(ids, psi), torch.promote_types(psi.dtype, torch.float32)
        w, lost = _shares(own, own.sum(0).to(wide), psi.to(wide), self.ended if cur is None else cur)
        return w / self.values, lost

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import balance as kernels

        ids, cur, psi = tensors
        options: Any = (ids, psi, cur, self.ended, float(self.values))
        return kernels.shares(*options), ()

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import balance as kernels

        ids, cur, psi = tensors
        options: Any = (*grads, ids, psi, cur, self.ended, float(self.values))
        return None, None, kernels.shares_backward(*options)


def _own(ids: Tensor, psi: Tensor) -> Tensor:
    """(N, tasks): whether a sample is of a task."""
    return ids.unsqueeze(1) == torch.arange(len(psi), device=psi.device)


def _shares(own: Tensor, n: Tensor, psi: Tensor, ended: int | Tensor) -> tuple[Tensor, Tensor]:
    """(w, lost): how much each sample counts, and what the absent ones of the tasks 0 … `ended` take with them.

    own: (N, tasks), whether a sample is of a task; n: (tasks,), how many are, on all ranks.
    """
    present = n > 0
    counted = present | (torch.arange(len(psi), device=psi.device) <= ended)
    # The logarithm of exp(psi) + n, which cannot overflow; log 0 = -inf leaves psi.
    concentration = torch.logaddexp(psi, n.log())
    pi = torch.where(counted, concentration, -torch.inf).softmax(0)
    # Not by index, whose backward pass would add in any order.
    w = torch.where(own, pi / n.clamp(min=1), 0).sum(1)
    w = torch.where(own.any(1), w, torch.nan)
    return w, torch.where(present, 0, pi).sum()


def targets_by_kernel(
    mean: Tensor,
    var: Tensor,
    stored: Sequence[Tensor],
    tracked: Tensor | None,
    momentum: float,
    kappa: float,
    count: Any,
) -> tuple[Tensor, Tensor, float | Tensor] | None:
    """The targets of mean and variance, and the rate; None where no kernel runs.

    tracked: how many batches came before, None where the rate is the momentum.
    """
    if torch.compiler.is_compiling() or not isinstance(count, int) or not count:
        return None
    if mean.dtype != torch.float32 or not use_kernel(mean, var, *stored) or not fits(*stored):
        return None
    if tracked is not None and tracked.device != mean.device:
        return None
    from normzoo_kernels import balance as kernels

    falls = tracked is not None and kappa > 0
    decay = kappa * math.log1p(-momentum) if falls else 0.0
    numbers = (decay, momentum**-kappa, math.expm1(decay)) if falls else (0.0, 0.0, 0.0)
    options: Any = (mean, var, *stored, tracked, momentum, *numbers)
    with torch.no_grad():
        found = or_none(insisted(), kernels.targets, *options)
    if found is None:
        return None
    to_mean, to_var, rate = found
    return to_mean, to_var, momentum if tracked is None else rate


def target(old: Tensor, new: Tensor, rate: float | Tensor, count: Any) -> Tensor:
    """Where a statistic is drawn to: the running one, after this batch; that of an empty batch nowhere."""
    target = average(snapshot(old), new, rate)
    if isinstance(count, Tensor):
        return torch.where(count != 0, target, new.detach())
    return target if count else new.detach()
