"""The second part of the demonstration: what alpha-BN makes of corrupted digits, and how that is shown."""

import base64
import dataclasses
import html.parser
import io
import json
import sys

import pytest
import torch

import normzoo
from normzoo import adapt, cli, demo
from normzoo.demo import charts, images, language_model, page, pictures, printed
from normzoo.demo.settings import QUICK
from normzoo_bench.experiments import digits

pytest.importorskip("sklearn")

FEW = dataclasses.replace(QUICK, test_images=100, source_weights=(1, 0.3, 0))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def held_out():
    return digits.load(QUICK.seed)[1]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(QUICK.seed)
    return digits.train(
        digits.SmallCNN(), *digits.load(QUICK.seed)[0], seed=QUICK.seed, epochs=QUICK.epochs
    )  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return images.study(QUICK)


@pytest.fixture
def short(monkeypatch):
    """The first part of the demonstration, of which little is asked here, takes no time."""
    text = torch.randint(language_model.ALPHABET, (1000,))
    about = {"files": 1, "characters": 1000, "bits_by_frequency": 7.0}
    spread = {"p20": 1.0, "median": 1.0, "p80": 1.0}
    names = {"layer": "RMSNorm", "dtype": "float32", "pass": "forward"}
    timings = [names | dict.fromkeys(("torch_ms", "normzoo_ms", "speedup"), spread)]
    monkeypatch.setattr(demo, "read_text", lambda *_: (text, text, about))
    monkeypatch.setattr(demo, "time_rows", lambda _: timings)


@pytest.fixture
def result(short, monkeypatch, found):
    monkeypatch.setattr(images, "study", lambda settings: found)
    return demo.run(quick=True, quiet=True)


def corrupted(split, count):
    chance = torch.Generator().manual_seed(QUICK.seed)
    return {name: corrupt(split.images[:count], chance) for name, corrupt in digits.CORRUPTIONS.items()}


def test_the_accuracies_are_those_of_layers_put_in_by_hand(found, trained, held_out):
    labels = held_out.labels[:200]
    given = corrupted(held_out, 200) | {"clean": held_out.images[:200]}
    assert list(found["right"]) == list(given) and found["source_weights"] == [1, 0.5, 0.3, 0.2, 0]
    for name, x in given.items():
        assert found["right"][name][0] == digits.accuracy(trained, x, labels, 4)
    for i, source_weight in ((3, 0.2), (4, 0.0)):
        by_hand = torch.nn.Sequential(
            *(
                normzoo.AlphaBatchNorm.from_batch_norm(m, source_weight)
                if isinstance(m, torch.nn.BatchNorm2d)
                else m
                for m in trained
            )
        )
        for name in ("noise", "blur"):
            assert found["right"][name][i] == digits.accuracy(by_hand, given[name], labels, 4)
    for i, mean in enumerate(found["means"]):
        assert mean == pytest.approx(sum(found["right"][name][i] for name in digits.CORRUPTIONS) / 4)


def test_the_best_lies_between_and_beats_both_ends(found):
    first, best, last = found["shown"]
    means = found["means"]
    assert (first, last) == (0, len(means) - 1) and means[best] == max(means[1:-1])
    assert found["passed"] and found["replaced"] == found["norms"] == 3 and found["difference"] == 0
    assert means[best] > means[last] + 1 > means[first] + 20
    assert (found["learnt"], found["tested"], found["batch"]) == (1000, 200, 4)


def test_it_repeats_and_leaves_the_threads_alone():
    tiny = dataclasses.replace(FEW, epochs=1, test_images=9)
    threads = torch.get_num_threads()
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(images.study(tiny))
    assert made[0] == made[1] and torch.get_num_threads() == threads
    assert images.study(dataclasses.replace(tiny, seed=1)) != made[0]


def planted(monkeypatch, fault):
    right = adapt.configure
    if fault == "the batch is ignored":
        monkeypatch.setattr(adapt, "configure", lambda model, source_weight: right(model, source_weight=1))
    elif fault == "the other side is weighed":
        monkeypatch.setattr(
            adapt, "configure", lambda model, source_weight: right(model, source_weight=1 - source_weight)
        )
    elif fault == "nothing is replaced":
        monkeypatch.setattr(adapt, "configure", lambda model, source_weight: model)
    elif fault in ("a norm is left out", "a norm is changed"):

        def configure(model, source_weight):
            first = model[1]
            made = right(model, source_weight=source_weight)
            if fault == "a norm is left out":
                made[1] = first
            else:
                made[1].eps = 1e-3
            return made

        monkeypatch.setattr(adapt, "configure", configure)
    elif fault == "nothing is corrupted":
        for name in digits.CORRUPTIONS:
            monkeypatch.setitem(digits.CORRUPTIONS, name, lambda x, _: x)


@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "the batch is ignored",
        "the other side is weighed",
        "nothing is replaced",
        "a norm is left out",
        "a norm is changed",
        "nothing is corrupted",
    ],
)
def test_it_can_fail(monkeypatch, trained, held_out, fault):
    few = digits.Split(*(part[: FEW.test_images] for part in held_out))
    planted(monkeypatch, fault)
    assert images.calibrate(trained, few, FEW)["passed"] == (fault == "none")


def test_a_failure_is_told(capsys, monkeypatch, short, found, tmp_path):
    failed = found | {"passed": False, "difference": 0.5}
    monkeypatch.setattr(images, "study", lambda settings: failed)
    assert cli.main(["demo", "--quick"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "logits, loss and gradients stayed the same" in words
    assert (
        "FAILED: adapt.configure replaced 3 of 3 batch norms; source weight 1 changed the logits by 5.0e-01"
        in words
    )
    written = (tmp_path / "normzoo-demo.html").read_text(encoding="utf-8")
    assert 'class="verdict failed"' in written and "FAILED: adapt.configure replaced" in written


def test_without_scikit_learn(capsys, monkeypatch, short, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] is None and found["passed"]
    assert " ".join(printed.verdict(found, QUICK)).endswith(printed.MISSING)
    printed.images(found)
    assert " ".join(capsys.readouterr().out.split()) == printed.MISSING
    written = (tmp_path / "normzoo-demo.html").read_text(encoding="utf-8")
    assert f"<p>{printed.MISSING}</p>" in written and "<img" not in written


class Tables(html.parser.HTMLParser):
    """The tables of a page, as rows of cells: text, or the attributes of a picture."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.tables[-1][-1][-1] = dict(attrs)

        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside and data.strip():
            self.tables[-1][-1][-1] += data.strip()


def in_page(result):
    tables = Tables(page.html(result, QUICK).partition("Corrupted images")[2]).tables
    return tables[0], tables[1]


def test_the_report_has_the_accuracies(result, found):
    beside, every = in_page(result)
    chosen = [f"{found['source_weights'][i]:g}" for i in found["shown"]]
    assert beside[0] == ["corruption", "clean, corrupted", *chosen]
    rows = {row[0]: row[-3:] for row in beside[1:]}
    assert list(rows) == [*digits.CORRUPTIONS, "mean of corrupted", "clean"]
    for name, values in (found["right"] | {"mean of corrupted": found["means"]}).items():
        assert rows[name] == [f"{values[i]:.1f}" for i in found["shown"]]
    assert every[0] == ["source weight", *digits.CORRUPTIONS, "mean of these", "clean"]
    columns = [found["source_weights"], *(found["right"][name] for name in digits.CORRUPTIONS)]
    columns += [found["means"], found["right"]["clean"]]
    assert [[float(cell) for cell in row] for row in every[1:]] == [
        [round(value, 1) for value in row] for row in zip(*columns, strict=True)
    ]


def test_the_pictures_are_the_images(result, held_out):
    read = pytest.importorskip("matplotlib.image").imread
    beside, _ = in_page(result)
    for i, (name, given) in enumerate(corrupted(held_out, 200).items()):
        row = beside[1 + i]
        assert row[0] == name and str(int(held_out.labels[i])) in row[1]["alt"] and name in row[2]["alt"]
        for cell, image in ((row[1], held_out.images[i, 0]), (row[2], given[i, 0])):
            data = base64.b64decode(cell["src"].removeprefix("data:image/png;base64,"), validate=True)
            shown = torch.from_numpy(read(io.BytesIO(data), format="png")) * 2 - 0.5
            assert shown.shape == (8, 8)
            torch.testing.assert_close(shown, image.clamp(pictures.BLACK, pictures.WHITE), rtol=0, atol=0.0041)


def test_a_picture_that_is_not_square():
    read = pytest.importorskip("matplotlib.image").imread
    image = torch.tensor([[-0.5, 0.5, 1.5], [-9.0, 0.0, 9.0]])
    data = base64.b64decode(pictures.data_uri(image).partition(",")[2])
    assert (read(io.BytesIO(data), format="png") * 255).round().tolist() == [[0, 128, 255], [0, 64, 255]]


def test_the_chart_shows_the_numbers(found):
    pytest.importorskip("matplotlib")
    drawn = charts.accuracy_curves(found)
    assert all(word in drawn for word in (*found["right"], "mean of corrupted", "per cent right"))
    assert charts.accuracy_curves(found) == drawn
    for name in found["right"]:
        less = found["right"] | {name: [value / 2 for value in found["right"][name]]}
        assert charts.accuracy_curves(found | {"right": less}) != drawn
    assert charts.accuracy_curves(found | {"means": [value / 2 for value in found["means"]]}) != drawn
    assert charts.accuracy_curves(found | {"shown": [0, 1, 4]}) != drawn


def test_the_printed_table(capsys, found):
    printed.images({"images": found})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line[:1].isdigit()]
    assert [float(row[0]) for row in rows] == found["source_weights"]
    assert [float(row[2]) for row in rows] == [round(value, 1) for value in found["right"]["contrast"]]
