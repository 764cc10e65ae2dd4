"""Tables and progress for people: by rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Perhaps with a spread behind it.
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?( ?(%|x|\(.*\)))?|-")


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], wrap: Sequence[str] = ()) -> None:
    """Prints a table; columns of numbers go to the right, and only those named in `wrap` may break lines."""
    right = [all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(header))]
    if not _has_rich():
        _plain(title, header, rows, right)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width to fit into; rich would take 80 columns and cut the rest off.
    natural = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, is_number in zip(header, right, strict=True):
        made.add_column(name, justify="right" if is_number else "left", no_wrap=name not in wrap)
    for row in rows:
        made.add_row(*row)
    console = Console(width=200 if natural else None, highlight=False, markup=False)
    console.print(Text(title, style="bold"), made, "", sep="\n")


def _plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, right, strict=True)
        line = "  ".join(c.rjust(w) if is_number else c.ljust(w) for c, w, is_number in cells)
        print(line.rstrip())
    print()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields a function that takes one step and shows a note beside the bar.

    Where stderr is no terminal or rich is missing, ten lines.
    """
    if not (sys.stderr.isatty() and _has_rich()):
        done = 0

        def step(note: str) -> None:
            nonlocal done
            done += 1
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{what}: {done}/{total}  {note}", file=sys.stderr, flush=True)

        yield step
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
