"""Region norms across ranks, held to one process that has the whole batch."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from distributed_checks import by_kernels, eager
from distributed_work import CHECKS, Collectives, check, of_ranks, parts_of_ranks, run
from region_oracle import randomized
from tolerance import assert_as_good
from torch import Tensor, nn

from normzoo.layers.region import RegionNormB
from normzoo.layers.region_learned import RegionNormL
from normzoo.pooling import mean_and_max

C = 3
SIZE = (C, 4, 5)
SHARES = (0.0, 0.7, 0.2)
"""Of the holes, by rank: there is none on the first."""


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def results(layer: nn.Module, call, x: Tensor, dy: Tensor, *others: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = call(x, *others)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def compare(sizes, layer: nn.Module, way, *masks: list[Tensor], dtype=torch.double) -> None:
    """A rank's part of y and dx, and the sum of the gradients of every parameter."""
    rank, layer = dist.get_rank(), layer.to(dtype)
    parts, dys = (parts_of_ranks(sizes, *SIZE, dtype=dtype) for _ in range(2))
    alone = copy.deepcopy(layer)
    alone.sync = False
    found = of_ranks(results(layer, way(layer), parts[rank], dys[rank], *(m[rank] for m in masks)))
    holes = [torch.cat(m) for m in masks]
    whole, exact = (
        results(a, a, *(torch.cat(t).to(kind) for t in (parts, dys)), *holes)
        for a, kind in ((alone, dtype), (copy.deepcopy(alone).double(), torch.double))
    )
    for name in whole:
        pieces = [f[name] for f in found]
        ours = torch.cat(pieces) if name in ("y", "dx") else torch.stack(pieces).sum(0)
        assert_as_good(name, ours, whole[name], exact[name])


def holes_of(sizes) -> list[Tensor]:
    return [torch.rand(n, *SIZE[1:]) < share for n, share in zip(sizes, SHARES, strict=False)]


@check(2, eager=(eager,), compiled=(compiled,))
def a_hole_on_one_rank(way):
    compare((2, 3), randomized(RegionNormB(C, sync=True)), way, holes_of((2, 3)))


@check(3)
def an_empty_rank():
    compare((2, 0, 1), randomized(RegionNormB(C, separate_beta=True, sync=True)), eager, holes_of((2, 0, 1)))


@check(2)
def by_the_kernels():
    compare((2, 3), randomized(RegionNormB(C, sync=True)), by_kernels, holes_of((2, 3)), dtype=torch.float32)


@check(2)
def a_learned_mask():
    layer, shares = randomized(RegionNormL(C, 0.5, sync=True)), []
    with torch.no_grad():
        layer.sa.conv1.weight -= layer.sa.conv1.weight.mean()

    def watched(layer):
        def call(x):
            shares.append((layer.sa.conv1(mean_and_max(x)) >= 0).double().mean())
            return layer(x)

        return call

    compare((2, 3), layer, watched)
    assert 0 < shares[0] < 1, "there is one region only"


@check(2)
def one_collective_each_way():
    layer, x = RegionNormB(C, sync=True), torch.randn(2, *SIZE, requires_grad=True)
    mask = torch.rand(2, *SIZE[1:]) < 0.4
    with Collectives(1):
        y = layer(x, mask)
    with Collectives(1):
        y.backward(torch.randn_like(y))


@check(2)
def one_value_a_rank():
    """Enough for all of them together, and counted on both where one is not finite."""
    x, mask = torch.full((1, C), float(dist.get_rank())), torch.zeros(1)
    layer = RegionNormB(C, sync=True, nonfinite="skip")
    torch.testing.assert_close(layer(x, mask).detach(), 2 * x - 1, rtol=1e-4, atol=0)
    assert layer.batches_skipped == 0
    layer(x / (1 - x), mask)  # infinite on the second
    assert layer.batches_skipped == 1


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
