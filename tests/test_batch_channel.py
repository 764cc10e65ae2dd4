"""BatchChannelNorm against torch's two layers in a row and the authors' estimates written out."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor, nn
from training import compiled_is_eager, same, tensors
from zoo_cases import step

from normzoo import BatchChannelNorm
from normzoo.functional import batch_channel_norm

C, GROUPS = 12, 3
SHAPES = {
    "1d": (5, C),
    "sequences": (5, C, 4),
    "2d": (5, C, 3, 2),
    "3d": (5, C, 2, 1, 3),
    "one image": (1, C, 3, 3),
}
per_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
per_affine = pytest.mark.parametrize("channel_affine", ["group", "channel"])
per_order = pytest.mark.parametrize("order", ["variance_first", "mean_first"])


class Composed(nn.Module):
    """The second stage has a weight for each channel; `estimate` takes the place of the first."""

    def __init__(self, layer: BatchChannelNorm, estimate: nn.Module | None = None):
        super().__init__()
        batch = nn.BatchNorm1d(C, layer.batch_eps, layer.momentum)
        batch._check_input_dim = lambda x: None
        self.batch = batch if estimate is None else estimate
        self.group = nn.GroupNorm(GROUPS, C, layer.eps)
        self.to(layer.weight.dtype)
        with torch.no_grad():
            for name in ("weight", "bias"):
                t = getattr(layer, f"channel_{name}")
                getattr(self.group, name).copy_(t.repeat_interleave(C // len(t)))
        for name, t in layer.state_dict().items():
            if not name.startswith("channel_"):
                self.batch.get_parameter(name).data.copy_(t) if name in ("weight", "bias") else (
                    self.batch.get_buffer(name).copy_(t)
                )

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.batch(x))


class Estimates(nn.Module):
    """The first stage of the authors' code, in the order of its lines."""

    def __init__(self, layer: BatchChannelNorm):
        super().__init__()
        self.eps, self.rate, self.order = layer.batch_eps, layer.update_rate, layer.order
        self.weight, self.bias = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(C))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        dims, wide = (0, *range(2, x.dim())), (-1, *(1,) * (x.dim() - 2))
        if self.training:
            with torch.no_grad():
                mean = x.mean(dims)
                moved = (1 - self.rate) * self.running_mean + self.rate * mean
                around = self.running_mean if self.order == "variance_first" else moved
                var = (x - around.view(wide)).square().mean(dims)
                self.running_mean, self.running_var = (
                    moved,
                    (1 - self.rate) * self.running_var + self.rate * var,
                )
        y = (x - self.running_mean.view(wide)) / (self.running_var.view(wide) + self.eps).sqrt()
        return y * self.weight.view(wide) + self.bias.view(wide)


def make(dtype=torch.float64, groups: int = GROUPS, **options) -> BatchChannelNorm:
    layer = BatchChannelNorm(C, groups, **options).to(dtype)
    with torch.no_grad():
        for t in layer.parameters():
            t.add_(torch.randn(t.shape) / 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def hold(layer: BatchChannelNorm, composed: nn.Module, shape, steps: int = 3) -> None:
    """Steps of training and one of eval mode, in values, gradients and state."""
    for i in range(steps + 1):
        training = i < steps
        x = (3 * torch.randn(shape) + torch.arange(C).view(-1, *(1,) * (len(shape) - 2))).double()
        dy = torch.randn(shape).double()
        found, expected = (step(each.train(training), x, dy) for each in (layer, composed))
        for name in ("weight", "bias"):
            wanted, size = expected.pop(f"dgroup.{name}"), len(getattr(layer, f"channel_{name}"))
            expected[f"dchannel_{name}"] = wanted.view(size, -1).sum(1)
            expected[f"d{name}"] = expected.pop(f"dbatch.{name}")
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(composed.batch.named_buffers()))


@per_shape
@per_affine
@pytest.mark.parametrize("momentum", [0.3, None])
def test_it_is_group_norm_of_batch_norm(momentum, channel_affine, shape):
    """Each of the two has its own eps."""
    layer = make(channel_affine=channel_affine, eps=0.3, batch_eps=0.01, momentum=momentum)
    hold(layer, Composed(layer), shape)


@per_shape
@per_affine
@per_order
def test_estimates_are_those_of_the_authors(order, channel_affine, shape):
    options = {"estimate": True, "update_rate": 0.2, "order": order}
    layer = make(channel_affine=channel_affine, eps=0.3, batch_eps=0.01, **options)
    hold(layer, Composed(layer, Estimates(layer)), shape)
    assert layer.num_batches_tracked == 0


def test_the_orders_differ():
    x, found = torch.randn(4, C, 3).double() + 2, {}
    for order in ("variance_first", "mean_first"):
        layer = BatchChannelNorm(C, GROUPS, estimate=True, update_rate=0.5, order=order).double()
        layer(x)
        found[order] = layer.running_var
    mean = x.mean((0, 2))
    torch.testing.assert_close(found["variance_first"] - found["mean_first"], 0.5 * (1 - 0.25) * mean.square())


def test_no_gradient_through_estimates():
    """Where the estimates are the statistics of the batch, values are those of batch mode alone."""
    layer, x = make(estimate=True, update_rate=1.0, order="mean_first"), torch.randn(4, C, 5).double()
    batch = make()
    batch.load_state_dict(layer.state_dict())
    found, other = (step(each, x) for each in (layer, batch))
    torch.testing.assert_close(found["y"], other["y"])  # the same statistics
    assert (found["dx"] - other["dx"]).abs().max() > 1e-3


@per_affine
@pytest.mark.parametrize("training", [True, False])
def test_derivatives(training, channel_affine):
    layer = make(channel_affine=channel_affine).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(layer), given, (x,))

    leaves = [torch.randn(3, C, 2).double(), *layer.parameters()]
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_second_derivatives_with_estimates():
    layer, x = make(estimate=True, update_rate=0.3), torch.randn(4, C, 5).double()
    composed, found = Composed(layer, Estimates(layer)), []
    for each in (layer, composed):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(each(leaf).pow(3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("channel_affine", ["group", "channel"])
def test_the_function_in_both_modes(channel_affine):
    layer = make(channel_affine=channel_affine, batch_eps=0.1, momentum=0.2)
    other, x = copy.deepcopy(layer), torch.randn(4, C, 3).double()
    given = (GROUPS, layer.weight, layer.bias, layer.channel_weight, layer.channel_bias)
    for training in (True, False):
        y = batch_channel_norm(
            x, layer.running_mean, layer.running_var, *given, training=training, momentum=0.2, batch_eps=0.1
        )
        assert torch.equal(y, other.train(training)(x))
        assert torch.equal(layer.running_mean, other.running_mean)
        assert torch.equal(layer.running_var, other.running_var)


HARD = {
    "large mean": lambda: torch.randn(4, C, 8, 8) + 1e4,
    "channels apart": lambda: torch.randn(4, C, 8, 8) + 1e3 * torch.arange(C).view(C, 1, 1),
    "samples apart": lambda: torch.randn(4, C, 8, 8) + 1e3 * torch.randn(4, 1, 1, 1),
    "tiny": lambda: torch.randn(4, C, 8, 8) * 1e-4,
    "huge": lambda: torch.randn(4, C, 8, 8) * 1e12,
}


@pytest.mark.parametrize("values", HARD.values(), ids=HARD)
@pytest.mark.parametrize("options", [{}, {"estimate": True, "update_rate": 1.0}], ids=["batch", "estimate"])
def test_hard_ranges(options, values):
    layer, x, dy = make(torch.float32, **options), values(), torch.randn(4, C, 8, 8)
    if options:
        layer(x)  # the running statistics are where the values are
    exact, plain = copy.deepcopy(layer).double(), Composed(layer, Estimates(layer) if options else None)
    found, wanted, theirs = (
        step(each, x.to(dtype), dy.to(dtype))
        for each, dtype in ((layer, x.dtype), (exact, torch.float64), (plain, x.dtype))
    )
    for name in ("y", "dx"):
        assert_as_good(name, found[name], theirs[name], wanted[name], hard=True)
    if not options:  # a running mean in float32 has no digits for what lies below it
        assert (found["y"].double() - wanted["y"]).abs().max() < 1e-4
    spread = exact.running_var.sqrt()
    assert ((layer.running_mean - exact.running_mean).abs() <= 2e-6 * (exact.running_mean.abs() + spread)).all()
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=5e-6, atol=0)
    exact.load_state_dict(layer.state_dict())
    stored = layer.eval()(x), exact.eval()(x.double())
    assert (stored[0] - stored[1]).abs().max() < 1e-4


# State


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, C, 1)
        self.block = nn.Sequential(nn.ReLU(), BatchChannelNorm(C, GROUPS, **options))


OFFICIAL = {
    "the README's": ("bn.", True),
    "ImageNet models": ("pbn.", False),
    "the README's, batch mode": ("bn.", False),
}


@pytest.mark.parametrize(("of_first", "estimates"), OFFICIAL.values(), ids=OFFICIAL)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_checkpoints_of_the_authors(nested, of_first, estimates):
    options = {"estimate": True, "update_rate": 0.1} if estimates else {}
    model = Net(**options) if nested else BatchChannelNorm(C, GROUPS, **options)
    layer, prefix = (model.block[1], "block.1.") if nested else (model, "")
    own = {
        f"{of_first}weight": torch.rand(C), f"{of_first}bias": torch.rand(C),
        f"{of_first}running_mean": torch.rand(C), f"{of_first}running_var": torch.rand(C),
        f"{of_first}num_batches_tracked": torch.tensor(5),
        "weight": torch.rand(1, GROUPS, 1), "bias": torch.rand(1, GROUPS, 1),
    }  # fmt: skip
    if estimates:
        own["bn.estbn_moving_speed"] = torch.zeros(1)
    saved = {prefix + name: t for name, t in own.items()}
    if nested:
        saved |= {f"stem.{name}": t for name, t in model.stem.state_dict().items()}
    given = dict(saved)
    model.load_state_dict(given, strict=True)
    assert given.keys() == saved.keys() and all(given[name] is t for name, t in saved.items())
    for name in ("weight", "bias"):
        assert torch.equal(getattr(layer, name), own[of_first + name])
        assert torch.equal(getattr(layer, f"channel_{name}"), own[name].flatten())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layer, name), own[of_first + name])
    other = copy.deepcopy(model)  # and our own
    nn.init.zeros_(layer.weight)
    model.load_state_dict(other.state_dict(), strict=True)
    same(tensors(model), tensors(other))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*channel_bias"):
        model.load_state_dict({name: t for name, t in saved.items() if name != f"{prefix}bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*momentum"):
        model.load_state_dict(saved | {f"{prefix}{of_first}momentum": torch.zeros(1)})


def test_a_bad_batch_is_skipped_in_estimate_mode():
    layer = make(torch.float32, estimate=True, update_rate=0.5, nonfinite="skip")
    spreading = make(torch.float32, estimate=True, update_rate=0.5)
    x, before = torch.randn(4, C, 3), tensors(layer)
    x[0, 3, 1] = float("nan")
    y = layer(x)
    assert y[:, :4].isnan().all() and y[:, 4:].isfinite().all()
    before["batches_skipped"] += 1
    same(tensors(layer), before)
    spreading(x)
    assert torch.equal(spreading.running_mean.isnan(), torch.arange(C) == 3)


def test_compiled_with_groups_of_channels():
    layer = make(torch.float32, channel_affine="channel", estimate=True, update_rate=0.3, order="mean_first")
    compiled_is_eager(layer, [torch.randn(n, C, 2, 2) + n for n in (4, 4, 1)])


# Refusals

BAD = {
    "groups": ({"num_groups": 5}, ValueError, "num_groups is 5; it must divide num_features = 12"),
    "no groups": ({"num_groups": 0}, ValueError, "num_groups is 0; it must be a positive int"),
    "no rate": ({"estimate": True}, ValueError, "estimate=True needs update_rate, the weight of a batch"),
    "zero rate": ({"estimate": True, "update_rate": 0}, ValueError, "update_rate is 0; it must be above 0"),
    "large rate": ({"estimate": True, "update_rate": 1.5}, ValueError, "update_rate is 1.5; .* at most 1"),
    "true rate": ({"estimate": True, "update_rate": True}, ValueError, "update_rate is True"),
    "rate alone": ({"update_rate": 0.1}, ValueError, "update_rate is given and estimate is False; it needs"),
    "order alone": ({"order": "mean_first"}, ValueError, "order is given and estimate is False"),
    "order": (
        {"estimate": True, "update_rate": 0.1, "order": "first"},
        ValueError,
        "order is 'first'; it must",
    ),
    "affine": (
        {"channel_affine": "none"},
        ValueError,
        "channel_affine is 'none'; it must be one of group, chan",
    ),
    "batch_eps": ({"batch_eps": 0}, ValueError, "batch_eps is 0; it must be a positive finite number"),
    "estimate": ({"estimate": 1}, TypeError, "estimate is 1; it must be True or False"),
}


@pytest.mark.parametrize(
    ("options", "rate", "told"),
    [
        ({"estimate": True, "update_rate": 0.1}, 0.1, False),
        ({"estimate": True, "update_rate": 0.1}, 0.0, False),
        ({"estimate": True, "update_rate": 0.2}, 0.1, True),
        ({}, 0.1, True),
    ],
    ids=str,
)
def test_another_rate_in_a_checkpoint_of_the_authors_is_told(options, rate, told, caplog):
    saved = BatchChannelNorm(C, GROUPS).state_dict()
    own = {name: saved[f"channel_{name}"].view(1, -1, 1) for name in ("weight", "bias")}
    of_first = {f"bn.{name}": t for name, t in saved.items() if not name.startswith("channel_")}
    speed = {"bn.estbn_moving_speed": torch.full((1,), rate)}
    BatchChannelNorm(C, GROUPS, **options).load_state_dict(own | of_first | speed)
    assert ("estbn_moving_speed=0.1; here estimate=" in caplog.text) == told


@pytest.mark.parametrize(("options", "error", "match"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_refused(options, error, match):
    with pytest.raises(error, match=f"BatchChannelNorm: {match}"):
        BatchChannelNorm(**{"num_features": C, "num_groups": GROUPS} | options)


def test_functions_refuse_what_does_not_fit():
    x = torch.randn(3, C, 2)
    for changed, error, match in (
        ({"num_groups": 5}, ValueError, "num_groups is 5; it must divide the 12 channels"),
        (
            {"channel_weight": torch.ones(2)},
            ValueError,
            r"channel_weight has shape \(2,\); it must be \(3,\), one",
        ),
        ({"channel_bias": torch.ones(1, GROUPS, 1)}, ValueError, r"channel_bias has shape \(1, 3, 1\)"),
        ({"channel_bias": [0.0] * 3}, TypeError, "channel_bias is a list; it must be a torch.Tensor"),
        ({"channel_weight": torch.ones(3, dtype=torch.long)}, TypeError, "channel_weight is torch.int64"),
        ({"channel_weight": torch.ones(3, device="meta")}, ValueError, "channel_weight is on meta but"),
        ({"batch_eps": -1}, ValueError, "batch_eps is -1"),
        ({"momentum": None}, ValueError, "momentum is None"),
        ({"training": False}, ValueError, "without training it needs running_mean and running_var"),
    ):
        given = {"running_mean": None, "running_var": None, "num_groups": GROUPS, "training": True} | changed
        with pytest.raises(error, match=f"batch_channel_norm: {match}"):
            batch_channel_norm(x, **given)


@pytest.mark.parametrize("options", [{}, {"estimate": True, "update_rate": 0.3}], ids=["batch", "estimate"])
def test_one_value_a_group_is_refused(options):
    layer = make(torch.float32, C, **options)
    before = tensors(layer)
    for mode in (True, False):
        with pytest.raises(
            ValueError, match=r"BatchChannelNorm: Expected more than 1 value per group.* fewer gro"
        ):
            layer.train(mode)(torch.randn(4, C, 1, 1))
        with pytest.raises(ValueError, match="Expected more than 1 value per"):
            layer(torch.randn(1, C))
    same(tensors(layer), before)
    single = make(torch.float32, **options)
    if options:
        assert single(torch.randn(1, C)).isfinite().all()  # what estimates are for
    else:
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel.* or estimate=True"):
            single(torch.randn(1, C))
