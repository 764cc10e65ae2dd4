"""The measurement of the forms that only a measurement can choose: what it asks, and what it says."""

from dataclasses import replace

import pytest
import torch
from measuring import FakeClock

pytest.importorskip("triton")

from normzoo_bench import checks, choices, gpu, results, run
from normzoo_bench.measure import Settings
from normzoo_kernels import _choices, _on_chip_forms
from normzoo_kernels._channel_forms import Problem
from normzoo_kernels._on_chip import standardize_on_chip


def row(median, p20, p80, clock="kernel"):
    speedup = {"median": median, "p20": p20, "p80": p80}
    place = {"layer": "batch_norm", "shape": [2, 3], "memory_format": "contiguous", "direction": "forward"}
    return {"speedup": speedup, "clock": clock, **place}


FAST, SLOW, EVEN = row(1.3, 1.2, 1.4), row(0.5, 0.4, 0.6), row(1.0, 0.9, 1.1)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([FAST, EVEN], "faster in 1 of 2 rows, slower in 0. Switch it on: True becomes the default of on_chip"),
        (
            [FAST, SLOW],
            "Before it is switched on, its form has to leave out sizes such as batch_norm 2x3 forward",
        ),
        ([EVEN, EVEN], "faster in 0 of 2 rows, slower in 0. Leave it off."),
        ([row(2.0, 1.9, 2.1, "wall")], "No kernel was measured, so nothing follows."),
    ],
)
def test_advice(rows, said):
    assert said in choices.advice("on_chip", True, rows)


def test_every_choice_is_measured_and_shown(capsys):
    device = torch.device("cpu")
    document, clocks, cache = run.start(device, 1e-4, 2)
    part = next(part for part in gpu.PARTS if part.choices)
    cases, one = gpu.cases_of(part, "cpu")
    settings = Settings(device, (), (), clocks, 2, cache)
    assert run.run(cases, settings, document, lambda case: None, one)
    assert not document.failed and not document.not_run and not document.rows
    rows = document.extra["choices"]
    for name, choice in _choices.CHOICES.items():
        assert {row["value"] for row in rows if row["choice"] == name} == {choice.default, *choice.others}
        for value in choice.others:
            of_value = [row for row in rows if (row["choice"], row["value"]) == (name, value)]
            assert of_value and all(row["baseline"] == f"normzoo-{name}={choice.default}" for row in of_value)
    choices.show(rows)
    told = capsys.readouterr().out
    assert all(
        f"normzoo-{name}={choice.others[0]}, bfloat16: wall time" in told
        for name, choice in _choices.CHOICES.items()
    )


def test_what_fails_is_told(monkeypatch):
    def fails(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(choices, "call_of", fails)
    device = torch.device("cpu")
    document, clocks, cache = run.start(device, 1e-4, 2)
    question = choices.questions("cpu", "bfloat16")[0]
    choices.measure_choice(question, Settings(device, (), (), clocks, 2, cache), document)
    assert len(document.failed) == 4 and "planted" in document.failed[0]["reason"]
    assert document.extra["choices"] == []


def test_a_value_that_computes_something_else_fails_and_stays_off(monkeypatch, capsys):
    """Though it is fast: on chip the map is off by a half, in the forward pass."""
    document = results.Document({}, {}, {"median": 1e9})
    question = choices.questions("cpu", "bfloat16")[0]
    assert question.choice == "on_chip"
    right = checks.Check.forward

    def wrong(check, contender):
        if contender.name.endswith("on_chip=True"):
            contender = replace(contender, call=lambda x: 1.5 * question.case.layer(x.device)(x))
        return right(check, contender)

    monkeypatch.setattr(checks.Check, "forward", wrong)
    settings = Settings(torch.device("cpu"), (), (), (FakeClock(1e-3, 2e-3, 1e-3),), 2, 1 << 12)
    choices.measure_choice(question, settings, document)
    (failed,) = document.failed
    assert failed["contender"] == "normzoo-on_chip=True" and document.ours_failed
    rows = [row | {"clock": "kernel"} for row in document.extra["choices"]]
    assert [row["speedup"]["median"] for row in rows if row["value"]] == [2.0]  # the backward pass
    choices.show(rows, document.failed)
    told = " ".join(capsys.readouterr().out.split())
    assert "It must stay off: it failed 1 times, first in batch_norm" in told and "Switch it on" not in told


def test_questions_for_a_gpu_are_about_sizes_where_a_form_runs(monkeypatch):
    monkeypatch.setattr(_on_chip_forms, "sm_count", lambda device: 132)
    asked = choices.questions("cuda", "bfloat16")
    assert {question.choice for question in asked[:4]} == set(_choices.CHOICES)
    for question in asked:
        if question.choice != "on_chip":
            continue
        samples, channels, *size = question.shape
        batch, last = question.case.entry.name == "batch_norm", question.case.memory_format == "channels_last"
        groups = {"batch_norm": channels, "group_norm": 32, "instance_norm": channels}[question.case.entry.name]
        count = torch.Size(size).numel()
        problem = Problem(
            *(1 if batch and last else samples, channels, count * (samples if batch and last else 1)),
            *(2, last, not batch, False, torch.device("cpu")),
        )
        assert _on_chip_forms.on_chip_form(problem, channels // groups, standardize_on_chip), str(question)
