"""Two documents against each other: what got slower, less exact or larger, and what works no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import timing
from .cases import DTYPES
from .results import KEY, is_ours

_GROWN_ERROR = 2.0
"""Inputs are the same in every run, so errors repeat on one machine; another may round otherwise."""
_FEWEST = 5
"""Rows of torch that tell what the machine does."""


def differences(old: dict, new: dict, threshold: float = 0.05) -> dict:
    """What changed for normzoo from the document `old` to `new`, both as `results.load` gives them.

    Machines drift, and the other contenders, which took turns with normzoo, tell by how much. So times are
    divided by the factor by which torch's changed, the ``drift``, unless the versions of torch differ or it has
    few rows. A row is slower if after that its median grew by more than `threshold` and the ranges of its times
    (p20 to p80) lie apart, and if a second witness says the same: its speedup over the baseline or, where it
    has none, its times as they are. Faster is the other way round.
    """
    before, after = ({tuple(row[name] for name in KEY): row for row in d["rows"]} for d in (old, new))
    shared = [key for key in after if key in before]
    pairs = [(before[key], after[key]) for key in shared]
    environment = _unlike(old["environment"], new["environment"])
    others = _others(pairs)
    torchs = others.get("torch", {"rows": 0})
    drift = torchs["median"] if torchs["rows"] >= _FEWEST and "torch" not in environment else None
    found: dict = {
        "threshold": threshold,
        "matched": len(shared),
        "only_old": len(before) - len(shared),
        "only_new": len(after) - len(shared),
        "environment": environment,
        "others": others,
        "drift": drift,
        "slower": [],
        "faster": [],
        "less_exact": [],
        "larger": [],
        "failed": _fail_now(old, new),
    }
    for key, (a, b) in zip(shared, pairs, strict=True):
        if not is_ours(a["contender"]):
            continue
        name = " ".join(word for word in key if word not in ("contiguous", "any"))
        ratio = _grown_by(b["seconds"], a["seconds"], drift or 1.0)
        baseline = a.get("baseline")
        relative = baseline not in (None, a["contender"]) and baseline == b.get("baseline")
        second = (a["speedup"], b["speedup"]) if relative else (b["seconds"], a["seconds"])
        judges = [ratio, _grown_by(*second)]
        changed = {
            "row": name,
            "seconds": [a["seconds"]["median"], b["seconds"]["median"]],
            "ratio": ratio,
            "baseline": baseline if relative else None,
            "speedup": [a["speedup"]["median"], b["speedup"]["median"]] if relative else None,
        }
        if min(r["median"] for r in judges) > 1 + threshold and min(r["p20"] for r in judges) > 1:
            found["slower"].append(changed)
        if max(r["median"] for r in judges) < 1 / (1 + threshold) and max(r["p80"] for r in judges) < 1:
            found["faster"].append(changed)
        found["less_exact"] += _larger(name, a["error"], b["error"], _GROWN_ERROR, _rounding(b["dtype"]))
        memory = [{k: row.get(k) for k in ("saved_bytes", "peak_bytes")} for row in (a, b)]
        found["larger"] += _larger(name, *memory, 1 + threshold)
    return found


def regressed(found: dict) -> bool:
    return any(found[name] for name in ("slower", "less_exact", "larger", "failed"))


def _grown_by(over: dict, under: dict, drift: float = 1.0) -> dict:
    """The ratio of two summaries, from the least that their ranges allow to the most."""
    return {
        "median": over["median"] / under["median"] / drift,
        "p20": over["p20"] / under["p80"] / drift,
        "p80": over["p80"] / under["p20"] / drift,
    }


def _others(pairs: Sequence[tuple[dict, dict]]) -> dict[str, dict]:
    """By what factor the times of each other contender changed."""
    ratios: dict[str, list[float]] = {}
    for a, b in pairs:
        if not is_ours(a["contender"]):
            ratios.setdefault(a["contender"], []).append(b["seconds"]["median"] / a["seconds"]["median"])
    # Of a single row the range is that row.
    return {name: {"rows": len(r), **timing.summary(r * 2)._asdict()} for name, r in ratios.items()}


def _fail_now(old: dict, new: dict) -> list[dict]:
    """What failed in the new document and not in the old one, of normzoo: it has no times to be compared."""
    kept = [name for name in KEY if name != "clock"]

    def failures(document: dict) -> dict[tuple, str]:
        ours = [entry for entry in document.get("failed", []) if is_ours(entry["contender"])]
        return {tuple(entry[name] for name in kept): entry["reason"] for entry in ours}

    before = failures(old)
    return [
        {"row": " ".join(word for word in key if word not in ("", "contiguous", "any")), "reason": reason}
        for key, reason in failures(new).items()
        if key not in before
    ]


def _larger(name: str, old: dict, new: dict, factor: float, least: float = 0.0) -> list[dict]:
    """What grew by more than `factor`, and to more than `least`."""
    pairs = [(what, old.get(what), value) for what, value in new.items()]
    return [
        {"row": name, "what": what, "old": a, "new": b}
        for what, a, b in pairs
        if a is not None and b is not None and b > max(factor * a, least)
    ]


def _rounding(dtype: str) -> float:
    return torch.finfo(DTYPES[dtype][0]).eps if dtype in DTYPES else 0.0


def _unlike(old: dict, new: dict) -> dict:
    """Entries of the environments that differ, with both values."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}
