"""``normzoo inspect`` and ``normzoo convert``."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

from ..conversion.change import Plan
from ..conversion.examine import inspect
from ..conversion.planning import plan
from ..model_source import Source, SourceError, load, pairs
from ..terminal import say, table
from . import common


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo inspect``."""
    common.model_arguments(parser)
    parser.epilog = "Exit codes: 0 fine, 2 wrong usage, 130 interrupted."


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo convert``."""
    common.model_arguments(parser)
    parser.epilog = (
        f"{common.EXITS} For example: normzoo convert hf:gpt2 --to 'h.*.ln_1=rms_norm' --to _default=same "
        "--dry-run"
    )
    parser.add_argument(
        "--to",
        action="append",
        metavar="LAYER|PATTERN=LAYER",
        help="what norms become: a layer of `normzoo list`, `same` for the layer of the same mathematics (the "
        "default), `weight_standardize` for the layers before them, or `keep`; PATTERN is a name, a glob, "
        "re:EXPRESSION or _default, for all others, which else are kept; may be repeated. Or a rewrite of the "
        "whole model: `pre_rms_norm` or `pre_crms_norm`, see below",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="norms that are meant: a name, a glob or re:EXPRESSION (default: all); this and the next three "
        "may be repeated",
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="norms that are not")
    parser.add_argument(
        "--types", action="append", metavar="TYPE", help="families (layer, rms, ...) or classes that are meant"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a constructor argument of the new layers; VALUE as for --arg; may be repeated",
    )
    parser.add_argument("--strict", action="store_true", help="a norm that cannot be converted is an error")
    common.result_arguments(parser, "converted")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Shows the norms of a model."""
    try:
        with common.aside():
            source = load(arguments.model, pairs("--arg", arguments.arg))
            found = inspect(source.model)
    except SourceError as error:
        return common.usage("inspect", error)
    if arguments.json:
        common.dump(arguments, source, found.to_dict())
        return 0
    about = common.title(arguments.model, source)
    if found.sites:
        table(about, *found.rows(), wrap=common.WRAP)
    else:
        say(about)
    say(found.summary())
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Shows what a conversion does to a model, and writes the result."""

    def planned(source: Source, given: Tensor | None) -> Plan:
        options = pairs("--option", arguments.option)
        return plan(source.model, _target(arguments.to), **_filters(arguments), **options)

    return common.run("convert", arguments, planned, common.prove)


def _target(given: list[str] | None) -> Any:
    if not given:
        return "same"
    rules: dict[str, str | None] = {}
    for rule in given:
        pattern, equals, layer = rule.rpartition("=")
        pattern = pattern if equals else "_default"
        if pattern in rules:
            raise SourceError(f"--to is given twice for {pattern}; a norm becomes one layer")
        rules[pattern] = None if layer == "keep" else layer
    return rules


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    filters = {name: getattr(arguments, name) for name in ("include", "exclude", "types", "strict")}
    return {name: value for name, value in filters.items() if value is not None}
