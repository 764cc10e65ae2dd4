"""Batch, group and instance norm of sets that a program holds on chip, against torch and float64, also with the
statistics of the other form, on a GPU or interpreted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

pytest.importorskip("triton")

from channel_checks import COPIED, DEVICE, DTYPES, GRADIENTS, LAYOUTS, randn

import normzoo
from normzoo_kernels import _choices, _launch, _on_chip_forms, standardize

EPS = 1e-3
GROUPS = pytest.mark.parametrize("groups", [0, 3, 12], ids=["batch", "groups", "instances"])
KERNELS = ("standardize_on_chip", "standardize_on_chip_grad")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """One multiprocessor, which a program fills. Outputs start as NaN: what no kernel writes cannot pass."""
    monkeypatch.setattr(_on_chip_forms, "sm_count", lambda device: 1)
    torch.use_deterministic_algorithms(True)
    with _choices.trying(on_chip=True):
        yield
    torch.use_deterministic_algorithms(False)


def formula(x, weight, bias, dy, groups):
    x = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in (weight, bias)]
    if groups == 0:
        y = F.batch_norm(x, None, None, *parameters, True, 0.0, EPS)
    else:
        y = F.group_norm(x.contiguous(), groups, *parameters, EPS)
    wanted = [t for t in (x, *parameters) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def by_kernels(x, weight, bias, dy, groups, on_chip=(True, True)):
    """[y, dx, dw, db] and stats; `on_chip`: forward and backward."""
    before = [_launch.launches[name] for name in KERNELS]
    with _choices.trying(on_chip=on_chip[0]):
        y, stats = standardize.forward(x, weight, bias, groups, EPS)
    needs = [True, weight is not None, bias is not None]
    with _choices.trying(on_chip=on_chip[1]):
        found = standardize.backward(dy, x, stats, weight, bias, groups, needs)
    assert tuple(_launch.launches[name] > n for name, n in zip(KERNELS, before, strict=True)) == on_chip
    return [y, *(t for t, need in zip(found, needs, strict=True) if need)], stats


def check(x, groups, dtype=torch.float32, affine=True, dy=None, on_chip=(True, True)):
    weight, bias = (torch.randn(x.shape[1], device=DEVICE).to(dtype) if affine else None for _ in range(2))
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    ours, stats = by_kernels(x, weight, bias, dy, groups, on_chip)

    def at(kind):
        return formula(*(t if t is None else t.to(kind) for t in (x, weight, bias, dy)), groups)

    for name, found, plain, exact in zip(
        ("y", "dx", "dw", "db"), ours, at(torch.float32), at(torch.float64), strict=False
    ):
        assert_as_good(name, found, plain.to(found.dtype), exact, hard=True)
    return ours, stats


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@GROUPS
def test_values_and_gradients(groups, last, dtype):
    x = randn(3, 12, 7, 5, dtype=dtype, last=last)
    (y, dx, *_), _ = check(x, groups, dtype)
    assert y.dtype == dx.dtype == dtype and y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("on_chip", [(True, False), (False, True)], ids=["forward", "backward"])
@GROUPS
def test_either_pass_takes_the_statistics_of_the_other_form(groups, on_chip):
    x = randn(3, 12, 7, 5) + 1000 * torch.arange(12, device=DEVICE).view(12, 1, 1)
    _, stats = check(x, groups, on_chip=on_chip)
    with _choices.trying(on_chip=not on_chip[0]):
        _, others = standardize.forward(x, None, None, groups, EPS)
    own = 3 if groups == 3 else 5
    mean, other = (s[0].double() + s[1] for s in (stats, others))
    torch.testing.assert_close(mean, other, rtol=0, atol=3e-7 * float(x.std()))
    assert torch.equal(mean.float(), stats[0]) or not on_chip[0], "pivot is not the rounded mean"
    torch.testing.assert_close(stats[2:own], others[2:own], rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [0, 2, 6], ids=["batch", "groups", "instances"])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("shape", [(2, 6, 640), (9, 6, 3), (1, 6, 2, 2), (3, 66, 9), (5, 18)], ids=str)
def test_tails(shape, last, groups):
    check(randn(*shape, last=last), groups)


def test_no_parameters_and_no_spread():
    x = randn(4, 6, 5, 5)
    for groups in (0, 2):
        check(x, groups, affine=False)
        check(x * 0 + 3, groups)
        check(x + 1e4, groups)


@pytest.mark.parametrize("name", (*LAYOUTS, *COPIED))
def test_layouts(name):
    x = (LAYOUTS | COPIED)[name]()
    if x.shape[0] * x[0, 0].numel() > 1:
        check(x, 0)
    check(x, 1)


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("groups", [0, 5], ids=["batch", "instances"])
def test_layouts_of_the_upstream_gradient(make, groups):
    x = randn(3, 5, 5, 3)
    check(x, groups, dy=make(x))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so in the interpreter
@GROUPS
def test_what_is_not_finite_stays_in_its_set(groups):
    x = randn(4, 12, 5, 5)
    x[1, 2, 3, 3], x[2, 7, 0, 0] = float("nan"), float("inf")
    (y, dx, *_), _ = by_kernels(x, None, None, torch.ones_like(x), groups)
    expected, gradient = formula(x, None, None, torch.ones_like(x), groups)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(dx.isnan(), gradient.isnan())


@GROUPS
def test_launches(groups):
    """One forward, and backward one, or two where the gradients of parameters are sums over samples."""
    x = randn(3, 12, 4, 4)
    layer = normzoo.BatchNorm2d(12, track_running_stats=False) if groups == 0 else normzoo.GroupNorm(groups, 12)
    layer.to(DEVICE)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    x.requires_grad_()
    with normzoo.backend("triton"):
        before = _launch.launches.total()
        y = layer(x)
        assert _launch.launches.total() - before == 1
        torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))
        assert _launch.launches.total() - before == 2 + (groups > 0)
        before = _launch.launches.total()
        frozen(x).sum().backward()
        assert _launch.launches.total() - before == 2


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("groups", [0, 3], ids=["batch", "groups"])
def test_only_the_gradients_that_are_asked_for(groups, needs):
    x, dy = randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4, device=DEVICE)
    weight, bias = torch.randn(2, 6, device=DEVICE)
    (_, *everything), stats = by_kernels(x, weight, bias, dy, groups)
    found = standardize.backward(dy, x, stats, weight, bias, groups, list(needs))
    for t, need, expected in zip(found, needs, everything, strict=True):
        assert torch.equal(t, expected) if need else t.numel() == 0


def test_repeatable():
    x, dy = randn(5, 12, 9, 9), torch.randn(5, 12, 9, 9, device=DEVICE)
    weight, bias = torch.randn(2, 12, device=DEVICE)
    for groups in (0, 4):
        first, second = (by_kernels(x, weight, bias, dy, groups)[0] for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_where_there_is_no_such_form(monkeypatch):
    """What does not fit, and what leaves multiprocessors without a program, runs in the other form."""
    monkeypatch.setattr(_on_chip_forms, "_MOST", 128)
    check(randn(2, 20, 8), 0)
    check(randn(2, 20, 65), 0, on_chip=(False, False))
    check(randn(2, 20, 12), 1, on_chip=(False, False))
    check(randn(2, 20, 8, last=True), 0)
    check(randn(2, 20, 16, last=True), 0, on_chip=(False, False))  # 4 channels fit, 16 bytes
    monkeypatch.setattr(_on_chip_forms, "sm_count", lambda device: 40)
    _launch.forget()
    check(randn(2, 20, 8), 0, on_chip=(False, False))
