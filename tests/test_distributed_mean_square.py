"""PowerNorm and UnifiedNorm across ranks, held to one process that has the whole batch."""

from __future__ import annotations

import itertools
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_checks import assert_same_on_all_ranks, by_kernels, compiled, eager
from distributed_work import CHECKS, Collectives, check, of_ranks, parts_of_ranks, run
from test_distributed_training import ddp, network, train
from torch import Tensor, nn

from normzoo.layers.power import PowerNorm
from normzoo.layers.unified import UnifiedNorm

C, T = 6, 4
FORMS = {
    "power": partial(PowerNorm, C, warmup_iters=3, group_num=2),
    "plain": partial(PowerNorm, C, warmup_iters=2, group_num=None, backward="paper", alpha_bkw=0.5),
    "unified": partial(UnifiedNorm, C, window_size=(3, 2), warmup_iters=2),
    "compensated": partial(UnifiedNorm, C, window_size=2, warmup_iters=0, decay=0.5),
    "filtered": partial(UnifiedNorm, C, window_size=3, warmup_iters=1, outlier_filtration=True),
    "of_the_batch": partial(UnifiedNorm, C, window_size=1, affine=False),
}
Rounds = list[tuple[tuple[int, ...], str]]
PHASES = {"compensated": 998}
"""Steps taken before, by form: gradients are compensated after 1000."""
ROUNDS: dict[str, tuple[int, Rounds]] = {
    "uneven": (3, [((3, 1, 2), ""), ((1, 2, 3), ""), ((2, 2, 1), ""), ((1, 1, 3), ""), ((3, 2, 1), "")]),
    "padded": (2, [((2, 3), "some"), ((1, 2), "one"), ((2, 1), "rank"), ((2, 2), "all"), ((1, 1), "some")] * 2),
    "empty": (2, [((2, 1), ""), ((0, 0), ""), ((0, 2), ""), ((3, 0), "some"), ((1, 1), ""), ((2, 0), "")]),
}
SPOILT: Rounds = [((2, 2), ""), ((2, 1), "x"), ((1, 2), "dy"), ((2, 2), ""), ((1, 1), "x"), ((2, 1), "dy")]
SPOILT += [((2, 2), "")] * 2
MIXED: Rounds = [
    ((2, 1), "one"),
    ((0, 2), ""),
    ((2, 1), "x"),
    ((1, 2), "rank"),
    ((1, 2), "dy"),
    ((2, 0), "some"),
]
"""One of each: a mask on one rank alone, empty ranks, numbers that are not finite."""


def pair(name: str, dtype=torch.double, **options) -> tuple[nn.Module, nn.Module]:
    """The layer across ranks, and the same one that stays alone."""
    make = FORMS[name]
    layers = make(sync=True, **options).to(dtype), make().double()
    with torch.no_grad():
        for p in layers[0].parameters():
            p.add_(torch.randn(p.shape) / 2)
    layers[0].iters.fill_(PHASES.get(name, 0))
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def padding(kind: str, sizes: tuple[int, ...]) -> list[Tensor | None]:
    """A mask a rank: of "some" tokens, by "one" rank alone, of the whole last "rank", of "all" tokens."""
    if kind not in ("some", "one", "rank", "all"):
        return [None] * len(sizes)
    share = 1.0 if kind == "all" else 0.3
    masks: list[Tensor | None] = [torch.rand(n, T) < share for n in sizes]
    if kind == "one":
        masks[-1] = None
    if kind == "rank":
        masks[-1] = torch.ones(sizes[-1], T, dtype=torch.bool)
    return masks


def whole_mask(masks: list[Tensor | None], sizes: tuple[int, ...]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    none = [torch.zeros(n, T, dtype=torch.bool) for n in sizes]
    return torch.cat([m if mask is None else mask for mask, m in zip(masks, none, strict=True)])


def spoil(kind: str, parts: list[Tensor], dys: list[Tensor]) -> None:
    """One number of the first rank: NaN in its batch, or infinity in its gradient, as when AMP overflows."""
    if kind == "x":
        parts[0][0, 1, 2] = float("nan")
    if kind == "dy":
        dys[0][0, 1, 2] = float("inf")


def results(layer, call, x: Tensor, dy: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = call(x, *(() if mask is None else (mask,)))
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    return found | {f"d{name}": p.grad.clone() for name, p in layer.named_parameters()}


def compare(ours, alone, way, rounds: Rounds, group=None, *, to_the_bit=True) -> None:
    rank, call = dist.get_rank(group), way(ours)
    dtype = ours.ema_gz.dtype
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    for sizes, kind in rounds:
        parts, dys = (parts_of_ranks(sizes, T, C, dtype=torch.double) for _ in range(2))
        masks = padding(kind, sizes)
        spoil(kind, parts, dys)
        own = parts[rank].to(dtype), dys[rank].to(dtype), masks[rank]
        found = of_ranks(results(ours, call, *own), group)
        wanted = results(alone, alone, torch.cat(parts), torch.cat(dys), whole_mask(masks, sizes))
        for name, value in wanted.items():
            values = [each[name].double() for each in found]
            joined = torch.cat(values) if name in ("y", "dx") else torch.stack(values).sum(0)
            torch.testing.assert_close(
                joined, value, equal_nan=True, msg=lambda m, n=name, s=sizes: f"{n} of {s}: {m}", **near
            )
        for name, buffer in alone.named_buffers():
            value = ours.get_buffer(name).to(buffer)
            torch.testing.assert_close(
                value, buffer, msg=lambda m, n=name, s=sizes: f"{n} after {s}: {m}", **near
            )
        if to_the_bit:
            assert_same_on_all_ranks(ours, group)


@check(3, **{f"{name}-uneven": (name, "uneven") for name in FORMS})
@check(2, **{f"{name}-padded": (name, "padded") for name in ("power", "plain", "unified", "filtered")})
@check(2, **{f"{name}-empty": (name, "empty") for name in ("power", "unified", "filtered")})
def one_process(name, case):
    ours, alone = pair(name)
    _, rounds = ROUNDS[case]
    compare(ours, alone, eager, rounds)
    moving = [kind != "all" and sum(sizes) > 0 for sizes, kind in rounds]
    assert ours.iters == PHASES.get(name, 0) + sum(moving)
    assert ours.batches_skipped == ours.gradients_skipped == 0
    if name == "filtered" and case != "uneven":
        assert 0 < ours.skip_counter < sum(moving)


@check(2, **{name: (name,) for name in ("power", "plain", "unified", "filtered")})
def skips_alike(name):
    """A batch of one rank that is not finite moves none of them; no more does a gradient of one rank."""
    ours, alone = pair(name)
    compare(ours, alone, eager, SPOILT)
    assert ours.batches_skipped == ours.gradients_skipped == 2
    assert ours.iters == len(SPOILT) - 2
    assert all(t.isfinite().all() for t in ours.buffers())


@check(2)
def a_spoilt_batch_leaves_the_state():
    for name in FORMS:
        ours, alone = pair(name)
        compare(ours, alone, eager, SPOILT[:1])
        before = {key: t.clone() for key, t in ours.named_buffers()}
        before["batches_skipped"] += 1
        compare(ours, alone, eager, SPOILT[1:2])
        assert all(torch.equal(t, before[key]) for key, t in ours.named_buffers()), name


@check(2, **{name: (name,) for name in ("power", "plain", "unified", "filtered")})
def in_kernels(name):
    ours, alone = pair(name, torch.float32)
    compare(ours, alone, by_kernels, MIXED)
    assert ours.batches_skipped == ours.gradients_skipped == 1


@check(2, **{name: (name,) for name in ("power", "unified")})
def in_kernels_of_one_rank(name):
    """As where those of another do not compile; eager PyTorch rounds otherwise."""
    ours, alone = pair(name, torch.float32)
    compare(ours, alone, eager if dist.get_rank() else by_kernels, MIXED, to_the_bit=False)


@check(2, **{name: (name,) for name in ("power", "filtered")})
def in_a_graph(name):
    """One collective forward and one backward, which `compiled` counts."""
    compare(*pair(name), compiled, [((2, 3), "some")] * 5)


@check(3)
def ranks_beside_the_group():
    group = dist.new_group([0, 2])
    for name in ("power", "unified"):
        ours, alone = pair(name, process_group=group)
        if dist.get_rank() != 1:
            compare(ours, alone, eager, [((2, 1), ""), ((1, 2), "some"), ((1, 1), "")], group)


@check(2)
def how_much_is_said():
    x, mask = torch.randn(3, T, C, requires_grad=True), torch.rand(3, T) < 0.5
    for make, others, step in itertools.product(FORMS.values(), ((), (mask,)), range(4)):
        layer = make(sync=True)
        layer.iters.fill_(step)
        with Collectives(1):
            y = layer(x, *others)
        with Collectives(1):
            y.sum().backward()
    if dist.get_rank() == 0:  # alone: a collective would wait for rank 1
        with Collectives(0):
            for make in FORMS.values():
                make(sync=True).eval()(x).sum().backward()
                make()(x).sum().backward()


@check(1)
def one_rank():
    with Collectives(0):
        for name in FORMS:
            ours, alone = pair(name)
            x = torch.randn(3, T, C).double().requires_grad_()
            (a,) = torch.autograd.grad(ours(x).square().sum(), x)
            (b,) = torch.autograd.grad(alone(x).square().sum(), x)
            assert torch.equal(a, b)


TRAINED = {
    "power": partial(PowerNorm, 4, warmup_iters=2, group_num=2, channel_dim=1),
    "unified": partial(UnifiedNorm, 4, window_size=2, warmup_iters=2, channel_dim=1),
}


@check(
    2,
    **{
        f"{name}-{how}": (make, options, sizes, sync)
        for name, make in TRAINED.items()
        for how, options, sizes, sync in (
            ("broadcast", {}, (1, 3), True),
            ("own_buffers", {"broadcast_buffers": False}, (0, 4), True),
            ("without_sync", {"broadcast_buffers": False}, (2, 3), False),
        )
    },
)
def under_ddp(make, options, sizes, sync):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain, model = network(make()), network(make(sync=sync))
    model.load_state_dict(plain.state_dict())
    parts = parts_of_ranks(sizes, 3, 4, 4, dtype=torch.double)
    weight = 1 / sum(sizes)
    if sync:
        expected = plain
        train([plain], [torch.cat(parts)], [weight], steps=5)
    else:
        alone = [network(make()) for _ in sizes]
        for each in alone:
            each.load_state_dict(plain.state_dict())
        train(alone, parts, [weight] * ranks, steps=5)
        expected = alone[rank]
    model = ddp(**options)(model)
    train([model], [parts[rank]], [ranks * weight], steps=5)
    wanted = dict(expected.state_dict())
    for name in wanted:
        if name.endswith("_gz"):
            wanted[name] *= ranks  # that of the loss of a rank, of which DDP takes the mean
    found = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    torch.testing.assert_close(found, wanted)
    assert found["1.iters"] == 5
    if sync:
        assert_same_on_all_ranks(model)


# The checks above run in processes of their own


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)
