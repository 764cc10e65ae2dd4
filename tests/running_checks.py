"""A step of PowerNorm or UnifiedNorm on the kernels, held to the eager engine and to float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from tolerance import assert_as_good
from torch import Tensor, nn

import normzoo
from normzoo import PowerNorm
from normzoo_kernels._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Results = dict[str, Tensor]


def prepared(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer whose parameters and statistics are not those it starts with."""
    layer = make().to(DEVICE, dtype)
    with torch.no_grad():
        for t in (*layer.parameters(), layer.ema_gz):
            t.add_(torch.randn_like(t) / 2)
        getattr(layer, "running_phi" if isinstance(layer, PowerNorm) else "running_var").uniform_(0.5, 2)
    return layer


def step(
    layer: nn.Module, backend: str, x: Tensor, dy: Tensor | None = None, mask: Tensor | None = None
) -> Results:
    """Output, gradients and state after a step of training. x has a gradient where it requires one."""
    leaves = {f"d{name}": p for name, p in layer.named_parameters() if p.requires_grad}
    if x.requires_grad:
        leaves["dx"] = x = x.detach().requires_grad_()
    found: Results = {}
    with normzoo.backend(backend):
        y = layer(x, mask)
        if dy is not None:
            found |= zip(leaves, torch.autograd.grad(y, [*leaves.values()], dy), strict=True)
    return {"y": y.detach()} | found | state_of(layer)


def state_of(layer: nn.Module) -> Results:
    return {name: b.clone() for name, b in layer.named_buffers()}


def check(layer: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> Results:
    """All three begin with the state that the kernels left, and the layer moves on with them."""
    eager, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    before = launches.total()
    ours = step(layer, "triton", x, dy, mask)
    assert launches.total() - before >= 4, "no kernel ran"
    before = launches.total()
    plain = step(eager, "reference", x, dy, mask)
    assert launches.total() == before
    wanted = step(exact, "reference", x.detach().double().requires_grad_(x.requires_grad), dy.double(), mask)
    assert ours.keys() == wanted.keys()
    for name, e in wanted.items():
        if e.is_floating_point():
            assert_as_good(name, ours[name], plain[name], e)
        else:
            assert torch.equal(ours[name], e), f"{name}: {ours[name]}, expected {e}"
    return ours


def train(layer: nn.Module, xs: list[Tensor], dys: list[Tensor], masks: list) -> list[Results]:
    return [check(layer, *batch) for batch in zip(xs, dys, masks, strict=True)]


def values(*shape: int, channel: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries of x, channels of unlike sizes."""
    scale = torch.linspace(0.5, 2, shape[channel]).view(-1, *[1] * (len(shape) - 1 - channel % len(shape)))
    return (torch.randn(shape) * scale + 0.5).to(DEVICE, dtype).requires_grad_()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)
