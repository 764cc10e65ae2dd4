"""The checks: what every kernel must satisfy, and the bounds that a case states for itself."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from .case import EVERYWHERE, Bound, Case
from .cases import EXCEPTIONS
from .peers import REASONS, Beaten

Row = dict[str, Any]

EVERY_KERNEL = (
    Bound("spills", most=0),
    Bound("shared_excess", most=0),  # it would compile and not load
    Bound("atomics", most=0),
    Bound("narrow_offsets", most=0),
    Bound("f64", most=0),
    Bound("unread", most=0),
)
# The same for the sweep: ptxas keeps a few bytes of stack even where registers are free.
_OF_SWEEP = (Bound("spills", most=16), *(bound for bound in EVERY_KERNEL if bound.measure != "spills"))
# Measured once per call; the others are of each kernel.
OF_CALL = {"x_passes", "l2_passes", "copies", "launches", "allocations", "variants"}
# Tuned for sm_90, so no bound elsewhere.
OF_SM90 = {"l2_passes", "instructions", "barriers", "kb_in_flight", "pipelined", "double_scalars"}
# Hold for kernels that touch x, not for those that add up small partial sums.
OF_X = {"x_width", "instructions", "barriers", "kb_in_flight", "pipelined"}


@dataclass(frozen=True)
class Failure:
    case: str
    target: str
    kernel: str
    measure: str
    measured: float
    bound: str
    exception: str | None = None

    def __str__(self) -> str:
        end = f"; exception: {self.exception}" if self.exception else ""
        place = f"{self.case} {self.target} {self.kernel}"
        return f"{place}: {self.measure} {self.measured:g}, {self.bound}{end}"


def _number(value: Any) -> float:
    """Collections of offenders count by their size."""
    return len(value) if isinstance(value, list | tuple | set) else float(value)


def failures(rows: Sequence[Row], bounds: Iterable[Bound] = (), swept: bool = False) -> Iterator[Failure]:
    """Checks the rows of one call on one target; `swept`: it is no case, but one of the sweep."""
    for row in rows:
        for bound in (*(_OF_SWEEP if swept else EVERY_KERNEL), *bounds):
            measures = row["call"] if bound.measure in OF_CALL and "call" in row else row
            skip = (
                bound.measure not in measures
                or (bound.measure in OF_CALL and row is not rows[0])
                or (bound.measure in OF_SM90 and row["target"] != "sm_90")
                or (bound.measure in OF_X and not row["tile"])
                or row["dtype"] not in bound.dtypes
            )
            if skip:
                continue
            measured = _number(measures[bound.measure])
            if not bound.least <= measured <= bound.most:
                wanted = f"at most {bound.most:g}"
                if bound.least > -inf:
                    wanted = f"at least {bound.least:g}"
                case = f"{row['case']}-{row['dtype']}"
                yield _failure(case, row["target"], row["kernel"], bound, measured, wanted)


def _failure(case: str, target: str, kernel: str, bound: Bound, measured: float, wanted: str) -> Failure:
    place = f"{case}@{target}"
    reasons = (why for glob, of, why in EXCEPTIONS if of == bound.measure and fnmatch(place, glob))
    why = next(reasons, None)
    return Failure(case, target, kernel, bound.measure, measured, wanted, why)


def raised(case: Case, dtype: str, target: str, error: str) -> Failure:
    return _failure(f"{case.name}-{dtype}", target, "*", Bound("raises"), 1, error)


@dataclass(frozen=True)
class Function:
    """A @triton.jit function of the sources."""

    name: str
    file: str


def jit_functions(package: Path) -> list[Function]:
    """Every @triton.jit function of a package, from its sources alone."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                found.append(Function(node.name, str(path)))
    return found


def _is_jit(decorator: ast.expr) -> bool:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(node) in ("triton.jit", "jit")


def inlined(functions: Iterable[Function], rows: Sequence[Row]) -> list[Row]:
    """A row for each helper on each target and dtype where some kernel has it inlined.

    A kernel that never sees the dtype is compiled once, and its helpers are seen then; so they count for all.
    """
    of_kernel: dict[tuple[str, str], set] = {}
    for row in rows:
        of_kernel.setdefault((row["kernel"], row["target"]), set()).update(row["helpers"])
    found = {}
    for function in functions:
        for row in rows:
            place = (function.name, row["target"], row["dtype"])
            helpers = of_kernel[row["kernel"], row["target"]]
            if place not in found and (function.file, function.name) in helpers:
                shared = {key: row[key] for key in ("target", "dtype", "case")}
                found[place] = {"kernel": function.name, **shared, "inlined_by": row["kernel"]}
    return list(found.values())


def uncovered(functions: Iterable[Function], rows: Sequence[Row], targets: Iterable[str]) -> Iterator[Failure]:
    """Functions that no case reaches on some target in some of the dtypes that every function is tried in."""
    seen = {(row["kernel"], row["target"], row["dtype"]) for row in rows}
    bound = Bound("uncovered")
    wanted = [(target, dtype) for target, dtypes in EVERYWHERE for dtype in dtypes if target in targets]
    for name, (target, dtype) in product([f.name for f in functions], wanted):
        if (name, target, dtype) not in seen:
            yield _failure(f"*-{dtype}", target, name, bound, 1, "no case reaches it")


def stale(found: Iterable[Failure]) -> Iterator[Failure]:
    """Exceptions that nothing needs any more, but for what the version of the compiler decides and those of the
    sweep, of which most runs see a part.
    """
    needed = {(failure.measure, failure.exception) for failure in found}
    for glob, measure, why in EXCEPTIONS:
        if (measure, why) not in needed and measure != "instructions" and "~" not in glob:
            yield Failure(glob, "*", "*", "stale exception", 1, f"{measure} holds: {why}")


def unexplained(found: Iterable[Beaten], whole: bool) -> Iterator[Failure]:
    """Where a peer is better without a reason and, of a `whole` run, reasons that nothing needs."""
    needed = set()
    for beaten in found:
        reason = beaten.reason
        needed.add(reason)
        if reason is None:
            mine, theirs = beaten.own[beaten.measure], beaten.figures[beaten.measure]
            what = f"{beaten.peer} has {theirs:g}, and REASONS no reason"
            yield Failure(beaten.call, "sm_90", "*", beaten.measure, mine, what)
    for reason in REASONS if whole else ():
        if reason not in needed:
            yield Failure(reason.calls, "sm_90", "*", "stale reason", 1, f"nothing needs it: {reason.why}")
