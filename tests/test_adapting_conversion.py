"""Conversions to and from the norms that adapt: what they keep, what they compute, and what is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred, without_bias
from torch import nn

import normzoo
from normzoo.conversion import Exactness
from normzoo.functional import adab2n, alpha_batch_norm, batch_channel_norm
from normzoo.zoo import find

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def images(*shape):
    return torch.randn(*(shape or (6, 8, 3, 4))) * 2 + 1


def assert_no_leftovers(new):
    """It has the attributes of a fresh layer, and no more."""
    signature = {"num_features": 8, "num_groups": 4, "num_tasks": 3, "ghost_batch_size": 2}
    entry = find(type(new).__name__.removesuffix("OfAnyRank"))
    needed = {"adab2n": ("num_tasks",), "batch_channel_norm": ("num_groups",), "ghost_batch_norm": ()}
    fresh = entry.cls(8, *(signature[name] for name in needed.get(entry.name, ())))
    assert vars(new).keys() == vars(fresh).keys()
    assert new._buffers.keys() == fresh._buffers.keys() and new._parameters.keys() == fresh._parameters.keys()


@pytest.mark.parametrize("source", ["batch", "ghost_batch", "adab2n"])
@pytest.mark.parametrize("given", [{}, {"test_weight": 0.4}, {"pseudo_count": 18}], ids=str)
def test_to_alpha(source, given):
    norm = {
        "batch": nn.BatchNorm2d(8, eps=1e-2, momentum=0.3),
        "ghost_batch": normzoo.GhostBatchNorm(8, 2, eps=1e-2, nonfinite="skip"),
        "adab2n": normzoo.AdaB2N(8, 3, eps=1e-2, kappa=0.4),
    }[source]
    model = stirred(nn.Sequential(norm)).eval()
    made = normzoo.plan(model, "alpha_batch_norm", **given)
    (step,) = made.steps
    assert step.exactness is Exactness.APPROXIMATE and "the batch at hand has a part" in step.reason
    assert step.tensors["kept"] == STATE and step.error > 1e-3
    assert step.tensors["new"] == (("batches_skipped",) if source == "ghost_batch" else ())
    lost = {"ghost_batch": ("batches_skipped",), "adab2n": ("task_weight", "cur_tasks")}
    assert step.tensors["lost"] == lost.get(source, ())
    x = images()
    assert made.verify(x).passed and not made.verify(x).same
    made.apply()
    new, share = model[0], {"{}": 0.9, "{'test_weight': 0.4}": 0.6}.get(str(given), 18 / (18 + 6))
    assert type(new) is normzoo.AlphaBatchNorm and not new.training
    assert all(getattr(new, name) is getattr(norm, name) for name in STATE)
    assert new.nonfinite == getattr(norm, "nonfinite", "propagate")
    for mode in (True, False):
        wanted = alpha_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, share, 1e-2)
        torch.testing.assert_close(new.train(mode)(x), wanted)
    assert_no_leftovers(new)
    assert vars(new).keys() == vars(normzoo.AlphaBatchNorm.from_batch_norm(nn.BatchNorm2d(8))).keys()
    assert made.revert()[0] is norm


@pytest.mark.parametrize(
    "given", [{"source_weight": 1}, {"test_weight": 0}, {"source_weight": 1.0, "sync": True}]
)
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8), normzoo.FrozenBatchNorm(8), normzoo.AdaB2N(8, 3)], ids=repr
)
def test_the_source_alone_is_eval_exact(norm, given):
    model, x = stirred(nn.Sequential(copy.deepcopy(norm))), images()
    made = normzoo.plan(model, "alpha_batch_norm", **given)
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    assert made.steps[0].reason.startswith("with source_weight=1 the stored statistics count alone")
    wanted = model.eval()(x)
    torch.testing.assert_close(made.apply().train()(x), wanted)
    assert normzoo.plan(model, "batch_norm").exactness is Exactness.EVAL_EXACT
    assert normzoo.plan(model, "batch_norm").verify(x).same
    other = normzoo.plan(nn.Sequential(copy.deepcopy(norm)), "alpha_batch_norm", **given, eps=0.1)
    assert other.exactness is Exactness.APPROXIMATE


def test_frozen_to_alpha_keeps_the_weights_still():
    norm = stirred(normzoo.FrozenBatchNorm(8))
    new = normzoo.convert(norm, "alpha_batch_norm", source_weight=0.3)
    assert new.running_var is norm.running_var and not new.weight.requires_grad
    assert isinstance(new.weight, nn.Parameter) and torch.equal(new.weight, norm.weight)
    new.weight.data.add_(1)
    assert not torch.equal(new.weight, norm.weight)
    bare = normzoo.FrozenBatchNorm(8)
    bare.weight = bare.bias = None
    assert normzoo.convert(bare, "alpha_batch_norm").weight is None


def test_alpha_again_with_another_source():
    model = stirred(nn.Sequential(normzoo.AlphaBatchNorm(8, pseudo_count=16, unbiased=False)))
    old, x = model[0], images()
    with pytest.raises(ValueError, match="it is normzoo's alpha_batch_norm already"):
        normzoo.convert(model)
    for given, wanted in (
        ({"source_weight": 0.5}, (0.5, None)),
        ({"test_weight": 0.25}, (0.75, None)),
        ({"pseudo_count": 4}, (None, 4)),
        ({"unbiased": True}, (None, 16)),
    ):
        (step,) = normzoo.plan(model, **given).steps
        new = step.make().module
        assert (new.source_weight, new.pseudo_count) == wanted and new.unbiased == given.get("unbiased", False)
        assert step.exactness is Exactness.APPROXIMATE and new.running_mean is old.running_mean
    (step,) = normzoo.plan(model, pseudo_count=16, nonfinite="skip").steps
    assert step.exactness is Exactness.EVAL_EXACT and step.make().module.batches_skipped == 0
    assert normzoo.plan(model, pseudo_count=16).exactness is Exactness.EXACT
    synced = normzoo.convert(normzoo.AlphaBatchNorm(8, sync=True), "same", source_weight=0.2)
    assert synced.sync and not normzoo.convert(nn.SyncBatchNorm(8), "alpha_batch_norm").sync
    with pytest.raises(ValueError, match="test_weight and pseudo_count are given; each sets the weight"):
        normzoo.convert(model, pseudo_count=1, test_weight=0.1)
    for given in ({"test_weight": 0.5}, {"pseudo_count": 4}):  # 0.9 is the default, and given all the same
        for norm in (model, nn.BatchNorm2d(8)):
            with pytest.raises(
                ValueError, match="and source_weight are given; each sets the weight of the source"
            ):
                normzoo.convert(norm, "alpha_batch_norm", source_weight=0.9, **given)
    assert model[0] is old and model(x).isfinite().all()


@pytest.mark.parametrize("to", ["batch_norm", "frozen_batch_norm"])
def test_from_alpha(to):
    norm, x = stirred(normzoo.AlphaBatchNorm(8, source_weight=0.4, bias=False)), images()
    made = normzoo.plan(norm, to)
    assert made.exactness is Exactness.APPROXIMATE and "test run" not in made.steps[0].reason
    new = made.apply()
    wanted = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight)
    torch.testing.assert_close(new.eval()(x), wanted)
    assert new.running_mean is norm.running_mean and not hasattr(new, "source_weight")
    if to == "batch_norm":
        assert new.weight is norm.weight and new.momentum == 0.1 and new.bias is None
        assert_no_leftovers(new)


@pytest.mark.parametrize("holds", ["both", "weight", "nothing"])
@pytest.mark.parametrize("ghost", [False, True])
def test_to_adab2n(holds, ghost):
    affine = holds != "nothing"
    norm = (
        nn.BatchNorm2d(8, 1e-2, 0.3, affine) if not ghost else normzoo.GhostBatchNorm(8, 2, 1e-2, 0.3, affine)
    )
    if holds == "weight":
        without_bias(norm)
    model = stirred(nn.Sequential(norm, nn.Conv2d(8, 2, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, x, ids = len(optimizer.param_groups[0]["params"]), images(), torch.tensor([0, 0, 0, 0, 1, 4])
    made = normzoo.plan(model, "adab2n", num_tasks=5, init_weight=2.0)
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    assert made.steps[0].tensors["new"] == ("task_weight", "cur_tasks")
    made.apply(optimizer)
    new = model[0]
    assert len(optimizer.param_groups[0]["params"]) == parameters + 1
    assert all(getattr(new, name) is getattr(norm, name) for name in STATE)
    assert (new.momentum, new.num_tasks, new.eps) == (0.3, 5, 1e-2) and new.training
    before = new.running_mean.clone()
    with normzoo.inputs(model, task_ids=ids):
        y = model(x)
    wanted = adab2n(x, ids, torch.full((5,), 2.0), new.weight, new.bias, 1e-2)
    torch.testing.assert_close(y, model[1](wanted))
    assert not torch.equal(new.running_mean, before)
    assert_no_leftovers(new)


@pytest.mark.parametrize(
    "norm, options, words",
    [
        (nn.BatchNorm2d(8), {}, "adab2n needs num_tasks; pass num_tasks="),
        (
            nn.BatchNorm2d(8, momentum=None),
            {"num_tasks": 5},
            "momentum is None; it must be a number from 0 to 1",
        ),
        (nn.BatchNorm2d(8, momentum=0), {"num_tasks": 5}, "momentum is 0; it must be positive, or the running"),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            {"num_tasks": 5},
            "no running statistics, by which AdaB2N normalises in eval mode",
        ),
        (nn.GroupNorm(4, 8), {"num_tasks": 5}, "no rule takes a group norm to adab2n"),
    ],
    ids=str,
)
def test_refused_by_adab2n(norm, options, words):
    with pytest.raises(ValueError, match=words):
        normzoo.convert(norm, "adab2n", **options)


def test_resting_statistics_do_not_begin_to_move():
    norm = nn.BatchNorm2d(8)
    norm.track_running_stats = False
    for to, options in (("adab2n", {"num_tasks": 2}), ("batch_channel_norm", {"num_groups": 2})):
        with pytest.raises(ValueError, match=r"its running statistics rest, and those of .* always move"):
            normzoo.convert(norm, to, **options)


def test_momentum_can_be_given_instead():
    norm = normzoo.convert(nn.BatchNorm2d(8, momentum=None), "adab2n", num_tasks=5, momentum=0.2, kappa=0)
    assert norm.momentum == 0.2 and norm.kappa == 0


def test_from_adab2n():
    norm, x = stirred(normzoo.AdaB2N(8, 3, momentum=0.2, absent="official")), images()
    norm.end_task()
    norm(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    made = normzoo.plan(norm, "batch_norm")
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and step.tensors["lost"] == ("task_weight", "cur_tasks")
    assert made.verify(x).same
    new = made.apply(optimizer)
    assert all(getattr(new, name) is getattr(norm, name) for name in STATE) and new.momentum == 0.2
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert_no_leftovers(new)
    nn.BatchNorm2d(8).load_state_dict(new.state_dict())
    with pytest.raises(ValueError, match="no layer of the model takes task_ids"):
        normzoo.inputs(new, task_ids=torch.tensor([0]))
    frozen = normzoo.plan(norm, "frozen_batch_norm")
    assert frozen.exactness is Exactness.EVAL_EXACT and frozen.verify(x).same
    assert not hasattr(frozen.apply(), "absent")


def test_adab2n_again():
    model = stirred(nn.Sequential(normzoo.AdaB2N(8, 3, kappa=0.4, init_weight=1.0)))
    old = model[0]
    old.end_task()
    (step,) = normzoo.plan(model, absent="official", kappa=1.0).steps
    new = step.make().module
    assert step.exactness is Exactness.EVAL_EXACT and "absent='official' and kappa=1.0 differ" in step.reason
    assert new.task_weight is old.task_weight and new.cur_tasks is old.cur_tasks and new.cur_tasks == 1
    assert (new.absent, new.kappa, new.init_weight, new.num_tasks) == ("official", 1.0, 1.0, 3)
    with pytest.raises(
        ValueError, match="task_weight has 3 entries and that of the layer 2; there can be more, but"
    ):
        normzoo.convert(model, num_tasks=2)
    assert model[0] is old


@pytest.mark.parametrize("to", ["same", "adab2n"])
def test_adab2n_for_more_tasks(to):
    old, last = normzoo.AdaB2N(8, 3, init_weight=1.0), nn.Conv2d(8, 2, 1)
    model = stirred(nn.Sequential(old, last))
    old.task_weight.data.copy_(torch.tensor([1.5, -2.0, 0.5]))
    old.end_task()
    optimizer = torch.optim.SGD(
        [{"params": [*last.parameters()]}, {"params": [*old.parameters()], "lr": 0.5}], lr=0.1, momentum=0.9
    )
    x, ids = images(), torch.tensor([0, 0, 1, 2, 4, 4])
    with normzoo.inputs(model, task_ids=ids.clamp(max=2)):
        model(x).sum().backward()
    optimizer.step()
    values, ended, momenta = old.task_weight.detach().clone(), old.cur_tasks, optimizer.state[old.weight]
    made = normzoo.plan(model, to, num_tasks=5, init_weight=3.0)
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    assert "num_tasks=5 differ from the old norm in training" in step.reason
    assert step.tensors["converted"] == ("task_weight",) and step.tensors["new"] == step.tensors["lost"] == ()
    assert step.tensors["kept"] == (*STATE, "cur_tasks") and step.parameters_change
    made.apply(optimizer)
    new = model[0]
    assert torch.equal(new.task_weight, torch.cat((values, torch.full((2,), 3.0))))
    assert new.num_tasks == 5 and new.cur_tasks is ended and ended == 1
    with torch.no_grad():
        new.task_weight[0] += 1
    assert torch.equal(old.task_weight, values)
    group = optimizer.param_groups[1]["params"]
    assert any(p is new.task_weight for p in group) and not any(p is old.task_weight for p in group)
    assert new.task_weight not in optimizer.state and optimizer.state[new.weight] is momenta
    with normzoo.inputs(model, task_ids=ids):
        y = model(x)
    torch.testing.assert_close(y, last(adab2n(x, ids, new.task_weight, new.weight, new.bias)))
    y.sum().backward()
    assert new.task_weight.grad[4] != 0
    made.revert()
    assert model[0] is old and any(p is old.task_weight for p in group)


def test_adab2n_grows_as_it_is():
    """Frozen, in a dtype of its own, on meta, or not at all where another module shares the weights."""
    norm = normzoo.AdaB2N(4, 2, dtype=torch.float64).requires_grad_(False)
    norm.task_weight.data = norm.task_weight.data.half()
    new = normzoo.convert(norm, num_tasks=3)
    assert new.task_weight.dtype == torch.float16 and not new.task_weight.requires_grad
    assert normzoo.convert(normzoo.AdaB2N(4, 2, device="meta"), num_tasks=3).task_weight.shape == (3,)
    model = nn.Sequential(normzoo.AdaB2N(4, 2), normzoo.AdaB2N(4, 2))
    model[1].task_weight = model[0].task_weight
    with pytest.raises(ValueError, match="shares its parameters, and a new task_weight would untie them"):
        normzoo.convert(model, num_tasks=3)


@pytest.mark.parametrize("holds", ["both", "weight", "nothing"])
def test_batch_to_batch_channel(holds):
    norm = nn.BatchNorm2d(8, eps=1e-2, momentum=None, affine=holds != "nothing")
    model, x = stirred(nn.Sequential(without_bias(norm) if holds == "weight" else norm)), images()
    assert normzoo.plan(model, "batch_channel_norm", num_groups=4).steps[0].make().module.eps == 1e-5
    made = normzoo.plan(model, "batch_channel_norm", num_groups=4, eps=1e-4)
    (step,) = made.steps
    kept = {"both": STATE, "weight": ("weight", *STATE[2:]), "nothing": STATE[2:]}[holds]
    new = {"both": (), "weight": ("bias",), "nothing": ("weight", "bias")}[holds]
    assert made.exactness is Exactness.APPROXIMATE and made.verify(x).passed
    assert step.tensors["kept"] == kept and step.tensors["new"] == (*new, "channel_weight", "channel_bias")
    made.apply()
    layer = model[0]
    assert all(getattr(layer, name) is getattr(norm, name) for name in kept)
    assert (layer.eps, layer.batch_eps, layer.momentum, layer.num_groups) == (1e-4, 1e-2, None, 4)
    first = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-2)
    torch.testing.assert_close(model.eval()(x), F.group_norm(first, 4, eps=1e-4))
    first = F.batch_norm(x, None, None, norm.weight, norm.bias, True, eps=1e-2)
    torch.testing.assert_close(model.train()(x), F.group_norm(first, 4, eps=1e-4))
    assert_no_leftovers(layer)


@pytest.mark.parametrize("affine", [True, False])
def test_group_to_batch_channel(affine, caplog):
    group, x = stirred(nn.GroupNorm(4, 8, eps=1e-2, affine=affine)), images()
    model = nn.Sequential(group)
    made = normzoo.plan(model, "batch_channel_norm")
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and "the identity at first" in step.reason
    assert made.verify(x).same and step.tensors["converted"] == step.tensors["lost"] == ()
    assert step.tensors["kept"] == (("channel_weight", "channel_bias") if affine else ())
    assert ("weight -> channel_weight, bias -> channel_bias" in step.reason) == affine
    single = nn.GroupNorm(4, 8)
    single.bias = None
    (alone,) = normzoo.plan(nn.Sequential(single), "batch_channel_norm").steps
    assert alone.reason.endswith("; weight is called channel_weight from now on, in the state dict too")
    wanted = group(x)
    made.apply()
    new = model[0]
    assert (new.eps, new.num_groups, new.channel_affine) == (1e-2, 4, "channel")
    assert not affine or (new.channel_weight is group.weight and new.channel_bias is group.bias)
    small = x * 1e-3  # for which an eps that is off by batch_eps would show
    torch.testing.assert_close(model.eval()(small), group(small), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(x), wanted)
    assert_no_leftovers(new)
    calibrated = normzoo.recalibrate(model, [x])[0]
    assert calibrated.num_batches_tracked == 1
    torch.testing.assert_close(calibrated.running_mean, x.mean((0, 2, 3)))
    assert (model(x) - wanted).abs().max() > 0.01 and not caplog.records
    for batch_eps, exactness in ((0.5, Exactness.EVAL_EXACT), (2.0, Exactness.APPROXIMATE)):
        (step,) = normzoo.plan(group, "batch_channel_norm", batch_eps=batch_eps).steps
        assert step.exactness is exactness and step.make().module.running_var.min() >= 0
    if affine:
        with pytest.raises(
            ValueError, match=r"weight has shape \(8,\), and channel_weight of the layer \(4,\)"
        ):
            normzoo.convert(group, "batch_channel_norm", channel_affine="group")


def test_batch_channel_again():
    old = stirred(
        normzoo.BatchChannelNorm(8, 4, 1e-3, estimate=True, update_rate=0.2, batch_eps=1e-2, sync=True)
    )
    (step,) = normzoo.plan(old, estimate=False).steps
    new = step.make().module
    assert step.exactness is Exactness.EVAL_EXACT and new.update_rate is None and new.sync
    assert (new.eps, new.batch_eps, new.num_groups) == (1e-3, 1e-2, 4)
    assert all(getattr(new, name) is t for name, t in old.named_parameters())
    (step,) = normzoo.plan(old, update_rate=0.1, order="mean_first").steps
    assert step.make().module.estimate and step.exactness is Exactness.EVAL_EXACT
    (step,) = normzoo.plan(old, num_groups=4, batch_eps=0.1).steps
    assert step.exactness is Exactness.APPROXIMATE
    assert not normzoo.convert(old, sync=False).sync
    x = images()
    y = batch_channel_norm(x, old.running_mean, old.running_var, 4, *old.parameters(), eps=1e-3, batch_eps=1e-2)
    torch.testing.assert_close(normzoo.convert(old, order="mean_first").eval()(x), y)


@pytest.mark.parametrize("target", ["frozen_batch_norm", "batch_norm"])
def test_leaving_alpha_is_exact_where_the_batch_had_no_part(target):
    for weight, exactness in ((1.0, Exactness.EVAL_EXACT), (0.5, Exactness.APPROXIMATE)):
        (step,) = normzoo.plan(normzoo.AlphaBatchNorm(8, source_weight=weight), target).steps
        assert step.exactness is exactness


def test_alpha_anew_keeps_its_process_group():
    group = object()
    again = normzoo.convert(
        normzoo.AlphaBatchNorm(8, sync=True, process_group=group), "same", source_weight=0.2
    )
    assert again.process_group is group and again.sync
