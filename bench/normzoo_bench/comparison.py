"""Two documents against each other: what got slower, less exact or larger."""

from __future__ import annotations

from .results import KEY

_GROWN_ERROR = 2.0
"""Inputs are the same in every run, so errors repeat on one machine; another may round otherwise."""


def differences(old: dict, new: dict, threshold: float = 0.05) -> dict:
    """What changed from the document `old` to `new`, both as `results.load` gives them.

    A row is slower if its median grew by more than `threshold` and its p20 is above the old p80, so that noise
    is not taken for a change; faster the other way round.
    """
    before, after = ({tuple(row[name] for name in KEY): row for row in d["rows"]} for d in (old, new))
    shared = [key for key in after if key in before]
    found: dict = {
        "threshold": threshold,
        "matched": len(shared),
        "only_old": len(before) - len(shared),
        "only_new": len(after) - len(shared),
        "environment": _unlike(old["environment"], new["environment"]),
        "slower": [],
        "faster": [],
        "less_exact": [],
        "larger": [],
    }
    for key in shared:
        a, b = before[key], after[key]
        name = " ".join(word for word in key if word not in ("contiguous", "any"))
        s, t = a["seconds"], b["seconds"]
        ratio = t["median"] / s["median"]
        changed = {
            "row": name,
            "seconds": [s["median"], t["median"]],
            "ratio": {"median": ratio, "p20": t["p20"] / s["p80"], "p80": t["p80"] / s["p20"]},
        }
        if ratio > 1 + threshold and t["p20"] > s["p80"]:
            found["slower"].append(changed)
        if ratio < 1 / (1 + threshold) and t["p80"] < s["p20"]:
            found["faster"].append(changed)
        found["less_exact"] += _grown(name, a["error"], b["error"], _GROWN_ERROR)
        memory = [{k: row.get(k) for k in ("saved_bytes", "peak_bytes")} for row in (a, b)]
        found["larger"] += _grown(name, *memory, 1 + threshold)
    return found


def regressed(found: dict) -> bool:
    return bool(found["slower"] or found["less_exact"] or found["larger"])


def _grown(name: str, old: dict, new: dict, factor: float) -> list[dict]:
    pairs = [(what, old.get(what), value) for what, value in new.items()]
    return [
        {"row": name, "what": what, "old": a, "new": b}
        for what, a, b in pairs
        if a is not None and b is not None and b > factor * a
    ]


def _unlike(old: dict, new: dict) -> dict:
    """Entries of the environments that differ, with both values."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}
