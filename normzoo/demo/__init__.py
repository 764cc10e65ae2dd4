"""The demonstration: train a small language model, convert and rewrite it, show that nothing changed, time it.

A second part puts alpha-BN over a small CNN, which then reads corrupted images better.

Everything but the timings repeats exactly from run to run of one machine and one Python.
"""

from __future__ import annotations

from pathlib import Path

import torch

from normzoo_bench.environment import environment

from . import images, page, printed
from .language_model import CharacterGPT, read_text, train, write
from .measurements import approximate, compare, rewrite, time_rows
from .settings import QUICK, Settings


def run(quick: bool = False, quiet: bool = False, report: Path | None = None) -> dict:
    """Runs the demonstration and returns what it found; prints it too, unless `quiet`.

    ``result["passed"]`` tells whether the converted and the rewritten model compute what the original did, and
    whether alpha-BN keeps and gains what it should. Where `report` is given, the result is written there as a
    page of HTML.
    """
    settings = QUICK if quick else Settings()
    result: dict = {"environment": environment()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        text, held_out, result["text"] = read_text(settings.megabytes, settings.seed)
        model = CharacterGPT(settings)
        if not quiet:
            printed.start(result, model)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["curve"] = train(model, text, settings)
        result["sample"] = write(model, "\n\ndef ", settings.characters, settings.seed).strip("\n")
        result["approximate"] = approximate(model, held_out, settings.held_out_windows)
        result["conversion"] = compare(model, held_out, settings.held_out_windows)
        result["rewrite"] = rewrite(model, held_out, settings)
        if not quiet:
            printed.conversion(result)
            printed.rewrite(result)
        result["images"] = images.study(settings)
        if not quiet:
            printed.images(result)
        result["timings"] = time_rows(settings)
        parts = (result[part] for part in ("conversion", "rewrite", "images"))
        result["passed"] = all(part["passed"] for part in parts if part)
    if not quiet:
        printed.end(result, settings)
    if report is not None:
        page.write(report, result, settings)
        if not quiet:
            print(f"The report, with curves and tables, is {report}.")
    return result
