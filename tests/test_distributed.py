"""Statistics across ranks, held to one process that has the whole batch."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_checks import (
    assert_same_on_all_ranks,
    by_kernels,
    compare,
    compiled,
    eager,
    pair,
    recomputed,
    reentrant,
    step,
)
from distributed_work import CHECKS, Collectives, check, of_ranks, parts_of_ranks, run
from torch import Tensor, nn

from normzoo.engine import normalize
from normzoo.layers.batch import BatchNorm1d, BatchNorm2d
from normzoo.layers.ghost import GhostBatchNorm
from normzoo.layers.instance import InstanceNorm2d
from normzoo.moments import Moments

EPS = 1e-5
WAYS = {way.__name__: (way,) for way in (eager, compiled, by_kernels)}
ROUNDS = {
    "uneven": (3, [(3, 0, 4), (1, 2, 3)], (5, 2, 3)),
    "1+7": (2, [(1, 7)], (5, 2, 3)),
    "one_value": (2, [(1, 1), (1, 1)], (5,)),
    "empty": (2, [(2, 1), (0, 0), (2, 2)], (5, 2, 3)),
    "no_pixels": (2, [(2, 2)], (5, 0, 3)),
}


def one_process(rounds, shape, way, **options):
    compare(*pair(*shape, sync=True, **options), rounds, shape, way)


for (case, (ranks, *args)), way in itertools.product(
    ROUNDS.items(), (eager, by_kernels, recomputed, reentrant)
):
    check(ranks, **{f"{case}-{way.__name__}": (*args, way)})(one_process)
check(2, **{"one_value-compiled_kernels": ([(1, 1)], (5,), lambda layer: by_kernels(compiled(layer)))})(
    one_process
)


@check(2)
def a_group_compiled():
    group = dist.new_group([0, 1])
    compare(*pair(5, sync=True, process_group=group), [(3, 0), (0, 0)], (5,), compiled, group)


@check(2, eager=(eager,), by_kernels=(by_kernels,))
def plain_average(way):
    one_process([(1, 7), (2, 2), (0, 3)], (5, 2, 3), way, momentum=None)


@check(2, eager=(eager,), by_kernels=(by_kernels,))
def far_from_zero(way):
    """The ranks keep the digits that pivot + delta would round away: torch's error here is near 1e-3."""
    parts = [part + 1e4 for part in parts_of_ranks((3, 4), 5, 2, 3)]
    dys, rank = [torch.randn_like(part) for part in parts], dist.get_rank()
    found = of_ranks(step(way(BatchNorm2d(5, sync=True)), parts[rank], dys[rank]))
    expected = step(nn.BatchNorm2d(5).double(), torch.cat(parts).double(), torch.cat(dys).double())
    for ours, theirs in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(ours).double(), theirs, rtol=2e-6, atol=2e-6)


@check(4)
def groups_of_two():
    ids = [0, 1] if dist.get_rank() < 2 else [2, 3]
    group, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    torch.manual_seed(ids[0])
    ours, torchs = pair(5, 2, 3, sync=True, process_group=group)
    compare(ours, torchs, [(1, 3), (4, 2)], (5, 2, 3), eager, group)
    means = of_ranks(ours.running_mean)
    assert not torch.equal(means[0], means[2])


@check(3)
def ranks_beside_the_group():
    group = dist.new_group([0, 1])
    x = parts_of_ranks((3, 2, 4), 5)[dist.get_rank()]
    layer, alone = BatchNorm1d(5, sync=True, process_group=group), BatchNorm1d(5)
    if dist.get_rank() == 2:
        assert torch.equal(layer(x), alone(x))
    else:
        layer(x)
        assert all(torch.equal(layer.running_mean, mean) for mean in of_ranks(layer.running_mean, group))


@check(4)
def averages_of_ranks():
    """Layers that normalize on their rank and share only what they store."""
    sizes = (3, 0, 2, 4)
    parts = parts_of_ranks(sizes, 4, 2, 3)
    x = parts[dist.get_rank()].requires_grad_()
    instance, ghost = InstanceNorm2d(4, track_running_stats=True, sync=True), GhostBatchNorm(4, 2, sync=True)
    with Collectives(2):
        (instance(x).sum() + ghost(x).sum()).backward()
    torchs, alone = nn.InstanceNorm2d(4, track_running_stats=True), [GhostBatchNorm(4, 2) for _ in sizes]
    torchs(torch.cat(parts))
    for layer, part in zip(alone, parts, strict=True):
        layer(part)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(instance.get_buffer(name), torchs.get_buffer(name))
        shares = [n / sum(sizes) * layer.get_buffer(name) for n, layer in zip(sizes, alone, strict=True)]
        torch.testing.assert_close(ghost.get_buffer(name), sum(shares))
    for layer in (instance, ghost):
        assert_same_on_all_ranks(layer)


# A batch that is not finite on one rank


@check(2, **WAYS)
def skips_alike(way):
    rank = dist.get_rank()
    ours, torchs = pair(5, 2, 3, sync=True, nonfinite="skip", momentum=None)
    compare(ours, torchs, [(2, 2)], (5, 2, 3), way)
    before, call = copy.deepcopy(ours.state_dict()), way(ours)
    for value, number in ((float("nan"), 1), (float("inf"), 2)):
        x = torch.randn(2, 5, 2, 3)
        if rank == 1:
            x[1, 3, 0, 0] = value
        y = call(x)
        assert y[:, 3].isnan().any() and y[:, :3].isfinite().all()
        assert all(torch.equal(a, before[name]) for name, a in ours.state_dict().items())
        assert ours.batches_skipped == number
    ours.zero_grad()
    torchs.zero_grad()
    compare(ours, torchs, [(2, 2)], (5, 2, 3), way)
    assert ours.num_batches_tracked == 2


@check(2)
def propagates_alike():
    layer, x = BatchNorm1d(5, sync=True), torch.randn(4, 5)
    x[0, 2] = float("nan") if dist.get_rank() else 0.0
    layer(x)
    nan = torch.arange(5) == 2
    assert torch.equal(layer.running_mean.isnan(), nan) and torch.equal(layer.running_var.isnan(), nan)


# Which collectives there are


@check(2, eager=(eager,), by_kernels=(by_kernels,))
def one_collective_each_way(way):
    layers = nn.Sequential(BatchNorm2d(5, sync=True), nn.ReLU(), BatchNorm2d(5, sync=True))
    x = torch.randn(3, 5, 2, 3, requires_grad=True)
    with Collectives(2):
        y = way(layers)(x)
    with Collectives(2):
        y.backward(torch.randn_like(y))
    with Collectives(2), torch.no_grad():
        way(layers)(x)


@check(2)
def checkpointing_gathers_again():
    layer, x = BatchNorm2d(5, sync=True), torch.randn(3, 5, 2, 3, requires_grad=True)
    with Collectives(1):
        y = recomputed(layer)(x)
    with Collectives(2):
        y.sum().backward()
    assert layer.num_batches_tracked == 1


@check(2)
def without_need_nothing_is_said():
    rank, x = dist.get_rank(), torch.randn(3, 4, 2, 3, requires_grad=True)
    if rank == 0:  # alone: a collective would wait for rank 1
        with Collectives(0):
            BatchNorm2d(4, sync=True).eval()(x).sum().backward()
            BatchNorm2d(4, sync=True, track_running_stats=False).eval()(x).sum().backward()
            layer, usual = BatchNorm2d(4), nn.BatchNorm2d(4)
            assert torch.equal(layer(x), usual(x)) and torch.equal(layer.running_var, usual.running_var)
            y, _ = normalize(x, lambda m: m.over_groups(2).standardize(), per_sample=True)
            torch.testing.assert_close(y, F.group_norm(x, 2))
            y, _ = normalize(x, lambda m: m.standardize(), per_sample=True)
            torch.testing.assert_close(y, F.instance_norm(x))
            y, _ = normalize(x, lambda m: m.over_batch().standardize(), per_sample=True)
            torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


def assert_the_identity():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 3, requires_grad=True)
    ours, alone = BatchNorm2d(4, sync=True), BatchNorm2d(4)
    assert torch.equal(ours(x), alone(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), alone.buffers(), strict=True))
    found = []
    normalize(x, lambda m: (found.extend((m, m.across_ranks())), m.standardize())[1])
    assert found[0] is found[1]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(4, sync=True)(torch.randn(1, 4))


@check(1)
def one_rank():
    with Collectives(0):
        assert_the_identity()


def test_without_ranks():
    assert not dist.is_initialized()
    assert_the_identity()


# Combines of a user


def mixed(share: Tensor, group):
    def combine(m: Moments):
        batch = m.over_batch(group=group)
        a, b = share * (batch.var + EPS).rsqrt(), (1 - share) * (m.var + EPS).rsqrt()
        return a + b, -a * batch.delta - b * m.delta

    return combine


@check(2, eager=(eager,), compiled=(compiled,))
def a_learned_mixture(way):
    parts, dys = (parts_of_ranks((2, 3), 4, 3, 2, dtype=torch.double) for _ in range(2))
    share = torch.rand(4, dtype=torch.double)

    def oracle(x, share):
        share = share.view(1, 4, 1, 1)
        return share * F.batch_norm(x, None, None, training=True) + (1 - share) * F.instance_norm(x)

    def ours(x, share):
        return normalize(x, mixed(share, dist.group.WORLD), per_sample=True)[0]

    # aot_eager has no double backward, here as elsewhere
    hold(way(ours), oracle, parts, dys, share, (False, True)[: 1 + (way is eager)])


@check(2)
def weighted_samples():
    """The weights are learned too: their gradient crosses the ranks through the counts."""
    parts, dys = (parts_of_ranks((2, 3), 4, 3, 2, dtype=torch.double) for _ in range(2))
    weights = torch.rand(5, dtype=torch.double)
    mine = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)

    def oracle(x, weights):
        w = weights.view(-1, 1, 1, 1) / (weights.sum() * x[0, 0].numel())
        mean = (w * x).sum((0, 2, 3), keepdim=True)
        var = (w * (x - mean).square()).sum((0, 2, 3), keepdim=True)
        return (x - mean) / (var + EPS).sqrt()

    def ours(x, weights):
        def combine(m):
            return m.over_batch(weights[mine], dist.group.WORLD).standardize()

        return normalize(x, combine, per_sample=True)[0]

    hold(ours, oracle, parts, dys, weights)


@check(2)
def masked_regions():
    parts, dys = (parts_of_ranks((2, 3), 4, 3, 2, dtype=torch.double) for _ in range(2))
    masks = [torch.rand(2, 3, 2) < 0.3, torch.zeros(3, 3, 2, dtype=torch.bool)]  # rank 1 has one region only
    weight = torch.rand(4, dtype=torch.double)

    def oracle(x, weight):
        hole, y = torch.cat(masks).unsqueeze(1).double(), 0
        for region in (hole, 1 - hole):
            mean, var = x, None
            n = region.sum()
            mean = (region * x).sum((0, 2, 3), keepdim=True) / n
            var = (region * (x - mean).square()).sum((0, 2, 3), keepdim=True) / n
            y = y + region * (x - mean) / (var + EPS).sqrt()
        return y * weight.view(1, 4, 1, 1)

    def ours(x, weight):
        return normalize(x, lambda m: m.across_ranks().standardize(weight), masks[dist.get_rank()])[0]

    hold(ours, oracle, parts, dys, weight)


def hold(ours, oracle, parts, dys, parameter, penalties=(False, True)):
    """Output, input gradient, the sum of the parameter's gradients, and all of these for a gradient penalty."""
    rank = dist.get_rank()
    for penalty in penalties:
        found = of_ranks(grads_of(ours, parts[rank], dys[rank], parameter, penalty))
        y, dx, dp = grads_of(oracle, torch.cat(parts), torch.cat(dys), parameter, penalty)
        torch.testing.assert_close(torch.cat([f[0] for f in found]), y)
        torch.testing.assert_close(torch.cat([f[1] for f in found]), dx)
        torch.testing.assert_close(sum(f[2] for f in found), dp)


def grads_of(call, x, dy, parameter, penalty):
    x, p = x.clone().requires_grad_(), parameter.clone().requires_grad_()
    y = call(x, p)
    if penalty:
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        dx.square().sum().backward()
    else:
        y.backward(dy)
    return y.detach(), x.grad, p.grad


@check(3, eager=(eager,), by_kernels=(by_kernels,))
def gradient_penalty(way):
    parts, dys = (parts_of_ranks((2, 0, 3), 4, 3, 2, dtype=torch.float32) for _ in range(2))
    parts, dys = ([t if way is by_kernels else t.double() for t in ts] for ts in (parts, dys))
    layer = BatchNorm2d(4, sync=True)

    def ours(x, weight):
        return way(lambda x: torch.func.functional_call(layer, {"weight": weight}, (x,)))(x)

    def oracle(x, weight):
        return F.batch_norm(x, None, None, weight, training=True)

    hold(ours, oracle, parts, dys, torch.rand(4, dtype=parts[0].dtype))


# The checks above run in processes of their own


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
