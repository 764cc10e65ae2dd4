"""The command line: ``normzoo list``, ``normzoo info`` and ``normzoo demo``.

Results go to stdout and progress to stderr. Exit codes: 0 fine, 1 a check failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import re
import sys
import textwrap
from collections.abc import Sequence

from . import __version__
from .terminal import table
from .zoo import ZOO, Entry, find


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The signs of formulas in docstrings must not end the program where the terminal lacks them.
        sys.stdout.reconfigure(errors="replace")
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return 0 if stop.code is None else int(stop.code)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    return arguments.command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="normzoo", description="Normalization layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"normzoo {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    listing = commands.add_parser("list", help="all layers", description="All layers in a table.")
    listing.set_defaults(command=_list)
    info = commands.add_parser("info", help="one layer", description="What there is to know about a layer.")
    info.add_argument("name", help="as `normzoo list` shows it, or the class")
    info.set_defaults(command=_info)
    demo = commands.add_parser(
        "demo",
        help="train a model, convert it, compare (about two minutes)",
        description="Trains a small language model on the CPU, replaces its norms by normzoo's, checks that "
        "nothing changed, and times the layers against torch's. About two minutes on two cores.",
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, for tests")
    demo.set_defaults(command=_demo)
    for command in (listing, info, demo):
        command.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    return parser


def describe(entry: Entry) -> dict:
    """What the list and the info command show of a layer, ready for JSON."""
    parameters = inspect.signature(entry.cls).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    return {
        "name": entry.name,
        "class": f"normzoo.{entry.cls.__name__}",
        "title": entry.title,
        "family": entry.family,
        "layout": entry.layout,
        "kernel": entry.kernel,
        "couples_samples": entry.couples_samples,
        "replaces": f"torch.nn.{entry.torch_class.__name__}" if entry.torch_class else None,
        "paper": f"https://arxiv.org/abs/{entry.paper}",
        "official_code": f"https://github.com/{entry.official}" if entry.official else None,
        "constructor": f"{entry.cls.__name__}{bare}",
        "doc": inspect.getdoc(entry.cls) or "",
    }


def _list(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps([describe(entry) for entry in ZOO], indent=2))
        return 0
    rows = [
        (
            entry.name,
            entry.layout,
            "Triton" if entry.kernel else "-",
            "yes" if entry.couples_samples else "no",
            entry.paper,
            entry.title,
        )
        for entry in ZOO
    ]
    header = ("name", "input", "kernel", "couples", "arXiv", "title")
    table("Layers; couples: a sample's output depends on the rest of its batch", header, rows, ("title",))
    return 0


def _info(arguments: argparse.Namespace) -> int:
    try:
        entry = find(arguments.name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    about = describe(entry)
    if arguments.json:
        print(json.dumps(about, indent=2))
        return 0
    about["kernel"] = "Triton" if entry.kernel else "none"
    about["couples_samples"] = "yes" if entry.couples_samples else "no"
    doc = _readable(about.pop("doc"))
    constructor = textwrap.fill(about.pop("constructor"), 78, subsequent_indent="    ")
    print(f"{about.pop('title')}\n")
    for key, value in about.items():
        print(f"  {key.replace('_', ' '):<16} {value or 'none'}")
    print(f"\n{constructor}\n\n{doc}")
    return 0


def _readable(doc: str) -> str:
    """A docstring without the marks that only the documentation needs."""
    doc = re.sub(r":\w+:`~?([^`]+)`", r"\1", doc)
    return doc.replace("``", "").replace("\\*", "*")


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    try:
        result = demo.run(quick=arguments.quick, quiet=arguments.json)
    except KeyboardInterrupt:
        print("normzoo demo: interrupted", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(result, indent=2))
    return 0 if result["passed"] else 1
