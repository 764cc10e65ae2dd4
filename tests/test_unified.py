"""UnifiedNorm against the oracle, what destroys the state of the authors' code, and the function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mean_square_oracle import Pair, Unified, near
from test_power import COUNTS, INF, NAN
from training import same, tensors

from normzoo import UnifiedNorm
from normzoo.functional import unified_norm

C = 5


def batch(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape or (6, C)).double() + 0.5


@pytest.mark.parametrize("outlier_filtration", [False, True])
@pytest.mark.parametrize("warmup_iters", [0, 2, 5])
@pytest.mark.parametrize("window_size", [1, 2, (3, 3), (2, 4), (4, 1), (1, 3), [9, 9]], ids=str)
def test_every_step_is_the_oracles(window_size, warmup_iters, outlier_filtration):
    """Around the end of the warm-up and of the filling of both windows, with any number of tokens."""
    size = window_size if isinstance(window_size, int) else tuple(window_size)
    if outlier_filtration and size in (1, (1, 3)):
        warmup_iters += 2  # in the first step the test of the filter is 0 > 0, but for rounding
    options = {"warmup_iters": warmup_iters, "outlier_filtration": outlier_filtration}
    pair = Pair(UnifiedNorm, C, window_size=size, **options)
    for tokens in COUNTS:
        pair.train(batch(tokens, C))
    for name, b in pair.layer.state_dict().items():
        counts = name in ("iters", "skip_counter")
        assert b.dtype == (torch.long if counts else torch.float64), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((5, C), -1), ((5, C), 1), ((3, 4, C), 2), ((2, 3, 2, C), -1), ((3, C, 4), 1), ((2, C, 3, 2), -3)],
)
def test_layouts_and_padding(shape, channel_dim, masked):
    ours = {"channel_dim": channel_dim}
    pair = Pair(UnifiedNorm, C, ours, window_size=(2, 3), warmup_iters=2, decay=0.6, eps=1e-3)
    pair.start_at(997)
    for _ in range(6):
        pad = None
        if masked:
            pad = torch.rand(torch.empty(shape).movedim(channel_dim, -1).shape[:-1]) < 0.4
            pad.view(-1)[:2] = torch.tensor([True, False])  # some, but not all
        pair.train(batch(*shape), pad)


@pytest.mark.parametrize(
    ("left_out", "named"), [({"affine": False}, set()), ({"bias": False}, {"weight"})], ids=["affine", "bias"]
)
def test_without_parameters(left_out, named):
    pair = Pair(UnifiedNorm, C, left_out, warmup_iters=1, window_size=2)
    assert {name for name, _ in pair.layer.named_parameters()} == named
    pair.start_at(999)
    for _ in range(4):
        pair.train(batch())


@pytest.mark.parametrize(("warmup_iters", "last"), [(0, 1000), (999, 1000), (1001, 1001), (1003, 1003)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("window_size", [1, 2, (3, 1)], ids=str)
def test_compensation(window_size, scale, warmup_iters, last):
    """Of the gradient alone, within a factor of 5, and never with a window of one."""
    pair = Pair(UnifiedNorm, C, window_size=window_size, warmup_iters=warmup_iters)
    pair.start_at(last - 3)
    for step in range(1, 6):
        kept = pair.train(batch(scale=scale)).kept
        assert (kept.r != 1).any() == (step > 3 and window_size != 1)


def test_the_ends_of_the_compensation_are_reached():
    for scale, end in ((1e3, 5), (0.03, 1 / 5)):
        pair = Pair(UnifiedNorm, C, window_size=2, warmup_iters=0)
        pair.start_at(1000)
        pair.layer.buffer_x2.fill_(scale**2)
        pair.oracle.buffer_x2[:] = scale**2
        kept = pair.train(scale * torch.randn(6, C).double()).kept
        assert (kept.r == end).all()


@pytest.mark.parametrize("preset", [0, 1000])
@pytest.mark.parametrize("window_size", [3, (4, 2)], ids=str)
def test_the_filter(window_size, preset):
    """A jump goes by its own statistics, is kept out of both windows, and is counted."""
    pair = Pair(UnifiedNorm, C, window_size=window_size, warmup_iters=3, outlier_filtration=True)
    pair.start_at(preset)
    skipped = []
    scales = torch.tensor([0.5, 1.0, 1.0, 1.5, 2.0])  # channels differ, which is what the filter allows for
    for scale in (1, 1.2, 1, 1.1, 1, 60, 1, 1, 0.9, 1):
        step = pair.train(scale * scales.double() * (1 + 0.1 * torch.rand(6, C).double()))
        skipped.append(bool(step.kept.skip))
    assert skipped[5] and sum(skipped[5:]) < 5
    assert pair.layer.skip_counter == pair.oracle.skip_counter == sum(skipped)


def test_a_lock_in_of_the_filter_can_be_seen():
    """Hazard of the filter: where no channel differs from another, every later batch is an outlier."""
    pair = Pair(UnifiedNorm, 2, window_size=2, warmup_iters=0, outlier_filtration=True)
    found = []
    for _ in range(12):
        pair.train(batch(40, 2, scale=5.0))
        found.append(int(pair.layer.skip_counter))
    assert found[-1] - found[5] >= 5  # of six
    assert pair.layer.state_dict()["skip_counter"] == found[-1]
    pair.layer.reset_running_stats()
    assert pair.layer.skip_counter == 0


def test_a_filter_of_one_number():
    """It has no variance, and what it holds is the mean of itself."""
    pair = Pair(UnifiedNorm, 1, window_size=1, warmup_iters=0, outlier_filtration=True)
    for scale in (1.0, 50.0, 1.0):
        pair.train(batch(6, 1, scale=scale))
    assert pair.layer.skip_counter == 0


def test_float64_through_a_float32_layer():
    layer, oracle = UnifiedNorm(C, 2, 2), Unified(C, 2, 2)
    layer.iters += 998
    oracle.iters += 998
    layer.buffer_x2 += 1
    oracle.buffer_x2 += 1
    for _ in range(4):
        x, dy = torch.randn(2, 5, C).double()
        y = layer(x.requires_grad_())
        y.backward(dy)
        expected, kept = oracle.forward(x.detach().numpy())
        dx, dw, db = oracle.backward(kept, dy.numpy())
        near("y", y, expected, 1e-6)
        near("dx", x.grad, dx, 1e-6)
        near("dweight", layer.weight.grad.double(), dw, 1e-6)
        near("dbias", layer.bias.grad.double(), db, 1e-6)
        for name, value in oracle.state().items():
            near(name, getattr(layer, name).to(torch.from_numpy(value).dtype), value, 1e-6)
        assert y.dtype == torch.float64 and layer.buffer_x2.dtype == torch.float32
        layer.zero_grad()


# What destroys the state.


@pytest.mark.parametrize("outlier_filtration", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 2, 5])
def test_padding_alone_moves_nothing(steps_before, outlier_filtration):
    pair = Pair(UnifiedNorm, C, window_size=2, warmup_iters=2, outlier_filtration=outlier_filtration)
    layer, oracle = pair.layer, pair.oracle
    for _ in range(steps_before):
        pair.train(batch())
    before = tensors(layer)
    x, nothing = batch().requires_grad_(), torch.ones(6, dtype=torch.bool)
    y = layer(x, nothing)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    if steps_before < 2:  # else it is a mean with the window
        torch.testing.assert_close(y, layer.eval()(x))
        layer.train()
    same(tensors(layer), before)
    layer.zero_grad()
    pair.train(batch())

    oracle.forward(pair.tokens(x), nothing.numpy())
    for _ in range(5):
        oracle.forward(pair.tokens(x))
    assert np.isnan(oracle.running_var).all() and np.isnan(oracle.evaluate(pair.tokens(x))).all()


def test_an_empty_batch_with_a_mask():
    layer = UnifiedNorm(C)
    layer(torch.randn(3, C))
    before = tensors(layer)
    x = torch.empty(0, 4, C, requires_grad=True)
    layer(x, torch.ones(0, 4, dtype=torch.bool)).sum().backward()
    same(tensors(layer), before)
    assert x.grad.shape == (0, 4, C)


def test_squares_that_overflow_in_half_precision():
    x = 300 * (torch.randint(0, 2, (5, C)) * 2.0 - 1).half()
    layer = UnifiedNorm(C, 2, 0).half()
    oracle = Unified(C, 2, 0, dtype=np.float16)
    for name, b in layer.named_buffers():
        assert b.dtype == (torch.float32 if b.is_floating_point() else torch.long), name
    for _ in range(4):
        y = layer(x.requires_grad_())
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(y.abs(), torch.ones_like(y))
        oracle.forward(x.detach().numpy())
    torch.testing.assert_close(layer.buffer_x2, torch.full((2, C), 9e4))
    torch.testing.assert_close(layer.running_var, torch.full((C,), 0.9**4 + (1 - 0.9**4) * 9e4))
    assert x.grad.isfinite().all() and layer.gradients_skipped == layer.batches_skipped == 0
    evaluated = layer.eval()(x)
    assert evaluated.dtype == torch.half
    torch.testing.assert_close(evaluated.abs(), torch.full_like(x, 300 / layer.running_var[0].sqrt().item()))
    assert np.isinf(oracle.running_var).all() and (oracle.evaluate(x.detach().numpy()) == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("steps_before", [1, 4])
def test_a_gradient_that_is_not_finite(steps_before, bad):
    pair = Pair(UnifiedNorm, C, window_size=2, warmup_iters=1)
    layer, oracle = pair.layer, pair.oracle
    for _ in range(steps_before):
        pair.train(batch())
    step = pair.forward(batch())
    before = tensors(layer)
    dy = step.dy.clone()
    dy[1, 2] = bad
    (dx,) = torch.autograd.grad(step.y, step.x, dy, retain_graph=True)
    assert not dx.isfinite().all()  # so that the scaler sees it
    before["gradients_skipped"] += 1
    same(tensors(layer), before)
    assert "gradients_skipped" not in layer.state_dict()
    pair.backward(step)
    pair.train(batch())
    layer.eval()(batch())
    assert layer.gradients_skipped == 1 and layer.batches_skipped == 0
    layer.reset_running_stats()
    assert layer.gradients_skipped == 0

    with np.errstate(all="ignore"):
        oracle.backward(step.kept, dy.numpy())
        for _ in range(5):
            _, kept = oracle.forward(pair.tokens(batch()))
            dx, _, _ = oracle.backward(kept, step.dy.numpy())
    assert not np.isfinite(dx[:, 2]).any() and not np.isfinite(oracle.ema_gz[2])


@pytest.mark.parametrize("outlier_filtration", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, 1e200])
def test_an_input_that_is_not_finite(bad, outlier_filtration):
    options = {"window_size": 2, "warmup_iters": 1, "outlier_filtration": outlier_filtration}
    pair = Pair(UnifiedNorm, C, **options)
    layer, oracle = pair.layer, pair.oracle
    careless = UnifiedNorm(C, **options, nonfinite="propagate").double()
    assert careless.batches_skipped is None and careless.gradients_skipped is None
    for _ in range(3):
        pair.train(x := batch())
        careless(x)
    before = tensors(layer)
    x = batch()
    x[1, 2] = bad
    layer(x.requires_grad_()).sum().backward()
    before["batches_skipped"] += 1
    same(tensors(layer), before)
    layer.zero_grad()
    for _ in range(3):
        pair.train(batch())
    layer.reset_running_stats()
    assert layer.batches_skipped == 0

    for other in (x, *(batch() for _ in range(4))):
        oracle.forward(pair.tokens(other))
        careless(other)
    for lost in (oracle.evaluate(pair.tokens(batch())), careless.eval()(batch()).detach().numpy()):
        assert not np.ptp(lost[:, 2]) > 0 and np.isfinite(lost[:, :2]).all()  # the bias alone, or NaN


@pytest.mark.parametrize("large", [1e25, 1e19])
def test_a_statistic_that_does_not_fit_the_buffer(large):
    """1e19 has a square that fits, but not that of every entry in a window."""
    layer, x = UnifiedNorm(C, 2, 9), 1 + torch.rand(5, C).double()
    x[:, 2] *= 2
    before = tensors(layer)
    y = layer((large * x).requires_grad_())
    torch.testing.assert_close(y, unified_norm(large * x))
    y.sum().backward()
    before["batches_skipped"] += 1
    same(tensors(layer), before)


def test_a_gradient_statistic_that_does_not_fit_the_buffer():
    layer = UnifiedNorm(C)
    y = layer(batch().requires_grad_())
    before = tensors(layer)
    y.backward(torch.full_like(y, 1e39))  # what the window holds does not fit, the average of a tenth does
    before["gradients_skipped"] += 1
    same(tensors(layer), before)


@pytest.mark.parametrize("tiny", [0.0, 1e-4])
def test_a_dead_channel_in_the_window(tiny):
    """The authors' later outputs of it are 316 times too large, those of ours go by the batches without it."""
    layer = UnifiedNorm(C, 4, 0).double()
    oracle = Unified(C, 4, 0)
    theirs, ours = [], []
    x = torch.randn(8, C).double()
    for step in range(12):
        x = batch(scale=1) if step != 6 else batch(scale=1) * torch.tensor([1, 1, tiny, 1, 1]).double()
        y = layer(x)
        expected, _ = oracle.forward(x.numpy())
        ours.append(y.detach().numpy())
        theirs.append(expected)
        alive = [0, 1, 3, 4]
        near("y", y[:, alive], expected[:, alive])
        if step < 6 or step > 9:
            near("y", y, expected, 0.2 if step > 9 else 1e-12)
        window = layer.buffer_x2[:, 2].numpy()
        if step in (6, 7, 8, 9):
            without = np.exp(np.log(window[window > 1e-5]).mean())
            near("y", y[:, 2], x[:, 2].numpy() / np.sqrt(without + 1e-5))
            assert len(window[window > 1e-5]) == 3
    amounts = [np.abs(np.stack(ys)[7:10, :, 2]).max() for ys in (ours, theirs)]
    assert amounts[0] < 5
    assert amounts[1] > (200 if tiny == 0 else 5 * amounts[0])
    assert (layer.running_var > 0.5).all()


def test_a_channel_that_is_always_dead():
    layer, x = UnifiedNorm(C, 2, 0), torch.randn(8, C)
    x[:, 2] = 0
    for _ in range(5):
        x.grad = None
        y = layer(x.requires_grad_())
        y.sum().backward()
        assert (y[:, 2] == 0).all() and x.grad.isfinite().all()
    torch.testing.assert_close(layer.running_var[2], torch.tensor(0.9**5))
    assert layer.batches_skipped == layer.gradients_skipped == 0


REFUSED = {
    "num_features": ({"num_features": 0}, ValueError, "num_features is 0; it must be a positive int"),
    "eps": ({"eps": NAN}, ValueError, "eps is nan; it must be a positive finite number"),
    "decay": ({"decay": 1.1}, ValueError, "decay is 1.1; it must be a number from 0 to 1"),
    "warm-up": ({"warmup_iters": -1}, ValueError, "warmup_iters is -1; it must be an int, 0 or more"),
    "no window": ({"window_size": 0}, ValueError, "window_size is 0; it must be a positive int, or a pair"),
    "half a window": ({"window_size": (2, 0)}, ValueError, r"window_size is \(2, 0\); it must be"),
    "three": ({"window_size": (2, 2, 2)}, ValueError, r"window_size is \(2, 2, 2\); it must be"),
    "a bool": ({"window_size": True}, ValueError, "window_size is True; it must be"),
    "a float": ({"window_size": 4.0}, ValueError, "window_size is 4.0; it must be"),
    "filter": ({"outlier_filtration": 1}, TypeError, "outlier_filtration is 1; it must be True or False"),
    "channel_dim": ({"channel_dim": 0}, ValueError, "channel_dim is 0; it must be an int other than 0"),
    "nonfinite": ({"nonfinite": "raise"}, ValueError, "nonfinite is 'raise'; it must be one of"),
    "sync": ({"sync": None}, TypeError, "sync is None; it must be True or False"),
    "a group": ({"process_group": object()}, ValueError, "process_group is given and sync is False"),
}


@pytest.mark.parametrize(("options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_are_refused(options, error, match):
    with pytest.raises(error, match=f"^UnifiedNorm: {match}"):
        UnifiedNorm(**{"num_features": C, **options})


def test_what_it_says_of_itself():
    said = "5, window_size=4, warmup_iters=4000, outlier_filtration=False, eps=1e-05, decay=0.9, "
    assert repr(UnifiedNorm(C)) == f"UnifiedNorm({said}channel_dim=-1, affine=True)"
    assert UnifiedNorm(C, (3, 3)).window_size == 3
    other = UnifiedNorm(C, (2, 3), 5, True, 1e-3, 0.8, 1, affine=False, sync=True, nonfinite="propagate")
    said = "5, window_size=(2, 3), warmup_iters=5, outlier_filtration=True, eps=0.001, decay=0.8, channel_dim=1"
    assert repr(other) == f"UnifiedNorm({said}, affine=False, sync=True, nonfinite='propagate')"
