"""How a launcher becomes a torch operator, and what autograd needs beside it.

Eager calls go straight to the launcher: the dispatcher costs more host time than a small kernel runs. Code
that is being compiled calls the same launcher as an opaque operator with a fake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

library = torch.library.Library("normzoo", "DEF")


def op(schema: str, fake: Callable) -> Callable:
    """Makes the decorated launcher the operator of namespace normzoo with this `schema` and `fake`."""

    def register(launcher: Callable) -> Callable:
        name = schema.partition("(")[0]
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, _complete(launcher), key)
        torch.library.register_fake(f"normzoo::{name}", _complete(fake), lib=library)
        opaque = getattr(torch.ops.normzoo, name).default

        @functools.wraps(launcher)
        def call(*args):
            # A dispatch mode (make_fx, a FLOP counter) must see an operator.
            seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            return opaque(*args) if seen else launcher(*args)

        return call

    return register


def _complete(function: Callable) -> Callable:
    """With an empty tensor for every output that is None, which an operator cannot return."""

    def call(*args):
        outputs = function(*args)
        if not isinstance(outputs, (tuple, list)):
            return outputs
        return tuple(args[0].new_empty(0) if t is None else t for t in outputs)

    return call


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def differentiated(dy: Tensor) -> bool:
    """Whether the backward pass is itself differentiated (create_graph) or batched: kernels cannot be."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or batched(dy)


def batched(t: Tensor) -> bool:
    """Whether vmap stands behind t."""
    return torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


def through_reference(
    reference: Callable, inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``reference(*inputs)`` by ordinary autograd, differentiable where the caller's are."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since one input may have been computed from another: that is not this operation's path.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        output = reference(*inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
