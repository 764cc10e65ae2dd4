"""The documents of a folder, whatever command wrote them, as rows that know where they come from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results import load
from ..workloads import SCALINGS

Row = Mapping[str, Any]

COMMANDS = {
    "cpu-layers": "python -m normzoo_bench.cpu --output bench/results",
    "cpu-scaling": "python -m normzoo_bench.cpu --output bench/results",
    "cpu-models": "python -m normzoo_bench.models --device cpu --contender torch normzoo torch.compile "
    "normzoo-compiled --output bench/results/cpu-models.json",
    "host": "python -m normzoo_bench.host --output bench/results/host.json",
    "launches": "python -m normzoo_bench.launches --output bench/results/launches.json",
    "static": "python -m normzoo_bench.static --all --output bench/results/static.json",
    "gpu": "python -m normzoo_bench.gpu --output bench/results/gpu",
    "measured": "python -m normzoo_bench.static --all --output bench/results/static.json --measured "
    "bench/results/gpu/bench.json",
}
"""What writes each, where it is not there to say so itself."""


@dataclass(frozen=True)
class Source:
    """One document, without its rows."""

    name: str
    document: Mapping[str, Any]

    def entries(self, name: str) -> list[Mapping[str, Any]]:
        """A list of the document; empty where it has none of that name."""
        found = self.document.get(name)
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    @property
    def size(self) -> int:
        """Rows, or launches that were compiled."""
        return sum(len(self.entries(name)) for name in _LISTS)

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.document.get("environment") or {}

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.document.get("settings") or {}

    @property
    def command(self) -> str:
        """The command that wrote it, as it says or as its settings say; empty where neither does."""
        said = self.document.get("command") or self.settings.get("command") or ""
        words = list(said) if isinstance(said, list) else shlex.split(said)
        arguments = self.settings.get("arguments")
        if isinstance(arguments, Mapping):
            words = words or shlex.split(_PROGRAM["minutes" in arguments])
            of_bench = words == shlex.split(_PROGRAM[False])
            machine = {"device": self.device} if of_bench else {}
            words += _options(machine | dict(arguments), of_bench)
        return _without_places(words)

    @property
    def is_smoke(self) -> bool:
        """Whether its sizes are those of a try."""
        return "--size smoke" in self.command.replace("=", " ")

    @property
    def device(self) -> str:
        return str(self.environment.get("device", "cpu"))

    @property
    def place(self) -> str:
        """Machine, versions, commit and date, as a line below a plot."""
        known = self.environment
        machine = known.get("gpu") or known.get("cpu") or known.get("machine") or "machine not told"
        if not known.get("gpu") and known.get("threads"):
            machine += f", {_counted(known['threads'], 'thread')}"
        versions = [f"{name} {known[name]}" for name in ("torch", "triton") if known.get(name)]
        commit = str(known.get("commit") or "")[:10]
        changed = " and changes" if known.get("changed") else ""
        own = f"normzoo {known.get('normzoo', '?')}" + (f" at {commit}{changed}" if commit else "")
        return "; ".join(filter(None, (machine, ", ".join([own, *versions]), self.date)))

    @property
    def date(self) -> str:
        return str(self.settings.get("time") or self.document.get("time") or "")[:10]


@dataclass(frozen=True)
class Documents:
    """What a folder holds, by the paths of the files below it without their ending."""

    sources: tuple[Source, ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    """(name, why it is no document that this page knows)."""
    _rows: list[tuple[Source, Row]] = field(default_factory=list, repr=False)

    def find(self, name: str) -> Source | None:
        """The document called `name`."""
        return next((source for source in self.sources if source.name == name), None)

    def __iter__(self) -> Iterator[tuple[Source, Row]]:
        """Every timing, with its document."""
        return iter(self._rows)

    def rows(self, device: str, **wanted: Any) -> list[tuple[Source, Row]]:
        """The timings on a device whose entries are those `wanted`: a value, or one of several."""
        return [
            (source, row)
            for source, row in self._rows
            if source.device == device
            and all(
                row.get(k) in v if isinstance(v, (tuple, set)) else row.get(k) == v for k, v in wanted.items()
            )
        ]


def read(folder: Path) -> Documents:
    """All documents below `folder`; one that cannot be read is told in ``unread``, and the rest stands."""
    sources, unread = [], []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            document = _document(path)
        except ValueError as error:
            unread.append((name, str(error).replace(str(path), path.name)))
            continue
        if _rehearsed(document):
            unread.append((name, "a rehearsal on a CPU, whose times mean nothing"))
        else:
            sources.append(Source(name, document))
    timings = [(source, row) for source in sources for row in source.entries("rows") if _is_timing(row)]
    return Documents(tuple(sources), tuple(unread), timings)


_LISTS = ("rows", "launches")


def _document(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(document, dict) or not any(isinstance(document.get(name), list) for name in _LISTS):
        raise ValueError(f"has no list of {' or '.join(_LISTS)}")
    timings = document.get("rows")
    return load(path) if isinstance(timings, list) and any(map(_is_timing, timings)) else document


def _is_timing(row: Any) -> bool:
    return isinstance(row, dict) and "seconds" in row and "contender" in row


def _rehearsed(document: dict) -> bool:
    arguments = (document.get("settings") or {}).get("arguments")
    return isinstance(arguments, dict) and bool(arguments.get("rehearse"))


_PROGRAM = {False: "normzoo bench", True: "python -m normzoo_bench.gpu --output DIR"}
"""What writes documents that only tell the arguments, with and without minutes."""


def _options(arguments: Mapping[str, Any], of_bench: bool) -> list[str]:
    """What stands behind a program with these arguments; what was not given is None, False or empty.

    `normzoo bench` takes layers without a name, and lists with commas; other programs take lists word by word.
    """
    words = [*(arguments.get("layer") or ())] if of_bench else []
    for name, value in arguments.items():
        if (name == "layer" and of_bench) or value is None or value is False or value in ([], ()):
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += [",".join(map(str, value))] if of_bench else map(str, value)
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


def _without_places(words: Sequence[str]) -> str:
    """A command line whose paths say nothing about the machine."""
    return shlex.join(re.sub(r"(^|=)/\S*/", r"\1", str(word)) for word in words)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def is_sweep(row: Row) -> str:
    """What is swept in the row's workload, or nothing."""
    use = row["workload"].partition("-")[0]
    return use if use in SCALINGS else ""


def places(sources: Sequence[Source]) -> list[str]:
    """The machines, versions and dates of some documents, each once."""
    return list(dict.fromkeys(source.place for source in sources))
