"""The demonstration in words and tables, while it runs."""

from __future__ import annotations

import sys

from torch import nn

from normzoo_bench.tables import spread

from ..conversion.report import shown
from ..terminal import say, table
from .measurements import ROUNDING
from .settings import QUICK, Settings

MISSING = "The second part, on images of digits, needs scikit-learn: pip install scikit-learn."

_WIDEST = 2
"""Spread of a ratio, 80th percentile by 20th, above which its median says nothing."""


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


def rewrite(result: dict) -> None:
    found = result["rewrite"]
    table(
        "normzoo.to_pre_rms_norm(model); differences relative to the largest entry",
        ("what", "found"),
        rewritten(found),
    )
    _say(f"Its proof: {found['proof']['sentence']}.")
    print()
    sys.stdout.flush()


def rewritten(found: dict) -> list[tuple[str, str]]:
    """What was found of the rewrite, by name."""
    return [
        ("LayerNorms that became RMSNorms", f"{found['replaced']} of {found['norms']}"),
        ("weights and biases centered for that", str(found["centered"])),
        ("largest difference of a logit in float32", shown(found["difference"])),
        ("bits per held-out character, before", f"{found['bits_before']:.6f}"),
        ("bits per held-out character, after", f"{found['bits_after']:.6f}"),
        ("forward pass, Pre-LN, ms", spread(found["pre_ln_ms"])),
        ("forward pass, Pre-RMSNorm, ms", spread(found["pre_rms_norm_ms"])),
        ("Pre-LN / Pre-RMSNorm", spread(found["speedup"])),
    ]


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


def images(result: dict) -> None:
    found = result["images"]
    if found is None:
        _say(MISSING)
        print()
        return
    _say(
        f"A CNN with {found['norms']} batch norms learns {found['learnt']} handwritten digits; "
        f"{found['tested']} others come corrupted, in batches of {found['batch']}."
    )
    print()
    table("adapt.configure(model, source_weight=...); per cent right", *accuracies(found))
    sys.stdout.flush()


def accuracies(found: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What is right by source weight: a header and rows."""
    *corrupted, clean = found["right"]
    columns = [found["right"][name] for name in corrupted] + [found["means"], found["right"][clean]]
    rows = zip(found["source_weights"], *columns, strict=True)
    header = ("source weight", *corrupted, "mean of these", clean)
    return header, [(f"{weight:g}", *(f"{value:.1f}" for value in values)) for weight, *values in rows]


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
    return (
        _of_conversion(result, settings)
        + _of_rewrite(result["rewrite"], settings)
        + _of_images(result["images"])
    )


def _of_conversion(result: dict, settings: Settings) -> list[str]:
    found = result["conversion"]
    if not found["passed"]:
        return [
            "FAILED: the conversion did not replace every norm, did not keep every parameter, or changed the "
            f"function by {found['difference']:.1e}, where rounding explains {ROUNDING:.0e}; see its table."
        ]
    speedups = [entry["speedup"]["median"] for entry in result["timings"] if entry["layer"] == "RMSNorm"]
    return [
        f"Shown: one call replaced {found['norms']} norms of a trained model by normzoo's, which hold its own "
        f"parameters; logits, loss and gradients stayed the same {_how_far(found)}.",
        "On a CPU normzoo.LayerNorm calls torch's own operator: the same numbers and the same speed are "
        f"expected of it. normzoo.RMSNorm runs at {min(speedups):.2f} to {max(speedups):.2f} times the speed "
        f"of torch's on this CPU, by the median of {settings.pairs} runs taken in turns.",
    ]


def _of_rewrite(found: dict, settings: Settings) -> list[str]:
    if not found["passed"]:
        return [
            f"FAILED: normzoo.to_pre_rms_norm rewrote {found['replaced']} of {found['norms']} LayerNorms and "
            f"changed the logits by {found['difference']:.1e}, where rounding explains {ROUNDING:.0e}; see its "
            "proof."
        ]
    kept = (
        f"Shown: one call, normzoo.to_pre_rms_norm(model), made RMSNorms of the {found['norms']} LayerNorms of "
        f"the trained model, and logits stayed the same {_how_far(found)}; three probes prove it in float64."
    )
    speedup = found["speedup"]
    if settings == QUICK or speedup["p80"] > _WIDEST * speedup["p20"]:
        return [kept]
    same = ", which is no difference beyond the spread" if speedup["p20"] <= 1 <= speedup["p80"] else ""
    return [
        f"{kept} A forward pass of {found['shape'][0]} x {found['shape'][1]} characters ran at "
        f"{speedup['median']:.2f} ({speedup['p20']:.2f}-{speedup['p80']:.2f}) times the speed of before on "
        f"this CPU{same}.",
    ]


def _of_images(found: dict | None) -> list[str]:
    if found is None:
        return [MISSING]
    source, best, batch = (f"{found['means'][i]:.1f}%" for i in found["shown"])
    weight = f"{found['source_weights'][found['shown'][1]]:g}"
    norms, how_many = found["norms"], len(found["means"]) - 2
    if not found["passed"]:
        return [
            f"FAILED: adapt.configure replaced {found['replaced']} of {norms} batch norms; source weight 1 "
            f"changed the logits by {found['difference']:.1e}, where rounding explains {ROUNDING:.0e}; of the "
            f"corrupted digits {source} were read right with source weight 1, {best} with {weight}, the best "
            f"between, and {batch} with 0."
        ]
    return [
        f"Shown: one call, adapt.configure(model, source_weight={weight}), put alpha-BN in place of the "
        f"{norms} batch norms of a trained CNN. It then read {best} of the corrupted digits right, in batches "
        f"of {found['batch']}; with stored statistics alone (source weight 1) {source}, with those of the "
        f"batch alone (0) {batch}. Source weight 1 kept the logits as they were {_how_far(found)}.",
        f"The {weight} is the best of {how_many} values by these very images, which flatters it.",
    ]


def _how_far(found: dict) -> str:
    exact = found["difference"] == 0
    return "to the last bit" if exact else f"to {found['difference']:.0e} of the largest entry"


def _say(text: str) -> None:
    say(text, 78)
