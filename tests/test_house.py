"""The package as a whole: what importing it costs, what the wheel holds, what is exported."""

from __future__ import annotations

import email.message
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch import nn

import normzoo
from normzoo import functional
from normzoo.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"normzoo": ROOT, "normzoo_kernels": ROOT / "kernels", "normzoo_bench": ROOT / "bench"}


def python(*arguments: str, cwd: Path = ROOT, path: str = "") -> str:
    """The output of a fresh interpreter that sees `path` and no setting of this test run."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path:
        env["PYTHONPATH"] = path
    run = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_import_is_light():
    loaded = python(
        "-c",
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import normzoo\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        path=str(ROOT),
    )
    names = set(json.loads(loaded))
    heavy = {"triton", "rich", "matplotlib", "numpy", "transformers"}
    assert {name.split(".")[0] for name in names} & heavy == set()
    # What operators need beside Triton; no kernel.
    kernels = {name for name in names if name.startswith("normzoo_kernels")}
    assert kernels <= {"normzoo_kernels", "normzoo_kernels._op"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source") / "normzoo"
    # A copy, because setuptools picks up whatever an earlier build left in the checkout.
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "_build", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    python("-c", build, cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


def test_wheel_holds_the_three_packages(wheel):
    names = wheel.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == set(PACKAGES)
    for package, folder in PACKAGES.items():
        files = [p for p in (folder / package).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        wanted = {path.relative_to(folder).as_posix() for path in files}
        assert {name for name in names if name.startswith(f"{package}/")} == wanted
        assert f"{package}/py.typed" in wanted


def test_wheel_metadata(wheel):
    data = metadata(wheel)
    assert (data["Name"], data["Version"]) == ("normzoo", normzoo.__version__)
    required = [line for line in data.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in required} == {"torch", "einops"}
    entry_points = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "normzoo = normzoo.cli:main" in wheel.read(entry_points).decode()


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_containers_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/ is a container; with an __init__.py it would be imported as a package `{folder}`"
    )


def test_bare_checkout_runs(tmp_path):
    path = os.pathsep.join(str(folder) for folder in PACKAGES.values())
    where = python("-c", "import normzoo; print(normzoo.__file__)", cwd=tmp_path, path=path)
    assert Path(where.strip()) == ROOT / "normzoo" / "__init__.py"
    listed = python("-m", "normzoo", "list", cwd=tmp_path, path=path)
    for entry in ZOO:
        assert entry.name in listed or entry.cls.__name__ in listed


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_entry_is_exported(entry):
    for cls in entry.exported:
        name = cls.__name__
        assert getattr(normzoo, name, None) is cls, f"normzoo/__init__.py does not export {name}"
    for function in filter(None, (entry.function, entry.added)):
        name = function.__name__
        exported = getattr(functional, name, None)
        assert exported is function, f"normzoo/functional.py does not export {name}"


def test_exports_are_in_the_zoo():
    layers = {v for v in vars(normzoo).values() if inspect.isclass(v) and issubclass(v, nn.Module)}
    assert layers == {cls for entry in ZOO for cls in entry.exported}
    functions = {v for v in vars(functional).values() if inspect.isfunction(v)}
    known = {f for entry in ZOO for f in (entry.function, entry.added) if f}
    assert functions == known


def test_names_are_unique():
    names = [entry.name for entry in ZOO]
    assert len(set(names)) == len(names)
    # A submodule with the name of a public function would replace it on import.
    stems = {path.stem for path in (ROOT / "normzoo").rglob("*.py")}
    public = {name for name, value in vars(functional).items() if inspect.isfunction(value)}
    public |= {name for name, value in vars(normzoo).items() if inspect.isroutine(value)}
    assert stems & public == set()


def test_readme_table_is_current():
    current = python("-c", "import zoo_pages; print(zoo_pages.readme(), end='')", path=str(ROOT / "docs"))
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written == current, "the table is out of date; run `python docs/zoo_pages.py`"
