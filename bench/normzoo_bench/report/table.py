"""The table of goals: every goal with what was measured, by which command, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .documents import Documents
from .goals import CAUSES, goals
from .judging import ABSENT, ELSEWHERE, MISSED, Finding, Goal


@dataclass(frozen=True)
class Line:
    goal: Goal
    finding: Finding
    commands: tuple[str, ...]
    cause: str

    @property
    def open(self) -> bool:
        """Missed, and nobody has told why."""
        return self.finding.verdict == MISSED and not self.cause

    @property
    def follows(self) -> tuple[str, ...]:
        """What misses the goal, why, and what to try; nothing for a goal that is met."""
        if self.finding.verdict != MISSED:
            return ()
        cause = self.cause or "not found out yet"
        return (*self.finding.missed, f"Why: {cause}.", f"Next: {self.goal.ahead}.")


def lines(documents: Documents, wanted: Sequence[Goal] | None = None) -> list[Line]:
    """One for each goal.

    Raises:
        ValueError: a line has no command, neither of its documents nor of the goal.
    """
    found = []
    for goal in goals() if wanted is None else wanted:
        finding = goal.judge(documents)
        measured = finding.verdict not in (ABSENT, ELSEWHERE)
        said = [source.command for source in finding.sources] if measured else [goal.command]
        if not said or not all(said):
            names = ", ".join(source.name for source in finding.sources) or "no document"
            raise ValueError(
                f"the goal {goal.key!r} has no command (measured in {names}); a document has to say by what "
                "command it was written, in settings['command']"
            )
        found.append(Line(goal, finding, tuple(dict.fromkeys(said)), CAUSES.get(goal.key, "")))
    return found


def commands(found: Sequence[Line]) -> dict[str, int]:
    """The commands of all lines, numbered in order of appearance."""
    every = dict.fromkeys(command for line in found for command in line.commands)
    return {command: i + 1 for i, command in enumerate(every)}


def counts(found: Sequence[Line]) -> dict[str, int]:
    """How many goals there are of each verdict."""
    kept: dict[str, int] = {}
    for line in found:
        kept[line.finding.verdict] = kept.get(line.finding.verdict, 0) + 1
    return kept
