"""The command `bench`: its arguments, tables and exit codes."""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from measuring import CPU, case_of, plant, quicken, raises

from normzoo import demo
from normzoo.zoo import ZOO, find
from normzoo_bench import commands, measure, official, peers, results, run, tables, timing
from normzoo_bench.cases import plan


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


def bench(*arguments):
    parser = argparse.ArgumentParser()
    commands.bench_arguments(parser)
    return commands.bench(parser.parse_args(arguments))


def _official(case) -> bool:
    return callable(official.build(case, case.layer(CPU)))


def test_every_layer_is_measured(capsys):
    workloads = "small,odd,tokens"
    asked = ("--size", "smoke", "--rounds", "2", "--json", "--device", "cpu", "--workload", workloads)
    assert bench(*asked) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "measuring: " in err and not found["failed"] and not found["not_run"]
    assert found["settings"]["rounds"] == 2 and found["settings"]["arguments"]["size"] == "smoke"
    assert set(demo.environment()) <= set(found["environment"])
    cases = plan(ZOO, "cpu", "smoke", patterns=workloads.split(","))
    assert {case.entry.name for case in cases} == {entry.name for entry in ZOO}
    for case in cases:
        for direction in ("forward", "backward"):
            rows = [
                row
                for row in found["rows"]
                if {**row, **case.key} == row
                and row["direction"] == direction
                and row["contender"] == "normzoo"
            ]
            assert len(rows) == 1, (str(case), direction)
            (row,) = rows
            assert 0 < row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
            assert row["gigabytes_a_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"] / 1e9)
            assert 0 < max(row["error"].values()) < 1e-5 and row["runs"] == "eager" and row["clock"] == "wall"
            beside_torch = case.entry.torch_class is not None or case.entry.name in peers.COMPOSED
            beside = "torch" if beside_torch else "official" if _official(case) else None
            assert row["baseline"] == beside and (row["speedup"] is None) == (beside is None)
            assert row["peak_bytes"] >= math.prod(row["shape"]) * 4
    keys = [tuple(row[name] for name in results.KEY) for row in found["rows"]]
    assert len(keys) == len(set(keys))
    reasons = {(entry["contender"], entry["layer"]): entry["reason"] for entry in found["absent"]}
    assert reasons["torch", "crms_norm"] == "torch has no such layer"
    assert {"reference", "liger", "quack"} <= {contender for contender, _ in reasons}


def test_a_sweep(capsys):
    assert (
        bench("rms_norm", "--scaling", "width", "--size", "smoke", "--direction", "forward", "--rounds", "2")
        == 0
    )
    printed = capsys.readouterr().out
    assert "rms_norm, float32, forward: " in printed and "against width" in printed
    assert re.findall(r"^ *(8x\d+) ", printed, re.M) == ["8x256", "8x2048", "8x16384"]
    assert bench("rms_norm", "--scaling", "channels") == 2
    missing = "none of rms_norm has the scaling 'channels'; layers of the family channels have"
    assert missing in capsys.readouterr().err


def test_what_would_be_measured(capsys):
    assert bench("--list", "RMSNorm", "--workload", "llm,wide-*") == 0
    printed = capsys.readouterr().out
    assert "rms_norm" in printed and "layer_norm" not in printed and "qk-" not in printed
    assert bench("--list", "--json", "rms_norm", "--dtype", "float16", "--contender", "torch") == 0
    cases = json.loads(capsys.readouterr().out)
    assert {case["dtype"] for case in cases} == {"float16"} and cases[0]["contenders"] == ["torch"]
    assert cases[0]["workload"].startswith("llm-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no layer called 'nothing'; there are layer_norm, rms_norm"),
        (["--workload", "vgg"], "there is no workload 'vgg'; there are conv-"),
        (["--dtype", "float8"], "--dtype has 'float8'; there are float32, bfloat16"),
        (["--direction", "sideways"], "--direction has 'sideways'; there are forward, saving"),
        (["--contender", "apex"], "--contender has 'apex'; there are normzoo, reference, torch"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 2"),
        (["--seconds", "nan"], "--seconds is nan; it must be more than 0"),
        (["--seconds", "0"], "--seconds is 0.0; it must be more than 0"),
        (["--output", "missing/a.json"], "there is no folder missing; make it first"),
        (["--output", "."], "--output is ., which is a folder; name a file"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no GPU here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(capsys, arguments, message):
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and err.startswith("normzoo bench: ")


def test_tables_fit_and_tell(capsys, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    monkeypatch.setitem(peers.CONTENDERS, "planted", lambda *_: raises())
    arguments = ["rms_norm", "--size", "smoke", "--workload", "llm,odd", "--rounds", "2", "--device", "cpu"]
    assert bench(*arguments, "--contender", "normzoo,torch,planted,liger") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert re.search(
        r"^llm-32x4096 +normzoo +[\d.]+ +[\d.]+ \([\d.]+-[\d.]+\) +[\d.]+ +\d+ +\de-0\d$", printed, re.M
    )
    assert "FAILED planted, rms_norm llm-32x4096 float32: RuntimeError: out of luck" in printed
    assert re.search("^No liger for rms_norm: liger_kernel", printed, re.M)


def row(contender, seconds, **other):
    """Of a table; normzoo took `seconds`, torch two."""
    of_time = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds}
    speedup = {"median": 2 / seconds, "p20": 1.5 / seconds, "p80": 2.5 / seconds}
    return {
        **{"layer": "rms_norm", "workload": "llm-8x8", "dtype": "float32", "memory_format": "padded"},
        **{"mode": "any", "direction": "forward", "clock": "host", "contender": contender},
        **{"runs": "eager" if contender == "normzoo" else "", "error": {"y": 1e-7}, "seconds": of_time},
        **{"gigabytes_a_second": 12.34, "share_of_copy": 0.5, "cold": True},
        **{"baseline": "torch", "speedup": speedup},
        **other,
    }


def shown(capsys, *rows, after=24.68e9, load=1.5):
    tables.show(
        {
            "environment": {"cpus": 2},
            "settings": {"load": load},
            "copy_bandwidth": {"median": 24.68e9, "after": after},
            **{"rows": list(rows), "absent": [], "failed": [], "not_run": []},
        }
    )
    return capsys.readouterr().out


def test_a_line_of_a_table(capsys):
    printed = shown(capsys, row("normzoo", 1.0), row("torch", 2.0))
    assert re.search(r"^workload +contender +time +x torch +GB/s +% copy +error$", printed, re.M)
    line = r"^llm-8x8 pad +normzoo \(eager\) +1000 +2\.00 \(1\.50-2\.50\) +12\.3 +50 +1e-07$"
    assert re.search(line, printed, re.M) and re.search(r"^ +torch +2000 +1 +12\.3 +50", printed, re.M)
    assert "A copy moves 24.7 GB/s, read and written; 24.7 GB/s after" in printed
    assert "load 1.5 on 2 CPUs" in printed and "changed" not in printed
    alone = shown(capsys, row("normzoo", 1.0, baseline=None, speedup=None, cold=False), after=20e9, load=0.5)
    assert re.search(r"normzoo \(eager\) +1000 \(900-1200\) +12\.3 +50 \(warm\) +1e-07$", alone, re.M)
    assert "The speed of the machine changed" in alone and "busy" not in alone and "times as fast:" not in alone


def test_the_summary(capsys):
    """Faster means that torch takes longer; the range decides what is sure."""
    speedups = [
        {"median": median, "p20": p20, "p80": p80}
        for median, p20, p80 in ((4.0, 3.0, 5.0), (0.25, 0.2, 1.1), (1.2, 0.9, 1.4), (0.5, 0.4, 0.6))
    ]
    rows = []
    for i, speedup in enumerate(speedups):
        more = {"workload": f"llm-{i}"}
        rows += [row("normzoo", 1.0, speedup=speedup, **more), row("torch", 2.0, **more)]
    rows += [row("liger", 3.0, workload="llm-0"), row("normzoo", 1.0, workload="gpt", direction="step")]
    rows += [row("torch", 9.0, workload="gpt", direction="step")]
    printed = shown(capsys, *rows)
    line = r"^rms_norm +float32 +forward +4 +0\.88 \(0\.25-4\.00\) +3\.00$"
    assert re.search(line, printed, re.M), printed
    assert "of 4 rows: faster in 1, slower in 1, and the range (p20-p80) spans 1 in 2." in printed


def test_a_wrong_layer_of_ours_fails_the_run(capsys, monkeypatch):
    plant(monkeypatch, lambda layer: lambda x: layer(x) * 1.1, "normzoo")
    arguments = ["rms_norm", "--size", "smoke", "--workload", "llm", "--rounds", "2", "--device", "cpu"]
    assert bench(*arguments) == 1
    assert "FAILED normzoo, rms_norm llm-32x4096" in capsys.readouterr().out


def test_a_layer_of_an_unknown_family_is_named(capsys, monkeypatch):
    strange = types.SimpleNamespace(name="strange", family="strange", couples_samples=False)
    monkeypatch.setattr("normzoo.zoo.ZOO", (find("rms_norm"), strange))
    arguments = ["--size", "smoke", "--workload", "llm", "--rounds", "2", "--json", "--device", "cpu"]
    assert bench(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in found["rows"]} == {"rms_norm"}
    assert "the family 'strange' has no workloads" in found["absent"][0]["reason"]


def test_an_interruption_keeps_what_is_done(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    calls = itertools.count()

    def build(case, layer, device):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return layer, layer

    monkeypatch.setitem(peers.CONTENDERS, "planted", build)
    arguments = ["--size", "smoke", "--contender", "planted", "--rounds", "2", "--output", str(path)]
    assert bench(*arguments, "--device", "cpu") == 130
    assert "interrupted" in capsys.readouterr().err
    found = results.load(path)
    cases = [str(case) for case in plan(ZOO, "cpu", "smoke")]
    assert len({(row["layer"], row["workload"]) for row in found["rows"]}) == 2
    assert found["not_run"] == cases[2:]


def test_a_time_limit(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    now, written = itertools.count(), []
    write = results.Document.write
    monkeypatch.setattr(results.Document, "write", lambda *args: written.append(args) or write(*args))
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(now)))
    arguments = ["--size", "smoke", "--contender", "normzoo", "--rounds", "2", "--output", str(path)]
    assert bench(*arguments, "--seconds", "8", "--device", "cpu") == 0
    found = results.load(path)
    assert len({(row["layer"], row["workload"]) for row in found["rows"]}) == 2
    assert len(written) == 2 + 1  # after every case and at the end
    cases = [str(case) for case in plan(ZOO, "cpu", "smoke")]
    assert found["not_run"][0] == f"{cases[1]} backward" and found["not_run"][1:] == cases[2:]
    printed = capsys.readouterr().out
    assert f"No time was left for {len(found['not_run'])}, among them {cases[1]} backward" in printed


def test_an_interruption_before_the_first_case(monkeypatch, capsys):
    monkeypatch.setattr(run, "copy_bandwidth", interrupts)
    assert bench("rms_norm", "--size", "smoke", "--device", "cpu") == 130
    out, err = capsys.readouterr()
    assert out == "" and err == "normzoo bench: interrupted\n"


def interrupts(*_, **__):
    raise KeyboardInterrupt


def test_the_copy_is_measured_before_and_after(tmp_path, monkeypatch):
    speeds = iter((4e9, 1e9))
    monkeypatch.setattr(run, "copy_bandwidth", lambda *_: timing.Summary(next(speeds), 1.0, 1.0))
    arguments = ["rms_norm", "--size", "smoke", "--workload", "small", "--rounds", "2", "--device", "cpu"]
    assert bench(*arguments, "--output", str(tmp_path / "a.json")) == 0
    found = results.load(tmp_path / "a.json")
    assert found["copy_bandwidth"]["median"] == 4e9 and found["copy_bandwidth"]["after"] == 1e9
    assert all(r["share_of_copy"] == pytest.approx(r["gigabytes_a_second"] / 4) for r in found["rows"])


def test_a_case_that_breaks_does_not_stop_the_rest(monkeypatch):
    monkeypatch.setattr(run, "measure", lambda case, *_: raises() if case.shape == (1, 8) else None)
    cases = [case_of(find("rms_norm"), shape) for shape in ((1, 8), (2, 8))]
    document, done = results.Document({}, {}, {}), []
    settings = measure.Settings(CPU, (), (), (), 2, 1)
    assert run.run(cases, settings, document, done.append)
    assert done == cases and document.failed[0]["reason"] == "RuntimeError: out of luck"


def test_a_lost_gpu_ends_the_run(monkeypatch):
    monkeypatch.setattr(run, "measure", raises)
    monkeypatch.setattr(torch.cuda, "synchronize", raises)
    cases = [case_of(find("rms_norm"), shape) for shape in ((1, 8), (2, 8))]
    document = results.Document({}, {}, {})
    settings = measure.Settings(torch.device("cuda"), (), (), (), 2, 1)
    assert run.run(cases, settings, document, raises)
    assert "does not answer" in document.extra["stopped"] and document.not_run == list(map(str, cases))


def test_importing_the_commands_is_light():
    path = os.pathsep.join(p for p in sys.path if p)
    code = (
        "import sys, normzoo_bench.commands; "
        "print([n for n in ('triton', 'rich', 'torch._dynamo', 'normzoo_bench.peers') if n in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": path}
    for command in (["-c", code], ["-m", "normzoo_bench", "--list", "--workload", "vgg"]):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() in ("[]", "") and "Traceback" not in done.stderr
    assert done.returncode == 2 and "there is no workload 'vgg'" in done.stderr
