"""The demonstration in words and tables, while it runs."""

from __future__ import annotations

import sys

from torch import nn

from normzoo_bench.tables import spread

from ..conversion.report import shown
from ..terminal import say, table
from .measurements import ROUNDING
from .settings import Settings


def start(result: dict, model: nn.Module) -> None:
    env, text = result["environment"], result["text"]
    count = sum(p.numel() for p in model.parameters())
    _say(
        f"normzoo {env['normzoo']}, torch {env['torch']}, Python {env['python']}, "
        f"{env['threads']} threads on {env['cpus']} CPUs"
    )
    _say(
        f"A character GPT of {count / 1e3:.0f} thousand parameters learns from nine tenths of "
        f"{text['characters'] / 1e6:.1f} million characters of Python source ({text['files']} files); the last "
        "tenth is held out."
    )
    sys.stdout.flush()


def conversion(result: dict) -> None:
    found, text = result["conversion"], result["text"]
    print()
    _say(
        f"It needs {found['bits_before']:.3f} bits for a held-out character; the frequencies of characters "
        f"alone give {text['bits_by_frequency']:.3f}. It writes:"
    )
    print("\n" + "\n".join(f"    | {line[:70]}".rstrip() for line in result["sample"].splitlines()) + "\n")
    table("normzoo.convert(model); differences relative to the largest entry", ("what", "found"), facts(found))
    _say(f"Its proof: {found['proof']['sentence']}.")
    print()
    other = result["approximate"]
    _say(
        f'Had it been normzoo.convert(model, "rms_norm"): {other["proof"]["sentence"]}; '
        f"{other['bits_after']:.6f} bits per held-out character."
    )
    print()
    sys.stdout.flush()


def facts(found: dict) -> list[tuple[str, str]]:
    """What was found of a conversion, by name."""
    return [
        ("torch.nn.LayerNorm replaced by normzoo.LayerNorm", f"{found['replaced']} of {found['norms']}"),
        ("parameters that stayed the same objects", f"{found['same_parameters']} of {found['parameters']}"),
        ("bits per held-out character, before", f"{found['bits_before']:.6f}"),
        ("bits per held-out character, after", f"{found['bits_after']:.6f}"),
        ("largest difference of a logit", shown(found["logits_difference"])),
        ("largest difference of a gradient", shown(found["gradients_difference"])),
    ]


def end(result: dict, settings: Settings) -> None:
    rows_by_dtype: dict[str, list] = {}
    for entry in result["timings"]:
        spreads = (spread(entry[key]) for key in ("torch_ms", "normzoo_ms", "speedup"))
        rows_by_dtype.setdefault(entry["dtype"], []).append((entry["layer"], entry["pass"], *spreads))
    for dtype, rows in rows_by_dtype.items():
        title = f"{dtype}, {settings.rows} x {settings.columns}, milliseconds: median (p20-p80)"
        table(title, ("layer", "pass", "torch", "normzoo", "torch / normzoo"), rows)
    for sentence in verdict(result, settings):
        _say(sentence)


def verdict(result: dict, settings: Settings) -> list[str]:
    """What was shown, in a few sentences."""
    found = result["conversion"]
    if not result["passed"]:
        return [
            "FAILED: the conversion did not replace every norm, did not keep every parameter, or changed the "
            f"function by {found['difference']:.1e}, where rounding explains {ROUNDING:.0e}; see its table."
        ]
    exact = found["difference"] == 0
    how = "to the last bit" if exact else f"to {found['difference']:.0e} of the largest entry"
    speedups = [entry["speedup"]["median"] for entry in result["timings"] if entry["layer"] == "RMSNorm"]
    return [
        f"Shown: one call replaced {found['norms']} norms of a trained model by normzoo's, which hold its own "
        f"parameters; logits, loss and gradients stayed the same {how}.",
        "On a CPU normzoo.LayerNorm calls torch's own operator: the same numbers and the same speed are "
        f"expected of it. normzoo.RMSNorm runs at {min(speedups):.2f} to {max(speedups):.2f} times the speed "
        f"of torch's on this CPU, by the median of {settings.pairs} runs taken in turns.",
    ]


def _say(text: str) -> None:
    say(text, 78)
