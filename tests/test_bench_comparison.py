"""Documents of the benchmark and their comparison."""

import argparse
import json
import re

import pytest

from normzoo_bench import commands, results
from normzoo_bench.comparison import differences, regressed


def compare(*arguments):
    parser = argparse.ArgumentParser()
    commands.compare_arguments(parser)
    return commands.compare(parser.parse_args([str(a) for a in arguments]))


def row(seconds=1.0, spread=0.01, **other):
    summary = {"median": seconds, "p20": seconds * (1 - spread), "p80": seconds * (1 + spread)}
    base = {name: name for name in results.KEY} | {"contender": "normzoo", "clock": "wall", "dtype": "float32"}
    measured = {"error": {"y": 1e-7}, "seconds": summary, "saved_bytes": 100, "peak_bytes": 200}
    return base | measured | {"baseline": None, "speedup": None} | other


def beside_torch(torchs, ours, spread=0.01, count=6):
    """Rows of torch and of normzoo that took so long."""
    ratio = torchs / ours
    speedup = {"median": ratio, "p20": ratio * (1 - spread), "p80": ratio * (1 + spread)}
    of_torch = {"contender": "torch", "baseline": "torch", "speedup": dict.fromkeys(speedup, 1.0)}
    of_normzoo = {"baseline": "torch", "speedup": speedup}
    return [
        row(seconds, spread, workload=f"llm-{i}", **more)
        for i in range(count)
        for seconds, more in ((torchs, of_torch), (ours, of_normzoo))
    ]


def document(*rows, **environment):
    return {"form": results.FORM, "environment": {"torch": "2.11", **environment}, "rows": list(rows)}


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_a_regression_is_found(written, capsys):
    old, new = written("a", document(row())), written("b", document(row(1.1), row(layer="other"), gpu="H"))
    assert compare(old, new) == 1
    printed = capsys.readouterr().out
    assert re.search(r"contender|normzoo workload .* +1000 ms +1100 ms +1\.10 \(1\.08-1\.12\)$", printed, re.M)
    assert re.search(r"gpu +None +H", printed) and "Only in the old: 0, only in the new: 1." in printed
    assert compare(old, new, "--threshold", "15") == 0
    assert compare(new, old, "--json") == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    assert len(found["faster"]) == 1 and not found["slower"] and found["only_old"] == 1


def test_noise_is_no_regression():
    for seconds, spread in ((1.1, 0.08), (1.04, 0.001)):
        found = differences(document(row(1.0, spread)), document(row(seconds, spread)))
        assert found["matched"] == 1 and not found["slower"] and not regressed(found)


@pytest.mark.parametrize("drift", [0.5, 1.0, 2.4])
def test_a_machine_that_drifts(drift):
    """What torch suffers as well is no regression, and neither hides one nor an improvement."""
    old = document(*beside_torch(2.0, 1.0))
    for factor, where in ((1.0, None), (1.2, "slower"), (0.8, "faster")):
        new = document(*beside_torch(2.0 * drift, 1.0 * drift * factor))
        found = differences(old, new)
        assert found["drift"] == pytest.approx(drift) and found["others"]["torch"]["rows"] == 6
        assert {name: len(found[name]) for name in ("slower", "faster") if found[name]} == (
            {where: 6} if where else {}
        )
        assert regressed(found) == (where == "slower")
        for changed in found[where] if where else ():
            assert changed["ratio"]["median"] == pytest.approx(factor)
            assert changed["speedup"] == pytest.approx([2.0, 2.0 / factor])


def test_rows_without_a_baseline_on_a_machine_that_drifts():
    rows = [[row(s, layer="other"), *beside_torch(2.0 * s, 1.0 * s)] for s in (1.0, 2.0)]
    assert not regressed(differences(*(document(*r) for r in rows)))
    rows[1][0] = row(2.2, layer="other")
    assert len(differences(*(document(*r) for r in rows))["slower"]) == 1


def test_torch_having_a_good_day_is_no_regression():
    old, new = ([row(1.0, layer="other"), *beside_torch(t, t / 2)] for t in (2.0, 1.8))
    found = differences(document(*old), document(*new))
    assert found["drift"] == pytest.approx(0.9) and not regressed(found)


def test_when_torch_does_not_tell_the_drift():
    few = [document(*beside_torch(2.0 * s, s, count=4)) for s in (1.0, 1.5)]
    assert differences(*few)["drift"] is None and not regressed(differences(*few))  # the speedup is what it was
    other = [document(*beside_torch(t, 1.0), torch=v) for t, v in ((2.0, "2.11"), (1.0, "2.13"))]
    found = differences(*other)
    assert found["drift"] is None and found["environment"] == {"torch": ["2.11", "2.13"]}
    assert not regressed(found)  # torch got faster, normzoo is as fast as it was


def test_noise_of_the_baseline_is_no_regression():
    old, new = beside_torch(2.0, 1.0), beside_torch(2.0, 1.0)
    old[1]["speedup"] = {"median": 5.0, "p20": 4.0, "p80": 6.0}  # torch had a bad moment beside one row
    assert not regressed(differences(document(*old), document(*new)))
    new = beside_torch(2.0, 1.2, spread=0.2)
    assert not regressed(differences(document(*beside_torch(2.0, 1.0, spread=0.2)), document(*new)))


@pytest.mark.parametrize("noisy", ["seconds", "speedup"])
def test_noise_of_either_range_is_no_regression(noisy):
    """Where a machine drifts unevenly, only what stands out of both ranges is told."""
    old, new = (beside_torch(2.0, ours) for ours in (1.0, 1.2))
    assert regressed(differences(document(*old), document(*new)))
    for of_row in (*old, *new):
        of_row[noisy] |= {"p20": 0.5, "p80": 3.0}
    assert not regressed(differences(document(*old), document(*new)))


def test_peers_do_not_regress(written, capsys):
    old, new = (document(row(s, contender="liger"), row()) for s in (1.0, 2.0))
    assert compare(written("a", old), written("b", new)) == 0
    assert "liger took 2.00 (2.00-2.00) times as long as before, in 1 rows." in capsys.readouterr().out


def test_a_layer_that_fails_now(written, capsys):
    entry = {name: name for name in results.KEY if name != "clock"} | {"contender": "normzoo"}
    gone = document(row(layer="kept")) | {"failed": [entry | {"reason": "y is off"}]}
    old = document(row(layer="kept"), row())
    assert compare(written("a", old), written("b", gone)) == 1
    assert re.search("^FAILED now: layer normzoo .*: y is off$", capsys.readouterr().out, re.M)
    assert not regressed(differences(gone, gone))
    of_a_peer = [entry | {"contender": "quack", "reason": "raises"}]
    assert not regressed(differences(old, document(row(layer="kept")) | {"failed": of_a_peer}))


def test_errors_below_rounding_may_double():
    old, new = (document(row(error={"y": e}, dtype="bfloat16")) for e in (0.0, 5e-3))
    assert not regressed(differences(old, new))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"error": {"y": 1e-6}}, "less_exact"),
        ({"peak_bytes": 300}, "larger"),
        ({"saved_bytes": 110}, "larger"),
    ],
)
def test_growth_is_found(change, where):
    found = differences(document(row()), document(row(**change)))
    assert len(found[where]) == 1 and regressed(found)
    assert not regressed(differences(document(row(**change)), document(row())))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no key 'form'"),
        ('{"form": 99}', "has form 99, this version reads 1"),
        ({"form": 1, "environment": {}}, "'rows' is missing"),
        ({"form": 1, "environment": [], "rows": []}, "'environment' is missing or no dict"),
        ({"form": 1, "environment": {}, "rows": [{"layer": "x"}]}, "row 0 has no contender, workload"),
        ({"form": 1, "environment": {}, "rows": [row() | {"seconds": {"median": 1}}]}, "row 0 has no p20, p80"),
        ({"form": 1, "environment": {}, "rows": [7]}, "row 0 is no dict"),
        (document(row(layer="other")), "no row of .* is in"),
    ],
)
def test_unusable_files(written, capsys, content, message):
    assert compare(written("a", document(row())), written("b", content)) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err) and err.count("\n") == 1


def test_a_missing_file_and_a_bad_threshold(written, capsys, tmp_path):
    good = written("a", document(row()))
    assert compare(tmp_path / "none", good) == 2
    assert "No such file" in capsys.readouterr().err
    assert compare(good, good, "--threshold", "-1") == 2
    assert compare(good, good) == 0


def test_writing_fails_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    made = results.Document({}, {}, {})
    made.write(path)
    before = path.read_text()
    made.extra["more"] = 1
    with monkeypatch.context() as full, pytest.raises(OSError, match="disk is full"):
        full.setattr(results.os, "replace", lambda *_: raises_os_error())
        made.write(path)
    assert path.read_text() == before and results.load(path)["extra"] == {}
    made.write(path)
    assert results.load(path)["extra"] == {"more": 1} and len(list(tmp_path.iterdir())) == 1


def raises_os_error():
    raise OSError("disk is full")
