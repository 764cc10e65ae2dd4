"""What became of each weight, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..conversion import report
from ..terminal import plain

INVARIANT = "scale invariant"
WITH_BIAS = "scale invariant with its bias"
WITH_WEIGHT = "scale invariant with its weight"
MOVES = "moves the output"
DEAD = "no influence"
JUMPS = "moves the output in jumps only"
PENDING = "not checked yet"
OF_NORM = "of a norm"
EXCLUDED = "excluded"
CAUTIOUS = (DEAD, JUMPS, INVARIANT, WITH_BIAS, MOVES)
"""Verdicts: where ranks disagree, the last one holds."""


@dataclass
class Row:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    verdict: str
    projected: bool = False
    note: str = ""
    """What else decided."""
    moved: float | None = None
    """How far the output moves when the weight is doubled, relative to its largest entry."""

    @property
    def why(self) -> str:
        """Why it is projected, or not, in a sentence."""
        moved = f"moves the output by {self.moved:.2g}" if self.verdict == MOVES and self.moved else ""
        return "; ".join(filter(None, (moved or self.verdict, self.note)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"shape": list(self.shape), "why": self.why}


@dataclass
class Report:
    """What became of each weight; ``print()`` shows it as a table."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def projected(self) -> tuple[str, ...]:
        """Names of the parameters that are projected, biases and those of norms included."""
        return tuple(row.name for row in self.rows if row.projected)

    @property
    def pending(self) -> bool:
        """Whether the check waits for the first forward pass."""
        return any(row.verdict == PENDING for row in self.rows)

    def summary(self) -> str:
        """How many weights are projected, and what else is to be known."""
        weights = [row for row in self.rows if row.verdict != OF_NORM and len(row.shape) > 1]
        count = report.count(len(weights), "weight")
        if self.pending:
            lines = [f"{count}: the check waits for the first forward pass in training mode"]
        else:
            lines = [f"{sum(row.projected for row in weights)} of {count} projected"]
        return "\n".join((*lines, *self.notes))

    def table(self) -> str:
        """The report as text; parameters that differ by a number in their name share a row."""
        items = []
        for row in self.rows:
            cells = (
                str(row.shape).replace(",)", ")"),
                "yes" if row.projected else "no",
                "; ".join(filter(None, (row.verdict, row.note))),
            )
            items.append((row.name, cells, row.moved if row.verdict == MOVES else None))
        header = ("parameter", "shape", "projected", "why", "moved by")
        return f"{plain(header, report.grouped(items))}\n\n{self.summary()}"

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": [row.to_dict() for row in self.rows], "notes": self.notes}

    def to_json(self) -> str:
        """Every parameter with all that is known about it."""
        return json.dumps(self.to_dict(), indent=2)


def warnings_of(rows: Sequence[Row], inserted: bool) -> list[str]:
    """What is to be warned of, given the rows of all weights."""
    weights = [row for row in rows if row.verdict != WITH_WEIGHT]
    untold = [
        row for row in weights if row.verdict in (DEAD, JUMPS) and not (row.projected or row.note == EXCLUDED)
    ]
    of_all = report.count(len(weights), "weight")
    none = f"none of {of_all} is projected, for "
    pass_others = "pass a larger or more varied example=, or name what is not in use in exclude="
    if untold and all(row.verdict == JUMPS for row in weights):
        return [f"{none}all move the output in jumps only on these inputs, which tell nothing; {pass_others}"]
    said = []
    if not any(row.projected for row in weights):
        norms = "" if inserted else "insert=True puts norms in front of activations, "
        said.append(f"{none}none is scale invariant; {norms}include= names weights, and .report says why")
    if untold:
        dead = sum(row.verdict == DEAD for row in untold)
        parts = [f"{dead} without influence on the output"] if dead else []
        parts += [f"{len(untold) - dead} in jumps only"] if len(untold) > dead else []
        said.append(
            f"these inputs do not tell of {len(untold)} of {of_all} whether to project, which are left alone "
            f"({', '.join(parts)}); {pass_others}"
        )
    return ["; ".join(said)] if said else []


def rows_from(saved: Sequence[dict[str, Any]]) -> list[Row]:
    """The inverse of :meth:`Row.to_dict`."""
    made = []
    for each in saved:
        known: dict[str, Any] = {key: value for key, value in each.items() if key != "why"}
        known["shape"] = tuple(each["shape"])
        made.append(Row(**known))
    return made
