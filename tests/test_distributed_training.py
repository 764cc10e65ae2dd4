"""Ranks that fail, and training with DistributedDataParallel and FSDP2."""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed_work import CHECKS, check, of_ranks, parts_of_ranks, run
from torch import Tensor, nn

from normzoo.layers.batch import BatchNorm1d, BatchNorm2d

# A rank that fails


def survivors(act, group=None):
    """Rank 1 acts; the others must get an error, and keep their state."""
    layer = BatchNorm1d(4, sync=True)
    layer(torch.randn(3, 4))
    before, layer.process_group = copy.deepcopy(layer.state_dict()), group
    dist.barrier()
    if dist.get_rank() == 1:
        act()
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 4))
    assert time.monotonic() - start < 30
    assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())
    os._exit(0)  # nobody is left to say goodbye to


@check(3)
def a_rank_dies():
    survivors(lambda: (time.sleep(0.5), os._exit(0)))


@check(2)
def a_rank_stays_away():
    def stay_away():
        time.sleep(5)
        os._exit(0)

    dist.barrier()  # the short limit holds for setting up the group too
    survivors(stay_away, dist.new_group(timeout=timedelta(seconds=3)))


# Training


def network(norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm, nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
    ).double()


def train(models, batches, weights, steps=3):
    """SGD on one set of parameters, each model on a batch of its own; gradients are weighted sums."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for i in range(steps):
        for model, batch, weight in zip(models, batches, weights, strict=True):
            (model(batch + i).square().sum() * weight).backward()
        for ps in zip(*(m.parameters() for m in models), strict=True) if len(models) > 1 else ():
            total = torch.stack([p.grad for p in ps]).sum(0)
            for p in ps:
                p.grad.copy_(total)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def ddp(**options):
    def wrap(model):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # torch 2.13
            return nn.parallel.DistributedDataParallel(model, **options)

    return wrap


def fsdp(alone=True, **options):
    def wrap(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if alone:
            fully_shard(model[1], mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    return wrap


@check(
    2,
    ddp=(ddp(), True, (1, 3)),
    ddp_own_buffers=(ddp(broadcast_buffers=False), True, (0, 4)),
    ddp_without_sync=(ddp(broadcast_buffers=False), False, (2, 3)),
    fsdp=(fsdp(), True, (1, 3)),
    fsdp_empty=(fsdp(), True, (0, 4)),
    fsdp_without_sync=(fsdp(), False, (2, 3)),
    fsdp_whole=(fsdp(alone=False), True, (2, 2)),
)
def training(wrap, sync, sizes):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain = network(nn.BatchNorm2d(4))
    model = network(BatchNorm2d(4, sync=sync))
    model.load_state_dict(plain.state_dict())
    parts = parts_of_ranks(sizes, 3, 4, 4, dtype=torch.double)
    if sync:
        expected = plain
        train([plain], [torch.cat(parts)], [1 / sum(sizes)])
    else:
        alone = [copy.deepcopy(plain) for _ in sizes]
        train(alone, parts, [1 / sum(sizes)] * ranks)
        expected = alone[rank]
    model = wrap(model)
    train([model], [parts[rank]], [ranks / sum(sizes)])  # wrappers take the mean over the ranks
    found = {name.removeprefix("module."): whole(t) for name, t in model.state_dict().items()}
    torch.testing.assert_close(found, dict(expected.state_dict()))


@check(2)
def from_the_meta_device():
    """The way of FSDP2 to a model that no rank could hold: parameters come into being as shards."""
    with torch.device("meta"):
        layer = BatchNorm1d(6, sync=True, nonfinite="skip")
    layer = fsdp(alone=False)(layer)
    layer.to_empty(device="cpu").reset_parameters()
    x = parts_of_ranks((1, 3), 6)
    y = layer(x[dist.get_rank()])
    expected = nn.BatchNorm1d(6)
    expected(torch.cat(x))
    torch.testing.assert_close(dict(layer.named_buffers())["running_var"], expected.running_var)
    assert layer.num_batches_tracked == 1 and layer.batches_skipped == 0
    y.square().sum().backward()
    assert whole(layer.weight.grad).isfinite().all()


@check(2)
def mixed_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    layer, exact = BatchNorm1d(6, sync=True), nn.BatchNorm1d(6).double()
    layer = fsdp(alone=False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))(layer)
    x = [t.bfloat16() for t in parts_of_ranks((2, 3), 6)]
    y, expected = layer(x[dist.get_rank()].float()), exact(torch.cat(x).double())
    assert y.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(torch.cat(of_ranks(y.detach())).double(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    y.sum().backward()


# The checks above run in processes of their own


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
