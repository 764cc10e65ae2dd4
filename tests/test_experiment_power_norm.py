"""The parts of the experiment on PowerNorm: source text by the character, and a transformer that reads it."""

from __future__ import annotations

import copy
import json
import math
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normzoo import LayerNorm, PowerNorm, UnifiedNorm
from normzoo_bench.experiments import characters, power_norm
from normzoo_bench.experiments.__main__ import main
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import where
from normzoo_bench.experiments.power_norm import Settings, TokenBatchNorm, _norms

SMALL = {"width": 16, "heads": 2, "inner": 24, "length": 12}


def windows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(seed))


def small(norm: str, norm_first: bool = False) -> characters.CharacterModel:
    torch.manual_seed(0)
    return characters.CharacterModel(_norms(Settings(warmup=1))[norm], 2, norm_first, **SMALL)


def test_texts_are_of_different_files():
    texts = characters.load(3)
    training, held_out = (bytes(text.tolist()) for text in texts)
    assert texts.training.dtype == torch.int64 and len(training) > len(held_out)
    expected = []
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        if path.stem in sys.stdlib_module_names:
            with tokenize.open(path) as file:
                expected.append(file.read().encode("ascii", "replace"))
    assert sum(map(len, expected)) == len(training) + len(held_out)
    kept = [text for text in expected if text in held_out and text not in training]
    assert len(kept) == characters.HELD_OUT and sum(map(len, kept)) == len(held_out)
    assert torch.equal(characters.load(3).held_out, texts.held_out)
    assert bytes(characters.load(4).held_out.tolist()) != held_out


def test_python_without_sources(tmp_path, monkeypatch):
    for name in ("os", "this", "not_of_the_library"):
        (tmp_path / f"{name}.py").write_text("1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has 2 of them; take a Python that is installed with its sour"):
        characters.load()


def test_norms():
    made = {name: norm(16) for name, norm in _norms(Settings()).items()}
    assert type(made["LN"]) is LayerNorm and type(made["BN"]) is TokenBatchNorm
    powers = {name: (m.group_num, m.warmup_iters) for name, m in made.items() if isinstance(m, PowerNorm)}
    assert powers == {"PN": (4, 150), "PN, no groups": (None, 150)}
    unified = {
        name: (m.window_size, m.outlier_filtration, m.warmup_iters)
        for name, m in made.items()
        if isinstance(m, UnifiedNorm)
    }
    assert unified == {"PN-V": (1, False, 150), "UN": (4, False, 150)}
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    theirs = nn.BatchNorm1d(16)
    for training in (True, False):
        expected = theirs.train(training)(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(made["BN"].train(training)(x), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_model(norm_first):
    """Against a block written out with torch's attention."""
    model = small("LN", norm_first)
    assert sum(isinstance(module, LayerNorm) for module in model.modules()) == 4 + norm_first
    x = windows(3, 10)
    y = model.characters(x) + model.positions.weight[:10]
    ahead = torch.ones(10, 10, dtype=torch.bool).triu(1)
    for block in list(model.blocks)[:2]:
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": block.queries_keys_values.weight,
                "in_proj_bias": block.queries_keys_values.bias,
                "out_proj.weight": block.joined.weight,
                "out_proj.bias": block.joined.bias,
            }
        )
        first, second = block.norms[0], block.norms[1]
        before = first(y) if norm_first else y
        added = y + attention(before, before, before, attn_mask=ahead)[0]
        y = (
            added + block.inner(second(added))
            if norm_first
            else second(first(added) + block.inner(first(added)))
        )
    y = model.blocks[-1](y) if norm_first else y
    torch.testing.assert_close(model(x), model.head(y))
    expected = F.cross_entropy(model(x)[:, :-1].reshape(-1, 128), x[:, 1:].reshape(-1))
    torch.testing.assert_close(model.loss(x), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("norm", "leaks"), [("LN", False), ("BN", True), ("PN-V", True), ("PN", False), ("UN", True)]
)
def test_who_sees_the_future_in_train_mode(norm, leaks, norm_first):
    """The logits of a character depend on later ones by the statistics of the batch alone."""
    model = small(norm, norm_first)
    for step in range(6):  # beyond the warm-up and the window
        model(windows(1, 12, seed=step))
    x = windows(1, 12, seed=9)
    other = x.clone()
    other[:, 6:] = (x[:, 6:] + 1) % 128

    def same(training: bool) -> bool:
        one, two = (copy.deepcopy(model).train(training)(of)[:, :6] for of in (x, other))
        return torch.allclose(one, two, rtol=0, atol=1e-5)

    assert same(training=False) and same(training=True) != leaks


@pytest.mark.parametrize("training", [False, True])
def test_loss_leaves_the_model_as_it_is(training):
    model, text = small("UN").eval(), windows(300)
    for step in range(3):
        model.train()(windows(1, 12, seed=step))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    found = characters.loss(model, text, 5, training=training)
    assert not model.training and all(
        torch.equal(before[name], now) for name, now in model.state_dict().items()
    )
    copied = copy.deepcopy(model).train(training)
    starts = [0, 71, 143, 215, 287]
    parts = [copied.loss(text[None, start : start + 13]).item() for start in starts]
    assert found == pytest.approx(sum(parts) / 5, rel=1e-6)
    moved = any(not torch.equal(before[name], now) for name, now in copied.state_dict().items())
    assert moved == training and len(set(parts)) == 5


def test_windows_of_a_batch_are_from_different_places():
    seen = []

    class Recorder(nn.Module):
        length = 3

        def loss(self, batch):
            seen.append(batch.tolist())
            return torch.tensor(float(self.training))

    text = torch.arange(32)
    assert characters.loss(Recorder(), text, 2, windows=3) == 0
    assert characters.loss(Recorder().eval(), text, 2, windows=3, training=True) == 1
    starts = [[row[0] for row in batch] for batch in seen[:2]]
    assert starts == [[0, 11, 22], [5, 16, 28]] and seen[1][2] == [28, 29, 30, 31]


def test_training(monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            rates.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"]))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    text = windows(40).repeat(20)

    def trained(seed: int) -> characters.CharacterModel:
        model = small("PN")
        return characters.train(model, text, seed=seed, steps=16, windows=2, rate=0.01, warmup=4)

    model, again, other = trained(0), trained(0), trained(1)
    assert (
        not model.training
        and characters.loss(model, text, 8) < characters.loss(small("PN").eval(), text, 8) - 0.3
    )
    weights = [m.head.weight for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    expected = [0.0025, 0.005, 0.0075, 0.01, *(0.01 * math.sqrt(4 / t) for t in range(5, 17))]
    assert [rate for rate, _ in rates[:16]] == pytest.approx(expected)
    assert {betas for _, betas in rates} == {(0.9, 0.98)}
    assert all(m.iters == 16 for m in model.modules() if isinstance(m, PowerNorm))


def test_quick_run_without_scikit_learn(capsys, monkeypatch, tmp_path):
    """The numbers of norms without state are the same in both modes, those of the others are not."""
    trained = []

    def recorded(model, text, *, windows, **how):
        blocks = [module for module in model.modules() if isinstance(module, characters.Block)]
        trained.append((len(blocks), {block.norm_first for block in blocks}, windows))
        return characters.train(model, text, windows=windows, **how)

    monkeypatch.setattr(power_norm, "train", recorded)
    monkeypatch.setattr(sys.modules[main.__module__], "find_spec", lambda name: None)
    assert main(["power_norm", "--quick", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert "Python" in (out := capsys.readouterr().out) and "scikit-learn" not in out
    document = json.loads((tmp_path / "power_norm.json").read_text(encoding="utf-8"))
    assert "scikit-learn" not in document["environment"] and "scikit" not in where(document)
    assert trained == [(1, {False}, 1)] * 6 + [(1, {True}, 2)] * 6
    rows = {(row["model"], row["norm"]): row["values"] for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 2 * len(_norms(EXPERIMENTS["power_norm"].quick))
    for (_, norm), numbers in rows.items():
        (gap,), (of_eval,), (of_train,) = numbers["gap"], numbers["eval"], numbers["train mode"]
        assert gap == pytest.approx(of_eval - of_train, abs=2e-4) and (of_eval == of_train) == (norm == "LN")
