"""Comparison by the clock: functions take turns in one process, so that drift meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """The median of some samples, and the middle three fifths of them."""

    median: float
    p20: float
    p80: float


def wall(function: Callable[[], object]) -> float:
    """Seconds that a call takes on the wall clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: Sequence[Callable[[], object]],
    pairs: int,
    warmup: int = 3,
    stopwatch: Callable[[Callable[[], object]], float] = wall,
) -> list[list[float]]:
    """Seconds of `pairs` calls of each function, one list a function; sample i of all belongs to round i.

    Every second round runs in reverse order, so that no function always follows the same other. The garbage
    collector rests meanwhile. `stopwatch` runs a function and returns the seconds it took.
    """
    if pairs < 2 or warmup < 0:
        raise ValueError(f"interleaved: pairs is {pairs} and warmup {warmup}; they must be at least 2 and 0")
    samples: list[list[float]] = [[] for _ in functions]
    order = list(enumerate(functions))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, pairs):
            for i, function in order if turn % 2 else reversed(order):
                elapsed = stopwatch(function)
                if turn >= 0:
                    samples[i].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile of two samples or more."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Summary(statistics.median(samples), fifths[0], fifths[3])


def ratio(over: Sequence[float], under: Sequence[float]) -> Summary:
    """The ratios round by round, which keep what drift within a run would blur in a ratio of medians."""
    return summary([a / b for a, b in zip(over, under, strict=True)])
