"""Conversions to and from PowerNorm and UnifiedNorm: what they compute, keep and claim."""

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred, without_bias
from torch import nn

import normzoo
from normzoo.conversion import Exactness, Norm, trial
from normzoo.functional import power_norm

TARGETS = {"power_norm": ("running_phi", "alpha_fwd"), "unified_norm": ("running_var", "decay")}
SOURCES = {
    "batch": lambda: nn.BatchNorm2d(8, eps=1e-2, momentum=0.25),
    "sync": lambda: nn.SyncBatchNorm(8, momentum=0.25),
    "ghost": lambda: normzoo.GhostBatchNorm(8, 2, momentum=0.25),
    "weight": lambda: without_bias(nn.BatchNorm2d(8, momentum=0.25)),
    "bare": lambda: nn.BatchNorm2d(8, momentum=0.25, affine=False),
    "frozen": lambda: normzoo.FrozenBatchNorm(8),
}


def images():
    return torch.randn(6, 8, 3, 4) * 2 + 1


def seen(norm):
    """A norm that has seen three batches."""
    norm = stirred(norm)
    if getattr(norm, "num_batches_tracked", None) is not None:
        norm.num_batches_tracked.fill_(3)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_from_a_batch_norm(target, source, dtype):
    model, x = nn.Sequential(seen(SOURCES[source]()).to(dtype)), images().to(dtype)
    old, wanted = model[0], model.eval()(images().to(dtype).zero_() + x)
    mean, var = old.running_mean, old.running_var
    made = normzoo.plan(model, target)
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    new = made.apply()[0]
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=50 * torch.finfo(dtype).eps)
    statistic, decay = TARGETS[target]
    phi = getattr(new, statistic)
    assert phi.dtype == dtype and torch.allclose(phi, var + mean.square())
    assert getattr(new, decay) == (0.9 if source == "frozen" else 0.75)
    assert new.channel_dim == 1 and new.eps == old.eps and new.weight.dtype == dtype and not new.training
    assert new.sync == (source == "sync") and new.nonfinite == "skip"
    assert {"weight", "bias", statistic} == {*step.tensors["converted"]} and step.tensors["kept"] == ()
    trained = {"bare": (False, False), "frozen": (False, False), "weight": (True, False)}
    assert (new.weight.requires_grad, new.bias.requires_grad) == trained.get(source, (True, True))
    if target == "power_norm":
        assert new.group_num is None and new.iters == new.warmup_iters == 10000
        before = new(x)
        torch.testing.assert_close(new.train()(x), before)  # it goes on where it was
        assert new.iters == 10001
    else:
        assert new.iters == 0 and not new.buffer_x2.any()
    fresh = normzoo.zoo.find(target).cls(8)
    assert vars(new).keys() == vars(fresh).keys() and new._buffers.keys() == fresh._buffers.keys()
    assert made.revert()[0] is old and torch.equal(old.running_var, var)
    torch.testing.assert_close(model.eval()(x), wanted, rtol=0, atol=0)


def test_warmup_after_a_conversion():
    fresh = normzoo.convert(nn.BatchNorm2d(8), "power_norm")
    assert fresh.iters == 0
    asked = normzoo.convert(seen(nn.BatchNorm2d(8)), "power_norm", warmup_iters=5)
    assert asked.iters == 0 and asked.warmup_iters == 5
    x = images()
    torch.testing.assert_close(asked(x), power_norm(x, None, asked.weight, asked.bias, 1e-5, None, 1))
    meta = normzoo.convert(nn.BatchNorm2d(8, device="meta"), "power_norm")
    assert meta.iters.is_meta and meta.running_phi.is_meta


def test_the_options_of_the_caller():
    model, x = nn.Sequential(seen(nn.BatchNorm2d(8))), images()
    for given in ({"eps": 0.5}, {"alpha_bkw": 0.5, "backward": "paper", "nonfinite": "propagate"}):
        made = normzoo.plan(model, "power_norm", **given)
        assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
        new = made.steps[0].make().module
        assert all(getattr(new, name) == value for name, value in given.items())
    (step,) = normzoo.plan(model, "power_norm", alpha_fwd=0.5).steps
    assert step.exactness is Exactness.EVAL_EXACT and "alpha_fwd=0.5 differs from the old norm" in step.reason
    assert normzoo.plan(model, "unified_norm", affine=False).exactness is Exactness.APPROXIMATE
    average = normzoo.convert(seen(nn.BatchNorm2d(8, momentum=None)), "power_norm")
    assert average.alpha_fwd == 0.9


@pytest.mark.parametrize("source", ["batch", "bare", "frozen"])
def test_with_group_scaling_the_statistics_start_anew(source):
    model, x = nn.Sequential(seen(SOURCES[source]())), images()
    old = model[0]
    made = normzoo.plan(model, "power_norm", group_num=4)
    (step,) = made.steps
    assert step.exactness is Exactness.CALIBRATE and "with group scaling running mean squares" in step.reason
    assert made.verify(x).passed and not made.verify(x).same
    new = made.apply()[0]
    assert new.group_num == 4 and new.iters == 0 and torch.equal(new.running_phi, torch.ones(8))
    assert (new.weight is None) == (source == "bare")
    if new.weight is not None:
        assert torch.equal(new.weight, old.weight) and torch.equal(new.bias, old.bias)
    normzoo.recalibrate(model, [x])
    torch.testing.assert_close(model.eval()(x), power_norm(x, None, new.weight, new.bias, new.eps, 4, 1))


def test_a_channel_where_shift_and_mean_cancel():
    """float32 leaves little of such an output; the claim is not given up for that."""
    norm = seen(nn.BatchNorm2d(8))
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.copy_(scale * norm.running_mean * (1 + 1e-4))
    made = normzoo.plan(nn.Sequential(norm), "power_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.steps[0].error > 1e-6
    assert made.verify(images()).same


def test_notes_are_short():
    for norm in (nn.BatchNorm2d(8), normzoo.FrozenBatchNorm(8), nn.LayerNorm(8), nn.RMSNorm(8)):
        for target in TARGETS:
            (step,) = normzoo.plan(nn.Sequential(norm), target).steps
            assert 20 < len(step.reason) < 150


def test_an_optimizer_follows():
    model = nn.Sequential(seen(nn.BatchNorm2d(8)), nn.Conv2d(8, 2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    old = model[0]
    normzoo.convert(model, "unified_norm", optimizer=optimizer)
    held = optimizer.param_groups[0]["params"]
    assert len(held) == 4 and any(p is model[0].weight for p in held)
    assert not any(p is old.weight for p in held)
    model(images()).sum().backward()
    optimizer.step()


def test_activations_stay():
    class Activated(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(8)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    model, x = nn.Sequential(seen(Activated())).eval(), images()
    wanted = model(x)
    assert (wanted == 0).any()
    torch.testing.assert_close(normzoo.convert(model, "power_norm", verify=x)(x), wanted)


@pytest.mark.parametrize(
    "norm, to, options, words",
    [
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            "power_norm",
            {},
            "no running statistics, by which a PowerNorm",
        ),
        (
            nn.LayerNorm((4, 8)),
            "power_norm",
            {},
            r"it normalises \(4, 8\) together, and a PowerNorm the channels of",
        ),
        (
            nn.RMSNorm((4, 8)),
            "unified_norm",
            {},
            r"it normalises \(4, 8\) together, and a UnifiedNorm the channels",
        ),
        (nn.GroupNorm(2, 8), "power_norm", {}, "no rule takes a group norm to power_norm"),
        (nn.BatchNorm2d(8), "power_norm", {"group_num": 3}, "group_num is 3; it must divide num_features = 8"),
        (nn.BatchNorm2d(8, eps=0.0), "power_norm", {}, "eps"),
        (
            normzoo.PowerNorm(8, channel_dim=1),
            "batch_norm",
            {},
            "scales groups of channels at every position first",
        ),
        (
            normzoo.UnifiedNorm(8),
            "batch_norm",
            {},
            "its channels are in dimension -1, and those of a batch norm in",
        ),
    ],
    ids=str,
)
def test_refusals(norm, to, options, words):
    with pytest.raises(ValueError, match=words):
        normzoo.convert(norm, to, **options)


def test_resting_statistics_do_not_begin_to_move():
    norm = seen(nn.BatchNorm2d(8))
    norm.track_running_stats = False
    with pytest.raises(ValueError, match="its running statistics rest, and those of a UnifiedNorm always move"):
        normzoo.convert(norm, "unified_norm")


@pytest.mark.parametrize("eps", [1e-5, 1e-6, None])
def test_an_rms_norm_is_group_scaling(eps):
    model, x = stirred(nn.Sequential(nn.RMSNorm(8, eps=eps))), torch.randn(5, 3, 8) * 0.1
    wanted, weight = model(x), model[0].weight
    made = normzoo.plan(model, "power_norm")
    assert made.exactness is (Exactness.EVAL_EXACT if eps == 1e-5 else Exactness.APPROXIMATE)
    assert made.verify(x).same == (eps == 1e-5) and "test run" not in made.steps[0].reason
    new = made.apply()[0].eval()
    assert new.weight is weight and new.bias is None and new.group_num == 1 and new.channel_dim == -1
    torch.testing.assert_close(model(x), wanted, rtol=1e-5 if eps == 1e-5 else 1e-2, atol=0)
    y = new.train()(x)
    torch.testing.assert_close(y, power_norm(x, None, weight, group_num=1))
    assert new.iters == 1


@pytest.mark.parametrize(
    "target, options", [("power_norm", {}), ("power_norm", {"group_num": None}), ("unified_norm", {})], ids=str
)
@pytest.mark.parametrize("over_channels", [False, True])
def test_from_a_layer_norm(target, options, over_channels):
    class OverChannels(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    norm = stirred((OverChannels if over_channels else nn.LayerNorm)(8, eps=1e-12))
    x = images() if over_channels else images().movedim(1, -1)
    groups = options.get("group_num", 1) if target == "power_norm" else None
    made = normzoo.plan(nn.Sequential(norm), target, **options)
    (step,) = made.steps
    assert step.exactness is (Exactness.APPROXIMATE if groups else Exactness.CALIBRATE)
    assert "padding counts unless normzoo.inputs gives pad_mask" in step.reason
    assert ("recalibrate(model, batches) before eval mode" in step.reason) == (groups is None)
    assert step.tensors["kept"] == ("weight", "bias") and step.tensors["lost"] == () and made.verify(x).passed
    model = made.apply().eval()
    new = model[0]
    assert new.weight is norm.weight and new.channel_dim == (1 if over_channels else -1) and new.eps == 1e-5
    if groups:  # an RMSNorm before any data
        rms = F.rms_norm(x.movedim(1, -1) if over_channels else x, (8,), norm.weight, 1e-5) + norm.bias
        torch.testing.assert_close(new(x), rms.movedim(-1, 1) if over_channels else rms)
    normzoo.recalibrate(model, [x])
    torch.testing.assert_close(
        new(x), power_norm(x, None, norm.weight, norm.bias, 1e-5, groups, new.channel_dim), rtol=1e-4, atol=1e-5
    )
    assert vars(new).keys() == vars(normzoo.zoo.find(target).cls(8)).keys()


def test_a_weight_that_is_an_offset():
    norm = normzoo.convert(stirred(nn.RMSNorm(8, eps=1e-5)), "rms_norm", offset=1.0)
    x = torch.randn(4, 8)
    made = normzoo.plan(nn.Sequential(norm), "power_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    assert torch.equal(made.apply()[0].weight, norm.weight + 1)


@pytest.mark.parametrize("source", ["power", "unified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_a_batch_norm(source, dtype):
    old = normzoo.PowerNorm(8, group_num=None, channel_dim=1, alpha_fwd=0.8, eps=1e-3)
    if source == "unified":
        old = normzoo.UnifiedNorm(8, channel_dim=1, decay=0.8, eps=1e-3, affine=False)
    old = stirred(old).to(dtype)
    old.iters.fill_(7)
    model, x = nn.Sequential(old), images().to(dtype)
    made = normzoo.plan(model, "batch_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    wanted = model.eval()(x)
    new = made.apply()[0]
    torch.testing.assert_close(
        model(x), wanted, **({"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {})
    )
    assert not new.running_mean.any() and new.num_batches_tracked == 7
    assert (new.momentum, new.eps, new.nonfinite) == (0.2, 1e-3, "skip")
    assert "running_mean is 0; nonfinite stays 'skip'" in made.steps[0].reason
    phi = getattr(old, TARGETS[f"{source}_norm"][0])
    assert new.running_var is phi
    assert type(new).__name__ == "BatchNorm2dOfAnyRank" and (new.weight is None) == (source == "unified")
    new.train()(x)
    assert new.running_mean.any()
    fresh = normzoo.BatchNorm2d(8)
    assert vars(new).keys() == vars(fresh).keys() and new._buffers.keys() == fresh._buffers.keys()


@pytest.mark.parametrize("axis", [-1, 1, -3, 2])
def test_from_one_to_the_other(axis):
    x = images().movedim(1, axis)
    old = stirred(normzoo.PowerNorm(8, group_num=None, channel_dim=axis, alpha_fwd=0.7, warmup_iters=3))
    old.iters.fill_(20)
    model = nn.Sequential(old)
    made = normzoo.plan(model, "unified_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    new = made.apply()[0]
    assert new.running_var is old.running_phi and new.weight is old.weight
    assert (new.channel_dim, new.decay, new.iters.item(), new.warmup_iters) == (axis, 0.7, 0, 4000)
    assert "ema_gz" in made.steps[0].tensors["lost"] and "running_phi" not in made.steps[0].tensors["lost"]
    new.iters.fill_(1)
    made = normzoo.plan(model, "power_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    back = made.apply()[0]
    assert back.running_phi is old.running_phi and back.group_num is None and back.iters == back.warmup_iters
    assert vars(back).keys() == vars(old).keys()


def test_groups_that_change():
    old = stirred(normzoo.PowerNorm(8, group_num=2))
    for to, given in (
        ("unified_norm", {}),
        ("power_norm", {"group_num": None}),
        ("power_norm", {"group_num": 4}),
    ):
        (step,) = normzoo.plan(nn.Sequential(old), to, **given).steps
        new = step.make().module
        assert step.exactness is Exactness.CALIBRATE and "its groups change, and running mean" in step.reason
        assert torch.equal(getattr(new, TARGETS[to][0]), torch.ones(8)) and new.weight is old.weight


@pytest.mark.parametrize("cls", [normzoo.PowerNorm, normzoo.UnifiedNorm])
def test_the_same_layer_with_other_settings(cls):
    old = cls(8, warmup_iters=2)
    for _ in range(4):
        old(torch.randn(5, 8)).sum().backward()
    model, name = nn.Sequential(old), normzoo.zoo.find(cls.__name__).name
    with pytest.raises(ValueError, match=f"it is normzoo's {name} already"):
        normzoo.convert(model)
    (step,) = normzoo.plan(model, warmup_iters=9, sync=True).steps
    assert step.exactness is Exactness.EVAL_EXACT and "sync=True and warmup_iters=9 differ" in step.reason
    new = step.make().module
    assert new.sync and new.warmup_iters == 9 and new.iters == 4
    state = {key: t for key, t in old.state_dict(keep_vars=True).items()}
    assert all(new.state_dict(keep_vars=True)[key] is t for key, t in state.items())
    if cls is normzoo.UnifiedNorm:
        wider = normzoo.convert(model, window_size=(4, 6), inplace=False)[0]
        assert wider.buffer_gz.shape == (6, 8) and not wider.buffer_x2.any()
        assert wider.iters == 4 and torch.equal(wider.ema_gz, old.ema_gz)
    model[0].__class__ = type("Marked", (cls,), {})
    assert normzoo.plan(model).exactness is Exactness.EXACT


def test_an_adapter_claims_no_more_than_a_test_run_shows():
    class Official(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
            self.register_buffer("running_phi", torch.ones(8))

        def forward(self, x):
            u = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return u * self.weight / (self.running_phi + 1e-3).sqrt() + self.bias

    norm = Norm("power", (8,), 1e-3, "weight", "bias", ("running_phi",), momentum=0.2)
    handle = normzoo.register_adapter(Official, lambda module: norm)
    try:
        model, x = stirred(nn.Sequential(Official())), torch.randn(4, 8)
        made = normzoo.plan(model)
        assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
        new = made.steps[0].make().module
        assert new.alpha_fwd == 0.8 and new.group_num == 1 and new.running_phi is model[0].running_phi
    finally:
        handle.remove()


def test_a_stand_in_has_mean_squares_above_zero():
    """Below it, a test run would compare NaN with NaN."""
    for layer in (normzoo.PowerNorm(8), normzoo.UnifiedNorm(8)):
        twin = trial.stand_in(layer)
        assert twin.eval()(torch.randn(3, 8)).isfinite().all()


def test_inspect():
    model = nn.Sequential(
        normzoo.PowerNorm(8),
        normzoo.PowerNorm(8, group_num=None, channel_dim=1),
        normzoo.UnifiedNorm(8, decay=0.5),
    )
    assert [(site.family, site.how, site.describe()) for site in normzoo.inspect(model).sites] == [
        ("power", "class", "power (8,), eps=1e-05"),
        ("power", "class", "power (8,), eps=1e-05, groups=None, channels in dimension 1"),
        ("unified", "class", "unified (8,), eps=1e-05, momentum=0.5"),
    ]
