"""The forms that only a measurement can choose (`normzoo_kernels._choices`): each beside its default, in turns
in one process, and what follows."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from normzoo.terminal import say, table
from normzoo.zoo import find

from . import checks, peers
from .cases import Case
from .clocks import Rotation
from .measure import Settings, call_of, timed
from .results import Document
from .tables import short, spread
from .workloads import Workload

_BOTH = ("contiguous", "channels_last")
_ASKED: dict[str, tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]] = {
    "on_chip": (
        ("batch_norm", (32, 1024, 14, 14), _BOTH[:1]),
        ("batch_norm", (32, 2048, 7, 7), _BOTH[:1]),
        ("batch_norm", (32, 512, 28, 28), _BOTH[:1]),
        ("batch_norm", (8, 2048, 7, 7), _BOTH),
        ("group_norm", (16, 1280, 16, 16), _BOTH),
        ("group_norm", (16, 1280, 8, 8), _BOTH),
        ("group_norm", (16, 640, 32, 32), _BOTH[:1]),
        ("instance_norm", (16, 256, 56, 56), _BOTH[:1]),
        ("instance_norm", (16, 128, 112, 112), _BOTH[:1]),
    ),
    "reversed_map": (
        ("batch_norm", (64, 256, 28, 28), _BOTH),
        ("batch_norm", (64, 256, 56, 56), _BOTH),
        ("batch_norm", (64, 2048, 7, 7), _BOTH[:1]),
        ("group_norm", (16, 320, 64, 64), _BOTH),
        ("instance_norm", (64, 64, 112, 112), _BOTH[:1]),
    ),
    "row_group": tuple(
        (layer, shape, _BOTH[:1])
        for shape in ((4096, 16384), (2048, 32768), (1024, 65536))
        for layer in ("layer_norm", "rms_norm")
    ),
}
"""(layer, shape, layouts) by choice, the most important first: around the sizes where it begins to apply."""


@dataclass(frozen=True)
class Question:
    choice: str
    case: Case

    @property
    def key(self) -> dict:
        return self.case.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.case.shape

    @property
    def directions(self) -> tuple[str, ...]:
        return ("backward",) if self.choice == "row_group" else ("forward", "backward")

    def __str__(self) -> str:
        return f"{self.choice}: {self.case}"


def questions(device: str, dtype: str) -> list[Question]:
    """Small ones on a CPU, where no kernel runs; none without Triton."""
    if importlib.util.find_spec("triton") is None:
        return []
    found = []
    for place in range(max(map(len, _ASKED.values())) if device == "cuda" else 1):
        for choice, asked in _ASKED.items():
            for layer, shape, layouts in asked[place : place + 1]:
                size = shape if device == "cuda" else (2, 64, *(2 for _ in shape[2:]))
                entry, workload = find(layer), Workload("choice", size)
                mode = "training" if entry.couples_samples else "any"
                cases = (Case(entry, workload, dtype, layout, mode) for layout in layouts)
                found += [Question(choice, case) for case in cases]
    return found


def measure_choice(question: Question, settings: Settings, document: Document) -> None:
    """Adds a row for every value to ``choices`` of the document's extra, by the first clock."""
    from normzoo_kernels._choices import CHOICES, trying

    case, choice = question.case, CHOICES[question.choice]
    layer, buffers = case.layer(settings.device), case.buffers(settings.device, settings.cache)
    check = checks.Check(case, layer, buffers[0])
    contender = peers.contender("normzoo", case, layer, settings.device)
    names = {value: _called(question.choice, value) for value in (choice.default, *choice.others)}
    for direction in question.directions:
        rows, rotations = [], []
        for value, name in names.items():
            if settings.late:
                document.not_run.append(f"{question} {direction} {name}")
                continue
            with torch.set_grad_enabled(direction != "forward"), trying(**{question.choice: value}):
                examined = check.forward if direction == "forward" else check.both
                try:
                    error = examined(replace(contender, name=name))
                    call = call_of(contender, direction, buffers)
                    call(0)
                except Exception as failure:
                    document.add_failed(case, name, failure, direction)
                    continue
            call = _under(question.choice, value, call)
            launches = None
            if settings.count_launches:
                launches = checks.launches(lambda call=call: call(0))
            rotations.append(Rotation(call, len(buffers)))
            rest = {"launches": launches, "bytes": case.bytes(direction), "error": error}
            rows.append(
                {**case.key, "choice": question.choice, "value": value, **_row(name, direction), **rest}
            )
        with torch.set_grad_enabled(direction != "forward"):
            found = timed(
                case, settings.clocks[0], rows, rotations, settings.rounds, document,
                lambda _: (names[choice.default],),
            )  # fmt: skip
        document.extra.setdefault("choices", []).extend(found)


def _called(choice: str, value: int | bool) -> str:
    """A contender of normzoo, so that one that computes something else fails the command."""
    return f"normzoo-{choice}={value}"


def _row(name: str, direction: str) -> dict:
    return {"contender": name, "direction": direction}


def _under(choice: str, value: int | bool, call: Callable[[int], object]) -> Callable[[int], object]:
    from normzoo_kernels._choices import trying

    def under(i: int) -> object:
        with trying(**{choice: value}):
            return call(i)

    return under


def show(rows: Sequence[dict], failed: Sequence[dict] = ()) -> None:
    """Prints a table for every value that is not the default, and what to do about it: `failed` are the
    entries of the document."""
    for choice, value in dict.fromkeys((row["choice"], row["value"]) for row in rows):
        tried = [row for row in rows if (row["choice"], row["value"]) == (choice, value) and row["speedup"]]
        if not tried or tried[0]["contender"] == tried[0]["baseline"]:
            continue
        cells = [
            (
                _place(row),
                row["direction"],
                short(row["seconds"]["median"] * 1e6),
                spread(row["speedup"]),
                "" if row["share_of_copy"] is None else f"{100 * row['share_of_copy']:.0f}",
                "" if row["launches"] is None else str(row["launches"]),
            )
            for row in tried
        ]
        header = ("layer", "direction", "time", f"x {tried[0]['baseline']}", "% copy", "launches")
        table(f"{tried[0]['contender']}, {tried[0]['dtype']}: {tried[0]['clock']} time in us", header, cells)
        say(advice(choice, value, tried, failed))
        print()


def _place(row: dict) -> str:
    last = " last" if row["memory_format"] == "channels_last" else ""
    return f"{row['layer']} {'x'.join(map(str, row['shape']))}{last}"


def advice(choice: str, value: int | bool, rows: Sequence[dict], failed: Sequence[dict] = ()) -> str:
    """Whether a value should become the default, by rows that tell how many times as fast it is, and by what
    failed, which no speed makes up for."""
    mean = statistics.geometric_mean(row["speedup"]["median"] for row in rows)
    faster = sum(row["speedup"]["p20"] > 1 for row in rows)
    slower = [row for row in rows if row["speedup"]["p80"] < 1]
    told = f"{choice}={value} is {short(mean)} times as fast: faster in {faster} of {len(rows)} rows, "
    told += f"slower in {len(slower)}. "
    if wrong := [entry for entry in failed if entry["contender"] == _called(choice, value)]:
        place = f"{_place(wrong[0])} {wrong[0]['direction']}: {wrong[0]['reason']}"
        return told + f"It must stay off: it failed {len(wrong)} times, first in {place}."
    if rows[0]["clock"] != "kernel":
        return told + "No kernel was measured, so nothing follows."
    if not faster:
        return told + "Leave it off."
    if slower:
        worst = min(slower, key=lambda row: row["speedup"]["median"])
        place = f"{_place(worst)} {worst['direction']}"
        return told + f"Before it is switched on, its form has to leave out sizes such as {place}."
    return told + f"Switch it on: {value} becomes the default of {choice} in normzoo_kernels/_choices.py."
