"""What `normzoo convert` takes for arguments of layers, and says of them in its own words."""

import pytest

from normzoo import cli

OWN = """
import torch
from torch import nn

mixed = lambda: (nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8)), torch.randn(4, 8))
seen = lambda **given: print("given", given) or nn.LayerNorm(8)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line: (exit code, stdout, stderr)."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (cli.main(arguments), *capsys.readouterr())


def test_constants_of_python_for_what_makes_the_model(run):
    given = ["on=True", "off=False", "none=None", "json=true", "text=Truly"]
    _, _, err = run("inspect", "own.py:seen", *(f"--arg={pair}" for pair in given))
    assert "given {'on': True, 'off': False, 'none': None, 'json': True, 'text': 'Truly'}" in err


@pytest.mark.parametrize("value, wrong", [("False", ""), ("false", ""), ("no", "unbiased is 'no'; it must be")])
def test_constants_of_python_for_layers(run, value, wrong):
    alpha = ("--to", "alpha_batch_norm", "--types", "batch", "--option", f"unbiased={value}")
    code, out, err = run("convert", "own.py:mixed", "--dry-run", *alpha)
    assert (code, "1 converted" in out) == ((2, False) if wrong else (0, True)) and wrong in err


def test_a_default_that_is_given_counts(run):
    options = ("--option", "source_weight=0.9", "--option", "test_weight=0.5")
    code, _, err = run("convert", "own.py:mixed", "--dry-run", "--to", "alpha_batch_norm", *options)
    assert code == 2 and "test_weight and source_weight are given; each sets the weight" in err


def test_what_is_missing_is_named_as_an_option(run):
    code, out, err = run("convert", "own.py:mixed", "--dry-run", "--to", "adab2n")
    assert code == 2 and out == "" and "adab2n needs num_tasks; pass --option num_tasks=N" in err
    code, out, _ = run("convert", "own.py:mixed", "--dry-run", "--to", "0=adab2n", "--to", "1=same")
    assert code == 0 and "1 refused, 1 converted" in out
    assert "--option num_tasks=N" in " ".join(out.split()) and "pass num_tasks=" not in out


def test_no_word_of_optimizers(run):
    adab2n = ("--to", "0=adab2n", "--option", "num_tasks=2")
    code, out, _ = run("convert", "own.py:mixed", "--dry-run", *adab2n)
    assert code == 0 and "task_weight" in out and "optimizer" not in out
    assert "tensors: 5 kept, 0 converted, 2 new, 0 lost" in out
