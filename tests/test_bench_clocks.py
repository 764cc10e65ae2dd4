"""The clocks of the benchmark, those of a GPU with a stand-in for torch.cuda."""

import contextlib
import ctypes
import types

import pytest
import torch
from measuring import CPU, FakeClock, case_of, quicken

from normzoo.zoo import find
from normzoo_bench import checks, clocks, measure, results
from normzoo_bench.clocks import Rotation, WallClock
from normzoo_bench.workloads import DIRECTIONS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


def test_a_rotation_visits_all_and_keeps_what_they_made():
    rotation = Rotation(lambda i: torch.full((8,), i), 3)
    for _ in range(7):
        rotation()
    assert [int(t[0]) for t in rotation.results] == [1, 2, 0] == [4 % 3, 5 % 3, 6 % 3]
    assert len({t.data_ptr() for t in rotation.results}) == 3


def test_wall_clock_counts_the_wait(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(clocks.timing.time, "perf_counter", lambda: float(next(now)))
    clock = WallClock(CPU, seconds=8 / 3)
    waits, calls = [], []
    clock.wait = lambda: waits.append(len(calls))
    prepared = clock.prepare(Rotation(calls.append, 5))
    assert prepared.calls == 8  # three calls took a second
    assert waits == [6, 9]  # a whole turn first, so that all memory is there
    (samples,) = clocks.seconds_a_call(clock, [prepared], 2)
    assert samples == [1 / 8, 1 / 8] and waits[2:] == [17, 25, 33]


class FakeCuda:
    """What the kernel clock uses of torch.cuda, on a CPU and with a clock that ticks at every replay."""

    def __init__(self):
        self.log = []
        self.stream = object()

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **_: _Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("wait"))
        monkeypatch.setattr(clocks, "_FLUSHED", 1)

    @contextlib.contextmanager
    def capture(self, graph, stream):
        assert stream is self.stream
        self.log.append("capture")
        yield
        self.log.append("captured")


class _Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("record")

    def synchronize(self):
        self.cuda.log.append("wait")

    def elapsed_time(self, end):
        return 6.0  # milliseconds


class _Graph:
    def __init__(self, cuda):
        self.replay = lambda: cuda.log.append("replay")

    def raw_cuda_graph(self):
        return 77


def test_kernel_clock(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    clock = clocks.KernelClock(CPU, 0.024, 8)
    clock.flushed = types.SimpleNamespace(zero_=lambda: cuda.log.append("flush"))
    made = []
    prepared = clock.prepare(Rotation(made.append, 5))
    assert prepared.calls == 12  # three took 6 ms on the GPU, whatever the host needed
    assert made == ([0, 1, 2, 3, 4] * 5)[: 6 + 3 + 12]
    assert cuda.log == ["wait", *["flush"] * 4, "record", "record", "wait", "capture", "captured"]
    cuda.log.clear()
    (samples,) = clocks.seconds_a_call(clock, [prepared], 2)
    assert samples == [0.006 / 12] * 2
    assert cuda.log == (["flush"] * 4 + ["record", "replay", "record", "wait"]) * 3
    assert clock.prepare(Rotation(made.append, 5)).calls == 12
    clock.seconds = 10.0
    assert clock.prepare(Rotation(made.append, 5)).calls == 200  # a larger graph takes long to launch


def test_launches_are_the_nodes_of_a_graph(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)

    def nodes_of(graph, nodes, count):
        assert graph.value == 77 and nodes is None
        count._obj.value = 4
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(cuGraphGetNodes=nodes_of))
    monkeypatch.setattr(torch.version, "hip", None)
    status = 0
    assert checks.launches(lambda: cuda.log.append("call")) == 4
    assert cuda.log == ["capture", "call", "captured"]
    status = 1
    with pytest.raises(RuntimeError, match="cannot be counted: status 1"):
        checks.launches(lambda: None)


def test_a_case_by_the_clocks_of_a_gpu(monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(checks, "launches", lambda call: call() is not None and 3)
    host = WallClock(CPU, 1e-4)
    host.name = "host"
    document = results.Document({}, {}, {"median": 1e9})
    found_by = (clocks.KernelClock(CPU, 1e-4, 8), host)
    settings = measure.Settings(
        CPU, ("normzoo", "torch"), DIRECTIONS, found_by, 2, 1 << 12, count_launches=True
    )
    measure.measure(case_of(find("rms_norm")), settings, document)
    assert not document.failed
    for row in document.rows:
        assert row["launches"] == 3
        if row["clock"] == "kernel":
            assert row["seconds"]["median"] == pytest.approx(0.006 / row["calls"])
    combinations = {(row["contender"], row["direction"], row["clock"]) for row in document.rows}
    assert len(combinations) == len(document.rows) == 2 * 4 * 2


def test_copy_bandwidth_counts_both_ways():
    clock = FakeClock(0.5)
    found = clocks.copy_bandwidth(clock, CPU, 1 << 20, 2)
    assert found.median == 2 * (2 << 20) / 0.5
    (rotation,) = clock.runs
    assert rotation.count == 2 and len({t.data_ptr() for t in rotation.results}) == 2
