"""The demonstration in its quick form: what it finds, prints and writes."""

import builtins
import copy
import html.parser
import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import normzoo
from normzoo import cli, demo
from normzoo.demo import charts, language_model, measurements, page, printed
from normzoo.demo.settings import QUICK, Settings
from normzoo_bench import figures


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """One run for all tests: what it found, printed and wrote, and the state of random numbers around it."""
    folder, run, found = tmp_path_factory.mktemp("demo"), demo.run, []
    out, err, state = io.StringIO(), io.StringIO(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(demo, "run", lambda **options: found.append(run(**options)) or found[0])
        assert cli.main(["demo", "--quick", "--json"]) == 0
    return found[0], out.getvalue(), err.getvalue(), folder, (state, torch.get_rng_state())


@pytest.fixture
def result(by_command):
    return copy.deepcopy(by_command[0])


def test_json(by_command):
    result, out, err, folder, (before, after) = by_command
    found = json.loads(out)
    assert found == json.loads(json.dumps(result))
    assert found["passed"] and "training: 20/20" in err
    assert found["environment"]["torch"] == torch.__version__
    assert [step for step, _ in found["curve"]] == list(range(1, 21))
    assert found["curve"][-1][1] < found["curve"][0][1]
    conversion = found["conversion"]
    assert conversion["replaced"] == conversion["norms"] == 5
    assert conversion["difference"] == 0 and conversion["bits_before"] == conversion["bits_after"]
    assert conversion["proof"]["same"] and conversion["proof"]["exact"]
    approximate = found["approximate"]
    assert not approximate["proof"]["same"] and approximate["bits_after"] != conversion["bits_before"]
    rewrite = found["rewrite"]
    assert rewrite["replaced"] == rewrite["norms"] == 5 and rewrite["centered"] == 10
    assert rewrite["proof"]["passed"] and 0 < rewrite["difference"] < 1e-5
    assert max(rewrite["proof"][probe] for probe in ("shift", "mean", "output")) < 1e-9
    assert rewrite["bits_before"] == conversion["bits_after"] == pytest.approx(rewrite["bits_after"], abs=1e-5)
    assert len(found["timings"]) == 8
    assert rewrite["shape"] == [8, 32]
    for row in (*found["timings"], rewrite):
        for key in ("torch_ms", "normzoo_ms") if "torch_ms" in row else ("pre_ln_ms", "pre_rms_norm_ms"):
            assert 0 < row[key]["p20"] <= row[key]["median"] <= row[key]["p80"]
        assert 0 < row["speedup"]["p20"] <= row["speedup"]["median"] <= row["speedup"]["p80"]
    assert torch.equal(before, after)
    assert [path.name for path in folder.iterdir()] == ["normzoo-demo.html"]


def test_in_words(result, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    for step, part in (
        ("train", "curve"),
        ("approximate",) * 2,
        ("compare", "conversion"),
        ("rewrite",) * 2,
        ("time_rows", "timings"),
    ):
        monkeypatch.setattr(demo, step, lambda *_, found=result[part]: found)
    monkeypatch.setattr(demo.images, "study", lambda settings: result["images"])
    assert cli.main(["demo", "--quick", "--report", "here.html"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert re.search(r"largest difference of a logit +0$", printed, re.M)
    words = " ".join(printed.split())
    assert "stayed the same to the last bit" in words
    assert "proof: the model computes the same function: outputs are equal to the last bit." in words
    assert '"rms_norm"): the model computes another function: outputs differ by at most' in words
    assert re.search(r"^LayerNorms that became RMSNorms +5 of 5$", printed, re.M)
    assert "made RMSNorms of the 5 LayerNorms of the trained model, and logits stayed the same to" in words
    assert (
        "times the speed of before" not in words and words.count("all that writes the stream is shifted") == 1
    )
    assert "the mean that the norms see is" in words and "mean: the largest" not in words
    assert max(map(len, printed.splitlines())) <= 80
    assert "is here.html" in words and (tmp_path / "here.html").is_file()


def test_a_speed_is_told_where_it_says_something(result):
    for low, high, told in ((0.9, 1.1, "0.95 (0.90-1.10)"), (0.8, 0.9, "0.95 (0.80-0.90)"), (0.64, 5.66, "")):
        result["rewrite"]["speedup"] = {"median": 0.95, "p20": low, "p80": high}
        for settings, said in ((Settings(), told), (QUICK, "")):
            words = " ".join(printed.verdict(result, settings))
            assert ("of 8 x 32 characters ran at" in words) == bool(said) and said in words, (low, settings)
            assert ("no difference beyond the spread" in words) == (bool(said) and high > 1)


def test_it_fails_when_the_function_changes(result, capsys, monkeypatch, tmp_path):
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.conversion.planning, "site_error", lambda *_: (0.0, True))
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * 1.001)
    monkeypatch.setattr(demo.images, "study", lambda settings: None)
    monkeypatch.setattr(demo, "train", lambda *_: result["curve"])
    monkeypatch.setattr(demo, "time_rows", lambda _: result["timings"])
    assert cli.main(["demo", "--quick"]) == 1
    assert "FAILED: the conversion did not" in capsys.readouterr().out
    written = (tmp_path / "normzoo-demo.html").read_text(encoding="utf-8")
    assert 'class="verdict failed"' in written and "FAILED: the model computes another function" in written


def test_a_report_that_cannot_be_written(capsys):
    for name in ("nowhere/report.html", "."):
        assert cli.main(["demo", "--quick", "--report", name]) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"--report is {name}; name a file in a folder that is there" in err


def test_comparison_can_fail(monkeypatch):
    text = torch.randint(language_model.ALPHABET, (1000,))

    def passes(then):
        def plan(model):
            made = normzoo.plan(model)
            apply = made.apply
            monkeypatch.setattr(made, "apply", lambda: then(model, apply))
            return made

        monkeypatch.setattr(measurements, "plan", plan)
        return measurements.compare(language_model.CharacterGPT(QUICK), text, 8)["passed"]

    def copied(model, apply):
        apply()
        model.final_norm.weight = torch.nn.Parameter(model.final_norm.weight.detach().clone())

    def shifted(model, apply):
        apply()
        model.final_norm.eps = 1e-3

    def of_other_gradients(model, apply):
        apply()
        model.final_norm.weight.register_hook(lambda grad: 1.01 * grad)

    assert passes(lambda model, apply: apply())
    assert not passes(lambda model, apply: model)
    assert not passes(copied)
    assert not passes(shifted)
    assert not passes(of_other_gradients)
    monkeypatch.setattr(normzoo.conversion.Proof, "passed", property(lambda proof: False))
    assert not passes(lambda model, apply: apply())


def test_text_without_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, held_out, about = language_model.read_text(0.3, 0)
    assert about["files"] > 0 and len(train) + len(held_out) == about["characters"] > 3e5
    monkeypatch.setattr(language_model.torch, "__file__", str(tmp_path / "torch.py"))
    with pytest.raises(RuntimeError, match="only 0 characters of Python source"):
        language_model.read_text(0.3, 0)


def test_text_repeats():
    first, second = language_model.read_text(0.3, 0), language_model.read_text(0.3, 0)
    assert torch.equal(first[0], second[0]) and first[2] == second[2]
    assert int(first[0].max()) < language_model.ALPHABET


class Page(html.parser.HTMLParser):
    """Collects the text and the tags of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loads, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        links = [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.loads += [v for v in links if not v.startswith(("#", "data:image/png;base64,"))]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_is_whole(result):
    pytest.importorskip("matplotlib")
    written = page.html(result, QUICK)
    read = Page(written)
    assert read.open == [] and read.loads == [] and "script" not in read.tags
    assert read.tags.count("svg") == 2 + bool(result["images"]) and len(written) < 80_000
    assert "url(" not in re.sub(r"url\(#\w+\)", "", written) and "@import" not in written
    text = " ".join(" ".join(read.texts).split())
    for fact in (
        "blocks.*.attention_norm x2",
        "layer_norm: exact",
        "rms_norm: approximate",
        "The model computes the same function: outputs are equal to the last bit",
        "The model computes another function",
        "rms_norm: exact",
        "blocks.*.from_heads.weight x2",
        "The model computes the same function. In float64, of the largest entry: outputs move by",
        f"{result['rewrite']['speedup']['median']:.2f}",
        f"{result['approximate']['bits_after']:.6f}",
        f"{result['timings'][0]['speedup']['median']:.2f}",
        "times the speed of torch",
        "held-out text, after training",
    ):
        assert fact in text
    assert page.html(result, QUICK) == written


def test_what_the_model_writes_is_text(result):
    written = page.html(result | {"sample": "<script>alert(1)</script>"}, QUICK)
    assert "<script" not in written and "&lt;script&gt;" in written


def test_the_report_without_charts(result, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not figures.there()
    written = page.html(result, QUICK)
    assert "<svg" not in written and "pip install matplotlib" in written
    assert f"{result['timings'][0]['speedup']['median']:.2f}" in written


def test_charts_show_the_numbers(result):
    pytest.importorskip("matplotlib")
    drawn = charts.speed_bars(result["timings"])
    for row in result["timings"]:
        assert f">{row['speedup']['median']:.2f}<" in drawn
        assert all(word in drawn for word in (row["layer"], row["dtype"], row["pass"]))
    flat, steep = (charts.loss_curve([(1, 6.0), (2, y), (3, 2.0)], 1.9, 4.5) for y in (2.0, 5.0))
    assert flat != steep and "bits per character" in flat


def test_the_rewrite_can_fail(result, monkeypatch):
    """A model that reads the class of a norm is another one afterwards, and the verdict says so."""
    model = language_model.CharacterGPT(QUICK)
    text = torch.randint(language_model.ALPHABET, (1000,))
    right = measurements.rewrite(model, text, QUICK)
    assert right["passed"] and type(model.final_norm) is torch.nn.LayerNorm
    forward = normzoo.RMSNorm.forward
    monkeypatch.setattr(normzoo.RMSNorm, "forward", lambda self, x: forward(self, x) * 1.001)
    wrong = measurements.rewrite(model, text, QUICK)
    assert not wrong["passed"] and not wrong["proof"]["passed"] and wrong["proof"]["output"] > 1e-4
    *_, said, _ = printed.verdict(result | {"rewrite": wrong, "images": None}, QUICK)
    assert said.startswith(
        "FAILED: normzoo.to_pre_rms_norm rewrote 5 of 5 LayerNorms and changed the logits by"
    )
    monkeypatch.undo()
    made = measurements.plan_rewrite
    monkeypatch.setattr(measurements, "plan_rewrite", lambda *given: made(*given, exclude="final_norm"))
    assert not measurements.rewrite(model, text, QUICK)["passed"]
    monkeypatch.undo()
    calls = []
    interleaved = measurements.timing.interleaved
    monkeypatch.setattr(
        measurements.timing,
        "interleaved",
        lambda given, pairs: calls.extend(given) or interleaved(given, pairs),
    )
    measurements.rewrite(model, text, QUICK)
    with torch.no_grad():
        before, after = (call() for call in calls)
    assert 0 < (before - after).abs().max() < 1e-4, "one is Pre-LN, the other is not"


def test_a_failed_rewrite_is_a_failure(result, monkeypatch):
    for step, part in (("train", "curve"), ("compare", "conversion"), ("time_rows", "timings")):
        monkeypatch.setattr(demo, step, lambda *_, found=result[part]: found)
    monkeypatch.setattr(demo, "approximate", lambda *_: result["approximate"])
    monkeypatch.setattr(demo, "rewrite", lambda *_: result["rewrite"] | {"passed": False})
    monkeypatch.setattr(demo.images, "study", lambda settings: None)
    assert demo.run(quick=True, quiet=True)["passed"] is False
