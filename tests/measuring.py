"""What the tests of the benchmark share."""

import torch

from normzoo.zoo import find
from normzoo_bench import clocks, measure, peers, results, run
from normzoo_bench.cases import Case
from normzoo_bench.clocks import Prepared
from normzoo_bench.workloads import DIRECTIONS, Workload

CPU = torch.device("cpu")
BATCH_NORM = find("batch_norm")


def quicken(monkeypatch):
    """Few buffers instead of as many as the cache of this machine asks for, and no collection of the garbage
    of all tests before every timing."""
    monkeypatch.setattr(run, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(clocks.timing.gc, "collect", lambda *_: 0)


class FakeClock:
    """Says that calls of a contender take what `seconds` tells for its place among the contenders."""

    name = "wall"

    def __init__(self, *seconds):
        self.seconds = seconds
        self.runs = []

    def prepare(self, rotation):
        self.runs.append(rotation)
        return Prepared(rotation, 4)

    def stopwatch(self, function):
        function()
        return 4 * self.seconds[self.runs.index(function) % len(self.seconds)]


def case_of(entry, shape=(6, 64), dtype="float32", memory_format="contiguous", mode="any"):
    return Case(entry, Workload("llm", shape), dtype, memory_format, mode)


def measured(case, contenders=("normzoo", "torch"), directions=DIRECTIONS, clock=None):
    document = results.Document({}, {}, {"median": 1e9})
    clock = clock or FakeClock(1e-3, 2e-3)
    settings = measure.Settings(CPU, contenders, directions, (clock,), 2, 1 << 12)
    measure.measure(case, settings, document)
    return document


def plant(monkeypatch, build, name="planted"):
    """Makes `build(layer)` the call of the contender `name`."""
    monkeypatch.setitem(peers.CONTENDERS, name, lambda case, layer, device: (build(layer), layer))


def raises(*_, **__):
    raise RuntimeError("out of luck\nand more")
