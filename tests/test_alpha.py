"""AlphaBatchNorm against its formula written out, and layers made of other batch norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import compiled, same, tensors
from zoo_cases import step

import normzoo
from normzoo import AlphaBatchNorm, FrozenBatchNorm
from normzoo.functional import alpha_batch_norm

C = 4
SHAPES = {
    "1d": (6, C),
    "sequences": (6, C, 5),
    "2d": (6, C, 3, 2),
    "3d": (6, C, 2, 3, 2),
    "one image": (1, C, 3, 3),
}
per_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(dtype=torch.float64, **options) -> AlphaBatchNorm:
    layer = AlphaBatchNorm(C, **options).to(dtype)
    with torch.no_grad():
        for t in layer.parameters():
            t.add_(torch.randn(t.shape) / 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def mixed(layer: AlphaBatchNorm, x: Tensor, share: float, correction: int) -> FrozenBatchNorm:
    """Frozen batch norm with the mixture: the same map, and no statistics that could be differentiated."""
    dims = (0, *range(2, x.dim()))
    frozen = FrozenBatchNorm(C, layer.eps).to(x.dtype)
    frozen.running_mean = share * layer.running_mean + (1 - share) * x.detach().mean(dims)
    var = x.detach().var(dims, correction=correction)
    frozen.running_var = share * layer.running_var + (1 - share) * var
    frozen.weight, frozen.bias = layer.weight, layer.bias
    return frozen


WEIGHTS = {
    "source_weight": (lambda n: {"source_weight": 0.3}, lambda n: 0.3),
    "test_weight": (lambda n: {"test_weight": 0.3}, lambda n: 0.7),
    "by default": (lambda n: {}, lambda n: 0.9),
    "batch alone": (lambda n: {"source_weight": 0.0}, lambda n: 0.0),
    "source alone": (lambda n: {"source_weight": 1.0}, lambda n: 1.0),
    "pseudo_count": (lambda n: {"pseudo_count": 16}, lambda n: 16 / (16 + n)),  # n images, not values
    "no pseudo_count": (lambda n: {"pseudo_count": 0}, lambda n: 0.0),
}


@per_shape
@pytest.mark.parametrize(("options", "share"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_formula(unbiased, options, share, shape):
    """Values and first gradients; nothing stored changes, in either mode."""
    layer = make(unbiased=unbiased, eps=1e-2, **options(shape[0]))
    x = (3 * torch.randn(shape) + 1).double()
    before, dy = tensors(layer), torch.randn(shape).double()
    frozen = mixed(layer, x, share(shape[0]), int(unbiased))
    expected = step(frozen, x, dy)
    for mode in (True, False):
        found = step(layer.train(mode), x, dy)
        torch.testing.assert_close(found, expected)
    same(tensors(layer), before)
    if layer.source_weight is not None:
        given = (layer.weight, layer.bias, layer.source_weight, 1e-2, unbiased)
        assert torch.equal(alpha_batch_norm(x, layer.running_mean, layer.running_var, *given), found["y"])


def test_second_derivatives():
    layer, x = make(source_weight=0.4), torch.randn(5, C, 3).double()
    frozen, dy = mixed(layer, x, 0.4, 1), torch.randn(5, C, 3).double()

    def penalty(call):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((call(leaf).pow(3) * dy).sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (leaf, layer.weight, layer.bias))

    torch.testing.assert_close(penalty(layer), penalty(frozen))


@pytest.mark.parametrize("source_weight", [0.0, 0.5, 0.9])
def test_a_large_mean_keeps_its_digits(source_weight):
    layer = AlphaBatchNorm(C, source_weight=source_weight)
    layer.running_mean += 1e4
    x = torch.randn(8, C, 16, 16) + 1e4
    assert (layer(x) - copy.deepcopy(layer).double()(x.double())).abs().max() < 5e-6


def test_the_source_alone_needs_no_statistics():
    pytest.importorskip("triton")
    from normzoo_kernels._launch import launches

    counted = []
    for source_weight in (1.0, 0.9):
        layer, before = AlphaBatchNorm(C, source_weight=source_weight), launches.total()
        with normzoo.backend("triton"):
            layer(torch.randn(2, C, 3, 3))
        counted.append(launches.total() - before)
    assert counted == [0, 3]


def test_one_value_has_no_variance_to_mix_in():
    x = torch.randn(1, C, 1, 1)
    for options in ({}, {"source_weight": 0.0, "unbiased": False}, {"pseudo_count": 4}):
        with pytest.raises(ValueError, match=r"AlphaBatchNorm: Expected more than 1 value .* source_weight=1"):
            AlphaBatchNorm(C, **options)(x)
    assert AlphaBatchNorm(C, source_weight=1)(x).isfinite().all()
    layer = make(torch.float32, source_weight=0.5, unbiased=False)
    mean, var = (layer.running_mean + x.flatten()) / 2, layer.running_var / 2
    expected = normzoo.functional.frozen_batch_norm(x, mean, var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    for pseudo_count in (0, 3):
        assert AlphaBatchNorm(C, pseudo_count=pseudo_count)(x[:0]).shape == (0, C, 1, 1)


@pytest.mark.parametrize("way", [lambda layer: layer, compiled], ids=["eager", "compiled"])
def test_bad_batches_are_counted_and_forgotten(way):
    layer = make(torch.float32, source_weight=0.5, nonfinite="skip")
    call, good = way(layer), torch.randn(4, C, 2)
    before, bad = tensors(layer), good.clone()
    bad[1, 2, 0] = float("inf")
    expected = call(good)
    y = call(bad)
    assert y[:, 2].isnan().any() and y[:, :2].isfinite().all()
    assert torch.equal(call(good), expected)
    before["batches_skipped"] += 1
    same(tensors(layer), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_counts_no_bad_batch(reentrant):
    layer = make(torch.float32, nonfinite="skip")
    x = torch.full((2, C, 3), float("nan"), requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.batches_skipped == 1


def frozen_layer() -> FrozenBatchNorm:
    return FrozenBatchNorm(C, eps=1e-3)


SOURCES = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C, eps=1e-3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C, eps=1e-3),
    "BatchNorm3d": lambda: nn.BatchNorm3d(C, eps=1e-3),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(C, eps=1e-3),
    "without affine": lambda: nn.BatchNorm2d(C, eps=1e-3, affine=False),
    "ours": lambda: normzoo.BatchNorm2d(C, eps=1e-3),
    "without bias": lambda: normzoo.BatchNorm2d(C, eps=1e-3, bias=False),
    "float64": lambda: nn.BatchNorm2d(C, eps=1e-3).double(),
    "frozen": frozen_layer,
    "ghost": lambda: normzoo.GhostBatchNorm(C, 2, eps=1e-3),
    "alpha": lambda: AlphaBatchNorm(C, eps=1e-3, source_weight=1),
    "AdaB2N": lambda: normzoo.AdaB2N(C, 2, eps=1e-3),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_from_batch_norm(source):
    """The very same tensors, so that an optimizer goes on with them."""
    bn = source()
    for t in bn.state_dict().values():
        t.uniform_(0.5, 2) if t.is_floating_point() else t.fill_(7)
    bn.requires_grad_(False).eval()
    layer = AlphaBatchNorm.from_batch_norm(bn, 1.0, unbiased=False)
    assert (layer.eps, layer.source_weight, layer.unbiased, layer.training) == (1e-3, 1.0, False, False)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        held, own = getattr(bn, name), getattr(layer, name)
        assert (held is None) == (own is None), name
        assert own is None or own.data_ptr() == held.data_ptr(), name
        assert own is None or isinstance(bn, FrozenBatchNorm) or own is held, name
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.num_batches_tracked == 7
    shape = (5, C, *{"BatchNorm1d": (), "BatchNorm3d": (2, 1, 2)}.get(type(bn).__name__, (2, 2)))
    x = torch.randn(shape, dtype=bn.running_mean.dtype)
    before = tensors(bn)
    torch.testing.assert_close(layer(x), bn(x))
    layer.source_weight = 0.4
    layer(x)
    same(tensors(bn), before)
    assert AlphaBatchNorm.from_batch_norm(bn, pseudo_count=3, nonfinite="skip").pseudo_count == 3
    assert AlphaBatchNorm.from_batch_norm(bn.train(), test_weight=0.4).training


def test_parameters_still_train():
    bn = nn.BatchNorm2d(C)
    layer = AlphaBatchNorm.from_batch_norm(bn)
    layer(torch.randn(3, C, 2, 2)).pow(3).sum().backward()
    assert bn.weight.grad is layer.weight.grad is not None and bn.bias.grad is not None


REFUSED = {
    "group norm": (lambda: nn.GroupNorm(2, C), TypeError, "bn is of type GroupNorm; it must be a batch norm"),
    "instance norm": (
        lambda: nn.InstanceNorm2d(C),
        TypeError,
        "bn is of type InstanceNorm2d; it must be a batch",
    ),
    "tracking instance norm": (
        lambda: nn.InstanceNorm2d(C, track_running_stats=True),
        TypeError,
        "bn is of type Ins",
    ),
    "one with an activation": (
        lambda: type("NormAct", (nn.BatchNorm2d,), {"forward": lambda self, x: x.relu()})(C),
        TypeError,
        "bn is of type NormAct; .* no forward of its own",
    ),
    "batch-channel norm": (lambda: normzoo.BatchChannelNorm(C, 2), TypeError, "bn is of type BatchChannelNorm"),
    "a class": (lambda: nn.BatchNorm2d, TypeError, "bn is of type type"),
    "no statistics": (
        lambda: nn.BatchNorm2d(C, track_running_stats=False),
        ValueError,
        "bn, a BatchNorm2d, has no running statistics to mix",
    ),
}


@pytest.mark.parametrize(("source", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_batch_norm_is_refused(source, error, match):
    with pytest.raises(error, match=f"AlphaBatchNorm: {match}"):
        AlphaBatchNorm.from_batch_norm(source())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"source_weight": 1.1}, "source_weight is 1.1; it must be a number from 0 to 1"),
        ({"source_weight": torch.tensor(0.5)}, "source_weight is tensor"),
        ({"test_weight": -0.1}, "test_weight is -0.1; it must be a number from 0 to 1"),
        ({"pseudo_count": -1}, "pseudo_count is -1; it must be a finite number, 0 or more"),
        (
            {"source_weight": 0.5, "test_weight": 0.5},
            "test_weight and source_weight are given; each sets the weight of the source",
        ),
        ({"source_weight": 0.9, "pseudo_count": 4}, "pseudo_count and source_weight are given"),  # the default
        ({"pseudo_count": 4, "test_weight": 0.5}, "test_weight and pseudo_count are given"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=f"AlphaBatchNorm: {match}"):
        AlphaBatchNorm(C, **options)


def test_functions_want_their_statistics():
    x, stored = torch.randn(3, C), torch.ones(C)
    with pytest.raises(ValueError, match="alpha_batch_norm: running_mean and running_var must both be given"):
        alpha_batch_norm(x, stored, None)
    with pytest.raises(
        ValueError, match="alpha_batch_norm: source_weight is 2; it must be a number from 0 to 1"
    ):
        alpha_batch_norm(x, stored, stored, source_weight=2)
    with pytest.raises(ValueError, match=r"alpha_batch_norm: running_var has shape \(3,\)"):
        alpha_batch_norm(x, stored, torch.ones(3))


def test_a_stored_nan_counts_for_nothing_where_the_batch_counts_alone():
    layer, x = make(source_weight=0.0), torch.randn(4, C, 3).double()
    clean = layer(x)
    layer.running_mean[0] = layer.running_var[1] = float("nan")
    assert torch.equal(layer(x), clean)


def test_a_batch_whose_variance_overflows_is_counted():
    layer = make(torch.float32, nonfinite="skip")
    layer(1e25 * torch.randn(4, C, 3))
    assert layer.batches_skipped == 1


def test_from_batch_norm_keeps_nonfinite():
    layer = AlphaBatchNorm.from_batch_norm(normzoo.BatchNorm2d(C, nonfinite="skip"))
    assert layer.nonfinite == "skip" and layer.batches_skipped == 0


def test_what_torchs_operators_do_not_take_goes_to_the_engine():
    """Stored statistics that are differentiated, float8, other strides, and a variance that overflows."""
    layer, x = make(source_weight=0.5), torch.randn(6, C, 3)
    given = (layer.running_mean.detach().clone().requires_grad_(), layer.running_var)
    alpha_batch_norm(x, *given, source_weight=0.5).sum().backward()
    assert given[0].grad is not None
    narrow = layer(x.to(torch.float8_e5m2))
    assert narrow.dtype == torch.float8_e5m2 and narrow.float().isfinite().all()
    strange = torch.randn(6, 3, C).mT
    assert layer(strange).stride() == strange.stride()
    x[0, 0, 0] = torch.finfo(torch.float32).max / 3
    assert layer(x)[:, 0].isnan().all()
