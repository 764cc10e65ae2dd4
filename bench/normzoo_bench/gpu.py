"""Everything that needs a GPU, in one command: ``python -m normzoo_bench.gpu --output DIR``.

The kernel tests on the real compiler, then the benchmark by parts, the most important first, all of it within
a time limit. ``DIR/bench.json`` is written again after every case and can be compared with others; the logs of
the tests lie beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from normzoo.terminal import progress
from normzoo.zoo import ZOO, find

from . import choices, models
from . import run as runs
from .cases import plan
from .measure import Settings
from .models import measure_model
from .peers import usual
from .results import Document, demand_writable
from .tables import show
from .workloads import DIRECTIONS

_ROOT = Path(__file__).resolve().parents[2]
_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("kernels", "channel_kernels", "curve_kernels", "modulated_kernels", "pooling", "channel_hazards"),
        *("modulated_hazards", "running_kernels", "running_hazards", "weight_kernels", "projection_kernels"),
        *("standardize_kernels", "sets_kernels", "moments_kernels", "on_chip_kernels", "choices"),
    )
)
_RESERVE = 20.0
"""Seconds before the limit in which nothing is begun: compiling one contender may take so long."""
_TEST_SHARE = 0.35
_MEMORY_ERROR = 9
_SMALLEST = "test_values_and_gradients and float16 and 33 or test_values and float16 and masked"
"""The tests that a memory checker, which is slow, gets through."""


@dataclass(frozen=True)
class Part:
    name: str
    weight: float
    """Its share of the time that is left is its part of the weights that are left."""
    layers: tuple[str, ...]
    workloads: tuple[str, ...] = ()
    scaling: str | None = None
    size: str = "default"
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = ("forward", "backward")
    contenders: tuple[str, ...] = ("normzoo", "torch", "torch.compile", "liger", "quack")
    added: bool = False
    """The layers' functions with a residual."""
    host: bool = False
    """With the host's time and the number of launches."""
    model: str = ""
    """A whole model with these norms, instead of layers; all its contenders."""
    choices: bool = False
    """The forms that only a measurement can choose, instead of layers."""


_PAIR = ("rms_norm", "layer_norm")
_BENT = ("region_norm_b", "alpha_batch_norm", "adab2n", "evo_norm_b0", "evo_norm_s0")
_OTHERS = ("instance_norm", "ghost_batch_norm", "frozen_batch_norm", "adaptive_layer_norm")
_RUNNING = ("power_norm", "unified_norm")
_ALL = tuple(entry.name for entry in ZOO if not entry.like and entry.name not in _PAIR)
_QUICK = ("normzoo", "torch", "liger", "quack")
_COMPILED = ("normzoo", "torch", "torch.compile")
_EAGER = ("normzoo", "reference", "torch.compile")
_FULL = tuple(name for name in usual("cuda") if name != "timm")  # in bfloat16 its gradients are off
PARTS = (
    Part("row norms at LLM widths", 4.0, _PAIR, ("llm",)),
    Part("sum and norm in one", 1.2, _PAIR, ("llm-*x[48]???",), added=True),
    Part("batch norm of a ResNet", 2.5, ("batch_norm",), ("resnet",), contenders=_COMPILED),
    Part(
        "running norms beside batch norm",
        2.0,
        _RUNNING,
        ("resnet", "tokens"),
        contenders=(*_COMPILED, "reference"),
    ),
    Part("group norm of a U-Net", 1.5, ("group_norm",), ("unet",), contenders=(*_COMPILED, "liger")),
    Part(
        "batch and channel norm in one",
        1.0,
        ("batch_channel_norm",),
        ("resnet", "unet"),
        contenders=("normzoo", "reference", "official"),
    ),
    Part("wide rows", 1.5, _PAIR, ("wide",), size="full", contenders=_QUICK),
    Part("QK-norm", 1.5, _PAIR, ("qk",)),
    Part("odd widths, contiguous and padded", 1.5, ("crms_norm", "rms_norm"), ("odd",), contenders=_FULL),
    Part("norms beyond batch norm", 3.0, _BENT, ("resnet",), contenders=_EAGER),
    Part("batch norm, float32", 1.0, ("batch_norm",), ("resnet",), dtype="float32", contenders=_COMPILED),
    Part("wide rows, float32", 0.8, _PAIR, ("wide",), size="full", dtype="float32", contenders=_QUICK),
    Part("norms beyond batch norm, float32", 2.0, _BENT, ("resnet",), dtype="float32", contenders=_EAGER),
    Part("weight standardization", 0.8, ("weight_standardize",), dtype="float32", contenders=_COMPILED),
    Part("choices", 1.5, (), host=True, choices=True),
    Part("host time of short rows", 0.6, _PAIR, ("small",), directions=DIRECTIONS, host=True),
    Part("host time and launches", 1.2, _ALL, ("small",), directions=DIRECTIONS, host=True),
    Part("the other norms", 1.0, _OTHERS, ("resnet", "vit"), contenders=_FULL),
    Part("mixed dtypes", 1.0, _PAIR, ("llm", "odd"), dtype="mixed", contenders=("reference", *_QUICK)),
    Part("GPT, training step", 1.2, _PAIR, directions=("step",), host=True, model="gpt"),
    Part("GPT, Pre-LN and Pre-RMSNorm", 0.8, _PAIR[1:], directions=("inference",), host=True, model="gpt"),
    Part("ViT", 0.8, ("layer_norm",), directions=models.DIRECTIONS, host=True, model="vit"),
    Part("ResNet-50", 1.2, ("batch_norm",), directions=models.DIRECTIONS, host=True, model="resnet50"),
    Part("against rows", 0.8, _PAIR, scaling="rows", contenders=_QUICK),
    Part("against width", 0.8, _PAIR, scaling="width", contenders=_QUICK),
    Part("against channels", 1.5, ("batch_norm", "group_norm"), scaling="channels", contenders=_QUICK),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 if a test or a check of normzoo failed or no test ran, 2 without a GPU or a
    folder, 130 if stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.gpu",
        description="Runs the kernel tests on a GPU and then the benchmark by parts, within a time limit.",
        epilog="Exit codes: 0 fine, 1 a test or a check failed or no test ran, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="a folder for the results; is made")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole (default: 8)")
    parser.add_argument(
        "--part", nargs="+", metavar="NAME", help="only these parts, with wildcards (default: all)"
    )
    parser.add_argument("--rehearse", action="store_true", help="the same plan on a CPU, in tiny sizes")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output)
    try:
        if not 0 < arguments.minutes < float("inf"):
            raise ValueError(f"--minutes is {arguments.minutes}; it must be more than 0")
        parts = PARTS if arguments.part is None else _named(arguments.part)
        if not (arguments.rehearse or torch.cuda.is_available()):
            raise ValueError("torch sees no GPU here; --rehearse runs the plan on a CPU")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output is {folder}, which cannot be made a folder: {error.strerror}"
            ) from error
        demand_writable(folder / "bench.json")
    except ValueError as error:
        print(f"normzoo_bench.gpu: {error}", file=sys.stderr)
        return 2
    # So that a command under way is ended too when a scheduler ends this one.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _measured(folder, parts, 60 * arguments.minutes, arguments.rehearse)
    except KeyboardInterrupt:
        print(f"normzoo_bench.gpu: interrupted; what is done lies in {folder}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _named(patterns: Sequence[str]) -> list[Part]:
    for pattern in patterns:
        if not any(fnmatchcase(part.name, pattern) for part in PARTS):
            names = ", ".join(part.name for part in PARTS)
            raise ValueError(f"--part is {pattern!r}, which fits none of: {names}")
    return [part for part in PARTS if any(fnmatchcase(part.name, pattern) for pattern in patterns)]


def _measured(folder: Path, parts: Sequence[Part], limit: float, rehearse: bool) -> int:
    begin = time.monotonic()
    end = begin + limit - min(_RESERVE, limit / 4)
    path = folder / "bench.json"
    device = torch.device("cpu" if rehearse else "cuda")
    with runs.on_device(device):
        document, clocks, cache = runs.start(device, 0.002, 2 if rehearse else 15)
        document.settings["arguments"] = {"minutes": limit / 60, "rehearse": rehearse}
        document.settings["arguments"]["parts"] = [part.name for part in parts]
        document.write(path)  # in the place of an older one, which an interruption must not leave there
        settings = Settings(device, (), (), clocks, document.settings["rounds"], cache)
        tests = kernel_tests(folder, _TEST_SHARE * limit, rehearse)
        document.extra["tests"] = tests
        document.write(path)
        undisturbed = _parts(parts, document, settings, path, end)
        if undisturbed:
            runs.finish(document, settings)
    document.write(path)
    if undisturbed and (seconds := end - time.monotonic()) > 30:
        document.extra["memory_check"] = memory_check(folder, seconds)
        document.write(path)
    show(asdict(document))
    choices.show(document.extra.get("choices", ()), document.failed)
    print(f"Kernel tests: {tests['passed']} passed, {len(tests['failed'])} failed. {tests['note']}".strip())
    for name in tests["failed"]:
        print(f"FAILED {name}")
    if not undisturbed:
        print(f"normzoo_bench.gpu: interrupted; what is done lies in {folder}", file=sys.stderr)
        return 130
    checked = document.extra.get("memory_check", {"ran": False})
    if checked["ran"]:
        print(f"Memory check: {checked['summary'] or 'no result; see memory_check.log'}.")
    wrong = document.ours_failed or checked.get("status") == _MEMORY_ERROR
    return 1 if wrong or tests["failed"] or not tests["passed"] else 0


def _parts(parts: Sequence[Part], document: Document, settings: Settings, path: Path, end: float) -> bool:
    """Measures part by part until `end`; whether the user let it."""
    document.extra["parts"] = {}
    device = settings.device.type
    weights = sum(part.weight for part in parts)
    for part in parts:
        cases, one = cases_of(part, device)
        started = time.monotonic()
        of_part = replace(
            settings,
            contenders=contenders_of(part, device),
            directions=part.directions,
            clocks=settings.clocks if part.host else settings.clocks[:1],
            count_launches=part.host and device == "cuda",
            deadline=started + (end - started) * part.weight / weights,
        )
        weights -= part.weight
        with progress(part.name, len(cases)) as step:

            def after_each(case: object, step=step) -> None:
                step(str(case))
                document.write(path)

            undisturbed = runs.run(cases, of_part, document, after_each, one)
        document.extra["parts"][part.name] = round(time.monotonic() - started, 1)
        document.write(path)
        if not undisturbed or "stopped" in document.extra:
            return undisturbed
    return True


def cases_of(part: Part, device: str) -> tuple[list, Callable[..., None] | None]:
    """The cases of a part, small ones where it is only rehearsed, and what measures one if not `measure`."""
    size = part.size if device == "cuda" else "smoke"
    if part.choices:
        return choices.questions(device, part.dtype), choices.measure_choice
    if part.model:
        asked = (size, (part.dtype,), part.directions, part.layers)
        return models.cases([part.model], device, *asked), measure_model
    entries = [find(name) for name in part.layers]
    cases = plan(entries, device, size, (part.dtype,), part.workloads, part.scaling, part.added)
    # By stored statistics normzoo runs torch's own operator, which small shapes tell enough about.
    return [case for case in cases if part.host or case.mode != "eval"], None


def contenders_of(part: Part, device: str) -> tuple[str, ...]:
    if part.choices:
        return ()
    if part.model:
        return models.usual(device)
    return tuple(name for name in part.contenders if device == "cuda" or name in usual("cpu"))


def kernel_tests(folder: Path, seconds: float, rehearse: bool) -> dict:
    """Runs the kernel tests for at most `seconds`, into ``tests.log``: what passed and what did not."""
    found = {"passed": 0, "failed": [], "seconds": 0.0, "note": ""}
    if not _in_a_checkout():
        return found | {"note": f"There is no {_TESTS[0]} beside the package: run from a checkout."}
    if importlib.util.find_spec("pytest") is None:
        return found | {"note": "pytest is not installed."}
    command = [sys.executable, "-m", "pytest", *_TESTS, "-v", "-rN", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider"]
    if rehearse:
        command += ["-k", "test_no_rows or test_negated_views"]
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    log = folder / "tests.log"
    started = time.monotonic()
    status = _run(command, log, seconds)
    found["seconds"] = round(time.monotonic() - started, 1)
    found |= outcomes(log.read_text(encoding="utf-8", errors="replace"))
    if status is None:
        found["note"] = f"They were stopped after {seconds:.0f} s."
    elif status not in (0, 1):
        found["note"] = f"pytest ended with status {status}; see tests.log."
    return found


_OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED)"
_IN_TURN = re.compile(rf"^(\S+::.+?) {_OUTCOME}\b", re.MULTILINE)
_IN_PARALLEL = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_OUTCOME} (\S+::.+?) *$", re.MULTILINE)


def outcomes(log: str) -> dict:
    """How many tests passed and which failed, from what ``pytest -v`` has printed so far."""
    ended = _IN_TURN.findall(log) + [(name, outcome) for outcome, name in _IN_PARALLEL.findall(log)]
    failed = sorted({name for name, outcome in ended if outcome in ("FAILED", "ERROR")})
    return {"passed": sum(outcome == "PASSED" for _, outcome in ended), "failed": failed}


def _in_a_checkout() -> bool:
    return all((_ROOT / name).exists() for name in _TESTS)


def memory_check(folder: Path, seconds: float) -> dict:
    """Runs the smallest kernel tests under compute-sanitizer, where there is one."""
    if shutil.which("compute-sanitizer") is None or not _in_a_checkout():
        return {"ran": False}
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        str(_MEMORY_ERROR),
        sys.executable,
        "-m",
        "pytest",
    ]
    command += [*_TESTS, "-q", "-x", "--color=no", "-p", "no:cacheprovider", "-k", _SMALLEST]
    log = folder / "memory_check.log"
    # Without the cache every tensor is an allocation of its own, whose ends can be checked.
    status = _run(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    summaries = [line.strip("= ") for line in lines if "ERROR SUMMARY" in line]
    return {"ran": True, "status": status, "summary": summaries[-1] if summaries else None}


def _run(command: list[str], log: Path, seconds: float, **environ: str) -> int | None:
    """The exit status of a command run in the checkout, its output in `log`; None if time ran out."""
    paths = [str(_ROOT / part) for part in ("", "kernels", "bench")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environ
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the workers of pytest-xdist too
                # An interruption may have left the lock of Popen taken, for which a plain wait would wait.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)


if __name__ == "__main__":
    sys.exit(main())
