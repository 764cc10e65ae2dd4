"""Normalize-and-Project where it could go wrong: shifted scales, conversions, few samples, states of others."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from test_nap import norm, step
from torch import nn
from torch.nn.utils import prune

import normzoo
from normzoo import normalize_and_project


class LayerNorm1p(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight + 1, self.bias)


def test_the_shift_is_that_of_the_scale_alone():
    """With 1 + w, nothing moves from where a norm starts; elsewhere (1 + w, offset) is scaled."""
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    for normalizing in (normzoo.RMSNorm(8, bias=True, offset=1.0), LayerNorm1p(8)):
        kind = type(normalizing).__name__
        model = nn.Sequential(nn.Linear(4, 8, bias=False), normalizing, nn.ReLU(), nn.Linear(8, 2))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = normalize_and_project(model, optimizer, example=x)
        assert handle.report["1.bias"].projected, kind
        step(model, optimizer, x)
        for old, p in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(p.data, old, rtol=1e-6, atol=1e-7, msg=kind)
        scale, offset = torch.randn(8), torch.randn(8)
        with torch.no_grad():
            normalizing.weight.copy_(scale - 1)
            normalizing.bias.copy_(offset)
            handle.project()
        factor = 8**0.5 / norm(scale, offset)
        torch.testing.assert_close(1 + normalizing.weight.data, factor * scale, msg=kind)
        torch.testing.assert_close(normalizing.bias.data, factor * offset, msg=kind)


def test_a_model_that_is_converted_afterwards():
    x = torch.randn(4, 6)
    for way in ("joint", "decay"):
        model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        handle = normalize_and_project(model, optimizer, scale_offset=way, example=x)
        start = norm(*model[0].parameters())
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
            model.to(dtype)
            for _ in range(2):
                step(model, optimizer, x.to(dtype))
            here = norm(*model[0].parameters())
            assert here == pytest.approx(start, rel=1e-6 if dtype == torch.float32 else 2e-3), (way, dtype)
        masters = handle._masters.kept
        assert norm(masters["0.weight"], masters["0.bias"]) == pytest.approx(start, rel=1e-6), way


class Choice(nn.Module):
    def forward(self, x):
        return nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def test_an_output_that_only_jumps_tells_nothing():
    """Behind a norm of two numbers, or an argmax, small changes do not show, so that no doubling need show."""

    def tail(*middle):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *middle)

    kinds = {
        "a batch norm of two samples": lambda: tail(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
        ),
        "a layer norm of two features": lambda: tail(nn.Linear(8, 2), nn.LayerNorm(2)),
        "argmax": lambda: tail(nn.Linear(8, 4), Choice()),
    }
    jumps = dict.fromkeys(kinds, 0)
    for kind, make in kinds.items():
        for seed in range(6):
            torch.manual_seed(seed)
            model, x = make(), torch.randn(2, 4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*none of", UserWarning)
                handle = normalize_and_project(model, optimizer, example=x, scale_offset="free")
            assert not handle.report["0.weight"].projected, (kind, seed)
            jumps[kind] += "these inputs do not tell" in handle.report["0.weight"].why
            handle.remove()
    assert jumps["a batch norm of two samples"]
    torch.manual_seed(0)
    model = kinds["a batch norm of two samples"]()
    example = torch.randn(3, 4)
    handle = normalize_and_project(model, torch.optim.SGD(model.parameters(), lr=0.1), example=example)
    assert handle.report.projected[0] == "2.weight"


def sgd(model, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1} | options)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_a_norm_that_is_moved_is_warned_of():
    model, x = mlp(), torch.randn(4, 6)
    with torch.no_grad():
        model[1].weight.mul_(5)
    match = r"1 norm \(1.weight\) with scales and offsets that are not at the norm sqrt\(d\): .*'free'"
    with pytest.warns(UserWarning, match=match) as seen:
        normalize_and_project(model, sgd(model), example=x)
    assert len(seen) == 1 and seen[0].filename == __file__
    normalize_and_project(model, sgd(model), example=x, scale_offset="free")  # without one


def test_the_first_call_in_training_mode():
    model = mlp()
    optimizer = sgd(model)
    handle = normalize_and_project(model, optimizer)
    model.eval()(torch.randn(1, 6))  # on which the batch norm cannot train
    assert handle.report.pending
    with pytest.raises(
        RuntimeError, match=r"has not run yet in training mode through its forward, .* pass example="
    ):
        optimizer.step()
    model.train()(torch.randn(4, 6))
    assert handle.report["0.weight"].projected


def test_states_that_do_not_fit():
    """Are refused with a sentence, and nothing is changed."""
    model, x = mlp(), torch.randn(4, 6)
    handle = normalize_and_project(model, sgd(model), example=x)
    state = handle.state_dict()
    wrong = {
        "with scale_offset='free', this has scale_offset='joint'": {"scale_offset": "free"},
        "with every=2, this has every=1": {"every": 2},
        "cannot be read .*steps": {"steps": "steps"},
        "cannot be read .*unpack": {"held": [["0.weight"]]},
        "cannot be read .*shape": {"rows": [{"name": "0.weight"}]},
        "cannot be read .*verdict": {"rows": [{"name": "0.weight", "shape": [8, 6]}]},
        "cannot be read .*attribute": {"initial": [1]},
        "cannot be read .*float": {"masters": {"0.weight": 1.0}},
    }
    for match, change in wrong.items():
        before = str(handle.report), handle.steps, handle._held
        with pytest.raises(ValueError, match=f"normalize_and_project: the state dict .*{match}"):
            handle.load_state_dict(state | {"steps": 7} | change)
        assert before == (str(handle.report), handle.steps, handle._held), match
    other = mlp()
    early = normalize_and_project(other, sgd(other))
    pending = early.state_dict()
    with pytest.raises(ValueError, match="from before the model ran"):
        handle.load_state_dict(pending)
    with pytest.raises(ValueError, match=r"no norm at the start of 0.weight"):
        early.load_state_dict(pending | {"initial": {"3.weight": 1.0}})
    early.load_state_dict(pending | {"initial": pending["initial"] | {"0.weight": 0.5}})
    other(x)
    early.project()
    assert norm(other[0].weight) == pytest.approx(0.5)
    early.load_state_dict(state | {"masters": {"0.weight": torch.zeros(8, 6)}})  # of a run in bfloat16
    early.project()
    assert norm(other[0].weight) == pytest.approx(state["initial"]["0.weight"])


def test_weights_that_hooks_compute():
    """Pruned ones, and the hooks that weight_norm and spectral_norm once were, before and after a run."""

    def hooked(kind):
        if kind == "prune":
            return prune.l1_unstructured(nn.Linear(6, 8), "weight", 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(nn.utils, kind)(nn.Linear(6, 8))

    alone, together = "scale invariant", "scale invariant with its bias"
    expected = {
        "prune": {"weight_orig": together},
        "weight_norm": {"weight_g": together, "weight_v": alone},
        "spectral_norm": {"weight_orig": alone},
    }
    x = torch.randn(4, 6)
    for kind, verdicts in expected.items():
        model = nn.Sequential(hooked(kind), nn.LayerNorm(8), nn.Linear(8, 2))
        for _ in range(2):
            handle = normalize_and_project(model, sgd(model), example=x)
            found = {name: handle.report[f"0.{name}"].verdict for name in verdicts}
            assert found == verdicts, kind
            assert not handle.report.notes, kind
            handle.remove()
            model(x)


def test_a_tied_weight_goes_by_all_of_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 8), "head": nn.Linear(8, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    model = nn.Sequential(model["embed"], nn.LayerNorm(8), model["head"])
    tokens = torch.randint(0, 6, (2, 4))
    handle = normalize_and_project(model, sgd(model), include="2.weight", example=tokens)
    assert handle.report["0.weight"].projected
    handle.remove()
    with pytest.warns(UserWarning, match="none of 1 weight is projected"):
        handle = normalize_and_project(model, sgd(model), include="0", exclude="2", example=tokens)
    assert handle.report["0.weight"].why.endswith("excluded")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x)


def test_warnings_of_examples_that_do_not_tell():
    """One for all that is to be said, also where other weights are projected."""
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(6, 2), nn.LayerNorm(2))
    half, plain = Unused(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    half.used = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), narrow)
    cases = (
        (
            Unused(),
            {},
            r": these inputs .* of 1 of 3 weights .* \(1 without influence .*; pass a larger or more",
        ),
        (Unused(), {"exclude": "unused"}, None),
        (narrow, {}, r"none of 1 weight is .* all move the output in jumps only .*; pass a larger or more"),
        (
            half,
            {"exclude": "used.0"},
            r"none of 3 weights .* 2 of 3 weights .* \(1 without .*, 1 in jumps only\)",
        ),
        (plain, {}, r"is scale invariant; insert=True puts .*, include= names weights"),
        (plain, {"insert": True, "exclude": "0"}, r"is scale invariant; include= names weights"),
    )
    for model, options, match in cases:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            handle = normalize_and_project(
                model, sgd(model), example=torch.randn(16, 6), scale_offset="free", **options
            )
        handle.remove()
        assert len(seen) == (match is not None), match
        for each in seen:
            assert each.filename == __file__ and re.search(match, str(each.message)), each.message
        assert repr(handle) == f"NormalizeAndProject({handle.report.summary()})"
        with pytest.raises(RuntimeError, match="this handle was removed, and projects no more"):
            handle.project()


class Snake(nn.Module):
    def forward(self, x):
        return x + torch.sin(x) ** 2


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x + 1


def test_norms_go_in_front_of_own_activations_and_beside_vectors():
    layers = [nn.Linear(6, 8, bias=False), Snake(), nn.Linear(8, 8), Swish(), Halved(), nn.Linear(8, 2)]
    model, x = nn.Sequential(*layers), torch.randn(4, 6)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5}, {"params": matrices}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.0)
    handle = normalize_and_project(model, optimizer, insert=True, example=x)
    assert [type(model[i]).__name__ for i in (1, 3, 4)] == ["Sequential", "Sequential", "Halved"]
    assert handle.report["0.weight"].projected and handle.report["2.weight"].projected
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3, 2 + 4]
