"""What is made from the code: the gallery, one page a layer, the table of layers in the README, that of rules.

Run as a script it brings the README up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# A checkout documents itself, installed or not.
sys.path.insert(0, str(ROOT))

from normzoo.conversion import TRANSFERS  # noqa: E402
from normzoo.zoo import ZOO, Entry  # noqa: E402

START = "<!-- layers: made by docs/zoo_pages.py -->"
END = "<!-- /layers -->"


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


def paper(entry: Entry) -> str:
    return f"[arXiv:{entry.paper}](https://arxiv.org/abs/{entry.paper})"


def official(entry: Entry) -> str:
    return f"[{entry.official}](https://github.com/{entry.official})" if entry.official else "none"


def table(link: str = "{cls}") -> str:
    """The layers as a Markdown table; `link` is the form of the first column."""
    lines = [
        "| layer | what it is | input | kernel | couples samples | paper |",
        "|---|---|---|---|---|---|",
    ]
    for entry in ZOO:
        cell = link.format(cls=f"`{entry.cls.__name__}`", name=entry.name)
        lines.append(
            f"| {cell} | {entry.title} | `{entry.layout}` | {yes(entry.kernel)}"
            f" | {yes(entry.couples_samples)} | {paper(entry)} |"
        )
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with its table made anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: the table of layers needs one line {START!r} and one {END!r}")
    head, rest = text.split(START)
    return f"{head}{START}\n{table()}{END}{rest.split(END)[1]}"


def constructor(entry: Entry) -> str:
    return ", ".join(repr(argument) for argument in entry.arguments)


def making(t: Tensor) -> str:
    """Code that makes a tensor like t."""
    sizes = ", ".join(str(size) for size in t.shape)
    return f"torch.rand({sizes}) > 0.5" if t.dtype == torch.bool else f"torch.randn({sizes})"


def page(entry: Entry) -> str:
    """The gallery page of one layer, as MyST Markdown."""
    name = entry.cls.__name__
    x = entry.sample()
    beside = entry.beside(x)
    made = "".join(f"\n{argument} = {making(t)}" for argument, t in beside.items())
    given = "".join(f", {argument}={argument}" for argument in beside)
    functions = [entry.function, *([entry.added] if entry.added else [])]
    rows = {
        "classes": ", ".join(f"`{cls.__name__}`" for cls in entry.classes),
        "paper": paper(entry),
        "official code": official(entry),
        "input": f"`{entry.layout}`",
        "Triton kernel": yes(entry.kernel),
        "couples the samples of a batch": yes(entry.couples_samples),
    }
    if entry.carriers:
        rows["layers that do it to their weight"] = ", ".join(f"`{cls.__name__}`" for cls in entry.carriers)
    if entry.torch_class:
        rows["same mathematics in torch"] = f"`torch.nn.{entry.torch_class.__name__}`"
    if entry.stored:
        rows["statistics"] = "stored ones, in training too"
    if entry.approximate:
        rows["gradient in training"] = "an approximation, no derivative"
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    members = "   :members:\n   :exclude-members: torch_class\n"
    classes = [f".. autoclass:: normzoo.{cls.__name__}\n{members}" for cls in entry.exported]
    api = "\n".join((*classes, *(f".. autofunction:: normzoo.functional.{f.__name__}" for f in functions)))
    return f"""# {name}

{entry.title}.

| | |
|---|---|
{facts}

```python
import torch
import normzoo

layer = normzoo.{name}({constructor(entry)})
x = {making(x)}{made}
y = layer(x{given})
assert y.shape == x.shape and y.dtype == x.dtype
```

```{{eval-rst}}
{api}
```
"""


def transfers() -> str:
    """The rules of conversion as a Markdown table."""
    lines = ["| norm | becomes | transfer class | what to know |", "|---|---|---|---|"]
    lines += [
        f"| {rule.family} | `{rule.target}` | {rule.exactness.value} | {rule.note} |"
        for rule in TRANSFERS.values()
    ]
    return "\n".join(lines) + "\n"


def write_gallery(folder: Path) -> None:
    """Write the index, a page a layer and the table of rules, and remove the pages of layers that are gone."""
    folder.mkdir(exist_ok=True)
    rows = table("[{cls}]({name}.md)")
    names = "\n".join(entry.name for entry in ZOO)
    pages = {"index.md": f"# Gallery\n\n{rows}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"}
    pages |= {f"{entry.name}.md": page(entry) for entry in ZOO}
    pages["transfers.inc"] = transfers()
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        target = folder / name
        # An untouched file spares Sphinx from reading it again.
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    text = readme()
    (ROOT / "README.md").write_text(text, encoding="utf-8")
