"""The tasks of a model end together, and more of them may be planned than ever come."""

import pytest
import torch
from test_continual import TASKS, layers, net
from torch import nn

import normzoo
from normzoo.continual import end_task, regularizer, tasks


def test_all_tasks_end_together():
    model = net()
    for ended in range(TASKS):
        assert [int(layer.cur_tasks) for layer in layers(model)] == [ended] * 2
        end_task(model)
    with pytest.raises(
        ValueError, match=r"continual.end_task: all tasks of 2 layers have ended \(0.1, 1.1\); .* makes room"
    ):
        end_task(model)
    assert [int(layer.cur_tasks) for layer in layers(model)] == [TASKS] * 2


def test_no_task_ends_where_one_cannot():
    model = nn.Sequential(normzoo.AdaB2N(2, 3), normzoo.AdaB2N(2, 1), normzoo.AdaB2N(2, 3))
    end_task(model)
    with pytest.raises(ValueError, match=r"all tasks of 1 layer have ended \(1\)"):
        end_task(model)
    assert [int(layer.cur_tasks) for layer in model] == [1, 1, 1]


def test_a_shared_layer_ends_its_task_once():
    layer = normzoo.AdaB2N(2, 3)
    end_task(nn.Sequential(layer, nn.ReLU(), layer))
    assert layer.cur_tasks == 1
    end_task(layer)
    assert layer.cur_tasks == 2


@pytest.mark.parametrize("function", [end_task, regularizer])
def test_a_model_without_such_layers(function):
    with pytest.raises(
        ValueError, match=rf'continual.{function.__name__}: the model has no AdaB2N; .*"adab2n", num'
    ):
        function(nn.BatchNorm2d(2))
    with pytest.raises(TypeError, match=rf"continual.{function.__name__}: model is a NoneType; it must be"):
        function(None)


@pytest.mark.parametrize("function", [end_task, regularizer, lambda model: tasks(model, torch.arange(3))])
def test_frozen_layers_are_told_from_none(function):
    model = normzoo.freeze_batch_norm(net())
    with pytest.raises(
        ValueError, match=r"; AdaB2N that it had are frozen; normzoo.unfreeze_batch_norm\(model\)"
    ):
        function(model)
    end_task(normzoo.unfreeze_batch_norm(model))
    assert layers(model)[0].cur_tasks == 1
    with pytest.raises(ValueError, match=r"the model has no AdaB2N; normzoo.convert"):
        end_task(normzoo.freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(2))))


@pytest.mark.parametrize("absent", ["renormalize", "official"])
@pytest.mark.parametrize("kappa", [1.0, 0.4])
def test_tasks_that_never_come_change_nothing(absent, kappa):
    few, many = (normzoo.AdaB2N(4, n, init_weight=1.0, kappa=kappa, absent=absent) for n in (TASKS, 40))
    optimizers = [torch.optim.Adam(layer.parameters(), 0.1) for layer in (few, many)]
    for task in range(TASKS):
        for last in (task, max(task - 1, 0)):  # the current task may be absent
            x = torch.randn(6, 4, 3) + task
            ids = torch.randint(0, last + 1, (6,))
            outputs = []
            for layer, optimizer in zip((few, many), optimizers, strict=True):
                optimizer.zero_grad()
                y = layer(x, ids)
                (y.pow(3).sum() + regularizer(layer)).backward()
                optimizer.step()
                outputs.append(y)
            torch.testing.assert_close(*outputs)
            for name, t in few.state_dict().items():
                now = many.state_dict()[name]
                torch.testing.assert_close(now[:TASKS] if name == "task_weight" else now, t)
            torch.testing.assert_close(many.task_weight.grad[:TASKS], few.task_weight.grad)
            assert not many.task_weight.grad[TASKS:].any()
        end_task(few)
        end_task(many)
    assert not torch.equal(few.task_weight, torch.ones(TASKS))
