"""The commands ``bench`` and ``compare``: their arguments, and what they do.

Results go to stdout and progress to stderr. Exit codes: 0 fine, 1 normzoo failed a check or something got
worse, 2 wrong usage, 130 interrupted. Importing this module loads nothing that measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .workloads import DIRECTIONS, SCALINGS, SIZES

if TYPE_CHECKING:
    import torch

# Rounds, and directions unless some are named.
_OF_SIZE = {
    "smoke": (5, ("forward", "backward")),
    "default": (20, ("forward", "backward", "both")),
    "full": (30, DIRECTIONS),
}
_DTYPES = {
    ("cpu", "smoke"): ("float32",),
    ("cpu", "default"): ("float32", "bfloat16"),
    ("cpu", "full"): ("float32", "bfloat16"),
    ("cuda", "full"): ("bfloat16", "float32", "mixed"),
}
_SAMPLE_SECONDS = 0.002
_ASKED = ("layer", "size", "dtype", "workload", "direction", "contender", "scaling", "seconds")


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench`."""
    parser.epilog = "Exit codes: 0 fine, 1 normzoo failed a check, 2 wrong usage, 130 interrupted."
    parser.add_argument("layer", nargs="*", metavar="LAYER", help="names or classes (default: all)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to measure (default: cuda where there is a GPU)"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="default",
        help="how many shapes, and how large (default: %(default)s); dtypes, directions and rounds, unless "
        "they are given, follow from it",
    )
    _several(parser, "--dtype", "of float32, bfloat16, float16 and mixed: bfloat16 with float32 parameters")
    _several(parser, "--workload", "names of workloads, such as llm or 'wide-*' (default: all of the size)")
    _several(parser, "--direction", "of " + ", ".join(DIRECTIONS))
    _several(
        parser,
        "--contender",
        "such as normzoo,torch,torch.compile (default: all but torch.compile-max, and on a CPU torch.compile)",
    )
    parser.add_argument(
        "--scaling", choices=SCALINGS, help="time against one size, instead of the usual shapes"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each contender, at least 2")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so many")
    parser.add_argument(
        "--output", metavar="FILE.json", help="where to write the results, again after every case"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    parser.add_argument("--list", action="store_true", help="show what would be measured, and measure nothing")


def bench(arguments: argparse.Namespace) -> int:
    """Measures what `arguments` ask for and returns the exit code."""
    try:
        return _bench(arguments)
    except KeyboardInterrupt:  # before the first case or after the last; in between, what is done is kept
        print("normzoo bench: interrupted", file=sys.stderr)
        return 130


def _bench(arguments: argparse.Namespace) -> int:
    try:
        device, cases, contenders, directions, unmeasured = _chosen(arguments)
        rounds = _OF_SIZE[arguments.size][0] if arguments.rounds is None else arguments.rounds
        demand_options(arguments, rounds)
    except ValueError as error:
        print(f"normzoo bench: {str(error).removeprefix('normzoo: ')}", file=sys.stderr)
        return 2
    if arguments.list:
        return _list(cases, contenders, directions, arguments.json)
    given = {name: getattr(arguments, name) for name in _ASKED}
    absent = [(entry.name, "normzoo", f"the family {entry.family!r} has no workloads") for entry in unmeasured]
    return carried_out(
        cases,
        arguments,
        {"command": "normzoo bench", "arguments": given},
        device,
        contenders,
        rounds,
        directions=directions,
        absent=absent,
    )


def demand_options(arguments: argparse.Namespace, rounds: int) -> None:
    """Raises ValueError where ``--rounds``, ``--seconds`` or ``--output`` cannot be."""
    from .results import demand_writable

    if rounds < 2:
        raise ValueError(f"--rounds is {rounds}; it must be at least 2")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise ValueError(f"--seconds is {arguments.seconds}; it must be more than 0")
    if arguments.output:
        demand_writable(arguments.output)


def carried_out(
    cases: Sequence[Any],
    arguments: argparse.Namespace,
    asked: dict,
    device: torch.device,
    contenders: tuple[str, ...],
    rounds: int,
    *,
    directions: tuple[str, ...] = (),
    one: Callable[..., None] | None = None,
    absent: Sequence[tuple[str, str, str]] = (),
) -> int:
    """Measures `cases`, each by `one`, shows and writes what `arguments` say, and returns the exit code.

    Args:
        arguments: with ``seconds``, ``output`` and ``json``.
        asked: what goes into the settings of the document.
        absent: layers, contenders and reasons that are known before.
    """
    from normzoo.terminal import progress

    from . import run as runs
    from .measure import Settings
    from .tables import show

    deadline = time.monotonic() + (arguments.seconds or float("inf"))
    with runs.on_device(device):
        document, clocks, cache = runs.start(device, _SAMPLE_SECONDS, rounds)
        document.settings |= asked
        for entry in absent:
            document.add_absent(*entry)
        settings = Settings(device, contenders, directions, clocks, rounds, cache, deadline)
        with progress("measuring", len(cases)) as step:

            def after_each(case) -> None:
                step(str(case))
                if arguments.output:
                    document.write(arguments.output)

            undisturbed = runs.run(cases, settings, document, after_each, one)
        if undisturbed:
            runs.finish(document, settings)
    if arguments.output:
        document.write(arguments.output)
    found = dataclasses.asdict(document)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
        if device.type == "cpu" and not any("compile" in name for name in contenders):
            print("torch.compile is left out on a CPU, where compiling outlasts the rest; --contender has it.")
    if not undisturbed:
        print(f"{asked['command']}: interrupted", file=sys.stderr)
        return 130
    return 1 if document.ours_failed else 0


def _chosen(arguments: argparse.Namespace):
    """(device, cases, contenders, directions, layers without workloads), or a ValueError."""
    import torch

    from normzoo.zoo import ZOO, find

    from .cases import DTYPES, plan
    from .peers import CONTENDERS, usual
    from .workloads import FAMILIES

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here; use --device cpu")
    entries = list({entry.name: entry for entry in map(find, arguments.layer)}.values()) or list(ZOO)
    default = _DTYPES.get((name, arguments.size), ("bfloat16",))
    dtypes = _known("--dtype", arguments.dtype, DTYPES) or default
    directions = _known("--direction", arguments.direction, DIRECTIONS) or _OF_SIZE[arguments.size][1]
    contenders = _known("--contender", arguments.contender, CONTENDERS) or usual(name)
    cases = plan(entries, name, arguments.size, dtypes, arguments.workload or (), arguments.scaling)
    unmeasured = [entry for entry in entries if entry.family not in FAMILIES]
    return torch.device(name), cases, contenders, directions, unmeasured


def _known(option: str, names: list[str] | None, known) -> tuple[str, ...]:
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option} has {name!r}; there are {', '.join(known)}")
    return tuple(dict.fromkeys(names or ()))


def _several(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, action="extend", type=lambda given: given.split(","), metavar="A,B", help=text)


def _list(cases, contenders, directions, as_json: bool) -> int:
    if as_json:
        rows = [{**case.key, "contenders": contenders, "directions": directions} for case in cases]
        print(json.dumps(rows, indent=1))
        return 0
    from normzoo.terminal import table

    names = ("layer", "workload", "dtype", "memory_format", "mode")
    table(f"{len(cases)} cases", names, [tuple(case.key[name] for name in names) for case in cases])
    print(f"each {', '.join(directions)}, by {', '.join(contenders)} as far as they are there")
    return 0


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compare`."""
    parser.epilog = "Exit codes: 0 nothing got worse, 1 something did, 2 wrong usage."
    parser.add_argument("old", metavar="OLD", help="what `bench --output` wrote")
    parser.add_argument("new", metavar="NEW", help="what it wrote later")
    parser.add_argument(
        "--threshold",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="growth of time or memory that is no regression yet (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")


def compare(arguments: argparse.Namespace) -> int:
    """Compares two documents and returns the exit code."""
    from .comparison import differences, regressed
    from .results import load

    try:
        if not 0 <= arguments.threshold < float("inf"):
            raise ValueError(f"--threshold is {arguments.threshold}; it must be per cent, 0 or more")
        old, new = load(arguments.old), load(arguments.new)
        found = differences(old, new, arguments.threshold / 100)
        if not found["matched"]:
            raise ValueError(
                f"no row of {arguments.new} is in {arguments.old}; measure the same layers and workloads"
            )
    except ValueError as error:
        print(f"normzoo compare: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        from .tables import show_comparison

        show_comparison(found)
    return 1 if regressed(found) else 0
