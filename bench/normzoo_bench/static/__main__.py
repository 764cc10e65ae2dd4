"""python -m normzoo_bench.static [--json] [--only SUBSTRING] [--targets sm_90,gfx942]"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import normzoo_kernels

from . import fake, gates
from .case import DTYPES, ROW_COUNTS, Case
from .cases import CASES
from .profile import add_instructions, double_scalars, profile_call
from .table import table

Row = dict[str, Any]
Task = tuple[int, str, str]  # index of the case, dtype, target


def attempted(task: Task) -> list[Row] | str:
    """The rows of a task, or why there are none."""
    try:
        return measured(task)
    except Exception as error:
        return "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]


def measured(task: Task) -> list[Row]:
    """The rows of one case in one dtype on one target: one for each launch."""
    index, dtype, target_name = task
    case, target = CASES[index], fake.TARGETS[target_name]
    call, x = case.build(case.rows, dtype, target)
    rows, caught = profile_call(call, x, target_name, dict(case.loads))
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
        row |= {"case": case.name, "dtype": dtype, "target": target_name, "call": of_call}
        if case.needs("double_scalars", dtype) and target_name == "sm_90":
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


def tasks(only: str, targets: list[str]) -> list[Task]:
    """The default plan; a case asked for by name runs on every target asked for."""
    chosen = []
    for index, case in enumerate(CASES):
        planned = {(target, dtype) for target, dtypes in case.plan for dtype in dtypes}
        for target in targets:
            for dtype in DTYPES:
                named = only and only in f"{case.name}-{dtype}"
                if named or (not only and (target, dtype) in planned):
                    chosen.append((index, dtype, target))
    return chosen


def run(only: str, targets: list[str], workers: int) -> tuple[list[Row], list[gates.Failure]]:
    chosen = tasks(only, targets)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = dict(zip(chosen, pool.map(attempted, chosen), strict=True))
    rows = [row for group in results.values() if isinstance(group, list) for row in group]
    add_instructions(rows)
    failures = []
    for (index, dtype, target), group in results.items():
        if isinstance(group, str):
            failures.append(gates.raised(CASES[index], dtype, target, group))
        else:
            failures += gates.failures(group, CASES[index].bounds)
    functions = gates.jit_functions(Path(normzoo_kernels.__file__).parent)
    rows += gates.inlined(functions, rows)
    if not only:
        failures += gates.uncovered(functions, rows, targets)
    if not only and set(targets) == set(fake.TARGETS):
        failures += list(gates.stale(failures))
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m normzoo_bench.static", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases by name-dtype")
    parser.add_argument("--targets", default=",".join(fake.TARGETS), help="comma-separated")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing is compiled under TRITON_INTERPRET=1; unset it")
    targets = options.targets.split(",")
    if unknown := set(targets) - set(fake.TARGETS):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(fake.TARGETS)}")
    if not tasks(options.only, targets):
        parser.error(f"no case has {options.only} in its name; see bench/README.md")
    with tempfile.TemporaryDirectory(prefix="normzoo-static-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows, failures = run(options.only, targets, options.workers)
    fallen = [failure for failure in failures if not failure.exception]
    if options.json:
        for row in rows:
            row.pop("helpers", None)
        document = {"rows": rows, "failures": [dataclasses.asdict(f) for f in failures]}
        print(json.dumps(document, indent=1))
    else:
        print(table(rows), *failures, f"{len(rows)} rows, {len(fallen)} gates fell", sep="\n")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
