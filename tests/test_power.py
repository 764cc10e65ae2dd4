"""PowerNorm against the oracle, what destroys the state of the authors' code, and the function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mean_square_oracle import Pair, Power, near
from training import same, tensors

from normzoo import PowerNorm, RMSNorm
from normzoo.functional import power_norm

C = 6
COUNTS = (5, 1, 4, 2, 1, 7, 3)
"""Tokens of each step of training, down to one."""

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backward", ["official", "paper"])
@pytest.mark.parametrize("group_num", [None, 1, 3])
@pytest.mark.parametrize("warmup_iters", [0, 1, 2, 3, 9])
def test_every_step_is_the_oracles(warmup_iters, group_num, backward):
    """Around the end of the warm-up, and with any number of tokens."""
    pair = Pair(PowerNorm, C, warmup_iters=warmup_iters, group_num=group_num, backward=backward)
    for tokens in COUNTS:
        pair.train(2 * torch.randn(tokens, C).double() + 1)
    for name, b in pair.layer.state_dict().items():
        assert b.dtype == (torch.long if name == "iters" else torch.float64), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group_num", [None, 2])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((5, C), -1), ((5, C), 1), ((3, 4, C), 2), ((2, 3, 2, C), -1), ((3, C, 4), 1), ((2, C, 3, 2), -3)],
)
def test_layouts_and_padding(shape, channel_dim, group_num, masked):
    ours = {"channel_dim": channel_dim}
    options = {"warmup_iters": 2, "group_num": group_num, "alpha_fwd": 0.7, "alpha_bkw": 0.2, "eps": 1e-3}
    pair = Pair(PowerNorm, C, ours, **options)
    for _ in range(4):
        x = 3 * torch.randn(shape).double()
        pad = None
        if masked:
            pad = torch.rand(x.movedim(channel_dim, -1).shape[:-1]) < 0.4
            pad.view(-1)[:2] = torch.tensor([True, False])  # some, but not all
        pair.train(x, pad)


@pytest.mark.parametrize(
    ("left_out", "named"), [({"affine": False}, set()), ({"bias": False}, {"weight"})], ids=["affine", "bias"]
)
def test_without_parameters(left_out, named):
    pair = Pair(PowerNorm, C, left_out, warmup_iters=1)
    assert {name for name, _ in pair.layer.named_parameters()} == named
    for _ in range(3):
        pair.train(torch.randn(4, C).double())


def test_float64_through_a_float32_layer():
    layer, oracle = PowerNorm(C, warmup_iters=2), Power(C, warmup_iters=2)
    for _ in range(4):
        x, dy = torch.randn(2, 5, C).double()
        y = layer(x.requires_grad_())
        y.backward(dy)
        expected, kept = oracle.forward(x.detach().numpy())
        dx, dw, db = oracle.backward(kept, dy.numpy())
        near("y", y, expected, 1e-7)
        near("dx", x.grad, dx, 1e-7)
        near("dweight", layer.weight.grad.double(), dw, 1e-6)
        near("dbias", layer.bias.grad.double(), db, 1e-6)
        near("running_phi", layer.running_phi.double(), oracle.running_phi, 1e-6)
        near("ema_gz", layer.ema_gz.double(), oracle.ema_gz, 1e-6)
        assert y.dtype == torch.float64 and layer.running_phi.dtype == torch.float32
        layer.zero_grad()


def test_a_group_scaling_is_an_rms_norm():
    x = torch.randn(4, C)
    scaled = RMSNorm(C, eps=1e-5, elementwise_affine=False)(x)
    layers = PowerNorm(C, warmup_iters=5), PowerNorm(C, warmup_iters=5, group_num=None)
    torch.testing.assert_close(layers[0](x), layers[1](scaled))
    torch.testing.assert_close(layers[0].running_phi, layers[1].running_phi)


# What destroys the state.


@pytest.mark.parametrize("steps_before", [0, 1, 4], ids=["first step", "warm-up", "after it"])
@pytest.mark.parametrize("group_num", [None, 2])
def test_padding_alone_moves_nothing(group_num, steps_before):
    pair = Pair(PowerNorm, C, warmup_iters=3, group_num=group_num)
    layer, oracle = pair.layer, pair.oracle
    for _ in range(steps_before):
        pair.train(torch.randn(5, C).double())
    before = tensors(layer)
    x, nothing = torch.randn(5, C).double().requires_grad_(), torch.ones(5, dtype=torch.bool)
    y = layer(x, nothing)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    near("y", y, oracle.evaluate(pair.tokens(x)))  # the stored statistic stands in, whatever the phase
    same(tensors(layer), before)
    layer.zero_grad()
    pair.train(torch.randn(5, C).double())  # is the next step, not the one after it

    oracle.forward(pair.tokens(x), nothing.numpy())
    for _ in range(3):
        y, _ = oracle.forward(pair.tokens(x))
    assert np.isnan(oracle.running_phi).all() and np.isnan(y).all()


def test_an_empty_batch_with_a_mask():
    layer = PowerNorm(C)
    layer(torch.randn(3, C))
    before = tensors(layer)
    x = torch.empty(0, 4, C, requires_grad=True)
    layer(x, torch.ones(0, 4, dtype=torch.bool)).sum().backward()
    same(tensors(layer), before)
    assert x.grad.shape == (0, 4, C)


def test_squares_that_overflow_in_half_precision():
    x = 300 * (torch.randint(0, 2, (5, C)) * 2.0 - 1).half()
    layer, oracle = PowerNorm(C, group_num=None).half(), Power(C, group_num=None, dtype=np.float16)
    assert layer.running_phi.dtype == layer.ema_gz.dtype == torch.float32
    for _ in range(3):
        y = layer(x.requires_grad_())
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(y.abs(), torch.ones_like(y))
        oracle.forward(x.detach().numpy())
    torch.testing.assert_close(layer.running_phi, torch.full((C,), 9e4))
    assert x.grad.isfinite().all() and layer.gradients_skipped == layer.batches_skipped == 0
    y = layer.eval()(x)
    assert y.dtype == torch.half
    torch.testing.assert_close(y.abs(), torch.ones_like(y))
    assert np.isinf(oracle.running_phi).all() and (oracle.evaluate(x.detach().numpy()) == 0).all()


def test_squares_of_groups_that_overflow_in_half_precision():
    x = 300 * (torch.randint(0, 2, (5, C)) * 2.0 - 1).half()
    layer, oracle = PowerNorm(C).half(), Power(C, dtype=np.float16)
    for _ in range(3):
        layer(x)
        oracle.forward(x.numpy())
    torch.testing.assert_close(layer.running_phi, torch.ones(C))
    usual = torch.ones(1, C).half()
    torch.testing.assert_close(layer.eval()(usual), usual)
    assert oracle.evaluate(usual.numpy()).min() > 300


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("backward", ["official", "paper"])
@pytest.mark.parametrize("warmup_iters", [0, 9])
def test_a_gradient_that_is_not_finite(warmup_iters, backward, bad):
    """A usual thing with AMP, whose scaler skips the step of the optimizer but cannot mend the state."""
    pair = Pair(PowerNorm, C, warmup_iters=warmup_iters, backward=backward)
    layer, oracle = pair.layer, pair.oracle
    for _ in range(3):
        pair.train(torch.randn(5, C).double())
    step = pair.forward(torch.randn(5, C).double())
    before = tensors(layer)
    dy = step.dy.clone()
    dy[1, 2] = bad
    (dx,) = torch.autograd.grad(step.y, step.x, dy, retain_graph=True)
    assert not dx.isfinite().all()  # so that the scaler sees it
    before["gradients_skipped"] += 1
    same(tensors(layer), before)
    assert "gradients_skipped" not in layer.state_dict()
    pair.backward(step)
    pair.train(torch.randn(5, C).double())
    layer.eval()(torch.randn(5, C).double())
    assert layer.gradients_skipped == 1 and layer.batches_skipped == 0

    with np.errstate(all="ignore"):
        oracle.backward(step.kept, dy.numpy())
        for _ in range(5):
            _, kept = oracle.forward(pair.tokens(step.x))
            dx, _, _ = oracle.backward(kept, step.dy.numpy())
    assert np.isnan(dx[:, 2]).all() and not np.isfinite(oracle.ema_gz[2])


@pytest.mark.parametrize("bad", [NAN, INF, 1e200])
def test_an_input_that_is_not_finite(bad):
    """Neither its forward pass nor its backward pass moves anything, and both are counted once."""
    pair = Pair(PowerNorm, C, warmup_iters=2, group_num=None)
    layer, oracle = pair.layer, pair.oracle
    careless = PowerNorm(C, warmup_iters=2, group_num=None, nonfinite="propagate").double()
    careless.load_state_dict(layer.state_dict())
    assert careless.batches_skipped is None and careless.gradients_skipped is None
    for x in torch.randn(3, 5, C).double():
        pair.train(x)
        careless(x)
    before = tensors(layer)
    x = torch.randn(5, C).double()
    x[1, 2] = bad
    layer(x.requires_grad_()).sum().backward()
    before["batches_skipped"] += 1
    same(tensors(layer), before)
    layer.zero_grad()
    for other in torch.randn(2, 5, C).double():
        pair.train(other)
    layer.reset_running_stats()
    assert layer.batches_skipped == 0

    for other in (x, *torch.randn(4, 5, C).double()):
        oracle.forward(pair.tokens(other))
        careless(other)
    for lost in (oracle.evaluate(pair.tokens(x)[2:]), careless.eval()(x[2:]).detach().numpy()):
        assert not np.ptp(lost[:, 2]) > 0 and np.isfinite(lost[:, :2]).all()  # the bias alone, or NaN
    assert not np.isfinite(oracle.running_phi[2]) and not careless.running_phi[2].isfinite()


def test_a_statistic_that_does_not_fit_the_buffer():
    layer, x = PowerNorm(C, group_num=None), torch.randn(5, C).double()
    before = tensors(layer)
    y = layer((1e25 * x).requires_grad_())  # finite in float64, and its square too
    torch.testing.assert_close(y, power_norm(1e25 * x, group_num=None))
    y.sum().backward()
    before["batches_skipped"] += 1
    same(tensors(layer), before)


def test_a_gradient_statistic_that_does_not_fit_the_buffer():
    layer = PowerNorm(C)
    y = layer(torch.randn(5, C).double().requires_grad_())
    before = tensors(layer)
    y.backward(torch.full_like(y, 1e45))
    before["gradients_skipped"] += 1
    same(tensors(layer), before)


def test_the_correction_of_a_quiet_channel():
    """Hazard of the authors' backward pass: z by the stored statistic, the gradient by that of the batch."""
    steps = {}
    for backward in ("official", "paper"):
        layer = PowerNorm(C, warmup_iters=0, group_num=None, backward=backward)
        x = torch.randn(8, C)
        x[:, 0] = 0
        layer(x.requires_grad_()).backward(torch.ones(8, C))
        steps[backward] = x.grad
    assert (steps["official"][:, 0] > 300).all()
    torch.testing.assert_close(steps["paper"], torch.ones(8, C))


REFUSED = {
    "num_features": ({"num_features": 0}, ValueError, "num_features is 0; it must be a positive int"),
    "eps": ({"eps": 0}, ValueError, "eps is 0; it must be a positive finite number"),
    "alpha_fwd": ({"alpha_fwd": 1.1}, ValueError, "alpha_fwd is 1.1; it must be a number from 0 to 1"),
    "alpha_bkw": ({"alpha_bkw": -0.1}, ValueError, "alpha_bkw is -0.1; it must be a number from 0 to 1"),
    "warm-up": ({"warmup_iters": -1}, ValueError, "warmup_iters is -1; it must be an int, 0 or more"),
    "warm-up of floats": ({"warmup_iters": 1e4}, ValueError, "warmup_iters is 10000.0; it must be an int"),
    "groups": ({"group_num": 4}, ValueError, "group_num is 4; it must divide num_features = 6, or be None"),
    "no groups": ({"group_num": 0}, ValueError, "group_num is 0; it must be a positive int"),
    "backward": ({"backward": "exact"}, ValueError, "backward is 'exact'; it must be one of official, paper"),
    "channel_dim": ({"channel_dim": 0}, ValueError, "channel_dim is 0; it must be an int other than 0"),
    "a float for it": ({"channel_dim": 1.0}, ValueError, r"channel_dim is 1.0; it must be an int other"),
    "nonfinite": ({"nonfinite": "raise"}, ValueError, "nonfinite is 'raise'; it must be one of"),
    "sync": ({"sync": 1}, TypeError, "sync is 1; it must be True or False"),
    "a group": ({"process_group": object()}, ValueError, "process_group is given and sync is False"),
}


@pytest.mark.parametrize(("options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_are_refused(options, error, match):
    with pytest.raises(error, match=f"^PowerNorm: {match}"):
        PowerNorm(**{"num_features": C, **options})


def test_what_it_says_of_itself():
    said = "6, eps=1e-05, alpha_fwd=0.9, alpha_bkw=0.9, affine=True, warmup_iters=10000, group_num=1, "
    said += "backward='official', channel_dim=-1"
    assert repr(PowerNorm(C)) == f"PowerNorm({said})"
    other = PowerNorm(C, 1e-3, 0.8, 0.7, False, 5, None, "paper", 1, sync=True, nonfinite="propagate")
    said = "6, eps=0.001, alpha_fwd=0.8, alpha_bkw=0.7, affine=False, warmup_iters=5, group_num=None, "
    said += "backward='paper', channel_dim=1, sync=True, nonfinite='propagate'"
    assert repr(other) == f"PowerNorm({said})"
