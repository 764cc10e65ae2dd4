"""Small arithmetic by kernels, each beside the plain PyTorch that it stands for: on a GPU, else in the
interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo.fused import Arithmetic, fused
from normzoo.sets import Scaling, Union

pytest.importorskip("triton")

from normzoo_kernels import sets
from normzoo_kernels._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
randn, rand = partial(torch.randn, device=DEVICE), partial(torch.rand, device=DEVICE)


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(body, arithmetic: Arithmetic, tensors, constants, of=lambda t: t):
    """Outputs, and gradients of all floating tensors but `constants` by fixed ones for the outputs that have any."""
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
        assert_as_good(f"output {i}", a, b, c, hard=hard)
    for i, (a, b, c) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        if b is None or a is None:
            assert b is None or not b.any(), f"gradient {i} is missing"
            continue
        assert_as_good(f"gradient {i}", a, b, c, hard=hard)
    return ours


@pytest.fixture(params=[4, 64], ids=["few programs", "many"])
def programs(request, monkeypatch):
    monkeypatch.setattr(sets, "sm_count", lambda device: request.param)


def moments(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    pivot = 3 * randn(*shape)
    return pivot, randn(*shape) / 8, 9 * rand(*shape)


HOW = {
    "own": (7, 5, 0),
    "batch": (37, 21, 37),
    "chunks": (11, 21, 4),
    "chunks of one": (3, 5, 1),
    "interleaved": (12, 21, 4),
    "groups": (5, 24, 8),
    "odd groups": (5, 21, 3),
    "wide groups": (2, 2600, 1300),
    "one a group": (4, 6, 1),
    "wide": (2, 70, 2),
}
KINDS = {
    "none": Scaling(),
    "standardize": Scaling("standardize", 1e-3),
    "inverse": Scaling("inverse", 1e-3, True),
    "root": Scaling("root", 1e-3),
    "root about zero": Scaling("root", 1e-3, True),
}


def how_of(name: str) -> str:
    return {"wide": "batch", "one a group": "groups"}.get(
        name, name.split()[-1] if "groups" in name else name.split()[0]
    )


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("kind", ["none", "standardize"])
def test_unions(name, kind, programs):
    rows, columns, size = HOW[name]
    if how_of(name) == "own" and kind == "none":
        return
    union = Union(6, how_of(name), size, False, False, KINDS[kind])
    parameters = (randn(columns), randn(columns)) if kind == "standardize" else (None, None)
    check(union, (*moments(rows, columns), None, None, None, *parameters))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["own", "batch", "odd groups", "chunks"])
def test_scalings(name, kind):
    rows, columns, size = HOW[name]
    if (name, kind) == ("own", "none"):
        return
    union = Union(6, how_of(name), size, False, False, KINDS[kind])
    weight = None if kind.startswith("root") or kind == "none" else randn(columns)
    check(union, (*moments(rows, columns), None, None, None, weight, None))
