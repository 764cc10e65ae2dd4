"""python -m normzoo_bench.static [--only SUBSTRING] [--targets sm_90,gfx942] [--all] [--peers] [--predict]"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from typing import Any

from normzoo_bench.results import demand_writable

from . import fake, gates, peers, sweep, table
from .cases import CASES
from .document import document, write
from .measured import compared, measured
from .profile import add_instructions
from .run import Task, attempted, in_parallel, run, run_sweep, tasks

_SAMPLE = 100
"""Calls of the sweep in a plain run."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m normzoo_bench.static", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases by name-dtype")
    parser.add_argument("--targets", default=",".join(fake.TARGETS), help="comma-separated")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="every configuration that the forms can choose")
    parser.add_argument("--seed", type=int, default=0, help="which calls stand for the configurations")
    parser.add_argument("--peers", action="store_true", help="figures of the peers beside ours")
    parser.add_argument("--predict", action="store_true", help="times from bytes, instructions and launches")
    parser.add_argument("--measured", nargs="+", default=[], metavar="JSON", help="documents of a GPU run")
    parser.add_argument("--output", metavar="JSON", help="write a document with everything")
    return parser


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing is compiled under TRITON_INTERPRET=1; unset it")
    targets = options.targets.split(",")
    if unknown := set(targets) - set(fake.TARGETS):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(fake.TARGETS)}")
    if not tasks(options.only, targets):
        parser.error(f"no case has {options.only} in its name; see bench/README.md")
    try:
        if options.output:
            demand_writable(options.output)
        found = list(measured(options.measured))
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="normzoo-static-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows, failures = run(options.only, targets, options.workers)
        swept: list[dict] = []
        if not options.only:
            jobs = sweep.jobs(CASES, targets, options.seed, None if options.all else _SAMPLE)
            swept, more = run_sweep(jobs, options.workers)
            failures += more
        times = _times(found, options.workers)
    failures += gates.unexplained(peers.beaten(rows), whole=not options.only and "sm_90" in targets)
    return _report(options, rows, swept, failures, times)


def _times(found: list, workers: int) -> list[dict]:
    """What was measured beside what is predicted, where the calls compile."""
    wanted = [Task(case, row.dtype, "sm_90") for row in found for case in row.cases]
    compiled = iter(in_parallel(attempted, wanted, workers) if wanted else [])
    groups = [[next(compiled) for _ in row.cases] for row in found]
    known = [
        (row, group)
        for row, group in zip(found, groups, strict=True)
        if all(isinstance(g, list) for g in group)
    ]
    add_instructions([launch for _, group in known for of_call in group for launch in of_call])
    return [compared(row, group) for row, group in known]


def _report(options: Any, rows: list, swept: list, failures: list, times: list) -> int:
    fallen = [failure for failure in failures if not failure.exception]
    if options.output:
        write(options.output, document(rows, swept, failures, times))
    if options.json:
        for row in rows:
            row.pop("helpers", None)
        contents = {"rows": rows, "swept": swept, "failures": [dataclasses.asdict(f) for f in failures]}
        print(json.dumps(contents, indent=1))
        return 1 if fallen else 0
    if options.peers:
        print(table.beside_peers(rows))
    if options.predict or options.measured:
        print(table.predicted(rows), table.against_measured(times), sep="\n")
    if not (options.peers or options.predict or options.measured):
        print(table.table(rows + swept))
    print(*failures, f"{len(rows)} rows, {len(swept)} of the sweep, {len(fallen)} gates fell", sep="\n")
    return 1 if fallen else 0
