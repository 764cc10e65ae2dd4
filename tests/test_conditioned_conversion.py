"""Conversions to norms that take more than x: what they compute, what they keep, and how they are told it."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred
from torch import nn

import normzoo
from normzoo import cli
from normzoo.conversion import Exactness, Norm


def images(*shape):
    return torch.randn(*(shape or (6, 8, 3, 4))) * 2 + 1


def hole(n=6):
    mask = torch.zeros(n, 1, 3, 4, dtype=torch.bool)
    mask[:, :, 1:, 1:3] = True
    return mask


class OnePlus(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, input):
        rows = F.layer_norm(input.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return rows.movedim(-1, 1)


@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.LayerNorm(8, eps=1e-3), (5, 7, 8)),
        (nn.LayerNorm(8, elementwise_affine=False), (5, 8)),
        (nn.LayerNorm(8, bias=False), (5, 2, 3, 8)),
        (OnePlus(8), (5, 7, 8)),
        (ChannelNorm(8), (5, 8, 2, 3)),
    ],
    ids=str,
)
def test_layer_norm_by_time(norm, shape):
    model, x, t = stirred(nn.Sequential(nn.Identity(), norm)), images(*shape), torch.linspace(-3, 3, 5)
    others = {"params": [nn.Parameter(x)]}
    groups = [{"params": [*model.parameters()], "lr": 0.5}, others]
    optimizer = torch.optim.SGD(groups if [*norm.parameters()] else [others], 0.1)
    made = normzoo.plan(model, "time_dependent_layer_norm")
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and step.error is not None and step.error < 1e-6
    assert "the same at every time, until training" in step.reason and "normzoo.inputs gives t" in step.reason
    assert "not measured" not in step.reason
    held = [name for name, _ in norm.named_parameters()]
    places = [f"{name}.{end}" for name in held for end in ("param0", "param1")]
    assert [*step.tensors["converted"]] == places and step.tensors["lost"] == step.tensors["kept"] == ()
    gates = {f"{name}.nodecay_{end}" for name in ("weight", "bias") for end in ("weight", "bias")}
    values = {f"{name}.param{i}" for name in {"weight", "bias"} - {*held} for i in range(2)}
    assert {*step.tensors["new"]} == gates | values
    assert made.verify(x, t=t).same
    leaf = x.clone().requires_grad_()
    wanted = model(leaf)
    (slope,) = torch.autograd.grad(wanted, leaf, torch.sin(wanted.detach()))
    made.apply(optimizer)
    new = model[1]
    assert isinstance(new, normzoo.TimeDependentLayerNorm) and new.eps == norm.eps and new.dim == 8
    with pytest.raises(ValueError, match=r"there is no t; pass it to forward, or call the model inside"):
        model(x)
    for time in (t, torch.full((5,), 100.0)):
        with normzoo.inputs(model, t=time):
            y = model(leaf)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        (now,) = torch.autograd.grad(y, leaf, torch.sin(wanted.detach()))
        torch.testing.assert_close(now, slope, rtol=1e-4, atol=1e-5)
    of_norm = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(others["params"][0])}
    assert of_norm == {id(p) for p in new.parameters()} and len(of_norm) == 8
    new.weight.param0.data.zero_()
    if held:
        assert new.weight.param1.any() and (not isinstance(norm, OnePlus) or new.weight.param1.min() > 1)
        assert torch.equal(norm.weight, made.revert()[1].weight) and norm.weight.all()


def test_rms_norm_by_time():
    model = stirred(nn.Sequential(nn.RMSNorm(8, eps=1e-2)))
    norm, x, t = model[0], images(5, 7, 8), torch.linspace(-3, 3, 5)
    made = normzoo.plan(model, "time_dependent_rms_norm")
    (step,) = made.steps
    assert step.exactness is Exactness.APPROXIMATE and step.error > 0.1  # of rows as small as eps
    assert step.tensors["converted"] == ("scale.param0", "scale.param1")
    assert "its eps, 1e-8 unless given, adds to the root mean square" in step.reason
    with normzoo.inputs(made.apply(), t=t):
        y = model(x)
    torch.testing.assert_close(y, x / x.square().mean(-1, keepdim=True).sqrt() * norm.weight)
    assert model[0].eps == 1e-8 and model[0].offset is None
    norm = stirred(normzoo.RMSNorm(8, bias=True, offset=1.0))
    both = normzoo.convert(norm, "time_dependent_rms_norm", eps=0.1, partial=0.5)
    assert (both.eps, both.partial) == (0.1, 0.5) and torch.equal(both.scale.param0, 1 + norm.weight)
    assert torch.equal(both.offset.param1, norm.bias)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("holds", ["both", "nothing"])
def test_batch_norm_by_regions(separate, holds):
    norm = nn.BatchNorm2d(8, eps=1e-2, affine=holds == "both")
    model, x, mask = stirred(nn.Sequential(norm)), images(), hole()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(x)], 0.1)
    made = normzoo.plan(model, "region_norm_b", separate_beta=separate)
    (step,) = made.steps
    assert step.exactness is Exactness.APPROXIMATE and step.error > 1e-3
    assert "both gammas are weight − 1" in step.reason and "normzoo.inputs gives the mask" in step.reason
    assert made.verify(x, mask=mask).passed and not made.verify(x, mask=mask).same
    assert {*step.tensors["lost"]} == {"running_mean", "running_var", "num_batches_tracked"}
    if holds == "both":
        assert step.tensors["kept"] == ("background_beta",)
        gammas = ("foreground_gamma", "background_gamma")
        betas = "background_beta and foreground_beta" if separate else "background_beta"
        assert f"bias -> {betas}, weight -> {' and '.join(gammas)}" in step.reason
        assert "renamed, in the state dict too: " in step.reason and " is called " not in step.reason
        assert step.tensors["converted"] == (*gammas, *(("foreground_beta",) if separate else ()))
    wanted = model.train()(x)
    made.apply(optimizer)
    new, weight = model[0], 1.0 if norm.weight is None else norm.weight
    assert {id(p) for p in optimizer.param_groups[0]["params"]} >= {id(p) for p in new.parameters()}
    assert norm.bias is None or new.background_beta is norm.bias
    for mode in (True, False):
        with normzoo.inputs(model, mask=torch.zeros_like(mask)):
            torch.testing.assert_close(model.train(mode)(x), wanted, rtol=1e-4, atol=1e-5)
        y = new(x, mask)
        inside = x.transpose(0, 1)[:, mask.squeeze(1)]
        var, mean = torch.var_mean(inside, 1, correction=0, keepdim=True)
        normalized = (inside - mean) / (var + 1e-2 * mask.numel() / mask.sum()).sqrt()
        bias = 0 if norm.bias is None else norm.bias[:, None]
        expected = normalized * (weight if norm.weight is None else weight[:, None]) + bias
        torch.testing.assert_close(y.transpose(0, 1)[:, mask.squeeze(1)], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="there is no mask"):
        model(x)


def test_batch_norm_by_regions_that_the_layer_finds():
    model, x = stirred(nn.Sequential(nn.BatchNorm2d(8, eps=1e-2))), images()
    state = torch.get_rng_state()
    made = normzoo.plan(model, "region_norm_l", threshold=0.5)
    proof = made.verify(x)
    assert torch.equal(torch.get_rng_state(), state)  # though the layer draws its weights
    (step,) = made.steps
    assert step.exactness is Exactness.REINITIALISED and proof.passed and not proof.same
    assert {*step.tensors["lost"]} == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    made.apply()
    torch.set_rng_state(state)
    again = normzoo.RegionNormL(8, 0.5, 1e-2)
    assert {*step.tensors["new"]} == {name for name, _ in again.named_parameters()}
    assert torch.equal(model[0].sa.conv1.weight, again.sa.conv1.weight) and model[0].threshold == 0.5
    torch.testing.assert_close(model(x), again(x))


@pytest.mark.parametrize(
    "norm, to, words",
    [
        (
            nn.LayerNorm(8, elementwise_affine=False),
            "adaptive_layer_norm",
            "takes scale with every call, from the code",
        ),
        (
            nn.RMSNorm(8),
            "adaptive_rms_norm",
            r"takes scale with every call, .* by hand, and call it as norm\(x, scale, shift\)",
        ),
        (
            nn.LayerNorm((2, 8)),
            "time_dependent_layer_norm",
            r"it normalises \(2, 8\) together, and the layer the last",
        ),
        (nn.RMSNorm((2, 8)), "time_dependent_rms_norm", r"it normalises \(2, 8\) together"),
        (nn.BatchNorm1d(8), "region_norm_l", r"it takes inputs of 1 spatial dimension\(s\), and region_norm_l"),
        (nn.BatchNorm3d(8), "region_norm_l", r"it takes inputs of 3 spatial dimension\(s\)"),
        (nn.GroupNorm(2, 8), "region_norm_b", "no rule takes a group norm to region_norm_b, only to"),
        (nn.LayerNorm(8), "time_dependent_rms_norm", "no rule takes a layer norm to time_dependent_rms_norm"),
        (
            normzoo.RegionNormB(8),
            "batch_norm",
            "no rule takes a region_b norm to batch_norm, only to region_norm_b",
        ),
    ],
    ids=str,
)
def test_refused(norm, to, words):
    with pytest.raises(ValueError, match=words):
        normzoo.convert(norm, to)


def test_side_inputs_of_a_proof():
    made = normzoo.plan(nn.Sequential(nn.LayerNorm(8)), "time_dependent_layer_norm")
    x = images(5, 8)
    with pytest.raises(ValueError, match=r"TimeDependentLayerNorm: there is no t.*\.verify\(x, t=t\)`"):
        made.verify(x)
    with pytest.raises(ValueError, match="verify: no layer of the model takes mask, before or after"):
        made.verify(x, t=torch.zeros(5), mask=hole())
    with pytest.raises(TypeError):
        made.verify(x, time=torch.zeros(5))
    model = made.apply()
    assert made.verify(x, t=torch.zeros(5)).same and made.applied
    with pytest.raises(ValueError, match="there is no t"):
        normzoo.convert(nn.Sequential(nn.LayerNorm(8)), "time_dependent_layer_norm", verify=x)
    assert normzoo.plan(model, eps=1e-3).verify(x, t=torch.zeros(5)).passed


LAYERS = [
    (normzoo.RegionNormB(8, 1e-3, resize="max"), "region_b", {"per_instance": True}),
    (normzoo.RegionNormL(8, 0.6), "region_l", {"eps": 0.5}),
    (normzoo.AdaptiveLayerNorm(4, 1e-3), "adaptive_layer", {"eps": 0.5}),
    (normzoo.AdaptiveRMSNorm(4), "adaptive_rms", {"eps": 0.5}),
    (normzoo.TimeDependentLayerNorm(4, 1e-3), "time_layer", {"eps": 0.5}),
    (normzoo.TimeDependentRMSNorm(4, partial=0.5, bias=True), "time_rms", {"partial": None}),
]


@pytest.mark.parametrize("layer, family, change", LAYERS, ids=[family for _, family, _ in LAYERS])
def test_the_layers_themselves(layer, family, change):
    (site,) = normzoo.inspect(nn.Sequential(layer)).sites
    assert site.family == family and site.how == "class" and site.norm.eps == layer.eps
    with pytest.raises(ValueError, match=r"it is normzoo's .* already"):
        normzoo.convert(nn.Sequential(layer))
    stirred(layer)
    (step,) = normzoo.plan(nn.Sequential(layer), **change).steps
    new, tensors = step.make().module, dict(layer.named_parameters())
    assert step.exactness is Exactness.APPROXIMATE and step.error > 1e-3 and type(new) is type(layer)
    assert all(p is tensors[name] for name, p in new.named_parameters()) and step.tensors["new"] == ()
    assert step.tensors["lost"] == () and len(step.tensors["kept"]) == len(tensors)
    others = {
        name for name in ("eps", "resize", "threshold", "partial") if hasattr(layer, name)
    } - change.keys()
    assert all(getattr(new, name) == getattr(layer, name) for name in others)
    assert all(getattr(new, name) == value for name, value in change.items())


class Modulating(nn.Module):
    """A norm as models with conditions write it."""

    def __init__(self, one=1.0):
        super().__init__()
        self.one = one

    def forward(self, x, scale, shift):
        return F.layer_norm(x, (8,), eps=1e-3) * (self.one + scale)[:, None] + shift[:, None]


class Swapped(Modulating):
    def forward(self, x, shift, scale):
        return super().forward(x, scale, shift)


class Weighing(Modulating):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class Conditioned(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.condition, self.first, self.second = nn.Linear(3, 16), norm, copy.deepcopy(norm)

    def forward(self, x, c):
        scale, shift = self.condition(c).chunk(2, -1)
        return x + self.second(x + self.first(x, scale, shift), shift, scale)


def test_norms_whose_caller_gives_scale_and_shift():
    """Told by an adapter, they become the adaptive layers; from one of these to the other there is a rule."""

    def told(family="adaptive_layer", **how):
        return Norm(family, (8,), 1e-3, arguments=("scale", "shift"), **how)

    x, c = images(4, 5, 8), images(4, 3)
    with normzoo.register_adapter(Modulating, lambda module: told()):
        model = Conditioned(Modulating())
        made = normzoo.plan(model)
        assert [step.exactness for step in made.steps] == [Exactness.EXACT] * 2
        assert made.verify((x, c)).same
        new = made.apply().first
        assert type(new) is normzoo.AdaptiveLayerNorm and (new.dim, new.eps) == (8, 1e-3)
        rms = normzoo.plan(model, "adaptive_rms_norm")
        assert [step.exactness for step in rms.steps] == [Exactness.APPROXIMATE] * 2
        proof = rms.verify((x, c))
        assert proof.passed and not proof.same
        assert type(rms.apply().second) is normzoo.AdaptiveRMSNorm and model.second.eps == 1e-3
        (step,) = normzoo.plan(nn.Sequential(Modulating(0.0))).steps
        assert step.exactness is Exactness.APPROXIMATE and "a test run shows another function" in step.reason
    for cls, how, words in (
        (Swapped, {}, r"its callers may pass shift, scale, and the layer takes scale, shift, in this order"),
        (Weighing, {"weight": "weight"}, "it has a weight or a bias of its own"),
        (nn.Identity, {}, "its callers may pass the input alone"),
    ):
        with (
            normzoo.register_adapter(cls, lambda module, how=how: told(**how)),
            pytest.raises(ValueError, match=words),
        ):
            normzoo.convert(nn.Sequential(cls()), "adaptive_layer_norm")


def test_offsets_are_dropped_where_they_are_not_asked_for():
    layer = stirred(normzoo.TimeDependentRMSNorm(4, bias=True))
    (step,) = normzoo.plan(nn.Sequential(layer), bias=False).steps
    assert step.make().module.offset is None
    assert {*step.tensors["lost"]} == {f"offset.{name}" for name, _ in layer.offset.named_parameters()}


def test_an_encoder_layer_calls_its_new_norms():
    torch.manual_seed(0)
    model = stirred(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x, t = torch.randn(3, 5, 8), torch.linspace(-1, 1, 3)
    made = normzoo.plan(model, "time_dependent_layer_norm")
    assert made.verify(x, t=t).same
    made.apply()
    model.norm1.weight.param0.data.zero_()
    with torch.no_grad(), normzoo.inputs(model, t=t):
        assert not torch.allclose(model(x)[0], model(x[:1].expand(3, -1, -1))[1])


def test_a_parent_that_reads_the_weight_keeps_its_norm():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return F.layer_norm(x, (8,), self.norm.weight)

    with pytest.raises(ValueError, match="Reading reads its weight and may compute the norm itself"):
        normzoo.convert(Reading(), "time_dependent_layer_norm")


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "tokens.py"
    lines = ["import torch", "from torch import nn", "def make():"]
    file.write_text(
        "\n".join([*lines, "    return nn.Sequential(nn.LayerNorm(4)), torch.ones(2, 4).cumsum(-1)", ""])
    )
    command = ["convert", f"{file}:make", "--to", "time_dependent_layer_norm", "--dry-run"]
    for given in ([], ["--input", "2,4"]):
        assert cli.main([*command, *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["steps"][0]["exactness"] == "eval-exact" and found["proof"] is None
        assert found["no_proof"].startswith("left out: TimeDependentLayerNorm: there is no t")
        assert found["no_proof"].endswith("; prove it in Python: `normzoo.plan(...).verify(x, t=t)`")
    assert cli.main(["convert", f"{file}:make", "--to", "AdaptiveLayerNorm", "--dry-run"]) == 2
    assert "adaptive_layer_norm takes scale with every call" in capsys.readouterr().err
