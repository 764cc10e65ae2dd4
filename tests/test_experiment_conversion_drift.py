"""Conversions that are not exact, on networks that read digits: what they cost, and what recalibration does."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import normzoo
from normzoo.conversion import TRANSFERS, Exactness
from normzoo_bench.experiments import conversion_drift
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.conversion_drift import Rule, convert, drift, outputs, rules
from normzoo_bench.experiments.digits import SmallCNN, Split, load, train
from normzoo_bench.experiments.experiment import difference, spread

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    training, test = load(0, 600)
    return training, Split(test.images[:400], test.labels[:400])


def trained(norm, training: Split) -> SmallCNN:
    torch.manual_seed(0)
    return train(SmallCNN(norm, 8), *training, epochs=10)


def test_recalibration_brings_a_calibrated_target_back(digits, caplog):
    """A batch norm whose statistics were lost reads as before; one that was no batch norm, in part."""
    caplog.set_level(logging.ERROR, "normzoo")
    back, lost = Rule("batch", "batch_norm", by="group_norm"), Rule("batch", "group_norm", {"num_groups": 4})
    network = trained(nn.BatchNorm2d, digits[0])
    claim, found = convert(network, back, *digits, 64)
    assert claim is Exactness.CALIBRATE and found["before"] > 80
    assert found["after"] < found["before"] - 40, "statistics of the start are those of no data"
    assert abs(found["recalibrated"] - found["before"]) < 8
    claim, found = convert(network, lost, *digits, 64)
    assert claim is Exactness.APPROXIMATE and found["after"] < found["before"] - 40
    assert "recalibrated" not in found, "there is nothing to recalibrate"
    claim, found = convert(network, Rule("batch", "evo_norm_b0"), *digits, 64)
    assert claim is Exactness.REINITIALISED and max(found["after"], found["recalibrated"]) < 40
    grouped = trained(lambda channels: nn.GroupNorm(4, channels), digits[0])
    claim, found = convert(grouped, Rule("group", "batch_norm"), *digits, 64)
    assert claim is Exactness.CALIBRATE
    assert found["after"] + 20 < found["recalibrated"] < found["before"]


def test_numbers(digits):
    training, test = digits
    torch.manual_seed(0)
    network = conversion_drift._NETWORKS["layer"](4)
    _, found = convert(network, Rule("layer", "rms_norm"), training, test, 64)
    with torch.no_grad():
        norms = [nn.RMSNorm(16, eps=1e-5) for _ in range(3)]
        other = nn.Sequential(*(norms.pop() if isinstance(m, nn.LayerNorm) else m for m in network))
        for i, first, second in ((3, "first block", ""), (None, "output", "cosine")):
            x, y = (nn.Sequential(*list(net)[:i])(test.images) for net in (network, other))
            assert found[first] == pytest.approx(100 * ((y - x).abs().max() / x.abs().max()).item(), rel=1e-3)
            if second:
                cosine = (x * y).sum() / (x.norm() * y.norm())
                assert found[second] == pytest.approx(cosine.item(), rel=1e-4)
    right = [(net(test.images).argmax(1) == test.labels).double().mean().item() for net in (network, other)]
    assert [found["before"], found["after"]] == [pytest.approx(100 * share) for share in right]
    assert drift(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 25


def test_batches_have_their_own_statistics_and_side_inputs():
    model = nn.Sequential(normzoo.RegionNormB(1), nn.Flatten())
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2) + torch.eye(2)
    halves = torch.cat([nn.BatchNorm2d(1)(half).flatten(1) for half in x.split(2)])
    torch.testing.assert_close(outputs(model, x, 2), halves, rtol=1e-4, atol=1e-5)


def rows() -> dict[tuple[str, str], dict]:
    document = json.loads((DOCS / "experiments" / "conversion_drift.json").read_text(encoding="utf-8"))
    return {(row["norm"], row["becomes"]): row for row in document["rows"]}


def test_every_rule_that_is_not_exact_is_measured():
    inexact = (Exactness.APPROXIMATE, Exactness.CALIBRATE, Exactness.REINITIALISED)
    asked = rules(EXPERIMENTS["conversion_drift"].settings.families)
    assert {(rule.norm, rule.becomes) for rule in asked} == rows().keys()
    for key, rule in TRANSFERS.items():
        if rule.exactness in inexact:
            assert rows()[key]["class"] == rule.exactness.value, key
            assert min(rows()[key]["values"]["output"]) >= 0 and min(rows()[key]["values"]["before"]) > 90


def test_words_on_conversions():
    page = " ".join((DOCS / "experiments.md").read_text(encoding="utf-8").split())

    def of(what: str, norm: str, becomes: str) -> list[float]:
        return rows()[norm, becomes]["values"][what]

    def gain(norm: str, becomes: str, since: str = "after") -> list[float]:
        pair = zip(of("recalibrated", norm, becomes), of(since, norm, becomes), strict=True)
        return [after - before for after, before in pair]

    def three(norm: str, becomes: str) -> list[str]:
        return [spread(of(what, norm, becomes)) for what in ("after", "recalibrated", "before")]

    way = ("batch", "group_norm, then batch_norm")
    after, again, before = three(*way)
    assert max(map(abs, gain(*way, since="before"))) < 0.5 and min(gain(*way)) > 50
    assert f"reads {after} per cent, and {again} after `recalibrate`, against {before} before" in page
    for norm, becomes, said in (
        ("group", "batch_norm", "A group norm that becomes a batch norm goes from {} to {}, of {};"),
        ("instance", "batch_norm", "an instance norm from {} to {}, of {};"),
        ("convolution", "weight_standardize", "convolutions with standardized weights, from {} to {}, of {}."),
    ):
        assert said.format(*three(norm, becomes)) in page
        assert min(gain(norm, becomes)) > 5 and max(gain(norm, becomes, "before")) < 0

    unified = gain("layer", "unified_norm")
    assert f"from layer norm, gains nothing by it ({difference(unified)}" in page
    assert statistics.mean(unified) < 0
    lost = [spread(of("after", "batch", target)) for target in ("group_norm", "instance_norm")]
    assert f"a batch norm that becomes a group norm stays at {lost[0]}, an instance norm at {lost[1]}" in page
    evo = [spread(of(what, "batch", "evo_norm_b0")) for what in ("after", "recalibrated")]
    assert f"EvoNorm-B0 reads {evo[0]} and {evo[1]}" in page
    standardized, root = of("output", "convolution", "weight_standardize"), of("output", "layer", "rms_norm")
    right = [spread(of(what, "layer", "rms_norm")) for what in ("before", "after")]
    drifted = f"moves logits by {statistics.mean(root):.0f} per cent of the largest, and {right[1]} are right"
    assert f"{drifted} against {right[0]}" in page and min(standardized) > 1000
