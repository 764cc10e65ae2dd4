"""Task streams over a whole model: ids reach every layer and no other batch."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred
from test_adapt import copied, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import normzoo
from normzoo.continual import end_task, regularizer, tasks

TASKS = 3


def net():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    normzoo.convert(stirred(model), "adab2n", num_tasks=TASKS)
    with torch.no_grad():
        for layer in layers(model):
            layer.task_weight.copy_(torch.arange(TASKS))  # so that it matters which task is which
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, normzoo.AdaB2N)]


def explicitly(model, x, ids):
    """The model with the ids passed to every layer by hand."""
    for module in [*model[0], *model[1], *model[2:]]:
        x = module(x, ids) if isinstance(module, normzoo.AdaB2N) else module(x)
    return x


def batch(n=6):
    return torch.randn(n, 2, 4, 4), torch.randint(0, TASKS, (n,))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b):
    assert a.keys() == b.keys()
    for name, grad in a.items():
        assert (grad is None) == (b[name] is None) and (grad is None or torch.equal(grad, b[name])), name


# Ids


def test_ids_reach_every_layer():
    model = net()
    twin = copy.deepcopy(model)
    x, ids = batch()
    with tasks(model, ids):
        y = model(x)
    assert torch.equal(y, explicitly(twin, x, ids)) and same(twin, copied(model))
    (y.sum() + regularizer(model)).backward()
    assert all(layer.task_weight.grad.abs().sum() > 0 for layer in layers(model))
    assert not torch.equal(y, net()(x))


def test_ids_end_with_the_block():
    model, (x, ids) = net(), batch()
    plain = copy.deepcopy(model)(x)
    with tasks(copy.deepcopy(model), ids):
        pass
    with tasks(net(), ids):
        assert torch.equal(copy.deepcopy(model)(x), plain)  # those of another model
    block = tasks(model, ids)
    assert torch.equal(copy.deepcopy(model)(x), plain)  # not entered yet
    state = copied(model)
    with block:
        inside = model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), plain) and not torch.equal(inside, plain)


def test_ids_end_with_an_error():
    model, (x, ids) = net(), batch()
    plain = copy.deepcopy(model)(x)
    with pytest.raises(KeyError), tasks(model, ids):
        raise KeyError
    state = copied(model)
    with pytest.raises(ValueError, match=r"AdaB2N: task_ids has shape \(5,\) but the input has shape \(6, 4"):
        with tasks(model, ids[:5]):
            model(x)
    assert same(model, state)
    assert torch.equal(model(x), plain)


def test_the_inner_block_holds():
    model, (x, first) = net(), batch()
    second = (first + 1) % TASKS
    wanted = {i: explicitly(net(), x, ids) for i, ids in enumerate((first, second))}
    state = copied(model)
    with tasks(model, first):
        with tasks(model, second):
            assert torch.equal(model(x), wanted[1])
        model.load_state_dict(state)
        assert torch.equal(model(x), wanted[0])
    assert not torch.equal(wanted[0], wanted[1])


def test_two_models_at_once():
    one, two, (x, ids) = net(), net(), batch()
    other = (ids + 1) % TASKS
    with tasks(one, ids), tasks(two, other):
        a, b = one(x), two(x)
    assert torch.equal(a, explicitly(net(), x, ids)) and torch.equal(b, explicitly(net(), x, other))


def test_threads_do_not_see_each_other():
    x, _ = batch()
    models = [net() for _ in range(TASKS)]
    ids = [torch.tensor([i, i, i, 0, 1, 2]) for i in range(TASKS)]
    wanted = [explicitly(net(), x, one) for one in ids]
    barrier, found = threading.Barrier(TASKS), {}

    def work(i):
        with tasks(models[i], ids[i]):
            barrier.wait()
            found[i] = torch.equal(models[i](x), wanted[i])
            barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(TASKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(TASKS), True)


def test_eval_mode_needs_none_and_heeds_none():
    model, (x, ids) = net().eval(), batch()
    with tasks(model, ids):
        inside = model(x)
    assert torch.equal(model(x), inside) and torch.equal(model(x)[:2], model(x[:2]))


def test_bad_ids():
    model, (x, ids) = net(), batch()
    with pytest.raises(TypeError, match=r"continual.tasks: task_ids is a list; it must be a torch.Tensor"):
        tasks(model, [0, 1])
    with pytest.raises(TypeError, match=r"continual.tasks: model is a str; it must be a torch.nn.Module"):
        tasks("net", ids)
    for wrong in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(
            TypeError, match=rf"continual.tasks: task_ids is {wrong}; it must be a tensor of integ"
        ):
            tasks(model, ids.to(wrong))
    none = (
        r'continual.tasks: no layer of the model takes task ids; normzoo.convert\(model, "adab2n", num_tasks='
    )
    with pytest.raises(ValueError, match=none):
        tasks(nn.BatchNorm2d(2), ids)
    with (
        tasks(model, ids + 3),
        pytest.raises(ValueError, match="task_ids go from 3 to 5; they must be from 0 to 2"),
    ):
        model(x)


# Checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["closed", "other"])
def test_a_recomputation_without_its_ids_is_refused(reentrant, when):
    model, (x, ids) = net(), batch()
    with tasks(model, ids):
        y = checkpoint(model[0], x.requires_grad_(), use_reentrant=reentrant)
    block = contextlib.nullcontext() if when == "closed" else tasks(model, (ids + 1) % TASKS)
    with (
        block,
        pytest.raises(RuntimeError, match=r"AdaB2N: .* recomputes; pass it to forward, or enter the block in"),
    ):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_inside_the_block_needs_one_of_its_own(reentrant):
    model, (x, ids) = net(), batch()
    with (
        tasks(model, ids),
        pytest.raises(RuntimeError, match=r"AdaB2N: task_ids comes from .* recomputes; pass"),
    ):
        checkpoint(model[0], x.requires_grad_(), use_reentrant=reentrant).sum().backward()


def test_a_recomputation_with_its_ids_is_right():
    x, ids = batch()
    model = net()
    with tasks(model, ids):
        model(x).square().sum().backward()
    wanted, state = gradients(model), copied(model)

    model = net()

    def contexts():
        return contextlib.nullcontext(), tasks(model, ids)

    with tasks(model, ids):
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    with tasks(model, (ids + 1) % TASKS):
        y.square().sum().backward()
    assert_same_gradients(gradients(model), wanted)
    assert same(model, state)

    model = net()
    y = checkpoint(explicitly, model, x, ids, use_reentrant=False)
    y.square().sum().backward()
    assert_same_gradients(gradients(model), wanted)
    assert same(model, state)


# The regularizer


def distance(mean, var, old_mean, old_var, eta):
    """(1 − η)² times the squared distances from the old statistics, which are those from the new ones."""
    return (1 - eta) ** 2 * ((mean - old_mean).square().mean() + (var - old_var).square().mean())


def test_regularizer_by_hand():
    model, (x, ids) = net(), batch()
    inputs = {}
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda m, args: inputs.setdefault(m, args[0]))
    old = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers(model)]
    with tasks(model, ids):
        model(x)
    wanted = 0
    for layer, (old_mean, old_var) in zip(layers(model), old, strict=True):
        n = torch.stack([(ids == k).sum() for k in range(TASKS)])
        concentration = torch.where(n > 0, layer.task_weight.exp() + n, 0)
        w = (concentration / concentration.sum() / n.clamp(min=1))[ids][:, None]
        h = inputs[layer]
        mean = (w * h.mean((2, 3))).sum(0)
        var = (w * (h - mean[:, None, None]).square().mean((2, 3))).sum(0)
        wanted = wanted + distance(mean, var, old_mean, old_var, layer.momentum)
    value = regularizer(model)
    torch.testing.assert_close(value, wanted)
    value.backward(retain_graph=True)
    got = gradients(model)
    model.zero_grad()
    # The running statistics of now are constants: one factor (1 − η) of the two.
    (wanted / (1 - 0.1)).backward()
    for name, grad in gradients(model).items():
        assert (grad is None) == (got[name] is None)
        if grad is not None:
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5)


def test_two_passes_before_one_backward():
    model, (x, ids), (x2, ids2) = net(), batch(), batch(5)
    total = 0
    for images, k in ((x, ids), (x2, ids2)):
        with tasks(model, k):
            total = total + model(images).square().sum() + 0.5 * regularizer(model)
    total.backward()
    got, state = gradients(model), copied(model)

    model = net()
    for images, k in ((x, ids), (x2, ids2)):  # one after the other
        with tasks(model, k):
            (model(images).square().sum() + 0.5 * regularizer(model)).backward()
    assert same(model, state)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_model_in_training():
    model, (x, ids) = net(), batch()
    with tasks(model, ids):
        y = model(x)
    twin = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"continual.regularizer: no layer has run in training yet; run the model"
    ):
        regularizer(twin)
    (y.sum() + regularizer(model)).backward()
    with tasks(model, ids), tasks(twin, ids):
        assert torch.equal(model(x), twin(x))


def test_layers_that_did_not_run_are_left_out():
    model, (x, _) = net(), batch()
    with pytest.raises(ValueError, match="no layer has run in training yet"):
        regularizer(model)
    model.eval()(x)
    with pytest.raises(ValueError, match="no layer has run in training yet"):
        regularizer(model)
    model.train()[0](x)
    assert torch.equal(regularizer(model), layers(model)[0].loss)


def test_a_pass_without_gradients_is_no_ground_for_a_loss():
    model, (x, _) = net(), batch()
    with torch.no_grad():
        model(x)
        assert regularizer(model) > 0
    with pytest.raises(RuntimeError, match="AdaB2N: its last forward pass in training ran without gradients"):
        regularizer(model)


# Streams


def stream():
    generator = torch.Generator().manual_seed(2)
    for task in range(TASKS):
        for _ in range(4):
            n = 4
            ids = torch.cat([torch.full((n,), task), torch.randint(0, task + 1, (n,), generator=generator)])
            x = torch.randn(2 * n, 2, 4, 4, generator=generator) + ids[:, None, None, None]
            yield task, x, torch.randint(0, 5, (2 * n,), generator=generator), ids


def step(model, optimizer, x, labels, ids):
    optimizer.zero_grad()
    with tasks(model, ids):
        loss = F.cross_entropy(model(x), labels)
    (loss + 0.1 * regularizer(model)).backward()
    optimizer.step()


def trained(model, optimizer, items, last):
    for task, *rest in items:
        if task != last:
            end_task(model)
            last = task
        step(model, optimizer, *rest)
    return model


def fresh(kappa):
    model = net()
    for layer in layers(model):
        layer.kappa = kappa
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("kappa", [1.0, 0.4])
def test_a_stream_goes_on_from_a_checkpoint_to_the_last_bit(kappa, tmp_path):
    items = list(stream())
    model, optimizer = fresh(kappa)
    trained(model, optimizer, items[:6], 0)  # in the middle of the second task
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    trained(model, optimizer, items[6:], 1)

    again, its_optimizer = fresh(kappa)
    saved = torch.load(tmp_path / "half.pt")
    again.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    trained(again, its_optimizer, items[6:], 1)
    assert same(again, copied(model)) and layers(again)[0].cur_tasks == 2
    x = items[0][1]
    assert torch.equal(again.eval()(x), model.eval()(x))
