r"""The running engine: norms by a mean square, whose gradient has running statistics of its own.

y = weight · u · r + bias, where r comes from stored statistics of u², from those of the batch, or from both;
and the gradient of u is a · dy + b · u, where a and b are no derivatives but come from stored statistics of the
gradient. Which statistics they are is the little arithmetic of a layer, its rule. The state that a rule reads
is written after it: that of the forward pass by the layer, that of the backward pass here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import ranks, sweeps
from .passes import divisor
from .state import commit


class Rule(Protocol):
    """What a layer does between the passes. All tensors are (C,) or single numbers, float32 at least."""

    def forward(
        self, q: Tensor, whole: Tensor, some: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """(r, kept, new) from the mean square over what is no padding and that over everything.

        some: a bool, whether there was anything but padding; None where that is certain. kept: for the backward
        pass. new: the state after this step, for the layer to commit.
        """
        ...

    def backward(
        self, kept: Sequence[Tensor], weight: Tensor | None, slope: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Iterable[tuple[Tensor, Tensor]]]:
        """(a, b, factor, updates): du = a · dy + b · u and dweight = factor · Σ dy · u.

        slope: the mean of dy · u over everything. after: a gradient, for :func:`normzoo.state.present`. The
        updates are committed.
        """
        ...


def run(
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int | None,
    rule: Rule,
    sync: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, new state) of a training step; x (N, C, \\*), pad_mask (N, \\*) bool, True for padding.

    groups: each position is first divided by the root mean square of each of so many groups of channels.
    """
    sync = sync and ranks.size(process_group) > 1
    y, *new = _Run.apply(x, weight, bias, pad_mask, groups, rule, sync, process_group)
    return y, tuple(new)


class _Run(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pad_mask, groups, rule, sync, process_group):
        u, _ = sweeps.unit(x, groups)
        whole = sweeps.squares(u)
        valid = whole if pad_mask is None else sweeps.squares(u, pad_mask)
        count: Any = x.numel() // x.shape[1]
        here: Any = count if pad_mask is None else (~pad_mask).sum().to(whole.dtype)
        if sync:
            parts = (valid, whole, torch.stack([torch.as_tensor(n).to(whole) for n in (here, count)]))
            valid, whole, counts = ranks.total(parts, process_group)
            here, count = counts
        some = here > 0 if isinstance(here, Tensor) else None if here else torch.zeros((), dtype=torch.bool)
        r, kept, new = rule.forward(valid / divisor(here), whole / divisor(count), some)
        scale = r if weight is None else r * weight
        y = sweeps.scaled(u, scale, bias).to(x.dtype)
        ctx.save_for_backward(x, weight, torch.as_tensor(count).to(r), *kept)
        ctx.how = groups, rule, sync, process_group
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(*new)
        ctx.set_materialize_grads(False)
        return y, *new

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        dy = grads[0]
        if dy is None:
            return (None,) * 8
        x, weight, count, *kept = ctx.saved_tensors
        groups, rule, sync, process_group = ctx.how
        u, s = sweeps.unit(x, groups)
        dbias, slope = sweeps.sums(dy, u)
        total = ranks.total((slope,), process_group)[0] if sync else slope
        a, b, factor, updates = rule.backward(kept, weight, total / divisor(count), dy)
        dx = sweeps.gradient(dy, u, a, b, s, groups).to(x.dtype) if ctx.needs_input_grad[0] else None
        commit(updates)
        dweight = None if weight is None else (factor * slope).to(weight.dtype)
        return dx, dweight, dbias if ctx.has_bias else None, None, None, None, None, None
