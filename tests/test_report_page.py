"""The committed page about speed is what its command makes of the committed documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from normzoo_bench.report.__main__ import made
from normzoo_bench.report.documents import read
from normzoo_bench.report.table import Line

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "performance"
AGAIN = "run `python -m normzoo_bench.report` and look at the page"


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, bytes], list[Line]]:
    return made(read(ROOT / "bench" / "results"), "bench/results", "performance", png=False)


def words(drawn: str) -> list[str]:
    return re.findall(r">([^<>\n]+)</text", drawn)


def without_drawings(page: str) -> str:
    """Another matplotlib may place what it draws elsewhere."""
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_page_is_made_of_the_documents(whole):
    files, _ = whole
    assert {path.name for path in PAGES.iterdir()} == set(files), AGAIN
    for name in ("goals.md", "plots.md"):
        assert (PAGES / name).read_text(encoding="utf-8") == files[name].decode(), AGAIN
    page, again = (PAGES / "report.html").read_text(encoding="utf-8"), files["report.html"].decode()
    assert without_drawings(page) == without_drawings(again) and words(page) == words(again), AGAIN
    for name in files:
        if name.endswith(".svg"):
            assert words((PAGES / name).read_text(encoding="utf-8")) == words(files[name].decode()), AGAIN


def test_documents_say_by_what_and_when_they_were_made():
    found = read(ROOT / "bench" / "results")
    assert not found.unread
    for source in found.sources:
        known = source.environment
        assert source.command and source.date and known.get("commit") and known.get("torch"), source.name
        assert known.get("changed") is False, f"{source.name}: measured with files that are in no commit"


def test_every_missed_goal_has_a_cause(whole):
    unexplained = [line.goal.key for line in whole[1] if line.open]
    assert not unexplained, "CAUSES in report/goals.py says why a goal is missed"


def test_page_stays_small_and_shows_every_plot(whole):
    assert sum(path.stat().st_size for path in PAGES.iterdir()) <= 700_000
    shown = re.findall(r"\]\(performance/(.*?\.svg)\)", (PAGES / "plots.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(name for name in whole[0] if name.endswith(".svg"))
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(f"{{include}} performance/{name}.md" in page for name in ("goals", "plots"))


def test_page_needs_nothing_else():
    page = (PAGES / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<link" not in page and "<img" not in page
    assert "prefers-color-scheme: dark" in page and "http" not in re.sub(r'xmlns[^"]*"[^"]*"', "", page)
