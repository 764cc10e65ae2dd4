"""``python -m normzoo_bench.experiments``: the list of experiments, or one of them.

The table goes to stdout and progress to stderr. Exit codes: 0 fine, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from normzoo.terminal import say, table

from ..results import demand_writable
from .catalog import EXPERIMENTS
from .experiment import measure, where, write

_PROGRAM = "python -m normzoo_bench.experiments"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Small experiments on a CPU: what a layer does for training or testing, over seeds.",
        epilog="Exit codes: 0 fine, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one; without it, all are listed")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many, from 0 on (default: its own number)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for NAME.json, .md, .svg and .png")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        table("Experiments", ("name", "what"), [(e.name, e.says) for e in EXPERIMENTS.values()], ("what",))
        return 0
    try:
        _check(arguments)
    except ValueError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    experiment = EXPERIMENTS[arguments.name]
    try:
        document = measure(experiment, arguments.seeds, arguments.quick)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    shown = experiment.table(document)
    table(shown.title, shown.header, shown.cells)
    say(where(document))
    if arguments.output is not None:
        for path in write(document, experiment, arguments.output):
            print(f"{_PROGRAM}: wrote {path}", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {arguments.name!r}; there are {', '.join(EXPERIMENTS)}")
    if arguments.seeds is not None and arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}; it must be at least 1")
    if arguments.seeds is not None and not hasattr(EXPERIMENTS[arguments.name].settings, "seeds"):
        raise ValueError(f"--seeds is given, but nothing is random in {arguments.name}; leave it out")
    if EXPERIMENTS[arguments.name].digits and find_spec("sklearn") is None:
        raise ValueError(
            "its data come with scikit-learn, which is not installed; try `pip install scikit-learn`"
        )
    if arguments.output is not None:
        demand_writable(arguments.output / f"{arguments.name}.json")


if __name__ == "__main__":
    sys.exit(main())
