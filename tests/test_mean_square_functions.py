"""The functions of PowerNorm and Unified Normalization: the layers in eval, and PN-V with its true gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mean_square_oracle import Pair, Power, near

from normzoo import PowerNorm, UnifiedNorm
from normzoo.functional import power_norm, unified_norm

C = 6


@pytest.mark.parametrize("group_num", [None, 1, 2])
@pytest.mark.parametrize(("shape", "channel_dim"), [((4, C), -1), ((3, C, 2), 1), ((2, 3, 2, C), -1)])
def test_power_norm_by_given_statistics_is_the_layer_in_eval(shape, channel_dim, group_num):
    pair = Pair(PowerNorm, C, {"channel_dim": channel_dim}, group_num=group_num, warmup_iters=1)
    layer, x = pair.layer, torch.randn(shape).double()
    for _ in range(2):
        pair.train(x)
    y = power_norm(x, layer.running_phi, layer.weight, layer.bias, layer.eps, group_num, channel_dim)
    assert torch.equal(y, layer.eval()(x))
    bare = power_norm(x, layer.running_phi, group_num=group_num, channel_dim=channel_dim)
    pair.oracle.weight, pair.oracle.bias = np.ones(C), np.zeros(C)
    pair.near("y", bare, pair.oracle.evaluate(pair.tokens(x)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["of the batch", "given"])
@pytest.mark.parametrize("group_num", [None, 2])
def test_power_norm_has_its_true_derivatives(group_num, given, masked):
    x, w, b = torch.randn(4, 2, C), torch.randn(C), torch.randn(C)
    inputs = [t.double().requires_grad_() for t in (x, w, b)]
    phi = torch.rand(C).double() + 0.5 if given else None
    pad = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]]).bool() if masked else None

    def function(x, w, b):
        return power_norm(x, phi, w, b, 0.1, group_num, -1, pad)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    if not given:
        oracle = Power(C, 0.1, warmup_iters=1, group_num=group_num)
        oracle.weight, oracle.bias = (t.detach().numpy() for t in inputs[1:])
        expected, _ = oracle.forward(
            inputs[0].detach().flatten(0, 1).numpy(), None if pad is None else pad.flatten().numpy()
        )
        near("y", function(*inputs).flatten(0, 1), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group_num", [None, 2])
def test_pn_v_is_a_unified_norm_with_a_window_of_one(group_num, masked):
    layer = UnifiedNorm(C, window_size=1).double()
    pad = torch.rand(5, 3) < 0.4 if masked else None
    x, dy = torch.randn(2, 5, 3, C).double()
    u = x if group_num is None else power_norm(x, torch.ones(C) - 1e-5, group_num=group_num)
    ours, theirs = x.clone().requires_grad_(), u.clone().requires_grad_()
    y = power_norm(ours, None, layer.weight, layer.bias, group_num=group_num, pad_mask=pad)
    expected = layer(theirs, pad)
    torch.testing.assert_close(y, expected)
    if group_num is None and not masked:  # of padding the layer has the authors' gradient
        found = torch.autograd.grad(y, (ours, layer.weight, layer.bias), dy)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (theirs, layer.weight, layer.bias), dy))


def test_power_norm_keeps_its_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = (300 * torch.randn(5, C)).to(dtype)
        for given in (None, torch.full((C,), 9e4)):
            y = power_norm(x, given, torch.ones(C), torch.zeros(C), group_num=None)
            expected = power_norm(x.double(), given, group_num=None)
            torch.testing.assert_close(y, expected.to(dtype))


POWER_REFUSED = {
    "groups": ({"group_num": 4}, ValueError, "group_num is 4; it must divide the 6 channels"),
    "group_num": ({"group_num": 1.0}, ValueError, "group_num is 1.0; it must be a positive int"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0; it must be a positive"),
    "statistic": ({"running_phi": torch.ones(5)}, ValueError, r"running_phi has shape \(5,\)"),
    "weight": ({"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\)"),
    "bias": ({"bias": torch.ones(C).long()}, TypeError, "bias is torch.int64; it must be of a real"),
    "channel_dim": ({"channel_dim": 0}, ValueError, "channel_dim is 0; it must be an int other"),
    "too many": ({"channel_dim": 2}, ValueError, r"shape \(4, 6\) and channel_dim is 2; it must have two"),
    "mask": ({"pad_mask": torch.zeros(4).byte()}, TypeError, "pad_mask is torch.uint8; it must be a tensor of"),
}


@pytest.mark.parametrize(("options", "error", "match"), POWER_REFUSED.values(), ids=POWER_REFUSED)
def test_what_power_norm_refuses(options, error, match):
    with pytest.raises(error, match=f"^power_norm: .*{match}"):
        power_norm(torch.randn(4, C), **options)


@pytest.mark.parametrize(("shape", "channel_dim"), [((4, C), -1), ((3, C, 2), 1), ((2, 3, 2, C), -1)])
def test_unified_norm_by_given_statistics_is_the_layer_in_eval(shape, channel_dim):
    pair = Pair(UnifiedNorm, C, {"channel_dim": channel_dim}, warmup_iters=1)
    layer, x = pair.layer, torch.randn(shape).double()
    for _ in range(2):
        pair.train(x)
    y = unified_norm(x, layer.running_var, layer.weight, layer.bias, layer.eps, channel_dim)
    assert torch.equal(y, layer.eval()(x))
    bare = unified_norm(x, layer.running_var, channel_dim=channel_dim)
    pair.oracle.weight, pair.oracle.bias = np.ones(C), np.zeros(C)
    pair.near("y", bare, pair.oracle.evaluate(pair.tokens(x)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["of the batch", "given"])
def test_unified_norm_has_its_true_derivatives(given, masked):
    x, w, b = (t.double().requires_grad_() for t in (torch.randn(3, C, 2), torch.randn(C), torch.randn(C)))
    var = torch.rand(C).double() + 0.5 if given else None
    pad = torch.tensor([[0, 1], [0, 0], [1, 1]]).bool() if masked else None

    def function(x, w, b):
        return unified_norm(x, var, w, b, 0.1, 1, pad)

    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)
    same_map = power_norm(x, var, w, b, 0.1, None, 1, pad)
    assert torch.equal(function(x, w, b), same_map)


def test_a_window_of_one_is_the_function_without_statistics():
    """PN-V: with its exact gradient, whatever the state."""
    layer = UnifiedNorm(C, window_size=1, warmup_iters=1).double()
    layer.iters += 1000
    for _ in range(3):
        x, dy = torch.randn(2, 5, C).double()
        x.requires_grad_()
        inputs = (x, layer.weight, layer.bias)
        y, expected = layer(x), unified_norm(x, None, layer.weight, layer.bias)
        torch.testing.assert_close(y, expected)
        found = torch.autograd.grad(y, inputs, dy)
        torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, dy))


UNIFIED_REFUSED = {
    "eps": ({"eps": 0}, ValueError, "eps is 0; it must be a positive"),
    "statistic": ({"running_var": torch.ones(4)}, ValueError, r"running_var has shape \(4,\)"),
    "weight": ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\)"),
    "channel_dim": ({"channel_dim": 0}, ValueError, "channel_dim is 0; it must be an int other"),
    "too many": ({"channel_dim": -2}, ValueError, r"shape \(4, 6\) and channel_dim is -2; it must have two"),
    "mask": ({"pad_mask": torch.zeros(4)}, TypeError, "pad_mask is torch.float32; it must be a tensor of"),
}


@pytest.mark.parametrize(("options", "error", "match"), UNIFIED_REFUSED.values(), ids=UNIFIED_REFUSED)
def test_what_unified_norm_refuses(options, error, match):
    with pytest.raises(error, match=f"^unified_norm: .*{match}"):
        unified_norm(torch.randn(4, C), **options)
