"""The commands of the benchmark: their arguments, files and exit codes, and the one for a GPU."""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import types

import pytest
import torch
from measuring import CPU, case_of, plant, quicken, raises

from normzoo import demo
from normzoo.zoo import ZOO, find
from normzoo_bench import commands, gpu, measure, peers, results, run, tables
from normzoo_bench.cases import plan
from normzoo_bench.comparison import differences, regressed


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


def bench(*arguments):
    parser = argparse.ArgumentParser()
    commands.bench_arguments(parser)
    return commands.bench(parser.parse_args(arguments))


def compare(*arguments):
    parser = argparse.ArgumentParser()
    commands.compare_arguments(parser)
    return commands.compare(parser.parse_args([str(a) for a in arguments]))


# The command line


def test_every_layer_is_measured(capsys):
    assert bench("--size", "smoke", "--rounds", "2", "--json", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "measuring: " in err and not found["failed"] and not found["not_run"]
    assert set(demo.environment()) <= set(found["environment"])
    for case in plan(ZOO, "cpu", "smoke"):
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
            assert (row["speedup"] is None) == (case.entry.torch_class is None)
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
    assert "none of rms_norm has the scaling 'channels'" in capsys.readouterr().err


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
        (["--workload", "vgg"], "there is no workload 'vgg'; there are llm-"),
        (["--dtype", "float8"], "--dtype has 'float8'; there are float32, bfloat16"),
        (["--direction", "sideways"], "--direction has 'sideways'; there are forward, saving"),
        (["--contender", "apex"], "--contender has 'apex'; there are normzoo, reference, torch"),
        (["--rounds", "1"], "--rounds is 1; it must be at least 2"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no GPU here; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_usage_errors(capsys, arguments, message):
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and err.startswith("normzoo bench: ")


def test_tables_fit_and_tell(capsys, monkeypatch):
    monkeypatch.setitem(peers.CONTENDERS, "planted", lambda *_: raises())
    arguments = ["rms_norm", "--size", "smoke", "--workload", "llm,odd", "--rounds", "2", "--device", "cpu"]
    assert bench(*arguments, "--contender", "normzoo,torch,planted,liger") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert re.search(
        r"^llm-32x4096 +normzoo +[\d.]+ \([\d.]+-[\d.]+\) +[\d.]+ +[\d.]+ +\d+ +\de-0\d", printed, re.M
    )
    assert "FAILED planted, rms_norm llm-32x4096 float32: RuntimeError: out of luck" in printed
    assert re.search("^No liger for rms_norm: liger_kernel", printed, re.M)


def test_a_line_of_a_table(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it in the workers of pytest-xdist
    slower, faster = row(2e-3, speedup={"median": 1.0}, contender="torch"), row(1e-3, speedup={"median": 2.0})
    more = {"gigabytes_a_second": 12.34, "share_of_copy": 0.5, "runs": "eager", "baseline": "torch"}
    rows = [r | more | {"workload": "llm-8x8", "memory_format": "padded"} for r in (faster, slower)]
    rows[0] |= {"clock": "host", "contender": "normzoo"}
    found = document(*rows, cpus=2) | {"copy_bandwidth": {"median": 24.68e9}, "settings": {"load": 1.5}}
    tables.show(found | {"absent": [], "failed": [], "not_run": []})
    printed = capsys.readouterr().out
    assert re.search(
        r"^llm-8x8 pad +normzoo \(eager\) +1.00 \(0.99-1.01\) +2.00 +12.3 +50 +1e-07$", printed, re.M
    )
    assert "A copy moves 24.7 GB/s" in printed and "load 1.5 on 2 CPUs" in printed


def test_a_wrong_layer_of_ours_fails_the_run(capsys, monkeypatch):
    plant(monkeypatch, lambda layer: lambda x: layer(x) * 1.1, "normzoo")
    arguments = ["rms_norm", "--size", "smoke", "--workload", "llm", "--rounds", "2", "--device", "cpu"]
    assert bench(*arguments) == 1
    assert "FAILED normzoo, rms_norm llm-32x4096" in capsys.readouterr().out


def test_a_layer_of_an_unknown_family_is_named(capsys, monkeypatch):
    strange = types.SimpleNamespace(name="strange", family="weights", couples_samples=False)
    monkeypatch.setattr("normzoo.zoo.ZOO", (find("rms_norm"), strange))
    arguments = ["--size", "smoke", "--workload", "llm", "--rounds", "2", "--json", "--device", "cpu"]
    assert bench(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in found["rows"]} == {"rms_norm"}
    assert "the family 'weights' has no workloads" in found["absent"][0]["reason"]


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
    assert f"Not run: {len(found['not_run'])}, among them {cases[1]} backward" in capsys.readouterr().out


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


# Documents and their comparison


def row(seconds=1.0, spread=0.01, **other):
    summary = {"median": seconds, "p20": seconds * (1 - spread), "p80": seconds * (1 + spread)}
    base = {name: name for name in results.KEY} | {"clock": "wall", "error": {"y": 1e-7}, "seconds": summary}
    return base | {"saved_bytes": 100, "peak_bytes": 200} | other


def document(*rows, **environment):
    return {"form": results.FORM, "environment": {"torch": "2.11", **environment}, "rows": list(rows)}


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_regression_is_found(written, capsys):
    old, new = written("a", document(row())), written("b", document(row(1.1), row(layer="other"), gpu="H"))
    assert compare(old, new) == 1
    printed = capsys.readouterr().out
    assert "Slower" in printed and "1.10 (1.08-1.12)" in printed
    assert re.search(r"gpu +None +H", printed) and "Only in the old: 0, only in the new: 1." in printed
    assert compare(old, new, "--threshold", "15") == 0
    assert compare(new, old, "--json") == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    assert len(found["faster"]) == 1 and not found["slower"] and found["only_old"] == 1


def test_noise_is_no_regression():
    for seconds, spread in ((1.1, 0.08), (1.04, 0.001)):
        found = differences(document(row(1.0, spread)), document(row(seconds, spread)))
        assert found["matched"] == 1 and not found["slower"] and not regressed(found)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"error": {"y": 1e-6}}, "less_exact"),
        ({"peak_bytes": 300}, "larger"),
        ({"saved_bytes": 110}, "larger"),
    ],
)
def test_growth_is_found(change, where):
    found = differences(document(row()), document(row(**change)))
    assert len(found[where]) == 1 and regressed(found)
    assert not regressed(differences(document(row(**change)), document(row())))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no key 'form'"),
        ('{"form": 99}', "has form 99, this version reads 1"),
        ({"form": 1, "environment": {}}, "'rows' is missing"),
        ({"form": 1, "environment": [], "rows": []}, "'environment' is missing or no dict"),
        ({"form": 1, "environment": {}, "rows": [{"layer": "x"}]}, "row 0 has no contender, workload"),
        ({"form": 1, "environment": {}, "rows": [row() | {"seconds": {"median": 1}}]}, "row 0 has no p20, p80"),
        ({"form": 1, "environment": {}, "rows": [7]}, "row 0 is no dict"),
        (document(row(layer="other")), "no row of .* is in"),
    ],
)
def test_unusable_files(written, capsys, content, message):
    assert compare(written("a", document(row())), written("b", content)) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err) and err.count("\n") == 1


def test_a_missing_file_and_a_bad_threshold(written, capsys, tmp_path):
    good = written("a", document(row()))
    assert compare(tmp_path / "none", good) == 2
    assert "No such file" in capsys.readouterr().err
    assert compare(good, good, "--threshold", "-1") == 2
    assert compare(good, good) == 0


def test_writing_fails_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    made = results.Document({}, {}, {})
    made.write(path)
    before = path.read_text()
    made.extra["more"] = 1
    with monkeypatch.context() as full, pytest.raises(OSError, match="disk is full"):
        full.setattr(results.os, "replace", lambda *_: raises_os_error())
        made.write(path)
    assert path.read_text() == before and results.load(path)["extra"] == {}
    made.write(path)
    assert results.load(path)["extra"] == {"more": 1} and len(list(tmp_path.iterdir())) == 1


def raises_os_error():
    raise OSError("disk is full")


# The one command for a GPU


def test_the_gpu_plan_rehearsed(tmp_path, capsys):
    folder = tmp_path / "out"
    assert gpu.main(["--rehearse", "--output", str(folder), "--minutes", "3"]) == 0
    found = results.load(folder / "bench.json")
    assert list(found["extra"]["parts"]) == [part.name for part in gpu.PARTS] and not found["failed"]
    assert found["extra"]["tests"]["passed"] > 0 and not found["extra"]["tests"]["failed"]
    assert not found["not_run"] and {row["layer"] for row in found["rows"]} == {entry.name for entry in ZOO}
    assert {row["workload"].partition("-")[0] for row in found["rows"]} >= {"llm", "wide", "qk", "odd", "small"}
    names = [path.name for path in folder.iterdir()]
    assert len(names) <= 8 and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert re.search(r"^Kernel tests: \d+ passed, 0 failed\.$", capsys.readouterr().out, re.M)


def test_the_gpu_plan_goes_by_worth_and_ends_in_time(tmp_path, monkeypatch):
    names = []

    def slow(case, settings, document):
        names.append(case.workload.use)
        now[0] += 10

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "measure", slow)
    monkeypatch.setattr(gpu, "kernel_tests", lambda *_: {"passed": 1, "failed": [], "note": ""})
    monkeypatch.setattr(gpu, "memory_check", lambda *_: pytest.fail("no time is left for it"))
    monkeypatch.setattr(gpu, "cases_of", lambda part, device: plan(ZOO, "cuda", patterns=part.workloads))
    monkeypatch.setattr(gpu, "progress", lambda *_: contextlib.nullcontext(lambda note: None))
    assert gpu.main(["--rehearse", "--output", str(tmp_path), "--minutes", "4"]) == 0
    assert now[0] <= 240 - 10 and names[:7] == ["llm"] * 7
    assert len(set(names)) > 2 and results.load(tmp_path / "bench.json")["not_run"]


def test_every_part_has_cases_on_a_gpu():
    for part in gpu.PARTS:
        cases = gpu.cases_of(part, "cuda")
        assert cases and all(math.prod(case.shape) <= 1 << 28 for case in cases)
        assert set(part.contenders) <= set(peers.CONTENDERS)
    llm = [case.workload.name for case in gpu.cases_of(gpu.PARTS[0], "cuda")]
    assert set(llm) == {f"llm-8192x{width}" for width in (1024, 2048, 4096, 8192)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "torch sees no GPU here; --rehearse" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_failed_kernel_tests_fail_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", ())
    for tests, status in (({"passed": 3, "failed": ["a::b"]}, 1), ({"passed": 0, "failed": []}, 1)):
        monkeypatch.setattr(gpu, "kernel_tests", lambda *_, tests=tests: tests | {"note": ""})
        assert gpu.main(["--rehearse", "--output", str(tmp_path), "--minutes", "0.1"]) == status
    assert "FAILED a::b" in capsys.readouterr().out


def test_outcomes_are_read_from_either_log():
    turns = (
        "tests/test_kernels.py::test_a[x y] PASSED   [ 50%]\n"
        "tests/test_kernels.py::test_b FAILED   [100%]\n=== FAILURES ===\nE  FAILED to agree\n"
    )
    parallel = (
        "tests/test_kernels.py::test_a[x y] \n[gw1] [ 50%] PASSED tests/test_kernels.py::test_a[x y] \n"
        "[gw0] [100%] ERROR tests/test_kernels.py::test_b \n"
    )
    for log in (turns, parallel):
        assert gpu.outcomes(log) == {"passed": 1, "failed": ["tests/test_kernels.py::test_b"]}


def test_a_command_that_hangs_is_stopped(tmp_path):
    started = time.monotonic()
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    assert gpu._run([sys.executable, "-c", code], tmp_path / "log", 1.0) is None
    assert time.monotonic() - started < 10 and (tmp_path / "log").read_text() == "begun\n"
    assert gpu._run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 30) == 3


def test_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    assert "run from a checkout" in gpu.kernel_tests(tmp_path, 1.0, True)["note"]
    assert gpu.memory_check(tmp_path, 1.0) == {"ran": False}
