"""``normzoo convert --to pre_rms_norm`` and ``--to pre_crms_norm``."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..model_source import SourceError, load, pairs, said
from ..residual.compressing import BASES
from ..residual.planning import TARGETS, TIED, WRITERS, planned
from ..terminal import say, table
from . import common, converting

_OF_TARGET = {"pre_rms_norm": ("zero_mean_writers", "tied"), "pre_crms_norm": ("basis",)}
"""Options that a rewrite takes and no other conversion."""


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normzoo convert``, those of the rewrites too."""
    converting.convert_arguments(parser)
    group = parser.add_argument_group(
        "rewrites of Pre-LN transformers",
        "--to pre_rms_norm makes RMSNorms of the LayerNorms, --to pre_crms_norm CRMSNorms over one entry less; "
        "the function stays. They take --include, --exclude and --input too, and need an input to try: normzoo "
        "convert hf:gpt2 --to pre_rms_norm --dry-run",
    )
    group.add_argument(
        "--zero-mean-writers",
        choices=WRITERS,
        help="pre_rms_norm: center the weights once, for inference (the default), or in every forward",
    )
    group.add_argument(
        "--tied",
        choices=TIED,
        help="pre_rms_norm: of an embedding that shares its weight with the head, center what it returns (the "
        "default), or give it a weight of its own",
    )
    group.add_argument(
        "--basis", choices=BASES, help="pre_crms_norm: what of a row is left out (default: truncate)"
    )


def run_convert(arguments: argparse.Namespace) -> int:
    """Converts norms, or rewrites a model, as ``--to`` says."""
    try:
        target = _target(arguments)
    except SourceError as error:
        return common.usage("convert", error)
    return converting.run_convert(arguments) if target is None else _rewrite(arguments, target)


def _target(arguments: argparse.Namespace) -> str | None:
    """The rewrite that is asked for; None where it is a conversion of norms.

    Raises:
        SourceError: options that do not go together.
    """
    given = arguments.to or []
    known = {target.replace("_", ""): target for target in TARGETS}
    found = [known.get(to.rpartition("=")[2].replace("_", "").lower()) for to in given]
    target = next(filter(None, found), None)
    for other, options in _OF_TARGET.items():
        for option in options:
            if getattr(arguments, option) is not None and other != target:
                raise SourceError(f"--{option.replace('_', '-')} belongs to --to {other}")
    if target is None:
        return None
    if len(given) > 1:
        raise SourceError(f"--to {target} is a rewrite of the whole model; no other --to goes with it")
    if "=" in given[0]:
        raise SourceError(
            f"--to {given[0]}: a rewrite is of the whole model; say --to {target}, and with --include and "
            "--exclude which norms are meant"
        )
    for option in ("types", "option", "strict"):
        if getattr(arguments, option):
            raise SourceError(f"--{option} does not go with --to {target}")
    return target


def _rewrite(arguments: argparse.Namespace, target: str) -> int:
    """Shows a rewrite and its proof, and writes the result."""
    try:
        common.check_out(arguments)
        with common.aside():
            source = load(arguments.model, pairs("--arg", arguments.arg))
            if arguments.out is not None:
                common.check_weights(source)
            sample = source.sample
            if arguments.input is not None:
                sample = common.random_sample(arguments.input, source.model)
            elif sample is None and source.has_weights:
                raise SourceError(
                    f"--to {target} has to run the model, and no input is known for it; give one with --input, "
                    "or name a factory that returns (model, sample)"
                )
            made = planned("convert", source.model, sample, to=target, **_options(arguments, target))
    except re.error as error:
        return common.usage("convert", f"{error.pattern!r} after re: is no regular expression: {error}")
    except (ValueError, TypeError) as error:
        return common.usage("convert", _spelt(str(error)))
    if not arguments.json:
        table(common.title(arguments.model, source), *made.rows(), wrap=("notes",))
        say(_spelt(made.summary()))
    try:
        with common.aside():
            proof = made.verify()
    except ValueError as error:
        return common.usage("convert", f"there is no proof: {error}")
    except Exception as error:  # of the model, which is the user's
        return common.usage("convert", f"there is no proof: the rewritten model does not run ({said(error)})")
    if arguments.json:
        common.dump(arguments, source, made.to_dict() | {"proof": proof.to_dict()})
    else:
        say(f"proof: {proof}")
    if not proof.passed:
        return 1
    if arguments.out is not None:
        try:
            common.write(made, arguments.out)
        except SourceError as error:
            return common.usage("convert", error)
    return 0


def _options(arguments: argparse.Namespace, target: str) -> dict[str, Any]:
    found = {name: getattr(arguments, name) for name in (*_OF_TARGET[target], "include", "exclude")}
    return {name: value for name, value in found.items() if value is not None}


def _spelt(text: str) -> str:
    """`text` with arguments and functions of Python as the command line takes them."""
    text = re.sub(
        r'\b(zero_mean_writers|tied|basis)="(\w+)"',
        lambda match: f"--{match[1].replace('_', '-')} {match[2]}",
        text,
    )
    return re.sub(r"\bto_(pre_c?rms_norm)\b", r"--to \1", text)
