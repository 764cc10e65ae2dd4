"""The static gate holds for every kernel, and falls for kernels with a planted fault."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytest.importorskip("triton")


def run(*args: str, **environ: str) -> subprocess.CompletedProcess:
    """In a process of its own: the tests run kernels interpreted, which excludes compiling them."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environ
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "bench"))
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)


def jit_functions() -> set[str]:
    return {
        node.name
        for path in (ROOT / "kernels" / "normzoo_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_every_kernel_holds_the_gates():
    done = run("-m", "normzoo_bench.static", "--json")
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    fallen = [failure for failure in document["failures"] if not failure["exception"]]
    assert not fallen, "\n".join(map(str, fallen))
    assert done.returncode == 0, done.stderr
    listed = {(row["kernel"], row["target"]) for row in document["rows"]}
    assert listed == {(name, target) for name in jit_functions() for target in TARGETS}


@pytest.fixture(scope="module")
def tripped(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("triton"))
    done = run(str(ROOT / "tests" / "planted_kernels.py"), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kernel", "gates"),
    [
        ("sound", []),
        ("narrow", ["x_width"]),
        ("reread", ["x_passes"]),
        ("double", ["f64"]),
        ("overflow", ["narrow_offsets"]),
        ("atomic", ["atomics"]),
        ("spill", ["spills"]),
        ("uncovered", ["unlisted"]),
    ],
)
def test_a_planted_fault_trips_its_gate(tripped, kernel, gates):
    assert tripped[kernel] == gates


def test_nothing_is_compiled_under_the_interpreter():
    done = run("-m", "normzoo_bench.static", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_no_random_call_escapes_the_sweep():
    """And with a form of its own planted between the ends of a tile, some do."""
    done = run(str(ROOT / "tests" / "static_sweep.py"), "0")
    assert done.returncode == 0, done.stderr
    escaped = json.loads(done.stdout)
    assert escaped.pop("planted")
    assert not any(escaped.values()), escaped
