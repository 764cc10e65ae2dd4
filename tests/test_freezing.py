"""Freezing batch norms and giving them back as they were."""

import copy
import logging
import threading

import pytest
import torch
import torch.distributed as dist
import torchvision_ops  # noqa: F401
from small_models import ConvNet, stirred, without_bias
from torch import nn

import normzoo
from normzoo.conversion.trial import alone


class Kinds(nn.Module):
    """Batch norms of every kind that can be frozen, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, affine=False, eps=1e-2))
        self.b = nn.SyncBatchNorm(4, momentum=0.3)
        self.c = normzoo.GhostBatchNorm(4, 2, split="ceil")
        self.d = normzoo.BatchNorm2d(4, sync=True, nonfinite="skip")
        self.e = without_bias(nn.BatchNorm2d(4))
        self.again = self.a[0]
        self.last = nn.LayerNorm(3)

    def forward(self, x):
        return self.last(self.again(self.e(self.d(self.c(self.b(self.a(x)))))))


def kinds():
    model = stirred(Kinds())
    model.a[0].weight.requires_grad_(False)
    model.d.eval()
    model(torch.randn(4, 4, 3, 3))
    return model


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name


def run(model, x):
    """Outputs and state of a step in training and one in eval mode, of a copy."""
    twin = copy.deepcopy(model)
    return [twin.train()(x), twin.eval()(x), *twin.state_dict().values()]


def test_a_round_trip_is_exact():
    model, x = kinds(), torch.randn(4, 4, 3, 3)
    twin, state, modules = copy.deepcopy(model), states(model), list(model.modules())
    parameters = dict(model.named_parameters())
    modes = [module.training for module in modules]
    flags = [p.requires_grad for p in parameters.values()]
    wanted = copy.deepcopy(model).eval()(x)
    assert normzoo.freeze_batch_norm(model) is model
    assert [type(module) for module in (model.a[0], model.b, model.c, model.d, model.e)] == [
        normzoo.FrozenBatchNorm
    ] * 5
    assert model.again is model.a[0] and model.a[1].weight is None and type(model.last) is nn.LayerNorm
    assert list(dict(model.named_parameters())) == ["last.weight", "last.bias"]
    assert_same_state(model, state)
    torch.testing.assert_close(model.train()(x), wanted)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    assert_same_state(model, state)
    assert normzoo.unfreeze_batch_norm(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    now = dict(model.named_parameters())
    assert list(now) == list(parameters) and all(now[name] is p for name, p in parameters.items())
    assert [p.requires_grad for p in now.values()] == flags
    assert [module.training for module in model.modules()] == modes
    assert_same_state(model, state)
    for a, b in zip(run(model, x), run(twin, x), strict=True):
        assert torch.equal(a, b)
    for name in ("momentum", "eps", "affine", "track_running_stats"):
        assert [getattr(m, name, 0) for m in model.modules()] == [getattr(m, name, 0) for m in twin.modules()]


def test_values_of_in_between():
    model, x = kinds(), torch.randn(4, 4, 3, 3)
    twin = copy.deepcopy(model)
    normzoo.freeze_batch_norm(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.double().eval()
    normzoo.unfreeze_batch_norm(model)
    twin.load_state_dict(state)
    twin.double().eval()
    assert_same_state(model, states(twin))
    assert all(
        type(a) is type(b) and a.training == b.training
        for a, b in zip(model.modules(), twin.modules(), strict=True)
    )
    for a, b in zip(run(model, x.double()), run(twin, x.double()), strict=True):
        assert torch.equal(a, b)
    model.train()(x.double()).sin().sum().backward()
    assert model.b.weight.grad.dtype == torch.float64 and model.a[0].weight.grad is None


def test_again_and_again():
    model, x = kinds(), torch.randn(4, 4, 3, 3)
    state, wanted = states(model), run(model, x)
    for _ in range(3):
        normzoo.unfreeze_batch_norm(normzoo.freeze_batch_norm(model))
    assert_same_state(model, state)
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), wanted, strict=True))


def test_copies_and_files_remember(tmp_path):
    model, x = kinds(), torch.randn(4, 4, 3, 3)
    wanted = run(model, x)
    normzoo.freeze_batch_norm(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        before = other.b
        normzoo.unfreeze_batch_norm(other)
        assert other.again is other.a[0] and type(other.b) is nn.SyncBatchNorm and other.b is not before
        assert all(torch.equal(a, b) for a, b in zip(run(other, x), wanted, strict=True))
    assert isinstance(model.b, normzoo.FrozenBatchNorm)


def test_an_optimizer_goes_on():
    model = stirred(ConvNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).sin().sum().backward()
        optimizer.step()

    step()
    normzoo.freeze_batch_norm(model)
    frozen, weight = states(model), model.first.weight.clone()
    step()
    step()
    assert all(torch.equal(model.state_dict()[name], frozen[name]) for name in frozen if "norm" in name)
    assert not torch.equal(model.first.weight, weight)
    normzoo.unfreeze_batch_norm(model)
    assert torch.equal(model.norm.weight, frozen["norm.weight"])
    step()
    assert not torch.equal(model.norm.weight, frozen["norm.weight"])


def test_activations_and_hooks_of_timm():
    layers = pytest.importorskip("timm.layers")
    model = stirred(nn.Sequential(layers.BatchNormAct2d(4, act_layer="silu", drop_layer=nn.Dropout)))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 4, 3, 3)
    old, wanted, state = model[0], model.eval()(x), states(model)
    normzoo.freeze_batch_norm(model)
    assert isinstance(model[0], normzoo.FrozenBatchNorm) and model[0].act is old.act
    torch.testing.assert_close(model(x), wanted)
    handle = model[0].register_forward_hook(lambda *_: calls.append(2))
    model[0].act = nn.ReLU()
    normzoo.unfreeze_batch_norm(model)
    assert model[0] is old and type(old.act) is nn.ReLU and not old.training
    assert_same_state(model, state)
    calls.clear()
    model(x)
    assert calls == [1, 2]
    handle.remove()


def test_names_of_other_libraries():
    from test_batch_lookalikes import HandNorm

    model = stirred(nn.Sequential(HandNorm()))
    state = states(model)
    normzoo.freeze_batch_norm(model)
    assert list(model.state_dict())[:2] == ["0.weight", "0.bias"]
    with torch.no_grad():
        model[0].running_mean += 1
        model[0].weight += 2
    normzoo.unfreeze_batch_norm(model)
    state["0.mean"] += 1
    state["0.gamma"] += 2
    assert_same_state(model, state)


def test_what_was_frozen_before_stays_frozen(caplog):
    model = stirred(nn.Sequential(normzoo.FrozenBatchNorm(4), nn.BatchNorm2d(4)))
    first = model[0]
    normzoo.freeze_batch_norm(model)
    assert model[0] is first
    with caplog.at_level(logging.INFO, logger="normzoo"):
        normzoo.unfreeze_batch_norm(model)
    assert model[0] is first and type(model[1]) is nn.BatchNorm2d
    assert "1 norm stay, which freeze_batch_norm did not make" in caplog.text
    with pytest.raises(
        ValueError,
        match=r"froze, though 1 FrozenBatchNorm of other origin; convert\(model, .* makes batch norms of",
    ):
        normzoo.unfreeze_batch_norm(model)
    normzoo.convert(model, "batch_norm", types="frozen_batch")
    assert isinstance(model[0], normzoo.BatchNorm2d)


def test_a_frozen_norm_that_is_converted_forgets():
    model = normzoo.freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(4)))
    normzoo.convert(model, "batch_norm")
    with pytest.raises(ValueError, match=r"has no norm that freeze_batch_norm froze$"):
        normzoo.unfreeze_batch_norm(model)
    normzoo.convert(model, "frozen_batch_norm")
    with pytest.raises(ValueError, match="froze, though 1 FrozenBatchNorm of other origin"):
        normzoo.unfreeze_batch_norm(model)


def test_what_cannot_be_frozen(caplog):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm(4))
    normzoo.freeze_batch_norm(model)
    assert isinstance(model[0], normzoo.FrozenBatchNorm) and type(model[1]) is nn.BatchNorm2d
    assert "1 norm left as they are:\n  1: it has no running statistics" in caplog.text
    for bad, error, words in (
        (
            nn.Linear(2, 2),
            ValueError,
            "freeze_batch_norm: the model has no batch norm; norm classes seen: none",
        ),
        (nn.GroupNorm(2, 2), ValueError, "the model has no batch norm; norm classes seen: 1 torch"),
        (model[0], ValueError, "the batch norms of the model are frozen already; norm classes seen: 1 normzoo"),
        ([nn.BatchNorm2d(2)], TypeError, "freeze_batch_norm: model is a list"),
        (
            torch.compile(nn.BatchNorm2d(2)),
            ValueError,
            r"^freeze_batch_norm: the model itself is wrapped \(O.*; freeze the module first, then call",
        ),
        (
            nn.BatchNorm2d(2, track_running_stats=False),
            ValueError,
            r"^freeze_batch_norm: none of the batch norms can be frozen; norm classes seen: .*\n.*no running",
        ),
    ):
        with pytest.raises(error, match=words):
            normzoo.freeze_batch_norm(bad)
    frozen = normzoo.freeze_batch_norm(nn.Sequential(nn.BatchNorm2d(2)))
    frozen.compile()
    with pytest.raises(
        ValueError, match=r"^unfreeze_batch_norm: .* is compiled .*; unfreeze the model first, then"
    ):
        normzoo.unfreeze_batch_norm(frozen)
    with pytest.raises(TypeError, match="unfreeze_batch_norm: model is a str"):
        normzoo.unfreeze_batch_norm("model")
    with pytest.raises(
        ValueError, match=r"unfreeze_batch_norm: the model has no norm that freeze_batch_norm froze$"
    ):
        normzoo.unfreeze_batch_norm(nn.Linear(2, 2))


def test_two_threads_take_turns():
    initialized = dist.is_initialized
    model = nn.Sequential(nn.BatchNorm2d(4))
    other = threading.Thread(target=normzoo.freeze_batch_norm, args=(model,))
    with alone(), alone():
        other.start()
        other.join(0.5)
        assert other.is_alive()
    other.join()
    assert type(model[0]) is normzoo.FrozenBatchNorm and dist.is_initialized is initialized


def test_the_root_and_the_meta_device():
    norm = stirred(nn.BatchNorm1d(4))
    state = states(norm)
    frozen = normzoo.freeze_batch_norm(norm)
    assert type(frozen) is normzoo.FrozenBatchNorm and normzoo.unfreeze_batch_norm(frozen) is norm
    assert_same_state(norm, state)
    with torch.device("meta"):
        model = ConvNet()
    normzoo.freeze_batch_norm(model).to_empty(device="cpu")
    stirred(model)
    nn.init.normal_(model.first.weight)
    nn.init.normal_(model.last.weight)
    state = states(model)
    normzoo.unfreeze_batch_norm(model)
    assert_same_state(model, state)
    assert model.norm.weight.requires_grad and model(torch.randn(2, 3, 5, 5)).isfinite().all()
