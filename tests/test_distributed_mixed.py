"""AlphaBatchNorm, AdaB2N and BatchChannelNorm across ranks, held to one process that has the whole batch."""

from __future__ import annotations

import copy
import itertools
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_checks import assert_same_on_all_ranks, by_kernels, eager, recomputed
from distributed_work import CHECKS, Collectives, check, of_ranks, parts_of_ranks, run
from torch import Tensor, nn
from training import tensors

from normzoo.layers.alpha import AlphaBatchNorm
from normzoo.layers.balance import AdaB2N
from normzoo.layers.batch_channel import BatchChannelNorm

C, TASKS = 6, 4
SHAPE = (C, 2, 3)
FORMS = {
    "alpha": partial(AlphaBatchNorm, C, source_weight=0.4),
    "pseudo_count": partial(AlphaBatchNorm, C, pseudo_count=3),
    "adab2n": partial(AdaB2N, C, TASKS, kappa=0.4),
    "official": partial(AdaB2N, C, TASKS, absent="official"),
    "bcn": partial(BatchChannelNorm, C, 3),
    "estimate": partial(BatchChannelNorm, C, 3, estimate=True, update_rate=0.3),
    "mean_first": partial(BatchChannelNorm, C, 2, estimate=True, update_rate=0.3, order="mean_first"),
}
ROUNDS = {"uneven": (3, [(3, 0, 4), (1, 2, 3)]), "empty": (2, [(2, 1), (0, 0), (1, 1)])}
OWN_TASKS = ((1, 0, 0, 1), (2, 1, 2, 2), (2, 0, 2, 2))
"""Of samples, by rank: tasks 0 and 2 live on some, task 3 on none."""


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def pair(make: partial, dtype=torch.double, **options) -> tuple[nn.Module, nn.Module]:
    """The layer across ranks, and the same one that stays alone."""
    layers = make(sync=True, **options).to(dtype), make(**options).double()
    with torch.no_grad():
        for t in layers[0].parameters():
            t.add_(torch.randn(t.shape) / 2)
        layers[0].running_mean.normal_()
        layers[0].running_var.uniform_(0.5, 2)
    for layer in layers:
        if isinstance(layer, AdaB2N):
            layer.end_task(), layer.end_task()
            layer.end_task()  # so that task 3, too, could be absent
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def results(layer, call, x: Tensor, dy: Tensor, ids: Tensor | None, copies: int = 1) -> dict[str, Tensor]:
    """`copies`: ranks that have the same loss, each once."""
    x, others = x.clone().requires_grad_(), () if ids is None else (ids,)
    layer.zero_grad()
    y = call(x, *others)
    loss = getattr(layer, "loss", None)
    ((y * dy).sum() + (0 if loss is None else 2 * copies * loss)).backward()
    found = {"y": y.detach(), "dx": x.grad} | ({} if loss is None else {"loss": loss.detach()})
    return found | {f"d{name}": p.grad.clone() for name, p in layer.named_parameters()}


def compare(ours, alone, way, rounds, tasks: bool) -> None:
    rank, call = dist.get_rank(), way(ours)
    near = {"rtol": 1e-4, "atol": 1e-4} if ours.weight.dtype == torch.float32 else {}
    for sizes in rounds:
        parts, dys = (parts_of_ranks(sizes, *SHAPE, dtype=torch.double) for _ in range(2))
        ids = [torch.tensor(own[:n], dtype=torch.long) for own, n in zip(OWN_TASKS, sizes, strict=False)]
        dtype = ours.weight.dtype
        own = parts[rank].to(dtype), dys[rank].to(dtype), ids[rank] if tasks else None
        found = of_ranks(results(ours, call, *own))
        whole = torch.cat(parts), torch.cat(dys), torch.cat(ids) if tasks else None
        expected = results(alone, alone, *whole, copies=len(sizes))
        for name, wanted in expected.items():
            values = [each[name].double() for each in found]
            if name == "loss":
                assert all(torch.equal(value, values[0]) for value in values)
            joined = {"y": torch.cat, "dx": torch.cat, "loss": lambda v: v[0]}.get(name, sum)(values)
            torch.testing.assert_close(
                joined, wanted, msg=lambda m, n=name, s=sizes: f"{n} of {s}: {m}", **near
            )
        for name, b in alone.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name).to(b), b, **near)
        assert_same_on_all_ranks(ours)


for (case, (number, rounds)), (name, make), way in itertools.product(
    ROUNDS.items(), FORMS.items(), (eager, by_kernels)
):
    for tasks in (False, True)[: 1 + (make.func is AdaB2N)]:

        def one_process(make, way, rounds, tasks):
            dtype = torch.float32 if way is by_kernels else torch.double
            compare(*pair(make, dtype), way, rounds, tasks)

        if way is eager or case == "empty":
            label = f"{name}-{case}-{way.__name__}" + ("-tasks" if tasks else "")
            check(number, **{label: (make, way, rounds, tasks)})(one_process)


def _maps_of_different_sizes() -> tuple[Tensor, Tensor, Tensor]:
    """That of this rank, and those of both."""
    of_ranks = torch.randn(2, C, 2, 2).double(), torch.randn(2, C, 4, 4).double()
    return of_ranks[dist.get_rank()], *of_ranks


@check(2)
def tasks_of_maps_of_different_sizes():
    """A sample counts as one, whatever the size of its map."""
    ours, alone = pair(FORMS["adab2n"])
    x, small, large = _maps_of_different_sizes()
    y = ours(x, torch.full((2,), dist.get_rank()))
    # Repeated pixels leave mean and variance of a sample as they are.
    whole = alone(torch.cat((small.repeat(1, 1, 2, 2), large)), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(y, whole[2:] if dist.get_rank() else whole[:2, :, :2, :2])


@check(2)
def samples_of_maps_of_different_sizes():
    """A pseudo-count stands against samples, and not against pixels."""
    ours, alone = pair(FORMS["pseudo_count"], unbiased=False)
    x, small, large = _maps_of_different_sizes()
    values = torch.cat([t.transpose(0, 1).flatten(1) for t in (small, large)], 1)
    share = 3 / (3 + 4)
    alone.running_mean.lerp_(values.mean(1), 1 - share)
    alone.running_var.lerp_(values.var(1, correction=0), 1 - share)
    alone.source_weight, alone.pseudo_count = 1.0, None
    torch.testing.assert_close(ours(x), alone(x))


@check(2, **{name: (FORMS[name],) for name in ("official", "estimate")})
def in_a_graph(make):
    compare(*pair(make), compiled, [(2, 3), (2, 3)], make.func is AdaB2N)


@check(2, **{name: (FORMS[name],) for name in ("alpha", "adab2n", "official", "bcn")})
def in_a_checkpoint(make):
    def way(layer):
        return lambda x, *ids: recomputed(lambda x: layer(x, *ids))(x)

    compare(*pair(make), way, [(2, 3), (1, 2)], make.func is AdaB2N)


@check(2, **{name: (make,) for name, make in FORMS.items() if name not in ("official", "mean_first")})
def skips_alike(make):
    """One rank has a batch that is not finite: none of them moves."""
    ours, alone = pair(make, nonfinite="skip")
    tasks = make.func is AdaB2N
    compare(ours, alone, eager, [(2, 2)], tasks)
    before = tensors(ours)
    before["batches_skipped"] += 1
    x, rank = torch.randn(2, *SHAPE).double(), dist.get_rank()
    if rank == 1:
        x[1, 3, 0, 0] = float("nan")
    y = ours(x, *(torch.tensor([0, 1]),) * tasks)
    assert y[:, 3].isnan().any() and y[:, :2].isfinite().all()
    after = tensors(ours)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    alone.batches_skipped += 1
    compare(ours, alone, eager, [(2, 2)], tasks)


@check(2)
def how_much_is_said():
    x, ids = torch.randn(3, *SHAPE, requires_grad=True), torch.tensor([0, 1, 1])
    for make, others, forward, backward in (
        (FORMS["alpha"], (), 1, 0),  # its statistics are constants
        (partial(AlphaBatchNorm, C, source_weight=1), (), 0, 0),
        (FORMS["adab2n"], (), 1, 1),
        (FORMS["adab2n"], (ids,), 2, 1),
        (FORMS["bcn"], (), 1, 1),
        (FORMS["estimate"], (), 1, 0),
    ):
        layer = make(sync=True)
        with Collectives(forward):
            y = layer(x, *others)
        with Collectives(backward):
            y.sum().backward()
    if dist.get_rank() == 0:  # alone: a collective would wait for rank 1
        with Collectives(0):
            for make in FORMS.values():
                layer = make(sync=True).eval()
                if not isinstance(layer, AlphaBatchNorm):
                    layer(x)
                make()(x)


@check(2)
def one_value_on_each():
    """An image of one pixel has no variance, two of them have."""
    parts = [torch.randn(1, C, 1, 1).double() for _ in range(2)]
    for name, ids in (("alpha", ()), ("bcn", ()), ("adab2n", (torch.tensor([0]), torch.tensor([2])))):
        ours, alone = pair(FORMS[name])
        rank = dist.get_rank()
        y = ours(parts[rank], *ids[rank : rank + 1])
        expected = alone(torch.cat(parts), *(torch.cat(ids),) if ids else ())
        torch.testing.assert_close(torch.cat(of_ranks(y.detach())), expected)


@check(1)
def one_rank():
    with Collectives(0):
        for make in FORMS.values():
            ours, alone = pair(make)
            other = copy.deepcopy(alone)
            x = torch.randn(3, *SHAPE).double()
            assert torch.equal(ours(x), other(x))


# The checks above run in processes of their own


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
