"""``normzoo convert --to pre_rms_norm`` and ``--to pre_crms_norm``."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

from torch import Tensor

from ..entry import spelling
from ..model_source import Source, SourceError, said
from ..residual.compressing import BASES
from ..residual.planning import TARGETS, TIED, WRITERS, planned
from ..residual.probing import StreamProof, Unshown
from ..residual.rewriting import Rewrite
from ..zoo import ZOO
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
    layers = [to.rpartition("=")[2] for to in given]
    target = next((target for layer in layers if (target := rewrite_called(layer))), None)
    for other, options in _OF_TARGET.items():
        for option in options:
            if getattr(arguments, option) is not None and other != target:
                raise SourceError(f"--{option.replace('_', '-')} belongs to --to {other}")
    if target is None:
        for layer in layers:
            _refuse_misspelt(layer)
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


def rewrite_called(name: str) -> str | None:
    """The rewrite called `name`, in whatever spelling."""
    return next((target for target in TARGETS if spelling(target) == spelling(name)), None)


def near_rewrite(name: str) -> str | None:
    """The rewrite that is meant by `name`, if that is no layer and nearer to a rewrite than to any."""
    rewrites = {spelling(target): target for target in TARGETS}
    layers = [spelling(text) for e in ZOO for text in (e.name, *(cls.__name__ for cls in e.exported))]
    near = difflib.get_close_matches(spelling(name), [*layers, *rewrites], 1)
    return rewrites.get(near[0]) if near else None


def _refuse_misspelt(layer: str) -> None:
    if target := near_rewrite(layer):
        raise SourceError(f"there is no layer called {layer!r}; did you mean --to {target}?")


def _rewrite(arguments: argparse.Namespace, target: str) -> int:
    """Shows a rewrite and its proof, and writes the result."""

    def plan(source: Source, given: Tensor | None) -> Rewrite:
        if given is not None and source.has_weights:
            common.check_input(source.model, given)
        sample = source.sample if given is None else given
        if sample is None and source.has_weights:
            raise SourceError(
                f"--to {target} has to run the model, and no input is known for it; give one with --input, "
                "or name a factory that returns (model, sample)"
            )
        return planned("convert", source.model, sample, to=target, **_options(arguments, target))

    return common.run("convert", arguments, plan, _prove)


def _prove(made: Rewrite, *_: Any) -> tuple[StreamProof, str]:
    """The proof, without which there is no result.

    Raises:
        SourceError: nothing can be proved, and why.
    """
    try:
        return made.verify(), ""
    except Unshown as reason:
        raise SourceError(f"there is no proof, and nothing is written: {reason}") from reason
    except Exception as error:  # of the model, which is the user's
        raise SourceError(
            f"there is no proof, and nothing is written: the rewritten model does not run ({said(error)})"
        ) from error


def _options(arguments: argparse.Namespace, target: str) -> dict[str, Any]:
    found = {name: getattr(arguments, name) for name in (*_OF_TARGET[target], "include", "exclude")}
    return {name: value for name, value in found.items() if value is not None}
