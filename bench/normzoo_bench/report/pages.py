"""The documents as one page of HTML that needs nothing else, and as two pieces of Markdown for the docs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined  # torch depends on it
from markupsafe import Markup, escape

from ..figures import Drawn
from .documents import Documents, places
from .judging import MET, MISSED, VERDICTS, number
from .plots import PLOTS
from .table import Line, commands, counts

MADE_BY = "python -m normzoo_bench.report"
_VARIABLES = {
    "#ffffff": "paper", "#26323b": "ink", "#5b6973": "soft", "#b9c2c9": "faint", "#e6eaed": "grid", "#f1f4f6":
    "band", "#0b7a75": "teal", "#d1682a": "rust", "#5b5ea6": "violet", "#97478a": "plum", "#7a5f00": "olive",
    "#0067a5": "blue",
}  # fmt: skip
"""Colors of the plots by their names in the style of the page, which has others for dark."""


@dataclass(frozen=True)
class Shown:
    """A plot as it stands in a page."""

    name: str
    title: str
    says: str
    command: str
    drawn: Drawn | None

    @property
    def svg(self) -> str:
        return recolored(self.drawn.svg) if self.drawn else ""


def shown(documents: Documents) -> list[Shown]:
    """All plots, and those about a GPU only where one ran, but for the first."""
    every = [Shown(p.name, p.title, p.says, p.command, p.draw(documents)) for p in PLOTS]
    return [plot for plot in every if plot.drawn or not plot.name.startswith("ratios-gpu-")]


def compact(svg: str) -> str:
    """Without the digits and names that nobody needs: a tenth of a point is less than a pixel."""
    svg = re.sub(r"<[^!>]+>", _shorter, svg)
    svg = svg.replace("</style>", _TEXT + "</style>", 1)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", svg)


_TEXT = "text{font:9px 'DejaVu Sans',sans-serif;fill:#26323b}"
"""What most text of a plot is set in, told once."""


def _shorter(found: re.Match) -> str:
    tag = re.sub(r"-?\d+\.\d\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), found[0])
    tag = re.sub(r"M (\S+) (\S+) \nL (\S+) \2 (?=\n)", r"M\1 \2H\3", tag)
    tag = re.sub(r"M (\S+) (\S+) \nL \1 (\S+) (?=\n)", r"M\1 \2V\3", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    if tag.startswith("<text"):
        tag = re.sub(r"font-family: [^;]*; ?|font-size: 9px; ?|; fill: #26323b", "", tag)
    return re.sub(r'^<g id="[^"]*"', "<g", tag)


def recolored(svg: str) -> str:
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def summary(found: Sequence[Line]) -> str:
    kept = counts(found)
    words = [f"{kept[verdict]} {verdict}" for verdict in VERDICTS if verdict in kept]
    return f"Of {len(found)} goals: {', '.join(words)}."


def html(documents: Documents, found: Sequence[Line], plots: Sequence[Shown], folder: str) -> str:
    loader = PackageLoader("normzoo_bench.report", "")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.filters["coded"] = _coded
    return pages.get_template("page.html").render(
        places=places(documents.sources),
        summary=summary(found),
        folder=folder,
        made_by=MADE_BY,
        sections=list(_sections(found)),
        numbers=commands(found),
        plots=plots,
        measured=_measured(documents),
        sources=documents.sources,
        unread=documents.unread,
    )


def _sections(found: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    for section, of_section in groupby(found, key=lambda line: line.goal.section):
        yield section, list(of_section)


def _measured(documents: Documents) -> list[dict[str, str]]:
    """Of every row of a GPU that the static gate was given, the time that it predicts, and its time."""
    return [
        {
            "call": row["name"],
            "GPU": row["gpu"],
            "predicted, µs": number(1e6 * row["predicted"]),
            "measured, µs": number(1e6 * row["measured"]),
            "ratio": number(row["measured"] / row["predicted"]),
        }
        for source in documents.sources
        for row in (source.entries("measured") if source.name == "static" else ())
    ]


def goals_markdown(found: Sequence[Line]) -> str:
    """The table of goals and its commands, then what is missed."""
    numbers = commands(found)
    parts = [summary(found)]
    for section, of_section in _sections(found):
        rows = ["| goal | asked | measured | verdict | command |", "|---|---|---|---|---|"]
        for line in of_section:
            goal, finding = line.goal, line.finding
            by = ", ".join(str(numbers[command]) for command in line.commands)
            what, value = _plain(goal.what), _plain(finding.value or "—")
            cells = (what, goal.bound, value, _emphasized(finding.verdict), by)
            rows.append("| " + " | ".join(cells) + " |")
        parts += [f"**{section}**", "\n".join(rows)]
    parts += ["The commands:", "\n".join(f"{i}. `{command}`" for command, i in numbers.items())]
    if missed := [line for line in found if line.follows]:
        parts.append("What is missed, and what next:")
        parts.append(
            "\n".join(
                f"- **{_plain(line.goal.what)}.** {_plain(' '.join(_sentences(line)))}" for line in missed
            )
        )
    return "\n\n".join(parts) + "\n"


def _emphasized(verdict: str) -> str:
    return f"**{verdict}**" if verdict in (MET, MISSED) else verdict


def _sentences(line: Line) -> Iterator[str]:
    if line.finding.missed:
        yield "; ".join(line.finding.missed) + "."
    yield from line.follows[len(line.finding.missed) :]


def _plain(text: str) -> str:
    """So that nothing but code, which is between backticks, means anything in Markdown."""
    parts = text.split("`")
    return "`".join(re.sub(r"([|*_<])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def _coded(text: str) -> Markup:
    """The same for HTML."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def plots_markdown(plots: Sequence[Shown], folder: str) -> str:
    """Every plot with its words; `folder` is where the files lie, seen from the page."""
    parts = []
    for plot in plots:
        parts.append(f"### {plot.title}")
        if plot.drawn:
            parts += [plot.says, f"![{plot.title}]({folder}/{plot.name}.svg)"]
        else:
            parts.append(f"Not measured here: `{plot.command}`")
    return "\n\n".join(parts) + "\n"
