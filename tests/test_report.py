"""The page about speed says what the documents say: what is missed is missed, and nothing has no command."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image
from report_documents import (
    GPU,
    along_sweeps,
    call,
    document,
    judged,
    launch,
    of_widths,
    on_gpu,
    pair,
    pairs,
    put,
    row,
    spread,
    static,
)

from normzoo.zoo import ZOO
from normzoo_bench import passes
from normzoo_bench.peers import Absent
from normzoo_bench.report import __main__ as command
from normzoo_bench.report import asked, bands, goals, measures, pages, plots
from normzoo_bench.report.documents import COMMANDS, read
from normzoo_bench.report.judging import ABSENT, ELSEWHERE, MET, MISSED, UNDECIDED
from normzoo_bench.report.table import lines


def told(folder, key):
    return judged(folder, key).finding.verdict


@pytest.fixture
def without_plots(monkeypatch):
    """The files of words alone, which take no seconds."""
    monkeypatch.setattr(pages, "PLOTS", ())


def test_every_goal_says_what_it_asks_and_what_follows():
    every = goals.goals()
    assert len({goal.key for goal in every}) == len(every) > 40
    assert all(goal.section and goal.what and goal.bound and goal.command and goal.ahead for goal in every)
    known = {entry.name for entry in ZOO} | {entry.added.__name__ for entry in ZOO if entry.added}
    named = {layer for layer, _, _ in goals.share_goals()} | {*asked.MANY_PASSES, *asked.FEW_LAUNCHES}
    assert named <= known and set(goals.CAUSES) <= {goal.key for goal in every}


def test_whose_code_makes_many_passes():
    """The goal is about a step, as the count of `normzoo_bench.passes` is."""
    official = {}
    for entry in ZOO:
        try:
            counted = passes.count(passes.case_of(entry.name), "official")
        except Absent:
            continue
        official[entry.name] = round(sum(part.passes for part in counted.values()), 1)
    assert {name for name, count in official.items() if count > passes.MANY} == set(asked.MANY_PASSES)


@pytest.mark.parametrize(("speedup", "verdict"), [(0.9, MET), (1.3, MET), (0.899, MISSED), (0.2, MISSED)])
def test_slower_than_torch_is_missed(tmp_path, speedup, verdict):
    put(tmp_path, cpu_layers=document(*pair(speedup), *pairs()))
    line = judged(tmp_path, "cpu-torch")
    assert line.finding.verdict == verdict and line.commands == ("normzoo bench --planted",)
    assert f"{speedup:#.3g}".removesuffix(".") in line.finding.value
    assert [name.split(" ")[1] for name in line.finding.missed] == ["resnet-8x64x8x8"] * (verdict == MISSED)
    assert any("Next:" in said for said in line.follows) == (verdict == MISSED)


def test_whole_models_are_no_layers(tmp_path):
    put(tmp_path, cpu_layers=document(*pairs()), cpu_models=document(*pair(0.5, direction="step")))
    assert told(tmp_path, "cpu-torch") == MET


def test_one_launch_against_several(tmp_path):
    tried = row(shape=[8, 64, 8, 8], speedup=1.2, baseline="on_chip=False") | {
        "choice": "on_chip",
        "value": True,
    }
    large = tried | {"shape": [64, 256, 56, 56], "speedup": spread(0.5)}
    default = tried | {"value": False, "speedup": spread(1.0)}

    def with_choices(*rows):
        return put(tmp_path, bench=document(on_gpu(1.0), environment=GPU, extra={"choices": rows}))

    assert told(with_choices(), "one-launch") == ABSENT
    assert told(with_choices(tried, large, default), "one-launch") == MET
    assert told(with_choices(tried | {"speedup": spread(1.05)}), "one-launch") == MISSED


def test_the_worst_rows_are_named_first(tmp_path):
    rows = [one for i in range(6) for one in pair(0.3 + 0.1 * i, workload=f"resnet-{i}")]
    put(tmp_path, cpu_layers=document(*rows))
    missed = judged(tmp_path, "cpu-torch").finding.missed
    assert [said.split(" ")[1] for said in missed[:3]] == ["resnet-0", "resnet-1", "resnet-2"]
    assert missed[3:] == ("and 3 more",)


def test_sweeps_are_a_goal_of_their_own(tmp_path):
    put(tmp_path, cpu_layers=document(*pairs()), cpu_scaling=document(*along_sweeps(0.5)))
    assert told(tmp_path, "cpu-torch") == MET and told(tmp_path, "cpu-sweeps") == MISSED
    put(tmp_path, cpu_scaling=document(*along_sweeps()))
    assert told(tmp_path, "cpu-sweeps") == MET
    put(tmp_path, cpu_scaling=document(*(one for one in along_sweeps() if one["layer"] != "rms_norm")))
    finding = judged(tmp_path, "cpu-sweeps").finding
    assert finding.verdict == UNDECIDED and "width: 1 of 2 layers have no rows: rms_norm" in finding.value


def test_the_authors_code_is_compared_whatever_the_baseline(tmp_path):
    """Torch is the baseline of the document; the ratio to another is that of the times."""
    known = {"layer": "power_norm", "direction": "both"}
    rest = pairs(asked.MANY_PASSES, 30.0, "official", ["both"])
    slow = row("official", **known, seconds=spread(1e-3))
    put(tmp_path, cpu_layers=document(row(**known), slow, *rest))
    line = judged(tmp_path, "cpu-official")
    assert line.finding.verdict == MET and "10.0 to 30.0" in line.finding.value
    close = slow | {"seconds": spread(1.9e-4)}
    put(tmp_path, cpu_layers=document(row(**known), close, *rest))
    missed = judged(tmp_path, "cpu-official").finding.missed
    assert missed == ("power_norm resnet-8x64x8x8 float32 training both: 1.90 (1.83-1.98)",)
    turns = {"speedups": {"official": spread(2.1)}}
    put(tmp_path, cpu_layers=document(row(**known, **turns), close, *rest))
    assert told(tmp_path, "cpu-official") == MET, "the median of the pairs decides"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (of_widths(0.93), MET),
        ([*of_widths(0.93), on_gpu(0.91)], MISSED),
        ([on_gpu(0.91)], MISSED),
        (of_widths(0.93, (1024, 2048, 4096)), UNDECIDED),
        ([on_gpu(0.93)], UNDECIDED),
        (of_widths(0.1, cold=False), ABSENT),
        (of_widths(0.1, clock="host"), ABSENT),
        (of_widths(0.1, dtype="float32"), ABSENT),
        (of_widths(0.1, contender="torch"), ABSENT),
        (of_widths(0.1, direction="backward"), ABSENT),
    ],
)
def test_share_of_a_copy_on_a_gpu(tmp_path, found, verdict):
    put(tmp_path, bench=document(*found, environment=GPU))
    assert told(tmp_path, "rows-forward") == verdict


def test_a_cpu_decides_nothing_about_a_gpu(tmp_path):
    put(tmp_path, cpu_layers=document(on_gpu(0.99, clock="wall")))
    assert told(tmp_path, "rows-forward") == ELSEWHERE


def test_gates_that_fall(tmp_path):
    fallen = {"case": "c", "target": "sm_90", "measure": "spills", "measured": 8, "bound": "at most 0"}
    excused = fallen | {"exception": "a reason"}
    put(tmp_path, static=static(failures=[excused]))
    assert told(tmp_path, "gates") == told(tmp_path, "configurations") == MET
    put(tmp_path, static=static(failures=[excused, fallen | {"exception": None}]))
    finding = judged(tmp_path, "gates").finding
    assert finding.verdict == MISSED and finding.missed == ("c sm_90: spills 8, at most 0",)
    assert told(tmp_path, "configurations") == MISSED


def test_a_sample_of_the_configurations_is_not_all(tmp_path):
    put(tmp_path, static=static(command="python -m static"))
    assert told(tmp_path, "configurations") == MISSED and told(tmp_path, "on-chip") == MISSED
    put(tmp_path, static=static(launches=[launch("on-chip-c")]))
    assert told(tmp_path, "configurations") == told(tmp_path, "on-chip") == MET


def test_peers_may_be_better_with_a_reason_alone(tmp_path):
    beaten = {"call": "rms-fwd-64-bf16", "measure": "instructions", "peer": "fla", "reason": "planted"}
    put(tmp_path, static=static(beaten=[beaten]))
    assert told(tmp_path, "peers") == MET
    put(tmp_path, static=static(beaten=[beaten, beaten | {"reason": None}]))
    finding = judged(tmp_path, "peers").finding
    assert finding.verdict == MISSED and finding.missed == ("rms-fwd-64-bf16: instructions of fla",)


def test_launches_have_limits_by_layer(tmp_path):
    def counted(*but, **most):
        few, many = dict.fromkeys(asked.FEW_LAUNCHES, 4), dict.fromkeys(asked.MORE_LAUNCHES, 12)
        numbers = {name: count for name, count in (few | many | most).items() if name not in but}
        rows = [{"layer": name, "direction": "forward", "launches": count} for name, count in numbers.items()]
        return put(tmp_path, launches=document(*rows))

    assert told(counted(), "few-forward") == told(counted(), "many-forward") == MET
    assert told(counted(), "few-backward") == ABSENT, "nothing was counted of it"
    few = judged(counted(power_norm=5), "few-forward").finding
    assert few.verdict == MISSED and few.missed == ("power_norm forward: 5",)
    assert told(counted("group_norm", power_norm=5), "few-forward") == MISSED
    many = judged(counted(evo_norm_b0=13), "many-forward").finding
    assert many.verdict == MISSED and many.missed == ("evo_norm_b0 forward: 13",)
    assert told(counted("evo_norm_b0"), "many-forward") == UNDECIDED


def test_limits_of_launches_are_not_met_by_what_is_not_counted(tmp_path):
    both = {"layer": "batch_norm", "forward": {"kernels": 2, "operators": 1}, "backward": 4}
    put(tmp_path, launches=document(both))
    finding = judged(tmp_path, "few-backward").finding
    assert finding.verdict == UNDECIDED
    assert finding.value == "4; 3 of 4 layers are not counted: group_norm, instance_norm, power_norm"
    put(tmp_path, launches=document(*({**both, "layer": name} for name in asked.FEW_LAUNCHES)))
    assert judged(tmp_path, "few-forward").finding.value == "3 to 3 in 4 layers"


def test_models_and_sweeps_that_are_not_there_are_named(tmp_path):
    put(tmp_path, cpu_models=document(row(workload="gpt-6x4", direction="step")))
    finding = judged(tmp_path, "models").finding
    assert finding.verdict == MISSED and finding.value == "1 of 32 are there"
    assert "gpt step torch.compile" in finding.missed and "gpt step normzoo" not in finding.missed


def test_bytes_that_are_not_there_are_missed(tmp_path):
    whole, swept = pairs(asked.LAYERS, directions=["both"]), pair(1.0, direction="both", workload="rows-8x64")
    swept[0]["saved_bytes"] = 99
    put(tmp_path, cpu_layers=document(*whole, *swept))
    finding = judged(tmp_path, "saved_bytes").finding
    assert finding.verdict == MET and finding.value.endswith("1.00 as the median, 1.00 to 1.00")
    assert {value for *_, value in measures.memory(read(tmp_path), "cpu", "saved_bytes", "both")} == {1.0}
    put(tmp_path, cpu_layers=document(*whole[1:]))
    assert told(tmp_path, "saved_bytes") == UNDECIDED
    put(tmp_path, cpu_layers=document(*pair(1.0, direction="both", saved_bytes=None)))
    assert told(tmp_path, "saved_bytes") == MISSED


def test_a_row_without_a_command_is_refused(tmp_path, capsys, without_plots):
    put(tmp_path, cpu_layers=document(*pair(1.0), command=""))
    with pytest.raises(ValueError, match=r"'cpu-torch' has no command \(measured in cpu-layers\)"):
        lines(read(tmp_path))
    assert command.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "has no command" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_document_is_listed(tmp_path, without_plots):
    put(tmp_path, cpu_layers=document(*pair(1.0), *pair(0.9)), static=static(launches=[launch("c")] * 7))
    command.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8").split("<h2>Documents")[1]
    assert re.findall(r"<span>([\w-]+)\.json</span>", page) == ["cpu-layers", "static"]
    assert re.findall(r"<span>(\d+)</span>", page) == ["4", "7"]


def test_the_command_of_a_document_that_tells_its_arguments(tmp_path):
    content = document(*pair(1.0))
    arguments = {"layer": ["batch_norm"], "size": "smoke", "contender": ["normzoo", "torch"], "seconds": None}
    content["settings"] = {"arguments": arguments}
    put(tmp_path, cpu_layers=content)
    said = "batch_norm --device cpu --size smoke --contender normzoo,torch"
    assert judged(tmp_path, "cpu-torch").commands == (f"normzoo bench {said}",)
    arguments |= {
        "model": ["gpt"],
        "layer": None,
        "json": False,
        "list": True,
        "output": "/away/from/here.json",
    }
    content["settings"]["command"] = "python -m models"
    put(tmp_path, cpu_layers=content)
    said = "--size smoke --contender normzoo torch --model gpt --list --output here.json"
    assert judged(tmp_path, "cpu-torch").commands == (f"python -m models {said}",)
    content["settings"]["arguments"] = {"minutes": 7.5, "rehearse": False}
    put(tmp_path, cpu_layers=content)
    assert judged(tmp_path, "cpu-torch").commands == ("python -m models --minutes 7.5",)


def test_nothing_is_there(tmp_path, without_plots):
    found = lines(read(tmp_path / "no folder"))
    assert {line.finding.verdict for line in found} == {ABSENT, ELSEWHERE}
    assert {command for line in found for command in line.commands} == set(COMMANDS.values())
    assert command.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, capsys, without_plots):
    put(
        tmp_path,
        cpu_layers=document(*pairs()),
        host={"form": 1, "rows": 3},
        old=document(row()) | {"form": 0},
    )
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    rehearsed = document(row())
    rehearsed["settings"]["arguments"] = {"minutes": 8, "rehearse": True}
    put(tmp_path, bench=rehearsed)
    assert dict(read(tmp_path).unread).keys() == {"bench", "broken", "host", "old"}
    assert told(tmp_path, "cpu-torch") == MET
    command.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert "left out broken.json: is not JSON" in err and "left out bench.json: a rehearsal" in err
    assert "left out: a rehearsal" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_goal_missed_for_no_known_reason_is_told_and_fails(tmp_path, capsys, monkeypatch, without_plots):
    put(tmp_path, cpu_layers=document(*pair(0.5)))
    out = tmp_path / "out"
    monkeypatch.delitem(goals.CAUSES, "cpu-torch")
    assert command.main(["--results", str(tmp_path), "--output", str(out)]) == 1
    assert "does not say why: cpu-torch" in capsys.readouterr().err
    assert "Why: not found out yet." in (out / "goals.md").read_text(encoding="utf-8")
    monkeypatch.setitem(goals.CAUSES, "cpu-torch", "planted, in `batch_norm`")
    assert command.main(["--results", str(tmp_path), "--output", str(out)]) == 0
    assert "Why: planted, in `batch_norm`." in (out / "goals.md").read_text(encoding="utf-8")
    assert "Why: planted, in <code>batch_norm</code>." in (out / "report.html").read_text(encoding="utf-8")


def test_what_documents_say_is_no_markup(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PLOTS", [plot for plot in plots.PLOTS if plot.name == "ratios-torch"])
    evil = "<script>alert(1)</script>"
    content = document(*pair(0.5, layer=evil), *pair(0.5, workload=f"{evil}-1|2"), command=f"bench '{evil}'")
    content["environment"] = content["environment"] | {"cpu": evil}
    put(tmp_path, cpu_layers=content)
    command.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in html and "<script" not in html
    assert "<script" not in (tmp_path / "out" / "ratios-torch.svg").read_text(encoding="utf-8")
    words = (tmp_path / "out" / "goals.md").read_text(encoding="utf-8")
    assert "\\<script>alert" in words and "-1\\|2" in words


def test_files_say_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PLOTS", [plot for plot in plots.PLOTS if plot.name == "host"])
    known = {"direction": "both", "layer": "rms_norm"}
    rows = [row("normzoo-empty", **known), row("torch", **known)]
    put(tmp_path, host=document(*rows, command=f"python -m host --output {tmp_path}/host.json"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.svg").write_text("an older plot", encoding="utf-8")
    assert command.main(["--results", str(tmp_path), "--output", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "goals.md",
        "plots.md",
        "host.svg",
        "host.png",
    }
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    assert "`python -m host --output host.json`" in (out / "goals.md").read_text(encoding="utf-8")


def test_plots_name_machine_versions_date_and_commit(tmp_path):
    predicted = static(calls=[call("standardize-fwd-batch-32x256x56x56-bf16", 200.0)])
    put(tmp_path, bench=document(on_gpu(0.8), environment=GPU), static=predicted)
    (plot,) = [plot for plot in plots.PLOTS if plot.name == "roofline-gpu"]
    drawn = plot.draw(read(tmp_path))
    assert drawn is not None
    texts = re.findall(r">([^<>\n]+)</text", pages.compact(drawn.svg))
    line = " ".join(texts)
    for word in ("Planted GPU", "torch 7.7.7", "normzoo 0.0.9 at feedface00", "2031-02-03"):
        assert word in line
    assert {"rms_norm", "batch_norm", "predicted from bytes", "goal", "forward"} <= set(texts)
    assert Image.open(io.BytesIO(drawn.png())).size[0] > 400


def test_many_rows_make_no_large_file():
    ticks = [bands.Tick(1 + i / 1000, 1.0, 2.0) for i in range(1000)]
    kept = bands._thinned(ticks)
    assert len(kept) == bands.MOST and kept[0] == ticks[0] and kept[-1] == ticks[-1]
    assert bands._thinned(ticks[:5]) == ticks[:5]


def test_compact_keeps_words_and_drops_digits():
    svg = (
        '<svg><g id="axes_1"><path d="M 1.23456 7.654321 \nL 3.25 7.654321 \n"/><text>torch 2.13.01</text></g>'
    )
    assert pages.compact(svg) == '<svg><g><path d="M1.2 7.7H3.2\n"/><text>torch 2.13.01</text></g>'
