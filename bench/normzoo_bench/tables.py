"""Results and comparisons for people."""

from __future__ import annotations

from collections.abc import Sequence

from normzoo.terminal import table

from .workloads import SCALINGS


def show(document: dict) -> None:
    """Prints the rows of a document in tables, and below them what is missing and why."""
    bandwidth = document["copy_bandwidth"]
    print(f"A copy moves {bandwidth['median'] / 1e9:.3g} GB/s, read and written.")
    load, cpus = document["settings"]["load"], document["environment"]["cpus"]
    if load is not None and load > 0.5 * cpus:
        print(f"The machine was busy before: load {load:.1f} on {cpus} CPUs. Times on the wall suffer from it.")
    print()
    for rows in _groups(document["rows"]):
        (_show_sweep if _sweep(rows[0]) else _show_group)(rows)
    _show_missing(document)


def _groups(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows that share a table, in order of appearance; a sweep has one to itself."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "dtype", "direction", "mode", "clock", "baseline"))
        found.setdefault((*key, _sweep(row)), []).append(row)
    return list(found.values())


def _sweep(row: dict) -> str:
    """What is swept in the row's workload, or nothing."""
    use = row["workload"].partition("-")[0]
    return use if use in SCALINGS else ""


def _title(row: dict, unit: str) -> str:
    mode = "" if row["mode"] == "any" else f" in {row['mode']}"
    return f"{row['layer']}, {row['dtype']}, {row['direction']}{mode}: {row['clock']} time in {unit}"


def _unit(rows: Sequence[dict]) -> tuple[str, float]:
    return ("ms", 1e3) if min(row["seconds"]["median"] for row in rows) >= 1e-3 else ("us", 1e6)


def _show_group(rows: list[dict]) -> None:
    unit, scale = _unit(rows)
    header = ("workload", "contender", "time", f"x {rows[0]['baseline'] or 'torch'}", "GB/s", "% copy", "error")
    cells, previous = [], ""
    for row in rows:
        place = _place(row)
        cells.append(
            (
                place if place != previous else "",
                row["contender"] + {"eager": " (eager)"}.get(row["runs"] if row["clock"] != "wall" else "", ""),
                spread(row["seconds"], scale),
                short(row["speedup"]["median"]) if row["speedup"] else "-",
                short(row["gigabytes_a_second"]),
                f"{100 * row['share_of_copy']:.0f}",
                f"{max(row['error'].values()):.0e}",
            )
        )
        previous = place
    table(f"{_title(rows[0], unit)}, median (p20-p80)", header, cells)


def _place(row: dict) -> str:
    layout = {"contiguous": "", "channels_last": " last", "padded": " pad"}
    return row["workload"] + layout.get(row["memory_format"], f" {row['memory_format']}")


def _show_sweep(rows: list[dict]) -> None:
    unit, scale = _unit(rows)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        text = f"{short(row['seconds']['median'] * scale)} ({short(row['gigabytes_a_second'])})"
        lines.setdefault(_place(row).partition("-")[2], {})[row["contender"]] = text
    cells = [(place, *(line.get(name, "-") for name in names)) for place, line in lines.items()]
    table(f"{_title(rows[0], unit)} (GB/s) against {_sweep(rows[0])}", ("shape", *names), cells)


def _show_missing(document: dict) -> None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in document["absent"]:
        reasons.setdefault((entry["contender"], entry["reason"]), []).append(entry["layer"])
    for (contender, reason), layers in reasons.items():
        print(f"No {contender} for {', '.join(layers)}: {reason}.")
    for entry in document["failed"]:
        where = " ".join(str(entry[k]) for k in ("layer", "workload", "dtype", "direction") if entry[k])
        print(f"FAILED {entry['contender']}, {where}: {entry['reason']}")
    if left := document["not_run"]:
        print(f"Not run: {len(left)}, among them {'; '.join(left[:3])}.")


def show_comparison(found: dict) -> None:
    """Prints what `differences` found."""
    if found["environment"]:
        cells = [(name, str(old), str(new)) for name, (old, new) in found["environment"].items()]
        table("The machines or versions differ", ("what", "old", "new"), cells, ("old", "new"))
    for name in ("slower", "faster"):
        cells = [
            (entry["row"], *(f"{short(1e6 * s)} us" for s in entry["seconds"]), spread(entry["ratio"]))
            for entry in found[name]
        ]
        if cells:
            table(f"{name.capitalize()}: new / old (range)", ("row", "old", "new", "ratio"), cells, ("row",))
    for name in ("less_exact", "larger"):
        cells = [(e["row"], e["what"], f"{e['old']:.3g}", f"{e['new']:.3g}") for e in found[name]]
        if cells:
            title = {"less_exact": "Less exact", "larger": "More memory, in bytes"}[name]
            table(title, ("row", "what", "old", "new"), cells, ("row",))
    print(
        f"{found['matched']} rows compared: {len(found['slower'])} slower, {len(found['faster'])} faster, "
        f"{len(found['less_exact'])} less exact, {len(found['larger'])} with more memory. "
        f"Only in the old: {found['only_old']}, only in the new: {found['only_new']}."
    )


def spread(summary: dict, scale: float = 1.0) -> str:
    """``median (p20-p80)``."""
    median, p20, p80 = (short(scale * summary[name]) for name in ("median", "p20", "p80"))
    return f"{median} ({p20}-{p80})"


def short(number: float) -> str:
    """Three digits, fewer below 0.1, so that columns stay narrow."""
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.0995 else 3}f}"
