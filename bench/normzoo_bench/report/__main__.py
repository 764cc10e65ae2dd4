"""``python -m normzoo_bench.report``: the page about speed from the documents in a folder.

Writes ``report.html``, ``goals.md``, ``plots.md`` and, of every plot, an SVG and a PNG. Exit codes: 0 fine, 1 a
goal is missed and nobody has told why, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from normzoo.files import whole
from normzoo.terminal import say

from ..figures import there
from .documents import Documents, read
from .pages import Shown, compact, goals_markdown, html, plots_markdown, shown, summary
from .table import Line, lines

_PROGRAM = "python -m normzoo_bench.report"


def made(
    documents: Documents, folder: str, output: str, png: bool = True
) -> tuple[dict[str, bytes], list[Line]]:
    """The files by name, and the lines of the table; `folder` and `output` are what pages call these places.

    Without `png` such files are empty, which takes half of the time.
    """
    found = lines(documents)
    plots = shown(documents)
    for plot in plots:
        if plot.drawn:
            plot.drawn.svg = compact(plot.drawn.svg)
    files = {
        "report.html": html(documents, found, plots, folder).encode(),
        "goals.md": goals_markdown(found).encode(),
        "plots.md": plots_markdown(plots, output).encode(),
    }
    return files | _pictures(plots, png), found


def _pictures(plots: Sequence[Shown], png: bool) -> dict[str, bytes]:
    files = {}
    for plot in plots:
        if plot.drawn:
            files[f"{plot.name}.svg"] = plot.drawn.svg.encode()
            files[f"{plot.name}.png"] = plot.drawn.png() if png else b""
    return files


def _called(folder: Path) -> str:
    """What a page calls a folder: no place on the machine that made it."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Makes the page about speed, with plots and a table of goals, of documents in a folder.",
        epilog="Exit codes: 0 fine, 1 a goal is missed and nobody has told why, 2 wrong usage.",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("bench/results"), metavar="DIR", help="documents (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/performance"),
        metavar="DIR",
        help="pages (%(default)s); is made",
    )
    arguments = parser.parse_args(argv)
    try:
        if not there():
            raise ValueError("the plots need matplotlib, which is not installed; try `pip install matplotlib`")
        documents = read(arguments.results)
        files, found = made(documents, _called(arguments.results), arguments.output.name)
        arguments.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    for old in [*arguments.output.glob("*.svg"), *arguments.output.glob("*.png")]:
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        with whole(arguments.output / name) as part:
            part.write_bytes(content)
    size = sum(map(len, files.values()))
    say(f"{summary(found)} Wrote {len(files)} files, {size // 1000} KB, to {arguments.output}.")
    for name, reason in documents.unread:
        print(f"{_PROGRAM}: left out {name}.json: {reason}", file=sys.stderr)
    unexplained = [line.goal.key for line in found if line.open]
    for key in unexplained:
        print(f"{_PROGRAM}: missed, and CAUSES in goals.py does not say why: {key}", file=sys.stderr)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
