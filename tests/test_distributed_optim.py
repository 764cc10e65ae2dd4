"""AdamP and SGDP on sharded parameters: as on one process."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from distributed_work import CHECKS, check, run
from torch import nn

import normzoo

OPTIMIZERS = {
    "adamp": lambda params: normzoo.AdamP(params, lr=0.05, weight_decay=0.1),
    "sgdp": lambda params: normzoo.SGDP(params, lr=0.05, momentum=0.9, weight_decay=0.1),
}


def gradients(p, step):
    """Of one view or the other orthogonal to p, or of none; the same on every rank."""
    g, kind = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step)), step % 3
    if kind == 0 or p.dim() < 2:
        return g + 10 * p.detach()
    rows = p.detach().flatten(1) if kind == 1 else p.detach().view(1, -1)
    g = g.view(rows.shape)
    return (g - (g * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows).view(p.shape)


@check(2)
def shards():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    layouts = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], [Shard(0)], [Shard(0)]]
    shapes = [(5, 3, 2), (1, 6), (4, 3), (3, 4), (5,), (0, 2)]
    for name, make in OPTIMIZERS.items():
        whole = [nn.Parameter(torch.randn(shape, dtype=torch.double)) for shape in shapes]
        plain = nn.Parameter(whole[0].detach().clone())
        parts = [
            nn.Parameter(distribute_tensor(p.detach(), mesh, at)) for p, at in zip(whole, layouts, strict=True)
        ]
        optimizer, other = make(whole), make([*parts, plain])
        for step in range(7):
            for p, part, at in zip(whole, parts, layouts, strict=True):
                p.grad = gradients(p, step)
                # A gradient may be sharded in another way than its parameter.
                part.grad = distribute_tensor(p.grad, mesh, [Replicate()] if step == 5 else at)
            plain.grad = whole[0].grad.clone()
            optimizer.step()
            other.step()
            if step == 3:  # resumed
                state = copy.deepcopy(other.state_dict())
                other = make([*parts, plain])
                other.load_state_dict(state)
        for shape, p, part in zip(shapes, whole, parts, strict=True):
            found = part.full_tensor()
            assert torch.allclose(found, p, rtol=1e-10), (
                f"{name}, {shape}: off by {(found - p).abs().max():.1e}"
            )
        torch.testing.assert_close(plain, whole[0])


@check(2)
def fully_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for make in OPTIMIZERS.values():
        model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
        model = model.double()
        expected, x = copy.deepcopy(model), torch.randn(2, 2, 5, 5, dtype=torch.double)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizers = make(model.parameters()), make(expected.parameters())
        for _ in range(3):
            for optimizer, net in zip(optimizers, (model, expected), strict=True):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.allclose(p.full_tensor(), q, rtol=1e-10), name


@check(2)
def strided_shards():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2,))
    p = DTensor.from_local(torch.randn(2, 3), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    with pytest.raises(TypeError, match=r"AdamP: .* is sharded by .* Shard and Replicate alone"):
        normzoo.AdamP([nn.Parameter(p)])


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
