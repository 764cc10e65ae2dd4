"""The commands inspect and convert on models of every form that the command line knows."""

import json
import os
import pickle
import re
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision_ops  # noqa: F401

import normzoo
from normzoo import cli, model_source

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

OWN = '''
import torch
from torch import nn
from normzoo import LayerNorm
from beside import WIDTH

print("a word of the model's own")

def small(width=WIDTH):
    norms = nn.LayerNorm(width), nn.LayerNorm(width)
    return nn.Sequential(nn.Linear(width, width), norms[0], nn.Linear(width, width), norms[1])

def trained():
    model = small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, torch.randn(3, WIDTH)

class OnePlusNorm(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)

def offset():
    model = nn.Sequential(OnePlusNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    nn.init.normal_(model[0].weight)
    return model, torch.randn(3, WIDTH)

class Picky(nn.Module):
    """Not the same after an exact conversion."""
    def __init__(self, factor):
        super().__init__()
        self.norm, self.factor = nn.LayerNorm(WIDTH), factor
    def forward(self, x):
        print("a word of the forward's own")
        return self.norm(x) * (self.factor if type(self.norm) is LayerNorm else 1)

def picky(factor=2.0):
    return Picky(float(factor)), torch.randn(3, WIDTH)

tokens = lambda: (nn.Sequential(nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH)), torch.randint(9, (2, 3)))
half = lambda: small().bfloat16()
wrong_sample = lambda: (small(), torch.randn(2, 3))
zeros = lambda: (nn.Sequential(nn.LayerNorm(WIDTH)), torch.zeros(2, WIDTH))
text = lambda: "model"

def on_meta():
    with torch.device("meta"):
        return small()

def raising():
    raise KeyError("no\\nluck")

def leaving():
    raise SystemExit(0)

number = lambda: 3
'''
GPT2 = "n_embd=16 n_layer=2 n_head=2 vocab_size=40 n_positions=32"
LLAMA = "hidden_size=16 intermediate_size=24 num_hidden_layers=2 num_attention_heads=2 vocab_size=40"
VIT = "hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=24 image_size=32"
T5 = "d_model=16 d_kv=8 d_ff=24 num_layers=1 num_heads=2 vocab_size=40"
SSM = "hidden_size=16 state_size=8 num_hidden_layers=1 num_heads=4 head_dim=8 n_groups=2"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with a model of one's own, and no network."""

    class Shut(socket.socket):
        def __init__(self, *_, **__):
            raise OSError("a socket was opened")

    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("WIDTH = 8")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "far.py").write_text("from near import norm")
    (tmp_path / "sub" / "near.py").write_text("import torch\nnorm = torch.nn.LayerNorm(4)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", Shut)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own", "beside", "broken", "far", "near"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""
    return lambda *arguments: (cli.main(arguments), *capsys.readouterr())


def with_arguments(name, arguments):
    return [name, *(word for argument in arguments.split() for word in ("--arg", argument))]


def bert(folder):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_model

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **small))
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(folder)
    save_model(model, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.logging.enable_progress_bar()  # nothing of it is to be seen all the same
    return model


class Malice:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


# model: (arguments, what inspect shows of it, what a dry run shows)
MODELS = {
    "own.py:small": ("", ["(Sequential, 176 parameters)", "layer (8,), eps=1e-05", "2 layer"], ["no input"]),
    "own.py:trained": ("", ["* x2", "LayerNorm"], ["proof: the model computes the same function"]),
    "own:small": ("width=4", ["layer (4,), eps=1e-05"], ["4 kept, 0 converted"]),
    "own.py:on_meta": ("", ["176 parameters, no weights"], ["proof: left out: the model has no weights"]),
    "own.py:tokens": ("", ["1 norm: 1 layer"], ["the same function"]),
    "own.py:wrong_sample": ("", ["2 norms"], ["the model does not run on its sample (RuntimeError: mat1"]),
    "own.py:zeros": ("", ["1 norm"], ["proof: left out: every output is zero on this sample"]),
    "sub/far.py:norm": ("", ["LayerNorm, 8 parameters"], ["no input is known for this model; give"]),
    "torch.nn:LayerNorm": ("normalized_shape=4", ["(the model)"], ["layer_norm: exact"]),
    "hf:gpt2": (GPT2, ["GPT2Model", "random weights", "h.*.ln_* x4", "ln_f"], ["the same function"]),
    "hf:LlamaConfig": (LLAMA, ["rms (16,), eps=1e-06, cast=llama", "probe"], ["the same function"]),
    "hf:T5Config": (T5, ["T5LayerNorm", "encoder.block.0.layer.*.layer_norm x2"], ["the same function"]),
    "hf:vit": (VIT, ["ViTModel", "layers.*.layernorm_before x2"], ["the same function"]),
    "hf:mamba2": (SSM, ["Mamba2Mixer reads its variance_epsilon, weight itself"], ["normalises 2 groups"]),
    "timm:test_convnext": ("", ["ConvNeXt, ", "over channels"], ["the same function"]),
    "timm:test_vit3": ("img_size=64 in_chans=1", ["VisionTransformer, "], ["the same function"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name, run):
    arguments, shown, proven = MODELS[name]
    if name.startswith(("hf:", "timm:")):
        pytest.importorskip("timm" if name.startswith("timm:") else "transformers")
    named = with_arguments(name, arguments)
    code, out, err = run("inspect", *named)
    assert code == 0 and out.startswith(f"{name} (") and not [text for text in shown if text not in out]
    assert err == ("a word of the model's own\n" if name.startswith("own") else "")
    code, out, _ = run("convert", *named, "--dry-run")
    assert code == 0 and not [text for text in proven if text not in out]
    assert "a word" not in out and len(re.findall("^proof: ", out, re.M)) == 1


def test_a_model_without_weights(run, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(model_source, "LARGEST", 0)
    code, out, _ = run("convert", *with_arguments("hf:LlamaConfig", LLAMA), "--dry-run", "--input", "2,8")
    assert code == 0 and "(LlamaModel, " in out and " parameters, no weights)" in out
    assert out.endswith("proof: left out: the model has no weights\n") and "5 convert" in out


def test_convolutions_and_what_sets_them_up(run):
    pytest.importorskip("timm")
    code, out, _ = run("inspect", "timm:resnet10t")
    assert code == 0 and "layer1.0.bn*" in out and "itself" not in out
    code, out, err = run("convert", "timm:resnet10t", "--to", "layer_norm", "--dry-run")
    assert code == 2 and out == "" and "nothing can be converted" in err and "no rule takes a batch" in err
    assert run("inspect", "torch.nn:ReLU")[:2] == (0, "torch.nn:ReLU (ReLU, 0 parameters)\nno norms\n")


def test_a_folder(run, tmp_path):
    model = bert(tmp_path / "bert")
    trace = tmp_path / "trace"
    (tmp_path / "bert" / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(trace)))
    code, out, err = run("inspect", f"hf:{tmp_path / 'bert'}")
    assert (
        code == 0
        and f"(BertModel, {model.num_parameters():,} parameters, weights from model.safetensors)" in out
    )
    assert err == "" and "embeddings.LayerNorm" in out and not trace.exists()
    loaded = model_source.load("hf:bert", {}).model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))
    config = tmp_path / "bert" / "config.json"
    config.write_text(config.read_text().replace("BertModel", "BertForMaskedLM"))
    assert "weights from model.safetensors, 6 random tensors that it lacks" in run("inspect", "hf:bert")[1]


def test_a_folder_of_pickles(run, tmp_path):
    bert(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    torch.save({"pooler.dense.bias": Malice(trace)}, tmp_path / "bert" / "pytorch_model.bin")
    code, out, _ = run("inspect", "hf:bert")
    assert (
        code == 0 and "random weights: the folder has no safetensors file, and a .bin file is a pickle" in out
    )
    code, out, err = run("convert", "hf:bert", "--out", "new.safetensors")
    assert code == 2 and out == "" and "there are no weights to write: the folder has no safetensors" in err
    assert not (tmp_path / "new.safetensors").exists()
    (tmp_path / "bert" / "other.safetensors").write_bytes(b"")
    code, out, err = run("inspect", "hf:bert")
    assert code == 2 and out == "" and "no file named model.safetensors" in err and not trace.exists()


def test_code_in_a_folder_does_not_run(run, tmp_path, monkeypatch):
    bert(tmp_path / "bert")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    code = {"AutoConfig": "planted.Config", "AutoModel": "planted.Model"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "planted", "auto_map": code}))
    (tmp_path / "bert" / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})")
    code, out, err = run("inspect", "hf:bert")
    assert code == 2 and out == "" and "MODEL 'hf:bert': ValueError: " in err and err.count("\n") == 1
    assert run("inspect", "hf:bert", "--arg", "trust_remote_code=true")[0] == 2
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "deed, what",
    [
        (lambda trace: pickle.loads(pickle.dumps(Malice(trace))), "a pickle"),
        (lambda trace: socket.getaddrinfo("localhost", 80), "the network"),
    ],
)
def test_libraries_are_kept_from_pickles_and_the_network(run, tmp_path, monkeypatch, deed, what):
    trace = tmp_path / "trace"
    timm = SimpleNamespace(
        __version__="0", list_models=lambda: ["old"], create_model=lambda *_, **__: deed(trace)
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    code, out, err = run("inspect", "timm:old")
    assert code == 2 and out == "" and f"it asks for {what}" in err and not trace.exists()
    assert pickle.loads(pickle.dumps(normzoo.RMSNorm)) is normzoo.RMSNorm  # allowed again


REFUSED = {
    "inspect own.py": "MODEL is 'own.py'; it must be module:factory, path.py:factory, hf:FOLDER",
    "inspect own.py:smal": "'own.py' has no 'smal'; did you mean small?",
    "inspect none.py:f": "there is no file 'none.py'",
    "inspect none:f": "there is no module 'none' here",
    "inspect own.py:text": "own.py:text returned a str; it must return a torch.nn.Module",
    "inspect own.py:number": "own.py:number returned an int; it must return a torch.nn.Module",
    "inspect own.py:WIDTH": "own.py:WIDTH is of type int; it must be a model, or make one",
    "inspect own.py:raising": "MODEL 'own.py:raising': KeyError: 'no\\nluck' (own.py, line 51)",
    "inspect own.py:leaving": "MODEL 'own.py:leaving': SystemExit: 0",
    "inspect broken:f": "MODEL 'broken:f': ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "inspect own.py:small --arg width": "--arg is 'width'; it must be KEY=VALUE",
    "inspect own.py:small --arg depth=1": "got an unexpected keyword argument 'depth'",
    "inspect hf:gpt-2": "nothing is downloaded; did you mean gpt2",
    "inspect hf:.": "the folder . has no config.json",
    "inspect timm:resnet19": "has no model 'resnet19'; did you mean resnet18",
    "inspect timm:resnet18 --arg pretrained=true": "--arg pretrained: nothing is downloaded",
    "inspect timm:resnet18 --arg checkpoint_path=a.pth": "--arg checkpoint_path: nothing is downloaded",
    "convert own.py:small": "say --dry-run to see the plan, or --out NAME.safetensors",
    "convert own.py:small --dry-run --out new": "--dry-run writes nothing, and --out a file; give one of them",
    "convert own.py:small --out new.pt": "safetensors are written, so name it new.safetensors",
    "convert own.py:small --out own.py": "--out is 'own.py', which exists already",
    "convert own.py:small --out no/new": "there is no folder 'no'; make it first",
    "convert own.py:small --out own.py/new": "there is no folder 'own.py'; make it first",
    "convert own.py:on_meta --out new.safetensors": "--out: the model has no weights to write",
    "convert own.py:small --dry-run --to rms": "there is no layer called 'rms'; there are layer_norm",
    "convert own.py:small --dry-run --to other": "'same' or 'keep', and the rewrites pre_rms_norm and pre_",
    "convert own.py:small --dry-run --to to_pre_rms_norm": "did you mean --to pre_rms_norm?",
    "convert own.py:small --dry-run --to 1=PreCRMSNrom": "did you mean --to pre_crms_norm?",
    "convert own.py:small --dry-run --to crms_norm": "with the norm: take --to pre_crms_norm",
    "convert own.py:small --dry-run --to 9=same": "the rule '9' matches no norm",
    "convert own.py:small --dry-run --to re:(=same": "'(' after re: is no regular expression",
    "convert own.py:small --dry-run --to same --to keep": "--to is given twice for _default",
    "convert own.py:small --dry-run --to keep": "1, 3: as asked",
    "convert own.py:small --dry-run --include 9": "'9' in --include matches no norm",
    "convert own.py:small --dry-run --types rms": "1, 3: filtered out",
    "convert own.py:small --dry-run --option p=1": "LayerNorm takes no 'p'; it takes normalized_shape",
    "convert own.py:small --dry-run --option eps": "--option is 'eps'; it must be KEY=VALUE",
    "convert own.py:small --dry-run --option eps=a": "eps is 'a'; it must be a positive finite number",
    "convert own.py:small --dry-run --input=": "--input is ''; it must be sizes, such as 2,3,224,224",
    "convert own.py:small --dry-run --input 2,": "--input is '2,'; it must be sizes",
    "convert own.py:small --dry-run --input 0,8": "--input is '0,8'; it must be sizes",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line, run, here):
    arguments = line.split()
    if library := {"hf": "transformers", "timm": "timm"}.get(arguments[1].partition(":")[0]):
        pytest.importorskip(library)
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and REFUSED[line] in err and "Traceback" not in err
    *_, last = (part for part in err.splitlines() if not part.startswith(" "))
    assert last.startswith(f"normzoo {arguments[0]}: ")
    assert not [path for path in here.iterdir() if "new" in path.name]


def test_a_library_that_is_missing(run, monkeypatch):
    for name, library in (("hf:gpt2", "transformers"), ("timm:resnet18", "timm")):
        monkeypatch.setitem(sys.modules, library, None)
        assert run("inspect", name) == (
            2,
            "",
            f"normzoo inspect: {library} is not installed; pip install {library}\n",
        )


def test_rules_and_filters(run):
    rules = ("--to", "1=rms_norm", "--to", "re:(?=[3-9]).=keep")
    _, out, _ = run("convert", "own.py:trained", "--dry-run", *rules)
    assert re.search(r"^1 +LayerNorm .* rms_norm: approximate +[\d.]+e-01 +the mean is no longer", out, re.M)
    assert re.search(r"^3 +LayerNorm .* stays +- +as asked$", out, re.M) and "1 converted, 1 kept" in out
    _, out, _ = run("convert", "own.py:trained", "--dry-run", "--to", "1=rms_norm", "--to", "same", "--json")
    assert [step["target"] for step in json.loads(out)["steps"]] == ["rms_norm", "layer_norm"]
    for filters in (
        ["--include", "3"],
        ["--exclude", "1"],
        ["--types", "layer", "--types", "rms", "--exclude", "1"],
    ):
        _, out, _ = run("convert", "own.py:trained", "--dry-run", *filters, "--option", "eps=1e-3", "--json")
        first, second = json.loads(out)["steps"]
        assert (first["action"], first["reason"]) == ("keep", "filtered out")
        assert (second["action"], second["exactness"]) == ("convert", "approximate")
    code, out, err = run("convert", *with_arguments("hf:mamba2", SSM), "--dry-run", "--strict")
    assert code == 2 and out == "" and "--strict, and some norms cannot be converted" in err


def test_an_input_of_given_sizes(run):
    for name in ("own.py:small", "own.py:half"):
        code, out, _ = run("convert", name, "--dry-run", "--input", "2,5,8")
        assert code == 0 and "proof: the model computes the same function" in out
    for name, sizes in (("own.py:small", "2,7"), ("own.py:tokens", "2,3")):
        code, out, err = run("convert", name, "--dry-run", "--input", sizes)
        assert code == 2 and "proof" not in out and f"--input is {sizes}, and the model does not run" in err
        assert "name a factory that returns (model, sample)" in err
    code, _, err = run("convert", "own.py:small", "--dry-run", "--input", "999999999,999999999")
    assert code == 2 and "--input is '999999999,999999999', which is too large" in err


def test_a_failed_proof(run, here):
    for arguments in (["--dry-run"], ["--out", "new.safetensors"]):
        code, out, err = run("convert", "own.py:picky", *arguments)
        assert code == 1 and "proof: FAILED: the model computes another function" in out
        assert "a word of the forward's own" in err and "wrote" not in err
    assert not (here / "new.safetensors").exists()
    code, out, _ = run("convert", "own.py:picky", "--arg", "factor=nan", "--dry-run", "--json")
    proof = json.loads(out, parse_constant=lambda word: pytest.fail(word))["proof"]
    assert code == 1 and proof["passed"] is False and proof["error"] is None
    code, out, _ = run("convert", "own.py:trained", "--dry-run", "--to", "rms_norm")
    assert code == 0 and "proof: the model computes another function" in out  # it claims no more


@pytest.mark.parametrize("factory, to", [("trained", ["--to", "1=rms_norm", "--to", "same"]), ("offset", [])])
def test_the_file_holds_the_converted_model(run, here, factory, to):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_model

    code, out, err = run("convert", f"own.py:{factory}", "--out", "new.safetensors", *to, "--json")
    assert code == 0 and json.loads(out)["proof"]["passed"] and "wrote new.safetensors" in err
    original, x = model_source.load(f"own.py:{factory}", {}).model, torch.randn(4, 8)
    rules = {"1": "rms_norm", "_default": "same"} if to else "same"
    normzoo.convert(original, rules)
    torch.manual_seed(5)
    other = normzoo.convert(getattr(sys.modules["own"], factory)()[0], rules)
    assert not torch.equal(other(x), original(x))
    load_model(other, "new.safetensors")
    assert torch.equal(other(x), original(x))
    anew = normzoo.apply_recipe(getattr(sys.modules["own"], factory)()[0], "new.safetensors")
    load_model(anew, "new.safetensors")
    assert torch.equal(anew(x), original(x)) and repr(anew) == repr(original)
    with safetensors.safe_open("new.safetensors", "pt") as file:
        plan = json.loads(file.metadata()["normzoo"])
    assert plan["steps"] == json.loads(out)["steps"] and len(plan["steps"]) == 2
    assert not list(here.glob("*.part"))


def test_a_file_that_cannot_be_written(run, here, monkeypatch):
    torch_io = pytest.importorskip("safetensors.torch")

    def full(model, name, metadata):
        (here / name).write_bytes(b"half")
        raise OSError(f"no space\nleft for {name}")

    monkeypatch.setattr(torch_io, "save_model", full)
    code, _, err = run("convert", "own.py:small", "--out", "new.safetensors")
    assert (
        code == 2
        and "--out is 'new.safetensors', and writing it failed (OSError: no space left for new.safetensors.part"
        in err
    )
    assert not [path for path in here.iterdir() if "new" in path.name]
