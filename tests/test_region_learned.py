"""RegionNormL against the layer written out with torch's operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from region_oracle import called, gradients, regions
from tolerance import assert_as_good
from torch import Tensor, nn
from training import close, compiled, train

import normzoo
from normzoo import RegionNormL
from normzoo.functional import region_norm_l

C = 4
THRESHOLD = 0.55
"""What with these parameters about half of the pixels reach."""

NAMES = (
    "sa.conv1.weight",
    "sa.gamma_conv.weight",
    "sa.gamma_conv.bias",
    "sa.beta_conv.weight",
    "sa.beta_conv.bias",
)


def layer_of(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    torch.manual_seed(5)
    layer = RegionNormL(C, **{"threshold": THRESHOLD} | options, dtype=dtype)
    with torch.no_grad():
        layer.sa.conv1.weight -= layer.sa.conv1.weight.mean()
        layer.sa.conv1.weight *= 4
    return layer


def sample(dtype: torch.dtype = torch.float64, *, last: bool = False) -> Tensor:
    x = (torch.randn(2, C, 8, 6, dtype=torch.float64) * 2 + 1).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def importance(x: Tensor, weight: Tensor) -> Tensor:
    mean, top = x.mean(1, keepdim=True), x.max(1, keepdim=True).values
    return torch.sigmoid(F.conv2d(torch.cat((mean, top), 1), weight, padding=3))


def written_out(layer: nn.Module):
    """In the dtype of x: (x, *parameters in the order of their names)."""

    def call(x, conv1, gamma, gamma_bias, beta, beta_bias):
        a = importance(x, conv1)
        hole = (a >= layer.threshold).squeeze(1)
        share, distance = hole.double().mean(), (a - layer.threshold).abs().min()
        assert 0.1 < share < 0.9 and distance > 1e-4, (
            share,
            distance,
        )  # so that float32 finds the same regions
        scale, shift = F.conv2d(a, gamma, gamma_bias, padding=3), F.conv2d(a, beta, beta_bias, padding=3)
        return regions(x, hole, eps=layer.eps, per_instance=layer.per_instance) * (1 + scale) + shift

    return call


def test_official_names():
    layer = RegionNormL(C)
    assert tuple(layer.state_dict()) == NAMES == tuple(name for name, _ in layer.named_parameters())
    assert sum(p.numel() for p in layer.parameters()) == 198
    official = {name: torch.randn(p.shape) for name, p in layer.state_dict().items()}
    layer.load_state_dict(official, strict=True)
    assert all(torch.equal(p, official[name]) for name, p in layer.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"per_instance": True}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_values_and_gradients(last, options):
    """The convolutions learn through scale and shift alone, x by mean, maximum and norm."""
    layer, x = layer_of(**options), sample(last=last)
    leaves, dy = [x, *layer.parameters()], sample()
    found = gradients(called(layer), leaves, dy)
    torch.testing.assert_close(found, gradients(written_out(layer), leaves, dy))
    assert all(t.any() for t in found.values())
    assert found["y"].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_kernels(last, dtype):
    from normzoo_kernels._launch import launches

    layer, x = layer_of(torch.float32), sample(dtype, last=last)
    leaves, dy, found = [x, *layer.parameters()], torch.randn(x.shape).to(dtype), []
    before = launches.copy()
    for backend in ("triton", "reference"):
        with normzoo.backend(backend):
            found.append(gradients(called(layer), leaves, dy))
    ran = launches - before
    assert ran["channel_pool"] == ran["channel_unpool"] == ran["channel_moments_masked"] == 1
    assert ran["channel_map"] == 2, ran
    doubles = [t.detach().double() for t in leaves]
    exact = gradients(written_out(layer), doubles, dy.double())
    for name in exact:
        assert_as_good(name, found[0][name], found[1][name], exact[name])
    for by in found:
        assert by["y"].dtype == by["gradient 0"].dtype == dtype and by["y"].stride() == x.stride()


def split(threshold: float) -> tuple[Tensor, Tensor]:
    """(y, x): half of the pixels are 0, of importance 0.5 to the last bit, the others have less."""
    x = sample().abs() + 1
    x[:, :, :, :3] = 0
    first = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    first[0, :, 1, 1] = -0.01
    nothing = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    return region_norm_l(x, first, (nothing, None), (nothing, None), threshold), x


def test_what_reaches_the_threshold_is_the_hole():
    hole = torch.zeros(2, 8, 6, dtype=torch.bool)
    hole[..., :3] = True
    y, x = split(0.5)
    torch.testing.assert_close(y, regions(x, hole))
    assert not y[..., :3].any()
    for threshold in (0.50001, 1.0, 1, 0.0, 0):  # all of it on one side
        y, x = split(threshold)
        torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["full", "empty"])
@pytest.mark.parametrize("per_instance", [False, True])
def test_one_region(per_instance, threshold, backend):
    """Batch or instance norm, then the scale and shift of every pixel; all gradients finite."""
    layer, x = layer_of(torch.float32, threshold=threshold, per_instance=per_instance), sample(torch.float32)
    with normzoo.backend(backend):
        found = gradients(called(layer), [x, *layer.parameters()], torch.ones(x.shape))
    assert all(t.isfinite().all() for t in found.values())
    a = importance(x, layer.sa.conv1.weight)
    norm = F.instance_norm(x) if per_instance else F.batch_norm(x, None, None, training=True)
    expected = norm * (1 + layer.sa.gamma_conv(a)) + layer.sa.beta_conv(a)
    torch.testing.assert_close(found["y"], expected, rtol=1e-4, atol=1e-5)


def test_derivatives():
    layer, x = layer_of(), sample()[:1, :, :4, :3]
    leaves = [t.detach().requires_grad_() for t in (x, *layer.parameters())]
    a = importance(x, layer.sa.conv1.weight)
    assert (a - THRESHOLD).abs().min() > 1e-3  # no pixel changes sides
    assert 0 < (a >= THRESHOLD).sum() < a.numel()
    assert torch.autograd.gradcheck(called(layer), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(called(layer), leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_second_derivatives_by_either_body(backend):
    layer, x = layer_of(torch.float32), sample(torch.float32)

    def penalty(call, x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(call(x, *parameters(x)).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().mean(), x)[0]

    def parameters(x):
        return [p.detach().to(x.dtype) for p in layer.parameters()]

    with normzoo.backend(backend):
        found = penalty(called(layer), x)
    exact = penalty(written_out(layer), x.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_compiled_training():
    eager, xs = layer_of(torch.float32, nonfinite="skip"), [sample(torch.float32) for _ in range(5)]
    traced = copy.deepcopy(eager)
    runs = ((traced, compiled(traced)), (eager, eager))
    close(*(train(m, xs, call, torch.optim.SGD(m.parameters(), 1e-4)) for m, call in runs))


def test_autocast_eval_mode_and_copies():
    layer, x = layer_of(torch.float32), sample(torch.bfloat16)
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), y) and y.dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(layer)(x), y)
    parameters = layer.double().sa
    both = [(c.weight, c.bias) for c in (parameters.gamma_conv, parameters.beta_conv)]
    x = x.double()
    assert torch.equal(region_norm_l(x, parameters.conv1.weight, *both, THRESHOLD), layer(x))


def test_parameters_can_be_reset():
    layer = RegionNormL(C)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(9)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    for name, p in RegionNormL(C).named_parameters():
        assert torch.equal(layer.get_parameter(name), p)


def test_batches_that_are_not_finite_are_counted():
    layer, x = RegionNormL(C, nonfinite="skip"), sample(torch.float32)
    layer(x)
    assert layer.batches_skipped == 0
    x[0, 1, 2, 3] = float("nan")
    assert layer(x).isnan().any() and layer.batches_skipped == 1


BAD = {
    "3 dimensions": (torch.ones(2, C, 5), ValueError, r"has shape \(2, 4, 5\); it must be \(N, C, H, W\)"),
    "5 dimensions": (torch.ones(2, C, 2, 2, 2), ValueError, r"it must be \(N, C, H, W\)"),
    "integers": (torch.ones(2, C, 4, 4).int(), TypeError, "input is torch.int32"),
    "a single value": (torch.ones(1, C, 1, 1), ValueError, "Expected more than 1 value per channel"),
}


@pytest.mark.parametrize(("x", "error", "match"), BAD.values(), ids=BAD)
def test_bad_inputs_are_refused(x, error, match):
    weight, other = torch.zeros(1, 2, 3, 3), (torch.zeros(1, 1, 3, 3), None)
    with pytest.raises(error, match=f"RegionNormL: .*{match}"):
        RegionNormL(C)(x)
    with pytest.raises(error, match=f"region_norm_l: .*{match}"):
        region_norm_l(x, weight, other, other)


def test_channels_are_counted():
    with pytest.raises(ValueError, match="RegionNormL: num_features is 4"):
        RegionNormL(C)(torch.ones(2, C + 1, 4, 4))
    nothing = (torch.zeros(1, 1, 3, 3), None)
    with pytest.raises(ValueError, match="C not 0"):
        region_norm_l(torch.ones(2, 0, 4, 4), torch.zeros(1, 2, 3, 3), nothing, nothing)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "0.8", True, float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match=r"RegionNormL: threshold is .* from 0 to 1"):
        RegionNormL(C, threshold)
    weight, other = torch.zeros(1, 2, 3, 3), (torch.zeros(1, 1, 3, 3), None)
    with pytest.raises(ValueError, match="region_norm_l: threshold is"):
        region_norm_l(sample(), weight, other, other, threshold)


def test_repr_names_the_threshold():
    assert repr(RegionNormL(C, 0.3)).startswith(
        "RegionNormL(\n  4, eps=1e-05, per_instance=False, threshold=0.3\n"
    )
