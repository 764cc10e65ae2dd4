"""Inspections and plans as tables: sites that differ by a number in their name share a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"\d+")


def grouped(items: Iterable[tuple[str, Sequence[str], float | None]]) -> list[tuple[str, ...]]:
    """Rows (name, cells, error) of items that differ in the numbers of their names alone.

    The error of a row is its largest.
    """
    groups: dict[tuple, list[tuple[str, float | None]]] = {}
    for name, cells, error in items:
        groups.setdefault((_NUMBER.sub("*", name), *cells), []).append((name, error))
    rows = []
    for (_, *cells), members in groups.items():
        errors = [error for _, error in members if error is not None]
        rows.append((_called([name for name, _ in members]), *cells, shown(max(errors)) if errors else "-"))
    return rows


def shown(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _called(names: Sequence[str]) -> str:
    """One name for several, with a star in place of the numbers in which they differ."""
    if len(names) == 1:
        return names[0] or "(the model)"
    numbers = zip(*map(_NUMBER.findall, names), strict=True)
    shown = iter([values[0] if len(set(values)) == 1 else "*" for values in numbers])
    return f"{_NUMBER.sub(lambda match: next(shown), names[0])} x{len(names)}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def a(word: str) -> str:
    """`word` with its article.

    >>> a("Tensor"), a("int"), a("ufunc")
    ('a Tensor', 'an int', 'a ufunc')
    """
    return f"{'an' if word[0] in 'AEIOaeio' else 'a'} {word}"


def tally(kinds: Iterable[str]) -> str:
    """How many there are of each kind, in a phrase."""
    return ", ".join(f"{number} {kind}" for kind, number in Counter(kinds).items())


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def reasons(found: Iterable[tuple[str, str]]) -> str:
    """A line a reason, with some of the names that it holds for; `found` has names and reasons."""
    names: dict[str, list[str]] = {}
    for name, why in found:
        names.setdefault(why, []).append(name or "the model itself")
    lines = []
    for why, those in names.items():
        lines.append(f"\n  {some(those)}: {why}")
    return "".join(lines)
