"""``normzoo fold``."""

from __future__ import annotations

import argparse
import re

from torch import Tensor

from ..conversion.proof import Sample, outputs
from ..folding.planning import plan_fold
from ..folding.steps import FoldPlan
from ..model_source import Source, SourceError, load, pairs
from ..terminal import say, table
from . import common


def fold_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo fold``."""
    common.model_arguments(parser)
    parser.epilog = (
        "Exit codes: 0 fine, 1 the proof failed and nothing is written, 2 wrong usage or nothing to fold, "
        "130 interrupted. For example: normzoo fold timm:resnet18 --dry-run"
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="norms that are meant: a name, a glob or re:EXPRESSION (default: all); this and the next may be "
        "repeated",
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="norms that are not")
    parser.add_argument("--strict", action="store_true", help="a norm that cannot be folded is an error")
    common.result_arguments(parser)


def run_fold(arguments: argparse.Namespace) -> int:
    """Shows which norms of a model can be folded, and writes the folded weights."""
    try:
        common.check_out(arguments)
        with common.aside():
            source = load(arguments.model, pairs("--arg", arguments.arg))
            if arguments.out is not None:
                common.check_weights(source)
            source.model.eval()
            given = None if arguments.input is None else common.random_sample(arguments.input, source.model)
            made = _plan(arguments, source, given)
            proof, why_not = common.prove(made, source, given)
    except re.error as error:
        return common.usage("fold", f"{error.pattern!r} after re: is no regular expression: {error}")
    except (ValueError, TypeError) as error:
        return common.usage("fold", str(error).removeprefix("fold: "))
    if arguments.json:
        found = made.to_dict() | {"proof": proof and proof.to_dict(), "no_proof": why_not or None}
        common.dump(arguments, source, found)
    else:
        table(common.title(arguments.model, source), *made.rows(), wrap=common.WRAP)
        say(made.summary())
        say(f"proof: {proof or why_not}")
    if proof is not None and not proof.passed:
        return 1
    if arguments.out is not None:
        try:
            common.write(made, arguments.out)
        except SourceError as error:
            return common.usage("fold", error)
    return 0


def _plan(arguments: argparse.Namespace, source: Source, given: Tensor | None) -> FoldPlan:
    sample = source.sample if given is None else given
    if sample is not None and source.has_weights:
        try:
            outputs(source.model, Sample(sample))
        except Exception:  # of the model, which is the user's: the proof tells
            sample = None
    filters = {"include": arguments.include or "*", "exclude": arguments.exclude or ()}
    return plan_fold(source.model, sample, strict=arguments.strict, **filters)
