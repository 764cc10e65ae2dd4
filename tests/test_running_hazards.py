"""What the kernels of the running engine could trip over: bad values, phases, missing kernels, far offsets."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from running_checks import DEVICE, check, prepared, randn, state_of, step, values
from training import batches, compiled_is_eager, same

import normzoo
from normzoo import PowerNorm, UnifiedNorm
from normzoo_kernels import running as kernels
from normzoo_kernels._launch import KernelUnavailable, launches, warn_once

Power, Unified = partial(PowerNorm, 6, warmup_iters=1), partial(UnifiedNorm, 6, (3, 2), 2)
NAN, INF = float("nan"), float("inf")
numpy_warns = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide):RuntimeWarning")


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def per(name: str, table: dict):
    return pytest.mark.parametrize(name, table.values(), ids=table)


KINDS = {
    "power": Power,
    "power, no groups": partial(Power, group_num=None),
    "unified": Unified,
    "unified, filtered": partial(Unified, outlier_filtration=True),
}


def after(steps: int, make: partial, **options) -> nn.Module:
    """A layer that may have been trained so long."""
    layer = prepared(partial(make, **options))
    layer.iters.fill_(steps)
    if isinstance(layer, UnifiedNorm) and steps:
        for window in (layer.buffer_x2, layer.buffer_gz):
            window.uniform_(0.5, 2)
    return layer


def alike(layer: nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None = None) -> dict:
    """A step on the kernels, NaN and infinities where the eager engine has them."""
    eager = copy.deepcopy(layer)
    ours, wanted = step(layer, "triton", x, dy, mask), step(eager, "reference", x, dy, mask)
    assert ours.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(ours[name], t, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    return ours


@numpy_warns
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("steps", [0, 5], ids=["first", "later"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@per("make", KINDS)
def test_a_bad_batch(make, nonfinite, steps, value):
    """One channel is enough to leave the state of the whole layer as it is."""
    layer = after(steps, make, nonfinite=nonfinite)
    before = state_of(layer)
    x = values(20, 6).detach()
    x[7, 4] = value
    found = alike(layer, x.requires_grad_(), randn(20, 6))
    moved = {name for name in before if not torch.equal(before[name], found[name])}
    if nonfinite == "propagate":
        assert "iters" in moved and not found.get("batches_skipped")
    else:
        assert moved == {"batches_skipped"} and found["batches_skipped"] == 1


@numpy_warns
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("steps", [0, 5], ids=["first", "later"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@per("make", {name: KINDS[name] for name in ("power", "unified")})
def test_a_bad_gradient(make, nonfinite, steps, value):
    layer, dy = after(steps, make, nonfinite=nonfinite), randn(20, 6)
    before = state_of(layer)
    dy[3, 1] = value
    found = alike(layer, values(20, 6), dy)
    gradient = [name for name in before if name in ("ema_gz", "buffer_gz")]
    for name in gradient:
        assert torch.equal(before[name], found[name]) == (nonfinite == "skip")
    assert found["iters"] == steps + 1
    if nonfinite == "skip":
        assert found["gradients_skipped"] == 1 and not found["batches_skipped"]
    else:
        assert not found["ema_gz"][1].isfinite() and found["ema_gz"][0].isfinite()


@numpy_warns
@pytest.mark.parametrize("channel", [3, 1200])
@per("make", {"power": partial(PowerNorm, group_num=None), "unified": partial(UnifiedNorm, window_size=2)})
def test_one_bad_channel_of_many(make, channel):
    """More of them than a rule takes at a time."""
    layer = after(5, partial(make, 1300))
    before = state_of(layer)
    x, dy = values(4, 1300), randn(4, 1300)
    bad = torch.zeros_like(x)
    bad[1, channel] = NAN
    alike(layer, x, dy + bad)
    for name, b in layer.named_buffers():
        if name in ("ema_gz", "buffer_gz"):
            assert torch.equal(b, before[name])
    assert layer.iters == 6 and layer.gradients_skipped == 1 and not layer.batches_skipped
    before = state_of(layer)
    found = step(layer, "triton", (x + bad).detach())
    same({name: found[name] for name in before} | {"batches_skipped": torch.tensor(0, device=DEVICE)}, before)
    assert layer.batches_skipped == 1


@numpy_warns
@pytest.mark.parametrize("value", [NAN, INF])
@per("make", KINDS)
def test_what_lies_in_padding_does_not_matter(make, value):
    mask = torch.rand(20, device=DEVICE) < 0.4
    layer, x, dy = after(3, make), values(20, 6).detach(), randn(20, 6)
    clean = step(copy.deepcopy(layer), "triton", x, mask=mask)
    dirty = alike(copy.deepcopy(layer), torch.where(mask[:, None], value, x).requires_grad_(), dy, mask)
    for name in ("running_phi", "running_var", "buffer_x2", "iters"):
        assert name not in clean or torch.equal(clean[name], dirty[name])
    assert torch.equal(clean["y"][~mask], dirty["y"][~mask])


@pytest.mark.parametrize("steps", [0, 4], ids=["first", "later"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@per("make", KINDS)
def test_padding_alone_moves_nothing(make, nonfinite, steps):
    layer = after(steps, make, nonfinite=nonfinite)
    before, mask = state_of(layer), torch.ones(20, dtype=torch.bool, device=DEVICE)
    found = check(layer, values(20, 6), randn(20, 6), mask)
    same({name: found[name] for name in before}, before)
    assert found["y"].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (3, 0, 6)], ids=str)
@per("make", KINDS)
def test_empty_batches(make, shape):
    layer = after(2, make)
    before = state_of(layer)
    found = alike(layer, values(*shape), randn(*shape))
    same({name: found[name] for name in before}, before)
    assert found["dx"].shape == shape and not found["dweight"].any() and not found["dbias"].any()


@pytest.mark.parametrize("shape", [(0, 6, 5, 3), (4, 6, 0, 3)], ids=str)
@pytest.mark.parametrize("last", ["neither", "x", "dy", "both"])
@per("make", {name: KINDS[name] for name in ("power", "unified")})
def test_empty_images(make, last, shape):
    """Whose layout says nothing."""
    layer, x, dy = after(2, make, channel_dim=1), randn(*shape), randn(*shape)
    x = x.contiguous(memory_format=torch.channels_last) if last in ("x", "both") else x
    dy = dy.contiguous(memory_format=torch.channels_last) if last in ("dy", "both") else dy
    found = alike(layer, x.requires_grad_(), dy)
    assert found["dx"].shape == shape and not found["dweight"].any() and not found["dbias"].any()


def test_where_the_filter_draws_the_line():
    """Against the unbiased variance of the window before the step, here of four numbers."""
    iters = torch.tensor(4, device=DEVICE)
    found, wanted = [], []
    for _ in range(40):
        window, q = torch.rand(2, 2, device=DEVICE) + 0.1, torch.rand(2, device=DEVICE) + 0.1
        how = (window, iters, 1e-5, 0.9, 0, 1000, True, False)
        sums = torch.cat((q, torch.ones(1, device=DEVICE))).expand(2, 3).contiguous()
        _, flags = kernels.unified_forward(sums, torch.ones_like(q), *how)
        now = torch.stack((window[0], q))
        assert flags[2] == flags[3]
        found.append(bool(flags[3]))
        wanted.append(bool((now.mean(0) - now.log().mean(0).exp() > 2 * window.sqrt().var()).any()))
    assert found == wanted and 5 < sum(wanted) < 35


def test_after_the_warm_up_no_token_sees_the_others():
    layer, x = after(2, Power, group_num=2), values(50, 6).detach()
    other = torch.cat((x[:1], 100 * x[1:] - 3))
    ours, theirs = (step(copy.deepcopy(layer), "triton", t) for t in (x, other))
    assert torch.equal(ours["y"][0], theirs["y"][0])
    assert not torch.equal(ours["running_phi"], theirs["running_phi"])


@pytest.mark.parametrize("iters", [1, 2, 3])
def test_y_is_written_once(iters):
    """By the sweep after a warm-up of two steps, else by the map."""
    x, d, w, b = values(40, 6).detach(), *torch.rand(3, 6, device=DEVICE)
    number = torch.tensor(iters, device=DEVICE)
    y, sums = kernels.sweep(x, None, d, w, b, number, 2, 2, 1e-5)
    assert sums.isfinite().all() and (y.isfinite().all() if iters >= 2 else y.isnan().all())
    always, later = torch.full_like(x, NAN), torch.full_like(x, NAN)
    rows, flags = torch.rand(4, 6, device=DEVICE), torch.tensor([iters, 1, 0, 0, 1], device=DEVICE)
    rows[0] = torch.rsqrt(d + 1e-5)
    skipped = torch.tensor(7, device=DEVICE)
    kernels.map_into(later, x, rows, w, b, 2, 2, None, flags, d, None, number, None, skipped)
    assert later.isnan().all() if iters >= 2 else later.isfinite().all()
    kernels.map_into(always, x, rows, w, b, None, 2, None)
    torch.testing.assert_close(always, y if iters >= 2 else later)
    assert torch.equal(d, rows[3]) and number == iters + 1 and skipped == 8


@per("make", {"power": Power, "unified": Unified})
def test_a_step_without_recording(make):
    layer, x = prepared(make), values(20, 6)
    recorded = step(copy.deepcopy(layer), "triton", x)
    with torch.no_grad():
        same(step(layer, "triton", x), recorded)
    assert layer.iters == 1


def test_runs_are_bitwise_equal():
    for make in KINDS.values():
        layer, x, dy = prepared(make), values(900, 6), randn(900, 6)
        first, second = (step(copy.deepcopy(layer), "triton", x, dy) for _ in range(2))
        same(first, second)


@pytest.mark.parametrize(("masked", "warmup"), [(False, 3), (True, 0)], ids=["warm-up", "masked, later"])
def test_operators_are_well_formed(masked, warmup):
    def opcheck(name, *args):
        operator = getattr(torch.ops.normzoo, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        return operator(*args)

    def number(n):
        return torch.tensor(n, device=DEVICE)

    d, w, b, ema = (torch.rand(6, device=DEVICE) for _ in range(4))
    windows, skips = torch.rand(2, 3, 6, device=DEVICE), number(1) if masked else None
    rows, flags = torch.rand(4, 6, device=DEVICE), torch.tensor([2, 1, 0, 0, 0], device=DEVICE)
    for x in (randn(4, 6, 5), randn(4, 5, 6).transpose(1, 2), randn(5, 6, 4).permute(2, 1, 0)):
        mask = torch.rand(len(x), *x.shape[2:], device=DEVICE) < 0.4 if masked else None
        y, sums = opcheck("running_sweep", x, mask, d, w, b, number(2), warmup, 2, 1e-5)
        opcheck("running_sweep", x, mask, None, w, None, None, 0, 0, 1e-5)
        opcheck("running_map", y, x, d, w, b, None, 2, 1e-5)
        how = (flags, d.clone(), windows[0].clone(), number(2), number(0), skips)
        opcheck("running_map", y, x, rows, w, b, warmup, 2, None, *how)
        opcheck("running_gradient", x.clone(), x, rows, w, ema, 0.1, 2)
        _, slopes = opcheck("running_gradient", x.clone(), x, None, None, None, 0.0, 0)
        how = (flags, d.clone(), windows[0].clone(), skips)
        opcheck("running_late_gradient", x.clone(), x, rows, 0, masked, *how)
    opcheck("power_statistics", sums, d, number(2), 1e-5, 0.9, warmup, True, masked)
    some = (slopes[1].clone(), torch.tensor(9.0, device=DEVICE)) if masked else (None, None)
    given = (slopes, *some, 9, rows, flags, w, torch.bfloat16)
    opcheck("power_gradient", *given, ema.clone(), skips, 0.1, masked)
    opcheck("unified_statistics", sums, d, windows[0], number(2), 1e-5, 0.9, warmup, 1000, True, masked)
    opcheck("unified_gradient", *given, ema, windows[1], 0.9, warmup, masked)


COMPILED = {
    "power": partial(PowerNorm, 3, warmup_iters=3, channel_dim=1),
    "power, as in the paper": partial(
        PowerNorm,
        3,
        affine=False,
        warmup_iters=2,
        group_num=None,
        backward="paper",
        channel_dim=1,
        nonfinite="propagate",
    ),
    "unified": partial(UnifiedNorm, 3, (3, 2), 3, outlier_filtration=True, channel_dim=1),
}


@per("make", COMPILED)
def test_compiled_is_eager_over_the_edges(make):
    before = launches.copy()
    with normzoo.backend("triton"):
        compiled_is_eager(make().to(DEVICE), [x.to(DEVICE) for x in batches(5)])
    found = launches - before
    assert found["running_forward"] == 20 and found["running_backward"] >= 10


def _unavailable(*args):
    raise KernelUnavailable("running: no compiler")


LAUNCHERS = [
    *((Power, name) for name in ("sweep", "power_forward", "map_into", "gradient", "power_backward")),
    *((Unified, name) for name in ("sweep", "unified_forward", "map_into")),
    *((Unified, name) for name in ("gradient", "unified_backward", "late_gradient")),
]
per_launcher = pytest.mark.parametrize(
    ("make", "launcher"), LAUNCHERS, ids=lambda v: v if isinstance(v, str) else ""
)


@per_launcher
def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(monkeypatch, make, launcher):
    """By the eager engine, which counts the step once."""
    monkeypatch.setattr(kernels, launcher, _unavailable)
    monkeypatch.setattr(normzoo.running, "use_kernel", lambda *args, **kwargs: True)
    warn_once.cache_clear()
    for steps in (0, 5):
        layer, x, dy = after(steps, make), values(20, 6), randn(20, 6)
        mask = torch.rand(20, device=DEVICE) < 0.3
        eager = copy.deepcopy(layer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = step(layer, "auto", x, dy, mask)
        with monkeypatch.context() as plain:
            plain.setattr(normzoo.running, "use_kernel", lambda *args, **kwargs: False)
            wanted = step(eager, "reference", x, dy, mask)
        assert len(said) == (steps == 0) and all("no compiler" in str(w.message) for w in said)
        torch.testing.assert_close(ours, wanted)
        assert ours["iters"] == steps + 1


@per_launcher
def test_a_kernel_that_does_not_compile_is_an_error_where_it_was_asked_for(monkeypatch, make, launcher):
    monkeypatch.setattr(kernels, launcher, _unavailable)
    layer = after(3, make)
    before = state_of(layer)
    with pytest.raises(KernelUnavailable, match="no compiler"):
        step(layer, "triton", values(20, 6), randn(20, 6))
    backward = launcher.endswith(("gradient", "backward"))
    assert layer.iters == 3 + backward
    same({"ema_gz": layer.ema_gz}, {"ema_gz": before["ema_gz"]})


def test_an_eval_kernel_that_does_not_compile(monkeypatch):
    monkeypatch.setattr(kernels, "map_into", _unavailable)
    layer, x = prepared(Power).eval(), values(20, 6).detach()
    wanted = step(layer, "reference", x)["y"]
    with pytest.raises(KernelUnavailable, match="no compiler"):
        step(layer.requires_grad_(False), "triton", x)
    monkeypatch.setattr(normzoo.running, "use_kernel", lambda *args, **kwargs: True)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiler"):
        assert torch.equal(step(layer, "auto", x)["y"], wanted)


@pytest.mark.parametrize("training", [True, False])
def test_what_the_kernels_cannot_take(monkeypatch, training):
    """float64, statistics that are no float32, groups that no program holds: an error if the kernels were
    asked for, else the eager engine."""
    wide = PowerNorm(8193, warmup_iters=0).to(DEVICE)
    double, mixed = prepared(Power, torch.float64), prepared(Unified, torch.float64)
    calls = (
        (double, values(20, 6).double(), "the input is torch.float64"),
        (mixed, values(20, 6), "statistics in float32, these are torch.float64"),
        (wide, values(2, 8193), "groups of up to 8192 channels, here they have 8193"),
    )
    for layer, x, message in calls:
        layer.train(training).requires_grad_(False)
        before, x = state_of(layer), x.detach()
        with pytest.raises(RuntimeError, match=message):
            step(layer, "triton", x)
        same(state_of(layer), before)
        wanted = step(copy.deepcopy(layer), "reference", x)
        with monkeypatch.context() as patch:
            patch.setattr(normzoo.running, "use_kernel", lambda *args, **kwargs: True)
            found = step(layer, "auto", x)
        if x.dtype == torch.float32:
            same(found, wanted)
