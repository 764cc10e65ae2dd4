"""Small arithmetic by kernels beside the plain PyTorch that it stands for, values, gradients and launches."""

from __future__ import annotations

from functools import partial

import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo.fused import Arithmetic, fused
from normzoo_kernels._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
randn, rand = partial(torch.randn, device=DEVICE), partial(torch.rand, device=DEVICE)


def moments(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    pivot = 3 * randn(*shape)
    return pivot, randn(*shape) / 8, 9 * rand(*shape)


def run(body, arithmetic: Arithmetic, tensors, constants, of=lambda t: t):
    """Outputs, and gradients of all floating tensors but `constants`, by fixed ones of the outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        leaves = [of(t).detach() if t is not None and t.is_floating_point() else t for t in tensors]
        for i, t in enumerate(leaves):
            if t is not None and t.is_floating_point() and i not in constants:
                t.requires_grad_()
        before = launches.total()
        outputs = body(leaves)
        forward, before = launches.total() - before, launches.total()
        some = [y for y in outputs[: arithmetic.differentiable] if y.requires_grad]
        ups = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in some]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = torch.autograd.grad(some, wanted, ups, allow_unused=True) if some else ()
    return outputs, grads, (forward, launches.total() - before)


def check(arithmetic: Arithmetic, tensors, launched=(1, 1), constants=(0,), hard=False) -> tuple[Tensor, ...]:
    """Values and gradients no worse than those of the plain formulas, and by so many launches."""
    with normzoo.backend("triton"):
        ours, grads, number = run(lambda t: fused(arithmetic, *t), arithmetic, tensors, constants)
    plain, plain_grads, none = run(arithmetic.plain, arithmetic, tensors, constants)
    exact, exact_grads, _ = run(arithmetic.plain, arithmetic, tensors, constants, lambda t: t.double())
    assert number == launched and none == (0, 0)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        if b.is_floating_point():
            assert_as_good(f"output {i}", a, b, c, hard=hard)
        else:
            assert torch.equal(a, b)
    for i, (a, b, c) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        if b is None or a is None:
            assert b is None or not b.any(), f"gradient {i} is missing"
            continue
        assert_as_good(f"gradient {i}", a, b, c, hard=hard)
    return ours
