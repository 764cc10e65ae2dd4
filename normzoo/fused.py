"""A little arithmetic on small tensors as one launch forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad

from .dispatch import insisted, or_none

Tensors = Sequence[Tensor | None]


class Arithmetic(Protocol):
    """What is computed, by plain PyTorch and by kernels."""

    @property
    def differentiable(self) -> int:
        """How many of the outputs, the first ones, have gradients."""
        ...

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        """The outputs by plain PyTorch."""
        ...

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        """(outputs, what the backward pass needs beside the tensors)."""
        ...

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        """The gradients of the tensors, of which those that nobody `needs` may be None or empty."""
        ...


def fused(arithmetic: Arithmetic, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of `arithmetic` by its kernels; by plain PyTorch where these do not compile, and where their
    gradients are differentiated once more."""
    strict = insisted()
    if needs_grad(*tensors):
        found = or_none(strict, _Fused.apply, arithmetic, strict, *tensors)
    else:
        found = or_none(strict, lambda: arithmetic.forward(tensors)[0])
    return arithmetic.plain(tensors) if found is None else found


class _Fused(Function):
    @staticmethod
    def forward(ctx, arithmetic, strict, *tensors):
        outputs, kept = arithmetic.forward(tensors)
        ctx.arithmetic, ctx.strict, ctx.count = arithmetic, strict, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.mark_non_differentiable(*outputs[arithmetic.differentiable :])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        needs, given = ctx.needs_input_grad[2:], [g for g in grads if g is not None]
        if not given:
            return (None,) * (2 + ctx.count)
        saved, found = ctx.saved_tensors, None
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        if not any(map(differentiated, given)):
            found = or_none(ctx.strict, ctx.arithmetic.backward, tensors, kept, grads, needs)
        if found is None:
            found = _by_autograd(ctx.arithmetic, tensors, grads, needs)
        return None, None, *(g if need else None for g, need in zip(found, needs, strict=True))


def _by_autograd(arithmetic: Arithmetic, tensors: Tensors, grads: Tensors, needs: Sequence[bool]) -> Tensors:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since one may have been computed from another: that is not this operation's path.
        tensors = [None if t is None else t.view_as(t) for t in tensors]
        outputs = arithmetic.plain(tensors)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if t is not None and need]
    if not pairs:
        return [None] * len(tensors)
    ys, gs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
