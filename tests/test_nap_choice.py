"""Which weights Normalize-and-Project takes, what its report says, and what it refuses."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_nap import network, norm, step
from torch import Tensor, nn

import normzoo
from normzoo import normalize_and_project
from normzoo.nap import NormalizeAndProject


def sgd(model, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def verdicts(model, example, **options) -> dict[str, str]:
    """Of the weights; the model stays as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(none of|do not tell)", UserWarning)
        handle = normalize_and_project(model, sgd(model), example=example, **options)
    handle.remove()
    return {row.name: row.verdict for row in handle.report.rows if len(row.shape) > 1}


ALONE, JOINT, MOVES, DEAD = (
    "scale invariant",
    "scale invariant with its bias",
    "moves the output",
    "no influence",
)


class ByHand(nn.Module):
    """An RMS norm that no library knows."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """q and k with a norm of their own or not, v, and a writer to a residual stream."""

    def __init__(self, qk_norm):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm, self.final = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.qk_norm = ByHand() if qk_norm else nn.Identity()
        self.unused = nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x)
        q, k = self.qk_norm(self.q(h)), self.qk_norm(self.k(h))
        x = x + self.out(F.scaled_dot_product_attention(q, k, self.v(h)))
        return self.final(x)


class Gated(nn.Module):
    """A branch that is closed at the start."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.writer = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gate * self.writer(self.norm(self.inner(x)))


def test_verdicts():
    tokens, x, image = torch.randint(0, 11, (2, 5)), torch.randn(4, 6), torch.randn(3, 2, 6, 6)

    def mlp(*middle, width=8):
        return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(width, 2))

    unit = nn.LayerNorm(8)
    attention = dict.fromkeys(("embed.weight", "v.weight", "out.weight"), MOVES) | {"unused.weight": DEAD}
    cases = {
        "layer norm": (mlp(nn.LayerNorm(8), nn.ReLU()), x, {"0.weight": JOINT, "3.weight": MOVES}),
        "batch norm takes the bias": (mlp(nn.BatchNorm1d(8)), x, {"0.weight": ALONE}),
        "a ReLU between": (mlp(nn.ReLU(), nn.LayerNorm(8)), x, {"0.weight": JOINT}),
        # Where large inputs look like a ReLU, saturate, or are clamped.
        "a GELU between": (mlp(nn.GELU(), unit), x, {"0.weight": MOVES}),
        "a tanh between": (mlp(nn.Tanh(), unit), x, {"0.weight": MOVES}),
        "a ReLU6 between": (mlp(nn.ReLU6(), unit), 0.1 * x, {"0.weight": MOVES}),
        "a GLU between": (mlp(nn.GLU(), nn.LayerNorm(4), width=4), x, {"0.weight": MOVES}),
        "a norm by hand": (mlp(ByHand()), x, {"0.weight": JOINT}),
        "no norm": (mlp(nn.ReLU()), x, {"0.weight": MOVES}),
        "dropout": (mlp(nn.Dropout(0.5), nn.LayerNorm(8)), x, {"0.weight": JOINT}),
        "convolutions": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3)).append(
                nn.GroupNorm(2, 4)
            ),
            image,
            {"0.weight": ALONE, "3.weight": JOINT},
        ),
        "weight standardization": (normzoo.WSConv2d(2, 4, 3), image, {"weight": ALONE}),
        "weight norm": (
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
            x,
            {"parametrizations.weight.original0": MOVES, "parametrizations.weight.original1": ALONE},
        ),
        "spectral norm, with buffers that move": (
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4, bias=False)),
            x,
            {"parametrizations.weight.original": ALONE},
        ),
        "a closed gate": (Gated(), x, {"inner.weight": JOINT, "writer.weight": MOVES}),
        "attention": (Attention(False), tokens, attention | {"q.weight": MOVES, "k.weight": MOVES}),
        "attention, q and k normed": (
            Attention(True),
            tokens,
            attention | {"q.weight": ALONE, "k.weight": ALONE},
        ),
    }
    for name, (model, example, expected) in cases.items():
        found = verdicts(model, example)
        assert {key: found[key] for key in expected} == expected, name


class AsFunction(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-3)


def test_large_eps_and_small_weights():
    for normalizing in (nn.LayerNorm(8, eps=1e-3), AsFunction()):
        model = nn.Sequential(nn.Linear(6, 8, bias=False), normalizing, nn.Linear(8, 2))
        with torch.no_grad():
            model[0].weight.mul_(1e-3)  # so that eps is most of the variance
        assert verdicts(model, torch.randn(4, 6))["0.weight"] == ALONE


def test_tied_weights_are_projected_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    optimizer = sgd(model)
    handle = normalize_and_project(model, optimizer, example=torch.randn(4, 8))
    assert [name for name in handle.report.projected if name[0] in "02"] == ["0.weight", "0.bias"]
    start = norm(model[0].weight, model[0].bias)
    step(model, optimizer, torch.randn(4, 8))
    assert norm(model[2].weight, model[2].bias) == pytest.approx(start, rel=1e-6)
    # Tied to the output layer it is not invariant.
    model[4] = nn.Linear(8, 8)
    model[4].weight = model[0].weight
    assert verdicts(model, torch.randn(4, 8))["0.weight"] == MOVES


@dataclass
class Output:
    loss: Tensor | None
    hidden: tuple[Tensor, ...]


class Structured(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, *, x, times=1):
        y = self.layers(x * times)
        return OrderedDict(out=Output(None, (y,)), ids=y.argmax(-1))


def test_inputs_and_outputs_of_any_structure():
    x = torch.randn(4, 6)
    expected = {"layers.0.weight": JOINT, "layers.3.weight": JOINT, "layers.6.weight": MOVES}
    assert verdicts(Structured(network()), {"x": x, "times": 2}) == expected
    assert verdicts(network(), (x,)) == verdicts(network(), x)


def test_the_first_call_will_do():
    """It leaves no trace: not in buffers, not in random numbers, not in gradients."""
    plain = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model, x = copy.deepcopy(plain), torch.randn(4, 6)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = sgd(model)
    handle = normalize_and_project(model, optimizer)
    start = norm(model[1].weight)
    assert handle.report.pending and "waits for the first forward pass" in str(handle.report)
    with pytest.raises(RuntimeError, match=r"before the first step of the optimizer .* pass example="):
        optimizer.step()
    with pytest.raises(RuntimeError, match="the model has not run yet"):
        handle.project()
    twin = copy.deepcopy(model)  # as one for an average of weights
    twin(x)
    assert handle.report.pending and len(calls) == 1
    with torch.no_grad():
        for each in (plain, model):
            each[1].weight.mul_(3)  # the norm to hold is that at the call
    seeds = [torch.Generator().manual_seed(5).get_state()] * 2
    outputs = []
    for each, state in zip((plain, model), seeds, strict=True):
        torch.set_rng_state(state)
        outputs.append(each(x))
    assert torch.equal(*outputs) and len(calls) == 2
    for name, b in plain.named_buffers():
        assert torch.equal(b, model.get_buffer(name)), name
    assert all(p.grad is None for p in model.parameters()) and not model._forward_pre_hooks
    assert handle.report["1.weight"].projected and handle.report.notes == [
        "the check left out 1 hook of the model"
    ]
    with torch.no_grad():
        model[1].weight.mul_(2)
    optimizer.step()
    assert norm(model[1].weight) == pytest.approx(start, rel=1e-6)

    other = copy.deepcopy(plain)
    settled = normalize_and_project(other, sgd(other))
    settled.load_state_dict(handle.state_dict())
    settled.project()  # the loaded state says what to
    assert not settled.report.pending and norm(other[1].weight) == pytest.approx(start, rel=1e-6)


def test_include_and_exclude():
    model, x = network(), torch.randn(4, 6)
    handle = normalize_and_project(model, sgd(model), include="6", exclude=["re:3.*"], example=x)
    assert [r.name for r in handle.report.rows if r.projected and len(r.shape) > 1] == ["0.weight", "6.weight"]
    row = handle.report["6.weight"]
    assert row.verdict == MOVES and row.why.startswith("moves the output by 0.") and "included" in row.why
    assert handle.report["3.weight"].why == "scale invariant with its bias; excluded"
    for argument in ("include", "exclude"):
        match = rf"'head' in {argument} matches no weight .* there are 0.weight, 3.weight, 6.weight"
        with pytest.raises(ValueError, match=match):
            normalize_and_project(model, sgd(model), **{argument: "head"})


def test_parameters_that_the_optimizer_does_not_train():
    model = network()
    with torch.no_grad():
        model[0].bias.normal_()
    held = [p for name, p in model.named_parameters() if name != "0.bias" and not name.startswith("3.")]
    handle = normalize_and_project(model, torch.optim.SGD(held, lr=0.1), include="0", example=torch.randn(4, 6))
    assert "invariant only with 0.bias, which the optimizer does not train" in handle.report["0.weight"].why
    assert "3.weight" not in [row.name for row in handle.report.rows]


def test_report():
    model = network()
    handle = normalize_and_project(model, sgd(model), example=torch.randn(4, 6))
    lines = str(handle.report).splitlines()
    assert lines[0].split("  ")[0] == "parameter" and lines[-1] == "2 of 3 weights projected"
    assert any(line.startswith("6.weight") and "moves the output" in line for line in lines)
    assert any(
        line.startswith("*.weight x2") and "scale and offset at joint norm sqrt(d)" in line for line in lines
    )
    rows = json.loads(handle.report.to_json())["rows"]
    assert [row["name"] for row in rows][:3] == ["0.weight", "0.bias", "3.weight"]
    assert rows[0]["why"] == "scale invariant with its bias" and rows[0]["projected"] is True
    assert isinstance(handle, NormalizeAndProject)
    with pytest.raises(KeyError):
        handle.report["no.weight"]


def test_warnings():
    x = torch.randn(4, 6)
    model = network()
    groups = [{"params": [*model[0].parameters()], "weight_decay": 0.1}, {"params": model[1:].parameters()}]
    with pytest.warns(
        UserWarning, match=r"2 projected parameters \(0.weight, 0.bias\) with weight decay"
    ) as seen:
        normalize_and_project(model, torch.optim.AdamW(groups, weight_decay=0.0), example=x)
    assert len(seen) == 1 and seen[0].filename == __file__
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="none of 2 weights is projected"):
        normalize_and_project(model, sgd(model), example=x)


def test_refusals():
    x = torch.randn(4, 6)
    model = network()

    def noisy():
        made = network()
        made.register_module("noise", Noise())
        return made

    wrong = {
        "every is 0": {"every": 0},
        "scale_offset is 'fixed'; it must be one of joint, free, decay, off": {"scale_offset": "fixed"},
        "insert=True has to run the model": {"insert": True},
        "insert is 1; it must be True or False": {"insert": 1},
        "decay is -1": {"decay": -1},
        "decay=0.1 is for scale_offset='decay'; with 'joint' leave it out": {"decay": 0.1},
        "include holds 3": {"include": [3]},
        r"'re:\(' in exclude is no regular expression": {"exclude": "re:("},
        "ModuleList has no forward, so that it cannot be run": {
            "model": nn.ModuleList([network()]),
            "example": x,
        },
        "a copy of the model does not run": {"example": torch.randn(4, 5)},
        "returns something else each time": {"example": x, "model": noisy()},
        "returns no finite": {"example": x * float("nan")},
        "model is a function": {"model": network},
        "optimizer is a Sequential": {"optimizer": model},
        "the optimizer has none of the model's parameters": {"optimizer": sgd(network())},
    }
    for match, options in wrong.items():
        options = {"model": model} | options
        if "optimizer" not in options:
            options["optimizer"] = sgd(options["model"] if isinstance(options["model"], nn.Module) else model)
        with pytest.raises((TypeError, ValueError), match=f"normalize_and_project: .*{match}"):
            normalize_and_project(**options)
        if isinstance(options["optimizer"], torch.optim.Optimizer):
            assert not options["optimizer"]._optimizer_step_post_hooks and not model._forward_pre_hooks, match
    optimizer = sgd(model)
    handle = normalize_and_project(model, optimizer, example=x)
    with pytest.raises(ValueError, match="projected already"):
        normalize_and_project(model, optimizer, example=x)
    state = handle.state_dict()
    with pytest.raises(ValueError, match="the state dict has no steps, rows"):
        handle.load_state_dict({key: value for key, value in state.items() if key not in ("steps", "rows")})
    small = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"about 0.weight \(16, 6\); the optimizer has one of shape \(4, 6\)"):
        normalize_and_project(small, sgd(small), example=x).load_state_dict(state)
    handle.remove()
    normalize_and_project(model, optimizer, example=x)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="of a lazy module that has not run"):
        normalize_and_project(lazy, sgd(lazy))
    flat = network()
    flat[0].__class__ = type("FullyShardedDataParallel", (nn.Linear,), {})
    with pytest.raises(ValueError, match="FSDP1"):
        normalize_and_project(flat, sgd(flat), example=x)


class Noise(nn.Module):
    """Counts its calls where no copy of the state can see it."""

    calls = 0

    def forward(self, x):
        Noise.calls += 1
        return x + Noise.calls


def test_closures():
    """One may run the model for the first time, as that of Lightning does."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    handle = normalize_and_project(model, optimizer)
    start, x = norm(model[3].weight, model[3].bias), torch.randn(4, 6)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for args, kwargs in (((closure,), {}), ((), {"closure": closure})):
        optimizer.step(*args, **kwargs)
        assert norm(model[3].weight, model[3].bias) == pytest.approx(start, rel=1e-6)
    assert handle.steps == 2
    other = sgd(model)
    normalize_and_project(model, other)
    with pytest.raises(RuntimeError, match="after the first step of the optimizer the model has not run yet"):
        other.step(lambda: torch.zeros(()))
