"""Many cases, one after another: within a time limit, and with what is done kept when something goes wrong."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .clocks import Clock, KernelClock, WallClock, copy_bandwidth
from .environment import cache_bytes, environment, now
from .measure import Settings, measure
from .results import Document


def start(device: torch.device, seconds: float, rounds: int) -> tuple[Document, tuple[Clock, ...], int]:
    """An empty document with machine and copy bandwidth, the clocks of `device`, and the size of its cache.

    A sample takes about `seconds`, and there are `rounds` of them.
    """
    cache = cache_bytes(device)
    clocks: tuple[Clock, ...] = (WallClock(device, seconds),)
    if device.type == "cuda":
        clocks = (KernelClock(device, seconds, cache), *clocks)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before there is one of our own
    bandwidth = copy_bandwidth(clocks[0], device, cache, rounds)
    settings = {"time": now(), "rounds": rounds, "sample_seconds": seconds, "load": load}
    return Document(environment(device), settings, bandwidth._asdict()), clocks, cache


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """What all of a measurement has to run in. On a GPU a stream of its own, which graphs can capture."""
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))
    return contextlib.nullcontext()


def finish(document: Document, settings: Settings) -> None:
    """Measures the copy again: a machine that was throttled or busy meanwhile shows it."""
    if "stopped" not in document.extra:
        after = copy_bandwidth(settings.clocks[0], settings.device, settings.cache, settings.rounds)
        document.copy_bandwidth["after"] = after.median


def run(
    cases: Sequence[Any],
    settings: Settings,
    document: Document,
    after_each: Callable[[Any], None],
    one: Callable[[Any, Settings, Document], None] | None = None,
) -> bool:
    """Measures the cases until the deadline, each by `one`; whether the user let it. The rest is listed as not
    run."""
    left = list(cases)
    try:
        while left and time.monotonic() < settings.deadline:
            try:
                (one or measure)(left[0], settings, document)
            except Exception as error:
                document.add_failed(left[0], "all", error)
                if not _answers(settings.device):
                    document.extra["stopped"] = f"{left[0]}: the GPU does not answer any more"
                    break
            after_each(left.pop(0))
        return True
    except KeyboardInterrupt:
        return False
    finally:
        document.not_run += map(str, left)


def _answers(device: torch.device) -> bool:
    """Whether the GPU still works: after an illegal access every call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
