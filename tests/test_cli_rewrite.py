"""`normzoo convert --to pre_rms_norm` and `--to pre_crms_norm`: what they show, refuse and write."""

import json
import sys

import pytest
import torch
import torchvision_ops  # noqa: F401

import normzoo
from normzoo import cli, model_source
from normzoo.commands import common

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    def forward(self, x):
        return x + self.mlp(self.norm(x))

class PostBlock(Block):
    def forward(self, x):
        return self.norm(x + self.mlp(x))

def make(block):
    model = nn.Sequential(nn.Embedding(9, 8), block(), block(), nn.LayerNorm(8), nn.Linear(8, 5))
    for p in model.parameters():
        nn.init.normal_(p)
    return model, torch.randint(9, (2, 6))

pre = lambda: make(Block)
post = lambda: make(PostBlock)
alone = lambda: pre()[0]
cut = lambda: (pre()[0], torch.randn(2, 3))
gated = lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
zeros = lambda: (gated().requires_grad_(False), torch.zeros(1, 4))

def on_meta():
    with torch.device("meta"):
        return gated()

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    def forward(self, x):
        return self.norm(self.linear(x)) * (1.5 if "RMS" in type(self.norm).__name__ else 1)

picky = lambda: (Picky(), torch.randn(2, 8))

class ByWidth(nn.Sequential):
    def forward(self, x):
        return super().forward(x if self[0].weight.shape[1] == 8 else x.view(2, 8))

by_width = lambda: (ByWidth(*make(Block)[0]), torch.randint(9, (2, 6)))
"""
GPT2 = ["n_embd=16", "n_layer=2", "n_head=2", "vocab_size=40", "n_positions=32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.fixture
def run(capsys):
    """Runs the command convert: (exit code, stdout, stderr)."""
    return lambda *arguments: (cli.main(["convert", *arguments]), *capsys.readouterr())


def test_what_is_shown_of_a_gpt2(run, here):
    pytest.importorskip("transformers")
    named = ["hf:gpt2", *(f"--arg={argument}" for argument in GPT2), "--dry-run", "--to"]
    code, out, err = run(*named, "pre_rms_norm")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and err == "" and out.startswith("hf:gpt2 (GPT2Model, ")
    assert ["h.*.ln_*", "x4", "norm", "rms_norm:", "exact"] in lines
    assert ["h.*.mlp.c_proj.weight", "x2", "writer", "centered", "once"] in lines
    assert "5 LayerNorms: 5 rewritten, 0 kept\n10 tensors centered\n" in out
    assert "training goes another way (--zero-mean-writers parametrize does not)" in out
    assert lines[-1][:7] == "proof: the model computes the same function.".split()
    code, out, _ = run(
        *named, "PreRMSNorm", "--zero-mean-writers", "parametrize", "--exclude", "ln_f", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["proof"]["passed"] and max(found["proof"][k] for k in ("mean", "shift")) < 1e-9
    assert found["norms"] == [f"h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
    assert found["zero_mean_writers"] == "parametrize" and found["centered_outputs"]["drop"] == -1
    assert found["model"] == "hf:gpt2" and "GPT2Model" in found["note"]
    assert [path.name for path in here.iterdir() if path.is_file()] == ["own.py"]


REFUSED = {
    "own.py:post --dry-run": "the stream holds the output of a norm, as in a post-LN model",
    "own.py:alone --dry-run": "has to run the model, and no input is known for it; give one with --input",
    "own.py:cut --dry-run": "the model does not run on the sample",
    "own.py:gated --dry-run --input 3,5": "--input is 3,5, and the model does not run on random numbers",
    "own.py:pre --dry-run --input 2,6": "for other inputs name a factory that returns (model, sample)",
    "own.py:gated --dry-run --input x": "--input is 'x'; it must be sizes",
    "own.py:on_meta --dry-run": "the model is on the meta device, where nothing can be shown; load it first",
    "own.py:on_meta --out new.safetensors": "--out: the model has no weights to write",
    "own.py:pre": "say --dry-run to see the plan, or --out NAME.safetensors",
    "own.py:pre --out own.py": "--out is 'own.py', which exists already",
    "own.py:pre --dry-run --include nothing": "'nothing' in --include matches no norm",
    "own.py:pre --dry-run --include re:(": "'(' after re: is no regular expression",
    "own.py:pre --dry-run --to same": "--to pre_rms_norm is a rewrite of the whole model; no other --to goes",
    "own.py:pre --dry-run --types layer": "--types does not go with --to pre_rms_norm",
    "own.py:pre --dry-run --strict": "--strict does not go with --to pre_rms_norm",
    "own.py:pre --dry-run --option eps=1": "--option does not go with --to pre_rms_norm",
    "own.py:pre --dry-run --basis truncate": "--basis belongs to --to pre_crms_norm",
    "own.py:pre --dry-run --tied none": "argument --tied: invalid choice: 'none'",
    "torch.nn:ReLU --dry-run --input 2": "the model has no LayerNorm over one dimension to be rewritten",
    "torch.nn:RMSNorm --dry-run --arg normalized_shape=4 --input 2,4": "it has RMSNorms, which do not take the",
}


def test_refusals(run, here):
    for line, why in REFUSED.items():
        code, out, err = run(*line.split(), "--to", "pre_rms_norm")
        assert (code, out) == (2, "") and why in err and "Traceback" not in err, f"{line}: {err}"
        *_, last = (part for part in err.splitlines() if not part.startswith(" "))
        assert last.startswith("normzoo convert: "), line
    for options, why in (
        (["--to", "1=pre_rms_norm"], "a rewrite is of the whole model; say --to pre_rms_norm"),
        (["--to", "rms_norm", "--tied", "untie"], "--tied belongs to --to pre_rms_norm"),
        (["--zero-mean-writers", "bake"], "--zero-mean-writers belongs to --to pre_rms_norm"),
        (["--to", "pre_crms_norm", "--tied", "untie"], "--tied belongs to --to pre_rms_norm"),
    ):
        code, out, err = run("own.py:pre", "--dry-run", *options)
        assert (code, out) == (2, "") and why in err, f"{options}: {err}"
    assert sorted(path.name for path in here.iterdir() if path.is_file()) == ["own.py"]


def test_no_proof(run, here):
    code, out, err = run("own.py:zeros", "--dry-run", "--to", "pre_rms_norm")
    assert code == 0 and "same function" in out, err
    silent = "silent = lambda: (nn.Sequential(*gated(), nn.Threshold(1e9, 0.0)), torch.randn(2, 4))"
    (here / "mute.py").write_text(OWN + silent)
    code, out, err = run("mute.py:silent", "--out", "new.safetensors", "--to", "pre_rms_norm")
    assert (code, out) == (2, "") and not (here / "new.safetensors").exists()
    assert (
        "normzoo convert: there is no proof, and nothing is written: every output of the model is zero" in err
    )
    for last in (["--dry-run"], ["--out", "new.safetensors", "--json"]):
        code, out, err = run("own.py:by_width", "--to", "pre_crms_norm", *last)
        assert (code, out) == (2, "") and not list(here.glob("new*"))
        assert (
            "nothing is written: the rewritten model does not run (RuntimeError: shape '[2, 8]' is inv" in err
        )


def test_words_of_python_as_the_command_line_takes_them():
    for python, ours in {
        "name the others in include: 1": "name the others in --include: 1",
        "the plan fails, and the model is left as it was:": "the plan fails:",
        "it failed; the model is left as it was": "it failed",
        'zero_mean_writers="bake", tied="untie"': "--zero-mean-writers bake, --tied untie",
        "use to_pre_rms_norm, which": "use --to pre_rms_norm, which",
        "call normzoo.to_pre_crms_norm(model, sample)": "take --to pre_crms_norm",
        "pass num_tasks=": "pass --option num_tasks=N",
    }.items():
        assert common.spelt(python) == ours


def test_a_failed_proof_writes_nothing(run, here):
    for options in (["--dry-run"], ["--out", "new.safetensors"], ["--out", "new.safetensors", "--json"]):
        code, out, err = run("own.py:picky", "--to", "pre_rms_norm", *options)
        assert code == 1 and "wrote" not in err and not list(here.glob("new*"))
        if "--json" in options:
            assert json.loads(out)["proof"]["passed"] is False
        else:
            assert "proof: FAILED: another function" in out


@pytest.mark.parametrize(
    "to, options",
    [
        ("pre_rms_norm", {}),
        ("pre_rms_norm", {"zero_mean_writers": "parametrize"}),
        ("pre_crms_norm", {"basis": "orthonormal"}),
    ],
)
def test_the_file_holds_the_rewritten_model(run, to, options):
    torch_io = pytest.importorskip("safetensors.torch")
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, _, err = run("own.py:pre", "--to", to, *given, "--out", "new.safetensors")
    assert code == 0 and "wrote new.safetensors; after normzoo.apply_recipe(" in err
    model, x = model_source.load("own.py:pre", {}), torch.randint(9, (3, 4))
    y = model.model(x)
    rewritten = getattr(normzoo, f"to_{to}")(model.model, model.sample, **options)
    torch.manual_seed(5)
    other = getattr(normzoo, f"to_{to}")(*sys.modules["own"].pre(), **options)
    torch_io.load_model(other, "new.safetensors")
    assert torch.equal(other(x), rewritten(x))
    torch.testing.assert_close(other(x), y)
    assert other[1].mlp[2].weight.shape == ((7, 12) if to == "pre_crms_norm" else (8, 12))
    anew = normzoo.apply_recipe(sys.modules["own"].pre()[0], "new.safetensors")
    torch_io.load_model(anew, "new.safetensors")
    assert torch.equal(anew(x), rewritten(x))
    with torch_io.safe_open("new.safetensors", "pt") as file:
        assert json.loads(file.metadata()["normzoo"])["norms"] == ["1.norm", "2.norm", "3"]


def test_python_points_to_the_function():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    for to, name in (("pre_rms_norm", "pre_rms_norm"), ({"1": "PreCRMSNorm"}, "pre_crms_norm")):
        with pytest.raises(
            ValueError, match=rf"rewrite of a whole model.* normzoo\.to_{name}\(model, sample\)"
        ):
            normzoo.convert(model, to)
