"""Results and comparisons for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from normzoo.terminal import say, table

from .workloads import SCALINGS

_LEGEND = """\
time     median of the samples; of models and where there is no ratio with the range (p20-p80)
x ...    how many times as fast as that one, round by round: median (p20-p80)
GB/s     the fewest bytes that the call can move, over its time
% copy   that, of the speed of a copy; (warm): all buffers fit into the cache
error    the largest, over the largest entry of the result in float64
"""
_CHANGED = 0.1
"""Of the speed of a copy, relative: so much is more than noise."""


def show(document: dict) -> None:
    """Prints the rows of a document in tables, then a summary and what is missing and why."""
    _show_machine(document)
    if document["rows"]:
        print(_LEGEND)
    layers = [row for row in document["rows"] if not _of_model(row)]
    for rows in _groups(layers):
        (_show_sweep if _sweep(rows[0]) else _show_group)(rows)
    _show_models([row for row in document["rows"] if _of_model(row)])
    _show_summary(layers)
    _show_missing(document)


def _show_machine(document: dict) -> None:
    before = document["copy_bandwidth"]["median"] / 1e9
    after = document["copy_bandwidth"].get("after", before * 1e9) / 1e9
    print(f"A copy moves {before:.3g} GB/s, read and written; {after:.3g} GB/s after the measurement.")
    if abs(after / before - 1) > _CHANGED:
        print("The speed of the machine changed: trust the ratios, not the times and % copy.")
    load, cpus = document["settings"]["load"], document["environment"]["cpus"]
    if load is not None and load > 0.5 * cpus:
        say(
            f"The machine was busy before: load {load:.1f} on {cpus} CPUs. Wall times suffer from it,\n"
            "less so with OMP_NUM_THREADS at the number of idle CPUs."
        )
    print()


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
    baseline = rows[0]["baseline"]
    header = ("workload", "contender", "time", f"x {baseline}" if baseline else "", "GB/s", "% copy", "error")
    cells, previous = [], ""
    for row in rows:
        place = _place(row)
        cells.append(
            (
                place if place != previous else "",
                row["contender"] + {"eager": " (eager)"}.get(row["runs"] if row["clock"] != "wall" else "", ""),
                # Without a ratio, the range of the time tells how sure it is.
                short(row["seconds"]["median"] * scale) if baseline else spread(row["seconds"], scale),
                _ratio(row),
                *_bandwidth(row),
                f"{max(row['error'].values()):.0e}",
            )
        )
        previous = place
    table(_title(rows[0], unit), header, cells)


def _of_model(row: dict) -> bool:
    return row["direction"] in ("step", "inference")


def _show_models(rows: Sequence[dict]) -> None:
    """A table for each model and direction."""
    tables: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "dtype", "direction", "mode", "clock"))
        tables.setdefault((_place(row), *key), []).append(row)
    for (place, *_), lines in tables.items():
        unit, scale = _unit(lines)
        header = ("contender", "function", "time", "x torch", "x torch.compile", "peak MB", "saved MB", "error")
        cells = [
            (
                row["contender"],
                {True: "same", False: "another"}.get(row.get("same"), ""),
                spread(row["seconds"], scale),
                *(_ratio(row) if row["baseline"] == name else "" for name in ("torch", "torch.compile")),
                *(
                    "" if row.get(name) is None else short(row[name] / 1e6)
                    for name in ("peak_bytes", "saved_bytes")
                ),
                f"{max(row['error'].values()):.0e}",
            )
            for row in lines
        ]
        table(f"{place} with {_title(lines[0], unit)}", header, cells)


def _ratio(row: dict) -> str:
    if not row["speedup"]:
        return ""
    return "1" if row["contender"] == row["baseline"] else spread(row["speedup"])


def _bandwidth(row: dict) -> tuple[str, str]:
    """GB/s and per cent of the copy; nothing for what does more than move bytes."""
    if row["gigabytes_a_second"] is None:
        return "", ""
    warm = "" if row.get("cold", True) else " (warm)"
    return short(row["gigabytes_a_second"]), f"{100 * row['share_of_copy']:.0f}{warm}"


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


def _show_summary(rows: Sequence[dict]) -> None:
    """How many times as fast normzoo is as each other, over all workloads: what a reader wants first."""
    places: dict[tuple, dict[tuple, dict[str, dict]]] = {}
    for row in rows:
        group = tuple(row[name] for name in ("layer", "dtype", "direction", "mode", "clock"))
        places.setdefault(group, {}).setdefault(_place(row), {})[row["contender"]] = row
    others = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != "normzoo"]
    clocks = {row["clock"] for row in rows}
    cells, judged = [], []
    for (layer, dtype, direction, mode, clock), by_place in places.items():
        both = [by_name for by_name in by_place.values() if "normzoo" in by_name and len(by_name) > 1]
        if not both:
            continue
        line = [
            _range([_times_as_fast(by_name, name) for by_name in both if name in by_name]) for name in others
        ]
        what = direction if mode == "any" else f"{direction} {mode}"
        cells.append((layer, dtype, what, clock if len(clocks) > 1 else "", str(len(both)), *line))
        judged += [by["normzoo"]["speedup"] for by in both if by["normzoo"]["baseline"] == "torch"]
    if cells:
        columns = [f"x {name}" for name in others]
        title = "normzoo, how many times as fast: geometric mean over workloads (least-most)"
        table(title, ("layer", "dtype", "direction", "clock", "workloads", *columns), cells, columns)
    if judged:
        faster, slower = (sum(s["p20"] > 1 for s in judged), sum(s["p80"] < 1 for s in judged))
        say(
            f"Against torch, of {len(judged)} rows: faster in {faster}, slower in {slower}, and the range "
            f"(p20-p80) spans 1 in {len(judged) - faster - slower}."
        )
        print()


def _times_as_fast(by_name: dict[str, dict], other: str) -> float:
    ours, theirs = by_name["normzoo"], by_name[other]
    if ours["speedup"] and other == ours["baseline"]:
        return ours["speedup"]["median"]
    return theirs["seconds"]["median"] / ours["seconds"]["median"]


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    mean = short(statistics.geometric_mean(ratios))
    return f"{mean} ({short(min(ratios))}-{short(max(ratios))})" if len(ratios) > 1 else mean


def _show_missing(document: dict) -> None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in document["absent"]:
        reasons.setdefault((entry["contender"], entry["reason"]), []).append(entry["layer"])
    for (contender, reason), layers in reasons.items():
        say(f"No {contender} for {', '.join(layers)}: {reason}.")
    for entry in document["failed"]:
        where = " ".join(str(entry[k]) for k in ("layer", "workload", "dtype", "direction") if entry[k])
        print(f"FAILED {entry['contender']}, {where}: {entry['reason']}")
    if left := document["not_run"]:
        say(f"No time was left for {len(left)}, among them {'; '.join(left[:3])}.")


def show_comparison(found: dict) -> None:
    """Prints what `differences` found."""
    if found["environment"]:
        cells = [(name, str(old), str(new)) for name, (old, new) in found["environment"].items()]
        table("The machines or versions differ", ("what", "old", "new"), cells, ("old", "new"))
    for name, summary in found["others"].items():
        print(f"{name} took {spread(summary)} times as long as before, in {summary['rows']} rows.")
    if found["drift"]:
        print(f"Of that, {short(found['drift'])} is taken for the machine, and out of the ratios below.")
    print()
    for name in ("slower", "faster"):
        if cells := [_changed(entry) for entry in found[name]]:
            title = f"{name.capitalize()}: new / old (range), and the speedup over the baseline"
            table(title, ("row", "old", "new", "ratio", "speedup"), cells, ("row",))
    for name in ("less_exact", "larger"):
        form = {"less_exact": ".1e", "larger": ".0f"}[name]
        cells = [(e["row"], e["what"], f"{e['old']:{form}}", f"{e['new']:{form}}") for e in found[name]]
        if cells:
            title = {"less_exact": "Less exact", "larger": "More memory, in bytes"}[name]
            table(title, ("row", "what", "old", "new"), cells, ("row",))
    for entry in found["failed"]:
        print(f"FAILED now: {entry['row']}: {entry['reason']}")
    say(
        f"{found['matched']} rows compared. Of normzoo: {len(found['slower'])} slower, "
        f"{len(found['faster'])} faster, {len(found['less_exact'])} less exact, "
        f"{len(found['larger'])} with more memory, {len(found['failed'])} failed. "
        f"Only in the old: {found['only_old']}, only in the new: {found['only_new']}."
    )


def _changed(entry: dict) -> tuple[str, ...]:
    old, new = entry["seconds"]
    unit, scale = ("ms", 1e3) if min(old, new) >= 1e-3 else ("us", 1e6)
    times = [f"{short(scale * seconds)} {unit}" for seconds in (old, new)]
    speedup = " -> ".join(map(short, entry["speedup"])) + f" x {entry['baseline']}" if entry["speedup"] else ""
    return entry["row"], *times, spread(entry["ratio"]), speedup


def spread(summary: dict, scale: float = 1.0) -> str:
    """``median (p20-p80)``."""
    median, p20, p80 = (short(scale * summary[name]) for name in ("median", "p20", "p80"))
    return f"{median} ({p20}-{p80})"


def short(number: float) -> str:
    """Three digits, fewer below 0.1, so that columns stay narrow."""
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.0995 else 3}f}"
