"""AdaB2N compiled, resumed, and with the ids of its batches."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from balance_cases import IDS, TASKS, C, make, per_absent, sample, stream, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from training import close, same, tensors

import normzoo
from normzoo import AdaB2N
from normzoo.functional import adab2n


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Regularised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, ids=None):
        return self.norm(x, ids), self.norm.loss


@per_absent
def test_compiled_is_eager(absent):
    """One of the forms has its loss in the graph, of the other it is read outside."""
    inside = absent == "renormalize"
    eager = make(torch.float32, absent=absent, kappa=0.4, nonfinite="skip")
    traced = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(Regularised(traced) if inside else traced, fullgraph=True, backend=counter)
    batches = stream()
    close(train(traced, call, batches), train(eager, eager, batches))
    assert counter.frame_count == 2  # with ids, and without


def test_inductor_is_eager():
    eager, batches = make(torch.float64, kappa=0.4), stream(torch.float64)[:2]
    traced = copy.deepcopy(eager)
    found = train(traced, torch.compile(traced, fullgraph=True), batches, end=1)
    close(found, train(eager, eager, batches, end=1), rtol=1e-6, atol=1e-6)


def test_an_unknown_task_in_a_graph():
    """A look at the ids would stop a device: the batch is NaN, and is skipped as such."""
    layer, x = make(nonfinite="skip"), sample()
    before = tensors(layer)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for strange in (TASKS, -1):
        y = call(x, torch.tensor([0, 1, strange, 1, 0, 2]))
        assert y.isnan().all()
    before["batches_skipped"] += 2
    assert all(torch.equal(t, before[name]) for name, t in tensors(layer).items())
    assert call(x, torch.tensor([0, 1, 0, 1, 0, 2])).isfinite().all()


def test_an_unknown_task_in_a_graph_propagates():
    layer = make()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(sample(), torch.tensor([0, 1, TASKS, 1, 0, 2]))
    assert layer.running_mean.isnan().all() and layer.running_var.isnan().all()


def test_ids_that_have_no_values_to_look_at():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, x = make(), sample()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = normzoo.functional.adab2n(mode.from_tensor(x), torch.zeros(6, dtype=torch.long), layer.task_weight)
    assert y.shape == x.shape
    ids = torch.stack([torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([1, 1, 1, 0, 0, 0])])
    each = torch.vmap(lambda k: normzoo.functional.adab2n(x, k, layer.task_weight))(ids)
    expected = [normzoo.functional.adab2n(x, k, layer.task_weight) for k in ids]
    torch.testing.assert_close(each, torch.stack(expected))


def test_what_is_reset_has_no_loss():
    layer = make()
    layer(sample())
    layer.reset_parameters()
    assert layer.loss is None


# State


def test_resuming_in_the_middle_of_a_task_is_exact():
    def fresh():
        torch.manual_seed(1)
        layer = AdaB2N(C, TASKS, kappa=0.3, absent="official")
        return layer, torch.optim.Adam(layer.parameters(), lr=0.02)

    batches = stream() + stream()
    whole, optimizer = fresh()
    train(whole, whole, batches[:6], optimizer)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, its = fresh()
    resumed.load_state_dict(saved["model"], strict=True)
    its.load_state_dict(saved["optimizer"])
    assert resumed.cur_tasks == 1
    same(train(resumed, resumed, batches[6:], its), train(whole, whole, batches[6:], optimizer))


def test_tasks_end():
    layer = AdaB2N(C, 2)
    layer.end_task(), layer.end_task()  # the authors' trainer counts the last one too
    before = tensors(layer)
    with pytest.raises(ValueError, match=r"AdaB2N: all of its 2 tasks have ended; .* makes room"):
        layer.end_task()
    same(tensors(layer), before)
    layer.reset_parameters()
    assert layer.cur_tasks == 0


# Ids


def test_ids_come_by_a_block_for_one_call():
    model = nn.Sequential(nn.Conv2d(3, C, 1), AdaB2N(C, 2), nn.Sequential(nn.ReLU(), AdaB2N(C, 2)))
    x, ids, others = torch.randn(6, 3, 2, 2), torch.tensor([0, 0, 0, 0, 0, 1]), torch.tensor([1, 1, 0, 0, 0, 0])
    for norm in (model[1], model[2][1]):
        nn.init.constant_(norm.task_weight, 2.0)

    def by_calls(ids):
        return model[2][1](model[2][0](model[1](model[0](x), ids)), ids)

    with normzoo.inputs(model, task_ids=ids):
        found = model(x)
        assert torch.equal(model[1](model[0](x), others), model[1](model[0](x), others))
        assert not torch.equal(model[1](model[0](x), others), model[1](model[0](x)))
    torch.testing.assert_close(found, by_calls(ids), rtol=0, atol=0)
    assert torch.equal(model(x), by_calls(None)) and not torch.equal(model(x), found)
    with normzoo.inputs(model, task_ids=ids[:3]), pytest.raises(ValueError, match=r"task_ids has shape \(3,\)"):
        model(x)
    with normzoo.inputs(model, task_ids=ids):
        y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises((RuntimeError, ValueError), match="task_ids"):  # the block is over
        y.sum().backward()


WRONG_IDS = {
    "shape": (torch.zeros(5, dtype=torch.long), ValueError, r"ids has shape \(5,\) but the input .*\(6,\)"),
    "a column": (torch.zeros(6, 1, dtype=torch.long), ValueError, r"task_ids has shape \(6, 1\)"),
    "float": (torch.zeros(6), TypeError, "task_ids is torch.float32; it must be a tensor of integers"),
    "bool": (torch.zeros(6, dtype=torch.bool), TypeError, "task_ids is torch.bool"),
    "a list": ([0] * 6, TypeError, "task_ids is of type list"),
    "device": (torch.zeros(6, dtype=torch.long, device="meta"), ValueError, "task_ids is on meta"),
    "too large": (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, "ids go from 0 to 3; .* from 0 to 2"),
    "negative": (torch.tensor([0, 1, 2, -1, 0, 0]), ValueError, "ids go from -1 to 2"),
}  # fmt: skip


@pytest.mark.parametrize(("ids", "error", "match"), WRONG_IDS.values(), ids=WRONG_IDS)
def test_ids_that_do_not_fit_are_refused(ids, error, match):
    layer, x = make(), sample()
    layer(x)
    before, loss = tensors(layer), layer.loss
    with pytest.raises(error, match=f"AdaB2N: .*{match}"):
        layer(x, ids)
    same(tensors(layer), before)
    assert torch.equal(layer.loss, loss)
    with pytest.raises(error, match=f"adab2n: .*{match}"):
        adab2n(x, ids, layer.task_weight)


def test_arguments_that_do_not_fit_are_refused():
    x, ids = sample(), torch.tensor(IDS["all there"])
    for given, error, match in (
        ((ids,), ValueError, "task_ids are given and task_weight is None"),
        ((ids, torch.zeros(2, 2)), ValueError, r"task_weight has shape \(2, 2\); it must be \(tasks,\)"),
        ((ids, [0.0] * 3), TypeError, "task_weight is of type list"),
        ((None, torch.zeros(3, dtype=torch.long)), TypeError, "task_weight is torch.int64"),
        ((ids, torch.zeros(3, device="meta")), ValueError, "task_weight is on meta but the input is on cpu"),
        (
            (ids, torch.zeros(3), None, None, 1e-5, "masked"),
            ValueError,
            "absent is 'masked'; it must be one of",
        ),
        ((ids, torch.zeros(3), None, None, 1e-5, "official", "1"), TypeError, "cur_tasks is '1'; it must be"),
    ):
        with pytest.raises(error, match=f"adab2n: {match}"):
            adab2n(x, *given)
    for options, match in (
        ({"num_tasks": 0}, "num_tasks is 0"),
        ({"momentum": None}, "momentum is None"),
        ({"momentum": 0.0}, "momentum is 0; it must be positive"),
        ({"kappa": 1.5}, "kappa is 1.5; it must be a number from 0 to 1"),
        ({"init_weight": float("inf")}, "init_weight is inf"),
        ({"absent": "drop"}, "absent is 'drop'"),
    ):
        with pytest.raises(ValueError, match=f"AdaB2N: {match}"):
            AdaB2N(**{"num_features": C, "num_tasks": TASKS} | options)
    layer = make()
    before = tensors(layer)
    with pytest.raises(ValueError, match="AdaB2N: Expected more than 1 value per channel when training"):
        layer(torch.randn(1, C, 1, 1).double(), torch.tensor([0]))
    same(tensors(layer), before)
