"""Normalize-and-Project across ranks: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import math
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_work import CHECKS, Collectives, check, of_ranks, run
from torch import nn

from normzoo import normalize_and_project


def network() -> nn.Sequential:
    """Sizes that two ranks cannot share evenly."""
    first, second = nn.Linear(6, 9), nn.Linear(9, 7, bias=False)
    return nn.Sequential(first, nn.LayerNorm(9), nn.ReLU(), second, nn.RMSNorm(7), nn.Linear(7, 3)).double()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def step(model, optimizer, x) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(model, optimizer, plain, handle, rounds=4):
    """Trains on the halves of a batch, and `plain` on the whole."""
    reference = adam(plain)
    normalize_and_project(plain, reference, example=torch.randn(4, 6).double())
    for _ in range(rounds):
        x = torch.randn(8, 6, dtype=torch.float64)
        step(model, optimizer, x.chunk(2)[dist.get_rank()])
        step(plain, reference, x)
    found = {name.removeprefix("module."): whole(t).detach() for name, t in model.named_parameters()}
    for name, t in plain.named_parameters():
        torch.testing.assert_close(found[name], t.detach(), rtol=1e-9, atol=1e-11, msg=name)
        assert all(torch.equal(found[name], other) for other in of_ranks(found[name])), f"{name} differs"
    assert handle.report.projected == ("0.weight", "0.bias", "3.weight", "1.weight", "1.bias", "4.weight")


@check(2)
def ddp():
    plain = network()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # torch 2.13
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    optimizer = adam(model)
    handle = normalize_and_project(model, optimizer)
    compare(model, optimizer, plain, handle)
    with pytest.raises(ValueError, match="scale_offset='off' freezes parameters"):
        normalize_and_project(model, adam(model), scale_offset="off")


@check(2)
def fsdp():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, mesh = network(), init_device_mesh("cpu", (2,))
    for example in (torch.randn(4, 6).double(), None):
        model = copy.deepcopy(plain)
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = adam(model)
        handle = normalize_and_project(model, optimizer, example=example)
        compare(model, optimizer, copy.deepcopy(plain), handle)
        with Collectives(1):
            handle.project()
    state = handle.state_dict()
    again = adam(model)
    handle.remove()
    with torch.no_grad():
        model[3].weight.mul_(2)
    second = normalize_and_project(model, again)
    second.load_state_dict(state)
    second.project()
    radius = next(radius for names, radius, _ in state["held"] if names == ["3.weight"])
    assert abs(whole(model[3].weight).norm().item() / radius - 1) < 1e-12


@check(2)
def low_precision_shards():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(nn.Linear(6, 9, bias=False), nn.LayerNorm(9), nn.Linear(9, 3)).bfloat16()
    model = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = normalize_and_project(model, optimizer, example=torch.randn(4, 6).bfloat16())
    for _ in range(5):
        step(model, optimizer, torch.randn(4, 6).bfloat16())
    master = handle.state_dict()["masters"]["0.weight"]
    start = plain[0].weight.detach().double().norm().item()
    assert master.dtype == torch.float32 and abs(whole(master).double().norm().item() / start - 1) < 1e-6
    assert torch.equal(whole(model[0].weight.detach()), whole(master).bfloat16())


@check(2)
def ranks_agree():
    """What only one rank's batch reaches is projected on both; an error of one is an error of both."""
    model = Experts()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    rank = dist.get_rank()
    handle = normalize_and_project(wrapped, adam(model), example=(torch.randn(3, 4), rank))
    assert handle.report.projected[:4] == ("experts.0.0.weight", "experts.0.0.bias", *_second)
    handle.remove()
    with pytest.raises(ValueError, match=r"does not run|the check failed on a rank"):
        normalize_and_project(wrapped, adam(model), example=(torch.randn(3, 4 + rank), 0))


_second = ("experts.1.0.weight", "experts.1.0.bias")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))

    def forward(self, x, which):
        return self.experts[which](x)


@check(2)
def replicated_and_split():
    """A mesh of two dimensions, and a tensor-parallel layer whose bias is whole on both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    from normzoo.nap.projecting import Held, Masters, Projector, norms

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    w, b = torch.arange(1.0, 11.0).view(5, 2), torch.arange(3.0)
    parameters = {
        "w": distribute_tensor(w, mesh, [Replicate(), Shard(0)]),
        "b": distribute_tensor(b, mesh, [Replicate(), Replicate()]),
    }
    assert norms([*parameters.values()]) == pytest.approx([w.norm().item(), b.norm().item()], rel=1e-7)
    factor = 2 / math.hypot(w.norm().item(), b.norm().item())
    expected = factor * w, factor * b
    Projector(parameters, [Held(("w", "b"), 2.0)], Masters())()
    torch.testing.assert_close((whole(parameters["w"]), whole(parameters["b"])), expected)
    model = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5))
    model[0].weight = nn.Parameter(DTensor.from_local(w, mesh, [Replicate(), Partial()]))
    with pytest.raises(ValueError, match=r"0.weight is a DTensor with a Partial placement"):
        normalize_and_project(model, torch.optim.SGD([model[0].weight], lr=0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
