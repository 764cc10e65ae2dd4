"""The clocks: wall time on a CPU; kernel time, and wall time with the host's share, on a GPU.

All of them time many calls at once and give seconds a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import timing


class Rotation:
    """Calls `function` with 0, 1, ..., `count` - 1, 0, ... and keeps as many results, so that a call finds
    neither its input nor the memory of its output in the cache."""

    def __init__(self, function: Callable[[int], object], count: int) -> None:
        self.function = function
        self.count = count
        self.place = 0
        self.results: deque[object] = deque(maxlen=count)

    def __call__(self) -> None:
        self.results.append(self.function(self.place))
        self.place = (self.place + 1) % self.count


_FLUSHED = 256 << 20
"""Bytes written between two replays, at least: enough to outlast the host's work of launching a graph."""


class Prepared(NamedTuple):
    run: Callable[[], object]
    calls: int
    """That one `run` makes."""


class WallClock:
    """Wall time of calls one after another up to the end of their work, the host's part included."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.name = "host" if device.type == "cuda" else "wall"
        self.seconds = seconds
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing
        self.stopwatch = timing.wall

    def prepare(self, rotation: Rotation) -> Prepared:
        a_call = _seconds_of_one(rotation, self.wait, lambda three: _waited(three, self.wait))
        calls = _how_many(self.seconds, a_call, most=1000)

        def run() -> None:
            for _ in range(calls):
                rotation()
            self.wait()

        return Prepared(run, calls)


class KernelClock:
    """Time on the GPU alone, from the replay of a CUDA graph that holds many calls.

    Everything must have run on the current stream before, which must not be the default one: capture needs
    kernels compiled, and the backward pass runs where the forward pass did.
    """

    name = "kernel"

    def __init__(self, device: torch.device, seconds: float, cache: int) -> None:
        self.seconds = seconds
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed = torch.empty(max(2 * cache, _FLUSHED), dtype=torch.uint8, device=device)

    def prepare(self, rotation: Rotation) -> Prepared:
        # By the GPU's clock: by the host's, tiny kernels would get too few calls for the start of a graph to
        # disappear among them.
        a_call = _seconds_of_one(rotation, torch.cuda.synchronize, self.stopwatch)
        calls = _how_many(self.seconds, a_call, most=200)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                rotation()
        return Prepared(graph.replay, calls)

    def stopwatch(self, replay: Callable[[], object]) -> float:
        # The writes empty the cache, and keep the GPU busy while the host sends it the graph.
        for _ in range(4):
            self.flushed.zero_()
        self.start.record()
        replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


Clock = WallClock | KernelClock


def seconds_a_call(clock: Clock, prepared: list[Prepared], rounds: int) -> list[list[float]]:
    """Samples of each, taken in turns."""
    samples = timing.interleaved([p.run for p in prepared], rounds, warmup=1, stopwatch=clock.stopwatch)
    return [[s / p.calls for s in of_one] for of_one, p in zip(samples, prepared, strict=True)]


def copy_bandwidth(clock: Clock, device: torch.device, cache: int, rounds: int) -> timing.Summary:
    """Bytes a second, read and written, of copies between buffers of twice the cache."""
    count = max(2 * cache, 1 << 20) // 4
    sources = [torch.randn(count, device=device) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    rotation = Rotation(lambda i: targets[i].copy_(sources[i]), len(sources))
    (samples,) = seconds_a_call(clock, [clock.prepare(rotation)], rounds)
    return timing.summary([2 * 4 * count / s for s in samples])


def _seconds_of_one(
    rotation: Rotation, wait: Callable[[], None], stopwatch: Callable[[Callable[[], object]], float]
) -> float:
    """Seconds of a call, after a turn of them in which all memory is allocated."""
    for _ in range(rotation.count + 1):
        rotation()
    wait()

    def three() -> None:
        for _ in range(3):
            rotation()

    return stopwatch(three) / 3


def _waited(function: Callable[[], object], wait: Callable[[], None]) -> float:
    def run() -> None:
        function()
        wait()

    return timing.wall(run)


def _how_many(seconds: float, a_call: float, most: int) -> int:
    return min(max(1, round(seconds / max(a_call, 1e-9))), most)


def _nothing() -> None:
    pass
