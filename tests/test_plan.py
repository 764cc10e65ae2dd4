"""normzoo.plan: which norms it takes, what it promises, and that all of it can be taken back."""

import copy
import functools
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normzoo
from normzoo.conversion import TRANSFERS, Exactness, Norm, trial
from normzoo.conversion.transfer import Carried, Transfer


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.linear(self.ln_2(self.ln_1(x)))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.rms = nn.RMSNorm(width)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, x):
        return self.rms(self.blocks(x))


class OnePlusNorm(nn.LayerNorm):
    """LayerNorm that stores the weight less one: a conversion has to compute a new tensor."""

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def converted(model, to="same", **filters):
    """The names that a plan converts, with what they become."""
    return {step.site.name: step.target for step in normzoo.plan(model, to, **filters).changes}


LN = [f"blocks.{i}.ln_{j}" for i in range(3) for j in (1, 2)]


@pytest.mark.parametrize(
    "filters, names",
    [
        ({}, [*LN, "rms"]),
        ({"include": "blocks.0.*"}, LN[:2]),
        ({"include": ["rms", "re:blocks.[12].ln_1"]}, [LN[2], LN[4], "rms"]),
        ({"exclude": "*.ln_2"}, [*LN[::2], "rms"]),
        ({"types": "layer"}, LN),
        ({"types": nn.RMSNorm}, ["rms"]),
        ({"types": ("RMSNorm", "batch")}, ["rms"]),
        ({"where": lambda name, module: module.eps is None}, ["rms"]),
        ({"include": "blocks.*", "exclude": ["re:blocks.[02].*", "*.ln_2"], "types": nn.LayerNorm}, LN[2:3]),
    ],
)
def test_filters(filters, names):
    assert list(converted(Net(), **filters)) == names


def test_precedence_of_rules():
    to = {
        "_default": "layer_norm",
        "re:.*ln_2": None,
        "blocks.1.*": "rms_norm",
        "blocks.1.ln_1": normzoo.LayerNorm,
    }
    found = converted(Net(), to)
    assert found == {
        "blocks.0.ln_1": "layer_norm",
        "blocks.1.ln_1": "layer_norm",  # exact name before glob
        "blocks.1.ln_2": "rms_norm",  # glob before expression
        "blocks.2.ln_1": "layer_norm",
        "rms": "layer_norm",
    }
    assert converted(Net(), {"blocks.0.ln_1": "same"}) == {"blocks.0.ln_1": "layer_norm"}
    assert converted(Net(), dict(reversed(to.items()))) == found


def test_rules_of_one_kind_go_in_order():
    assert converted(Net(), {"*.ln_1": "rms_norm", "blocks.*": "layer_norm"})["blocks.0.ln_1"] == "rms_norm"
    assert converted(Net(), {"blocks.*": "layer_norm", "*.ln_1": "rms_norm"})["blocks.0.ln_1"] == "layer_norm"


def test_a_function_of_the_site():
    def to(site):
        if site.name == "rms":
            return nn.Identity()
        if site.name == "blocks.0.ln_1":
            return functools.partial(normzoo.RMSNorm, cast="llama")
        return "layer_norm" if site.family == "layer" and site.name.endswith("1") else None

    model = Net()
    made = normzoo.plan(model, to)
    assert [step.target for step in made.changes] == ["rms_norm", "layer_norm", "layer_norm", "Identity"]
    assert made.changes[-1].exactness is Exactness.APPROXIMATE and made.changes[-1].error > 0.1
    made.apply()
    assert type(model.rms) is nn.Identity and model.blocks[0].ln_1.cast == "llama"
    assert type(model.blocks[0].ln_2) is nn.LayerNorm
    with pytest.raises(TypeError, match=r"to returned a int for 'blocks.0.ln_1'; it must return a module"):
        normzoo.plan(Net(), lambda site: 3)


def test_a_module_of_the_caller_is_as_exact_as_it_is():
    def like(site):
        new = nn.LayerNorm(8)
        new.weight, new.bias = site.module.weight, site.module.bias
        return new

    model = Net()
    made = normzoo.plan(model, like, types="layer")
    assert {step.exactness for step in made.changes} == {Exactness.EVAL_EXACT}
    assert made.changes[0].tensors["kept"] == ("weight", "bias")
    assert made.verify(torch.randn(3, 8)).same
    with pytest.raises(
        ValueError, match="a test run of it beside the new Linear failed: RuntimeError: mat1 and mat2"
    ):
        normzoo.plan(model, lambda site: nn.Linear(3, 3), strict=True)


def test_options_overrule_the_norm():
    (step,) = normzoo.plan(Net(), "rms_norm", types="rms", eps=0.1).changes
    assert step.exactness is Exactness.APPROXIMATE and step.make().module.eps == 0.1 and step.error > 0.1
    model = normzoo.convert(Net(), functools.partial(normzoo.RMSNorm, cast="llama"), types="rms", eps=0.2)
    assert model.rms.cast == "llama" and model.rms.eps == 0.2
    again = normzoo.plan(Net(), "layer_norm", eps=1e-5, types="layer")
    assert again.exactness is Exactness.EXACT


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (
            {"to": {"blocks.9.*": None}},
            ValueError,
            r"the rule 'blocks.9.\*' matches no norm; norm classes seen: 6 t",
        ),
        (
            {"include": "layers.*"},
            ValueError,
            r"'layers.\*' in include matches no norm; norm classes seen: 6 torch",
        ),
        ({"exclude": ("rms", "blocks.0.ln_3")}, ValueError, "'blocks.0.ln_3' in exclude matches no norm"),
        ({"types": "batch"}, ValueError, r"(?s)nothing can be converted.* and 4 more: filtered out"),
        ({"to": None}, ValueError, "nothing can be converted.*\n.*: as asked"),
        ({"to": {0: "rms_norm"}}, TypeError, "to has the key 0; keys must be names"),
        ({"include": 3}, TypeError, "int"),
        ({"exclude": [nn.RMSNorm]}, TypeError, "exclude holds <class .*; it must hold names, globs or 're:'"),
        (
            {"types": ["rms", "lyer"]},
            ValueError,
            r"'lyer' in types is no family \(layer, .*norm classes seen: 6 torch",
        ),
        ({"types": [3]}, TypeError, "types holds 3; it must hold families, class names or classes"),
        ({"where": "rms"}, TypeError, "where is a str; it must be a function of name and module"),
        ({"to": functools.partial(normzoo.RMSNorm, 8)}, TypeError, "positional arguments; pass them by name"),
        (
            {"to": "rms_norm", "momentum": 0.1},
            TypeError,
            "RMSNorm takes no 'momentum'; it takes normalized_shape",
        ),
        ({"to": "same", "cast": "llama"}, TypeError, "LayerNorm takes no 'cast'"),
    ],
)
def test_bad_arguments_leave_the_model(arguments, error, words):
    model = Net()
    before = list(model.modules())
    with pytest.raises(error, match=words):
        normzoo.convert(model, **arguments)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_strict():
    model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4))
    with pytest.raises(
        ValueError, match=r"strict=True, .*\n  1: normzoo has no layer yet that computes a batch n"
    ):
        normzoo.convert(model, strict=True)
    assert type(model[0]) is nn.LayerNorm
    normzoo.convert(model, strict=True, exclude="1")
    assert type(model[0]) is normzoo.LayerNorm


def test_a_plan_touches_nothing():
    model = Net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules, random = list(model.modules()), torch.get_rng_state()
    made = normzoo.plan(model, "rms_norm")
    made.verify(torch.randn(3, 8))
    assert str(made) and made.to_json()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.set_rng_state(random)


def test_verify_tells_same_from_changed():
    model, x = Net(), torch.randn(16, 8)
    same = normzoo.plan(model).verify(x)
    assert same.same and same.passed and same.exact and same.error <= 1e-6 and same.cosine > 0.999999
    assert str(same).startswith("the model computes the same function: outputs differ by at most")
    changed = normzoo.plan(model, "rms_norm").verify(x)
    assert not changed.same and changed.passed and not changed.exact
    assert changed.error > 1e-2 and changed.cosine < 0.9999
    assert str(changed).startswith("the model computes another function")
    with torch.no_grad():
        before, after = model(x), normzoo.plan(model, "rms_norm").apply()(x)
    assert changed.error == pytest.approx(float((after - before).abs().max() / before.abs().max()), rel=1e-6)


@pytest.mark.parametrize("fault", [1 + 1e-5, 1 - 1e-4, float("nan")])
def test_verify_finds_a_broken_layer(fault, monkeypatch):
    model, x = Net(), torch.randn(16, 8)
    made = normzoo.plan(model)
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * fault)
    proof = made.verify(x)
    assert not proof.passed and str(proof).startswith("FAILED: the model computes another function, although")


def test_a_failed_proof_leaves_the_model(monkeypatch):
    model, x = Net(), torch.randn(16, 8)
    monkeypatch.setattr(normzoo.conversion.planning, "site_error", lambda *_: (0.0, True))
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * 1.001)
    with pytest.raises(
        ValueError, match=r"convert: FAILED: the model computes another function.*left as it was"
    ):
        normzoo.convert(model, verify=x)
    assert type(model.rms) is nn.RMSNorm and type(model.blocks[0].ln_1) is nn.LayerNorm
    monkeypatch.undo()
    normzoo.convert(model, verify=x)
    assert type(model.rms) is normzoo.RMSNorm


def test_samples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, scale=1.0):
            return {"hidden": (self.norm(x) * scale, None), "index": x.argmax()}

    made, x = normzoo.plan(Two()), torch.randn(2, 4)
    for sample in (x, (x, 2.0), {"x": x, "scale": 3.0}, lambda model: model(x)["hidden"]):
        proof = made.verify(sample)
        assert proof.same and len(proof.outputs) == 1
    assert made.verify(x).outputs[0].output == "['hidden'][0]"
    with pytest.raises(ValueError, match=r"returned the floating-point tensors \[\] before and \[\] after"):
        made.verify(lambda model: None)
    with pytest.raises(ValueError, match="every output is zero on this sample"):
        made.verify(lambda model: model(x)["hidden"][0] * 0)


def test_verify_after_the_conversion():
    model, x = Net(), torch.randn(4, 8)
    made = normzoo.plan(model, "rms_norm")
    first = made.verify(x)
    made.apply()
    assert made.verify(x) == first and type(model.blocks[0].ln_1) is normzoo.RMSNorm


def test_revert_is_bitwise():
    model = Net().eval()
    model.blocks[1].train()
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    made = normzoo.plan(model, "rms_norm")
    assert made.apply() is model and made.applied and list(model.modules()) != modules
    assert made.revert() is model and not made.applied
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.blocks[1].modules()] == [True] * 4 and not model.rms.training
    made.apply()
    with pytest.raises(ValueError, match="this plan was applied already"):
        made.apply()
    made.revert()
    with pytest.raises(ValueError, match="this plan is not applied"):
        made.revert()


def test_revert_keeps_what_was_trained():
    model = Net()
    made = normzoo.plan(model)
    made.apply()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    wanted = copy.deepcopy(model.state_dict())
    model.eval()
    made.revert()
    assert type(model.rms) is nn.RMSNorm and not model.rms.training
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_the_root_comes_and_goes():
    norm = nn.LayerNorm(4)
    made = normzoo.plan(norm)
    new = made.apply()
    assert type(new) is normzoo.LayerNorm and new.weight is norm.weight
    assert made.verify(torch.randn(2, 4)).same
    assert made.revert() is norm


def test_a_plan_for_a_model_that_changed_does_nothing():
    model = Net()
    made = normzoo.plan(model)
    model.blocks[2].ln_2 = nn.Identity()
    with pytest.raises(ValueError, match=r"has changed since the plan was made: 1 module\(s\).*\(LayerNorm\)"):
        made.apply()
    assert type(model.rms) is nn.RMSNorm and type(model.blocks[0].ln_1) is nn.LayerNorm and not made.applied
    made = normzoo.plan(model)
    made.apply()
    model.rms = nn.Identity()
    with pytest.raises(ValueError, match="has changed since the plan was made"):
        made.revert()
    assert type(model.blocks[0].ln_1) is normzoo.LayerNorm


def test_an_apply_that_fails_half_way_leaves_the_model(monkeypatch):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    modules, groups = list(model.modules()), [list(group["params"]) for group in optimizer.param_groups]
    made = normzoo.plan(model)
    monkeypatch.setattr(normzoo.conversion.surgery, "_home", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.apply(optimizer)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True)) and not made.applied
    assert groups == [list(group["params"]) for group in optimizer.param_groups]


def test_a_plan_takes_the_tensors_of_the_day():
    model = nn.Sequential(OnePlusNorm(8))
    made = normzoo.plan(model)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    made.apply()
    assert torch.equal(model[0].weight, torch.full((8,), 6.0))


def test_converted_tensors_and_the_optimizer():
    model = nn.Sequential(nn.Linear(8, 8), OnePlusNorm(8), nn.Linear(8, 8))
    others = [*model[0].parameters(), *model[2].parameters()]
    groups = [{"params": others}, {"params": list(model[1].parameters()), "weight_decay": 0.5}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    x = torch.randn(4, 8)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    before, wanted = copy.deepcopy(optimizer.state_dict()), model(x)
    old = model[1].weight
    made = normzoo.plan(model)
    assert made.exactness is Exactness.EVAL_EXACT and "converted: weight" in str(made)
    assert "pass optimizer= to keep an optimizer in step" in str(made)
    made.apply(optimizer)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-6)
    new = model[1].weight
    assert new is not old and torch.equal(new, old + 1)
    first, second = optimizer.param_groups
    assert second["weight_decay"] == 0.5 and second["params"][0] is new and len(second["params"]) == 2
    assert old not in optimizer.state and new not in optimizer.state
    assert optimizer.state[model[1].bias] and len(first["params"]) == 4
    step()
    assert not torch.equal(new, old + 1) and optimizer.state[new]
    made.revert()
    assert model[1].weight is old and second["params"][0] is old
    assert new not in optimizer.state and optimizer.state[old]["step"] == 1
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    step()


def test_new_parameters_join_the_group_of_their_norm(monkeypatch):
    rule = TRANSFERS["rms", "layer_norm"]

    def with_bias(norm, module):
        carried = rule.carry(norm, module)
        return Carried(carried.arguments | {"bias": True, "eps": 1e-6}, carried.kept)

    changed = Transfer("rms", "layer_norm", Exactness.APPROXIMATE, "", with_bias, False)
    monkeypatch.setitem(TRANSFERS, ("rms", "layer_norm"), changed)
    model = Net()
    named = [(name, p) for name, p in model.named_parameters() if "rms" not in name]
    optimizer = torch.optim.SGD([{"params": named}, {"params": [("rms.weight", model.rms.weight)]}], lr=0.1)
    made = normzoo.plan(model, "layer_norm", types="rms")
    made.apply(optimizer)
    last = optimizer.param_groups[-1]
    assert last["params"][0] is model.rms.weight and last["params"][1] is model.rms.bias
    assert last["param_names"] == ["rms.weight", "rms.bias"]
    made.revert()
    assert last["param_names"] == ["rms.weight"] and len(last["params"]) == 1


def test_frozen_norms_get_frozen_parameters():
    model = nn.Sequential(OnePlusNorm(8)).requires_grad_(False)
    normzoo.convert(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_shared_parameters_are_not_untied():
    model = nn.Sequential(OnePlusNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))
    model[2].bias = model[0].weight
    made = normzoo.plan(model)
    assert [step.action for step in made.steps] == ["refuse", "convert"]
    assert "another module shares its parameters, and a new weight would untie them" in made.steps[0].reason


def test_references_beside_the_tree_are_found():
    model = Net()
    model.remembered = [model.rms]
    object.__setattr__(model, "call", model.blocks[0].ln_1.forward)
    made = normzoo.plan(model)
    refused = {step.site.name: step.reason for step in made.steps if step.action == "refuse"}
    assert refused.keys() == {"rms", "blocks.0.ln_1"}
    assert refused["rms"].startswith("remembered holds it too, outside the module tree")
    assert refused["blocks.0.ln_1"].startswith("call holds it too")


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=not norm_first).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_call_a_changed_norm(norm_first, masked):
    model = encoder(norm_first)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if masked else None
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=mask)
    flags = {site.name: site.flags for site in normzoo.inspect(model).sites}
    assert (
        flags["layers.1.norm2"] == ["its encoder layer computes it itself in eval mode"] and not flags["norm"]
    )
    made = normzoo.plan(model, "rms_norm")
    made.apply()
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask).detach()  # with gradients no fast path is taken
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[valid], slow[valid], rtol=0, atol=1e-5)
    assert (fast - wanted)[valid].abs().max() > 1e-2
    made.revert()
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), wanted)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


def test_encoder_layers_keep_the_fast_path_of_the_same_norm():
    model = encoder()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        wanted = model(x)
        normzoo.convert(model)
        assert torch.equal(model(x), wanted)
    assert type(model.layers[0].norm1) is normzoo.LayerNorm and model.layers[0].activation_relu_or_gelu == 1


class Mixer(nn.Module):
    """Hands the weight of its norm to a fused function."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.other = nn.LayerNorm(width)

    def forward(self, x):
        x = x.to(self.other.weight.dtype)
        return self.other(F.rms_norm(x, (8,), self.norm.weight, self.norm.eps))


def test_parents_that_read_the_weight():
    model = nn.Sequential(Mixer())
    norm, other = normzoo.inspect(model).sites
    assert norm.flags == ["Mixer reads its eps, weight itself"] and other.flags == []
    same = normzoo.plan(model)
    assert [step.action for step in same.steps] == ["convert", "convert"]
    x = torch.randn(3, 8)
    assert same.verify(x).same
    changed = normzoo.plan(model, "layer_norm")
    assert [step.action for step in changed.steps] == ["refuse", "convert"]
    assert "Mixer reads its eps and may compute the norm itself, as it was" in changed.steps[0].reason


def test_json_says_all():
    model = nn.Sequential(OnePlusNorm(8), nn.RMSNorm(8), nn.BatchNorm1d(8))
    made = normzoo.plan(model, "layer_norm")
    first, second, third = json.loads(made.to_json())["steps"]
    assert (
        first["action"] == "convert" and first["target"] == "layer_norm" and first["exactness"] == "eval-exact"
    )
    assert first["tensors"] == {"kept": ["bias"], "converted": ["weight"], "new": [], "lost": []}
    assert first["error"] <= 1e-6 and second["exactness"] == "approximate" and second["error"] > 0.1
    assert (
        third["action"] == "refuse"
        and third["target"] is None
        and "no rule takes a batch norm" in third["reason"]
    )


def test_the_table():
    made = normzoo.plan(Net(), "rms_norm", exclude="blocks.0.ln_1")
    lines = str(made).splitlines()
    assert lines[0].split() == ["norm", "class", "computes", "becomes", "error", "notes"]
    # A star where the numbers differ; the norm that stays has a row of its own.
    assert [line.split()[0] for line in lines[2:5]] == ["blocks.0.ln_1", "blocks.*.ln_*", "rms"]
    assert "filtered out" in lines[2] and "x5" in lines[3] and "rms_norm: approximate" in lines[3]
    assert lines[-3:] == [
        "7 norms: 1 kept, 6 converted",
        "conversions: 5 approximate, 1 exact",
        "tensors: 11 kept, 0 converted, 0 new, 0 lost",
    ]


def test_meta_models_are_planned_with_stand_ins():
    with torch.device("meta"):
        model = Net()
    made = normzoo.plan(model, "rms_norm")
    exact, changed = made.changes[-1], made.changes[0]
    assert exact.exactness is Exactness.EXACT and exact.error <= 1e-6
    assert changed.exactness is Exactness.APPROXIMATE and changed.error > 0.1
    made.apply()
    assert model.rms.weight.is_meta and type(model.rms) is normzoo.RMSNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_claims_hold_in_every_dtype(dtype):
    model = nn.Sequential(OnePlusNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)).to(dtype)
    made = normzoo.plan(model)
    assert [step.exactness for step in made.changes] == ["eval-exact", "exact", "exact"]
    assert made.verify(torch.randn(4, 8, dtype=dtype)).same
    made.apply()
    assert all(parameter.dtype == dtype for parameter in model.parameters())


SOURCES = {
    "layer": [nn.LayerNorm(12), nn.LayerNorm(12, bias=False), nn.LayerNorm((3, 4)), OnePlusNorm(12)],
    "rms": [nn.RMSNorm(12), nn.RMSNorm((3, 4), eps=1e-3), nn.RMSNorm(12, elementwise_affine=False)],
}


@pytest.mark.parametrize("rule", TRANSFERS.values(), ids=lambda rule: f"{rule.family} to {rule.target}")
def test_every_rule_keeps_its_claim(rule):
    for source in copy.deepcopy(SOURCES[rule.family]):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        made = normzoo.plan(nn.Sequential(source), rule.target)
        assert made.exactness in (rule.exactness, Exactness.EVAL_EXACT)
        same = made.verify(torch.randn(5, *source.normalized_shape)).same
        assert same == (rule.exactness is Exactness.EXACT), source


def test_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="normzoo"):
        normzoo.convert(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)))
    info, warning = caplog.records
    assert info.levelname == "INFO" and "2 norms: 1 converted, 1 refused" in info.getMessage()
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("convert: 1 norm left as they are:\n  1: normzoo has no layer yet")


def test_a_norm_that_needs_a_side_input_is_not_measured(monkeypatch):
    class Masked(normzoo.RMSNorm):
        side_inputs = ("mask",)

        def forward(self, x):
            return super().forward(x) * normzoo.side_inputs.side_input(self, "mask")

    entry = normzoo.zoo.find("rms_norm")
    monkeypatch.setattr(
        normzoo.conversion.transfer, "adapted", lambda cls, *_: Masked if cls is entry.cls else cls
    )
    model = nn.Sequential(nn.RMSNorm(8))
    made = normzoo.plan(model)
    (step,) = made.changes
    assert step.error is None and step.reason == "not measured, as it takes mask from normzoo.inputs"
    made.apply()
    with pytest.raises(ValueError, match="there is no mask"):
        model(torch.randn(2, 8))


def test_norms_that_fit_no_rule():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 8))

    reasons = {}
    for norm in (
        Norm("rms", None, 1e-5),
        Norm("rms", (8,), 1e-5, "weight"),
        Norm("rms", (2, 8), 1e-5, "weight", groups=2),
        Norm("rms", (2, 8), 1e-5, "weight", arguments=("gate",)),
        Norm("rms", (2, 8), 1e-5, bias="weight"),
    ):
        handle = normzoo.register_adapter(Wide, lambda module, norm=norm: norm)
        try:
            (step,) = [
                s for s in normzoo.plan(nn.Sequential(Wide(), nn.RMSNorm(8))).steps if s.action == "refuse"
            ]
            reasons[step.reason] = norm
        finally:
            handle.remove()
    for words in (
        "does not say how wide",
        r"normalises (8,) with a weight of shape (2, 8)",
        "normalises 2 groups",
        "its callers may pass gate",
        "has a bias and no weight",
    ):
        assert any(words in reason for reason in reasons), words


def test_the_error_is_that_of_the_parameters_of_today():
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.bias, 100.0)  # beside which the rest is small
    (step,) = normzoo.plan(nn.Sequential(norm), "rms_norm").changes
    x = trial.inputs_for(step.site.norm, torch.device("cpu"))
    with torch.no_grad():
        old, new = norm(x), step.make().module(x)
    assert step.error == pytest.approx(trial.distance(new, old, (-1,)), rel=1e-5)
