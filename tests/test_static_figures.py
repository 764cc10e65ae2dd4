"""Peers' figures, reasons, predicted times and documents of the static gate; nothing is compiled here."""

import json
import math

import pytest

pytest.importorskip("triton")

from normzoo_bench.static import document, gates, measured, peers, table
from normzoo_bench.static.predict import GPUS, predict

GPU = GPUS["H200"]


def row(**changes) -> dict:
    """A launch of rms-fwd-4096-bf16 whose figures are those of the gate, more or less."""
    figures = {
        "case": "rms-fwd-4096", "dtype": "bf16", "target": "sm_90", "kernel": "norm_fwd", "tile": 8192,
        "registers": 40, "spills": 0, "x_width": 16, "kb_in_flight": 72.0, "instructions": 7.0, "shared": 0,
        "elements": 8192 * 4096, "x_bytes": 2 * 8192 * 4096, "traffic": {1: (67e6, 67e6), 2: (67e6, 67e6)},
    }  # fmt: skip
    call = {"x_passes": 2.0, "l2_passes": 2.1, "copies": 0.0, "launches": 1, "allocations": 2}
    return {**figures, "call": call, **changes}


def test_the_peers_are_there_in_every_width_and_dtype():
    known = peers.known()
    for kind in ("rms", "ln", "add-rms"):
        for way in ("fwd", "bwd"):
            for width in (64, 128, 1000, 1024, 4095, 4096, 8192, 16384, 32768, 65536):
                for dtype in ("bf16", "fp32"):
                    assert {"liger", "compile"} <= known[f"{kind}-{way}-{width}-{dtype}"].keys()
    assert known["rms-bwd-4096-bf16"]["liger"] == {
        "registers": 113, "spills": 0, "x_width": 16, "kb_in_flight": 16, "instructions": 17.5, "x_passes": 3,
        "l2_passes": 3.08, "launches": 3, "allocations": 1,
    }  # fmt: skip
    assert known["rms-bwd-16384-bf16"]["fla"]["spills"] == 40
    assert known["standardize-fwd-groups32-32x512x32x32-bf16"]["liger"]["spills"] == 368


def found(**changes) -> dict:
    return {b.measure: b for b in peers.beaten([row(**changes)])}


def test_only_what_is_worse_than_a_peer_needs_a_reason():
    assert found(registers=20) == {}
    assert found(registers=20, instructions=8.0) == {}  # fla has 7.9, which is no difference
    assert set(found(registers=20, instructions=9.0)) == {"instructions"}
    assert set(found(registers=20, kb_in_flight=30.0)) == {"kb_in_flight"}
    assert set(found(registers=20, x_width=8)) == {"x_width"}


def test_a_reason_holds_only_where_it_is_true():
    assert found(kb_in_flight=30.0)["kb_in_flight"].reason
    assert found(kb_in_flight=16.0)["kb_in_flight"].reason is None
    assert found(instructions=9.0)["instructions"].reason
    assert (
        found(instructions=50.0)["instructions"].reason is None
    )  # more than can issue in the time of the bytes
    assert found(x_width=8)["x_width"].reason is None


def test_what_has_no_reason_is_a_failure_and_so_is_a_reason_for_nothing():
    failures = list(gates.unexplained(peers.beaten([row(x_width=8, registers=20)]), whole=False))
    assert [(f.measure, f.exception) for f in failures] == [("x_width", None)]
    stale = list(gates.unexplained([], whole=True))
    assert len(stale) == len(peers.REASONS)
    assert "NO REASON" in table.beside_peers([row(x_width=8)])
    assert "16!" in table.beside_peers([row(x_width=8)])


def test_a_time_is_that_of_the_slowest_part():
    plain = predict([row()], GPU)
    assert plain.seconds == pytest.approx(134e6 / GPU.copy + GPU.gap)
    assert plain.bound == "memory"
    assert plain.share_of_copy(GPU) == pytest.approx(134e6 / GPU.copy / plain.seconds)
    heavy = predict([row(instructions=60.0)], GPU)
    assert heavy.seconds == pytest.approx(60 * 8192 * 4096 / GPU.issue + GPU.gap)
    assert heavy.bound == "instructions"
    again = predict([row(traffic={1: (4e9, 67e6), 2: (67e6, 67e6)})], GPU)
    assert again.seconds == pytest.approx(4.067e9 / GPU.l2 + GPU.gap)
    assert again.bound == "L2"


@pytest.mark.parametrize(("size", "reads"), [(1e6, 1), (67e6, 2)])
def test_what_fits_in_l2_is_read_from_memory_once(size, reads):
    statistics = row(traffic={1: (size, size)}, instructions=0.0)
    apply = row(traffic={1: (size, size), 2: (size, size)}, instructions=0.0)
    both = predict([statistics, apply], GPU)
    assert both.bytes == pytest.approx((reads + 1) * size)
    assert both.memory == pytest.approx((reads + 1) * size / GPU.copy)


def test_launches_bound_what_is_small():
    assert predict([row(traffic={1: (1e3, 1e3)}, instructions=0.0)], GPU).bound == "launches"


def bench(tmp_path, **changes) -> str:
    """A document of `normzoo bench` with one row of a GPU."""
    shown = {
        "layer": "rms_norm", "contender": "normzoo", "workload": "llm-8192x4096", "shape": [8192, 4096],
        "dtype": "bfloat16", "memory_format": "contiguous", "direction": "forward", "mode": "any",
        "clock": "kernel", "seconds": {"median": 5e-5, "p20": 5e-5, "p80": 5e-5}, "error": {},
        "share_of_copy": 0.9, **changes,
    }  # fmt: skip
    contents = {
        "form": 1,
        "environment": {"gpu": changes.get("gpu", "NVIDIA H100 80GB HBM3")},
        "copy_bandwidth": {"median": 3e12},
        "rows": [shown],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(contents))
    return str(path)


def test_measured_times_stand_beside_those_predicted_with_the_copy_of_that_run(tmp_path):
    (one,) = measured.measured([bench(tmp_path)])
    assert (one.gpu.name, one.gpu.copy, one.dtype) == ("H100", 3e12, "bf16")
    (case,) = one.cases
    assert (case.name, case.rows) == ("rms-fwd-4096-rows8192", 8192)
    shown = measured.compared(one, [[row()]])
    predicted = 134e6 / 3e12 + one.gpu.gap
    assert shown["predicted"] == pytest.approx(predicted)
    assert shown["ratio"] == pytest.approx(5e-5 / predicted)
    assert f"{shown['ratio']:.2f}" in table.against_measured([shown])


def test_no_gpu_no_measured_times(tmp_path):
    assert list(measured.measured([bench(tmp_path, gpu=None)])) == []
    assert list(measured.measured([bench(tmp_path, clock="host")])) == []
    assert list(measured.measured([bench(tmp_path, contender="torch")])) == []
    assert list(measured.measured([bench(tmp_path, layer="adab2n")])) == []
    assert "Measured: none" in table.against_measured([])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"direction": "both"}, ["rms-fwd-4096-rows8192", "rms-bwd-4096-rows8192"]),
        ({"direction": "backward", "dtype": "mixed"}, ["rms-bwd-4096-fp32params-rows8192"]),
        (
            {
                "layer": "batch_norm",
                "shape": [4, 8, 7, 7],
                "memory_format": "channels_last",
                "mode": "training",
            },
            ["standardize-fwd-batch-4x8x7x7-last"],
        ),
        (
            {"layer": "instance_norm", "shape": [4, 8, 7, 7], "mode": "training"},
            ["standardize-fwd-groups8-4x8x7x7"],
        ),
        ({"layer": "weight_standardize", "shape": [512, 64, 3, 3]}, ["ws-fwd-512x576"]),
        ({"layer": "batch_norm", "shape": [4, 8, 7, 7], "mode": "eval"}, []),
    ],
)
def test_the_calls_that_a_measured_row_is_made_of(tmp_path, changes, names):
    rows = list(measured.measured([bench(tmp_path, **changes)]))
    assert [case.name for one in rows for case in one.cases] == names


def test_a_document_has_every_launch_and_every_call(tmp_path):
    rows = [row(registers=20, x_width=8), row(target="gfx942", case="ln-fwd-64"), row(case="odd", dtype="fp32")]
    path = tmp_path / "static.json"
    document.write(path, document.document(rows, [row()], [], []))
    written = json.loads(path.read_text())
    assert [entry["target"] for entry in written["launches"]] == ["sm_90", "gfx942", "sm_90"]
    assert [entry["call"] for entry in written["calls"]] == ["rms-fwd-4096-bf16", "odd-fp32"]
    call = written["calls"][0]
    assert call["peers"]["fla"]["instructions"] == 7.9
    assert math.isclose(call["predicted"]["H200"]["microseconds"], 32.16, rel_tol=0.01)
    assert written["beaten"] == [
        {"call": "rms-fwd-4096-bf16", "measure": "x_width", "peer": "liger", "reason": None}
    ]
    assert written["sweep"] == [
        {"kernel": "norm_fwd", "target": "sm_90", "launches": 1, "registers": 40, "spills": 0}
    ]
    assert written["measured"] == []
