"""How many launches a training step takes: every layer is held to its limit, the count to the truth."""

from __future__ import annotations

import collections
import json

import pytest
import torch

pytest.importorskip("triton")

import normzoo
from normzoo.zoo import ZOO, find
from normzoo_bench import launches
from normzoo_bench.launches import Step, counted, main, steps


@pytest.mark.parametrize("step", [pytest.param(s, id=s.name) for s in steps(ZOO)])
def test_limits(step: Step):
    for found, most in zip(step.count(), step.limit, strict=True):
        assert 0 < found.total <= most, str(found)


def test_limits_are_those_that_were_promised():
    limits = {step.name: step.limit for step in steps(ZOO)}
    few = {name for name, limit in limits.items() if limit == (4, 4)}
    rows = {name for name, limit in limits.items() if limit == (1, 2)}
    assert few == {"batch_norm", "group_norm", "instance_norm", "power_norm"}
    assert {"add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm", "crms_norm"} < rows
    assert not any("time" in name for name in rows)
    assert {limit for name, limit in limits.items() if name not in few | rows} == {(12, 12)}


def test_everything_is_counted():
    layer, x = normzoo.AlphaBatchNorm(64), torch.zeros(2, 64, 184, 184)

    def dearer(x):
        return (layer(2 * x) + 1).relu().view(-1)[1:].contiguous()

    ways = [counted(call, x, [*layer.parameters()]) for call in (layer, dearer)]
    assert all(before.kernels == after.kernels for before, after in zip(*ways, strict=True))
    more = [after.operators - before.operators for before, after in zip(*ways, strict=True)]
    assert {"mul", "add", "relu"} <= set(more[0]) and {"mul", "threshold_backward"} <= set(more[1])


def test_parts_are_merged():
    for name, kernel in (("evo_norm_s0", "merge_moments"), ("region_norm_b", "merge_regions")):
        forward, backward = Step(find(name)).count()
        assert forward.kernels[kernel] == 1, str(forward)
        assert any(name.startswith("merge") for name in backward.kernels), str(backward)


def test_copies_inside_of_a_launcher_are_counted():
    layer = normzoo.RMSNorm(1024)
    strange = torch.zeros(64, 2, 1024).transpose(0, 2)[:, :, ::2].transpose(0, 2)[:, :1]
    forward, _ = counted(layer, torch.zeros(64, 2048)[:, ::2].unsqueeze(1), [*layer.parameters()])
    plain, _ = counted(layer, strange.contiguous(), [*layer.parameters()])
    assert forward.operators.total() > plain.operators.total()


def test_the_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "launches.json"
    assert main(["alpha_batch_norm", "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    command = "python -m normzoo_bench.launches alpha_batch_norm --output"
    assert document["settings"]["command"].startswith(command)
    row = document["rows"][0]
    assert row["layer"] == "alpha_batch_norm" and row["limit"] == [12, 12]
    assert row["forward"]["launches"] == sum(row["forward"]["kernels"].values()) == 4
    assert "4 of 12" in capsys.readouterr().out
    monkeypatch.setattr(launches, "MOST", (3, 12))
    assert main(["alpha_batch_norm"]) == 1
    assert "alpha_batch_norm: 4 > 3: channel_map" in capsys.readouterr().err
    assert main(["no_norm"]) == 2 and main(["frozen_batch_norm"]) == 2


def test_a_count_names_what_runs():
    found = launches.Counted(collections.Counter(a=2), collections.Counter(b=1))
    assert str(found) == "2 a, b" and found.total == 3
