"""The one command for a GPU, rehearsed."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from measuring import quicken

from normzoo.zoo import ZOO
from normzoo_bench import gpu, models, peers, results
from normzoo_bench.cases import DTYPES, Case
from normzoo_bench.choices import Question
from normzoo_bench.report.documents import read
from normzoo_bench.report.goals import goals
from normzoo_bench.report.judging import ABSENT, ELSEWHERE, MET
from normzoo_bench.report.table import lines
from normzoo_bench.workloads import DIRECTIONS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


def test_the_gpu_plan_rehearsed(tmp_path, capsys):
    folder = tmp_path / "out"
    assert gpu.main(["--rehearse", "--output", str(folder), "--minutes", "3"]) == 0
    found = results.load(folder / "bench.json")
    assert list(found["extra"]["parts"]) == [part.name for part in gpu.PARTS] and not found["failed"]
    assert found["extra"]["tests"]["passed"] > 0 and not found["extra"]["tests"]["failed"]
    assert not found["not_run"]
    assert {row["layer"] for row in found["rows"]} >= {entry.name for entry in ZOO if not entry.like}
    uses = {row["workload"].partition("-")[0] for row in found["rows"]}
    others = {*models.MODELS, "rows", "width", "channels", "tokens"}
    assert uses == {"llm", "wide", "qk", "odd", "small", "resnet", "unet", "vit", "conv", "stem", *others}
    assert found["copy_bandwidth"]["after"] > 0
    names = [path.name for path in folder.iterdir()]
    assert len(names) <= 8 and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert re.search(r"^Kernel tests: \d+ passed, 0 failed\.$", capsys.readouterr().out, re.M)


@pytest.fixture
def clockwork(tmp_path, monkeypatch):
    """Runs the plan for a GPU with cases that take `seconds`, or that by contenders; gives them and the time of
    the end."""

    def go(seconds, minutes, tests=0.0):
        now, cases = [0.0], []

        def wait(spent):
            now[0] += spent
            return {"passed": 1, "failed": [], "note": ""}

        def slow(case, settings, document):
            cases.append((case, settings))
            wait(seconds(settings.contenders) if callable(seconds) else seconds)

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(gpu, "kernel_tests", lambda *_: wait(tests))
        of_gpu = gpu.cases_of
        monkeypatch.setattr(gpu, "cases_of", lambda part, _: (of_gpu(part, "cuda")[0], slow))
        of_part = gpu.contenders_of
        monkeypatch.setattr(gpu, "contenders_of", lambda part, _: of_part(part, "cuda"))
        monkeypatch.setattr(gpu, "progress", lambda *_: contextlib.nullcontext(lambda note: None))
        status = gpu.main(["--rehearse", "--output", str(tmp_path), "--minutes", str(minutes)])
        return status, cases, now[0], results.load(tmp_path / "bench.json")

    return go


def _spent(contenders):
    """Seconds of a case, supposed: a compiler takes its time."""
    return 8.0 if "torch.compile" in contenders else 3.0


def test_the_gpu_plan_goes_by_worth_and_ends_in_time(clockwork, monkeypatch):
    monkeypatch.setattr(gpu, "memory_check", lambda *_: pytest.fail("no time is left for it"))
    status, cases, end, document = clockwork(_spent, 10.0, tests=210.0)
    assert status == 0 and 10 * 60 - 40 < end <= 10 * 60 - 10
    uses = [case.key["workload"].partition("-")[0] for case, _ in cases]
    order = [use for use, before in zip(uses, ["", *uses], strict=False) if use != before]
    assert order[:6] == ["llm", "resnet", "unet", "resnet", "wide", "qk"]
    assert order[-4:] == ["resnet50", "rows", "width", "channels"]  # none starves
    assert uses[:4] == ["llm"] * 4 and "gpt" in uses and document["not_run"]
    assert all(settings.deadline <= 10 * 60 - 20 for _, settings in cases)


def test_the_gpu_plan_has_time_over(clockwork, monkeypatch):
    found = {"ran": True, "status": 9, "summary": "ERROR SUMMARY: 1 error"}
    monkeypatch.setattr(gpu, "memory_check", lambda *_: found)
    status, cases, _, document = clockwork(0.1, 8.0)
    assert status == 1 and not document["not_run"]  # the memory checker found something
    assert len(cases) == sum(len(gpu.cases_of(part, "cuda")[0]) for part in gpu.PARTS)
    assert document["extra"]["memory_check"] == found


def test_every_part_has_cases_on_a_gpu():
    for part in gpu.PARTS:
        cases, _ = gpu.cases_of(part, "cuda")
        assert cases and all(math.prod(case.shape) <= 1 << 28 for case in cases)
        assert set(gpu.contenders_of(part, "cuda")) <= set(
            models.CONTENDERS if part.model else peers.CONTENDERS
        )
    llm = [case.workload.name for case in gpu.cases_of(gpu.PARTS[0], "cuda")[0]]
    assert set(llm) == {f"llm-8192x{width}" for width in (1024, 2048, 4096, 8192)}


# What the goals ask for


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """What the goals of a GPU say if the cases that are given are measured, and went as well as can be."""
    monkeypatch.setattr(peers, "_imported", lambda *_: mock.MagicMock())
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)

    def judged(ran):
        rows, choices = [], []
        for case, contenders, directions, host in ran:
            if isinstance(case, Question):
                choices += [
                    {**case.key, **_SPED_UP, "choice": case.choice, "value": True, "direction": "forward"}
                ]
            elif isinstance(case, Case):
                rows += _rows(case, contenders, directions, host)
        settings = {"time": "2026-01-01", "rounds": 15, "arguments": {"minutes": 8.0, "rehearse": False}}
        environment = {"device": "cuda", "gpu": "NVIDIA H200"}
        document = results.Document(environment, settings, {"median": 4e12}, rows, extra={"choices": choices})
        document.write(tmp_path / "planned.json")
        found = lines(read(tmp_path), [goal for goal in goals() if "normzoo_bench.gpu" in goal.command])
        assert len(found) > 30
        return {line.goal.key: line.finding.verdict for line in found}

    return judged


_SPED_UP = {"speedup": {"median": 9.0, "p20": 9.0, "p80": 9.0}, "contender": "normzoo", "clock": "kernel"}
_CACHE = 60 << 20


def _rows(case, contenders, directions, host):
    layer, found = case.layer(torch.device("meta")), []
    size = math.prod(case.shape) * DTYPES[case.dtype][0].itemsize
    rest = {"cold": min(max(2, math.ceil(2 * _CACHE / size)), 256) * size >= 2 * _CACHE, "error": {"y": 0.0}}
    for name in contenders:
        try:
            peers.contender(name, case, layer, torch.device("meta"))
        except peers.Absent:
            continue
        seconds = 1e-9 if name == "normzoo" else 1e-3
        own = {"seconds": dict.fromkeys(("median", "p20", "p80"), seconds), "baseline": None, "speedup": None}
        found += [
            {**case.key, **own, **rest, "contender": name, "direction": direction, "clock": clock}
            | {"bytes": case.bytes(direction), "share_of_copy": 1e-9 / seconds}
            for direction in directions
            for clock in ("kernel", "host")[: 1 + host]
        ]
    return found


def _planned():
    return [
        (case, gpu.contenders_of(part, "cuda"), part.directions, part.host)
        for part in gpu.PARTS
        for case in gpu.cases_of(part, "cuda")[0]
    ]


def test_the_gpu_plan_decides_every_goal(verdicts):
    """With nothing that a goal asks for left out."""
    found = verdicts(_planned())
    assert set(found.values()) == {MET}, {key: verdict for key, verdict in found.items() if verdict != MET}


def test_the_goals_see_what_a_plan_lacks(verdicts):
    def without(lacking):
        found = verdicts([one for one in _planned() if not lacking(one[0])])
        return {key for key, verdict in found.items() if verdict != MET}

    assert without(lambda case: getattr(case, "added", False)) >= {"added-forward", "added-backward"}
    assert "power-forward" in without(lambda case: "power_norm" in str(case))


def test_in_ten_minutes_there_is_a_row_for_every_goal(verdicts, clockwork):
    """Where the kernel tests take all the time that they may."""
    status, cases, _, _ = clockwork(_spent, 10.0, 210.0)
    ran = [(case, own.contenders, own.directions, own.directions == DIRECTIONS) for case, own in cases]
    found = verdicts(ran)
    assert status == 0 and not {key for key, verdict in found.items() if verdict in (ABSENT, ELSEWHERE)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0.0; it must be more than 0"),
        (["--output", "setup/file/x"], "--output is setup/file/x, which cannot be made a folder"),
        (["--part", "QK*", "rows"], "--part is 'rows', which fits none of: row norms at LLM widths, sum and"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup").mkdir()
    (tmp_path / "setup/file").touch()
    assert gpu.main(["--rehearse", "--output", "out", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_parts_by_name(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(gpu, "_measured", lambda folder, parts, *_: measured.append(parts) or 0)
    how = ["--rehearse", "--output", str(tmp_path)]
    assert gpu.main([*how, "--part", "QK*", "*float32"]) == 0 and gpu.main(how) == 0
    names = ["QK-norm", "batch norm, float32", "wide rows, float32", "norms beyond batch norm, float32"]
    assert [part.name for part in measured[0]] == names and measured[1] is gpu.PARTS


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


def test_an_interruption_leaves_nothing_stale(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "bench.json").write_text("of an older run")
    monkeypatch.setattr(gpu, "kernel_tests", interrupted)
    assert gpu.main(["--rehearse", "--output", str(tmp_path)]) == 130
    assert "interrupted; what is done lies in" in capsys.readouterr().err
    assert results.load(tmp_path / "bench.json")["rows"] == []


def test_what_is_under_way_ends_with_the_command(tmp_path):
    """A scheduler's SIGTERM must not leave tests behind that hold the GPU."""
    code = (
        "import sys; from normzoo_bench import gpu; "
        "gpu.kernel_tests = lambda folder, *_: "
        "gpu._run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'], "
        "folder / 'log', 60.0); sys.exit(gpu.main(['--rehearse', '--output', sys.argv[1]]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stderr=subprocess.PIPE)
    try:
        log = tmp_path / "log"
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert b"interrupted" in process.communicate(timeout=30)[1] and process.returncode == 130
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_an_interruption_in_the_midst_of_a_wait_ends_it_too(tmp_path, monkeypatch):
    """It may leave the lock taken under which Popen waits."""

    held = []

    def interrupted(process, timeout=None):
        monkeypatch.undo()
        process._waitpid_lock.acquire()
        held.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 60.0)
    held[0]._waitpid_lock.release()
    assert held[0].wait(20) == -signal.SIGKILL


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
    """With what it has started, which would go on holding the GPU."""
    started = time.monotonic()
    beats = tmp_path / "beats"
    code = (
        "import subprocess, sys; print('begun', flush=True); "
        "subprocess.run(['sh', '-c', 'while :; do echo >> \"$0\"; sleep 0.1; done', sys.argv[1]])"
    )
    assert gpu._run([sys.executable, "-c", code, str(beats)], tmp_path / "log", 1.0) is None
    assert time.monotonic() - started < 10 and (tmp_path / "log").read_text() == "begun\n"
    time.sleep(0.3)
    count = beats.stat().st_size
    time.sleep(0.5)
    assert count == beats.stat().st_size > 0
    assert gpu._run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 30) == 3


def test_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    assert "run from a checkout" in gpu.kernel_tests(tmp_path, 1.0, True)["note"]
    assert gpu.memory_check(tmp_path, 1.0) == {"ran": False}
