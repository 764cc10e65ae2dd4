"""The command line and its tables, with and without rich."""

import json
import os
import re
import subprocess
import sys

import pytest

import normzoo
from normzoo import cli
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


@pytest.mark.usefixtures("rich")
def test_list_by_rich(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it in the workers of pytest-xdist
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


def test_usage_errors(capsys):
    assert cli.main(["info", "layernorm"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "no layer called 'layernorm'" in err and all(entry.name in err for entry in normzoo.ZOO)
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
