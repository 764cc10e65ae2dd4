"""Tables, sentences and progress for people: by rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Perhaps with a spread behind it.
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?( ?(%|x|\(.*\)))?|-")
_GAP = 2
# A column that breaks lines keeps so many characters, and a third of its longest cell: taller ones are hard to
# follow across.
_LEAST = 20


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], wrap: Sequence[str] = ()) -> None:
    """Prints a table; columns of numbers go to the right, except the first, and empty ones are left out.

    On a terminal that is too narrow, the columns named in `wrap` break lines; where that does not do, every row
    becomes a block of lines. Without `wrap` the table stays as wide as it is.
    """
    shown = [i for i in range(len(header)) if not rows or any(row[i] for row in rows)]
    header, rows = [header[i] for i in shown], [[row[i] for i in shown] for row in rows]
    natural = _natural(header, rows)
    widths = _fitted(header, natural, wrap) if wrap else natural
    right = [i > 0 and all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(header))]
    if widths is None:
        _blocks(title, header, rows)
    elif _has_rich():
        _rich(title, header, rows, right, widths)
    else:
        print(title, plain(header, rows, widths, right), sep="\n", end="\n\n")


def _natural(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The widths of columns that break no lines."""
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _width() -> int | None:
    """The columns of the terminal; None for a file or a pipe, which have no width to fit into."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return None
    return max(shutil.get_terminal_size().columns, 40)


def _fitted(header: Sequence[str], natural: Sequence[int], wrap: Sequence[str]) -> Sequence[int] | None:
    """The widths of the columns; None where they do not fit, and cannot break lines enough."""
    width = _width()
    if width is None:
        return natural
    widths = [
        min(most, max(_LEAST, -(-most // 3))) if name in wrap else most
        for name, most in zip(header, natural, strict=True)
    ]
    spare = width - sum(widths) - _GAP * (len(widths) - 1)
    if spare < 0:
        return None
    for i, most in enumerate(natural):
        more = min(most - widths[i], spare)
        widths[i] += more
        spare -= more
    return widths


def _rich(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    widths: Sequence[int],
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # One blank is the cell's and one stands for the line between columns: _GAP.
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, is_number, width in zip(header, right, widths, strict=True):
        made.add_column(name, justify="right" if is_number else "left", width=width, overflow="fold")
    for row in rows:
        made.add_row(*row)
    console = Console(
        width=_width() or sum(widths) + _GAP * len(widths) + len(title),
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # bold is left out too
        highlight=False,
        markup=False,
    )
    with console.capture() as captured:
        console.print(Text(title, style="bold"), made, sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), end="\n\n")


def plain(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int] | None = None,
    right: Sequence[bool] | None = None,
) -> str:
    """A table in plain text. `widths` are those of the columns, and `right` tells which stand on the right."""
    widths = _natural(header, rows) if widths is None else widths
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        broken = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for cells in itertools.zip_longest(*broken, fillvalue=""):
            placed = zip(cells, widths, right or [False] * len(widths), strict=True)
            line = (" " * _GAP).join(c.rjust(w) if number else c.ljust(w) for c, w, number in placed)
            lines.append(line.rstrip())
    return "\n".join(lines)


def _blocks(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    width, named = _width() or sys.maxsize, max(map(len, header))
    say(title)
    for name, *cells in rows:
        print(f"\n{name}")
        for key, cell in zip(header[1:], cells, strict=True):
            if cell:
                print(_broken(cell, width, f"  {key.ljust(named)}  ", " " * (named + 4)))
    print()


def say(text: str, width: int | None = None) -> None:
    """Prints lines, broken between words where they are wider than `width` or, without it, the terminal."""
    width = width or _width()
    for line in text.splitlines():
        print(_broken(line, width) if width else line)


def _broken(line: str, width: int, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        line,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
        break_long_words=False,
    )


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
