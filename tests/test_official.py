"""The authors' codes as contenders, the passes they make, and the plan of a CPU with its verdicts."""

import json

import pytest
import torch
from measuring import CPU, case_of, quicken

from normzoo.zoo import ZOO, find
from normzoo_bench import checks, cpu, official, passes, peers
from normzoo_bench.cases import Case
from normzoo_bench.report.asked import MANY_PASSES, SWEEPS, WITH_TORCH
from normzoo_bench.report.judging import MET, MISSED, UNDECIDED
from normzoo_bench.results import Document
from normzoo_bench.workloads import DIRECTIONS, Workload, memory_formats


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


PASSES = {
    "crms_norm": (7, 18),
    "time_dependent_layer_norm": (7, 12),
    "time_dependent_rms_norm": (6, 28),
    "frozen_batch_norm": (4, 2),
    "ghost_batch_norm": (4, 5),
    "alpha_batch_norm": (4, 3),
    "adab2n": (15, 42),
    "batch_channel_norm": (8, 13),
    "region_norm_b": (41, 48),
    "region_norm_l": (32, 45),
    "evo_norm_b0": (15, 68),
    "evo_norm_s0": (16, 48),
    "power_norm": (24, 73),
    "unified_norm": (10, 20),
    "weight_standardize": (6, 27),
}
"""Forward and backward; where the descriptions of the codes count, they have AdaB2N about 14 forward, RN-B more
than 30, PowerNorm about 25."""


def test_every_official_code_is_a_contender_or_torchs():
    for entry in ZOO:
        of_torch = entry.torch_class is not None or entry.name == "adaptive_layer_norm"
        assert (entry.name in official.BUILDERS) == (
            (bool(entry.official) or entry.name == "alpha_batch_norm") and not of_torch
        )
    assert set(official.BUILDERS) == set(PASSES)


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("name", PASSES)
def test_computes_the_function(name, mode):
    """Output and all gradients as those of the layer in float64, in both modes."""
    case = passes.case_of(name)
    if case.mode == "any" and mode == "eval":
        pytest.skip("the same in both modes")
    case = Case(case.entry, case.workload, case.dtype, "contiguous", mode if case.mode != "any" else "any")
    layer, buffers = case.layer(CPU), case.buffers(CPU, 1)
    check = checks.Check(case, layer, buffers[0])
    contender = peers.contender("official", case, layer, CPU)
    assert check.forward(contender)["y"] < 1e-4
    found = check.both(contender)
    assert set(found) == {"y", "dx", *(k for k, p in layer.named_parameters())}


@pytest.mark.parametrize("name", PASSES)
def test_makes_so_many_passes(name):
    found = passes.count(passes.case_of(name), "official")
    assert tuple(round(found[what].passes) for what in ("forward", "backward")) == PASSES[name]


def test_which_layers_can_be_beaten_by_far():
    """The list of the goals is what is counted."""
    assert {name for name in PASSES if passes.many(passes.counted(name))} == set(MANY_PASSES)


def test_passes_are_reads_and_writes():
    x = torch.randn(8, 16)

    def of(call) -> float:
        with passes.Counter(x) as counter:
            call()
        return counter.found.passes

    out, row = torch.empty(8, 16), torch.randn(16)
    assert of(lambda: x + 1) == 2 and of(lambda: x + x) == 3 and of(lambda: x + row) == pytest.approx(2.125)
    assert of(lambda: x.view(16, 8)) == of(lambda: x.mT[2:]) == of(lambda: x.detach()) == 0
    assert (
        of(lambda: torch.add(x, 1, out=out)) == of(lambda: out.copy_(x)) == 2 and of(lambda: out.zero_()) == 1
    )
    assert of(lambda: out.add_(x)) == 3 and of(lambda: torch.empty_like(x)) == 0
    assert of(lambda: x.double()) == 3 and of(lambda: x.sum(0).expand(8, 16) + x) == pytest.approx(3.25)


def test_jumps():
    """Where rounding decides between two branches, one entry in a thousand may be off, and no more."""
    exact = torch.ones(4000).double()
    found = exact.float()
    found[:4] = 2
    assert checks.relative_error("y", found, exact) == 1 and checks.relative_error("y", found, exact, 1e-3) == 0
    found[4] = 3
    assert checks.relative_error("y", found, exact, 1e-3) == 1
    found[:5] = torch.tensor([torch.nan, 1, 1, 1, 1])
    assert not checks.relative_error("y", found, exact, 1e-3) <= 1
    for name, jumps in (
        ("evo_norm_b0", True),
        ("region_norm_l", True),
        ("evo_norm_s0", False),
        ("adab2n", False),
    ):
        case = passes.case_of(name)
        layer, buffers = case.layer(CPU), case.buffers(CPU, 1)
        assert bool(checks.Check(case, layer, buffers[0]).jumps) == jumps


def test_absent():
    image = case_of(find("power_norm"), (2, 6, 3, 3))
    last = case_of(find("batch_channel_norm"), (2, 8, 4, 4), memory_format="channels_last", mode="training")
    for case, why in (
        (case_of(find("rms_norm")), "that of torch"),
        (case_of(find("evo_norm_s1"), (2, 8, 4, 4)), "no code"),
        (image, "no images"),
        (last, "channels_last does not have"),
    ):
        with pytest.raises(peers.Absent, match=why):
            peers.contender("official", case, case.layer(CPU), CPU)


# The plan


def _row(
    layer: str, other: str, speedup: float, workload: str = "llm-8x8", direction: str = "both"
) -> list[dict]:
    key = {"layer": layer, "workload": workload, "shape": [8, 8], "dtype": "float32", "mode": "any"}
    key |= {"memory_format": "contiguous", "direction": direction, "clock": "wall", "error": {"y": 0.0}}
    own, theirs = ({"median": t, "p20": t, "p80": t} for t in (1e-3, speedup * 1e-3))
    ratio = {"median": speedup, "p20": speedup, "p80": speedup}
    return [
        {**key, "contender": "normzoo", "seconds": own, "baseline": other, "speedup": ratio},
        {**key, "contender": other, "seconds": theirs, "baseline": other, "speedup": dict.fromkeys(ratio, 1.0)},
    ]


def _verdicts(folder, rows: list[dict], sweep: list[dict]) -> dict[str, tuple[str, tuple[str, ...]]]:
    for name, own in zip(cpu.DOCUMENTS, (rows, sweep), strict=True):
        settings = {"command": "python -m normzoo_bench.cpu --output bench/results"}
        Document({"device": "cpu"}, settings, {"median": 1e9}, own).write(folder / f"{name}.json")
    found = {line.goal.key: line for line in cpu.verdicts(folder)}
    return {key: (line.finding.verdict, line.finding.missed) for key, line in found.items()}


def test_verdicts(tmp_path):
    """What is a tenth slower than torch, or not twice as fast as a code of many passes, misses its goal."""
    good = [row for way in DIRECTIONS for n in WITH_TORCH for row in _row(n, "torch", 0.91, direction=way)]
    good += [row for name in MANY_PASSES for row in _row(name, "official", 2.01)]
    swept = [(f"{what}-8x8", name) for what, names in SWEEPS.items() for name in names]
    sweep = [row for use, name in swept for row in _row(name, "torch", 1.5, use)]
    assert {v for v, _ in _verdicts(tmp_path, good, sweep).values()} == {MET}
    some = _row("rms_norm", "torch", 0.91), _row("rms_norm", "torch", 1.5, "rows-8x8")
    found = {key: verdict for key, (verdict, _) in _verdicts(tmp_path, *some).items()}
    assert found["cpu-torch"] == found["cpu-sweeps"] == UNDECIDED

    slow = [*good, *_row("layer_norm", "torch", 0.89, direction="forward")]
    found = _verdicts(tmp_path, slow, sweep)
    assert found["cpu-torch"][0] == MISSED and found["cpu-official"][0] == MET == found["cpu-sweeps"][0]
    assert found["cpu-torch"][1][0].startswith("layer_norm llm-8x8 float32 forward: 0.89")

    found = _verdicts(tmp_path, [*good, *_row("evo_norm_b0", "official", 1.99)], sweep)
    assert found["cpu-official"][0] == MISSED and "evo_norm_b0" in found["cpu-official"][1][0]
    few = [*good, *_row("alpha_batch_norm", "official", 1.1)]  # 7 passes
    assert _verdicts(tmp_path, few, sweep)["cpu-official"][0] == MET
    found = _verdicts(tmp_path, good, [*sweep, *_row("rms_norm", "torch", 0.5, "width-8x256")])
    assert found["cpu-sweeps"][0] == MISSED and found["cpu-torch"][0] == MET


def test_the_plan_has_what_the_goals_ask_for():
    layers = [part for part in cpu.PARTS if part.scaling is None]
    with_official = {name for part in layers if "official" in part.contenders for name in part.layers}
    assert set(MANY_PASSES) <= with_official
    assert all("both" in part.directions and "normzoo" in part.contenders for part in cpu.PARTS)
    with_torch = {name for part in layers if "torch" in part.contenders for name in part.layers}
    assert with_torch >= {entry.name for entry in ZOO if entry.torch_class is not None}
    shapes = {case.shape for part in layers for case in part.cases()}
    assert {(64, 1024), (16, 64, 8, 8)} <= shapes
    assert {part.scaling for part in cpu.PARTS} == {None, "rows", "width", "channels"}


def test_every_layer_of_a_part_comes_first_in_float32(monkeypatch):
    """In both memory formats, large and small, before any gets another shape or dtype."""
    for part in cpu.PARTS:
        if part.scaling is not None:
            continue
        cases = part.cases()
        wanted = {
            (name, use, shape, memory_format)
            for name in part.layers
            for use, shape in cpu._SHAPES[find(name).family][:2]
            for memory_format in memory_formats(find(name).family, shape)
        }
        assert wanted == {
            (case.entry.name, case.workload.use, case.workload.shape, case.memory_format)
            for case in cases[: sum(len(part.modes) if find(n).couples_samples else 1 for n, *_ in wanted)]
        }
        assert {case.dtype for case in cases} == {"float32", "bfloat16"}
        assert len({str(case) for case in cases}) == len(cases)


def test_region_norm_l_decides_as_its_authors_do():
    """Also in bfloat16, where a mask by rounded means has other pixels."""
    for seed in (0, 4, 19):
        torch.manual_seed(seed)
        case = Case(
            find("region_norm_l"), Workload("resnet", (8, 8, 8, 8)), "bfloat16", "contiguous", "training"
        )
        layer, buffers = case.layer(CPU), case.buffers(CPU, 1)
        check = checks.Check(case, layer, buffers[0])
        assert max(check.both(peers.contender("official", case, layer, CPU)).values()) < 3e-2


def test_a_rehearsal(tmp_path, monkeypatch, capsys):
    few = cpu.Part(
        "few", 1.0, ("rms_norm", "crms_norm"), ("normzoo", "torch", "official"), ("both",), ("float32",)
    )
    sweep = cpu.Part(
        "sweep", 1.0, ("rms_norm",), ("normzoo", "torch"), ("forward",), ("float32",), scaling="width"
    )
    monkeypatch.setattr(cpu, "PARTS", (few, sweep))
    assert cpu.main(["--output", str(tmp_path), "--minutes", "1", "--rehearse"]) == 0
    layers, scaling = (json.loads((tmp_path / f"{name}.json").read_text()) for name in cpu.DOCUMENTS)
    assert {(row["layer"], row["baseline"]) for row in layers["rows"]} == {
        ("rms_norm", "torch"),
        ("crms_norm", "official"),
    }
    assert all(row["saved_bytes"] and row["peak_bytes"] for row in layers["rows"])
    assert {row["workload"].partition("-")[0] for row in scaling["rows"]} == {"width"}
    assert [row["layer"] for row in layers["extra"]["passes"]] == ["crms_norm", "rms_norm"]
    told = capsys.readouterr().out
    assert "Goals on this CPU" in told and "No time was left" not in told
    for document in (layers, scaling):
        assert document["settings"]["command"] == "python -m normzoo_bench.cpu"
        output = tmp_path.name  # a place on this machine is nobody's business
        assert document["settings"]["arguments"] == {"output": output, "minutes": 1.0, "rehearse": True}


def test_what_is_not_run_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = cpu.Part("few", 1.0, ("rms_norm",), ("normzoo", "torch"), ("both",), ("float32",))
    monkeypatch.setattr(cpu, "PARTS", (few,))
    monkeypatch.setattr(
        cpu.runs, "start", lambda *_: (Document({}, {"rounds": 2}, {"median": 1e9}), (), 1 << 12)
    )
    monkeypatch.setattr(cpu.runs, "finish", lambda *_: None)
    monkeypatch.setattr(cpu, "show", lambda *_: None)
    assert cpu.main(["--output", "out/here", "--minutes", "1e-9"]) == 0
    count = len(few.cases())
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith(
        f"No time was left for {count} measurements, first {few.cases()[0]}; more --minutes have them."
    )
    document = json.loads((tmp_path / "out/here/cpu-layers.json").read_text())
    assert document["settings"]["arguments"]["output"] == "out/here" and len(document["not_run"]) == count


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes", "nan"]])
def test_wrong_usage(tmp_path, wrong, capsys):
    assert cpu.main(["--output", str(tmp_path), *wrong]) == 2
    assert "--minutes is" in capsys.readouterr().err


def test_a_workload_with_tasks():
    """AdaB2N is measured with task ids, as it trains: samples of two tasks."""
    layer = Case(find("adab2n"), Workload("resnet", (4, 8, 3, 3)), "float32", "contiguous", "training").layer(
        CPU
    )
    assert layer.task_ids.tolist() == [0, 1, 0, 1] and "task_ids" not in dict(layer.named_parameters())
