"""A goal is met only by all of the rows that it is about, each of them what it is called."""

from __future__ import annotations

import pytest
from report_documents import (
    GPU,
    along_sweeps,
    call,
    document,
    judged,
    of_widths,
    on_gpu,
    pair,
    pairs,
    put,
    row,
    spread,
    static,
)

from normzoo_bench import cpu
from normzoo_bench.report import asked, goals, measures, pages, plots
from normzoo_bench.report.documents import read
from normzoo_bench.report.judging import ABSENT, ELSEWHERE, MET, MISSED, UNDECIDED
from normzoo_bench.report.table import lines


def place(layer, **other):
    kept = ("layer", "workload", "shape", "dtype", "memory_format", "mode")
    return {name: value for name, value in row(layer=layer, **other).items() if name in kept}


def test_layers_of_the_goals_are_those_that_a_cpu_measures():
    whole = [part for part in cpu.PARTS if part.scaling is None]
    assert {name for part in whole if "torch" in part.contenders for name in part.layers} >= set(
        asked.WITH_TORCH
    )
    assert {name for part in whole for name in part.layers} >= set(asked.LAYERS)
    for sweep, layers in asked.SWEEPS.items():
        assert {n for part in cpu.PARTS if part.scaling == sweep for n in part.layers} >= set(layers)


def test_layers_without_rows_are_named(tmp_path):
    put(tmp_path, cpu_layers=document(*pair(1.0, layer="evo_norm_b0", direction="both")))
    rows = pair(9.0, layer="evo_norm_b0", direction="both")
    rows[1]["contender"] = "official"
    put(tmp_path, cpu_layers=document(*rows))
    finding = judged(tmp_path, "cpu-official").finding
    assert finding.verdict == UNDECIDED and "; 12 of 13 layers have no rows: crms_norm, ghost" in finding.value
    put(tmp_path, cpu_layers=document(*(one for one in pairs() if one["direction"] != "saving")))
    finding = judged(tmp_path, "cpu-torch").finding
    assert finding.verdict == UNDECIDED
    assert "no rows of layer_norm saving, rms_norm saving, batch_norm saving, and 5 more" in finding.value


LEFT = "layer_norm llm-8x64 float32"
FAILED = {**place("layer_norm"), "contender": "torch", "reason": "planted"}


@pytest.mark.parametrize(
    ("gap", "verdict", "said"),
    [
        ({}, MET, "rows"),
        ({"not_run": [LEFT] * 200}, UNDECIDED, f"200 not run: {LEFT}"),
        ({"not_run": [f"{LEFT} backward"]}, UNDECIDED, "1 not run"),
        ({"not_run": [f"{LEFT} torch"]}, UNDECIDED, "1 not run"),
        ({"not_run": ["batch_norm resnet-8x4x2x2 bfloat16 channels_last eval"]}, UNDECIDED, "1 not run"),
        ({"not_run": [f"{LEFT} official", "crms_norm llm-8x64 float32", f"on_chip: {LEFT}"]}, MET, "rows"),
        ({"not_run": ["layer_norm rows-8x64 float32", "gpt-1x2x8x32 layer_norm float32 step"]}, MET, "rows"),
        ({"failed": [FAILED | {"direction": ""}]}, UNDECIDED, "1 failed: layer_norm resnet-8x64x8x8"),
        ({"failed": [FAILED | {"direction": "backward wall"}]}, UNDECIDED, "1 failed"),
        ({"failed": [FAILED | {"direction": "backward host"}]}, MET, "rows"),
        ({"failed": [FAILED | {"direction": "both", "contender": "all"}]}, UNDECIDED, "1 failed"),
        ({"failed": [FAILED | {"direction": "step"}]}, MET, "rows"),
        ({"failed": [FAILED | {"direction": "", "contender": "official"}]}, MET, "rows"),
        ({"failed": [FAILED | {"direction": "", "layer": "crms_norm"}]}, MET, "rows"),
        ({"failed": [FAILED | {"direction": "", "workload": "rows-8x64"}]}, MET, "rows"),
    ],
)
def test_what_failed_or_did_not_run_decides_no_goal(tmp_path, gap, verdict, said):
    put(tmp_path, cpu_layers=document(*pairs(), **gap))
    finding = judged(tmp_path, "cpu-torch").finding
    assert finding.verdict == verdict and said in finding.value
    put(tmp_path, cpu_layers=document(*pairs(), *pair(0.5), **gap))
    assert judged(tmp_path, "cpu-torch").finding.verdict == MISSED, "a miss is a miss"


def test_a_check_of_gradients_that_failed_is_no_matter_of_the_forward_pass(tmp_path):
    failed = {**place("rms_norm"), "workload": "llm-8192x4096", "shape": [8192, 4096], "mode": "any"}
    failed |= {"dtype": "bfloat16", "contender": "normzoo", "direction": "backward", "reason": "planted"}
    rows = [*of_widths(0.93), *of_widths(0.93, direction="backward")]
    put(tmp_path, bench=document(*rows, environment=GPU, failed=[failed]))
    assert judged(tmp_path, "rows-forward").finding.verdict == MET
    assert judged(tmp_path, "rows-backward").finding.verdict == UNDECIDED


def test_who_is_absent_is_told(tmp_path):
    rows = [one for one in of_widths(0.93) if one["layer"] == "rms_norm"]
    absent = [{"layer": "layer_norm", "contender": "quack", "reason": "quack is planted"}]
    rows += [one | {"contender": "quack"} for one in rows]
    put(tmp_path, bench=document(*rows, environment=GPU, absent=absent))
    finding = judged(tmp_path, "rival-0-quack").finding
    assert finding.verdict == UNDECIDED
    assert "1 of 2 layers have no rows: layer_norm; quack: quack is planted" in finding.value


def test_where_a_gpu_ran_nothing_is_unmeasurable(tmp_path):
    put(tmp_path, cpu_layers=document(*pairs()))
    assert judged(tmp_path, "qk-forward").finding.verdict == ELSEWHERE
    put(tmp_path, bench=document(on_gpu(1.0), environment=GPU))
    found = [line.finding for line in lines(read(tmp_path))]
    assert ELSEWHERE not in {finding.verdict for finding in found}
    finding = judged(tmp_path, "qk-forward").finding
    assert finding.verdict == ABSENT and "2 of 2 layers have no rows" in finding.value


def test_slow_with_gradients_saved_is_slow(tmp_path):
    put(tmp_path, cpu_layers=document(*pairs(), *pair(0.3, direction="saving")))
    finding = judged(tmp_path, "cpu-torch").finding
    assert finding.verdict == MISSED and finding.missed[0].endswith("saving: 0.300 (0.294-0.306)")
    assert "saving" in measures.LAYER_DIRECTIONS


def with_host(folder, layers=("layer_norm", "rms_norm", "crms_norm"), **extra):
    rows = []
    for name in layers:
        for shape, times in (([4, 64], 1.1), ([64, 1024], 3.0)):
            known = {"layer": name, "shape": shape, "direction": "both", "mode": "any", "workload": "tiny"}
            known["kernels"] = ["k", "l", "k"]
            rows += [row("normzoo-empty", 1 / times, **known), row("torch", **known)]
    return put(folder, host=document(*rows, **extra))


def test_host_time_is_that_of_the_smallest_tensors(tmp_path):
    finding = judged(with_host(tmp_path), "host-rows").finding
    assert finding.verdict == MET and "1.10 to 1.10; 3 of 3 rows" in finding.value
    times = [{"kernel": name, "seconds": spread(s)} for name, s in (("k", 3e-6), ("k", 4e-6), ("l", 1e-6))]
    finding = judged(with_host(tmp_path, extra={"triton": times}), "host-rows").finding
    assert finding.value.endswith("; Triton's own part, which is apart, 9.00 µs a call")
    assert judged(with_host(tmp_path, ("layer_norm", "rms_norm")), "host-rows").finding.verdict == UNDECIDED
    (plot,) = [plot for plot in plots.PLOTS if plot.name == "host"]
    drawn = plot.draw(read(tmp_path))
    assert drawn is not None and ">3<" not in drawn.svg


def test_running_norm_beside_batch_norm(tmp_path):
    shape = {"shape": [64, 256, 56, 56], "workload": "resnet-64x256x56x56", "mode": "training"}
    ours = on_gpu(1.0, layer="power_norm", **shape, seconds=spread(1e-4))

    def beside(seconds, **other):
        theirs = ours | {"layer": "batch_norm", "contender": "torch", "seconds": spread(seconds)} | other
        put(tmp_path, bench=document(ours, theirs, environment=GPU))
        return judged(tmp_path, "across-power_norm-forward").finding.verdict

    assert beside(1.36e-4) == MET and beside(1.34e-4) == MISSED
    for other in ({"mode": "eval"}, {"contender": "normzoo"}, {"memory_format": "channels_last"}):
        assert beside(1e-4, **other) == ABSENT
    assert beside(1e-4, dtype="float32") == beside(1e-4, shape=[8, 256, 56, 56]) == ABSENT


def test_two_norms_are_set_against_the_authors_code_first(tmp_path):
    known = {"layer": "batch_channel_norm", "shape": [8, 64, 8, 8], "workload": "resnet-8x64x8x8"}
    known |= {"mode": "training"}
    (key,) = [goal.key for goal in goals.goals() if goal.key.startswith("rival-") and "official" in goal.key]

    def against(**times):
        rows = [on_gpu(1.0, way, **known, seconds=spread(1e-4)) for way in ("forward", "backward")]
        rows += [one | {"contender": n, "seconds": spread(t)} for n, t in times.items() for one in rows[:2]]
        put(tmp_path, bench=document(*rows, environment=GPU))
        return judged(tmp_path, key).finding

    assert against(reference=9e-4).value.startswith("against reference: ")
    both = against(reference=9e-4, official=1.7e-4)
    assert both.verdict == MISSED and both.value.startswith("against official: ")


def test_what_is_predicted_is_of_the_calls_of_the_goal(tmp_path):
    """By the fewest bytes at 1 TB/s: of 8192 rows 4096 wide 134 MB forward."""
    names = {"rms-fwd-4096": 160.0, "ln-fwd-8192": 280.0, "ln-fwd-64": 900.0, "rms-fwd-65536": 900.0}
    names |= {"rms-fwd-4096-rows7": 900.0, "rms-fwd-4096-llama": 900.0, "rms-bwd-4096": 900.0}
    names |= {"rms-fwd-4095-padded": 300.0, "row-group8-ln-fwd-4096": 900.0}
    calls = [call(f"{name}-bf16", us) for name, us in names.items()] + [call("rms-fwd-1024-fp32", 900.0)]
    put(tmp_path, static=static(calls=calls))
    finding = judged(tmp_path, "rows-forward").finding
    assert finding.verdict == ELSEWHERE and finding.value == "no GPU yet; predicted 0.839 to 0.959"
    assert judged(tmp_path, "padded-forward").finding.value == "no GPU yet; predicted 0.447"
    assert judged(tmp_path, "odd-forward").finding.value == "no GPU yet"
    sets = {"batch": "64x64x56x56-last", "groups32": "16x320x64x64", "groups320": "16x320x64x64"}
    made = [call(f"standardize-fwd-{kind}-{size}-bf16", 300.0) for kind, size in sets.items()]
    made += [
        call("on-chip-standardize-fwd-batch-64x64x56x56-last-bf16", 1.0),
        call("pn-fwd-8192x1024-bf16", 1.0),
    ]
    put(tmp_path, static=static(calls=[*made, call("pn-fwd-8192x1024-g1-bf16", 40.0)]))
    assert judged(tmp_path, "batch-forward").finding.value == "no GPU yet; predicted 0.257"
    assert judged(tmp_path, "group-forward").finding.value == "no GPU yet; predicted 0.419"
    assert judged(tmp_path, "power-forward").finding.value == "no GPU yet; predicted 0.839"


def test_predicted_beside_measured_is_what_the_gate_was_given(tmp_path):
    put(tmp_path, static=static())
    assert judged(tmp_path, "predicted").finding.verdict == ELSEWHERE
    put(tmp_path, bench=document(on_gpu(1.0), environment=GPU))
    finding = judged(tmp_path, "predicted").finding
    assert finding.verdict == ABSENT and "static --measured" in finding.value
    beside = {"name": "planted call", "gpu": "H200", "predicted": 1e-4, "measured": 1.25e-4, "ratio": 1.25}
    put(tmp_path, static=static(measured=[beside]))
    finding = judged(tmp_path, "predicted").finding
    assert finding.verdict == MET and "1 rows" in finding.value and "median 1.25" in finding.value
    (shown,) = pages._measured(read(tmp_path))
    assert list(shown.values()) == ["planted call", "H200", "100", "125", "1.25"]


@pytest.mark.parametrize("option", ["--only rms", "--only=rms", "--targets sm_90"])
def test_a_part_of_the_gate_decides_nothing_but_what_falls(tmp_path, option):
    command = f"python -m static --all {option}"
    put(tmp_path, static=static(command=command))
    keys = ("gates", "peers", "configurations", "on-chip")
    assert [judged(tmp_path, key).finding.verdict for key in keys] == [UNDECIDED] * 4
    fallen = {"case": "c", "target": "sm_90", "measure": "spills", "measured": 8, "bound": "at most 0"}
    put(tmp_path, static=static(command=command, failures=[fallen]))
    assert (
        judged(tmp_path, "gates").finding.verdict
        == judged(tmp_path, "configurations").finding.verdict
        == MISSED
    )


def test_whole_models_of_a_try_are_none(tmp_path):
    rows = [
        row(contender, workload=f"{model}-1x2", direction=direction, memory_format=memory_format)
        for model, direction, contender, memory_format in goals._MODELS
    ]
    put(tmp_path, cpu_models=document(*rows, command="python -m models"))
    assert judged(tmp_path, "models").finding.verdict == MET
    put(tmp_path, cpu_models=document(*rows, command="python -m models --size smoke"))
    assert judged(tmp_path, "models").finding.verdict == ABSENT
    planes = [one for one in rows if one["memory_format"] == "contiguous"]
    put(tmp_path, cpu_models=document(*planes, command="python -m models"))
    finding = judged(tmp_path, "models").finding
    assert finding.verdict == MISSED and len(finding.missed) == 8
    assert finding.missed[0] == "resnet50 step torch channels_last"


def test_documents_of_one_name_in_two_folders_are_two(tmp_path):
    for gpu, share in (("h100", 0.93), ("h200", 0.5)):
        (tmp_path / gpu).mkdir()
        put(tmp_path / gpu, bench=document(*of_widths(share), environment=GPU))
    found = read(tmp_path)
    assert [source.name for source in found.sources] == ["h100/bench", "h200/bench"] and not found.unread
    finding = judged(tmp_path, "rows-forward").finding
    assert finding.verdict == MISSED and len(finding.sources) == 2


def test_sweeps_do_not_count_where_they_are_not_asked_for(tmp_path):
    put(tmp_path, cpu_layers=document(*along_sweeps()))
    assert judged(tmp_path, "cpu-torch").finding.verdict == ABSENT
