"""The examples of the README, of the pages and of the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from torch import nn

import normzoo
from normzoo.conversion import Exactness
from normzoo.conversion.surgery import WRAPPERS
from normzoo.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "normzoo").rglob("*.py"))
FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHORT = {
    "DistributedDataParallel": "DDP", "FullyShardedDataParallel": "FSDP", "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile", "ScriptModule": "TorchScript", "DeepSpeedEngine": "DeepSpeed",
}  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a Markdown text, each with the line of the text before its first line."""
    return [
        (text.count("\n", 0, match.start(2)), textwrap.dedent(match.group(2))) for match in FENCE.finditer(text)
    ]


def run_examples(test: doctest.DocTest) -> None:
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
    assert not results.failed, "".join(report)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_page(text: str, name: str) -> int:
    """Runs the Python blocks of a page in one namespace and returns how many there are."""
    names: dict = {"__name__": "__main__"}
    found = blocks(text)
    for line, code in found:
        if ">>>" in code:
            run_examples(doctest.DocTestParser().get_doctest(code, names, name, name, line))
        else:
            # The blank lines let a traceback name the line of the page.
            exec(compile("\n" * line + code, name, "exec"), names)
    return len(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page(page):
    count = run_page(page.read_text(encoding="utf-8"), str(page))
    # These show the library at work; without a block the extractor would be at fault.
    assert count or page.stem in ("index", "numerics")


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_gallery_page(entry):
    spec = importlib.util.spec_from_file_location("zoo_pages", ROOT / "docs" / "zoo_pages.py")
    zoo_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo_pages)
    assert run_page(zoo_pages.page(entry), f"gallery/{entry.name}.md") == 1


# Importing __main__ would start the command line.
@pytest.mark.parametrize(
    "name", [module_name(path) for path in SOURCES if path.stem != "__main__"], ids=lambda name: name
)
def test_docstrings(name):
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module):
        if test.examples:
            run_examples(test)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_layer_has_an_example(entry):
    for thing in (entry.cls, entry.function):
        assert ">>>" in (inspect.getdoc(thing) or ""), f"the docstring of {thing.__name__} has no example"


def test_the_plan_in_the_readme_is_what_is_printed():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert str(normzoo.plan(model, "rms_norm")) in readme


def test_conversion_page_is_whole():
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    classes = re.findall(
        r"^\| ([\w-]+(?: \w+)?) \|", page.split("## How true")[1].split("## ")[0], re.MULTILINE
    )
    assert classes[1:] == [exactness.value for exactness in Exactness], "the table of transfer classes"
    refused = page.split("## What is refused")[1].split("## ")[0]
    for name in WRAPPERS:
        assert SHORT.get(name, name) in refused, f"the table of refusals leaves {name} out"
