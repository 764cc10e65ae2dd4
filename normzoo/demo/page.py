"""The report of the demonstration: one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined  # torch depends on it

from normzoo_bench import figures
from normzoo_bench.tables import spread

from ..files import whole
from . import charts, printed
from .settings import Settings


def write(path: Path, result: dict, settings: Settings) -> None:
    """Writes the report of a `result` of the demonstration to `path`, whole or not at all."""
    with whole(path) as part:
        part.write_text(html(result, settings), encoding="utf-8")


def html(result: dict, settings: Settings) -> str:
    """The report as text. Without matplotlib it has no charts, and says so."""
    loader = PackageLoader("normzoo.demo", "")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found = result["conversion"]
    drawn = {}
    if figures.there():
        bounds = (found["bits_before"], result["text"]["bits_by_frequency"])
        drawn = {
            "loss": charts.loss_curve(result["curve"], *bounds),
            "speed": charts.speed_bars(result["timings"]),
        }
        if result["images"]:
            drawn["images"] = charts.accuracy_curves(result["images"])
    return pages.get_template("page.html").render(
        result=result,
        settings=settings,
        found=found,
        facts=printed.facts(found),
        rewrite=_filled(*result["rewrite"]["table"]),
        rewritten=printed.rewritten(result["rewrite"]),
        images=result["images"],
        accuracies=printed.accuracies(result["images"]) if result["images"] else (),
        missing=printed.MISSING,
        verdict=printed.verdict(result, settings),
        charts=drawn,
        spread=spread,
    )


def _filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
