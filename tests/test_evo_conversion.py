"""Norm and activation become one EvoNorm: which activation that is, what is kept, and what stays."""

import json
import pickle

import pytest
import torch
import torchvision_ops  # noqa: F401
from small_models import stirred
from torch import nn

import normzoo
from normzoo import cli, functional
from normzoo.conversion import Exactness
from normzoo.zoo import find

FORMS = ["b0", "b1", "b2", "s0", "s1", "s2"]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def images(channels=8, *, n=6, size=(3, 4)):
    return torch.randn(n, channels, *size) * 2 + 1


def pair(norm=None, activation=None):
    return stirred(nn.Sequential(norm or nn.BatchNorm2d(8), activation or nn.ReLU()))


class Block(nn.Module):
    """A residual block as torchvision has it, `shared`, or with an activation for each norm."""

    def __init__(self, shared=False):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(8), nn.ReLU()
        self.between = nn.Identity()
        self.bn2, self.relu2 = nn.BatchNorm2d(8), self.relu1 if shared else nn.ReLU()

    def forward(self, x):
        return self.relu2(self.bn2(self.relu1(self.between(self.bn1(x)))) + x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [False, True])
def test_a_pair_becomes_one(form, train):
    model, x = pair().train(train), images()
    norm, relu = model
    optimizer = torch.optim.SGD(
        [{"params": [*norm.parameters()], "lr": 0.5}, {"params": [nn.Parameter(x)]}], 0.1
    )
    made = normzoo.plan(model, f"evo_norm_{form}")
    (step,) = made.steps
    assert step.exactness is Exactness.REINITIALISED and step.error is None and step.activations == (relu,)
    assert step.reason.startswith("it stands for the norm and the activation behind it; weights start anew")
    groups = "; groups=8, one channel each" if form[0] == "s" else ""
    assert step.reason.endswith(f"; 1 (ReLU) goes{groups}") and [row[4] for row in made.rows()[1]] == ["-"]
    has_v, stored = form[1] == "0", form[0] == "b"
    assert step.tensors["new"] == ("weight", "bias", "v")[: 2 + has_v]
    assert step.tensors["kept"] == (("running_var",) if stored else ()) and step.tensors["converted"] == ()
    gone = {"weight", "bias", *STATISTICS} - ({"running_var"} if stored else set())
    assert {*step.tensors["lost"]} == gone and ("the running variance goes on" in step.reason) == stored
    proof = made.verify(x)
    assert proof.passed and not proof.same and model[1] is relu
    made.apply(optimizer)
    new = model[0]
    assert type(new) is find(f"evo_norm_{form}").cls and type(model[1]) is nn.Identity
    assert new.training == train and new.eps == type(new)(32).eps and new.apply_act
    assert torch.equal(new.weight, torch.ones(8)) and not new.bias.any()
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, new.parameters())]
    function, how = getattr(functional, f"evo_norm_{form}"), {"eps": new.eps}
    if stored:
        assert new.running_var is norm.running_var and new.momentum == norm.momentum
        how |= {"running_var": norm.running_var.clone(), "training": train}
    else:
        assert new.groups == 8  # the most, up to 32, that divide
        how |= {"groups": 8}
    torch.testing.assert_close(model(x), function(x, **how))
    made.revert()
    assert model[0] is norm and model[1] is relu
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, norm.parameters())]


def test_what_a_batch_norm_says_is_carried_and_options_overrule_it():
    norm = normzoo.BatchNorm2d(48, momentum=0.3, sync=True, nonfinite="skip")
    new = normzoo.convert(pair(norm), "evo_norm_b1", eps=1e-2)[0]
    assert (new.momentum, new.sync, new.nonfinite, new.eps) == (0.3, True, "skip", 1e-2)
    assert normzoo.convert(pair(nn.BatchNorm2d(48)), "evo_norm_s0")[0].groups == 24
    (step,) = normzoo.plan(pair(nn.BatchNorm2d(48)), "evo_norm_s0", group_size=4).steps
    assert step.reason.endswith("1 (ReLU) goes; groups=12")
    assert "groups" not in normzoo.plan(pair(), "evo_norm_s0", apply_act=False).steps[0].reason
    assert normzoo.convert(pair(nn.BatchNorm2d(48)), "evo_norm_s0", groups=4)[0].groups == 4
    assert normzoo.convert(pair(nn.BatchNorm2d(48)), "evo_norm_s2", group_size=4)[0].groups == 12
    assert normzoo.convert(pair(nn.GroupNorm(6, 48)), "evo_norm_s1")[0].groups == 6
    assert normzoo.convert(pair(nn.GroupNorm(6, 48)), "evo_norm_s1", group_size=4)[0].groups == 12
    new = normzoo.convert(pair(nn.BatchNorm2d(8, affine=False)), "evo_norm_s1", act_layer=nn.ReLU)[0]
    assert torch.equal(new(-images().abs()), torch.zeros(6, 8, 3, 4)) and new.weight.requires_grad
    plain = nn.BatchNorm2d(8, track_running_stats=False)
    assert torch.equal(normzoo.convert(pair(plain), "evo_norm_b0")[0].running_var, torch.ones(8))
    assert vars(new).keys() == vars(normzoo.EvoNormS1(8, 4, act_layer=nn.ReLU)).keys()


@pytest.mark.parametrize(
    "norm, to, words",
    [
        (nn.GroupNorm(4, 8), "evo_norm_b0", "no rule takes a group norm to evo_norm_b0, only to"),
        (nn.BatchNorm2d(8, momentum=None), "evo_norm_b0", "EvoNormB0: momentum is None; it must be a number"),
        (nn.LayerNorm(4), "evo_norm_s0", "no rule takes a layer norm to evo_norm_s0"),
        (
            nn.GroupNorm(4, 8),
            "evo_norm_s0?",
            "EvoNorm is weight .* and it has no stored statistics for",
        ),
    ],
    ids=str,
)
def test_refused(norm, to, words):
    options = {"apply_act": False} if to[-1] == "?" else {}
    with pytest.raises(ValueError, match=words):
        normzoo.convert(nn.Sequential(norm, nn.ReLU()), to.rstrip("?"), **options)


def test_a_block_whose_norms_have_activations_of_their_own():
    model, x = stirred(Block()), images()
    made = normzoo.plan(model, "evo_norm_s0")
    first, second = made.steps
    assert first.action == "convert" and first.reason.endswith("relu1 (ReLU) goes; groups=8, one channel each")
    assert second.action == "refuse" and "(a call of add follows it in Block)" in second.reason
    made.apply()
    assert type(model.relu1) is nn.Identity and type(model.relu2) is nn.ReLU
    torch.testing.assert_close(model(x), (model.bn2(functional.evo_norm_s0(x, 8)) + x).relu())
    with pytest.raises(ValueError, match=r"bn2: no activation is behind it that could go \(a call of add"):
        normzoo.convert(Block(), "evo_norm_s0", strict=True)


def test_an_activation_that_serves_something_else_stays():
    with pytest.raises(ValueError, match=r"relu1 \(ReLU\) follows it and is held in .*\); give every call a"):
        normzoo.convert(Block(shared=True), "evo_norm_b0")

    class Twice(Block):
        def forward(self, x):
            return self.relu1(self.bn2(self.relu1(self.bn1(x))) + x)

    words = (
        r"relu1 \(ReLU\) follows it, and Twice calls that elsewhere too\); give every call a module of its own"
    )
    with pytest.raises(ValueError, match=f"{words}, or pass apply_act=True"):
        normzoo.convert(Twice(), "evo_norm_b0")
    model, x = stirred(Twice()).eval(), images()
    made = normzoo.plan(model, "evo_norm_b0", include="bn1", apply_act=True)
    assert "weights start anew; what is behind it stays (relu1 (ReLU) follows it" in made.changes[0].reason
    made.apply()
    y = model.bn2(functional.evo_norm_b0(x, model.bn1.running_var, eps=1e-3).relu())
    torch.testing.assert_close(model(x), (y + x).relu())


def test_what_the_log_warns_of(caplog):
    model = nn.Sequential(*pair(), *pair(), nn.BatchNorm2d(8))
    normzoo.convert(model, "evo_norm_b0", exclude="4")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(
        "convert: 2 of 2 converted norms compute another function (re-initialised); normzoo."
    )
    for kind, is_so in (("another", False), ("no norms", True)):
        caplog.clear()
        if kind == "another":
            normzoo.convert(model, "evo_norm_b0", types="batch", apply_act=False)
        else:
            normzoo.convert(model, "evo_norm_b0", types="evo_b0", include="0", apply_act=False)
        warned = [record.getMessage() for record in caplog.records]
        assert "convert: 1 of 1 converted norms are no norms any more: apply_act=False leaves" in warned[-1]
        assert (len(warned) == 2) == is_so  # that of a norm which activated is another function, too


def test_norms_that_share_an_activation_go_together():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.bn2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn2(self.relu(self.bn1(x))))

    model = normzoo.convert(Double(), "evo_norm_s0")
    assert type(model.relu) is nn.Identity and type(model.bn2) is normzoo.EvoNormS0
    with pytest.raises(ValueError, match="bn1: another norm shares the ReLU that follows it, and stays"):
        normzoo.convert(Double(), "evo_norm_s0", include="bn1")


def test_where_nothing_is_sure():
    class Functional(Block):
        def forward(self, x):
            return torch.relu(self.bn1(x))

    class Used(Block):
        def forward(self, x):
            y = self.bn1(x)
            return self.relu1(y) + y

    class Looking(Block):
        def forward(self, x):
            return self.relu1(self.bn1(x)) if x.sum() > 0 else x

    class InTraining(Block):
        def forward(self, x):
            y = self.bn1(x)
            return self.relu1(y) if self.training else y

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            before = self.features[0](x)
            return before + self.features[1](before)

    class Keyword(Block):
        def forward(self, x):
            return self.relu1(input=self.bn1(x))

    for model, words in (
        (Functional(), "a call of relu follows it in Functional"),
        (Used(), "Used uses its output 2 times"),
        (Looking(), r"the forward of Looking cannot be traced \(TraceError\)"),
        (InTraining(), "nothing follows it in this model"),
        (Inside(), "the forward of Inside does not call the Sequential"),
        (Keyword(), "a ReLU follows it in Keyword"),
        (nn.BatchNorm2d(8), "nothing follows it in this model"),
        (pair(activation=nn.Dropout()), "a Dropout follows it in Sequential"),
        (pair(activation=nn.PReLU()), "a PReLU follows it in Sequential"),
        (pair(activation=nn.Softmax(1)), "a Softmax follows it in Sequential"),
        (nn.ModuleList([nn.BatchNorm2d(8), nn.ReLU()]), "nothing follows it in this model"),
    ):
        with pytest.raises(ValueError, match=words):
            normzoo.convert(model, "evo_norm_b0", include="re:.*(bn1|0)|")
    model = pair()
    model[1].register_forward_hook(lambda module, args, y: None)
    with pytest.raises(ValueError, match=r"1 \(ReLU\) follows it and has forward_hooks"):
        normzoo.convert(model, "evo_norm_b0")
    model = pair()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="Sequential has a forward of its own, set on the instance"):
        normzoo.convert(model, "evo_norm_b0")
    model = pair()
    model.seen = [model[1]]
    with pytest.raises(ValueError, match=r"1 \(ReLU\) follows it and is held in other places too"):
        normzoo.convert(model, "evo_norm_b0")


def test_a_look_at_the_code_leaves_no_trace():
    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.seen, self.calls = [], 0
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = x
            self.seen.append(x)
            self.steps.add_(1)
            return self.relu1(self.bn1(x))

    model = nn.Sequential(Counting(), nn.ModuleList())[:1]
    made = normzoo.plan(model, "evo_norm_b0", include="*bn1")
    assert made.changes and not model[0].seen and not model[0].calls and not model[0].steps
    assert not hasattr(model[0], "last") and model.training


def test_through_containers():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))])
            self.act = nn.SiLU(inplace=True)

        def forward(self, x, scale=None):
            x = self.inner[0](x)
            return self.act(x if scale is None else x * scale)

    model = normzoo.convert(nn.ModuleDict({"a": Wrapped()}), "evo_norm_s0")
    assert type(model["a"].act) is nn.Identity and type(model["a"].inner[0][1]) is normzoo.EvoNormS0


@pytest.mark.parametrize("form", ["b0", "s1"])
@pytest.mark.parametrize("holds", ["both", "nothing"])
def test_without_an_activation_it_is_the_map_of_eval_mode(form, holds):
    norm = nn.BatchNorm2d(8, eps=1e-2, affine=holds == "both")
    model, x = pair(norm), images()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(x)], 0.1)
    made = normzoo.plan(model, f"evo_norm_{form}", apply_act=False)
    (step,) = made.steps
    assert step.exactness is Exactness.EVAL_EXACT and not step.activations and made.verify(x).same
    assert step.tensors["converted"] == ("weight", "bias") and "no norm any more" in step.reason
    wanted = model.eval()(x)
    made.apply(optimizer)
    new = model[0]
    assert type(model[1]) is nn.ReLU and not new.apply_act
    torch.testing.assert_close(model.train()(x), wanted)
    model(x).sum().backward()
    assert new.weight.grad is not None and new.bias.grad is not None
    assert {id(new.weight), id(new.bias)} <= {id(p) for p in optimizer.param_groups[0]["params"]}
    if form == "b0":
        assert new.running_var is norm.running_var


def test_a_resnet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model("test_resnet"), torch.randn(2, 3, 32, 32)
    made = normzoo.plan(model, "evo_norm_s0")
    assert len(made.changes) == 8 and made.exactness is Exactness.REINITIALISED and made.verify(x).passed
    made.apply()
    rest = normzoo.plan(model, "evo_norm_s0", types="batch", apply_act=False)
    assert len(rest.changes) == 7 and rest.verify(x).same
    rest.apply()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 4  # after the additions
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_norm_and_activation_of_timm():
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(8, act_layer="silu", drop_layer=nn.Dropout)
    model, x = stirred(nn.Sequential(norm, nn.ReLU())), images()
    (step,) = normzoo.plan(model, "evo_norm_s0").steps
    assert step.reason.endswith("; act (SiLU) goes; groups=8, one channel each") and not step.activations
    normzoo.convert(model, "evo_norm_s0")
    new = model.eval()[0]
    assert isinstance(new, normzoo.EvoNormS0) and new.then == ("drop",) and new.act is None
    assert type(model[1]) is nn.ReLU
    torch.testing.assert_close(model(x), functional.evo_norm_s0(x, 8).relu())
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    group = nn.Sequential(layers.GroupNormAct(8, 2, act_layer="relu"))
    assert normzoo.convert(group, "evo_norm_s1")[0].groups == 2
    torch.testing.assert_close(group(x), functional.evo_norm_s1(x, 2))
    last = nn.Sequential(layers.BatchNormAct2d(8, act_layer="relu"))
    with pytest.raises(ValueError, match="its activation is its own, called act as that of an EvoNorm-S is"):
        normzoo.convert(last, "evo_norm_s0", apply_act=False)
    normzoo.convert(last, "evo_norm_b0", apply_act=False)
    assert last[0].then == ("act",) and not last(x).lt(0).any() and last(x).any()
    silent = nn.Sequential(layers.BatchNormAct2d(8, apply_act=False), nn.GELU())
    made = normzoo.plan(silent, "evo_norm_s0")
    assert {*made.steps[0].tensors["lost"]} == {"weight", "bias", *STATISTICS}  # its act is no tensor
    assert type(normzoo.convert(silent, "evo_norm_b0")[1]) is nn.Identity
    gate = nn.Sequential(layers.BatchNormAct2d(8, act_layer="sigmoid"))
    with pytest.raises(ValueError, match=r"could go \(its Sigmoid is bounded above, unlike what EvoNorm"):
        normzoo.convert(gate, "evo_norm_b0")
    assert normzoo.convert(gate, "evo_norm_b0", apply_act=True)(100 * x).max() <= 1


def test_meta_and_low_precision():
    model = nn.Sequential(nn.BatchNorm2d(8, device="meta", dtype=torch.bfloat16), nn.ReLU())
    made = normzoo.plan(model, "evo_norm_b0")
    assert made.changes and made.steps[0].error is None
    new = made.apply()[0]
    assert new.v.is_meta and new.v.dtype == torch.bfloat16
    with torch.device("meta"):
        single = nn.Sequential(nn.BatchNorm2d(8))
    assert normzoo.convert(single, "evo_norm_s0", apply_act=False)[0].weight.is_meta


def test_a_change_of_the_activation_after_the_plan():
    model = pair()
    made = normzoo.plan(model, "evo_norm_b0")
    model[1] = nn.GELU()
    with pytest.raises(ValueError, match="the model has changed since the plan was made"):
        made.apply()
    assert type(model[0]) is nn.BatchNorm2d and type(model[1]) is nn.GELU


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "pairs.py"
    lines = ["import torch", "from torch import nn", "def make():"]
    lines += ["    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))"]
    file.write_text("\n".join([*lines, "    return model, torch.ones(2, 3, 4, 4).cumsum(-1)", ""]))
    command = ["convert", f"{file}:make", "--to", "EvoNormB0", "--dry-run"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "re-initialised" in out and "proof: the model computes another function" in out
    assert cli.main([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["steps"]
    assert first["exactness"] == "re-initialised" and first["reason"].endswith("2 (ReLU) goes")
    assert second["action"] == "refuse"
    assert cli.main([*command, "--json", "--include", "3", "--option", "apply_act=False"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][1]["exactness"] == "eval-exact" and found["proof"]["same"]
    pytest.importorskip("timm")
    assert cli.main(["inspect", "timm:test_efficientnet_evos"]) == 0
    assert "13 norms: 13 evo_s0" in capsys.readouterr().out
