"""The document that a run writes and `compare` reads: JSON with a version of its form."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normzoo.files import whole

FORM = 1
"""Rises when a reader of older documents would go wrong."""

KEY = ("layer", "contender", "workload", "dtype", "memory_format", "direction", "mode", "clock")
"""What tells a row from others."""

_NEEDED = {"seconds": dict, "error": dict}


class Unfit(Exception):
    """A contender that does not compute the function, or not cleanly; the message says how."""


def is_normzoo(contender: str) -> bool:
    """Whether normzoo is measured as users get it, in any form, compiled or not."""
    return contender.partition("-")[0] == "normzoo"


def is_ours(contender: str) -> bool:
    """Whether normzoo is measured, be it compiled or its eager body."""
    return contender == "reference" or is_normzoo(contender)


def conclude(
    document: Document, output: str | None, show: Callable[[Document], None], place: Callable[[dict], str]
) -> int:
    """Writes a document, shows it, and tells on stderr what failed and at which `place`; the exit code."""
    if output:
        document.write(output)
    show(document)
    for entry in document.failed:
        print(f"{place(entry)}: {entry['reason']}", file=sys.stderr)
    return 1 if document.failed else 0


@dataclass
class Document:
    environment: dict
    settings: dict
    copy_bandwidth: dict
    """Bytes a second, read and written: median, p20, p80, and ``after``, the median after all rows."""
    rows: list[dict] = field(default_factory=list)
    absent: list[dict] = field(default_factory=list)
    """Contenders that are not there, and why."""
    failed: list[dict] = field(default_factory=list)
    """Contenders that raised or computed something else; they have no times."""
    not_run: list[str] = field(default_factory=list)
    """Cases, or directions and contenders of cases, for which no time was left."""
    extra: dict = field(default_factory=dict)
    """What only some commands find out."""
    form: int = FORM

    def add_absent(self, layer: str, contender: str, reason: object) -> None:
        entry = {"layer": layer, "contender": contender, "reason": str(reason)}
        if entry not in self.absent:
            self.absent.append(entry)

    def add_failed(self, case: Any, contender: str, error: Exception, direction: str = "") -> None:
        lines = str(error).strip().splitlines() or [""]
        reason = lines[0] if isinstance(error, Unfit) else f"{type(error).__name__}: {lines[0]}"
        self.failed.append({**case.key, "contender": contender, "direction": direction, "reason": reason})

    @property
    def ours_failed(self) -> bool:
        return any(is_ours(entry["contender"]) or entry["contender"] == "all" for entry in self.failed)

    def write(self, path: str | Path) -> None:
        """Writes the whole document or, when something goes wrong, leaves the old file as it is."""
        with whole(Path(path)) as part:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def demand_writable(path: str | Path) -> None:
    """Raises ValueError where no document can be written to `path`, before anything is measured."""
    folder = Path(path).parent
    if Path(path).is_dir():
        raise ValueError(f"--output is {path}, which is a folder; name a file")
    if not folder.is_dir():
        raise ValueError(f"--output is {path}, but there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output is {path}, but {folder} may not be written to; name another place")


def load(path: str | Path) -> dict:
    """A document as it was written.

    Raises:
        ValueError: the file cannot be read, or is not such a document.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; `normzoo bench --output` writes one") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; it must come from `normzoo bench --output`") from error
    if not isinstance(document, dict) or "form" not in document:
        raise ValueError(f"{path} has no key 'form'; it must come from `normzoo bench --output`")
    if document["form"] != FORM:
        raise ValueError(f"{path} has form {document['form']}, this version reads {FORM}; measure again")
    for name, kind in (("environment", dict), ("rows", list)):
        if not isinstance(document.get(name), kind):
            raise ValueError(f"{path}: {name!r} is missing or no {kind.__name__}; measure again")
    for i, row in enumerate(document["rows"]):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {i} is no dict; measure again")
        missing = [name for name in KEY if name not in row]
        missing += [name for name, kind in _NEEDED.items() if not isinstance(row.get(name), kind)]
        missing += [name for name in ("median", "p20", "p80") if name not in row.get("seconds", {})]
        if missing:
            raise ValueError(f"{path}: row {i} has no {', '.join(missing)}; measure again")
    return document
