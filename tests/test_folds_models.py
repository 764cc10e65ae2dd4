"""fold on whole models: how many of how many norms go, the same function to rounding, and the command."""

import copy
import json
import os

import pytest
import torch
import torchvision_ops  # noqa: F401
from small_models import stirred
from torch import nn

import normzoo
from normzoo import cli
from normzoo.folding import Folded, plan_fold

os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

SMALL = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1]}


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def transformer_mlp():
    """Power norms before linear layers, and one of them behind."""

    def block(norm):
        return Residual(norm, nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))

    power = {"group_num": None}
    blocks = [
        block(normzoo.PowerNorm(16, **power)),
        block(normzoo.UnifiedNorm(16)),
        block(normzoo.PowerNorm(16)),
    ]
    return nn.Sequential(
        nn.Embedding(9, 16), normzoo.UnifiedNorm(16), *blocks, normzoo.PowerNorm(16, **power), nn.Linear(16, 9)
    )


def standardized():
    """Convolutions that standardize their weight, with batch norms behind."""

    def block(n, m):
        return [normzoo.WSConv2d(n, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU()]

    return nn.Sequential(*block(3, 8), *block(8, 8), normzoo.WSConv2d(8, 4, 1), nn.GroupNorm(2, 4))


def of_torchvision(name):
    return lambda: getattr(pytest.importorskip("torchvision").models, name)(weights=None)


def of_timm(name):
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False)


def of_hugging_face(kind, **config):
    def make():
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **config))

    return make


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# model: (made by, input, number of norms and layers, how many are folded before, after, baked, and refused)
MODELS = {
    "resnet18": (of_torchvision("resnet18"), IMAGE, 20, (20, 0, 0, 0)),
    "mobilenet_v3_small": (of_torchvision("mobilenet_v3_small"), IMAGE, 34, (34, 0, 0, 0)),
    "densenet121": (of_torchvision("densenet121"), IMAGE, 121, (59, 0, 0, 62)),
    "timm resnet10t": (of_timm("resnet10t"), IMAGE, 14, (14, 0, 0, 0)),
    "HF resnet": (of_hugging_face("resnet", **SMALL), IMAGE, 8, (8, 0, 0, 0)),
    "HF regnet": (of_hugging_face("regnet", **SMALL, groups_width=8), IMAGE, 9, (9, 0, 0, 0)),
    "transformer": (transformer_mlp, torch.arange(8).view(2, 4), 5, (1, 3, 0, 1)),
    "standardized": (standardized, IMAGE, 6, (2, 0, 3, 0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, sample, number, wanted = MODELS[name]
    model = stirred(make()).double().eval()
    sample = sample.double() if sample.is_floating_point() else sample
    plan = plan_fold(model)
    assert len(plan.steps) == number
    found = (
        *(sum(step.where == where for step in plan.changes) for where in ("before", "after")),
        *(sum(step.action == action for step in plan.steps) for action in ("bake", "refuse")),
    )
    assert found == wanted
    proof = plan.verify(sample)
    assert proof.same and proof.error <= 1e-10 and proof.idle == 0
    if name == "timm resnet10t":  # in its own dtype too
        single = copy.deepcopy(model).float()
        assert plan_fold(single).verify(IMAGE).same
    keys, old = model.state_dict().keys(), copy.deepcopy(model)
    plan.apply()
    new = {key for key in model.state_dict().keys() - keys}
    assert all(key.endswith(".bias") for key in new)
    folded = [name for name, module in model.named_modules() if type(module) is Folded]
    assert len(folded) == sum(wanted[:2]) and all(old.get_submodule(name) is not None for name in folded)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command: (exit code, stdout, stderr)."""
    (tmp_path / "own.py").write_text(
        "import torch, normzoo\n"
        "from torch import nn\n"
        "def small():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))\n"
        "    nn.init.normal_(model[1].bias)\n"
        "    return model, torch.randn(2, 3, 6, 6)\n"
        "square = lambda: (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4, 4))\n"
        "rows = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))\n"
        "class Odd(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * (1.0 if isinstance(self[1], nn.BatchNorm2d) else 1.01)\n"
        "odd = lambda: (Odd(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6))\n"
    )
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (cli.main(["fold", *arguments]), *capsys.readouterr())


def test_the_command(run, tmp_path):
    code, out, err = run("own.py:small", "--out", "folded.safetensors")
    assert code == 0 and "part of 0" in out and "2 norms: 1 folded, 1 refused" in out
    assert "proof: the model computes the same function" in out and "wrote folded.safetensors" in err
    from safetensors.torch import load_file

    assert load_file(tmp_path / "folded.safetensors").keys() >= {"0.weight", "0.bias", "3.weight"}
    code, out, _ = run("own.py:small", "--dry-run", "--json", "--exclude", "3")
    told = json.loads(out)
    assert code == 0 and told["proof"]["same"] and told["steps"][0]["into"] == ["0"]
    assert told["steps"][1]["reason"] == "filtered out"
    for arguments, wanted, words in (
        (("own.py:odd", "--dry-run"), 1, "proof: FAILED: the model computes another function"),
        (("own.py:square", "--dry-run"), 2, "its input has 3 dimensions, its channels in another one"),
        (("own.py:rows", "--dry-run"), 2, "normzoo fold: nothing can be folded; norm classes seen: 1 torch.nn"),
        (("own.py:small", "--dry-run", "--include", "x"), 2, "normzoo fold: 'x' in --include matches no norm"),
        (
            ("own.py:small", "--dry-run", "--strict"),
            2,
            "fold: --strict, and some norms cannot be folded",
        ),
        (("own.py:small", "--dry-run", "--include", "re:("), 2, "'(' after re: is no regular expression"),
        (("own.py:small", "--dry-run", "--input", "2,9"), 2, "does not run on random numbers of these sizes"),
        (("own.py:small",), 2, "say --dry-run to see the plan, or --out NAME.safetensors"),
        (("own.py:small", "--out", "f.pt"), 2, "--out is 'f.pt'; safetensors are written, so name it f.saf"),
        (("--help",), 0, "write the folded weights to a new file"),
    ):
        code, out, err = run(*arguments)
        assert code == wanted and words in out + err, arguments
