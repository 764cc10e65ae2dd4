"""``python -m normzoo_bench.pre_norm``: a forward pass of a GPT with LayerNorm, and of its exact rewrites.

The table goes to stdout. Exit codes: 0 fine, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from normzoo import to_pre_crms_norm, to_pre_rms_norm
from normzoo.terminal import say, table

from . import timing
from .environment import environment
from .experiments.characters import CHARACTERS, CharacterModel
from .quiet import quiet
from .tables import spread

REWRITES: dict[str, Callable[..., nn.Module]] = {
    "Pre-RMSNorm": to_pre_rms_norm,
    "Pre-CRMSNorm, truncated": partial(to_pre_crms_norm, basis="truncate"),
    "Pre-CRMSNorm, orthonormal": partial(to_pre_crms_norm, basis="orthonormal"),
}

SIZES = ((256, 4, 8, 128), (768, 4, 2, 256))
"""Width, blocks, samples and tokens of each."""


def gpt(width: int, blocks: int, tokens: int) -> nn.Module:
    """A Pre-LN transformer with random weights, as GPT-2 but for the vocabulary of ASCII."""
    torch.manual_seed(0)
    return CharacterModel(
        nn.LayerNorm, blocks, True, width=width, heads=width // 64, inner=4 * width, length=tokens
    ).eval()


def measure(sizes: Sequence[int], runs: int, compiled: bool = False) -> list[dict]:
    """Milliseconds of a forward pass, taken in turns: a row for Pre-LN and one for every rewrite."""
    width, blocks, samples, tokens = sizes
    model = gpt(width, blocks, tokens)
    x = torch.randint(CHARACTERS, (samples, tokens))
    models = {"Pre-LN": model} | {name: rewrite(copy.deepcopy(model), x) for name, rewrite in REWRITES.items()}
    calls = [torch.compile(each) if compiled else each for each in models.values()]
    with torch.no_grad():
        samples_of = timing.interleaved([partial(call, x) for call in calls], runs)
    rows = []
    for name, seconds in zip(models, samples_of, strict=True):
        about = {"model": name, "width": width, "blocks": blocks, "input": tuple(x.shape), "compiled": compiled}
        rows.append(
            about
            | {
                "ms": timing.summary([1e3 * s for s in seconds])._asdict(),
                "speedup": timing.ratio(samples_of[0], seconds)._asdict(),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.pre_norm",
        description="A forward pass of a GPT on the CPU with LayerNorm, and of its exact rewrites.",
    )
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it works")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    arguments = parser.parse_args(argv)
    sizes = ((64, 1, 1, 8),) if arguments.quick else SIZES
    try:
        with quiet():
            rows = [row for each in sizes for row in measure(each, arguments.runs, arguments.compile)]
    except KeyboardInterrupt:
        return 130
    found = environment("cpu")
    if arguments.json:
        print(json.dumps({"environment": found, "rows": rows}, indent=1))
        return 0
    cells = [
        (
            f"{row['width']} x {row['blocks']}, {row['input'][0]} x {row['input'][1]}",
            *(row["model"], spread(row["ms"]), spread(row["speedup"])),
        )
        for row in rows
    ]
    header = ("width x blocks, input", "model", "ms", "Pre-LN / it")
    table("A forward pass, float32: median (p20-p80)", header, cells)
    say(f"{found['threads']} threads of {found['cpu'] or 'an unknown CPU'}, torch {found['torch']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
