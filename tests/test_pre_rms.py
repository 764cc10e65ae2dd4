"""to_pre_rms_norm: the change and its undoing, the probes, and the errors."""

import copy
import json
import logging
import pickle
import re

import pytest
import torch
from stream_models import GPT, IDS, WIDTH, Block, error, gate, run, stirred
from torch import nn

import normzoo
from normzoo.centering import centered
from normzoo.residual import StreamProof, editing, plan_rewrite
from normzoo.residual.stream import Writer

HOWS = ("bake", "parametrize")


@pytest.mark.parametrize("how", HOWS)
def test_what_stays_as_it_was(how):
    model = stirred(GPT())
    calls = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[0].norm1.requires_grad_(False)
    model.places.weight.requires_grad_(False)
    objects = {name: p for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters())
    keys, buffers = list(model.state_dict()), [id(p) for p in model.parameters()]
    train = {name: module.training for name, module in model.named_modules()}
    assert normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers=how) is model
    modules = dict(model.named_modules())
    assert all(modules[name].training is mode for name, mode in train.items())
    assert calls and {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    held = {id(p): name for name, p in model.named_parameters()}
    assert all(id(p) in held for p in objects.values())
    assert not model.places.weight.requires_grad and not model.blocks[0].norm1.weight.requires_grad
    assert model.tokens.weight.requires_grad and model.blocks[1].norm1.weight.requires_grad
    if how == "bake":
        assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == buffers
    else:
        assert "blocks.0.mlp.2.parametrizations.weight.original" in model.state_dict()
        assert all(torch.equal(objects[n], p) for n, p in stirred_again().items())


def stirred_again():
    torch.manual_seed(0)
    return dict(stirred(GPT()).named_parameters())


def test_a_copy_is_rewritten_and_the_model_is_not():
    model = stirred(GPT())
    before, said = run(model, IDS), repr(model)
    made = normzoo.to_pre_rms_norm(model, IDS, inplace=False)
    assert made is not model and repr(model) == said and torch.equal(run(model, IDS), before)
    assert isinstance(made.norm, normzoo.RMSNorm) and error(run(made, IDS), before) < 1e-6


class Root(GPT):
    """Has a writer of its own, before a parameter that is none."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.heat = gate(WIDTH), gate(1)

    def forward(self, ids):
        return self.heat * super().forward(ids)

    def embed(self, ids):
        return super().embed(ids) + self.first


@pytest.mark.parametrize("how", HOWS)
def test_revert_is_exact(how):
    model = stirred(Root(dropout=0.1 if how == "parametrize" else 0.0, tied=True))
    said, kept = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
    objects = [(name, id(p)) for name, p in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    rewrite = plan_rewrite(model, IDS, zero_mean_writers=how)
    assert repr(model) == said
    rewrite.verify()
    assert repr(model) == said and rewrite.apply() is model and repr(model) != said
    with pytest.raises(ValueError, match=r"Rewrite\.apply: it was applied already; revert\(\) it"):
        rewrite.apply()
    with pytest.raises(ValueError, match=r"Rewrite\.verify: it was applied already"):
        rewrite.verify()
    assert rewrite.revert() is model and repr(model) == said
    assert [(name, id(p)) for name, p in model.named_parameters()] == objects
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"Rewrite\.revert: it is not applied"):
        rewrite.revert()


def undefined():
    raise RuntimeError("stop")


def test_all_of_it_or_nothing(monkeypatch):
    model = stirred(GPT(tied=True))
    before, said = run(model, IDS), repr(model)
    rewrite = plan_rewrite(model, IDS, zero_mean_writers="parametrize")
    monkeypatch.setattr(editing, "_zero_output", lambda *_: undefined())
    with pytest.raises(RuntimeError, match="stop"):
        rewrite.apply()
    assert repr(model) == said and torch.equal(run(model, IDS), before)
    monkeypatch.undo()
    assert error(run(rewrite.apply(), IDS), before) < 1e-6


@pytest.mark.parametrize("how", HOWS)
def test_copies_and_files_of_the_result(how):
    model = stirred(GPT(tied=True))
    normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers=how)
    before = run(model, IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, IDS), before) and twin.tokens.weight is twin.head.weight
    if how == "bake":  # torch does not pickle parametrized modules
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), IDS), before)
    other = normzoo.to_pre_rms_norm(stirred(GPT(tied=True)), IDS, zero_mean_writers=how)
    assert not torch.equal(run(other, IDS), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, IDS), before)


def test_a_parametrized_layer_of_the_user_keeps_its_class():
    """Copies of a parametrized module share its class, which the rewrite of a copy must not change."""
    model = stirred(GPT())
    nn.utils.parametrizations.weight_norm(model.blocks[0].attention.out)
    before = run(model, IDS)
    rewrite = plan_rewrite(model, IDS, zero_mean_writers="parametrize")
    assert rewrite.verify().passed and torch.equal(run(model, IDS), before)
    rewrite.apply()
    assert error(run(model, IDS), before) < 1e-6
    rewrite.revert()
    assert torch.equal(run(model, IDS), before)


def test_compiled_whole():
    model = stirred(GPT(layers=1, tied=True))
    normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")
    fast = torch.compile(model, fullgraph=True, backend="eager")
    assert error(fast(IDS), model(IDS)) < 1e-6


def test_low_precision_and_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        model = stirred(GPT(tied=True))
        exact = run(copy.deepcopy(model).to(dtype).double(), IDS)
        for how in HOWS:
            narrow = copy.deepcopy(model).to(dtype)
            own, places = error(run(narrow, IDS), exact), narrow.places.weight.double()
            normzoo.to_pre_rms_norm(narrow, IDS, zero_mean_writers=how)
            once = (places - places.mean(1, keepdim=True)).to(dtype)
            assert how == "parametrize" or torch.equal(narrow.places.weight, once), "rounded once"
            assert all(p.dtype == dtype for p in narrow.parameters())
            assert error(run(narrow, IDS), exact) <= 10 * own, (dtype, how)
    model = stirred(GPT())
    exact = run(copy.deepcopy(model).double(), IDS)
    with torch.autocast("cpu", torch.bfloat16):
        own = error(run(model, IDS), exact)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        normzoo.to_pre_rms_norm(model, IDS)
        assert error(run(model, IDS), exact) <= 2 * own


def test_the_account(caplog):
    with caplog.at_level(logging.INFO, "normzoo"):
        normzoo.to_pre_rms_norm(stirred(GPT(tied=True)), IDS)
    assert (
        "5 LayerNorms: 5 rewritten, 0 kept" in caplog.text
        and "the model computes the same function" in caplog.text
    )
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    normzoo.to_pre_rms_norm(stirred(GPT()).train(), IDS)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "training mode" in warning and 'zero_mean_writers="parametrize"' in warning
    rewrite = plan_rewrite(stirred(GPT(tied=True)), IDS)
    said = json.loads(rewrite.to_json())
    assert said["norms"] == rewrite.norms and said["centered_outputs"] == {"tokens": -1}
    assert {"name": "places.weight", "axis": 1, "scale": []} in said["writers"] and said["left"] == {}
    table = str(rewrite)
    assert "blocks.*.norm* x4" in table and "rms_norm: exact" in table and "its mean is taken away" in table
    proof = rewrite.verify().to_dict()
    assert proof["passed"] and 0 < proof["output"] < 1e-12 and 0 < proof["rounding_before"] < 1e-5


def test_only_those_that_are_meant():
    model = stirred(GPT()).double()
    before = run(model, IDS)
    rewrite = plan_rewrite(model, IDS, include="blocks.*", exclude="*.norm2")
    assert rewrite.norms == ["blocks.0.norm1", "blocks.1.norm1"]
    rewrite.apply()
    assert type(model.norm) is nn.LayerNorm and error(run(model, IDS), before) < 1e-12


ZERO = "every output of the model is zero on this sample"
RUNS = "the model does not run on the sample, in float64 and eval mode: RuntimeError"
UNKNOWN = "sample is None, and no input for a GPT is known; pass one"
NONE = "the model has no LayerNorm over one dimension to be rewritten; it has none that is recognised"
WRAPPED = r"the model itself is wrapped \(OptimizedModule\) .*; rewrite the module first"
ERRORS = [
    (lambda: "model", {}, TypeError, r"model is a str; it must be a torch\.nn\.Module"),
    (GPT, {"zero_mean_writers": "never"}, ValueError, "zero_mean_writers is 'never'"),
    (GPT, {"tied": "cut"}, ValueError, "tied is 'cut'"),
    (GPT, {"include": "head.?"}, ValueError, r"'head\.\?' in include matches no norm"),
    (GPT, {"sample": torch.ones(2, 50)}, ValueError, RUNS),
    (GPT, {"sample": lambda model: model(IDS) * 0}, ValueError, ZERO),
    (GPT, {"sample": None}, ValueError, UNKNOWN),
    (lambda: GPT().to("meta"), {}, ValueError, "the model is on the meta device, where nothing can be shown"),
    (lambda: torch.compile(GPT()), {}, ValueError, WRAPPED),
    (lambda: nn.Linear(3, 3), {}, ValueError, NONE),
    (lambda: nn.LayerNorm((3, 4)), {}, ValueError, NONE),
]


def test_errors():
    for i, (make, options, kind, words) in enumerate(ERRORS):
        options = {"sample": IDS, **options}
        try:
            normzoo.to_pre_rms_norm(make(), **options)
        except kind as error:
            assert re.match(f"to_pre_rms_norm: {words}", str(error)), f"case {i}: {error}"
        else:
            pytest.fail(f"case {i} passed")


def test_a_sample_of_another_dtype_is_named():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), nn.LayerNorm(WIDTH)).double()
    with pytest.raises(ValueError, match="to_pre_rms_norm: the model does not run on the sample: RuntimeError"):
        normzoo.to_pre_rms_norm(model, torch.randn(2, 3, WIDTH))


def probed(rewrite):
    """The proof of an edit that is no longer the one that was planned."""
    return rewrite._probe.prove(rewrite.edit)


def planned(**options):
    rewrite = plan_rewrite(stirred(GPT(**options)), IDS)
    assert rewrite.verify().passed
    return rewrite, rewrite.edit.found


def test_the_probes_fail_where_they_should(monkeypatch):
    rewrite, found = planned()
    found.writers -= {w for w in found.writers if w.name == "blocks.1.mlp.2.weight"}
    proof = probed(rewrite)
    assert not proof.passed and proof.mean > 1e-3 and proof.output > 1e-4 and proof.culprit == "norm"
    assert (
        proof.shift < 1e-12 and str(proof).startswith("FAILED: another function") and "(at norm)" in str(proof)
    )

    rewrite, found = planned()  # attention.out is square: its rows and columns can be taken for each other
    found.writers -= {Writer("blocks.0.attention.out.weight", 0)}
    found.writers |= {Writer("blocks.0.attention.out.weight", 1)}
    proof = probed(rewrite)
    assert not proof.passed and proof.shift > 1e-3 and proof.culprit == "blocks.0.attention.out.weight"

    rewrite, found = planned()
    found.writers |= {Writer("blocks.0.mlp.0.weight", 0)}
    proof = probed(rewrite)
    assert not proof.passed and proof.shift > 1e-3 and proof.culprit == "blocks.0.mlp.0.weight"

    rewrite, found = planned(tied=True)
    found.centered_outputs.clear()
    proof = probed(rewrite)
    assert not proof.passed and proof.mean > 1e-3

    rewrite, found = planned(tied=True)
    found.centered_outputs.clear()
    found.writers |= {Writer("tokens.weight", 1)}
    proof = probed(rewrite)
    assert not proof.passed and proof.shift > 1e-3 and proof.culprit == "tokens.weight" and proof.mean < 1e-12

    rewrite, found = planned()
    found.centered_outputs["head"] = -1
    proof = probed(rewrite)
    assert not proof.passed and proof.shift > 1e-3 and proof.culprit == "head"

    rewrite, found = planned()
    made = editing.replacement

    def with_eps(site, choice):
        there = made(site, choice)
        there.module.eps = 1e-3
        return there

    monkeypatch.setattr(editing, "replacement", with_eps)
    proof = probed(rewrite)
    assert not proof.passed and proof.output > 1e-6 and max(proof.mean, proof.shift) < 1e-12


def test_a_scale_that_is_forgotten_fails():
    class Scaled(Block):
        def __init__(self, **options):
            super().__init__(**options)
            self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

        def forward(self, x):
            x = x + self.gamma * self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    rewrite = plan_rewrite(stirred(GPT(block=Scaled)), IDS)
    found = rewrite.edit.found
    assert rewrite.verify().passed
    assert {w.scale for w in found.writers if "attention" in w.name} == {
        ("blocks.0.gamma",),
        ("blocks.1.gamma",),
    }
    found.writers = {Writer(w.name, w.axis) for w in found.writers}
    proof = probed(rewrite)
    assert not proof.passed and proof.mean > 1e-3 and proof.shift > 1e-3 and "attention.out" in proof.culprit


def test_each_probe_counts():
    shift, mean, output, rounding, before, tolerance = 1e-15, 1e-15, 1e-15, 1e-6, 2e-7, 1e-9
    right = {"shift": shift, "mean": mean, "output": output, "rounding": rounding, "rounding_before": before}
    assert StreamProof(**right, tolerance=tolerance).passed
    for name, value in (("shift", 2e-9), ("mean", 2e-9), ("output", 2e-9), ("rounding", 3e-6)):
        assert not StreamProof(**{**right, name: value}, tolerance=tolerance).passed, name
    assert StreamProof(**{**right, "rounding": 1e-10, "rounding_before": 0.0}, tolerance=tolerance).passed


def test_weights_that_are_zero_hide_nothing():
    model = stirred(GPT())
    nn.init.zeros_(model.blocks[1].mlp[2].weight)
    rewrite = plan_rewrite(model, IDS)
    assert rewrite.verify().passed
    rewrite.edit.found.writers -= {Writer("blocks.1.mlp.2.weight", 0)}
    proof = probed(rewrite)
    assert not proof.passed and proof.mean > 1e-4


def test_a_mean_is_taken_in_float64():
    x = 1000 + torch.randn(8, 333)
    wide = x.double()
    assert torch.equal(centered(x, 1), (wide - wide.mean(1, keepdim=True)).float())
    x.requires_grad_()
    assert centered(x, 1).dtype == torch.float32 and centered(x.bfloat16(), 1).dtype == torch.bfloat16


def test_a_failed_proof_leaves_the_model(monkeypatch):
    model = stirred(GPT())
    before, said = run(model, IDS), repr(model)
    right = normzoo.RMSNorm.forward
    monkeypatch.setattr(normzoo.RMSNorm, "forward", lambda self, x: right(self, x) * (1 + 1e-6))
    with pytest.raises(
        ValueError, match=r"to_pre_rms_norm: FAILED: another function.*; the model is left as it was"
    ):
        normzoo.to_pre_rms_norm(model, IDS)
    assert repr(model) == said and torch.equal(run(model, IDS), before)
