"""What becomes of parameters, buffers and the optimizer in a conversion."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import Chain, GammaNorm, Net, OnePlusNorm
from torch import nn

import normzoo
from normzoo.conversion import TRANSFERS, Exactness
from normzoo.conversion.transfer import Carried, Transfer


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


def test_tensors_by_other_names():
    model = nn.Sequential(GammaNorm())
    model[0].gamma.requires_grad_(False)
    x = torch.randn(3, 8)
    gamma, beta, wanted = model[0].gamma, model[0].beta, model(x)
    optimizer = torch.optim.Adam(model.parameters())
    made = normzoo.plan(model)
    assert "renamed, in the state dict too: beta -> bias, gamma -> weight" in str(made)
    made.apply(optimizer)
    assert [*model.state_dict()] == ["0.weight", "0.bias"] and model[0].bias is beta
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert torch.equal(model(x), wanted)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    made.revert()
    assert model[0].gamma is gamma and model[0].beta is not beta and torch.equal(model[0].beta, beta + 1)


def test_a_weight_in_a_buffer():
    class Norm1(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.register_buffer("weight", torch.full((8,), 2.0), persistent)

        def forward(self, x):
            return F.rms_norm(x, (8,), self.weight, 1e-6)

    model = nn.Sequential(Norm1(True), Norm1(False))
    keys = [*model.state_dict()]
    made = normzoo.plan(model)
    assert made.steps[1].reason == "its weight is not in the state dict, and that of the layer would be"
    made.apply()
    assert not any(p.requires_grad for p in model.parameters()) and [*model.state_dict()] == keys


def test_what_the_options_leave_out_is_lost():
    model = nn.Sequential(nn.LayerNorm(8))
    nn.init.normal_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = normzoo.plan(model, "rms_norm", bias=False)
    assert made.steps[0].tensors["kept"] == ("weight",) and made.steps[0].tensors["lost"] == ("bias",)
    assert "parameters change" in made.summary()
    made.apply(optimizer)
    assert [*model.state_dict()] == ["0.weight"] and len(optimizer.param_groups[0]["params"]) == 1
    made = normzoo.plan(nn.LayerNorm(8), elementwise_affine=False)
    assert made.exactness == "approximate" and not made.apply().state_dict()


def test_new_parameters_go_to_no_stranger():
    model = nn.ModuleDict({"norm": nn.RMSNorm(8), "linear": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model["linear"].parameters(), lr=0.1)
    normzoo.convert(model, "rms_norm", bias=True, optimizer=optimizer)
    assert model["norm"].bias is not None and len(optimizer.param_groups[0]["params"]) == 2


def test_attributes_that_are_none_come_along():
    class Spare(nn.LayerNorm):
        def __init__(self):
            super().__init__(8)
            self.register_parameter("spare", None)
            self.register_buffer("cache", None)

    new = normzoo.convert(Spare())
    assert new.spare is None and new.cache is None and new.state_dict().keys() == {"weight", "bias"}


def test_a_state_dict_of_its_own_stays():
    class Versioned(nn.LayerNorm):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            pass

    step, _ = normzoo.plan(nn.Sequential(Versioned(8), nn.LayerNorm(8))).steps
    assert step.action == "refuse" and "a get_extra_state and a set_extra_state of its own" in step.reason


def test_tensors_that_came_after_the_conversion():
    model, x = Chain(), torch.randn(4, 8)
    model.norm.register_buffer("seen", torch.zeros(1))
    made = normzoo.plan(model)
    made.apply()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    assert made.verify(x).same
    model.double()
    made.revert()
    assert model.norm.seen.dtype == torch.float64 and model.norm.seen == 1
    assert model(x.double()).isfinite().all()


def test_an_optimizer_edited_half_way_is_put_back(monkeypatch):
    model = nn.Sequential(GammaNorm(), GammaNorm())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    before, state = list(model.parameters()), copy.deepcopy(optimizer.state_dict())
    home, calls = normzoo.conversion.surgery._home, []

    def fail_second(*args):
        calls.append(args)
        return home(*args) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(normzoo.conversion.surgery, "_home", fail_second)
    with pytest.raises(ZeroDivisionError):
        normzoo.convert(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"] == before == list(model.parameters())
    assert optimizer.state.keys() == set(before)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_an_optimizer_is_one():
    model = Chain()
    with pytest.raises(TypeError, match=r"optimizer is a str; it must be a torch\.optim\.Optimizer"):
        normzoo.convert(model, optimizer="adam")
    assert type(model.norm) is nn.LayerNorm


def test_named_parameters_leave_with_their_names():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    normzoo.convert(model, "rms_norm", bias=False, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["0.weight", "1.weight", "1.bias"] and len(group["params"]) == 3


def test_shared_frozen_parameters_are_not_untied():
    model = nn.Sequential(GammaNorm(), nn.LayerNorm(8), nn.Linear(8, 8))
    model[2].bias = model[0].gamma
    step, _ = normzoo.plan(model.requires_grad_(False)).steps
    assert "another module shares its parameters" in step.reason


def test_the_eps_of_float64():
    (step,) = normzoo.plan(nn.RMSNorm(8, dtype=torch.float64), "layer_norm").steps
    assert step.make().module.eps == torch.finfo(torch.float64).eps


def test_a_shared_parameter_that_stays_is_no_obstacle():
    model = nn.Sequential(OnePlusNorm(8), OnePlusNorm(8))
    model[1].bias = model[0].bias  # kept, while the weights are converted
    normzoo.convert(model)
    assert [type(norm) for norm in model] == [normzoo.LayerNorm] * 2 and model[0].bias is model[1].bias
