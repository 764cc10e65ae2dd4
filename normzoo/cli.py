"""The command line.

Results go to stdout and everything else to stderr. Exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130
interrupted, 141 the reader of stdout has left.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from normzoo_bench import commands as measuring

from . import __version__
from .commands import converting, folding, rewriting
from .terminal import say, table
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
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("normzoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again at exit
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normzoo",
        description="Normalization layers for PyTorch.",
        epilog="Exit codes: 0 fine, 1 a check failed, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"normzoo {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], short: str, long: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=short, description=long)
        made.set_defaults(command=run)
        return made

    listing = command("list", _list, "all layers", "All layers in a table.")
    info = command("info", _info, "one layer", "What there is to know about a layer.")
    info.add_argument("name", metavar="NAME", help="as `normzoo list` shows it, or the class")
    doctor = command(
        "doctor",
        _doctor,
        "which kernels run here, and why not",
        "Shows versions and device, and whether the kernels of every layer run here; on a GPU it tries them.",
    )
    inspecting = command(
        "inspect",
        converting.run_inspect,
        "the norms of a model",
        "Shows every norm of a model and what it computes.",
    )
    converting.inspect_arguments(inspecting)
    convert = command(
        "convert",
        rewriting.run_convert,
        "replace the norms of a model",
        "Shows what a conversion of a model's norms, or of the layers before them, keeps and changes, proves "
        "it on a sample input, and writes the converted weights.",
    )
    rewriting.convert_arguments(convert)
    fold = command(
        "fold",
        folding.run_fold,
        "fold norms into the layers beside them",
        "For inference: shows which norms of a model go into the convolution, linear map or embedding beside "
        "them and why others do not, proves it on a sample input, and writes the folded weights.",
    )
    folding.fold_arguments(fold)
    measuring.bench_arguments(
        command("bench", measuring.bench, "measure the layers", "Times the layers here against their peers.")
    )
    measuring.compare_arguments(
        command(
            "compare", measuring.compare, "compare two measurements", "Compares two results of `normzoo bench`."
        )
    )
    demo = command(
        "demo",
        _demo,
        "train two models, convert them, compare (about two minutes)",
        "Trains a small language model on the CPU, replaces its norms by normzoo's, checks that nothing "
        "changed, and times the layers against torch's; puts alpha-BN over a small CNN that reads corrupted "
        "digits. About two minutes on two cores. Writes a report of it as one page of HTML.",
    )
    demo.add_argument("--quick", action="store_true", help="a few seconds, for tests")
    demo.add_argument(
        "--report",
        type=Path,
        default=Path("normzoo-demo.html"),
        metavar="FILE",
        help="where to write the report; an older one is replaced (default: %(default)s)",
    )
    for made in (listing, info, doctor, inspecting, convert, fold, demo):
        made.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    return parser


def describe(entry: Entry, name: str = "") -> dict:
    """What the list and the info command show of a layer, ready for JSON.

    Args:
        name: that of one of its classes, where it has several.
    """
    cls = entry.called(name) or entry.cls
    parameters = inspect.signature(cls).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    return {
        "name": entry.name,
        "class": f"normzoo.{cls.__name__}",
        "classes": [cls.__name__ for cls in entry.exported],
        "title": entry.title,
        "family": entry.family,
        "layout": entry.layout,
        "kernel": entry.kernel,
        "couples_samples": entry.couples_samples,
        "replaces": f"torch.nn.{cls.__name__}" if entry.torch_class else None,
        "paper": f"https://arxiv.org/abs/{entry.paper}",
        "official_code": f"https://github.com/{entry.official}" if entry.official else None,
        "constructor": f"{cls.__name__}{bare}",
        "doc": inspect.getdoc(cls) or "",
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
    if target := rewriting.near_rewrite(arguments.name):
        print(
            f"normzoo info: {target} is no layer but a rewrite of a whole model, which keeps its function: "
            f"normzoo convert MODEL --to {target}, in Python normzoo.to_{target}; "
            "docs/layernorm-rmsnorm.md tells of it",
            file=sys.stderr,
        )
        return 2
    try:
        entry = find(arguments.name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    about = describe(entry, arguments.name)
    if arguments.json:
        print(json.dumps(about, indent=2))
        return 0
    about["classes"] = ", ".join(about["classes"])
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


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.examine()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        versions = [(name, version or "not installed") for name, version in found["versions"].items()]
        table(f"Device: {found['device']}", ("package", "version"), versions)
        rows = [(layer["layer"], layer["runs"], layer["why"]) for layer in found["layers"]]
        table("What runs on this device", ("layer", "runs", "why"), rows, ("why",))
        say(_verdict(found["layers"]))
    return 0 if found["healthy"] else 1


def _verdict(layers: list[dict]) -> str:
    failed = [layer["layer"] for layer in layers if layer["failed"]]
    if failed:
        return (
            f'FAILED: the kernels of {", ".join(failed)} do not work here; with normzoo.backend("reference"): '
            "runs without them"
        )
    by_kernel = sum(layer["runs"] == "Triton" for layer in layers)
    return f"healthy: {by_kernel} of {len(layers)} layers run by kernels, the rest by eager PyTorch"


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    if not arguments.report.resolve().parent.is_dir() or arguments.report.is_dir():
        print(
            f"normzoo demo: --report is {arguments.report}; name a file in a folder that is there",
            file=sys.stderr,
        )
        return 2
    result = demo.run(quick=arguments.quick, quiet=arguments.json, report=arguments.report)
    if arguments.json:
        print(json.dumps(result, indent=2))
    return 0 if result["passed"] else 1
