"""The experiment that trains Pre-LN models and their rewrites side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from normzoo import CRMSNorm, RMSNorm
from normzoo_bench.experiments import pre_rms_norm
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import spread, values

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMALL = pre_rms_norm.Settings(seeds=1, steps=3, width=16, length=6, windows=3)


@pytest.fixture(scope="module")
def document() -> dict:
    return json.loads((DOCS / "experiments" / "pre-rms-norm.json").read_text(encoding="utf-8"))


def test_models_and_steps():
    model, batches = pre_rms_norm.start(SMALL, 0)
    assert len(batches) == 3 and batches[0].shape == (3, 7) and model.positions.weight.dtype == torch.float64
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 3 and all(norm.weight.std() > 0.1 < norm.bias.std() for norm in norms)
    ids = batches[0][:, :-1]
    with pre_rms_norm.quiet():
        for name, rewrite in pre_rms_norm.REWRITES.items():
            made = rewrite(copy.deepcopy(model), ids)
            kind = CRMSNorm if "truncated" in name else RMSNorm
            assert sum(isinstance(module, kind) for module in made.modules()) == 3, name
            torch.testing.assert_close(made(ids), model(ids), rtol=1e-10, atol=1e-10, msg=name)
    by_hand = copy.deepcopy(model)
    logits = by_hand(ids)
    grad = torch.autograd.grad(nn.functional.cross_entropy(logits.mT, batches[0][:, 1:]), by_hand.head.weight)[
        0
    ]
    stepped = pre_rms_norm.train(copy.deepcopy(model), pre_rms_norm.OPTIMIZERS["SGD, L2"], batches[:1])
    torch.testing.assert_close(stepped.head.weight, 0.95 * model.head.weight - 0.5 * grad)


def test_parametrized_writers_train_as_before_and_others_do_not():
    found = {(row["model"], row["optimizer"]): n["difference"] for row, n in pre_rms_norm._run(SMALL, 0)}
    assert len(found) == 12
    for (name, optimizer), apart in found.items():
        assert (apart < 1e-13) == ("parametrized" in name), f"{name}, {optimizer}: {apart}"
        assert apart < 1e-13 or apart > 1e-5, f"{name}, {optimizer}: {apart}"


def test_words(document):
    pages = (DOCS / "experiments.md", DOCS / "layernorm-rmsnorm.md")
    page, other = (" ".join(path.read_text(encoding="utf-8").split()) for path in pages)
    assert EXPERIMENTS["pre-rms-norm"] is pre_rms_norm.EXPERIMENT and "experiments/pre-rms-norm.md" in other

    def of(model: str, optimizer: str) -> list[float]:
        return values(document, "difference", model=model, optimizer=optimizer)

    for name in pre_rms_norm.REWRITES:
        for optimizer in pre_rms_norm.OPTIMIZERS:
            exponents = values(document, "log10", model=name, optimizer=optimizer)
            if name == "Pre-RMSNorm, parametrized":
                assert {*exponents} == {-13} and pre_rms_norm.shown(document, name, optimizer) == "< 1e−13"
            else:
                assert -4 < min(exponents) <= max(exponents) <= 0.1
                assert pre_rms_norm.shown(document, name, optimizer) == spread(of(name, optimizer), 3)
    baked = spread(of("Pre-RMSNorm, baked", "Adam"), 3)
    assert f"it is not: Adam parts by {baked} of the largest logit in 10 steps." in page
    assert "for 10 steps on the same windows" in page and document["settings"]["steps"] == 10
