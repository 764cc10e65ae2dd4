"""Batch, group and instance norm by kernels, and the launch that moves running statistics, against torch and
the eager reference, on a GPU or interpreted."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

pytest.importorskip("triton")

from channel_checks import COPIED, DEVICE, DTYPES, GRADIENTS, LAYOUTS, randn

import normzoo
from normzoo import state
from normzoo_kernels import _channel_forms, _launch, standardize, tracking

EPS = 1e-3


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def formula(x, weight, bias, groups):
    """torch's operators, of which that for groups takes no bias alone and no channels_last."""
    if groups == 0:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return F.group_norm(x.contiguous(), groups, weight, bias, EPS)


def results(function, x, weight, bias, dy):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = iter(inputs)
    y = function(*(None if t is None else next(given) for t in (x, weight, bias)))
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def by_kernels(groups):
    return lambda x, weight, bias: standardize.standardize(
        x, weight, bias, groups, EPS, reference=normzoo.dispatch.Reference(None)
    )[0]


def check(x, groups, dtype=torch.float32, affine=(True, True), dy=None):
    """Values and all gradients; parameters of `dtype`."""
    weight, bias = (torch.randn(x.shape[1], device=DEVICE).to(dtype) if there else None for there in affine)
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    before = _launch.launches.total()
    ours = results(by_kernels(groups), x, weight, bias, dy)
    assert _launch.launches.total() - before >= 6, "no kernel ran"

    def at(kind):
        given = (t if t is None else t.to(kind) for t in (x, weight, bias, dy))
        return results(lambda *a: formula(*a, groups), *given)

    for name, found, plain, exact in zip(
        ("y", "dx", "dw", "db"), ours, at(torch.float32), at(torch.float64), strict=False
    ):
        assert_as_good(name, found, plain.to(found.dtype), exact, hard=True)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("groups", [0, 3, 12], ids=["batch", "groups", "instances"])
def test_values_and_gradients(groups, last, dtype):
    x = randn(3, 12, 7, 5, dtype=dtype, last=last)
    y, dx, *_ = check(x, groups, dtype)
    assert y.dtype == dx.dtype == dtype and y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("groups", [0, 3], ids=["batch", "groups"])
def test_parameters_that_are_not_there(groups, affine):
    check(randn(3, 12, 4, 6), groups, affine=affine)


@pytest.mark.parametrize("groups", [0, 2, 6], ids=["batch", "groups", "instances"])
@pytest.mark.parametrize("shape", [(2, 6, 640), (40, 6, 3), (1, 6, 2, 2), (35, 36, 9)], ids=str)
def test_sizes_and_parts(groups, shape, monkeypatch):
    """Many programs make many parts; more samples than a tile for parameters has, and more channels."""
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: 4)
    monkeypatch.setattr(_channel_forms, "_LEAST", 1)
    before = _launch.launches["merge_moments"]
    check(randn(*shape), groups)
    if shape == (2, 6, 640) and groups == 2:
        assert _launch.launches["merge_moments"] > before, "no statistic has several parts"


@pytest.mark.parametrize("tile", [4, 16])
def test_groups_wider_than_a_tile(tile, monkeypatch):
    monkeypatch.setattr(standardize, "_TILE", tile)
    check(randn(3, 22, 3, 5), 2)
    check(randn(2, 22, 3, 5), 1)
    check(randn(2, 24, 3, 5), 12)


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


@pytest.mark.parametrize("groups", [0, 2], ids=["batch", "groups"])
def test_far_from_zero_and_without_spread(groups):
    x = torch.randn(4, 6, 8, 8, device=DEVICE)
    check(x + 1e4, groups)
    check(x * 0 + 3, groups)
    # The means of a group's channels lie apart: what is merged is mostly their distance.
    check(x + 100 * torch.arange(6, device=DEVICE).view(6, 1, 1), groups)


@pytest.mark.parametrize("groups", [0, 2, 6], ids=["batch", "groups", "instances"])
def test_what_the_rounding_of_a_mean_leaves_over(groups):
    """Far from zero a gradient that goes with x finds it, and torch's own error is no measure."""
    x = torch.randn(4, 6, 8, 8, device=DEVICE) + 1e4 + 10 * torch.arange(6, device=DEVICE).view(6, 1, 1)
    weight, bias = torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    dy = torch.randn_like(x) + 5 + 3 * (x - x.mean((0, 2, 3), keepdim=True))
    ours = results(by_kernels(groups), x, weight, bias, dy)
    exact = results(lambda *a: formula(*a, groups), *(t.double() for t in (x, weight, bias, dy)))
    for name, found, e in zip(("y", "dx", "dw", "db"), ours, exact, strict=True):
        assert (found - e).abs().max() <= 2e-5 * e.abs().max(), name


def test_what_is_not_finite_stays_in_its_set():
    x = randn(4, 6, 5, 5)
    x[1, 2, 3, 3] = float("nan")
    for groups in (0, 3):
        with torch.no_grad():
            y, expected = by_kernels(groups)(x, None, None), formula(x, None, None, groups)
        assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("groups", [0, 3], ids=["batch", "groups"])
def test_only_the_gradients_that_are_asked_for(groups, wants):
    inputs = randn(3, 6, 4, 4), torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    dy = torch.randn(3, 6, 4, 4, device=DEVICE)
    everything = results(by_kernels(groups), *inputs, dy)[1:]
    for t, want in zip(inputs, wants, strict=True):
        t.requires_grad_(want)
    by_kernels(groups)(*inputs).backward(dy)
    for t, want, expected in zip(inputs, wants, everything, strict=True):
        assert torch.equal(t.grad, expected) if want else t.grad is None


LAYERS = {
    "batch": lambda: normzoo.BatchNorm2d(6),
    "batch, cumulative": lambda: normzoo.BatchNorm2d(6, momentum=None),
    "batch, skipping": lambda: normzoo.BatchNorm2d(6, nonfinite="skip"),
    "group": lambda: normzoo.GroupNorm(3, 6),
    "instance": lambda: normzoo.InstanceNorm2d(6, affine=True),
    "instance, tracked": lambda: normzoo.InstanceNorm2d(6, track_running_stats=True),
}


def counted(call):
    """Kernels of ours and operators of torch that would start one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = ("empty", "detach", "normzoo")
            if not (func.is_view or any(word in str(func) for word in made)):
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    found, before = [], _launch.launches.total()
    with Counting():
        result = call()
    return result, _launch.launches.total() - before + len(found), found


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_at_most_four_launches_each_way(make, monkeypatch):
    """Of a training step, with statistics in several parts and running ones, and nothing left to torch."""
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: 32)
    monkeypatch.setattr(_channel_forms, "_LEAST", 1)
    layer, x = make().to(DEVICE), randn(2, 6, 32, 20).requires_grad_()
    inputs, dy = (x, *layer.parameters()), torch.ones(2, 6, 32, 20, device=DEVICE)
    with normzoo.backend("triton"):
        y, forward, operators = counted(lambda: layer(x))
        assert forward <= 4, operators
        _, backward, operators = counted(lambda: torch.autograd.grad(y, inputs, dy))
    assert backward <= 4, operators


@pytest.mark.parametrize("bad", [None, float("nan")], ids=["finite", "nan"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make", [m for n, m in LAYERS.items() if n != "group"], ids=[n for n in LAYERS if n != "group"]
)
def test_running_statistics(make, kind, bad):
    """Of three steps, beside the eager layer."""
    ours = make().to(DEVICE)
    for name, buffer in ours.named_buffers():
        if name.startswith("running"):
            setattr(ours, name, buffer.to(kind))
    plain, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
    before = _launch.launches["track_statistics"]
    for step in range(3):
        x = randn(4, 6, 5, 5)
        if bad is not None and step == 1:
            x[0, 3, 0, 0] = bad
        with normzoo.backend("triton"):
            ours(x)
        with normzoo.backend("reference"):
            plain(x)
            exact(x.double())
    assert (
        _launch.launches["track_statistics"] - before == 3 * hasattr(ours, "running_mean")
        or ours.running_mean is None
    )
    states = ours.state_dict(), plain.state_dict(), exact.state_dict()
    for name in states[0]:
        a, b, e = (s[name] for s in states)
        assert torch.equal(a.isnan(), b.isnan()), name
        if not a.is_floating_point():
            assert torch.equal(a, b), name
            continue
        assert_as_good(name, a.nan_to_num(), b.nan_to_num(), e.nan_to_num(), hard=True)
    for name, counter in ours._counters():
        assert torch.equal(counter, dict(plain._counters())[name])


@pytest.mark.parametrize("shape", [(7,), (3, 7), (40, 2100)], ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_moving_one_statistic_at_a_rate_on_the_device(shape, skip):
    new, running = torch.randn(shape, device=DEVICE), torch.randn(shape[-1], device=DEVICE)
    rate, tracked, skipped = (torch.tensor(v, device=DEVICE) for v in (0.3, 5, 2))
    expected = running * 0.7 + 0.3 * (new.mean(0) if len(shape) == 2 else new)
    before = running.clone()
    tracking.track(None, None, running, new, tracked, skipped if skip else None, rate, None, 2)
    torch.testing.assert_close(running, expected)
    assert tracked == 7 and skipped == 2
    new[..., -1] = float("inf")
    tracking.track(None, None, running, new, tracked, skipped if skip else None, rate, None, 2)
    assert bool(running[-1].isinf()) != skip and tracked == (7 if skip else 9) and skipped == 2 + skip
    assert not torch.equal(running, before)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the interpreter
def test_a_mean_that_does_not_fit_its_buffer_is_skipped():
    running = [torch.zeros(5, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    mean, var = torch.full((5,), 1e6, device=DEVICE), torch.ones(5, device=DEVICE)
    tracked, skipped = (torch.zeros((), dtype=torch.long, device=DEVICE) for _ in range(2))
    tracking.track(running[0], mean, running[1], var, tracked, skipped, None, 0.1, 1)
    assert skipped == 1 and tracked == 0 and not torch.stack(running).any()


def test_autograd_knows_of_what_tracking_writes():
    """A graph over the old statistics must not go backward through the new ones."""
    layer = normzoo.BatchNorm2d(6, nonfinite="skip").to(DEVICE).eval()
    x = randn(4, 6, 3, 3).requires_grad_()
    with normzoo.backend("triton"):
        y = layer(x)
        layer.train()(randn(4, 6, 3, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().sum().backward()


def test_state_that_a_kernel_cannot_move_is_left_to_torch():
    """Counts on the device, as across ranks, nothing at all, and other dtypes."""
    running, new = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with normzoo.backend("triton"):
        assert not state.moved_by_kernel([(running, new)], torch.tensor(4), 0.1)
        assert not state.moved_by_kernel([(running, new)], 0, 0.1)
        assert not state.moved_by_kernel([(running, new.double())], 4, 0.1)
        assert not state.moved_by_kernel([(torch.zeros(6, device=DEVICE)[::2], new)], 4, 0.1)
        assert state.moved_by_kernel([(running, new)], 4, 0.1)
    torch.testing.assert_close(running, torch.full_like(running, 0.1))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_reference_steps_in(make, monkeypatch):
    """Where a kernel does not compile, forward or backward: same values, state moved once."""
    x, dy = randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5, device=DEVICE)
    names = {"channel_standardize", "group_standardize"}, {"batch_standardize_grad", "group_standardize_grad"}
    for broken in names:
        layer = make().to(DEVICE)
        plain = copy.deepcopy(layer)

        def launch(kernel, *args, broken=broken, **meta):
            if kernel.__name__ in broken:
                raise _launch.KernelUnavailable(f"{kernel.__name__}: planted")
            return _launch.launch(kernel, *args, **meta)

        _launch.warn_once.cache_clear()
        monkeypatch.setattr(standardize, "launch", launch)
        monkeypatch.setattr(normzoo.dispatch, "insisted", lambda: False)
        monkeypatch.setattr(normzoo.standardized, "insisted", lambda: False)
        with normzoo.backend("triton"), pytest.warns(RuntimeWarning, match="did not compile"):
            found = results(lambda x, *_, layer=layer: layer(x), x, None, None, dy)
        with normzoo.backend("reference"):
            expected = results(lambda x, *_, plain=plain: plain(x), x, None, None, dy)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("make", [LAYERS["batch"], LAYERS["group"], LAYERS["instance"]])
def test_double_backward(make):
    layer, x = make().to(DEVICE), randn(3, 6, 3, 3).requires_grad_()

    def penalty(backend):
        with normzoo.backend(backend):
            y = layer(x)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty("triton"), penalty("reference"), rtol=1e-4, atol=1e-2)


def test_saved_tensors_that_come_back_in_another_order():
    def unpack(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    inputs = randn(3, 6, 5, 4), torch.randn(6, device=DEVICE), torch.randn(6, device=DEVICE)
    dy = torch.randn(3, 6, 5, 4, device=DEVICE)
    for groups in (0, 3):
        expected = results(by_kernels(groups), *inputs, dy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            torch.testing.assert_close(results(by_kernels(groups), *inputs, dy), expected)


def test_repeatable():
    x, w, b = randn(5, 12, 9, 9), torch.randn(12, device=DEVICE), torch.randn(12, device=DEVICE)
    dy = torch.randn_like(x)
    for groups in (0, 4):
        first, second = (results(by_kernels(groups), x, w, b, dy) for _ in range(2))
        assert all(map(torch.equal, first, second))
