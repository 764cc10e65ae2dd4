"""The experiments: their parts, that they run and repeat, and their command."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from normzoo import AdaB2N, BatchChannelNorm, WSConv2d
from normzoo.continual import tasks
from normzoo_bench.experiments import adab2n_forgetting, bcn_micro_batch, digits, experiment
from normzoo_bench.experiments.__main__ import main
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import difference, markdown, measure, spread, values

NAMES = list(EXPERIMENTS)
SEEDED = [name for name in NAMES if hasattr(EXPERIMENTS[name].settings, "seeds")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """A folder with what a quick run of each writes."""
    folder = tmp_path_factory.mktemp("quick")
    for name in NAMES:
        assert main([name, "--quick", "--output", str(folder)]) == 0
    return folder


def load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_digits():
    training, held_out = digits.load(3)
    assert training.images.shape == (1000, 1, 8, 8) and held_out.images.shape == (797, 1, 8, 8)
    assert training.images.dtype == torch.float32 and training.labels.dtype == torch.int64
    both = torch.cat([training.images, held_out.images])
    assert both.aminmax() == (0, 1) and len(both.flatten(1).unique(dim=0)) == len(both)
    assert torch.equal(digits.load(3)[1].images, held_out.images)
    assert not torch.equal(digits.load(4)[1].images, held_out.images)


def test_corruptions():
    images = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seeded = torch.Generator().manual_seed
    shown = {name: corrupt(images, seeded(1)) for name, corrupt in digits.CORRUPTIONS.items()}
    assert all(x.shape == images.shape and x.dtype == images.dtype for x in shown.values())
    assert torch.equal(shown["noise"], digits.noise(images, seeded(1)))
    assert not torch.equal(shown["noise"], digits.noise(images, seeded(2)))
    assert (shown["noise"] - images).std().item() == pytest.approx(0.3, rel=0.02)
    torch.testing.assert_close(shown["contrast"], 0.3 + 0.4 * images)
    torch.testing.assert_close(shown["brightness"], images + 0.5)
    torch.testing.assert_close(shown["blur"][:, :, 3, 4], images[:, :, 2:5, 3:6].mean((2, 3)))
    corner = images[:, :, :2, :2] * torch.tensor([[4, 2], [2, 1]]) / 9
    torch.testing.assert_close(shown["blur"][:, :, 0, 0], corner.sum((2, 3)))


def test_network_and_training():
    training, held_out = digits.load()

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(0)
        return digits.train(digits.SmallCNN(), *training, seed=seed, epochs=4)

    model, again, other = trained(0), trained(0), trained(1)
    assert not model.training and digits.accuracy(model, *held_out) > 90
    assert torch.equal(model[0].weight, again[0].weight) and not torch.equal(model[0].weight, other[0].weight)
    grouped = digits.SmallCNN(lambda channels: nn.GroupNorm(4, channels), width=8)
    assert [m.num_channels for m in grouped if isinstance(m, nn.GroupNorm)] == [8, 16, 16]
    assert grouped(held_out.images[:3]).shape == (3, 10)


def test_accuracy_in_batches_and_order():
    seen = []

    class Echo(nn.Module):
        """Right about all digits but the 3."""

        def forward(self, images):
            seen.append(images.flatten().tolist())
            return nn.functional.one_hot(images.flatten().long() % 10, 10) * (images.flatten() != 3)[:, None]

    labels = torch.tensor([5, 3, 0, 9, 3])
    images = labels.float().view(5, 1, 1, 1)
    assert digits.accuracy(Echo(), images, labels, batch_size=2) == 60
    assert seen == [[5, 3], [0, 9], [3]]
    seen.clear()
    assert digits.accuracy(Echo(), images, labels, 3, labels.argsort(stable=True)) == 60
    assert seen == [[0, 3, 3], [5, 9]]


def test_reservoir_gives_each_the_same_chance():
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(40)
    for _ in range(400):
        memory = _full(adab2n_forgetting.Reservoir(10, generator), 40)
        kept[torch.stack(memory.labels)] += 1
    # 400 draws of probability 1/4: 100 with a standard deviation of 8.7.
    assert kept.sum() == 4000 and kept.min() > 70 and kept.max() < 130


def test_reservoir_keeps_and_draws():
    memory = _full(adab2n_forgetting.Reservoir(10, torch.Generator().manual_seed(0)), 40)
    assert len(memory.labels) == 10 and memory.labels == memory.images
    assert len(memory.draw(4).labels.unique()) == 4 and len(memory.draw(99).labels) == 10


def _full(memory: adab2n_forgetting.Reservoir, count: int) -> adab2n_forgetting.Reservoir:
    for part in torch.arange(count).split(7):
        memory.put(part, part)
    return memory


def test_tasks_and_forgetting():
    split = digits.Split(torch.arange(10.0).view(10, 1, 1, 1) / 10, torch.arange(10))
    plain, shifted = (adab2n_forgetting._of_tasks(split, 5, flag) for flag in (False, True))
    assert [task.labels.tolist() for task in plain] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert plain[3].images.flatten().tolist() == pytest.approx([0.6, 0.7])
    assert shifted[0].images.flatten().tolist() == pytest.approx([-0.8, 0.1 * 1.6 - 0.8])
    assert shifted[4].images.flatten().tolist() == pytest.approx([0.8 * 0.4 + 0.8, 0.9 * 0.4 + 0.8])
    after = [[90.0, 0.0, 0.0], [95.0, 80.0, 0.0], [50.0, 70.0, 99.0]]
    assert adab2n_forgetting._forgetting(after) == (45 + 10) / 2


def test_new_and_replayed_images_go_together(monkeypatch):
    """In a step with replay the layers get 20 images at once, and the task of each."""
    batches, ids = [], []
    settings = adab2n_forgetting.Settings(training=400, tasks=3, width=4)
    parts = [adab2n_forgetting._of_tasks(split, 3, False) for split in digits.load(0, settings.training)]
    model = adab2n_forgetting._network(partial(AdaB2N, num_tasks=3), settings.width, "pooled")
    model[0].register_forward_pre_hook(lambda module, x: batches.append(len(x[0])) if model.training else None)

    def recorded(of: nn.Module, task_ids: torch.Tensor):
        ids.append(task_ids.tolist())
        return tasks(of, task_ids)

    monkeypatch.setattr(adab2n_forgetting, "tasks", recorded)
    after = adab2n_forgetting._learnt(model, *parts, settings, 0.03, 0)
    counts = [len(part.labels) for part in parts[0]]
    steps = [min(10, count - i) for count in counts for i in range(0, count, 10)]
    assert batches == [10, *(new + 10 for new in steps[1:])] == list(map(len, ids))
    in_first, in_last = ids[: counts[0] // 10], ids[-1]
    assert {task for of_step in in_first for task in of_step} == {0}
    assert set(in_last[: steps[-1]]) == {2} and {0, 1} <= {task for of_step in ids[-5:] for task in of_step}
    assert [len(row) for row in after] == [3, 3, 3]
    assert all(layer.cur_tasks == 3 for layer in model.modules() if isinstance(layer, AdaB2N))


def test_micro_batch_networks():
    settings = bcn_micro_batch.Settings()
    made = {name: norm(16) for name, norm in bcn_micro_batch._norms(settings).items()}
    assert isinstance(made["BN"], nn.BatchNorm2d) and isinstance(made["GN"], nn.GroupNorm)
    assert made["GN"].num_groups == made["BCN, batch"].num_groups == made["BCN, estimate"].num_groups == 4
    assert not made["BCN, batch"].estimate
    assert made["BCN, estimate"].estimate and made["BCN, estimate"].update_rate == 0.02
    shapes: list[torch.Size] = []
    networks = []
    for weights, layer in {"plain": nn.Conv2d, "WS": WSConv2d}.items():
        torch.manual_seed(0)
        network = bcn_micro_batch._network(bcn_micro_batch._norms(settings)["BN"], 16, weights)
        assert {type(m) for m in network if isinstance(m, nn.Conv2d)} == {layer}
        networks.append(network)
    plain, standardized = networks
    for norm in (module for module in plain if isinstance(module, nn.BatchNorm2d)):
        norm.register_forward_pre_hook(lambda module, x: shapes.append(x[0].shape))
    x = torch.rand(2, 1, 8, 8)
    assert plain(x).shape == (2, 10) and not torch.equal(plain(x), standardized(x))
    assert [shape[2] for shape in shapes[:6]] == [8, 4, 4, 2, 2, 1], "two values a channel at the end"
    assert all(map(torch.equal, plain.parameters(), standardized.parameters()))


def test_estimate_alone_is_the_first_stage_of_batch_channel_norm():
    generator = torch.Generator().manual_seed(0)
    alone = bcn_micro_batch.EstimatedBatchNorm(4, momentum=0.1)
    both = BatchChannelNorm(4, 2, estimate=True, update_rate=0.1)
    for step in range(4):
        x = (torch.randn(3, 4, 2, 2, generator=generator) * 3 + 1).requires_grad_()
        grad = torch.randn(x.shape, generator=generator)
        after = nn.functional.group_norm(alone(x), 2)
        expected = both(x)
        torch.testing.assert_close(after, expected, msg=f"step {step}")
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (after, expected)]
        torch.testing.assert_close(*gradients, msg=f"gradient of step {step}")
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(alone.get_buffer(name), both.get_buffer(name))
    alone, both, x = alone.eval(), both.eval(), torch.randn(3, 4, 2, 2, generator=generator)
    torch.testing.assert_close(nn.functional.group_norm(alone(x), 2), both(x))


def test_order_is_that_of_the_batches(quick):
    document = load(quick, "alpha-digits")
    tried = {"batch": 4, "source_weight": 0}
    iid, in_order = (values(document, "clean", order=order, **tried) for order in ("iid", "sorted by class"))
    assert all(a < b for a, b in zip(in_order, iid, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(quick, name):
    document = load(quick, name)
    assert document["experiment"] == name and document["quick"] and document["environment"]["threads"] == 1
    assert document["settings"] == json.loads(json.dumps(dataclasses.asdict(EXPERIMENTS[name].quick)))
    counts = {len(seeds) for row in document["rows"] for seeds in row["values"].values()}
    assert counts == {2 if name in SEEDED else 1}
    assert (quick / f"{name}.md").read_text(encoding="utf-8") == markdown(document, EXPERIMENTS[name])
    drawn = (quick / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and drawn == EXPERIMENTS[name].draw(document)
    painted = quick / f"{name}.png"
    assert painted.exists() == (EXPERIMENTS[name].paint is not None)
    assert not painted.exists() or painted.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_gives_the_same_numbers_again(quick, name, two_threads):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = measure(EXPERIMENTS[name], seeds=1, quick=True)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    first = load(quick, name)["rows"]
    assert [row["values"] for row in again["rows"]] == [
        {number: seeds[:1] for number, seeds in row["values"].items()} for row in first
    ]
    assert any(seeds[0] != seeds[1] for row in first for seeds in row["values"].values())
    assert f"{name} --quick --seeds 1\n" in markdown(again, EXPERIMENTS[name]) and EXPERIMENTS[name].draw(again)


def test_what_is_printed(capsys, quick, monkeypatch):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\w", listed, re.M) for name in NAMES)
    document = load(quick, "bcn-micro-batch")
    stub = lambda asked, seeds, fast: document if (seeds, fast) == (3, True) else None  # noqa: E731
    monkeypatch.setattr(sys.modules[main.__module__], "measure", stub)
    assert main(["bcn-micro-batch", "--quick", "--seeds", "3"]) == 0
    out, err = capsys.readouterr()
    cell = spread(values(document, "accuracy", batch=2, norm="BN", weights="WS"))
    assert re.search(rf"^2 +BN +WS +{re.escape(cell)} ", out, re.M) and "over 2 seeds" in out and not err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["alpha"],
            "there is no experiment 'alpha'; there are alpha-digits, bcn-micro-batch, adab2n-forgetting, "
            "power_norm, region_norm, nap_plasticity",
        ),
        (["alpha-digits", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["region_norm", "--seeds", "2"], "--seeds is given, but nothing is random in region_norm; leave it"),
        (["alpha-digits", "--output", "/nowhere"], "there is no folder /nowhere; make it first"),
    ],
)
def test_wrong_usage(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_without_scikit_learn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="come with scikit-learn, which is not installed; try `pip"):
        digits.load()
    monkeypatch.setattr(sys.modules[main.__module__], "find_spec", lambda name: None)
    assert main(["alpha-digits"]) == 2
    assert "try `pip install scikit-learn`" in capsys.readouterr().err


def test_means_and_spreads():
    assert spread([1.0, 3.0]) == "2.0 ± 1.4" and spread([2.04]) == "2.0"
    assert difference([-1.0, -3.0]) == "−2.0 ± 1.0" and difference([2.0]) == "+2.0"
    assert difference([-0.04]) == "+0.0"
    assert experiment.standard_error([0.0, 0.0]) == 0 and experiment.standard_error([1.0]) is None
