"""The wrapper that adapts at every call, and goes back to the last bit."""

import copy
import logging
import math

import pytest
import torch
from small_models import stirred
from test_adapt import copied, same
from torch import nn

from normzoo.adapt import Adapted, collect_params, configure, core_loss, entropy_loss


def net():
    return stirred(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    )


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], 0.01),
}


def adapted(name="Adam", **options):
    model = configure(net(), 0.5, train_affine=True)
    return Adapted(model, OPTIMIZERS[name](collect_params(model)[0]), **options)


def images(n=8, *shift):
    return torch.randn(n, 3, 4, 4) * 2 + (shift[0] if shift else 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_steps_by_hand(name, steps, loss):
    wrapped = adapted(name, loss=loss, steps=steps)
    model = copy.deepcopy(wrapped.model)
    optimizer = OPTIMIZERS[name](collect_params(model)[0])
    for x in (images(), images(4)):
        wanted = torch.empty(0)
        for _ in range(steps):
            wanted = model(x)
            optimizer.zero_grad()
            loss(wanted).backward()
            optimizer.step()
        y = wrapped(x)
        assert torch.equal(y, wanted.detach()) and not y.requires_grad
        assert not torch.equal(y, model(x).detach())  # the outputs before the last step
        assert same(wrapped.model, copied(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fresh", [True, False])
def test_reset_goes_back_to_the_last_bit(name, fresh):
    first = adapted(name)
    if not fresh:  # the optimizer has a state by then
        first(images())
    wrapped = Adapted(first.model, first.optimizer)
    wrapped.model.register_buffer("unsaved", torch.zeros(2), persistent=False)
    wrapped = Adapted(first.model, first.optimizer)
    optimizer = wrapped.optimizer
    params = [p for g in optimizer.param_groups for p in g["params"]]
    state, settings = copied(wrapped), copy.deepcopy(optimizer.state_dict())
    stream = [images(8, i) for i in range(3)]
    outputs = [wrapped(x) for x in stream]
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.add_param_group({"params": [wrapped.model[0].weight.requires_grad_(False)]})
    with torch.no_grad():
        wrapped.model[4].weight.fill_(math.nan)
        wrapped.model[1].running_mean += 1
        wrapped.model.unsaved += 1
    for _ in range(2):
        assert not same(wrapped, state)
        wrapped.reset()
        assert same(wrapped, state)
        now = optimizer.state_dict()
        assert now.keys() == settings.keys() and now["param_groups"] == settings["param_groups"]
        assert now["state"].keys() == settings["state"].keys()
        assert (name == "SGD" or not fresh) or not now["state"]
        for i, values in settings["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(now["state"][i][key]), torch.as_tensor(value)), key
        held = [p for g in optimizer.param_groups for p in g["params"]]
        assert len(held) == len(params) and all(a is b for a, b in zip(held, params, strict=True))
        assert all(any(p is q for q in wrapped.parameters()) for p in held)
        for x, y in zip(stream, outputs, strict=True):
            assert torch.equal(wrapped(x), y)


def test_reset_is_strict():
    wrapped = adapted()
    wrapped(images())
    before = copied(wrapped)
    wrapped.model[4].bias = None
    with pytest.raises(
        ValueError, match=r"Adapted.reset: the model has changed .* \(model.4.bias\); wrap it anew"
    ):
        wrapped.reset()
    assert same(wrapped, {name: t for name, t in before.items() if name != "model.4.bias"})
    wrapped.model[4].bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"model.4.bias"):
        wrapped.reset()


def test_episodes_know_nothing_of_each_other():
    wrapped, stream = adapted("momentum", episodic=True, steps=2), [images(8, i) for i in range(3)]
    outputs = [wrapped(x) for x in stream]
    for x, y in reversed(list(zip(stream, outputs, strict=True))):
        assert torch.equal(wrapped(x), y)
    wrapped.episodic = False
    assert not torch.equal(wrapped(stream[0]), outputs[0])


@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(mode, episodic):
    model = configure(nn.Sequential(nn.BatchNorm2d(3), net()), 0.5, train_affine=True)
    first = Adapted(model, OPTIMIZERS["Adam"](collect_params(model)[0]))
    stream = [images(8, i) for i in range(3)]
    first(stream[0])  # the optimizer has a state
    wrapped = Adapted(model, first.optimizer, episodic=episodic)
    twin = copy.deepcopy(wrapped)
    wanted = [twin(x) for x in stream]
    with mode():
        inner = Adapted(wrapped.model, wrapped.optimizer, episodic=episodic)
        got = [inner(x.clone()) for x in stream]
        inner.reset()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for each in (inner, copy.deepcopy(inner)):  # outside, with the state that was made inside
        got = [each(x) for x in stream]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        each.reset()


def test_without_an_optimizer_it_only_runs():
    model = configure(net(), 0.5)
    wrapped, x, state = Adapted(model, episodic=True), images(), copied(model)
    assert torch.equal(wrapped(x), model(x)) and same(model, state)
    assert wrapped(x.requires_grad_()).requires_grad
    wrapped.reset()
    with torch.inference_mode():
        assert torch.equal(wrapped(x), model(x))


def test_other_gradients_are_left_alone():
    wrapped = adapted()
    other = wrapped.model[0].weight.requires_grad_()
    other.grad = torch.ones_like(other)
    before = other.detach().clone()
    norm = wrapped.model[1]
    norm.weight.grad = torch.full_like(norm.weight, 1e6)  # of another loss; it must not move the step
    twin = adapted()
    twin.load_state_dict(wrapped.state_dict())
    x = images()
    assert torch.equal(wrapped(x), twin(x)) and torch.equal(norm.weight, twin.model[1].weight)
    assert torch.equal(other.grad, torch.ones_like(other)) and torch.equal(other, before)
    assert norm.weight.grad is None


def test_state_dict_and_copies():
    wrapped, x = adapted("momentum"), images()
    wrapped(x)
    state = copy.deepcopy(wrapped.state_dict())
    assert list(state) == [f"model.{name}" for name in wrapped.model.state_dict()]
    other = adapted("momentum")
    other.load_state_dict(state)
    assert same(other, copied(wrapped))
    twin = copy.deepcopy(wrapped)
    assert all(any(p is q for q in twin.parameters()) for g in twin.optimizer.param_groups for p in g["params"])
    before = copied(wrapped)
    second = [twin(x), twin(x)]
    assert same(wrapped, before)
    assert all(torch.equal(wrapped(x), y) for y in second)
    twin.reset()
    wrapped.reset()
    assert same(twin, copied(wrapped)) and torch.equal(twin(x), wrapped(x))


@pytest.mark.parametrize("what", ["input", "gradient"])
def test_a_bad_batch_teaches_nothing(what, caplog):
    wrapped, x = adapted("momentum", steps=2), images()
    wrapped(x)
    state, settings = copied(wrapped), copy.deepcopy(wrapped.optimizer.state_dict()["state"])
    if what == "input":
        bad = x.clone()
        bad[0, 0, 0, 0] = math.nan
        with caplog.at_level(logging.WARNING, logger="normzoo"):
            assert wrapped(bad).isnan().any()
        assert "its gradients, are not finite; no step was taken" in caplog.text
    else:
        wrapped.loss = lambda logits: (logits - logits.detach()).abs().sqrt().sum()  # 0, with a slope of NaN
        wrapped(x)
        wrapped.loss = entropy_loss
    assert same(wrapped, state) and wrapped.updates_skipped == 1
    for i, values in wrapped.optimizer.state_dict()["state"].items():
        assert torch.equal(values["momentum_buffer"], settings[i]["momentum_buffer"])
    wrapped(x)
    assert not same(wrapped, state) and wrapped.updates_skipped == 1
    wrapped.reset()
    assert wrapped.updates_skipped == 1


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_an_empty_batch_teaches_nothing(loss):
    wrapped = adapted("momentum", loss=loss)
    wrapped(images())
    state = copied(wrapped)
    assert wrapped(images(0)).shape == (0, 4)
    assert same(wrapped, state) and wrapped.updates_skipped == 1


def test_momentum_goes_on_with_a_gradient_of_zero():
    wrapped = adapted("momentum", loss=core_loss)
    wrapped(images())
    state = copied(wrapped)
    wrapped(images(1))  # one sample tells the correlation of classes nothing
    assert not same(wrapped, state) and wrapped.updates_skipped == 0


def test_models_with_other_signatures():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x, *, shift):
            return {"logits": self.inner(x + shift), "note": "text"}

    model = configure(Two(), train_affine=True)
    optimizer = torch.optim.SGD(collect_params(model)[0], 0.1)
    wrapped = Adapted(model, optimizer, lambda out: entropy_loss(out["logits"]))
    x, weight = images(), model.inner[1].weight.clone()
    wanted = model(x, shift=1.0)["logits"]
    out = wrapped(x, shift=1.0)
    assert torch.equal(out["logits"], wanted) and not out["logits"].requires_grad and out["note"] == "text"
    assert not torch.equal(model.inner[1].weight, weight)


def strangers():
    optimizer = torch.optim.SGD(configure(net(), train_affine=True)[1].parameters(), 0.1)
    return Adapted(configure(net(), train_affine=True), optimizer)


def resting():
    model = configure(net())
    return Adapted(model, torch.optim.SGD(model[1].parameters(), 0.1))


def beside():
    wrapped = adapted()
    other = wrapped.model[4].bias.requires_grad_()
    wrapped.loss = lambda y: other.sum()
    return wrapped(images())


def again(other=False):
    wrapped = adapted()
    configure(wrapped.model, 0.5)
    wrapped.model[4].bias.requires_grad_(other)
    return wrapped(images())


class Sharp(torch.optim.SGD):
    """As those that look around before they step."""

    def step(self, closure):
        closure()
        return super().step()


def closed(make, scheduled=False):
    model = configure(net(), train_affine=True)
    optimizer = make(collect_params(model)[0])
    if scheduled:  # which puts its own step over that of the optimizer
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return Adapted(model, optimizer)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (
            beside,
            ValueError,
            "the loss does not depend on the parameters that the optimizer trains; do the model",
        ),
        (
            resting,
            ValueError,
            r"no parameter of the optimizer requires grad; adapt.configure\(model, train_affine",
        ),
        (
            strangers,
            ValueError,
            "the optimizer has 2 parameters that the model has not; make the optimizer after",
        ),
        (
            again,
            ValueError,
            r"the loss .*; 2 of the optimizer's parameters do not require grad any more; was configure called",
        ),
        (lambda: again(other=True), ValueError, "the loss does not .*; 2 of the optimizer's parameters do not"),
        (lambda: closed(torch.optim.LBFGS), ValueError, "the step of LBFGS needs a closure, and"),
        (lambda: closed(torch.optim.LBFGS, True), ValueError, "the step of LBFGS needs a closure, and"),
        (lambda: closed(Sharp), ValueError, "the step of Sharp needs a closure, and"),
        (
            lambda: Adapted(adapted()),
            ValueError,
            r"the model is wrapped \(Adapted\) already; pass the model in",
        ),
        (
            lambda: Adapted(nn.Sequential(Adapted(net()))),
            ValueError,
            r"the model is wrapped \(Adapted\) already",
        ),
        (lambda: adapted(steps=0), ValueError, "steps is 0; it must be a positive int"),
        (lambda: adapted(steps=True), ValueError, "steps is True"),
        (lambda: adapted(episodic=1), TypeError, "episodic is 1; it must be True or False"),
        (lambda: adapted(loss="entropy"), TypeError, "loss is a str; it must be callable"),
        (lambda: Adapted(configure(net()), steps=2), ValueError, "steps is 2 and there is no optimizer"),
        (lambda: Adapted("net"), TypeError, "model is a str; it must be a torch.nn.Module"),
        (lambda: Adapted(net(), net().parameters()), TypeError, "optimizer is a generator; it must be a torch"),
        (
            lambda: adapted(loss=lambda y: y.sum(1))(images()),
            ValueError,
            r"the loss is of shape \(8,\); it must be",
        ),
        (
            lambda: adapted(loss=lambda y: 1.0)(images()),
            ValueError,
            "the loss is of type float; it must be a scal",
        ),
        (
            lambda: adapted(loss=lambda y: y.detach().sum())(images()),
            ValueError,
            "the loss does not depend on the",
        ),
    ],
)
def test_what_the_wrapper_refuses(make, error, words):
    with pytest.raises(error, match=f"Adapted: {words}"):
        make()


def test_autocast_sees_every_step_and_reset():
    torch.manual_seed(0)
    model, x = nn.Linear(16, 5), torch.randn(8, 16)
    adapted = Adapted(model, torch.optim.SGD(model.parameters(), lr=1.0), steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = adapted(x), adapted(x)
        assert not torch.equal(second, first)
        assert torch.equal(model(x), nn.functional.linear(x, model.weight.clone(), model.bias.clone()))
        adapted.reset()
        assert torch.equal(adapted(x), first)
