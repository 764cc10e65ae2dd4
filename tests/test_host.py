"""The measurement of the host's time: kernels that do nothing, contenders that do the same, its document."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measuring import FakeClock

import normzoo
from normzoo.zoo import ZOO, find

pytest.importorskip("triton")

from normzoo_bench import host, results
from normzoo_bench.measure import call_of
from normzoo_kernels import _launch

ROOT = Path(__file__).parent.parent
TINY = [case for case in host.plan(ZOO) if case.dtype == "float32" and math.prod(case.shape) <= 1024]
PAIRS = [pytest.param(case, id=case.key["layer"]) for case in TINY if len(case.contenders()) == 2]


@pytest.fixture
def nan_filled():
    """Outputs start as NaN, so that what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(name, added=False):
    return next(case for case in TINY if (case.entry.name, case.added) == (name, added))


def test_every_layer_with_a_kernel_is_measured():
    cases = host.plan(ZOO)
    assert {case.entry.name for case in cases} == {entry.name for entry in ZOO if entry.kernel}
    assert {case.key["layer"] for case in cases if case.added} == {"add_layer_norm", "add_rms_norm"}
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert len({json.dumps(case.key) for case in cases}) == len(cases)


def test_empty_kernels_are_launched_and_do_nothing(nan_filled):
    case = case_of("layer_norm")
    ours, _ = case.contenders()
    both: Callable = call_of(ours, "both", [case.inputs()])
    with host.emptied():
        before = _launch.launches.total()
        grads = both(0)
        assert _launch.launches.total() - before == 3
    assert all(grad.isnan().all() for grad in grads)
    with normzoo.backend("triton"):
        assert all(grad.isfinite().all() for grad in both(0)), "kernels stay empty"


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "power_norm", "weight_standardize"])
def test_launches_are_those_that_are_counted(name):
    case = case_of(name)
    both = call_of(case.contenders()[0], "both", [case.inputs()])
    before = _launch.launches.copy()
    launched = host.started(lambda: both(0))
    names = [one.key[0] for one in launched]
    assert names and (_launch.launches - before) == {name: names.count(name) for name in names}
    assert all(isinstance(one.grid, tuple) and one.key[1] == len(one.args) for one in launched)


@pytest.mark.parametrize("case", PAIRS)
def test_contenders_do_the_same(case):
    """The same outputs and gradients, by kernels that are not empty; CRMSNorm's partner is another norm."""
    ours, theirs = case.contenders()
    x, dy = case.inputs()
    with normzoo.backend("triton"):
        outputs = [contender.call(x) for contender in (ours, theirs)]
        sets = [(x, *contender.parameters.values()) for contender in (ours, theirs)]
        grads = [torch.autograd.grad(y, wanted, dy) for y, wanted in zip(outputs, sets, strict=True)]
    assert (ours.name, theirs.name) == ("normzoo-empty", "torch")
    assert list(ours.parameters) == list(theirs.parameters)
    assert ours.parameters or case.entry.name in ("instance_norm", "weight_standardize")
    flat = [(*(y if case.added else (y,)), *grad) for y, grad in zip(outputs, grads, strict=True)]
    for a, b in zip(*flat, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if case.entry.name != "crms_norm":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_torchs_are_all_there():
    named = {param.id for param in PAIRS}
    assert named >= {"layer_norm", "rms_norm", "crms_norm", "batch_norm", "group_norm", "instance_norm"}
    assert named >= {"add_layer_norm", "add_rms_norm"}


def test_rows_of_a_case():
    """Times by a clock that says 3 ms for normzoo and 2 ms for torch."""
    document, clock = results.Document({}, {}, {}), FakeClock(3e-3, 2e-3)
    host.measure(case_of("rms_norm", added=True), clock, 2, document)
    assert [row["direction"] for row in document.rows[::2]] == ["forward", "saving", "both"]
    for ours, theirs in zip(document.rows[::2], document.rows[1::2], strict=True):
        assert (ours["contender"], theirs["contender"]) == ("normzoo-empty", "torch")
        assert ours["layer"] == theirs["layer"] == "add_rms_norm"
        assert (ours["seconds"]["median"], theirs["seconds"]["median"]) == (3e-3, 2e-3)
        assert ours["speedup"]["median"] == pytest.approx(2 / 3) and theirs["launches"] is None
    assert [row["launches"] for row in document.rows[::2]] == [1, 1, 3]
    assert document.rows[-2]["kernels"] == ["norm_fwd", "norm_bwd", "sum_parts"]


def test_what_others_do_meanwhile_does_not_count():
    clock = host.HostClock(1e-3)
    assert clock.stopwatch(lambda: time.sleep(0.05)) < 0.025
    assert clock.stopwatch(lambda: sum(range(10**5))) > 1e-5


def test_a_layer_that_fails_is_named(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(host.HostCase, "contenders", fail)
    monkeypatch.setattr(host, "triton_share", lambda launched, *_: [] if not launched else None)
    document = host.run(host.plan([find("crms_norm")])[:1], 2, "python")
    (failed,) = document.failed
    assert failed["layer"] == "crms_norm" and failed["reason"] == "RuntimeError: out of luck"
    assert document.ours_failed and not document.rows


def test_the_command_writes_what_it_shows(tmp_path):
    """In a process of its own: here kernels are interpreted, and Triton's launches are of compiled ones."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "bench"))
    path = tmp_path / "host.json"
    command = ["-m", "normzoo_bench.host", "layer_norm", "--rounds", "2", "--output", str(path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    document = results.load(path)
    assert document["settings"]["command"] == f"python {' '.join(command)}"
    assert document["settings"]["rounds"] == 2 and document["environment"]["threads"] == 1
    assert len(document["rows"]) == 2 * 2 * 2 * 3 * 2 and not document["failed"]
    assert {row["clock"] for row in document["rows"]} == {"host"}
    by_kernel = {one["kernel"]: one for one in document["extra"]["triton"]}
    assert set(by_kernel) == {"norm_fwd", "norm_bwd", "sum_parts"}
    assert by_kernel["sum_parts"]["arguments"] == 4 and by_kernel["sum_parts"]["constants"] == 3
    assert all(1e-7 < one["seconds"]["median"] < 1e-2 for one in by_kernel.values())
    assert "add_layer_norm" in done.stdout and "norm_bwd" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "1"], "--rounds is 1; it must be at least 2"),
        (["batch_narm"], "no layer called 'batch_narm'"),
        (["frozen_batch_norm"], "none of frozen_batch_norm has a kernel"),
        (["--output", "/"], "is a folder"),
    ],
)
def test_wrong_usage(arguments, said, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert host.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert host.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_without_triton():
    """Every command that needs it says so, and still tells its options."""
    code = (
        "import runpy, sys\nsys.modules['triton'] = None\n"
        "for line in ('host', 'launches', 'static', 'host --help', 'launches --help'):\n"
        "    name, *given = sys.argv = line.split()\n"
        "    try:\n"
        "        runpy.run_module(f'normzoo_bench.{name}', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end:\n"
        "        print('ended', end.code)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "bench"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr
    ends = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == ["2", "2", "2", "0", "0"], done.stderr
    lines = [line for line in done.stderr.splitlines() if "runpy" not in line]
    assert len(lines) == 3 and all(line.endswith("pip install triton") for line in lines)
