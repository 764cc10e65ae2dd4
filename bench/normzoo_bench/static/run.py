"""Compiles cases in several processes, and holds what comes of it against the bounds."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import normzoo_kernels

from . import fake, gates, sweep
from .alike import configurations
from .case import DTYPES, ROW_COUNTS, Case
from .cases import CASES
from .profile import add_instructions, double_scalars, profile_call

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A case in one dtype on one target."""

    case: Case
    dtype: str
    target: str


def tasks(only: str, targets: Iterable[str]) -> list[Task]:
    """The default plan; a case asked for by name runs on every target asked for."""
    chosen = []
    for case in CASES:
        planned = {(target, dtype) for target, dtypes in case.plan for dtype in dtypes}
        for target in targets:
            for dtype in DTYPES:
                named = only and only in f"{case.name}-{dtype}"
                if named or (not only and (target, dtype) in planned):
                    chosen.append(Task(case, dtype, target))
    return chosen


def attempted(task: Task) -> list[Row] | str:
    """The rows of a task, or why there are none."""
    try:
        return measured(task)
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]


def measured(task: Task) -> list[Row]:
    """The rows of one case in one dtype on one target: one for each launch."""
    case, dtype, target = task.case, task.dtype, fake.TARGETS[task.target]
    call, x = case.build(case.rows, dtype, target)
    rows, caught = profile_call(call, x, task.target, dict(case.loads))
    if not rows:
        raise RuntimeError("the launcher launches nothing")
    of_call = {
        "x_passes": sum(row["x_passes"] for row in rows),
        "l2_passes": sum(row["l2_passes"] for row in rows),
        "copies": sum(size for _, size in caught.torch_ops) / (x.numel() * x.element_size()),
        "launches": len(rows) + len(caught.torch_ops),
        "allocations": caught.allocations,
    }
    if case.needs("variants", dtype):
        of_call["variants"] = _variants(case, dtype, target)
    for row, launch in zip(rows, caught.launches, strict=True):
        row |= {"case": case.name, "dtype": dtype, "target": task.target, "call": of_call}
        if case.needs("double_scalars", dtype) and task.target == "sm_90":
            row["double_scalars"] = double_scalars(launch, target)
    return rows


def _variants(case: Case, dtype: str, target: fake.Target) -> int:
    """The most compiled variants that one kernel needs over the row counts."""
    variants: dict[str, set[str]] = {}
    for rows in ROW_COUNTS:
        call, _ = case.build(rows, dtype, target)
        for launch in fake.catch(call, target).launches:
            variants.setdefault(launch.name, set()).add(launch.variant)
    return max(map(len, variants.values()))


def swept(job: sweep.Job) -> tuple[list[Row], list[gates.Failure]]:
    """The new launches of a call of the sweep, in few figures, and where they fall."""
    case, dtype, target = job.case, job.call.dtype, job.call.target
    try:
        call, x = case.build(case.rows, dtype, fake.TARGETS[target])
        rows, _ = profile_call(call, x, target, dict(case.loads), lambda launch: _new(launch, job))
    except Exception as error:
        return [], [gates.raised(case, dtype, target, _told(error))]
    for row in rows:
        row |= {"case": case.name, "dtype": dtype, "target": target}
        del row["helpers"]
        row.pop("code", None)
    return rows, list(gates.failures(rows, case.bounds, swept=True))


def _new(launch: fake.Launch, job: sweep.Job) -> bool:
    return not job.wanted.isdisjoint(map(hash, configurations(launch.kernel, launch.values)))


def in_parallel(function: Callable, jobs: Sequence, workers: int) -> list:
    """Results in the order of the jobs, of processes that inherit what is loaded here."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(function, jobs, chunksize=1 if len(jobs) < 1000 else 8))


def run(only: str, targets: Sequence[str], workers: int) -> tuple[list[Row], list[gates.Failure]]:
    """The cases of the gate."""
    chosen = tasks(only, targets)
    results = list(zip(chosen, in_parallel(attempted, chosen, workers), strict=True))
    rows = [row for _, group in results if isinstance(group, list) for row in group]
    add_instructions(rows)
    failures = []
    for task, group in results:
        if isinstance(group, str):
            failures.append(gates.raised(task.case, task.dtype, task.target, group))
        else:
            failures += gates.failures(group, task.case.bounds)
    functions = gates.jit_functions(Path(normzoo_kernels.__file__).parent)
    rows += gates.inlined(functions, rows)
    if not only:
        failures += gates.uncovered(functions, rows, targets)
    if not only and set(targets) == set(fake.TARGETS):
        failures += list(gates.stale(failures))
    return rows, failures


def run_sweep(jobs: Sequence[sweep.Job], workers: int) -> tuple[list[Row], list[gates.Failure]]:
    found = in_parallel(swept, jobs, workers)
    return [row for rows, _ in found for row in rows], [f for _, failures in found for f in failures]
