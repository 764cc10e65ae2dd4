"""One case, measured: contenders are checked, then timed in turns, direction by direction."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config

from . import checks, peers, timing
from .cases import Buffers, Case
from .clocks import Clock, Prepared, Rotation, seconds_a_call
from .peers import Absent, Contender
from .results import Document, is_normzoo

Errors = dict[str, dict[str, float]]
"""By direction; a direction that failed its check is not among them."""


@dataclass(frozen=True)
class Settings:
    device: torch.device
    contenders: tuple[str, ...]
    directions: tuple[str, ...]
    clocks: tuple[Clock, ...]
    rounds: int
    cache: int
    """Bytes that the rotated buffers have to exceed."""
    deadline: float = float("inf")
    """On time.monotonic(); what is not begun by then is not run."""
    count_launches: bool = False

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline


def measure(case: Case, settings: Settings, document: Document) -> None:
    """Adds the rows of `case` to `document`, and what was absent, failed or had no time left."""
    forget_compiled()
    # The backward pass is repeated on one graph, whose memory the compiler must not use for something else.
    with torch._functorch.config.patch(donated_buffer=False), warnings.catch_warnings():
        # torch says that it is slow with parameters of another dtype, which is what is measured.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        measurement = _Measurement(case, settings, document)
        checked = measurement.checked()
        for direction in settings.directions if checked else ():
            if settings.late:
                document.not_run.append(f"{case} {direction}")
                continue
            with torch.set_grad_enabled(direction != "forward"):
                measurement.direction(direction, checked)


def forget_compiled() -> None:
    """For what comes next: dynamo's limit on recompilations counts for the whole process."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def call_of(contender: Contender, direction: str, buffers: Sequence[Buffers]) -> Callable[[int], object]:
    """A function of the place of the buffers that does what `direction` says, and returns what it made."""
    wanted = tuple(contender.parameters.values())

    def forward(i: int) -> object:
        return contender.call(buffers[i].x)

    def both(i: int) -> object:
        x, dy = buffers[i]
        return torch.autograd.grad(contender.call(x), (x, *wanted), dy, allow_unused=True)

    if direction != "backward":
        return both if direction == "both" else forward
    outputs = [contender.call(x) for x, _ in buffers]

    def backward(i: int) -> object:
        x, dy = buffers[i]
        return torch.autograd.grad(outputs[i], (x, *wanted), dy, retain_graph=True, allow_unused=True)

    return backward


class _Measurement:
    def __init__(self, case: Case, settings: Settings, document: Document) -> None:
        self.case, self.settings, self.document = case, settings, document
        self.layer = case.layer(settings.device)
        self.buffers = case.buffers(settings.device, settings.cache)

    def checked(self) -> list[tuple[Contender, str, Errors]]:
        """The contenders that compute the function, what runs for them, and their errors."""
        case, settings = self.case, self.settings
        check = checks.Check(case, self.layer, self.buffers[0])
        found: list[tuple[Contender, str, Errors]] = []
        for name in settings.contenders:
            if settings.late:
                self.document.not_run.append(f"{case} {name}")
                continue
            stage = ""
            try:
                contender = peers.contender(name, case, self.layer, settings.device)
                errors = {"forward": check.forward(contender)}
                found.append((contender, check.runs(contender), errors))
                stage = "backward"
                both = check.both(contender)
                errors |= {"saving": {"y": both["y"]}, "both": both}
                errors["backward"] = {what: error for what, error in both.items() if what != "y"}
            except Absent as reason:
                self.document.add_absent(case.entry.name, name, reason)
            except Exception as error:
                self.document.add_failed(case, name, error, stage)
        return found

    def direction(self, direction: str, checked: list[tuple[Contender, str, Errors]]) -> None:
        """Adds the rows of one direction, by every clock."""
        rows, rotations = [], []
        for contender, runs, errors in checked:
            if direction not in errors:
                continue
            try:
                call = call_of(contender, direction, self.buffers)
                memory = self.memory(contender, direction, call)
            except Exception as error:
                self.document.add_failed(self.case, contender.name, error, direction)
                continue
            rotations.append(Rotation(call, len(self.buffers)))
            rows.append(
                {
                    **self.case.key,
                    "contender": contender.name,
                    "runs": runs,
                    "direction": direction,
                    "error": errors[direction],
                    **memory,
                    "bytes": self.case.bytes(direction),
                    "cold": len(self.buffers) * self.buffers[0].x.nbytes >= 2 * self.settings.cache,
                }
            )
        for clock in self.settings.clocks:
            rounds = self.settings.rounds
            self.document.rows += timed(self.case, clock, rows, rotations, rounds, self.document)

    def memory(self, contender: Contender, direction: str, call: Callable[[int], object]) -> dict:
        saved = count = None
        if direction != "forward":
            saved = checks.saved_bytes(lambda: contender.call(self.buffers[0].x))
        peak = checks.peak_bytes(lambda: call(0), self.settings.device)
        if self.settings.count_launches:
            count = checks.launches(lambda: call(0))
        return {"saved_bytes": saved, "peak_bytes": peak, "launches": count}


def timed(
    case: Any,
    clock: Clock,
    rows: Sequence[dict],
    rotations: Sequence[Rotation],
    rounds: int,
    document: Document,
    baselines: Callable[[str], Sequence[str]] = lambda contender: ("torch", "reference", "official"),
) -> list[dict]:
    """The rows of a case with times by `clock`, less those of contenders that it cannot time.

    Each is set against the first of its `baselines` that is there; what is normzoo's also, in ``speedups``,
    against everything else that is not.
    """
    ready: list[tuple[dict, Prepared]] = []
    for row, rotation in zip(rows, rotations, strict=True):
        try:
            ready.append(({**row, "clock": clock.name}, clock.prepare(rotation)))
        except Exception as error:
            document.add_failed(case, row["contender"], error, f"{row['direction']} {clock.name}")
    seconds = seconds_a_call(clock, [prepared for _, prepared in ready], rounds)
    by_name = {row["contender"]: own for (row, _), own in zip(ready, seconds, strict=True)}
    rivals = [name for name in by_name if not is_normzoo(name)]
    for row, prepared in ready:
        own = by_name[row["contender"]]
        baseline = next((name for name in baselines(row["contender"]) if name in by_name), None)
        spent = timing.summary(own)
        speed = None if row["bytes"] is None else row["bytes"] / spent.median
        others = [name for name in rivals if name != baseline] if is_normzoo(row["contender"]) else []
        row |= {
            "seconds": spent._asdict(),
            "rounds": rounds,
            "calls": prepared.calls,
            "baseline": baseline,
            "speedup": timing.ratio(by_name[baseline], own)._asdict() if baseline else None,
            "speedups": {name: timing.ratio(by_name[name], own)._asdict() for name in others},
            "gigabytes_a_second": None if speed is None else speed / 1e9,
            "share_of_copy": None if speed is None else speed / document.copy_bandwidth["median"],
        }
    return [row for row, _ in ready]
