"""What normzoo.inspect says of norms that it has never seen, and of those that only look like one."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import normzoo
from normzoo.conversion import Norm


class Rms(nn.Module):
    """RMSNorm with 1 + w and the names of nobody, rounding at the end, or before the weight."""

    def __init__(self, width=24, eps=1e-6, offset=1.0, early=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))
        self.tiny = eps
        self.offset, self.early = offset, early

    def forward(self, x):
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.tiny)
        if self.early:
            return h.to(x.dtype) * (self.gamma + self.offset if self.offset else self.gamma)
        return (h * (self.gamma.float() + self.offset)).to(x.dtype)


class RmsNorm(Rms):
    pass


class Norm2d(nn.LayerNorm):
    """LayerNorm over the channels of NCHW."""

    def forward(self, input):
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ChannelsNorm(nn.Module):
    """The same by hand, with a weight of shape (C, 1, 1) and eps written into forward."""

    def __init__(self, channels=10):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))
        self.beta = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt() * self.weight + self.beta


class GroupedRmsNorm(nn.Module):
    def __init__(self, width=32, group_size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.group_size = group_size

    def forward(self, x, gate=None):
        x = x if gate is None else x * F.silu(gate)
        h = x.unflatten(-1, (-1, self.group_size))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.flatten(-2)


class IgnoredWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(16))
        self.variance_epsilon = 1e-5

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class FrozenNorm(nn.Module):
    def __init__(self, channels=9):
        super().__init__()
        for name, start in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, channels=8):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU()

    def forward(self, input):
        return self.act(self.drop(super().forward(input)))


class Renorm(nn.BatchNorm2d):
    """Like BatchNorm in eval mode, and by stored statistics in training."""

    def forward(self, input):
        stored = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(input, *stored, training=False, eps=self.eps) * (1.1 if self.training else 1)


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.g * x / x.norm(dim=-1, keepdim=True)


class TrainingNorm(nn.LayerNorm):
    """Adds noise in training."""

    def forward(self, input):
        return super().forward(input) + (0.1 if self.training else 0.0)


class NotANorm(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


class SelfishNorm(nn.Module):
    """Draws random numbers, warns, and changes itself at every call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        warnings.warn("somebody else's", stacklevel=1)
        self.calls += 1
        torch.rand(3)
        return F.rms_norm(x, (8,), self.weight, 1e-5)


class GatedNorm(nn.Module):
    def forward(self, x, gate):
        return F.rms_norm(x, x.shape[-1:]) * gate


STORED = ("running_mean", "running_var", "num_batches_tracked")


def look(module):
    """The one site of a model that holds `module`."""
    (site,) = normzoo.inspect(nn.Sequential(module)).sites
    return site


@pytest.mark.parametrize(
    "module, norm",
    [
        (RmsNorm(), Norm("rms", (24,), 1e-6, "gamma", offset=1.0, cast="gemma")),
        (RmsNorm(offset=0.0, eps=1e-8), Norm("rms", (24,), 1e-8, "gamma")),
        (RmsNorm(offset=0.0, early=True), Norm("rms", (24,), 1e-6, "gamma", cast="llama")),
        (RmsNorm(offset=0.5), None),
        (Norm2d(12, eps=1e-3), Norm("layer", (12,), 1e-3, "weight", "bias", axis=1)),
        (Norm2d(12, bias=False), Norm("layer", (12,), 1e-5, "weight", axis=1)),
        (ChannelsNorm(), Norm("layer", (10,), 1e-12, "weight", "beta", cast=None, axis=1)),
        (GroupedRmsNorm(), Norm("rms", (32,), 1e-6, "weight", cast=None, groups=4, arguments=("gate",))),
        (IgnoredWeightNorm(), Norm("rms", (16,), 1e-5, cast=None)),
        (
            FrozenNorm(),
            Norm("frozen_batch", (9,), 1e-5, "weight", "bias", STORED[:2], axis=1, dims=2),
        ),
        (
            BatchNormAct(),
            Norm("batch", (8,), 1e-5, "weight", "bias", STORED, axis=1, after=("act",), dims=2),
        ),
        (nn.GroupNorm(2, 8), Norm("group", (8,), 1e-5, "weight", "bias", axis=1, groups=2)),
        (nn.RMSNorm((2, 3)), Norm("rms", (2, 3), None, "weight")),
        (nn.LayerNorm(8, elementwise_affine=False), Norm("layer", (8,), 1e-5)),
        (normzoo.CRMSNorm(7), Norm("crms", (7,), 1e-5)),
        (
            normzoo.RMSNorm(8, offset=1.0, cast="gemma"),
            Norm("rms", (8,), None, "weight", offset=1.0, cast="gemma"),
        ),
        (nn.InstanceNorm2d(4), Norm("instance", (4,), 1e-5, axis=1, dims=2)),
        (
            nn.BatchNorm1d(4, momentum=None),
            Norm("batch", (4,), 1e-5, "weight", "bias", STORED, axis=1, dims=1, momentum=None),
        ),
        (nn.SyncBatchNorm(4, affine=False), Norm("batch", (4,), 1e-5, None, None, STORED, axis=1)),
        (normzoo.BatchNorm3d(4, bias=False), Norm("batch", (4,), 1e-5, "weight", None, STORED, axis=1, dims=3)),
        (normzoo.GhostBatchNorm(4, 2), Norm("ghost_batch", (4,), 1e-5, "weight", "bias", STORED, axis=1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_recognised(module, norm):
    assert look(module).norm == norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_recognised_in_any_dtype_and_on_meta(dtype):
    for module, norm in (
        (RmsNorm().to(dtype), Norm("rms", (24,), 1e-6, "gamma", offset=1.0, cast="gemma")),
        (RmsNorm(offset=0.0, early=True).to(dtype), Norm("rms", (24,), 1e-6, "gamma", cast="llama")),
        (ChannelsNorm().to(dtype), Norm("layer", (10,), 1e-12, "weight", "beta", cast=None, axis=1)),
    ):
        assert look(module).norm == norm
        assert look(copy.deepcopy(module).to("meta")).norm == norm


@pytest.mark.parametrize(
    "module, why",
    [
        (ScaleNorm(), r"shape \(1,\), which does not tell what it normalises"),
        (Renorm(8), r"computes a batch \(8,\), eps=1e-05 in eval mode and something else in training"),
        (TrainingNorm(8), r"computes a layer \(8,\), eps=1e-05 in eval mode and something else in training"),
        (NotANorm("norm"), "agrees with no norm known here; the nearest, .* is off by"),
        (GatedNorm(), "its forward needs gate beside the input"),
        (nn.LocalResponseNorm(2), "agrees with no norm known here"),
        (nn.LazyBatchNorm1d(), "no shape yet; run the model once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unknown_and_why(module, why):
    site = look(module)
    assert site.norm is None and site.how == ""
    with pytest.raises(ValueError, match=why):
        normzoo.convert(nn.Sequential(module, nn.LayerNorm(4)), strict=True)


def test_a_failing_forward_is_unknown():
    class BrokenNorm(NotANorm):
        def forward(self, x):
            raise KeyError("nothing\nhere")

    assert look(BrokenNorm("")).note == r"a test run of it failed: KeyError: 'nothing\nhere'"


def test_a_test_run_leaves_no_trace():
    module = SelfishNorm()
    module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module.train()
    site = look(module)
    assert site.norm == Norm("rms", (8,), 1e-5, "weight") and site.flags == ["has forward_hooks"]
    normzoo.plan(nn.Sequential(module))
    assert torch.equal(torch.get_rng_state(), random) and module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.weight.grad is None and module.weight.requires_grad


def test_names_decide_nothing():
    class Normal(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(Normal(), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Softmax(-1))
    assert normzoo.inspect(model).sites == []
    assert str(normzoo.inspect(model)) == "no norms"


def test_a_tag_asks_for_a_test_run():
    class Tagged(Rms):
        kernel_layer_name = "RMSNorm"

    assert normzoo.inspect(nn.Sequential(Rms())).sites == []
    assert look(Tagged()).norm.family == "rms"


def test_modules_around_norms_are_no_norms():
    class NormBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LayerNorm(4)

    assert [site.name for site in normzoo.inspect(nn.Sequential(NormBlock())).sites] == ["0.inner"]


def test_activations_stay_after_the_norm():
    class LayerNormAct(nn.LayerNorm):
        def __init__(self, width):
            super().__init__(width)
            self.drop, self.act = nn.Dropout(0.5), nn.GELU()

        def forward(self, input):
            return self.act(self.drop(super().forward(input)))

    model = nn.Sequential(LayerNormAct(8), LayerNormAct(8)).eval()
    with torch.no_grad():
        model[0].bias.normal_()
    x = torch.randn(3, 8)
    wanted, keys = model(x), model.state_dict().keys()
    assert look(model[0]).norm.after == ("drop", "act")
    act = model[0].act
    normzoo.convert(model, "layer_norm")
    assert isinstance(model[0], normzoo.LayerNorm) and model[0].act is act
    assert torch.equal(model(x), wanted) and model.state_dict().keys() == keys
    assert (model.train()(x) == 0).any()  # the dropout is at work


@pytest.mark.parametrize("module", [Norm2d(6), ChannelsNorm(6)], ids=["subclass", "by hand"])
def test_channels_are_converted(module, tmp_path):
    model = nn.Sequential(module)
    x = torch.randn(2, 6, 3, 4)
    wanted = model(x)
    if isinstance(module, ChannelsNorm):
        with pytest.raises(ValueError, match=r"normalises \(6,\) with a weight of shape \(6, 1, 1\)"):
            normzoo.convert(model)
        return
    normzoo.convert(model)
    assert isinstance(model[0], normzoo.LayerNorm)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


def test_equal_modules_are_run_once(monkeypatch):
    runs = []
    forward = Rms.forward
    monkeypatch.setattr(Rms, "forward", lambda self, x: runs.append(0) or forward(self, x))
    normzoo.inspect(nn.Sequential(RmsNorm()))
    once = len(runs)
    normzoo.inspect(nn.Sequential(*(RmsNorm() for _ in range(20))))
    assert len(runs) == 2 * once
    normzoo.inspect(nn.Sequential(RmsNorm(), RmsNorm(eps=1e-5)))
    assert len(runs) == 4 * once


def test_adapters():
    class Odd(nn.Module):
        def forward(self, x):
            return F.rms_norm(x, (8,), eps=1e-6)

    model = nn.Sequential(Odd(), nn.LayerNorm(8))
    assert len(normzoo.inspect(model).sites) == 1
    handles = [
        normzoo.register_adapter(Odd, lambda module: Norm("rms", (8,), 1e-6)),
        normzoo.register_adapter(lambda module: type(module) is nn.LayerNorm, lambda module: None),
    ]
    try:
        odd, layer = normzoo.inspect(model).sites
        assert odd.how == "adapter" and odd.norm == Norm("rms", (8,), 1e-6)
        assert layer.norm is None and layer.note == "its adapter leaves it alone"
        normzoo.convert(model)
        assert type(model[0]) is normzoo.RMSNorm and type(model[1]) is nn.LayerNorm
    finally:
        for handle in handles:
            handle.remove()
    assert [site.how for site in normzoo.inspect(model).sites] == ["class", "class"]
    with pytest.raises(TypeError, match="adapter is a Norm; it must be callable"):
        normzoo.register_adapter(Odd, Norm("rms", (8,), 1e-6))


def test_a_wrong_adapter_is_found_out():
    class Odd(nn.Module):
        def forward(self, x):
            return F.rms_norm(x, (8,), eps=1e-2)

    handle = normzoo.register_adapter(Odd, lambda module: Norm("rms", (8,), 1e-6))
    try:
        (step,) = normzoo.plan(nn.Sequential(Odd())).steps
    finally:
        handle.remove()
    assert step.exactness == "approximate" and step.error > 0.1
    assert step.reason == "a test run shows another function"


def test_functions_are_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, q):
            return F.normalize(self.norm(q), dim=-1) + F.layer_norm(q, (4,))

    found = normzoo.inspect(nn.Sequential(Attention()))
    assert list(found.functional.values()) == [("layer_norm", "normalize")]
    assert "Attention calls layer_norm, normalize as a function" in str(found)


def test_flags():
    model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4, momentum=0.99), nn.LayerNorm(4))
    model.append(model[0])
    model[2].weight = model[0].weight
    first, batch, last = normzoo.inspect(model).sites
    assert first.flags == ["also called 3", "shares a parameter with another module"]
    assert batch.flags == ["momentum=0.99: the running statistics are almost those of the last batch"]
    assert last.flags == ["shares a parameter with another module"]


class Block(nn.Module):
    """Sets its norm up in many ways, and reads it in one that forward does not lead to."""

    def __init__(self):
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(4), nn.LayerNorm(4)
        nn.init.ones_(self.norm.weight)

    def zero_init_last(self):
        nn.init.zeros_(self.norm.weight)

    _init_weights = initialize_weights = reset_parameters = prune_layers = zero_init_last

    def called_by_somebody(self, initial):
        return initial * self.fused.weight


def test_setting_up_is_no_reading():
    norm, fused = normzoo.inspect(nn.Sequential(Block())).sites
    assert norm.flags == [] and fused.flags == ["Block reads its weight itself"]


def test_json_says_all():
    model = nn.Sequential(nn.LayerNorm(4), Renorm(4))
    first, second = json.loads(normzoo.inspect(model).to_json())["sites"]
    assert first["name"] == "0" and first["class"] == "torch.nn.modules.normalization.LayerNorm"
    assert first["norm"]["family"] == "layer" and first["norm"]["shape"] == [4]
    assert first["recognised_by"] == "class"
    assert second["norm"] is None and "something else in training" in second["note"]
    with pytest.raises(TypeError, match=r"inspect: model is a str; it must be a torch\.nn\.Module"):
        normzoo.inspect("model")


def test_tables_take_like_names_together():
    model = nn.ModuleDict({"a": nn.Sequential(*(nn.LayerNorm(4) for _ in range(3))), "b": nn.LayerNorm(4)})
    lines = str(normzoo.inspect(model)).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["a.*", "x3"], ["b", "LayerNorm"]]
    assert lines[-1] == "4 norms: 4 layer"
