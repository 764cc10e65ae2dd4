"""The benchmark: what it measures is what it says, and faulty contenders get no times."""

import itertools
import json
import math
import re
import time

import pytest
import torch
import torchvision_ops  # noqa: F401
from measuring import BATCH_NORM, CPU, FakeClock, case_of, measured, plant, quicken, raises
from torch import nn

from normzoo.zoo import find
from normzoo_bench import checks, environment, measure, peers
from normzoo_bench.cases import plan
from normzoo_bench.clocks import WallClock
from normzoo_bench.workloads import DIRECTIONS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


# What is measured


def test_a_row_adds_up():
    case = case_of(find("rms_norm"))
    rows = {(row["contender"], row["direction"]): row for row in measured(case).rows}
    assert len(rows) == 8
    for direction, count in (("forward", 2), ("saving", 2), ("backward", 3), ("both", 5)):
        row = rows["normzoo", direction]
        assert row["bytes"] == count * 6 * 64 * 4
        assert row["seconds"] == {"median": 1e-3, "p20": 1e-3, "p80": 1e-3}
        assert row["gigabytes_a_second"] == pytest.approx(row["bytes"] / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gigabytes_a_second"])  # a copy moves 1 GB/s here
        assert row["speedup"]["median"] == pytest.approx(2) and row["baseline"] == "torch"
        assert rows["torch", direction]["speedup"]["median"] == 1 and row["speedups"] == {}
        assert (row["saved_bytes"] is None) == (direction == "forward")
    assert set(rows["normzoo", "forward"]["error"]) == {"y"}
    assert set(rows["normzoo", "backward"]["error"]) == {"dx", "weight"}
    assert set(rows["normzoo", "both"]["error"]) == {"y", "dx", "weight"}


def test_every_other_contender_takes_turns_with_normzoo(monkeypatch):
    """A ratio of medians would be 3.5 / 2."""

    class Drifting(FakeClock):
        def stopwatch(self, function):
            function()
            samples = self.seconds[self.runs.index(function)]
            return 4 * next(samples)

    plant(monkeypatch, lambda layer: layer)
    clock = Drifting(*(iter((9, *samples)) for samples in ((1, 3), (2, 2), (4, 3))))
    found = measured(case_of(find("rms_norm")), ("normzoo", "torch", "planted"), ("forward",), clock)
    ours, torchs, planted = found.rows
    assert ours["baseline"] == "torch" and list(ours["speedups"]) == ["planted"]
    assert ours["speedups"]["planted"]["median"] == pytest.approx((4 / 1 + 3 / 3) / 2)
    assert torchs["speedups"] == planted["speedups"] == {}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mode", "counts"), [("training", (3, 3, 5, 8)), ("eval", (2, 2, 3, 5))])
def test_channels(memory_format, mode, counts):
    case = case_of(BATCH_NORM, (4, 24, 5, 5), "bfloat16", memory_format, mode)
    layer = case.layer(CPU)
    assert layer.num_features == 24 and layer.training == (mode == "training")
    assert layer.weight.dtype == torch.float32
    for buffers in case.buffers(CPU, 1):
        for t in buffers:
            assert t.dtype == torch.bfloat16
            assert t.is_contiguous(memory_format=getattr(torch, f"{memory_format}_format", torch.channels_last))
    document = measured(case)
    assert not document.failed
    found = [row["bytes"] for row in document.rows if row["contender"] == "normzoo"]
    assert found == [count * 4 * 24 * 25 * 2 for count in counts]


def test_channels_are_planned_in_all_forms():
    cases = plan([BATCH_NORM], "cpu", "smoke")
    forms = {(case.memory_format, case.mode) for case in cases}
    assert forms == set(itertools.product(("contiguous", "channels_last"), ("training", "eval")))
    assert {case.workload.use for case in cases} == {"resnet", "unet", "small"}
    assert "resnet-32x64x56x56" in {case.workload.name for case in plan([BATCH_NORM], "cpu")}


def test_a_check_leaves_no_trace_in_the_statistics():
    case = case_of(BATCH_NORM, (4, 24, 5, 5), mode="training")
    layer = case.layer(CPU)
    check = checks.Check(case, layer, case.buffers(CPU, 1)[0])
    contender = peers.contender("normzoo", case, layer, CPU)
    check.forward(contender)
    check.both(contender)
    assert torch.equal(layer.running_mean, torch.zeros(24)) and layer.num_batches_tracked == 0


def test_rows_in_their_layouts_and_dtypes():
    case = case_of(find("layer_norm"), (6, 37), "mixed", "padded")
    assert case.layer(CPU).weight.dtype == torch.float32
    buffers = case.buffers(CPU, 1)
    assert {t.stride() for pair in buffers for t in pair} == {(40, 1)}
    assert buffers[0].x.dtype == torch.bfloat16 and buffers[0].x.data_ptr() != buffers[1].x.data_ptr()
    assert not measured(case, contenders=("normzoo",)).failed
    formats = {c.memory_format for c in plan([find("crms_norm")], "cpu", "smoke") if c.workload.use == "odd"}
    assert formats == {"contiguous", "padded"}


def test_buffers_exceed_the_cache():
    case = case_of(find("rms_norm"), (64, 64))
    assert len(case.buffers(CPU, 1 << 20)) == 2 * (1 << 20) / (64 * 64 * 4)
    assert len(case.buffers(CPU, 1)) == 2 and len(case.buffers(CPU, 1 << 30)) == 256
    cold = [measured(case_of(find("rms_norm"), shape)).rows[0]["cold"] for shape in ((64, 64), (1, 4))]
    assert cold == [True, False]


def test_parameters_are_off_their_initial_values():
    layer = case_of(find("layer_norm")).layer(CPU)
    assert layer.weight.std() > 0.05 and layer.bias.std() > 0.05


# Contenders


class _Backward(torch.autograd.Function):
    """y = x, with a backward pass of choice."""

    @staticmethod
    def forward(ctx, y, backward):
        ctx.backward = backward
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.backward(dy), None


FAULTS = {
    "writes to dy": (lambda f: lambda x: _Backward.apply(f(x), lambda dy: dy.mul_(2) / 2), "writes to dy"),
    "writes to x": (lambda f: lambda x: f(x.detach().mul_(2).div_(2.001) * 0 + x), "writes to x"),
    "another function": (
        lambda f: lambda x: f(x) * 1.01,
        r"y is off by 1\.0e-02 of its largest entry; rounding explains 1e-03",
    ),
    "another gradient": (lambda f: lambda x: _Backward.apply(f(x), lambda dy: 1.01 * dy), "dx is off by"),
    "not finite": (lambda f: lambda x: f(x) * torch.tensor([math.nan] + [1.0] * 63), "y is off by nan"),
    "another shape": (lambda f: lambda x: f(x)[:3], r"y has the shape \(3, 64\), it should be \(6, 64\)"),
    "raises": (lambda f: raises, "^RuntimeError: out of luck$"),
    "raises in backward": (lambda f: lambda x: _Backward.apply(f(x), raises), "RuntimeError: out of luck"),
}
ONLY_BACKWARD = ("writes to dy", "another gradient", "raises in backward")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_contender_has_no_times(monkeypatch, fault):
    build, reason = FAULTS[fault]
    plant(monkeypatch, build)
    document = measured(case_of(find("rms_norm")), ("planted", "normzoo", "torch"))
    (failure,) = document.failed
    assert failure["contender"] == "planted" and re.search(reason, failure["reason"])
    timed = {row["direction"] for row in document.rows if row["contender"] == "planted"}
    assert timed == ({"forward"} if fault in ONLY_BACKWARD else set())
    assert {row["contender"] for row in document.rows} >= {"normzoo", "torch"}


def test_errors_are_measured(monkeypatch):
    plant(monkeypatch, lambda layer: lambda x: layer(x) * (1 + 1e-4))
    document = measured(case_of(find("rms_norm")), ("planted",))
    errors = {name: error for row in document.rows for name, error in row["error"].items()}
    assert set(errors) == {"y", "dx", "weight"}
    assert all(error == pytest.approx(1e-4, rel=0.05) for error in errors.values())


def test_torch_says_what_rounding_explains():
    """On a CPU its gradients of weights in bfloat16 are far off for many rows, and normzoo's with them."""
    case = case_of(find("layer_norm"), (4096, 16), "bfloat16")
    check = checks.Check(case, case.layer(CPU), case.buffers(CPU, 1)[0])
    assert check.allowed["y"] == checks.LARGEST_ERROR[torch.bfloat16] < check.allowed["bias"]
    check.both(peers.contender("torch", case, case.layer(CPU), CPU))


def test_a_slower_contender_is_found_slower(monkeypatch):
    def sleepy(layer):
        def call(x):
            time.sleep(0.001)
            return layer(x)

        return call

    plant(monkeypatch, sleepy)
    document = measured(case_of(find("rms_norm")), ("planted", "torch"), ("forward",), WallClock(CPU, 0.002))
    slow, torchs = document.rows
    assert slow["speedup"]["p80"] < 0.5 and slow["seconds"]["median"] > 1e-3 > torchs["seconds"]["median"]


def test_directions_do_what_they_say():
    seen = []

    class Watching(FakeClock):
        def stopwatch(self, function):
            seconds = super().stopwatch(function)
            result = function.results[-1]
            gradients = isinstance(result, tuple)
            seen.append((torch.is_grad_enabled(), gradients, not gradients and result.requires_grad))
            return seconds

    for direction in DIRECTIONS:
        measured(case_of(find("rms_norm")), ("normzoo",), (direction,), Watching(1.0))
    assert list(dict.fromkeys(seen)) == [(False, False, False), (True, False, True), (True, True, False)]
    case = case_of(find("rms_norm"))
    buffers = case.buffers(CPU, 1)
    ours = peers.contender("normzoo", case, case.layer(CPU), CPU)
    both, backward = (measure.call_of(ours, direction, buffers) for direction in ("both", "backward"))
    for place in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(both(place), backward(place), strict=True))


def test_a_clock_that_fails_for_one(monkeypatch):
    class Picky(FakeClock):
        def prepare(self, rotation):
            if not self.runs:
                self.runs.append(None)
                raise RuntimeError("capture failed")
            return super().prepare(rotation)

    document = measured(case_of(find("rms_norm")), directions=("forward",), clock=Picky(1.0))
    assert [row["contender"] for row in document.rows] == ["torch"]
    assert document.failed[0]["contender"] == "normzoo" and "capture failed" in document.failed[0]["reason"]


def test_compiled_contenders_are_whole_and_static(monkeypatch):
    """Through dynamo and autograd, without the compiler at the end, whose start takes too long here."""
    asked = []
    compiler = torch.compile

    def quick(call, *, mode, **options):
        asked.append({"mode": mode, **options})
        return compiler(call, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quick)
    cases = [case_of(find("layer_norm")), case_of(find("crms_norm"))]
    cases.append(case_of(find("batch_norm"), (4, 3, 2, 2), mode="training"))
    for case in cases:
        document = measured(case, ("torch.compile",))
        assert not document.failed and {row["direction"] for row in document.rows} == set(DIRECTIONS)
    assert asked == [{"mode": None, "dynamic": False, "fullgraph": True}] * len(cases)
    assert torch._functorch.config.donated_buffer


class FakeLiger:
    class LigerLayerNorm(nn.LayerNorm):
        def __init__(self, hidden_size, eps=1e-6, bias=False):
            super().__init__(hidden_size, eps)
            assert bias

    class LigerRMSNorm(nn.RMSNorm):
        def __init__(
            self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=True
        ):
            super().__init__(hidden_size, eps)
            assert casting_mode == "gemma" and not in_place

    class LigerGroupNorm(nn.GroupNorm):
        def __init__(self, num_channels, num_groups, eps=1e-6, bias=False, init_fn="ones"):
            super().__init__(num_groups, num_channels, eps)
            assert bias


class FakeQuack:
    QuackRMSNorm = nn.RMSNorm

    @staticmethod
    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert x.dim() == 2 and weight.dtype == bias.dtype == torch.float32
        y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[1:], weight, bias, eps)
        return (y.to(x.dtype), rstd, mean) if return_rstd and return_mean else y.to(x.dtype)

    @staticmethod
    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        args = (dout.float(), x.float(), x.shape[1:], mean, rstd, weight, weight, [True] * 3)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(*args)
        return dx.to(x.dtype), dw, db


@pytest.mark.parametrize(("name", "fake"), [("liger", FakeLiger), ("quack", FakeQuack)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_are_set_up_to_compute_the_same(monkeypatch, name, fake, dtype):
    monkeypatch.setattr(peers, "_imported", lambda *_: fake)
    for layer in ("layer_norm", "rms_norm", "crms_norm", "group_norm", "batch_norm"):
        shape = (2, 3, 64) if find(layer).family == "rows" else (2, 8, 3, 5)
        document = measured(case_of(find(layer), shape, dtype), (name,))
        assert not document.failed
        if layer in ("crms_norm", "batch_norm") or (name, layer) == ("quack", "group_norm"):
            assert "no such layer" in document.absent[0]["reason"]
        else:
            assert {row["direction"] for row in document.rows} == set(DIRECTIONS)


@pytest.mark.parametrize("form", ["b0", "b1", "b2", "s0", "s1", "s2"])
def test_timm_is_set_up_to_compute_the_same(form):
    pytest.importorskip("timm")
    document = measured(case_of(find(f"evo_norm_{form}"), (3, 8, 4, 5), mode="training"), ("timm",))
    assert not document.failed
    assert {row["direction"] for row in document.rows} == set(DIRECTIONS), document.absent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("name", ["adaptive_layer_norm", "adaptive_rms_norm"])
def test_adaptive_norms_are_compared_with_what_models_write(name, dtype):
    document = measured(case_of(find(name), (3, 5, 16), dtype))
    assert not document.failed and not document.absent
    assert {row["contender"] for row in document.rows} == {"normzoo", "torch"}
    assert {*document.rows[-1]["error"]} == {"y", "dx", "scale", "shift"}


def test_what_runs(monkeypatch):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is on")
    case = case_of(find("rms_norm"), (2, 16))
    layer = case.layer(CPU)
    check = checks.Check(case, layer, case.buffers(CPU, 1)[0])
    ours = peers.contender("normzoo", case, layer, CPU)
    assert check.runs(ours) == "eager" and check.runs(peers.contender("torch", case, layer, CPU)) == ""
    check.may_run_kernels = True  # in the interpreter
    assert check.runs(ours) == "kernel"
    monkeypatch.setattr("normzoo_kernels.rows.launch", raises)
    assert check.runs(ours) == "eager"


@pytest.mark.parametrize(
    ("name", "mode"), [("batch_norm", "training"), ("batch_norm", "eval"), ("ghost_batch_norm", "training")]
)
def test_what_runs_for_channels(name, mode):
    """Stored statistics need no kernel; finding out leaves no trace in the statistics."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is on")
    case = case_of(find(name), (4, 3, 2, 2), mode=mode)
    layer = case.layer(CPU)
    check = checks.Check(case, layer, case.buffers(CPU, 1)[0])
    check.may_run_kernels = True
    assert check.runs(peers.contender("normzoo", case, layer, CPU)) == (
        "kernel" if mode == "training" else "eager"
    )
    assert torch.equal(layer.running_mean, torch.zeros(3)) and layer.num_batches_tracked == 0


# Memory


def test_saved_storages_count_once():
    x = torch.randn(1000, requires_grad=True)
    assert checks.saved_bytes(lambda: x * x) == 4000
    assert checks.saved_bytes(lambda: x[10:] * x[:-10]) == 4000
    assert checks.saved_bytes(lambda: x * torch.ones(1000)) == 4000  # of the ones
    assert checks.saved_bytes(lambda: x + 1) == 0


def test_peak_counts_temporaries():
    x = torch.randn(1 << 20)
    assert checks.peak_bytes(lambda: x + x, CPU) == pytest.approx(4 << 20, rel=0.01)
    assert checks.peak_bytes(lambda: (x + x) * x, CPU) == pytest.approx(8 << 20, rel=0.01)


def test_memory_on_a_gpu_is_the_rise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert checks.peak_bytes(lambda: None, torch.device("cuda")) == 250


# Environment


def test_environment(tmp_path, monkeypatch):
    found = json.loads(json.dumps(environment.environment()))
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["cache_bytes"] > 0
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])
    (tmp_path / "index0").mkdir()
    (tmp_path / "index3").mkdir()
    (tmp_path / "index0/size").write_text("32K\n")
    (tmp_path / "index3/size").write_text("24M\n")
    monkeypatch.setattr(environment, "_CPU_CACHES", tmp_path)
    assert environment.cache_bytes(CPU) == 24 << 20
    monkeypatch.setattr(environment, "_CPU_CACHES", tmp_path / "none")
    assert environment.cache_bytes(CPU) == 32 << 20
