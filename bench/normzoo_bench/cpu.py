"""Everything about the layers on a CPU, in one command: ``python -m normzoo_bench.cpu --output DIR``.

Layers against torch and against the authors' codes, then time against rows, width and channels, within a time
limit. ``DIR/cpu-layers.json`` and ``DIR/cpu-scaling.json`` are written again after every case, fit for
`normzoo compare`. At the end stands every goal of a CPU that they decide, met or missed, with the worst rows.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from normzoo.terminal import progress, say, table
from normzoo.zoo import Entry, find

from . import passes
from . import run as runs
from .cases import Case, plan
from .measure import Settings
from .report.documents import Documents, read
from .report.goals import goals
from .report.table import Line, lines
from .results import Document, demand_writable
from .tables import show
from .workloads import DIRECTIONS, Workload, memory_formats

DOCUMENTS = ("cpu-layers", "cpu-scaling")

_SHAPES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "rows": (("llm", (1024, 4096)), ("small", (64, 1024)), ("vit", (32, 197, 768)), ("odd", (1024, 1023))),
    "channels": (
        ("resnet", (8, 512, 28, 28)),
        ("small", (16, 64, 8, 8)),
        ("resnet", (8, 256, 56, 56)),
        ("resnet", (16, 2048, 7, 7)),
    ),
    "running": (("tokens", (1024, 1024)), ("small", (64, 1024)), ("tokens", (32, 197, 768))),
    "weights": (("conv", (512, 512, 3, 3)), ("small", (64, 64, 3, 3)), ("stem", (64, 3, 7, 7))),
}
"""Where memory takes the time, and where starting operators does: one of each, then more."""
_FIRST = 2
"""Shapes that every layer of a part gets, in its first dtype, before any gets another."""

_TORCHS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
_MODELS = ("adaptive_layer_norm", "adaptive_rms_norm")
"""What models write with torch's operators."""
_SAMPLE_SECONDS = 0.004
_ROUNDS = 11


@dataclass(frozen=True)
class Part:
    name: str
    weight: float
    """Its share of the time that is left is its part of the weights that are left."""
    layers: tuple[str, ...]
    contenders: tuple[str, ...]
    directions: tuple[str, ...] = DIRECTIONS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = ("training",)
    """Of layers that couple samples."""
    scaling: str | None = None

    @property
    def document(self) -> str:
        return DOCUMENTS[self.scaling is not None]

    def cases(self, rehearse: bool = False) -> list[Case]:
        entries = [find(name) for name in self.layers]
        if self.scaling is not None:
            size = "smoke" if rehearse else "default"
            made = plan(entries, "cpu", size, self.dtypes, scaling=self.scaling)
            return [case for case in made if case.mode != "eval"]
        first, rest = range(_FIRST), range(_FIRST, max(map(len, _SHAPES.values())))
        turns = ((first, self.dtypes[:1]), (first, self.dtypes[1:]), (rest, self.dtypes))
        return [
            case
            for places, dtypes in turns
            for place in places
            for entry in entries
            for case in self._at(place, entry, dtypes, rehearse)
        ]

    def _at(self, place: int, entry: Entry, dtypes: Sequence[str], rehearse: bool) -> Iterator[Case]:
        for use, shape in _SHAPES[entry.family][place : place + 1]:
            shape = tuple(min(n, 8) for n in shape) if rehearse else shape
            for dtype in dtypes:
                for memory_format in memory_formats(entry.family, shape):
                    for mode in self.modes if entry.couples_samples else ("any",):
                        if memory_format != "padded":
                            yield Case(entry, Workload(use, shape), dtype, memory_format, mode)


_OFFICIAL = ("ghost_batch_norm", "adab2n", "batch_channel_norm", "evo_norm_b0", "evo_norm_s0")
_OFFICIAL += ("region_norm_b", "region_norm_l", "alpha_batch_norm", "frozen_batch_norm")
_ROWS_OFFICIAL = ("crms_norm", "time_dependent_layer_norm", "time_dependent_rms_norm")
_RUNNING = ("power_norm", "unified_norm")
_PAIR, _TRIPLE = ("normzoo", "torch"), ("normzoo", "torch", "official")
_OURS = ("normzoo", "official")
_FEW = ("forward", "both")
PARTS = (
    Part("torch's layers", 3.0, _TORCHS, _PAIR, modes=("training", "eval")),
    Part("what models write", 0.8, (*_MODELS, "weight_standardize"), _TRIPLE),
    Part("the authors' rows and running norms", 1.2, (*_ROWS_OFFICIAL, *_RUNNING), _OURS),
    Part("the authors' channel norms", 4.5, _OFFICIAL, _OURS, _FEW),
    Part(
        "against rows", 1.2, ("rms_norm", "layer_norm", "batch_norm"), _PAIR, _FEW, ("float32",), scaling="rows"
    ),
    Part("against width", 0.8, ("rms_norm", "layer_norm"), _PAIR, _FEW, ("float32",), scaling="width"),
    Part(
        "against channels",
        1.2,
        ("batch_norm", "group_norm", "batch_channel_norm"),
        _TRIPLE,
        _FEW,
        ("float32",),
        scaling="channels",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all was measured, 1 if a check of normzoo failed, 2 without a folder, 130 if stopped. A goal
    that is missed is told, and no failure: a time on a shared machine is no reason for one."""
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.cpu",
        description="Measures the layers on a CPU against torch and the authors' codes, within a time limit.",
        epilog="Exit codes: 0 fine, 1 normzoo failed a check, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="a folder for the results; is made")
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="the same plan in tiny sizes")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.output)
    try:
        if not 0 < arguments.minutes < float("inf"):
            raise ValueError(f"--minutes is {arguments.minutes}; it must be more than 0")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output is {folder}, which cannot be made a folder: {error.strerror}"
            ) from error
        for name in DOCUMENTS:
            demand_writable(folder / f"{name}.json")
    except ValueError as error:
        print(f"normzoo_bench.cpu: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _measured(folder, 60 * arguments.minutes, arguments.rehearse)
    except KeyboardInterrupt:
        print(f"normzoo_bench.cpu: interrupted; what is done lies in {folder}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _measured(folder: Path, limit: float, rehearse: bool) -> int:
    end, device = time.monotonic() + limit, torch.device("cpu")
    first, clocks, cache = runs.start(device, _SAMPLE_SECONDS, 2 if rehearse else _ROUNDS)
    place = folder.name if folder.is_absolute() else str(folder)  # nothing about the machine
    first.settings["command"] = "python -m normzoo_bench.cpu"
    first.settings["arguments"] = {"output": place, "minutes": limit / 60, "rehearse": rehearse}
    second = Document(first.environment, {**first.settings}, {**first.copy_bandwidth})
    documents = dict(zip(DOCUMENTS, (first, second), strict=True))
    for name, document in documents.items():
        document.write(folder / f"{name}.json")  # in the place of an older one
    settings = Settings(device, (), (), clocks, documents[DOCUMENTS[0]].settings["rounds"], cache)
    if rehearse:
        settings = replace(settings, cache=1 << 16)
    layers = sorted({name for part in PARTS for name in part.layers})
    documents[DOCUMENTS[0]].extra["passes"] = [passes.counted(name) for name in layers]
    undisturbed = _parts(documents, settings, folder, end, rehearse)
    for name, document in documents.items():
        if undisturbed:
            runs.finish(document, settings)
        document.write(folder / f"{name}.json")
        show(asdict(document))
    show_verdicts(verdicts(folder))
    if left := [case for document in documents.values() for case in document.not_run]:
        say(f"No time was left for {len(left)} measurements, first {left[0]}; more --minutes have them.")
    if not undisturbed:
        print(f"normzoo_bench.cpu: interrupted; what is done lies in {folder}", file=sys.stderr)
        return 130
    return 1 if any(document.ours_failed for document in documents.values()) else 0


def _parts(
    documents: dict[str, Document], settings: Settings, folder: Path, end: float, rehearse: bool
) -> bool:
    """Measures part by part until `end`; whether the user let it."""
    weights = sum(part.weight for part in PARTS)
    for part in PARTS:
        cases, document, started = part.cases(rehearse), documents[part.document], time.monotonic()
        deadline = started + (end - started) * part.weight / weights
        weights -= part.weight
        of_part = replace(settings, contenders=part.contenders, directions=part.directions, deadline=deadline)
        with progress(part.name, len(cases)) as step:

            def after_each(case: object, step=step, document=document, name=part.document) -> None:
                step(str(case))
                document.write(folder / f"{name}.json")

            if not runs.run(cases, of_part, document, after_each):
                return False
        document.extra.setdefault("parts", {})[part.name] = round(time.monotonic() - started, 1)
    return True


def verdicts(folder: Path) -> list[Line]:
    """Every goal of a CPU that the documents of this command in `folder` decide."""
    every = read(folder)
    sources = tuple(source for source in every.sources if source.name in DOCUMENTS)
    found = Documents(sources, (), [(source, row) for source, row in every if source.name in DOCUMENTS])
    return lines(found, [goal for goal in goals() if goal.key in ("cpu-torch", "cpu-sweeps", "cpu-official")])


def show_verdicts(found: Sequence[Line]) -> None:
    """Prints the goals, met or missed, and the worst rows of each."""
    cells = [(line.goal.what, line.goal.bound, line.finding.verdict, line.finding.value) for line in found]
    table("Goals on this CPU", ("goal", "bound", "", "measured"), cells, ("goal", "measured"))
    for line in found:
        for missed in line.finding.missed:
            say(f"{line.goal.key}: {missed}")


if __name__ == "__main__":
    sys.exit(main())
