"""``python -m normzoo_bench.models``: whole models before and after conversions.

Results go to stdout and progress to stderr. Exit codes: 0 fine, 1 a contender of normzoo failed a check,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..cases import DTYPES
from ..commands import carried_out, demand_options
from ..workloads import SIZES
from . import CONTENDERS, DIRECTIONS, MODELS, cases, measure_model, usual

_ROUNDS = {"smoke": 3, "default": 10, "full": 20}
_COMMAND = "python -m normzoo_bench.models"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=_COMMAND,
        description="Training steps and inference of whole models, with torch's norms and after conversions.",
        epilog="Exit codes: 0 fine, 1 a contender of normzoo failed a check, 2 wrong usage, 130 interrupted.",
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument(
        "--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="(default: both)"
    )
    parser.add_argument(
        "--contender",
        nargs="+",
        choices=CONTENDERS,
        help="(default: all; on a CPU without what has to be compiled, which outlasts the rest)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument("--size", choices=SIZES, default="default", help="(default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=[name for name in DTYPES if name != "mixed"],
        help="(default: float32, on a GPU bfloat16); norms with batch statistics stay in float32",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each contender, at least 2")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so many")
    parser.add_argument(
        "--output", metavar="FILE.json", help="where to write the results, again after every case"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    arguments = parser.parse_args(argv)
    try:
        return _measured(arguments)
    except ValueError as error:
        print(f"{_COMMAND}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first case or after the last; in between, what is done is kept
        print(f"{_COMMAND}: interrupted", file=sys.stderr)
        return 130


def _measured(arguments: argparse.Namespace) -> int:
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here; use --device cpu")
    rounds = _ROUNDS[arguments.size] if arguments.rounds is None else arguments.rounds
    demand_options(arguments, rounds)
    dtype = arguments.dtype or ("bfloat16" if name == "cuda" else "float32")
    chosen = cases(arguments.model, name, arguments.size, (dtype,), arguments.direction)
    contenders = tuple(arguments.contender or usual(name))
    if not any(case.contenders(contenders) for case in chosen):
        raise ValueError(f"--contender has {', '.join(contenders)}, and no model of --model has any of these")
    given = {option: value for option, value in vars(arguments).items() if option not in ("output", "json")}
    asked = {"command": _COMMAND, "arguments": given}
    return carried_out(chosen, arguments, asked, torch.device(name), contenders, rounds, one=measure_model)


if __name__ == "__main__":
    sys.exit(main())
