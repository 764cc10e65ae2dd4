"""Whole models with the norms that adapt: converted, frozen, recalibrated, in any spelling; lookalikes."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from small_models import ConvNet, stirred
from torch import nn

import normzoo
from normzoo import cli
from normzoo.conversion import Exactness
from normzoo.zoo import find

OPTIONS = {
    "alpha_batch_norm": {"source_weight": 0.5},
    "adab2n": {"num_tasks": 5},
    "batch_channel_norm": {"num_groups": 4},
}
CLASSES = {name: find(name).cls for name in OPTIONS}


@pytest.mark.parametrize(
    "name",
    ["adab2n", "ada_b2n", "AdaB2N", "ADAB2N", "AlphaBatchNorm", "alphabatchnorm", "layernorm", "Layer_Norm"],
)
def test_spellings(name):
    (entry,) = (e for e in normzoo.ZOO if name.replace("_", "").lower() == e.cls.__name__.lower())
    assert find(name) is entry
    norm = nn.LayerNorm(8) if entry.name == "layer_norm" else nn.BatchNorm1d(8)
    assert type(normzoo.convert(norm, name, **OPTIONS.get(entry.name, {}))) is entry.cls


def test_spellings_of_one_class_of_several():
    assert (
        find("batchnorm3d") is find("batch_norm")
        and find("batch_norm").called("batch_norm_3d").__name__[-2:] == "3d"
    )
    assert type(normzoo.convert(nn.SyncBatchNorm(8), "batchnorm3d")) is normzoo.BatchNorm3d
    with pytest.raises(
        ValueError, match=r"^normzoo: there is no layer called 'adab3n'; .*; did you mean adab2n\?$"
    ):
        find("adab3n")
    with pytest.raises(ValueError, match=r"^convert: .* 'Adab3n'; .*, or 'same'; did you mean adab2n\?$"):
        normzoo.convert(nn.BatchNorm1d(8), "Adab3n")


def test_spellings_on_the_command_line(tmp_path, capsys):
    assert cli.main(["info", "ada_b2n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == "normzoo.AdaB2N"
    assert cli.main(["info", "BATCHNORM1D", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == "normzoo.BatchNorm1d"
    file = tmp_path / "own.py"
    file.write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.BatchNorm1d(4))\n")
    command = ["convert", f"{file}:make", "--to", "Ada_B2N", "--dry-run", "--input", "6,4", "--json"]
    assert cli.main([*command, "--option", "num_tasks=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["target"] == "adab2n" and found["proof"]["same"]
    assert cli.main(command) == 2
    assert "adab2n needs num_tasks" in capsys.readouterr().err


@pytest.mark.parametrize("to", OPTIONS)
def test_resnet(to):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    x, keys = torch.randn(2, 3, 64, 64), [*model.state_dict()]
    weights = {name: p for name, p in model.named_parameters()}
    wanted = model(x)
    made = normzoo.plan(model, to, strict=True, **OPTIONS[to])
    proof = made.verify(x)
    assert len(made.changes) == 20 and proof.passed and proof.same == (to == "adab2n")
    made.apply()
    assert sum(type(module) is CLASSES[to] for module in model.modules()) == 20
    assert all(dict(model.named_parameters())[name] is p for name, p in weights.items())
    y = model(x)
    if to == "adab2n":
        torch.testing.assert_close(y, wanted)
    else:
        assert (y - wanted).abs().max() > 0.01
    assert (list(model.state_dict()) == keys) == (to == "alpha_batch_norm")
    with pytest.raises(ValueError, match=f"it is normzoo's {to} already"):
        normzoo.convert(model, "same")
    made.revert()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("to", OPTIONS)
@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm1d(8), (6, 8)),
        (nn.BatchNorm1d(8), (6, 8, 5)),
        (nn.BatchNorm2d(8), (6, 8, 3, 2)),
        (nn.BatchNorm3d(8), (4, 8, 2, 3, 2)),
        (nn.SyncBatchNorm(8), (6, 8, 3)),
        (normzoo.BatchNorm2d(8), (6, 8, 3, 2)),
    ],
    ids=str,
)
def test_a_root_of_any_rank(norm, shape, to):
    norm, x = stirred(copy.deepcopy(norm)).eval(), torch.randn(shape)
    wanted = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    made = normzoo.plan(norm, to, **OPTIONS[to])
    assert made.verify(x).passed
    new = made.apply()
    assert type(new) is CLASSES[to] and not new.training and new.running_mean is norm.running_mean
    if to == "adab2n":
        torch.testing.assert_close(new(x), wanted)
    elif to == "batch_channel_norm":
        torch.testing.assert_close(new(x), F.group_norm(wanted, 4))
    else:
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = (norm.running_mean + x.mean(dims)) / 2, (norm.running_var + x.var(dims)) / 2
        torch.testing.assert_close(new(x), F.batch_norm(x, mean, var, norm.weight, norm.bias))
    assert new.sync == (type(norm) is nn.SyncBatchNorm and to != "alpha_batch_norm")


@pytest.mark.parametrize("to", OPTIONS)
def test_shared_and_wrapped(to):
    shared = nn.BatchNorm2d(8)
    model = stirred(nn.Sequential(shared, ConvNet(), shared))
    model[1].norm.weight = shared.weight
    model[1].first = nn.Conv2d(8, 8, 1)
    normzoo.convert(model, to, **OPTIONS[to])
    assert model[0] is model[2] and model[1].norm.weight is model[0].weight is shared.weight
    assert model[1].norm is not model[0] and model(torch.randn(4, 8, 3, 3)).isfinite().all()

    class DistributedDataParallel(nn.Module):
        __module__ = "torch.nn.parallel.distributed"

        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.BatchNorm1d(4))

    with pytest.raises(ValueError, match=r"wrapped \(DistributedDataParallel\).*then wrap it"):
        normzoo.convert(DistributedDataParallel(), to, **OPTIONS[to])


def test_an_activation_follows():
    layers = pytest.importorskip("timm.layers")
    model, x = stirred(nn.Sequential(layers.BatchNormAct2d(8, act_layer="silu"))), torch.randn(4, 8, 3, 3)
    ids = torch.tensor([0, 0, 0, 1])
    normzoo.convert(model, "adab2n", num_tasks=2)
    new = model[0]
    with normzoo.inputs(model, task_ids=ids):
        y = model(x)
    bare = normzoo.functional.adab2n(x, ids, new.task_weight, new.weight, new.bias)
    torch.testing.assert_close(y, F.silu(bare))
    assert torch.equal(new(x, ids), y) and new.loss.requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # after a pass with a graph
        assert torch.equal(other[0](x, ids), y) and type(other[0]) is type(new)
    with pytest.raises(ValueError, match="it is normzoo's adab2n already"):
        normzoo.convert(copy.deepcopy(model))
    (site,) = normzoo.inspect(model).sites
    assert (site.family, site.how, site.norm.after) == ("adab2n", "class", new.then)
    back = normzoo.convert(model, "batch_norm")
    torch.testing.assert_close(back.eval()(x), F.silu(F.batch_norm(x, *new._stored(), new.weight, new.bias)))


def test_a_failing_test_run_is_no_missing_input(monkeypatch):
    def broken(self, x, task_ids=None):
        raise RuntimeError("out of order")

    monkeypatch.setattr(normzoo.AdaB2N, "forward", broken)
    with pytest.raises(
        ValueError, match="a test run of it beside the new AdaB2N failed: RuntimeError: out of order"
    ):
        normzoo.convert(nn.BatchNorm2d(8), "adab2n", num_tasks=2)


def test_what_is_known_of_them():
    model = nn.Sequential(*(cls(8, *find(to).arguments[1:]) for to, cls in CLASSES.items()), ConvNet())
    alpha, adab2n, batch_channel, _ = normzoo.inspect(model).sites
    assert [alpha.family, adab2n.family, batch_channel.family] == ["alpha_batch", "adab2n", "batch_channel"]
    assert batch_channel.norm.groups == 4 and {alpha.how, adab2n.how, batch_channel.how} == {"class"}
    spans = [site.norm.span(torch.empty(2, 8, 3, 3)) for site in (alpha, adab2n, batch_channel)]
    assert spans == [(0, 2, 3), (0, 2, 3), (1, 2, 3)]
    made = normzoo.plan(model, "batch_norm", types=("alpha_batch", "AdaB2N"))
    assert [step.action for step in made.steps] == ["convert", "convert", "keep", "keep"]

    class Mine(normzoo.AlphaBatchNorm):
        pass

    (site,) = normzoo.inspect(Mine(8)).sites
    assert site.how == "subclass" and site.family == "alpha_batch"


class AdaB2N(nn.BatchNorm2d):
    """In the manner of the authors: task counts are set from outside, none were."""

    def __init__(self, channels, tasks, affine=True):
        super().__init__(channels, affine=affine)
        self.task_weight = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("cur_tasks", torch.tensor(0))

    def forward(self, input):
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)
        mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
        self.num_batches_tracked += 1
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return F.batch_norm(input, None, None, self.weight, self.bias, True)


class BatchChannelNorm(nn.Module):
    """In the manner of the authors."""

    def __init__(self, channels, groups):
        super().__init__()
        self.bn, self.groups = nn.BatchNorm2d(channels), groups
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))

    def forward(self, x):
        parts = self.bn(x).reshape(1, len(x) * self.groups, -1)
        parts = F.batch_norm(parts, None, None, training=True).reshape(len(x), self.groups, -1)
        return (self.weight * parts + self.bias).reshape(x.shape)


class AlphaBatchNorm(nn.Module):
    """In the manner of test-time adaptation codes: around a batch norm, whose tensors it reads."""

    def __init__(self, layer, alpha=0.1):
        super().__init__()
        self.layer, self.alpha = layer.eval(), alpha
        self.norm = nn.BatchNorm2d(layer.num_features, affine=False, momentum=1.0)

    def forward(self, input):
        self.norm(input)
        mean = torch.lerp(self.layer.running_mean, self.norm.running_mean, self.alpha)
        var = torch.lerp(self.layer.running_var, self.norm.running_var, self.alpha)
        return F.batch_norm(input, mean, var, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("tasks, affine", [(5, True), (8, True), (5, False), (8, False)])
@pytest.mark.parametrize("training", [True, False])
def test_the_authors_adab2n_is_no_batch_norm(tasks, affine, training):
    model = nn.Sequential(stirred(AdaB2N(8, tasks, affine)), nn.BatchNorm2d(8)).train(training)
    site, other = normzoo.inspect(model).sites
    assert site.family == "unknown" and site.note and other.family == "batch"
    for to in ("same", "batch_norm", "frozen_batch_norm", "alpha_batch_norm"):
        assert normzoo.plan(model, to).steps[0].action == "unknown"
    theirs = model[0]
    ours = normzoo.AdaB2N(8, tasks, affine=affine)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 8, 3, 3)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_authors_batch_channel_norm_is_unknown(groups):
    theirs = BatchChannelNorm(8, groups)
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(0.5, 1.5)
    outer, inner = normzoo.inspect(nn.Sequential(theirs)).sites
    assert (outer.name, outer.family, inner.name, inner.family) == ("0", "unknown", "0.bn", "batch")
    with pytest.raises(ValueError, match="strict=True"):
        normzoo.plan(nn.Sequential(theirs), strict=True)
    ours = normzoo.BatchChannelNorm(8, groups)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 8, 3, 3)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))


def test_wrappers_that_read_their_norm_keep_it():
    model, x = nn.Sequential(AlphaBatchNorm(stirred(nn.BatchNorm2d(8)))), torch.randn(4, 8, 3, 3)
    wanted = model(x)
    for to in ("alpha_batch_norm", "frozen_batch_norm"):
        with pytest.raises(ValueError, match="AlphaBatchNorm reads its running_mean"):
            normzoo.convert(model, to)
    layer = model[0].layer
    ours = normzoo.AlphaBatchNorm.from_batch_norm(layer, test_weight=0.1)
    torch.testing.assert_close(ours(x), wanted)
    normzoo.convert(model)
    assert type(model[0].layer) is normzoo.BatchNorm2d and model[0].layer.weight is layer.weight
    torch.testing.assert_close(model(x), wanted)


def mixed():
    return stirred(
        nn.Sequential(
            normzoo.AdaB2N(4, 3, kappa=0.4),
            nn.BatchNorm2d(4),
            normzoo.AlphaBatchNorm(4, source_weight=0.5),
            normzoo.BatchChannelNorm(4, 2),
        )
    )


def test_freezing(caplog):
    model, x = mixed(), torch.randn(4, 4, 3, 3)
    with torch.no_grad():
        model[0].task_weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model[0].end_task()
    wanted, state, old = model.eval()(x), copy.deepcopy(model.state_dict()), list(model)
    normzoo.freeze_batch_norm(model)
    assert "AlphaBatchNorm and BatchChannelNorm stay" in caplog.text and 'types="alpha_batch"' in caplog.text
    assert [type(each) is normzoo.FrozenBatchNorm for each in model] == [True, True, False, False]
    assert model[2] is old[2] and model[3] is old[3]
    torch.testing.assert_close(model(x), wanted)
    away = state.keys() - model.state_dict().keys()
    assert away == {"0.task_weight", "0.cur_tasks"}
    normzoo.unfreeze_batch_norm(model)
    assert list(model) == old
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model[0].cur_tasks == 1 and list(model.state_dict()) == list(state)
    model.train()(x).sum().backward()
    for kind in (normzoo.AlphaBatchNorm(4), normzoo.BatchChannelNorm(4, 2)):
        with pytest.raises(
            ValueError, match=f"no batch norm, and {type(kind).__name__} stay, for in eval mode"
        ):
            normzoo.freeze_batch_norm(nn.Sequential(kind))
    still = normzoo.convert(model, "frozen_batch_norm", types="alpha_batch")
    assert type(still[2]) is normzoo.FrozenBatchNorm and type(still[0]) is normzoo.AdaB2N


@pytest.mark.parametrize(
    "norm",
    [
        normzoo.AdaB2N(4, 3),
        normzoo.AdaB2N(4, 3, kappa=0.4, momentum=1.0),
        normzoo.AdaB2N(4, 3, kappa=0.0),
        normzoo.BatchChannelNorm(4, 2),
        normzoo.BatchChannelNorm(4, 2, momentum=None),
        normzoo.BatchChannelNorm(4, 2, estimate=True, update_rate=0.1),
    ],
    ids=str,
)
def test_recalibration(norm):
    norm = stirred(copy.deepcopy(norm)).eval()
    norm.num_batches_tracked.fill_(7)
    settings = {name: value for name, value in vars(norm).items() if not name.startswith("_")}
    parameters = {name: p.clone() for name, p in norm.named_parameters()}
    data = [torch.randn(8, 4, 3, 3) * (i + 1) + i for i in range(3)]
    normzoo.recalibrate(norm, data)
    correction = 0 if isinstance(norm, normzoo.AdaB2N) else 1
    means = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    variances = torch.stack([x.var((0, 2, 3), correction=correction) for x in data]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.num_batches_tracked == 3
    assert {name: value for name, value in vars(norm).items() if not name.startswith("_")} == settings
    assert all(torch.equal(p, parameters[name]) for name, p in norm.named_parameters())


def test_recalibration_by_tasks():
    norm, x, ids = (
        normzoo.AdaB2N(2, 2, init_weight=20.0),
        torch.randn(6, 2, 4),
        torch.tensor([0, 0, 0, 0, 0, 1]),
    )

    def forward(model, batch):
        with normzoo.inputs(model, task_ids=ids):
            return model(batch)

    normzoo.recalibrate(norm, [x], forward=forward)
    torch.testing.assert_close(norm.running_mean, (x[:5].mean((0, 2)) + x[5].mean(1)) / 2, rtol=1e-4, atol=1e-5)


def test_recalibration_leaves_the_source_alone():
    model, data = mixed(), [torch.randn(8, 4, 3, 3)]
    before = copy.deepcopy(model[2].state_dict())
    normzoo.recalibrate(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model[2].state_dict().items())
    assert all(model[place].num_batches_tracked == 1 for place in (0, 1, 3))
    alone = nn.Sequential(model[2])
    with pytest.raises(
        ValueError, match=r"those of the source and never move; .* types=\"alpha_batch\"\) first"
    ):
        normzoo.recalibrate(alone, data)
    normzoo.convert(alone, "batch_norm", types="alpha_batch")
    normzoo.recalibrate(alone, data)
    torch.testing.assert_close(alone[0].running_mean, data[0].mean((0, 2, 3)))


def test_an_approximate_conversion_warns_and_an_exact_one_is_proved(caplog):
    model, x = stirred(ConvNet()), torch.randn(4, 3, 6, 6)
    normzoo.convert(model, "adab2n", num_tasks=5, verify=x)
    assert not caplog.records
    made = normzoo.plan(model, kappa=0.5)
    assert made.exactness is Exactness.EVAL_EXACT and made.verify(x).same
    normzoo.convert(model, "alpha_batch_norm", source_weight=1, verify=x)
    assert not caplog.records
    normzoo.convert(model, source_weight=0.5)
    assert "1 of 1 converted norms compute another function (approximate" in caplog.text
