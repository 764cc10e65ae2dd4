"""A run of a model as a graph of operators, with its norms as boxes."""

import pytest
import torch
from torch import nn

from normzoo.residual.recording import NORM, record


class Steps(nn.Module):
    """Runs functions one after the other."""

    def __init__(self, *functions):
        super().__init__()
        self.weight, self.functions = nn.Parameter(torch.randn(4, 4)), functions
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        for function in self.functions:
            x = function(self, x)
        return x


def recorded(*functions, norms=(), x=None):
    model = Steps(*functions)
    x = torch.randn(2, 4) if x is None else x
    return record(model, lambda: model(x), [x], norms)


def test_a_recording_knows_leaves_and_calls():
    found = recorded(lambda m, x: x @ m.weight, lambda m, x: x + torch.ones(4))
    assert [found.calls[0].operator, found.calls[-1].operator] == ["mm", "add"]
    x, weight = found.calls[0].operands()
    assert (x.leaf, weight.leaf, weight.name) == ("input", "parameter", "weight")
    assert found.returned == found.calls[-1].outputs and found.returned[0].returned_by == [""]
    assert found.outputs_of[""] == found.returned and weight.users == [found.calls[0]]
    assert found.calls[-1].args[0] is found.calls[0].outputs[0]
    assert found.calls[1].operator == "ones" and found.calls[1].outputs[0].leaf == ""
    outside = torch.randn(4)
    assert recorded(lambda m, x: x * outside).calls[0].args[1].leaf == "constant"


def test_a_recording_follows_writes_in_place():
    def whole(m, x):
        y = x * 2
        y.add_(1)
        return y

    found = recorded(whole)
    assert [call.operator for call in found.calls] == ["mul", "add_"]
    before, after = found.calls[0].outputs[0], found.returned[0]
    assert found.calls[1].args[0] is before and after is found.calls[1].outputs[0] and after is not before

    def part(m, x):
        y = x * 2
        y[0].mul_(3)
        return y

    (returned,) = recorded(part).returned
    assert returned.leaf == "overwritten" and returned.call is None

    def base(m, x):
        y = x * 2
        view = y.view(8)
        y.add_(1)
        return view

    assert recorded(base).returned[0].leaf == "overwritten"


def test_a_norm_is_a_box_and_hooks_run_inside_of_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, y: y * 2)
    x = torch.randn(3, 4)
    found = record(model, lambda: model(x), [x], ["1"])
    assert [call.operator for call in found.calls] == ["t", "addmm", NORM, "t", "addmm"]
    (box,) = [call for call in found.calls if call.operator == NORM]
    assert box.module == "1" and box.args[0] is found.calls[1].outputs[0]
    assert found.calls[-1].args[1] is box.outputs[0] and box.outputs[0].returned_by == ["1"]
    named = nn.LayerNorm(4)
    call = record(named, lambda: named(input=x), [x], [""]).calls[-1]
    assert call.operator == NORM and call.args[0].leaf == "input"


def test_a_recording_leaves_no_hooks_and_sees_float32():
    model = Steps(lambda m, x: x.double().float() + 1)
    x = torch.randn(2, 4, dtype=torch.float64)
    found = record(model, lambda: model(x), [x], ())
    assert [call.narrows for call in found.calls] == [True, False]
    assert not model._forward_hooks and not model._forward_pre_hooks
    inside = record(model, lambda: model(x), [x], [""]).calls
    assert [(call.operator, call.narrows) for call in inside] == [(NORM, True)]
    with pytest.raises(RuntimeError):
        record(model, lambda: model(torch.ones(1)) + undefined(), [x], ())
    assert not model._forward_hooks and not model._forward_pre_hooks


def undefined():
    raise RuntimeError("stop")
