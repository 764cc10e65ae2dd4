"""``normzoo inspect`` and ``normzoo convert``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model_source import FORMS, Source, SourceError, load, pairs
from ..terminal import table
from .change import Plan
from .examine import inspect
from .planning import plan
from .proof import Proof


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo inspect``."""
    _model_arguments(parser)


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo convert``."""
    _model_arguments(parser)
    parser.add_argument(
        "--to",
        action="append",
        metavar="LAYER|PATTERN=LAYER",
        help="what norms become: a layer of `normzoo list`, or `same`, the layer of the same mathematics "
        "(default); PATTERN is a name, a glob, re:EXPRESSION or _default, and `keep` as LAYER keeps them; may "
        "be repeated",
    )
    parser.add_argument(
        "--include", action="append", metavar="PATTERN", help="norms that are meant (default: all)"
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="norms that are not")
    parser.add_argument("--types", action="append", metavar="TYPE", help="families or classes that are meant")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a constructor argument of the new layers",
    )
    parser.add_argument("--strict", action="store_true", help="a norm that cannot be converted is an error")
    parser.add_argument(
        "--input", metavar="SIZES", help="sizes of a random input to try the model on, such as 2,3,224,224"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and its proof, write nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the converted weights, as safetensors")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=FORMS)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="KEY=VALUE", help="an argument for what makes the model"
    )


def run_inspect(arguments: argparse.Namespace) -> int:
    """Shows the norms of a model."""
    try:
        source = load(arguments.model, pairs(arguments.arg))
    except SourceError as error:
        return _usage("inspect", error)
    found = inspect(source.model)
    if arguments.json:
        print(json.dumps(found.to_dict() | {"model": arguments.model, "note": source.note}, indent=2))
        return 0
    if found.sites:
        table(_title(arguments.model, source), *found.rows(), wrap=("notes", "computes"))
    print(found.summary())
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Shows what a conversion does to a model, and writes the result."""
    if arguments.dry_run == (arguments.out is not None):
        return _usage("convert", "say --dry-run to see the plan, or --out FILE to write the converted weights")
    if arguments.out is not None and arguments.out.exists():
        return _usage("convert", f"{arguments.out} exists already; name another file")
    try:
        source = load(arguments.model, pairs(arguments.arg))
        made = plan(source.model, _target(arguments.to), **_filters(arguments), **pairs(arguments.option))
        sample = _sample(arguments.input) if arguments.input else source.sample
    except (ValueError, TypeError) as error:
        return _usage("convert", error)
    if not arguments.json:
        table(_title(arguments.model, source), *made.rows(), wrap=("notes", "computes"))
        print(made.summary())
    proof, why_not = _prove(made, sample)
    if arguments.json:
        found = made.to_dict() | {"model": arguments.model, "note": source.note}
        print(json.dumps(found | {"proof": proof and proof.to_dict(), "no_proof": why_not}, indent=2))
    else:
        print(f"proof: {proof or why_not}")
    if proof is not None and not proof.passed:
        return 1
    if arguments.out is not None:
        try:
            _write(made.apply(), made, arguments)
        except (OSError, SourceError) as error:
            return _usage("convert", error)
    return 0


def _usage(command: str, error: Exception | str) -> int:
    print(f"normzoo {command}: {str(error).removeprefix('convert: ')}", file=sys.stderr)
    return 2


def _title(name: str, source: Source) -> str:
    return f"{name} ({source.note})" if source.note else name


def _target(given: list[str] | None) -> Any:
    if not given:
        return "same"
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    rules = {}
    for rule in given:
        pattern, equals, layer = rule.rpartition("=")
        rules[pattern if equals else "_default"] = None if layer == "keep" else layer
    return rules


def _filters(arguments: argparse.Namespace) -> dict[str, Any]:
    filters = {name: getattr(arguments, name) for name in ("include", "exclude", "types", "strict")}
    return {name: value for name, value in filters.items() if value is not None}


def _sample(sizes: str) -> torch.Tensor:
    try:
        shape = [int(size) for size in sizes.split(",")]
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError):
        raise SourceError(f"--input is {sizes!r}; it must be sizes, such as 2,3,224,224") from None


def _prove(made: Plan, sample: Any) -> tuple[Proof | None, str]:
    """The proof on the whole model, or why there is none."""
    if sample is None:
        return None, "left out: no input is known for this model; give one with --input"
    if any(parameter.is_meta for parameter in made.model.parameters()):
        return None, "left out: the model has no weights"
    try:
        return made.verify(sample), ""
    except Exception as error:  # of the model, which is the user's
        return None, f"left out: the model does not run on the sample ({type(error).__name__}: {error})"


def _write(model: nn.Module, made: Plan, arguments: argparse.Namespace) -> None:
    try:
        from safetensors.torch import save_model
    except ModuleNotFoundError as error:
        raise SourceError("safetensors is not installed; pip install safetensors") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SourceError("the model has no weights to write")
    # Half a file must not pass for a checkpoint.
    part = arguments.out.with_name(arguments.out.name + ".part")
    save_model(model, str(part), metadata={"normzoo": made.to_json()})
    os.replace(part, arguments.out)
    print(
        f"wrote {arguments.out}; it loads into the same model after the same normzoo.convert", file=sys.stderr
    )
