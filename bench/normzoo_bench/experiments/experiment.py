"""An experiment, run over seeds: a document of numbers, and the table that is made of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normzoo.files import whole
from normzoo.terminal import progress

from ..environment import environment, version
from ..figures import there

FORM = 1
"""Of the document; rises when a reader of older ones would go wrong."""


COLORS = ("#0b7a75", "#d1682a", "#5b5ea6", "#26323b")
"""Of the lines and points in a figure."""


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Experiment:
    name: str
    says: str
    """In one line, what is compared."""
    settings: Any
    """A dataclass with a field ``seeds``, their number; without one where nothing is random."""
    quick: Any
    """The same, for a run of seconds that shows nothing but that all works."""
    run: Callable[[Any, int], list[tuple[dict, dict]]]
    """(settings, seed) -> what was tried, and the numbers it gave; the same trials in the same order always."""
    table: Callable[[dict], Table]
    """Of a document."""
    draw: Callable[[dict], str]
    """An SVG of a document."""
    paint: Callable[[dict], bytes] | None = None
    """A PNG of a document, beside the SVG."""
    digits: bool = True
    """Whether its data come with scikit-learn."""


def measure(experiment: Experiment, seeds: int | None = None, quick: bool = False) -> dict:
    """Runs the seeds 0, 1, ... and returns the document, ready for JSON.

    One row a trial: what was tried, and under ``values`` for each number a list with one entry a seed.
    """
    settings = experiment.quick if quick else experiment.settings
    if seeds is not None:
        settings = dataclasses.replace(settings, seeds=seeds)
    count = getattr(settings, "seeds", 1)
    rows: list[dict] = []
    begun = time.process_time()
    with _repeatable(), progress(experiment.name, count) as step:
        surroundings = environment("cpu")
        if experiment.digits:
            surroundings["scikit-learn"] = version("sklearn", "scikit-learn")
        for seed in range(count):
            for i, (tried, numbers) in enumerate(experiment.run(settings, seed)):
                if seed == 0:
                    rows.append({**tried, "values": {name: [] for name in numbers}})
                for name, number in numbers.items():
                    rows[i]["values"][name].append(round(number, 4))
            step(f"seed {seed}")
    return {
        "form": FORM,
        "experiment": experiment.name,
        "quick": quick,
        "environment": surroundings,
        "settings": dataclasses.asdict(settings),
        "cpu_seconds": round(time.process_time() - begun, 1),
        "rows": rows,
    }


@contextmanager
def _repeatable() -> Iterator[None]:
    """One thread, because sums depend on how threads share them; the caller's generator stays as it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        torch.set_num_threads(threads)


def values(document: dict, name: str, **tried: Any) -> list[float]:
    """The numbers of that name, one a seed, of the one trial that fits `tried`."""
    (row,) = (row for row in document["rows"] if row.items() >= tried.items())
    return row["values"][name]


def deviation(numbers: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None for one seed."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def standard_error(numbers: Sequence[float]) -> float | None:
    """Of their mean; None for one seed."""
    found = deviation(numbers)
    return None if found is None else found / len(numbers) ** 0.5


def spread(numbers: Sequence[float], places: int = 1) -> str:
    """``mean ± standard deviation``, of one seed the number."""
    return _around(f"{statistics.mean(numbers):.{places}f}", deviation(numbers), places)


def difference(numbers: Sequence[float], places: int = 1) -> str:
    """``mean ± standard error`` of differences, with their sign."""
    return _around(signed(statistics.mean(numbers), places), standard_error(numbers), places)


def signed(number: float, places: int = 1) -> str:
    return f"{round(number, places) + 0.0:+.{places}f}".replace("-", "−")  # no minus before a zero


def _around(text: str, width: float | None, places: int) -> str:
    return text if width is None else f"{text} ± {width:.{places}f}"


def command(document: dict, experiment: Experiment) -> str:
    """What gives the document again."""
    usual = experiment.quick if document["quick"] else experiment.settings
    seeds = document["settings"].get("seeds")
    options = " --quick" * document["quick"] + f" --seeds {seeds}" * (seeds != getattr(usual, "seeds", None))
    return f"python -m normzoo_bench.experiments {experiment.name}{options}"


def where(document: dict) -> str:
    """How many seeds, on what, and how long it took, in a sentence."""
    found, seeds = document["environment"], document["settings"].get("seeds")
    over = f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}" if seeds else "Nothing is random"
    versions = [f"torch {found['torch']}", f"Python {found['python']}"]
    versions += [f"{name} {found[name]}" for name in ("scikit-learn",) if name in found]
    return (
        f"{over}; {document['cpu_seconds']:.0f} s of one thread of {found['cpu'] or 'an unknown CPU'}, "
        f"{', '.join(versions)}."
    )


def markdown(document: dict, experiment: Experiment) -> str:
    """The command, the table, and where it was measured, for a page."""
    table = experiment.table(document)
    lines = ["```", command(document, experiment), "```", "", table.title + ":", ""]
    lines += ["| " + " | ".join(table.header) + " |", "|" + " --- |" * len(table.header)]
    lines += ["| " + " | ".join(row) + " |" for row in table.cells]
    return "\n".join([*lines, "", where(document), ""])


def write(document: dict, experiment: Experiment, folder: Path) -> list[Path]:
    """NAME.json, NAME.md and, where matplotlib is installed, NAME.svg, of some NAME.png too."""
    made = {"json": _json(document).encode(), "md": markdown(document, experiment).encode()}
    if there():
        made["svg"] = experiment.draw(document).encode()
        if experiment.paint is not None:
            made["png"] = experiment.paint(document)
    paths = {folder / f"{experiment.name}.{ending}": content for ending, content in made.items()}
    for path, content in paths.items():
        with whole(path) as part:
            part.write_bytes(content)
    return list(paths)


def _json(document: dict) -> str:
    """One line a row, so that a change of a number is a change of a line."""
    head = json.dumps({name: value for name, value in document.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    return head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n"
