"""Rules for batch, group and instance norms, held to numbers: outputs, gradients and statistics."""

import copy

import pytest
import torch
import torch.distributed as dist
from small_models import ConvNet, stirred, without_bias
from torch import nn

import normzoo
from normzoo.conversion import Exactness

SHAPES = {1: (6, 8, 5), 2: (6, 8, 3, 4), 3: (6, 8, 2, 3, 2)}


def assert_alike(model, before, x, steps=3):
    """The same outputs, gradients and buffers, in training for some steps and in eval mode."""
    for training in [True] * steps + [False]:
        for each in (model, before):
            each.train(training).zero_grad()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        y, wanted = (each(t) for each, t in zip((model, before), inputs, strict=True))
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        (y.sin().sum() + wanted.sin().sum()).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        state, wanted = model.state_dict(), before.state_dict()
        assert list(state) == list(wanted)
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6, msg=name)
        x = x * 1.1 + 0.1


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(8, eps=1e-3, momentum=0.3),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm3d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        without_bias(nn.BatchNorm2d(8)),
        nn.GroupNorm(4, 8, eps=1e-3),
        nn.GroupNorm(1, 8, affine=False),
        nn.InstanceNorm1d(8, affine=True),
        nn.InstanceNorm2d(8, track_running_stats=True, momentum=0.2),
        nn.InstanceNorm3d(8),
    ],
    ids=str,
)
def test_the_same_layer(norm):
    model = stirred(nn.Sequential(norm))
    before = copy.deepcopy(model)
    tensors = dict((*norm.named_parameters(), *norm.named_buffers()))
    made = normzoo.plan(model)
    assert made.exactness is Exactness.EXACT and made.verify(torch.randn(SHAPES[made_dims(norm)])).same
    made.apply()
    new = model[0]
    assert type(new) is getattr(normzoo, type(norm).__name__) and new.training
    assert all(getattr(new, name) is t for name, t in tensors.items())
    for name in ("eps", "momentum", "affine", "track_running_stats", "num_features", "num_groups"):
        assert getattr(new, name, None) == getattr(norm, name, None), name
    assert_alike(model, before, torch.randn(SHAPES[made_dims(norm)]))


def made_dims(norm):
    return int(type(norm).__name__[-2]) if type(norm).__name__.endswith("d") else 2


def test_settings_come_along():
    norm = nn.BatchNorm2d(8)
    norm.weight.requires_grad_(False)
    norm.register_forward_hook(lambda module, args, y: y + 1)
    norm.remark = "mine"
    norm.eval()
    new = normzoo.convert(norm)
    assert not new.weight.requires_grad and new.bias.requires_grad and not new.training
    assert new.remark == "mine" and not new.sync and new.nonfinite == "propagate"
    x = torch.randn(2, 8, 2, 2)
    assert torch.equal(new(x), norm(x)) and new(x).mean() > 0.5
    kept = normzoo.convert(normzoo.BatchNorm2d(8, nonfinite="skip"), "batch_norm", momentum=0.2)
    assert kept.nonfinite == "skip" and kept.momentum == 0.2 and kept.batches_skipped == 0


def test_statistics_that_rest_go_on_resting():
    model = stirred(nn.Sequential(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True)))
    for norm in model:
        norm.track_running_stats = False
    before = copy.deepcopy(model)
    made = normzoo.plan(model, include="0")
    assert made.exactness is Exactness.EXACT
    made.apply()
    assert not model[0].track_running_stats
    assert_alike(model, before, torch.randn(4, 8, 3, 3))


def test_sync_batch_norm_takes_every_rank():
    model = stirred(nn.Sequential(nn.SyncBatchNorm(8, momentum=0.2)))
    before = copy.deepcopy(model)
    normzoo.convert(model)
    new = model[0]
    assert isinstance(new, normzoo.BatchNorm2d) and new.sync and new.process_group is None
    for shape in ((6, 8), *SHAPES.values()):
        assert_alike(model, before, torch.randn(shape), steps=1)
    again = copy.deepcopy(new)
    assert type(again) is type(new) and normzoo.inspect(new).sites[0].norm.dims is None
    with pytest.raises(ValueError, match="it is normzoo's batch_norm already"):
        normzoo.convert(model)


def test_the_class_that_was_asked_for():
    x = torch.randn(SHAPES[3])
    model = nn.Sequential(nn.SyncBatchNorm(8))
    assert type(normzoo.convert(copy.deepcopy(model), normzoo.BatchNorm3d)[0]) is normzoo.BatchNorm3d
    assert type(normzoo.convert(copy.deepcopy(model), "BatchNorm3d")[0]) is normzoo.BatchNorm3d
    assert type(normzoo.convert(nn.BatchNorm3d(8), "BatchNorm3d")) is normzoo.BatchNorm3d
    assert normzoo.convert(model)(x).shape == x.shape
    with pytest.raises(ValueError, match="takes the inputs of a BatchNorm2d, not those of a BatchNorm1d"):
        normzoo.convert(nn.BatchNorm2d(8), normzoo.BatchNorm1d)


def test_instead_of_torchs_sync_converter(caplog):
    shared = nn.BatchNorm2d(8)
    model = stirred(nn.Sequential(ConvNet(), shared, shared))
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model)
    model[0].norm.eval()
    normzoo.convert(model, "batch_norm", types="batch", sync=True)
    assert not caplog.records
    assert model[1] is model[2] and model[1].sync and model[0].norm.sync and not model[0].norm.training
    before[0].norm.eval()
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(model(x), before(x))
    assert len(calls) == 4
    (step,) = normzoo.plan(nn.BatchNorm2d(4), sync=True).steps
    assert step.exactness is Exactness.EVAL_EXACT
    assert step.reason == "sync=True differs from the old norm in training"
    (step,) = normzoo.plan(nn.BatchNorm2d(4), sync=True, momentum=0.3).steps
    assert step.reason == "momentum=0.3 and sync=True differ from the old norm in training"
    (step,) = normzoo.plan(nn.BatchNorm2d(4), eps=0.1).steps
    assert step.exactness is Exactness.APPROXIMATE
    again = normzoo.convert(nn.SyncBatchNorm(4), sync=False)
    assert not again.sync


def test_what_syncs_in_a_way_of_its_own_stays():
    class NaiveSyncBatchNorm(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input)

    step, _ = normzoo.plan(nn.Sequential(NaiveSyncBatchNorm(8), nn.BatchNorm2d(8))).steps
    assert step.action == "refuse" and "it is a NaiveSyncBatchNorm, and how it shares" in step.reason
    frozen = normzoo.freeze_batch_norm(NaiveSyncBatchNorm(8))
    assert type(normzoo.unfreeze_batch_norm(frozen)) is NaiveSyncBatchNorm


def test_process_groups_come_along():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        model = stirred(nn.Sequential(nn.SyncBatchNorm(8, process_group=group), nn.BatchNorm2d(8)))
        x = torch.randn(4, 8, 3, 3)
        assert normzoo.plan(model).verify(x).same
        normzoo.unfreeze_batch_norm(normzoo.freeze_batch_norm(model))
        normzoo.convert(model, include="0")
        normzoo.convert(model, "batch_norm", include="1", sync=True, process_group=group)
        assert all(norm.sync and norm.process_group is group for norm in model)
        assert normzoo.plan(model, sync=False, process_group=None).verify(x).same
        normzoo.convert(model, sync=False)
        assert not any(norm.sync or norm.process_group for norm in model)
    finally:
        dist.destroy_process_group()


def test_batch_to_frozen():
    model = stirred(ConvNet()).eval()
    x = torch.randn(4, 3, 6, 6)
    wanted, keys, statistics = model(x), [*model.state_dict()], model.norm.running_mean
    weight = model.norm.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = normzoo.plan(model, "frozen_batch_norm")
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same and not made.verify(x).trained
    assert "parameters change" in made.summary()
    made.apply(optimizer)
    norm = model.norm
    assert type(norm) is normzoo.FrozenBatchNorm and norm.running_mean is statistics
    assert not any("norm" in name for name, _ in model.named_parameters()) and [*model.state_dict()] == keys
    assert len(optimizer.param_groups[0]["params"]) == 2 and not hasattr(norm, "momentum")
    model.train()
    weight.data.add_(1)  # by an optimizer that goes on with it
    torch.testing.assert_close(model(x), wanted)
    made.revert()
    assert (
        model.norm.weight is weight
        and len(optimizer.param_groups[0]["params"]) == 4
        and type(model.norm) is nn.BatchNorm2d
    )


@pytest.mark.parametrize("holds", ["nothing", "weight", "both"])
@pytest.mark.parametrize("to", ["frozen_batch_norm", "ghost_batch_norm"])
def test_eval_mode_stays(holds, to):
    norm = nn.BatchNorm2d(8, eps=1e-2, momentum=0.3, affine=holds != "nothing")
    model = stirred(nn.Sequential(without_bias(norm) if holds == "weight" else norm)).eval()
    x = torch.randn(4, 8, 3, 3)
    wanted, keys = model(x), [*model.state_dict()]
    options = {"ghost_batch_size": 2, "split": "ceil"} if to.startswith("ghost") else {}
    normzoo.convert(model, to, **options, verify=x)
    torch.testing.assert_close(model(x), wanted)
    assert [*model.state_dict()] == keys
    if options:
        assert model[0].ghost_batch_size == 2 and model[0].split == "ceil" and model[0].momentum == 0.3
        model.train()(x)
        assert model[0].num_batches_tracked == 2


def test_frozen_to_batch():
    model = stirred(nn.Sequential(normzoo.FrozenBatchNorm(8), nn.Flatten(), nn.Linear(72, 1))).eval()
    x = torch.randn(4, 8, 3, 3)
    wanted, buffer = model(x), model[0].running_var
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = normzoo.plan(model, "batch_norm")
    assert made.exactness is Exactness.EVAL_EXACT
    made.apply(optimizer)
    norm = model[0]
    torch.testing.assert_close(model(x), wanted)
    assert isinstance(norm, normzoo.BatchNorm2d) and norm.running_var is buffer
    assert norm.weight.requires_grad and len(optimizer.param_groups[0]["params"]) == 4
    model.train()(x).sum().backward()
    assert norm.weight.grad is not None and norm.num_batches_tracked == 1
    made.revert()
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_ghost_to_batch_and_back():
    norm = stirred(normzoo.GhostBatchNorm(8, 2, split="ceil", momentum=0.3))
    x = torch.randn(4, 8, 3, 3)
    batch = normzoo.convert(norm, "batch_norm")
    assert batch.momentum == 0.3 and batch.weight is norm.weight and not hasattr(batch, "ghost_batch_size")
    assert torch.equal(batch.eval()(x), norm.eval()(x))
    assert normzoo.convert(batch, "ghost_batch_norm", ghost_batch_size=3).ghost_batch_size == 3
    frozen = normzoo.convert(norm, "frozen_batch_norm")
    assert torch.equal(frozen.train()(x), batch(x)) and not hasattr(frozen, "split")
    (step,) = normzoo.plan(norm, "ghost_batch_norm", ghost_batch_size=4).steps
    assert step.exactness is Exactness.EVAL_EXACT and step.make().module.split == "ceil"
    batch = normzoo.convert(normzoo.GhostBatchNorm(8, 2, bias=False), "batch_norm")
    assert batch.bias is None
    assert "bias=False" in repr(normzoo.convert(batch, "ghost_batch_norm", ghost_batch_size=2))


def test_group_and_instance():
    group = stirred(nn.GroupNorm(8, 8))
    x = torch.randn(4, 8, 3, 3)
    model = nn.Sequential(group)
    instance = normzoo.convert(copy.deepcopy(model), "instance_norm")
    assert isinstance(instance[0], normzoo.InstanceNorm2d) and not hasattr(instance[0], "num_groups")
    for shape in SHAPES.values():
        assert_alike(instance, model, torch.randn(shape), steps=1)
    assert normzoo.plan(model, "instance_norm").exactness is Exactness.EXACT
    torch.testing.assert_close(instance(x[:, :, 0, :]), group(x[:, :, 0, :]))  # 8 x 3, of a batch
    (step,) = normzoo.plan(instance, "group_norm").steps
    back = step.make().module
    assert step.exactness is Exactness.EXACT and type(back) is normzoo.GroupNorm and back.num_groups == 8
    assert not hasattr(back, "momentum") and back.weight is instance[0].weight
    torch.testing.assert_close(back(x), instance(x))
    (step,) = normzoo.plan(instance, "group_norm", num_groups=2).steps
    assert step.exactness is Exactness.APPROXIMATE


@pytest.mark.parametrize("to, options", [("group_norm", {"num_groups": 4}), ("instance_norm", {})])
def test_statistics_are_dropped(to, options):
    model = stirred(ConvNet())
    weight = model.norm.weight
    made = normzoo.plan(model, to, **options)
    (step,) = made.changes
    assert step.exactness is Exactness.APPROXIMATE and not made.verify(torch.randn(2, 3, 5, 5)).same
    assert step.tensors["lost"] == ("running_mean", "running_var", "num_batches_tracked")
    made.apply()
    assert model.norm.weight is weight and not any("running" in name for name in model.state_dict())
    assert not hasattr(model.norm, "momentum") or to == "instance_norm"
    x = torch.randn(2, 8, 2, 2)
    groups = options.get("num_groups", 8)
    torch.testing.assert_close(model.norm(x), nn.functional.group_norm(x, groups, weight, model.norm.bias))
    made.revert()
    assert "norm.running_mean" in model.state_dict()


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True)], ids=str)
def test_needs_calibration(norm, caplog):
    model = stirred(nn.Sequential(nn.Conv2d(3, 8, 1), norm))
    weight = norm.weight
    normzoo.convert(model, "batch_norm")
    assert "needs calibration" in caplog.text
    assert isinstance(model[1], normzoo.BatchNorm2d) and model[1].weight is weight
    assert not model[1].running_mean.any() and (model[1].running_var == 1).all()
    x = torch.randn(16, 3, 4, 4)
    y = normzoo.recalibrate(model, [x]).eval()(x)
    wanted = nn.functional.batch_norm(model[0](x), None, None, weight, model[1].bias, True)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)  # the unbiased variance is a little larger


def test_an_instance_norm_with_statistics_goes_on_with_them():
    model = stirred(nn.Sequential(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))).eval()
    x = torch.randn(4, 8, 3, 3)
    wanted, mean = model(x), model[0].running_mean
    made = normzoo.plan(model, "batch_norm")
    assert made.exactness is Exactness.EVAL_EXACT
    made.apply()
    assert torch.equal(model(x), wanted) and model[0].running_mean is mean


@pytest.mark.parametrize(
    "norm, to, words",
    [
        (
            nn.BatchNorm2d(8),
            "ghost_batch_norm",
            "ghost_batch_norm needs ghost_batch_size; pass ghost_batch_size=",
        ),
        (nn.BatchNorm2d(8), "group_norm", "group_norm needs num_groups; pass num_groups="),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            "frozen_batch_norm",
            "has no running statistics, by which",
        ),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            "ghost_batch_norm",
            "has no running statistics, by which",
        ),
        (
            nn.GroupNorm(4, 8),
            "instance_norm",
            "groups have 2 channels, and an instance norm takes each channel",
        ),
        (nn.InstanceNorm2d(8, track_running_stats=True), "group_norm", "running statistics in eval mode"),
        (nn.InstanceNorm2d(8), "ghost_batch_norm", "no rule takes an instance norm to ghost_batch_norm"),
        (nn.LazyBatchNorm2d(), "batch_norm", "no shape yet; run the model once"),
        (nn.BatchNorm2d(8, momentum=1.5), "batch_norm", "momentum is 1.5; it must be a number from 0 to 1"),
    ],
    ids=str,
)
def test_refusals(norm, to, words):
    model = nn.Sequential(norm, nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=words):
        normzoo.convert(model, to)
    assert model[0] is norm


def test_rows_of_channels_are_no_sample():
    model = normzoo.convert(nn.Sequential(nn.BatchNorm1d(8)), "instance_norm")
    x = torch.randn(8, 8, 5)
    torch.testing.assert_close(model(x), nn.functional.instance_norm(x))
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        model(torch.randn(8, 8))  # InstanceNorm1d would take it for one sample of 8 channels


def test_num_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="num_groups is 3; it must divide"):
        normzoo.convert(nn.BatchNorm2d(8), "group_norm", num_groups=3)


def test_ties_and_optimizers():
    model = stirred(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    model[1].weight = model[0].weight
    model[2] = model[0]
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, other)]
    x = torch.randn(4, 8, 3, 3)
    for step in range(4):
        if step == 2:
            normzoo.convert(model, optimizer=optimizers[0])
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).sin().sum().backward()
            optimizer.step()
    assert model[2] is model[0] and model[1].weight is model[0].weight
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match="another module shares its parameters, and a new weight, bias would unt"
    ):
        normzoo.plan(model, "frozen_batch_norm")


def test_meta_and_low_precision():
    with torch.device("meta"):
        model = ConvNet()
    made = normzoo.plan(model)
    assert made.exactness is Exactness.EXACT and made.steps[0].error <= 1e-6
    made.apply()
    assert model.norm.running_mean.is_meta and type(model.norm) is normzoo.BatchNorm2d
    for dtype in (torch.bfloat16, torch.float64):
        low = stirred(ConvNet()).to(dtype)
        assert normzoo.plan(low).verify(torch.randn(4, 3, 6, 6, dtype=dtype)).same
        normzoo.convert(low)
        assert low.norm.running_mean.dtype == low.norm.weight.dtype == dtype
