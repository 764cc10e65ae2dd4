"""The experiments run and repeat, and what the page says of them holds for the numbers beside it."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normzoo_bench.experiments import adab2n_forgetting, digits, experiment
from normzoo_bench.experiments.__main__ import main
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import difference, markdown, measure, spread, values

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMITTED = DOCS / "experiments"
NAMES = list(EXPERIMENTS)


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


@pytest.mark.parametrize("name", NAMES)
def test_quick_run(quick, name):
    document = load(quick, name)
    assert document["experiment"] == name and document["quick"] and document["environment"]["threads"] == 1
    assert document["settings"] == json.loads(json.dumps(dataclasses.asdict(EXPERIMENTS[name].quick)))
    counts = {len(seeds) for row in document["rows"] for seeds in row["values"].values()}
    assert counts == {2}
    assert (quick / f"{name}.md").read_text(encoding="utf-8") == markdown(document, EXPERIMENTS[name])
    drawn = (quick / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and drawn == EXPERIMENTS[name].draw(document)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
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
    cell = spread(values(document, "accuracy", batch=2, norm="BN"))
    assert re.search(rf"^2 +BN +{re.escape(cell)} ", out, re.M) and "over 2 seeds" in out and not err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["alpha"],
            "there is no experiment 'alpha'; there are alpha-digits, bcn-micro-batch, adab2n-forgetting",
        ),
        (["alpha-digits", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
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


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_what_was_measured(name, page):
    document, here = load(COMMITTED, name), EXPERIMENTS[name]
    again = (
        f"run `python -m normzoo_bench.experiments {name} --output docs/experiments` and read the page again"
    )
    assert document["form"] == experiment.FORM and not document["quick"], again
    assert document["settings"] == json.loads(json.dumps(dataclasses.asdict(here.settings))), again
    assert document["environment"]["changed"] is False, "measured with files that are in no commit"
    seeds = document["settings"]["seeds"]
    assert seeds >= 5
    assert {len(found) for row in document["rows"] for found in row["values"].values()} == {seeds}
    assert (COMMITTED / f"{name}.md").read_text(encoding="utf-8") == markdown(document, here)
    texts = [
        re.findall(r">([^<>\n]+)</t", drawn)
        for drawn in ((COMMITTED / f"{name}.svg").read_text(encoding="utf-8"), here.draw(document))
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 10
    assert f"{{include}} experiments/{name}.md" in page and f"](experiments/{name}.svg)" in page


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join((DOCS / "experiments.md").read_text(encoding="utf-8").split())


def below(first: list[float], second: list[float]) -> bool:
    """In every seed."""
    return all(a < b for a, b in zip(first, second, strict=True))


def test_words_on_alpha(page):
    document = load(COMMITTED, "alpha-digits")

    def right(order: str, batch: int, weight: float, images: str = "corrupted") -> list[float]:
        return values(document, images, order=order, batch=batch, source_weight=weight)

    small = {weight: right("iid", 4, weight) for weight in (0, 0.2, 1)}
    assert below(small[0], small[0.2]) and below(small[1], small[0.2])
    batch, mixed, source = (spread(small[weight]) for weight in (0, 0.2, 1))
    assert f"of 0.2 gives {mixed} per cent, against {batch} for the batch alone and {source} for the" in page
    rows = {weight: right("sorted by class", 4, weight) for weight in (0, 0.5, 1)}
    assert below(rows[0], rows[0.5]) and below(rows[1], rows[0.5])
    assert f"0.5 gives {spread(rows[0.5])}, against {spread(rows[0])} and {spread(rows[1])}." in page
    gains = [a - b for a, b in zip(rows[0.5], rows[1], strict=True)]
    assert f"the last by {min(gains):.1f} points at least and {max(gains):.1f} at most." in page

    large = {weight: right("iid", 64, weight) for weight in document["settings"]["source_weights"]}
    assert max(map(statistics.mean, large.values())) == statistics.mean(large[0])
    assert f"{spread(large[0])} against {spread(large[0.2])} at 0.2" in page
    clean = [spread(right("sorted by class", 4, weight, "clean")) for weight in (1, 0.5)]
    assert f"clean ones in sorted batches of 4 fall from {clean[0]} to {clean[1]}." in page
    for order in ("iid", "sorted by class"):
        for batch in (4, 16, 64):
            means = [statistics.mean(right(order, batch, w, "clean")) for w in (0, 0.2, 0.5, 0.7, 0.9, 1)]
            assert means[-1] > max(means) - 0.05, "clean images are read best by stored statistics"


def test_table_on_the_page_of_adaptation():
    document = load(COMMITTED, "alpha-digits")
    text = (DOCS / "adapt.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| batches of (\d+), (shuffled|sorted by class) \| (.*) \|$", text, re.M)
    assert len(lines) == 4
    for batch, order, cells in lines:
        tried = {"order": order.replace("shuffled", "iid"), "batch": int(batch)}
        weights = (1, 0.9, 0.7, 0.5, 0.2, 0)
        means = [statistics.mean(values(document, "corrupted", **tried, source_weight=w)) for w in weights]
        shown = [f"{mean:.1f}" if mean < max(means) else f"**{mean:.1f}**" for mean in means]
        assert cells.split(" | ") == shown
    sorted_by_class = {"order": "sorted by class", "batch": 64}
    clean = [
        statistics.mean(values(document, "clean", **sorted_by_class, source_weight=w)) for w in (1, 0.5, 0)
    ]
    said = "{:.1f} % are right with the source alone, {:.1f} % with 0.5 and {:.1f} % with the batch alone."
    assert said.format(*clean) in " ".join(text.split())


def test_stored_statistics_alone_know_no_batches():
    document = load(COMMITTED, "alpha-digits")
    rows = [row["values"] for row in document["rows"] if row["source_weight"] == 1]
    assert len(rows) == 6 and all(row == rows[0] for row in rows)
    corruptions = [rows[0][name] for name in digits.CORRUPTIONS]
    assert rows[0]["corrupted"] == pytest.approx(
        [sum(of) / 4 for of in zip(*corruptions, strict=True)], abs=1e-3
    )


def test_words_on_batch_channel_norm(page):
    document = load(COMMITTED, "bcn-micro-batch")
    small, large = (
        {row["norm"]: row["values"]["accuracy"] for row in document["rows"] if row["batch"] == batch}
        for batch in (2, 32)
    )
    worst = min(small.pop("BCN, estimate"))
    bn, gn, bcn = (max(small.pop(name)) for name in ("BN", "GN", "BCN, batch"))
    assert not small and worst > max(bn, gn, bcn)
    others = f"{bn:.1f} for BN, {bcn:.1f} for BCN in batch mode, {gn:.1f} for GN."
    assert f"Its worst seed, {worst:.1f}, is above the best of each of the others: {others}" in page
    estimate = large["BCN, estimate"]
    ahead = f"BN ({spread(large['BN'])}) and BCN in batch mode ({spread(large['BCN, batch'])}) are ahead of it"
    assert f"{ahead} ({spread(estimate)})" in page
    assert below(estimate, large["BN"]) and below(estimate, large["BCN, batch"])


def test_words_on_adab2n(page):
    document = load(COMMITTED, "adab2n-forgetting")

    def more(what: str, images: str, norm: str, head: str = "pooled") -> list[list[float]]:
        """The differences from BN, for each rate."""
        tried = {"images": images, "norm": norm, "head": head}
        return [
            row["values"][f"{what}, more than BN"] for row in document["rows"] if row.items() >= tried.items()
        ]

    def sure(found: list[float]) -> bool:
        return abs(statistics.mean(found)) > 2 * (experiment.standard_error(found) or 0)

    strong, weak, slow = "AdaB2N, init_weight 3", "AdaB2N", "AdaB2N, init_weight 3, kappa 0.8"
    shifted, plain = (more("forgetting", images, strong) for images in ("shifted", "plain"))
    gained = more("accuracy", "plain", strong)
    less = (
        "Under the shift by {} points at a rate of 0.03 and {} at 0.1; on plain digits by less, {} and {}, and"
    )
    assert less.format(*map(difference, shifted + plain)) in page
    assert f"accuracy is higher, too, by {difference(gained[0])} and {difference(gained[1])}." in page
    assert all(map(sure, shifted + plain + gained)) and all(statistics.mean(found) > 0 for found in gained)
    pairs = zip(shifted, plain, strict=True)
    assert all(statistics.mean(a) < statistics.mean(b) < 0 for a, b in pairs)

    unsure = more("accuracy", "shifted", strong)
    assert f"under the shift, {difference(unsure[0])} and {difference(unsure[1])}, which is within two" in page
    assert not any(map(sure, unsure))
    flat = [
        found
        for images in ("shifted", "plain")
        for norm in (strong, weak, slow)
        for found in more("forgetting", images, norm, "flat")
    ]
    assert len(flat) == 6 and not any(map(sure, flat))
    assert f"in forgetting is {max(abs(statistics.mean(found)) for found in flat):.1f} points at most" in page
    of_bn = values(document, "forgetting", images="shifted", head="flat", norm="BN")
    assert f"little there ({spread(of_bn)} under the shift)" in page
    default = more("forgetting", "shifted", weak)
    assert f"its {difference(default[0])} and {difference(default[1])} are less than half" in page
    assert all(
        abs(statistics.mean(a)) < abs(statistics.mean(b)) / 2 for a, b in zip(default, shifted, strict=True)
    )
    pairs = zip(more("forgetting", "shifted", slow), shifted, strict=True)
    assert all(statistics.mean(a) > statistics.mean(b) for a, b in pairs)
