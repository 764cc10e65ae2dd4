"""How the document of the static gate decides about a goal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fnmatch import fnmatch

from .documents import Documents, Source
from .judging import ABSENT, MET, MISSED, UNDECIDED, Finding, Judge, few, nothing, number


def gates() -> Judge:
    """What falls in the static gate, beside what is excused with a reason."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None:
            return nothing(documents, "cpu")
        failures = source.entries("failures")
        fallen = [f for f in failures if not f.get("exception")]
        names = [f"{f['case']} {f['target']}: {f['measure']} {f['measured']:g}, {f['bound']}" for f in fallen]
        text = f"{len(fallen)} fall, {len(failures) - len(fallen)} are excused with a reason"
        return _found(source, text, names)

    return judge


def unbeaten() -> Judge:
    """Figures in which a kernel of a peer is better than ours, and why that is so."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None or "beaten" not in source.document:
            return nothing(documents, "cpu")
        beaten = source.entries("beaten")
        names = [f"{b['call']}: {b['measure']} of {b['peer']}" for b in beaten if not b.get("reason")]
        calls = [call for call in source.entries("calls") if call.get("peers")]
        text = f"{len(names)} without, {len(beaten) - len(names)} with one, in {len(calls)} calls"
        return _found(source, text, names)

    return judge


def compiled(cases: str = "") -> Judge:
    """Whether everything was compiled: all that the forms can choose or, with a pattern, some cases."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        if source is None:
            return nothing(documents, "cpu")
        launches = [one for one in source.entries("launches") if fnmatch(str(one.get("case")), cases or "*")]
        fallen = [f for f in source.entries("failures") if fnmatch(str(f["case"]), cases or "*")]
        names = [f"{f['case']} {f['target']}: {f['measure']}" for f in fallen if not f.get("exception")]
        text = f"{len(launches)} launches of cases"
        if not cases:
            swept = sum(one.get("launches", 0) for one in source.entries("sweep"))
            text += f", {swept} of the sweep over configurations"
        if not _part(source):
            names += ["no such case"] * (not launches)
            if not cases and "--all" not in source.command.split():
                names.append("only a sample of the configurations, without `--all`")
        return _found(source, text, names)

    return judge


def _found(source: Source, text: str, missed: Sequence[str]) -> Finding:
    """Of a run over some cases or targets only what falls is told."""
    if _part(source) and not missed:
        return Finding(UNDECIDED, f"{text}; a part of the gate, by `--only` or `--targets`", (source,))
    return Finding(MISSED if missed else MET, text, (source,), few(missed))


def _part(source: Source) -> bool:
    # As short as the command takes them.
    return any(word.startswith(("--on", "--t")) for word in source.command.split())


def predicted_beside_measured() -> Judge:
    """Whether the static gate has set what it predicts beside what a GPU took (`static --measured`)."""

    def judge(documents: Documents) -> Finding:
        source = documents.find("static")
        rows = source.entries("measured") if source else []
        if source is None or not rows:
            found = nothing(documents, "cuda")
            if found.verdict != ABSENT:
                return found
            return Finding(ABSENT, "a GPU ran, and its document was not given to `static --measured`")
        values = sorted(row["measured"] / row["predicted"] for row in rows)
        ends = f"median {number(statistics.median(values))}, {number(values[0])} to {number(values[-1])}"
        text = f"{len(rows)} rows in the table of the page; measured over predicted: {ends}"
        return Finding(MET, text, (source,))

    return judge
