"""Moments whose sets kernels unite, beside those of eager PyTorch: the same numbers in the same shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo.engine import normalize
from normzoo.layers.tasks import targets_by_kernel
from normzoo.moments import Moments
from normzoo.state import moved_by_kernel

pytest.importorskip("triton")

from arithmetic_checks import DEVICE, moments, rand, randn

from normzoo_kernels import _launch, sets
from normzoo_kernels._launch import launches

LESS = {
    "delta": lambda m: m.delta,
    "m2": lambda m: m.m2,
    "mean": lambda m: m.mean,
    "var": lambda m: m.var,
    "unbiased": lambda m: m.sets.unbiased_var,
    "scale": lambda m: m.standardize()[0],
    "shift": lambda m: m.standardize()[1],
    "shift by parameters of another dtype": lambda m: m.standardize(torch.ones(6).double().to(DEVICE))[1],
    "of groups": lambda m: m.over_groups(2).var,
}


@pytest.mark.parametrize("read", LESS.values(), ids=LESS)
def test_a_share_that_is_lost_is_lost_everywhere(read):
    pivot, *given = (*moments(5, 6), rand(5) / 8, rand(()))
    up = randn(6)

    def by(dtype: torch.dtype, kernels: bool) -> tuple[Tensor, ...]:
        delta, m2, w, lost = leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
        with normzoo.backend("triton" if kernels else "reference"):
            m = Moments(6, pivot.to(dtype), delta, m2, kernels=kernels)
            found = read(m.over_batch(w).less(lost)).to(dtype)
            (found * up.to(dtype)).sum().backward()
        return found.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)

    before = launches["sets_forward"], launches["sets_backward"]
    ours = by(torch.float32, True)
    assert launches["sets_forward"] > before[0] and launches["sets_backward"] > before[1]
    for a, b, c in zip(ours, by(torch.float32, False), by(torch.float64, False), strict=True):
        assert_as_good("statistic", a, b, c)


def test_parameters_that_no_kernel_takes():
    x, ids, psi = randn(6, 4, 5) + 3, torch.tensor([0, 0, 1, 1, 0, 0], device=DEVICE), torch.zeros(4)
    w, b = randn(4).double(), randn(4).double()

    def call(x: Tensor) -> Tensor:
        return normzoo.functional.adab2n(x, ids, psi.to(DEVICE), w, b, absent="official")

    with normzoo.backend("triton"):
        ours = call(x)
    assert_as_good("y", ours, call(x), call(x.double()))


MERGES = {
    "none": lambda m: m,
    "batch": lambda m: m.over_batch(),
    "groups": lambda m: m.over_groups(2),
    "chunks": lambda m: m.over_chunks(2),
    "groups of the batch": lambda m: m.over_batch().over_groups(2),
}
SCALINGS = {
    "deviation": lambda m: m.deviation(),
    "deviation about zero": lambda m: m.deviation(about_zero=True),
    "inverse": lambda m: m.inverse_deviation(),
    "inverse with a weight": lambda m: m.inverse_deviation(torch.ones(6, device=DEVICE)),
    "scale": lambda m: m.standardize()[0],
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_scalings_have_the_shape_of_the_entries(merge, scaling):
    x = randn(4, 6, 5)

    def by(backend: str) -> list[Tensor]:
        leaf = x.clone().requires_grad_()

        def combine(m: Moments):
            found = scaling(merge(m))
            assert found.shape == m.pivot.shape
            return torch.ones_like(m.pivot), torch.zeros_like(m.pivot), found.sin().sum()

        with normzoo.backend(backend):
            _, aux = normalize(leaf, combine, per_sample=True)
            return [aux.detach(), *torch.autograd.grad(aux, leaf)]

    torch.testing.assert_close(by("triton"), by("reference"))


def test_scalings_of_regions_have_the_shape_of_the_entries():
    x, mask = randn(3, 6, 5), rand(3, 5) > 0.5

    def combine(m: Moments):
        batch, w = m.over_batch(), torch.ones(2, 1, 6, device=DEVICE)
        found = (*batch.standardize(w), batch.deviation(), batch.inverse_deviation(w))
        assert {t.shape for t in found} == {m.pivot.shape} == {torch.Size((2, 3, 6))}
        return found[:2]

    for backend in ("triton", "reference"):
        with normzoo.backend(backend):
            normalize(x, combine, mask, per_sample=True)


@pytest.fixture
def few_parts(monkeypatch):
    """What more than 262144 channels ask for, of fewer."""
    monkeypatch.setattr(sets, "_PARTS", 2)
    _launch.forget()
    yield
    _launch.forget()


@pytest.mark.parametrize(
    "merge",
    [lambda m: m.over_batch(), lambda m: m.over_chunks(2), lambda m: m.over_chunks(2, True)],
    ids=["batch", "chunks", "interleaved"],
)
def test_more_channels_than_a_tile_holds(merge, few_parts):
    given = moments(4, 1100)
    with normzoo.backend("triton"):
        ours = merge(Moments(6, *given, kernels=True))
        before = launches["sets_forward"]
        var = ours.var
        assert launches["sets_forward"] == before + 1
    exact = merge(Moments(6, *(t.double() for t in given)))
    for a, b in ((var, exact.var), (ours.delta, exact.delta)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["variance_first", "mean_first"])
@pytest.mark.parametrize("options", [{}, {"estimate": True, "update_rate": 0.5}], ids=["batch", "estimate"])
@pytest.mark.parametrize("shape", [(4, 6, 0, 3), (0, 6, 5, 3)], ids=str)
def test_batch_channel_norm_of_nothing(shape, options, order):
    """Nothing moves, and parameters have gradients of zero."""
    if order != "variance_first" and not options:
        return
    options = options | ({"order": order} if options else {})
    layer = normzoo.BatchChannelNorm(6, 2, device=DEVICE, **options)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    for training in (True, False):
        plain = copy.deepcopy(layer.train(training))
        before = copy.deepcopy(layer.state_dict())
        for each, backend in ((layer, "triton"), (plain, "reference")):
            with normzoo.backend(backend):
                each(torch.empty(shape, device=DEVICE, requires_grad=True)).sum().backward()
            for name, t in each.state_dict().items():
                assert name == "num_batches_tracked" or torch.equal(t, before[name]), name
            assert not any(p.grad.any() for p in each.parameters())
            each.zero_grad()
        assert layer.num_batches_tracked == plain.num_batches_tracked


def test_wide_statistics_are_not_rounded():
    """Those of float64 beside x of float32 are moved by eager PyTorch."""
    x, start = randn(4, 6, 5), [rand(6).double() for _ in range(2)]

    def by(backend: str) -> list[Tensor]:
        stored = [t.clone() for t in start]
        with normzoo.backend(backend):
            normzoo.functional.batch_channel_norm(x, *stored, 2, training=True)
        return stored

    ours, plain = by("triton"), by("reference")
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(t, t.float().double()) for t in ours)
    for old, new, wanted in zip(start, ours, plain, strict=True):
        torch.testing.assert_close(new - 0.9 * old, wanted - 0.9 * old, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("elsewhere", ["tracked", "skipped", "factor"])
def test_numbers_on_another_device_are_left_to_pytorch(elsewhere):
    pairs = [(randn(6), randn(6)), (rand(6), rand(6))]
    options = {"factor": 0.1, elsewhere: torch.zeros((), device="meta")}
    with normzoo.backend("triton"):
        assert not moved_by_kernel(pairs, 4, **options)
        assert moved_by_kernel(pairs, 4, 0.1)


def test_a_number_of_batches_on_another_device_is_left_to_pytorch():
    given = (randn(6), rand(6), (randn(6), rand(6)))
    with normzoo.backend("triton"):
        assert targets_by_kernel(*given, torch.zeros((), device="meta"), 0.1, 0.5, 4) is None
        assert targets_by_kernel(*given, torch.zeros((), dtype=torch.long, device=DEVICE), 0.1, 0.5, 4)
