"""Norms that are put in front of activations, and the callbacks for trainers."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_nap import norm, step
from torch import nn

import normzoo
from normzoo import GroupNorm, LayerNorm, nap, normalize_and_project


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def names_of_norms(model) -> dict[str, str]:
    return {
        name: repr(module)
        for name, module in model.named_modules()
        if isinstance(module, (LayerNorm, GroupNorm))
    }


class Net(nn.Module):
    """Convolutions, a norm that is there, a residual sum, and a linear layer behind."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.drop = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.1)
        self.conv_2, self.norm, self.act_2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()
        self.act_3, self.linear, self.act_4 = nn.SiLU(inplace=True), nn.Linear(4, 6), nn.Tanh()
        self.head, self.out = nn.Linear(6, 3), nn.Softmax(-1)

    def forward(self, x):
        x = self.act(self.drop(self.conv(x)))
        x = self.act_3(x + self.act_2(self.norm(self.conv_2(x))))
        return self.out(self.head(self.act_4(self.linear(x.mean((2, 3))))))


def test_insertion():
    model, image = Net(), torch.randn(3, 2, 6, 6)
    keys, drawn = set(model.state_dict()), torch.get_rng_state()
    groups = [{"params": model.conv.parameters()}, {"params": model.linear.parameters(), "lr": 0.5}]
    groups.append({"params": [*model.conv_2.parameters(), *model.norm.parameters(), *model.head.parameters()]})
    optimizer = torch.optim.Adam(groups, lr=0.1)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    handle = normalize_and_project(model, optimizer, insert=True, example=image)
    assert names_of_norms(model) == {
        "act.0": repr(GroupNorm(1, 4)),
        "act_3.0": repr(GroupNorm(1, 4)),
        "act_4.0": repr(LayerNorm(6)),
    }
    assert handle.report.notes == [
        "a GroupNorm was inserted in front of act",
        "a GroupNorm was inserted in front of act_3",
        "a LayerNorm was inserted in front of act_4",
    ]
    assert keys < set(model.state_dict()) and torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    # New parameters join the group of the weight in front; no group is added.
    assert [len(group["params"]) for group in optimizer.param_groups] == [4 + 2, 4, 6]
    assert any(p is model.act_4[0].weight for p in optimizer.param_groups[1]["params"])
    assert isinstance(model.act[1], nn.ReLU) and model.act.training
    assert [r.name for r in handle.report.rows if r.projected and len(r.shape) > 1] == [
        "conv.weight", "conv_2.weight", "linear.weight",
    ]  # fmt: skip
    start, before = norm(*model.linear.parameters()), norm(model.act_4[0].weight)
    step(model, optimizer, image)
    assert norm(*model.linear.parameters()) == pytest.approx(start, rel=1e-6)
    assert norm(*model.act_4[0].parameters()) == pytest.approx(before, rel=1e-6)
    handle.remove()
    # A second time there is nothing to insert.
    handle = normalize_and_project(model, optimizer, insert=True, example=image, scale_offset="free")
    assert handle.report.notes == ["every activation had a norm in front"]


def test_what_counts_as_a_norm_in_front():
    """Dropout may be between; another activation may not, in place or not."""
    for act in (nn.ReLU(inplace=True), nn.ReLU()):
        norm_and_act = [nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5), act]
        model = nn.Sequential(*norm_and_act, nn.Tanh(), nn.Linear(6, 2))
        normalize_and_project(model, sgd(model), insert=True, example=torch.randn(4, 6))
        assert names_of_norms(model).keys() == {"4.0"}, act


def test_insertion_without_affine_and_into_an_encoder_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.ReLU(), batch_first=True)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = normalize_and_project(
        model, optimizer, insert=True, example=torch.randn(2, 3, 8), scale_offset="off"
    )
    assert names_of_norms(model) == {"activation.0": repr(LayerNorm(16, elementwise_affine=False))}
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.param_groups[0]["param_names"]) == 12
    assert handle.report["linear1.weight"].projected and not handle.report["linear2.weight"].projected
    x = torch.randn(2, 3, 8)
    model.eval()
    with torch.no_grad():  # torch's fast path would leave the norm out
        torch.testing.assert_close(model(x), model.train()(x))


class Scaled(nn.Module):
    """An actor whose actions are in a range of their own."""

    def __init__(self, actions, scale, act):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head, self.act, self.tail = (
            nn.Linear(8, actions),
            act,
            nn.Sequential(nn.Dropout(0.1), nn.Flatten()),
        )
        self.register_buffer("scale", torch.full((actions,), scale))

    def forward(self, x):
        y = self.tail(self.act(self.head(self.net(x))))
        return {"action": (2.0 * y * self.scale + 1).unsqueeze(0), "head": y.sum()}


def test_the_activation_that_makes_the_output_gets_no_norm():
    x = torch.randn(16, 6)
    for actions in (1, 2, 6):
        plain = nn.Sequential(*[nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()])
        plain.extend([nn.Linear(8, actions), nn.Tanh()])
        for model, act, head, norms in (
            (plain, "5", "4", {"1.0", "3.0"}),
            (Scaled(actions, 0.5, nn.Tanh()), "act", "head", {"net.1.0", "net.3.0"}),
        ):
            handle = normalize_and_project(model, sgd(model), insert=True, example=x)
            assert names_of_norms(model).keys() == norms, (actions, act)
            assert f"{act} (Tanh) makes the output and got no norm" in handle.report.notes, (actions, act)
            weights = [name for name in handle.report.projected if len(handle.report[name].shape) > 1]
            assert len(weights) == 2 and f"{head}.weight" not in weights, (actions, act)
    # What is changed behind, in place or not, is no activation's output; PReLU is one without a refusal.
    for model in (Net(), Changed()):
        normalize_and_project(model, sgd(model), insert=True, example=torch.randn(3, 2, 6, 6))
        assert "act.0" in names_of_norms(model), model
    model = Scaled(3, 0.5, nn.PReLU())
    normalize_and_project(model, sgd(model), insert=True, example=x)
    assert isinstance(model.act, nn.PReLU)


class Changed(Net):
    def forward(self, x):
        y = self.act(self.conv(x))
        y += self.norm(self.conv_2(y))
        y *= self.head(self.linear(y.mean((2, 3)))).sum()
        return y


def test_no_norm_of_one_or_two_numbers():
    for width, names in ((1, set()), (2, set()), (3, {"1.0"})):
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*none of 2 weights", UserWarning)
            handle = normalize_and_project(model, sgd(model), insert=True, example=torch.randn(8, 6))
        assert names_of_norms(model).keys() == names, width
        few = "1 number" if width == 1 else "2 numbers"
        assert (f"1 (Tanh) got no norm, which would be one of {few}" in handle.report.notes) == (width < 3)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))))


class AsFunctions(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return torch.sigmoid(F.gelu(self.layers(x)))


class Held(Twice):
    def __init__(self):
        super().__init__()
        self.list = [self.act]

    def forward(self, x):
        return self.list[0](self.first(x))


def test_insertion_is_refused():
    x = torch.randn(4, 6)
    linear = nn.Linear(6, 6)
    cases = {
        r"act \(ReLU\) runs 2 times, .*give each its own ReLU": Twice(),
        r"act \(ReLU\) is held by list too": Held(),
        r"1 \(PReLU\) has tensors of its own, whose keys": nn.Sequential(linear, nn.PReLU(), nn.Linear(6, 6)),
        r"no activation module in the model; .* gelu in AsFunctions, sigmoid in AsFunctions": AsFunctions(
            linear
        ),
        "the model itself is a ReLU": nn.ReLU(),
        r"does not run on the example \(RuntimeError": nn.Sequential(nn.Linear(5, 2), nn.ReLU()),
    }
    for match, model in cases.items():
        optimizer = torch.optim.SGD([*model.parameters()] or [*linear.parameters()], lr=0.1)
        if not [*model.parameters()]:
            model.register_parameter("p", linear.weight)
        before, groups = repr(model), [len(group["params"]) for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=match):
            normalize_and_project(model, optimizer, insert=True, example=x)
        assert repr(model) == before and [len(g["params"]) for g in optimizer.param_groups] == groups, match
    # What is wrong behind the insertion takes it back.
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer, before = sgd(model), repr(model)
    with pytest.raises(ValueError, match="matches no weight"):
        normalize_and_project(model, optimizer, insert=True, example=x, include="head")
    assert repr(model) == before and len(optimizer.param_groups[0]["params"]) == 4
    model = AsFunctions(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match="reaches activation modules alone; .* gelu in AsFunctions") as seen:
        normalize_and_project(model, sgd(model), insert=True, example=x)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert names_of_norms(model).keys() == {"layers.1.0"}
    compiled = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), backend="eager")
    with pytest.raises(ValueError, match=r"wrapped \(OptimizedModule\) .* insert norms into the module first"):
        normalize_and_project(compiled, sgd(compiled), insert=True, example=x)


def hidden() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def train(model, optimizer, steps) -> None:
    for i in range(steps):
        torch.manual_seed(i)
        step(model, optimizer, torch.randn(4, 6))


def test_a_compiled_model_is_looked_into():
    torch.manual_seed(0)
    inner = nn.Sequential(torch.compile(nn.Linear(6, 8), backend="eager"), nn.LayerNorm(8), nn.Linear(8, 2))
    for model, example in ((torch.compile(hidden(), backend="eager"), None), (inner, torch.randn(4, 6))):
        optimizer = sgd(model)
        handle = normalize_and_project(model, optimizer, example=example)
        train(model, optimizer, 2)
        assert (
            handle.report.rows[0].name in ("0.weight", "0._orig_mod.weight") and handle.report.rows[0].projected
        )
    inner.compile(backend="eager")
    with pytest.raises(ValueError, match=r"the model is compiled \(by its compile\(\)\)"):
        normalize_and_project(inner, sgd(inner))


def test_hugging_face_callback(tmp_path):
    from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState

    def trainer(callback, state):
        model = hidden()
        optimizer = sgd(model)
        args = types.SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, process_index=0)
        handler = CallbackHandler([callback], model, None, optimizer, None)
        return model, optimizer, lambda event: getattr(handler, event)(args, state, TrainerControl())

    first = nap.hugging_face_callback(every=2, scale_offset="free")
    assert isinstance(first, TrainerCallback)
    state = TrainerState()
    model, optimizer, tell = trainer(first, state)
    tell("on_train_begin")
    start = norm(*model[0].parameters())
    train(model, optimizer, 3)
    state.global_step = 3
    tell("on_save")
    saved = model.state_dict()
    tell("on_train_end")
    assert not optimizer._optimizer_step_post_hooks

    second = nap.hugging_face_callback(every=2, scale_offset="free")
    model, optimizer, tell = trainer(second, state)
    model.load_state_dict(saved)
    tell("on_train_begin")
    assert second.handle.steps == 3 and not second.handle.report.pending
    train(model, optimizer, 1)
    assert norm(*model[0].parameters()) == pytest.approx(start, rel=1e-6)
    state.global_step = 9
    with pytest.raises(ValueError, match=r"goes on from step 9, but there is no normalize_and_project.pt in"):
        trainer(nap.hugging_face_callback(), state)[2]("on_train_begin")
    for make in (nap.hugging_face_callback, nap.lightning_callback):
        with pytest.raises(ValueError, match=f"nap.{make.__name__}: insert=True"):
            make(insert=True)


def test_lightning_callback(monkeypatch):
    with pytest.raises(ImportError, match="neither lightning nor pytorch_lightning is installed"):
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
        monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
        nap.lightning_callback()
    stand_in = types.ModuleType("pytorch_lightning")
    stand_in.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", stand_in)
    callback = nap.lightning_callback(every=2)
    assert isinstance(callback, stand_in.Callback) and callback.state_dict() == {}
    model = hidden()
    model.example_input_array = torch.randn(2, 6)
    trainer = types.SimpleNamespace(optimizers=[sgd(model)])
    callback.on_train_start(trainer, model)
    assert not callback.handle.report.pending
    start = norm(*model[0].parameters())
    train(model, trainer.optimizers[0], 3)
    again, other = nap.lightning_callback(every=2), hidden()
    again.load_state_dict(callback.state_dict())
    assert again.state_dict()["steps"] == 3
    other.load_state_dict(model.state_dict())
    trainer = types.SimpleNamespace(optimizers=[sgd(other)])
    again.on_train_start(trainer, other)
    train(other, trainer.optimizers[0], 1)
    assert again.handle.steps == 4 and norm(*other[0].parameters()) == pytest.approx(start, rel=1e-6)
    again.on_train_end(trainer, other)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="the trainer has 2 optimizers"):
        callback.on_train_start(types.SimpleNamespace(optimizers=[sgd(other)] * 2), other)


def test_side_inputs_and_kept_modes():
    """A block of side inputs is entered for the check too; what is in eval mode stays there."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 4, 1), normzoo.RegionNormB(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)))

    model, x = Masked(), torch.randn(3, 2, 4, 4)
    mask = (torch.rand(3, 1, 4, 4) > 0.5).float()
    with normzoo.inputs(model, mask=mask):
        handle = normalize_and_project(model, sgd(model), example=x)
    assert handle.report["conv.weight"].projected
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()  # it divides by what is stored
    report = normalize_and_project(model, sgd(model), example=torch.randn(4, 6)).report
    assert [report[name].projected for name in ("0.weight", "3.weight")] == [False, True]
    assert not model[1].training
