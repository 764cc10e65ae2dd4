"""``normzoo fold``."""

from __future__ import annotations

import argparse

from torch import Tensor

from ..conversion.samples import Sample, outputs
from ..folding.planning import plan_fold
from ..folding.steps import FoldPlan
from ..model_source import Source
from . import common


def fold_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo fold``."""
    common.model_arguments(parser)
    parser.epilog = f"{common.EXITS} For example: normzoo fold timm:resnet18 --dry-run"
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="norms that are meant: a name, a glob or re:EXPRESSION (default: all); this and the next may be "
        "repeated",
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="norms that are not")
    parser.add_argument("--strict", action="store_true", help="a norm that cannot be folded is an error")
    common.result_arguments(parser, "folded")


def run_fold(arguments: argparse.Namespace) -> int:
    """Shows which norms of a model can be folded, and writes the folded weights."""

    def planned(source: Source, given: Tensor | None) -> FoldPlan:
        return _plan(arguments, source, given)

    return common.run("fold", arguments, planned, common.prove)


def _plan(arguments: argparse.Namespace, source: Source, given: Tensor | None) -> FoldPlan:
    source.model.eval()
    sample = source.sample if given is None else given
    if sample is not None and source.has_weights:
        try:
            outputs(source.model, Sample(sample))
        except Exception:  # of the model, which is the user's: the proof tells
            sample = None
    filters = {"include": arguments.include or "*", "exclude": arguments.exclude or ()}
    return plan_fold(source.model, sample, strict=arguments.strict, **filters)
