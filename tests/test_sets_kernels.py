"""Small arithmetic by kernels, each beside the plain PyTorch that it stands for: on a GPU, else in the
interpreter."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo.carry import expanded, slope_and_offset
from normzoo.fused import fused
from normzoo.layers.stages import SecondStage, mixed
from normzoo.layers.tasks import _Shares
from normzoo.layers.time_dependent import _Glide
from normzoo.layers.two_regions import Gate, PixelMap, RegionScaling
from normzoo.moments import Moments
from normzoo.passes import counts
from normzoo.sets import Scaling, Union, standardized

pytest.importorskip("triton")

from arithmetic_checks import DEVICE, check, moments, rand, randn, run

from normzoo_kernels import _channel_forms, _launch, channels, sets
from normzoo_kernels._launch import launches


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def programs(request, monkeypatch):
    monkeypatch.setattr(sets, "sm_count", lambda device: request.param)
    _launch.forget()
    yield
    _launch.forget()


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
@pytest.mark.parametrize(("kind", "programs"), [("none", 64), ("standardize", 4)], indirect=["programs"])
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


@pytest.mark.parametrize("size", [8, 3, 1300], ids=["whole vectors", "odd", "wide"])
@pytest.mark.parametrize("each", [False, True], ids=["one a group", "one a channel"])
def test_a_group_norm_behind_another_norm(size, each):
    rows, groups = (2, 2) if size > 1000 else (5, 4)
    entries = [t for t in moments(rows, groups * size)[1:]]
    first = rand(rows, groups * size) + 0.5, randn(rows, groups * size)
    second = [randn(groups * size if each else groups) for _ in range(2)]
    check(SecondStage(groups, 6, 1e-3), (*entries, *first, *second), constants=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(37,), (5, 8)], ids=["of the batch", "of samples"])
def test_stored_statistics(shape, share, dtype):
    """Of a batch, of both and stored ones alone, for parameters of any dtype."""
    given, n = moments(*shape), None if share == 1 else 5
    parameters, stored = ([rand(shape[-1]).to(dtype) for _ in range(2)] for _ in range(2))

    def by(wide: torch.dtype, kernels: bool) -> tuple[Tensor, ...]:
        m = Moments(6, *(t.to(wide) for t in given), kernels=kernels)
        w, b = leaves = [p.to(dtype if wide == torch.float32 else wide).requires_grad_() for p in parameters]
        if kernels:
            with normzoo.backend("triton"):
                found = mixed(m, stored if share else None, share, w, b, 1e-3, n)
            assert found is not None
        else:
            own = m.sets.m2 / 5
            gap, var = ((share * s.to(wide)).expand(shape) for s in stored)
            gap = gap - share * m.pivot
            if n:
                gap, var = gap + (1 - share) * m.delta, var + (1 - share) * own
            found = (*standardized(gap, var, w, b, 1e-3), m.sets.mean, own)
        up = torch.linspace(-1, 2, given[0].numel(), dtype=wide, device=DEVICE).view(shape)
        grads = torch.autograd.grad(found[:2], leaves, (up, 1 - up))
        return *found[: 4 if n else 2], *grads

    before = launches.copy()
    ours = by(torch.float32, True)
    assert (launches - before) == {"mixed_scaling": 1, "scaling_grads": 1}
    for a, b, c in zip(ours, by(torch.float32, False), by(torch.float64, False), strict=True):
        assert_as_good("statistic", a, b, c)


def test_weighted_samples():
    union = Union(6, "batch", 37, False, True, KINDS["standardize"])
    given = (*moments(37, 21), None, rand(37), None, randn(21), randn(21))
    check(union, given, (1, 2))


@pytest.mark.parametrize("programs", [4, 64], indirect=True)
def test_a_share_that_is_lost(programs):
    union = Union(6, "batch", 37, False, True, KINDS["standardize"])
    weights = rand(37)
    check(union, (*moments(37, 21), None, weights / weights.sum() / 8, rand(()), randn(21), None), (1, 2))


@pytest.mark.parametrize("how", ["own", "batch", "groups"])
def test_counts_that_differ(how):
    """As those of two regions do, in some of which there is nothing."""
    pivot, delta, m2 = moments(2, 8, 6)
    count = torch.randint(0, 9, (2, 8, 1), device=DEVICE).float()
    count[0, :4] = 0
    pivot, delta, m2 = (torch.where(count > 0, t, 0) for t in (pivot, delta, m2))
    union = Union(0, how, {"batch": 8, "groups": 3}.get(how, 0), how == "batch", False, KINDS["standardize"])
    check(union, (pivot, delta, m2, count, None, None, randn(6), None), constants=(0, 3))


def test_what_is_nowhere_finite_stays_in_its_set():
    pivot, delta, m2 = moments(6, 10)
    delta[4, 3] = float("nan")
    union = Union(6, "chunks", 2, False, False, KINDS["standardize"])
    with normzoo.backend("triton"):
        found = fused(union, pivot, delta, m2, None, None, None, None, None)
    expected = union.plain((pivot, delta, m2, None, None, None, None, None))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert a.isnan().any() or a.shape[0] == 3


def test_parameters_of_low_precision_and_what_needs_no_gradient():
    union = Union(6, "groups", 4, False, False, KINDS["standardize"])
    given = (*moments(9, 16), None, None, None, randn(16).bfloat16(), randn(16).half())
    check(union, given)
    leaves = [None if t is None else t.clone() for t in given]
    weight = leaves[6].requires_grad_()
    with normzoo.backend("triton"):
        scale, *_ = fused(union, *leaves)
        assert torch.autograd.grad(scale.sum(), weight)[0].dtype == torch.bfloat16


def test_second_derivatives_are_those_of_the_formulas():
    union = Union(6, "groups", 4, False, False, KINDS["standardize"])
    given = (*moments(3, 8), None, None, None, randn(8), randn(8))

    def penalty(body) -> tuple[Tensor, ...]:
        leaves = [t if t is None else t.clone().requires_grad_(i > 0) for i, t in enumerate(given)]
        wanted = [t for t in leaves[1:] if t is not None]
        slopes = torch.autograd.grad(sum(y.sin().sum() for y in body(leaves)), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in slopes), wanted)

    with normzoo.backend("triton"):
        ours = penalty(lambda t: fused(union, *t)[:2])
    torch.testing.assert_close(ours, penalty(lambda t: union.plain(t)[:2]))


def test_a_call_repeats_bit_by_bit():
    union = Union(6, "batch", 37, False, True, KINDS["standardize"])
    given = (*moments(37, 21), None, rand(37), None, randn(21), randn(21))
    with normzoo.backend("triton"):
        first, second = (run(lambda t: fused(union, *t), union, given, (0,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


@pytest.mark.parametrize("ended", [-1, 3])
@pytest.mark.parametrize("tasks", [5, 40])
def test_shares_of_tasks(tasks, ended):
    """Of more samples than go at once, some tasks absent."""
    ids = 2 * torch.randint(0, tasks // 2, (150,), device=DEVICE)
    check(_Shares(ended, 3), (ids, None, randn(tasks)), constants=())
    check(_Shares(-1, 3), (ids.int(), torch.tensor(ended, device=DEVICE), 90 * randn(tasks)), constants=())


def test_samples_of_no_task_make_nan():
    ids = torch.tensor([0, 7, -1, 1], device=DEVICE)
    with normzoo.backend("triton"):
        shares, _ = fused(_Shares(-1, 1), ids, None, randn(3))
    assert shares.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("batches", [0, 3, 10_000])
def test_where_statistics_are_drawn_to(kappa, batches):
    layer = normzoo.AdaB2N(5, 2, momentum=0.2, kappa=kappa, device=DEVICE)
    layer.num_batches_tracked.fill_(batches)
    layer.running_mean.normal_()
    mean, var = randn(5), rand(5)
    with normzoo.backend("triton"):
        ours = layer._targets(mean, var, 6)
    expected = layer._targets(mean, var, 6)
    torch.testing.assert_close(ours[:2], expected[:2])
    torch.testing.assert_close(float(ours[2]), float(expected[2]), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("momentum", "stats"), [(0.1, "sequential"), (0.3, "scaled"), (None, "sequential"), (1, "scaled")]
)
def test_ghosts_one_after_the_other(momentum, stats):
    x = randn(11, 6, 3, 2) + 2
    states = []
    for backend, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        layer = normzoo.GhostBatchNorm(6, 3, momentum=momentum, stats=stats, device=DEVICE, dtype=dtype)
        with normzoo.backend(backend):
            for scale in (1, 2):
                layer(scale * x.to(dtype))
        states.append((layer.running_mean, layer.running_var, layer.num_batches_tracked))
    ours, eager, exact = states
    assert_as_good("mean", ours[0], eager[0], exact[0])
    assert_as_good("variance", ours[1], eager[1], exact[1])
    assert ours[2] == eager[2] == 6


@pytest.mark.parametrize("missing", ["nothing", "delta", "m2"])
def test_the_pull_of_statistics(missing):
    delta = randn(3, 150)
    d_delta, d_m2 = (None if name == missing else randn(3, 150) for name in ("delta", "m2"))
    for count in (6, torch.randint(0, 3, (3, 1), device=DEVICE).float()):
        given = (d_delta, d_m2, delta)
        ours = slope_and_offset(*given, count, True, True)
        wide = (t if t is None else t.double() for t in given)
        plain, exact = slope_and_offset(*given, count, False, True), slope_and_offset(*wide, count, False, True)
        for name, a, b, c in zip(("slope", "offset"), ours, plain, exact, strict=True):
            assert_as_good(name, a, b, c)


def test_gradients_of_parameters_of_channels_are_summed_up_at_once():
    parameters = [randn(21).requires_grad_() for _ in range(7)]
    with normzoo.backend("triton"):
        rows = expanded([*parameters, randn(70, 21)], torch.Size((70, 21)), True)
    ups = [randn(70, 21) for _ in parameters]
    before = launches.copy()
    found = torch.autograd.grad(rows[:-1], parameters, ups)
    assert launches - before == {"sum_rows": 1}
    for a, up in zip(found, ups, strict=True):
        assert_as_good("sum", a, up.sum(0), up.double().sum(0))


@pytest.mark.parametrize("apart", [False, True], ids=["both betas", "one beta"])
@pytest.mark.parametrize("shape", [(2, 37), (2, 21, 8)], ids=["of the batch", "of samples"])
def test_the_scaling_of_regions(shape, apart):
    """With regions that are empty, and gammas of low precision."""
    count = torch.randint(0, 9, (*shape[:-1], 1), device=DEVICE).float()
    count[0, ..., 0] = 0
    entries = [torch.where(count > 0, t, 0) for t in moments(*shape)]
    gamma0, beta0, gamma1, beta1 = (randn(shape[-1]) for _ in range(4))
    scaling = RegionScaling(1e-3, apart)
    check(scaling, (count, *entries, gamma0.bfloat16(), beta0, gamma1, beta1), constants=(0, 1))
    check(scaling, (count, *entries, None, beta0, None, None), constants=(0, 1))
    check(scaling, (count, *entries, None, None, None, None), constants=(0, 1))


def test_the_importance_of_pixels():
    x = 3 * randn(2, 1, 37, 31)
    x[0, 0, 0, :3] = torch.tensor([90.0, -90.0, 1e30])
    a, again, hole = check(Gate(0.6), (x,), constants=())
    assert hole.dtype == torch.bool and hole.any() and not hole.all() and torch.equal(a, again)
    x[0, 0, 0, 0] = float("nan")
    with normzoo.backend("triton"):
        a, _, hole = fused(Gate(0.6), x)
    assert a[0, 0, 0, 0].isnan() and not hole[0, 0, 0, 0]


PIXELS = {
    "planes": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("lay_out", PIXELS.values(), ids=PIXELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 3), (3, 8, 20, 10)], ids=str)
def test_a_map_of_pixels(shape, dtype, lay_out):
    n, _, *size = shape
    x, scale, shift = lay_out(randn(*shape).to(dtype)), randn(n, 1, *size), randn(n, 1, *size)
    (y,) = check(PixelMap(), (x, scale, shift), constants=())
    dense = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    assert y.stride() == dense.stride()


@pytest.mark.parametrize(("per_sample", "programs"), [(False, 500), (True, 0)])
def test_the_counts_of_regions(per_sample, programs, monkeypatch):
    """Of one part and of several."""
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: programs)
    _launch.forget()
    x = randn(2, 1, 183, 185)
    mask = (rand(2, 183, 185) > 0.7).to(torch.uint8)
    mask[1] = 0
    before = launches["merge_regions"]
    *_, count = found = channels.region_moments(x, mask, per_sample)
    _launch.forget()
    assert launches["merge_regions"] - before == (programs > 0)
    expected = counts(x, mask, per_sample).expand(count.shape)
    torch.testing.assert_close(count, expected, rtol=0, atol=0)
    for a, b in zip(found, channels.moments(x, mask, per_sample), strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "number", "dtype"),
    [((37, 24), 1, torch.float32), ((5, 24), 2, torch.float32), ((3, 301), 2, torch.bfloat16)],
    ids=str,
)
def test_parameters_that_glide(shape, number, dtype):
    samples, width = shape
    parameters = [randn(width).to(dtype) for _ in range(4 * number)]
    for p in parameters[2::4]:
        p.mul_(9)
    check(_Glide(), (5 * randn(samples, 1), *parameters), constants=())
    check(_Glide(), (randn(samples, 1), *parameters), constants=(0,))
