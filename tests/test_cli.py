"""The command line and its tables, with and without rich."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normzoo
from normzoo import cli, doctor
from normzoo.terminal import progress, table
from normzoo_bench import timing
from normzoo_bench.tables import spread


@pytest.fixture
def no_rich(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)


@pytest.fixture
def rich():
    pytest.importorskip("rich")


@pytest.fixture(params=["rich", "plain"])
def tables(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        pytest.importorskip("rich")
    return request.param


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: (cli.main(arguments), *capsys.readouterr())


def small():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


def deep():
    layers = (nn.ModuleDict({"attention": nn.ModuleDict({"output": nn.LayerNorm(384)})}) for _ in "ab")
    return nn.ModuleDict({"vision": nn.ModuleList(layers), "final": nn.LayerNorm(384)})


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.usefixtures("rich")
def test_list_by_rich(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "───" in printed and "\x1b[" not in printed
    for entry in normzoo.ZOO:
        assert re.search(rf"^{entry.name}\b.*{entry.paper}.*{entry.title}", printed, re.M)


@pytest.mark.usefixtures("no_rich")
def test_list_in_plain_text(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and "-----" in printed
    for entry in normzoo.ZOO:
        assert re.search(rf"^{entry.name} .*{entry.paper}  {entry.title}$", printed, re.M)


def test_list_json(capsys):
    assert cli.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found] == [entry.name for entry in normzoo.ZOO]


@pytest.mark.parametrize("entry", normzoo.ZOO, ids=lambda entry: entry.name)
def test_info(entry, capsys):
    assert cli.main(["info", entry.name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(entry.title)
    assert f"https://arxiv.org/abs/{entry.paper}" in printed and entry.layout in printed
    assert entry.official in printed
    assert f"{entry.cls.__name__}(" in printed and "eps=" in printed
    assert "Input" in printed and not re.search(r":class:|:func:|``|\\\*", printed)


def test_info_json(capsys):
    assert cli.main(["info", "CRMSNorm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "crms_norm" and found["replaces"] is None
    assert found["constructor"] == (
        "CRMSNorm(normalized_shape, eps=1e-05, elementwise_affine=False, *, device=None, dtype=None)"
    )


def test_info_of_one_class_of_several(capsys):
    assert cli.main(["info", "BatchNorm1d"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"class +normzoo.BatchNorm1d\n +classes +BatchNorm2d, BatchNorm1d, BatchNorm3d\n", printed)
    assert re.search(r"replaces +torch.nn.BatchNorm1d\n", printed) and "\nBatchNorm1d(num_features," in printed
    assert "input (N, C) or (N, C, L)" in printed


def test_usage_errors(capsys):
    for wrong, near in {
        "batchnrm": "batch_norm",
        "LayerNrom": "layer_norm",
        "batchnrom3D": "BatchNorm3d",
        "alpha": "alpha_batch_norm",
    }.items():
        assert cli.main(["info", wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.endswith(f"; did you mean {near}?\n")
        assert f"no layer called {wrong!r}" in err and all(entry.name in err for entry in normzoo.ZOO)
    for wrong in ("pre_rms_norm", "to_pre_rms_norm", "PreRMSNorm"):
        assert cli.main(["info", wrong, "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "pre_rms_norm is no layer but a rewrite of a whole model" in err
        assert "normzoo convert MODEL --to pre_rms_norm" in err and "docs/layernorm-rmsnorm.md" in err
    for wrong in ([], ["lst"], ["list", "--jsn"], ["info"]):
        assert cli.main(wrong) == 2
        out, err = capsys.readouterr()
        assert out == "" and "usage: normzoo" in err


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"normzoo {normzoo.__version__}\n"
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("list", "info", "demo"))


def test_as_a_module():
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "normzoo", "info", "nothing"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "no layer called 'nothing'" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_numbers_stay_whole(capsys, monkeypatch, rich):
    monkeypatch.setenv("COLUMNS", "80")
    text = spread({"median": 123.456, "p20": 100.123, "p80": 150.789})
    assert text == "123 (100-151)"
    assert spread({"median": 0.012345, "p20": 9.9951, "p80": 10.04}) == "0.012 (10.0-10.0)"
    table("title", ("layer", "pass", "torch", "normzoo", "ratio"), [("RMSNorm", "training", *[text] * 3)])
    assert capsys.readouterr().out.count(text) == 3


@pytest.mark.usefixtures("no_rich")
def test_numbers_go_to_the_right(capsys):
    table("title", ("layer", "time"), [("one", "1.5"), ("two", "12.25")])
    assert capsys.readouterr().out == "title\nlayer   time\n-----  -----\none      1.5\ntwo    12.25\n\n"


def test_progress_in_lines(capsys):
    with progress("work", 25) as step:
        for i in range(25):
            step(f"note {i}")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 10 and err.endswith("work: 25/25  note 24\n")


def test_timing_takes_turns():
    order = []
    samples = timing.interleaved([lambda: order.append("a"), lambda: order.append("b")], pairs=4, warmup=1)
    assert "".join(order) == "abbaabbaab" and [len(s) for s in samples] == [4, 4]
    with pytest.raises(ValueError, match="pairs is 1"):
        timing.interleaved([], pairs=1)


def test_timing_summaries():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)


def test_inspect_json(run):
    code, out, err = run("inspect", "test_cli:small", "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    assert found["model"] == "test_cli:small" and found["note"] == "Sequential, 88 parameters"
    assert [site["norm"]["family"] for site in found["sites"]] == ["layer"]


def test_an_interruption(run):
    assert run("inspect", "test_cli:interrupted") == (130, "", "normzoo: interrupted\n")


@pytest.mark.parametrize("columns", [40, 80, 100, 120, None])
def test_tables_keep_their_names_and_words(run, monkeypatch, tables, columns):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    name = "vision.*.attention.output x2"
    for command in (["inspect"], ["convert", "--dry-run", "--to", "rms_norm"]):
        code, out, _ = run(*command, "test_cli:deep")
        assert code == 0 and "…" not in out and re.search(f"^{re.escape(name)}( |$)", out, re.M)
        assert "layer (384,), eps=1e-05" in " ".join(out.split())
        assert not [line for line in out.splitlines() if line != line.rstrip()]
        lines = [line for line in out.splitlines() if not line.startswith(name)]
        assert not columns or max(map(len, lines)) <= columns
        if columns in (None, 120):
            assert re.search(f"^{re.escape(name)} +LayerNorm +layer", out, re.M)
            assert ("───" in out) == (tables == "rich") and ("-----" in out) == (tables == "plain")
        if columns == 40:
            assert "\n  class     LayerNorm\n" in out
    if columns in (None, 120):
        assert re.search("^norm +class +computes +becomes +error +notes", out, re.M)
        assert ("the mean is no longer taken away" in out) == (columns is None)
    assert "notes" not in run("convert", "test_cli:small", "--dry-run")[1]


def test_no_colour(run, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1m" in run("inspect", "test_cli:small")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("inspect", "test_cli:small")[1]


def test_doctor(run, monkeypatch, tables):
    entries = [*normzoo.ZOO, SimpleNamespace(name="planted", kernel=False)]
    monkeypatch.setattr(doctor, "ZOO", entries)
    monkeypatch.setattr(doctor, "_no_kernels", lambda: "somebody said so")
    code, out, err = run("doctor")
    assert code == 0 and err == "" and f"healthy: 0 of {len(entries)} layers run by kernels" in out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.M)
    for entry in entries:
        why = "somebody said so" if entry.kernel else "it has no kernel"
        assert re.search(rf"^{entry.name} +eager +{why}$", out, re.M)
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["healthy"] and found["versions"]["rich" if tables == "rich" else "torch"]
    assert [layer["layer"] for layer in found["layers"]] == [entry.name for entry in entries]


@pytest.mark.parametrize(
    "factor, finding",
    [(1.0, None), (1.1, "float32: off by "), (math.nan, "float32: off by nan"), ("raise", "luck")],
)
def test_doctor_tries_the_kernels(run, monkeypatch, factor, finding):
    by_kernel = []

    class Layer(nn.Module):
        def forward(self, x, shift):
            if by_kernel[-1] and factor == "raise":
                raise RuntimeError("out of\nluck")
            return x * (factor if by_kernel[-1] else 1) + shift

    entry = SimpleNamespace(
        name="planted",
        kernel=True,
        make=lambda **_: Layer(),
        sample=lambda device, dtype, requires_grad: torch.ones(2, dtype=dtype, requires_grad=requires_grad),
        beside=lambda x: {"shift": x.detach()},
    )
    monkeypatch.setattr(doctor, "ZOO", [entry])
    monkeypatch.setattr(doctor, "_no_kernels", lambda: "")
    monkeypatch.setattr(doctor, "backend", lambda name: by_kernel.append(name == "triton") or nullcontext())
    code, out, _ = run("doctor")
    found = json.loads(run("doctor", "--json")[1])
    assert code == bool(finding) and found["healthy"] == (not finding)
    if finding:
        assert finding in found["layers"][0]["why"] and "FAILED: the kernels of planted do not work here" in out
    else:
        assert re.search("^planted +Triton +float16, bfloat16 and float32 agree", out, re.M)
        assert "healthy: 1 of 1 layers run by kernels" in out


def test_a_reader_that_leaves():
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "normzoo", "list", "--json"]
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 141


def test_a_torchvision_of_another_build(run, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "timm.py").write_text("import torchvision")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run("inspect", "timm:resnet18")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert (
        f"; the torchvision here does not load beside torch {torch.__version__} (RuntimeError: operator" in err
    )
