"""What the docs promise to somebody who writes a norm: it runs everywhere, and the engine was not touched."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor
from user_norm import MixedNorm

import normzoo

TESTS = Path(__file__).parent


def by_hand(layer: MixedNorm, x: Tensor) -> Tensor:
    """The paper's formula, had it one."""
    share, weight, bias = (p.view(-1, 1, 1) for p in (torch.sigmoid(layer.mix), layer.weight, layer.bias))
    statistics = [torch.var_mean(x, dims, correction=0, keepdim=True) for dims in ((0, 2, 3), (2, 3))]
    (batch_var, batch_mean), (own_var, own_mean) = statistics
    mean, var = share * batch_mean + (1 - share) * own_mean, share * batch_var + (1 - share) * own_var
    return (x - mean) / torch.sqrt(var + layer.eps) * weight + bias


def make(dtype: torch.dtype = torch.float32, channels: int = 6) -> tuple[MixedNorm, Tensor, Tensor]:
    layer = MixedNorm(channels)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(channels))
    x = torch.randn(5, channels, 4, 3) + torch.randn(5, channels, 1, 1)
    return layer.to(dtype), x.to(dtype), torch.randn(5, channels, 4, 3).to(dtype)


def results(call, layer: MixedNorm, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy)]


def exact(layer: MixedNorm, x: Tensor, dy: Tensor) -> list[Tensor]:
    layer = copy.deepcopy(layer).double()
    return results(lambda x: by_hand(layer, x), layer, x.double(), dy.double())


def test_eager():
    layer, x, dy = make(torch.float64)
    torch.testing.assert_close(results(layer, layer, x, dy), exact(layer, x, dy))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert torch.autograd.gradgradcheck(layer, x)


def test_compiled():
    torch._dynamo.reset()
    layer, x, dy = make(torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, layer, x, dy), exact(layer, x, dy))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype, memory_format):
    pytest.importorskip("triton")
    from normzoo_kernels._launch import launches

    layer, x, dy = make(dtype)
    layer.float()
    x = x.contiguous(memory_format=memory_format)
    before = launches.total()
    with normzoo.backend("triton"):
        ours = results(layer, layer, x, dy)
    assert launches.total() - before >= 4, "no kernel ran"
    with normzoo.backend("reference"):
        eager = results(layer, layer, x, dy)
    for i, found in enumerate(zip(ours, eager, exact(layer, x, dy), strict=True)):
        assert_as_good(f"result {i}", *found)


def test_two_ranks(tmp_path):
    """Each rank has a part of the batch; together they compute what one process does with all of it."""
    layer, x, dy = make(torch.float64)
    torch.save({"layer": layer.state_dict(), "x": x, "dy": dy}, tmp_path / "in.pt")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(TESTS / "user_norm_rank.py"), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE) for rank in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    found = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)]
    y, dx, *shared = exact(layer, x, dy)
    torch.testing.assert_close(torch.cat([part[0] for part in found]), y)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), dx)
    for ours, expected in zip(zip(*(part[2:] for part in found), strict=True), shared, strict=True):
        torch.testing.assert_close(sum(ours), expected)
