"""What the commands about a model share: arguments, samples, proofs, and files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..conversion.change import PARAMETERS_CHANGE
from ..conversion.proof import Proof
from ..conversion.samples import Sample, outputs
from ..files import whole
from ..model_source import Source, SourceError, load, pairs, said
from ..recipes.files import KEY, text_of
from ..recipes.saving import recipe_of
from ..side_inputs import MissingInput
from ..terminal import say, table

WRAP = ("computes", "notes")


EXITS = (
    "Exit codes: 0 fine, 1 the proof failed and nothing is written, 2 wrong usage or a refusal that says why, "
    "130 interrupted."
)

_WORDS = (
    (r"\bpass (\w+)=(?!\w)", r"pass --option \1=N"),
    (r"\bstrict=True\b", "--strict"),
    (r"\bin (include|exclude)\b", r"in --\1"),
    (r"\bas a key of to\b", "as the PATTERN of --to"),
    (r", or 'same'(?=;|$)", ", 'same' or 'keep', and the rewrites pre_rms_norm and pre_crms_norm"),
    (r"\bcall (normzoo\.to_pre_)", r"take \1"),
    (r"(?:normzoo\.)?\bto_(pre_c?rms_norm)\b(?:\(model, sample\))?", r"--to \1"),
    (r'\bzero_mean_writers="(\w+)"', r"--zero-mean-writers \1"),
    (r'\b(tied|basis)="(\w+)"', r"--\1 \2"),
    (r"(?:, and|;) the model is left as it was", ""),
)
"""What messages say to people who write Python, and what the command line takes instead."""


def result_arguments(parser: argparse.ArgumentParser, result: str) -> None:
    """The arguments of commands that change a model: what it is tried on, and where the `result` goes."""
    parser.add_argument(
        "--input", metavar="SIZES", help="sizes of a random input to try the model on, such as 2,3,224,224"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and its proof, write nothing")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"write the {result} weights to a new file NAME.safetensors; this or --dry-run is needed",
    )


def model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="module:factory or path.py:factory, where the factory is or returns a model, or (model, sample); "
        "hf:FOLDER, hf:LlamaConfig or hf:gpt2 for transformers; timm:resnet18; for hf and timm nothing is "
        "downloaded",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument for what makes the model; VALUE is JSON, or True, False or None, where it can be, "
        "else text; may be repeated",
    )


class Change(Protocol):
    """What is shown, proved and applied: a plan, or a rewrite."""

    def rows(self) -> tuple[Sequence[str], Sequence[tuple[str, ...]]]: ...

    def summary(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...

    def to_json(self) -> str: ...

    def apply(self) -> nn.Module: ...


class Provable(Change, Protocol):
    """What can be tried on a sample: a plan."""

    def verify(self, sample: Any) -> Proof: ...


class Shown(Protocol):
    """A proof."""

    @property
    def passed(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


Planned = TypeVar("Planned", bound=Change)


def run(
    command: str,
    arguments: argparse.Namespace,
    plan: Callable[[Source, torch.Tensor | None], Planned],
    prove: Callable[[Planned, Source, torch.Tensor | None], tuple[Shown | None, str]],
) -> int:
    """Loads a model, plans a change, proves it, shows both, and writes the result; returns the exit code.

    Args:
        plan: makes the change, of the model and the input that was asked for. Raises ValueError or TypeError
            where there is none.
        prove: the proof, or None and why it is left out. Raises SourceError where nothing may come of that.
    """
    try:
        check_out(arguments)
        with aside():
            source = load(arguments.model, pairs("--arg", arguments.arg))
            if arguments.out is not None:
                check_weights(source)
            given = None if arguments.input is None else random_sample(arguments.input, source.model)
            made = plan(source, given)
            proof, why_not = prove(made, source, given)
    except re.error as error:
        return usage(command, f"{error.pattern!r} after re: is no regular expression: {error}")
    except (ValueError, TypeError) as error:
        return usage(command, error)
    if arguments.json:
        dump(
            arguments,
            source,
            made.to_dict() | {"proof": proof and proof.to_dict(), "no_proof": why_not or None},
        )
    else:
        header, rows = made.rows()
        table(title(arguments.model, source), header, [tuple(map(spelt, row)) for row in rows], wrap=WRAP)
        say("\n".join(spelt(line) for line in made.summary().splitlines() if line != PARAMETERS_CHANGE))
        say(f"proof: {proof or why_not}")
    if proof is not None and not proof.passed:
        return 1
    if arguments.out is not None:
        try:
            write(made, arguments.out)
        except SourceError as error:
            return usage(command, error)
    return 0


def aside() -> contextlib.redirect_stdout:
    """What a model prints is no result."""
    return contextlib.redirect_stdout(sys.stderr)


def usage(command: str, error: Exception | str) -> int:
    """Says what is wrong; the exit code."""
    print(f"normzoo {command}: {spelt(str(error).removeprefix(f'{command}: '))}", file=sys.stderr)
    return 2


def spelt(text: str) -> str:
    """`text` with arguments and functions of Python as the command line takes them."""
    for python, ours in _WORDS:
        text = re.sub(python, ours, text)
    return text


def title(name: str, source: Source) -> str:
    """Of a table about a model."""
    return f"{name} ({source.note})"


def dump(arguments: argparse.Namespace, source: Source, found: dict[str, Any]) -> None:
    """Prints what was found as JSON."""
    print(json.dumps(_finite({"model": arguments.model, "note": source.note} | found), indent=2))


def _finite(value: Any) -> Any:
    """`value` with null for what JSON has no number for, such as the error of an output that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def random_sample(sizes: str, model: nn.Module) -> torch.Tensor:
    """Random numbers of these sizes, where the model is and in its dtype."""
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise SourceError(f"--input is {sizes!r}; it must be sizes, such as 2,3,224,224")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    except RuntimeError as error:
        raise SourceError(f"--input is {sizes!r}, which is too large: {said(error)}") from error


def prove(made: Provable, source: Source, given: torch.Tensor | None) -> tuple[Proof | None, str]:
    """The proof on the whole model, or why there is none.

    Raises:
        SourceError: the model does not run on the input that was `given`.
    """
    if not source.has_weights:
        return None, "left out: the model has no weights"
    if given is None and source.sample is None:
        return None, "left out: no input is known for this model; give one with --input"
    try:
        return made.verify(source.sample if given is None else given), ""
    except MissingInput as error:
        return None, f"left out: {error}"
    except Exception as error:  # of the model, which is the user's
        if str(error).startswith("verify: "):
            return None, f"left out: {str(error).removeprefix('verify: ')}"
        if given is None:
            return None, f"left out: the model does not run on its sample ({said(error)})"
        raise _misfit(given, error) from error


def check_input(model: nn.Module, given: torch.Tensor) -> None:
    """Raises SourceError unless the model runs on the input that was `given`."""
    try:
        outputs(model, Sample(given))
    except Exception as error:  # of the model, which is the user's
        raise _misfit(given, error) from error


def _misfit(given: torch.Tensor, error: Exception) -> SourceError:
    sizes = ",".join(map(str, given.shape))
    return SourceError(
        f"--input is {sizes}, and the model does not run on random numbers of these sizes "
        f"({said(error)}); for other inputs name a factory that returns (model, sample)"
    )


def check_out(arguments: argparse.Namespace) -> None:
    """Raises SourceError unless there is one of ``--dry-run`` and ``--out``, and that names a new file."""
    out = arguments.out
    if arguments.dry_run and out is not None:
        raise SourceError("--dry-run writes nothing, and --out a file; give one of them")
    if arguments.dry_run:
        return
    if out is None:
        raise SourceError("say --dry-run to see the plan, or --out NAME.safetensors to write the new weights")
    if out.exists():
        raise SourceError(f"--out is {str(out)!r}, which exists already; name another file")
    if not out.parent.is_dir():
        raise SourceError(f"--out is {str(out)!r}, and there is no folder {str(out.parent)!r}; make it first")
    if out.suffix != ".safetensors":
        raise SourceError(f"--out is {str(out)!r}; safetensors are written, so name it {out.stem}.safetensors")
    if importlib.util.find_spec("safetensors") is None:
        raise SourceError("--out needs safetensors; pip install safetensors")


def check_weights(source: Source) -> None:
    """Raises SourceError where a model has no weights to be written."""
    if not source.has_weights:
        raise SourceError("--out: the model has no weights to write")
    if source.unread:
        raise SourceError(f"--out: there are no weights to write: {source.unread}")


def write(made: Change, out: Path) -> None:
    """Applies a change and writes weights and recipe, as safetensors.

    Raises:
        SourceError: that failed, and `out` is not there.
    """
    from safetensors.torch import save_model

    try:
        with whole(out) as part:  # half a file must not pass for a checkpoint
            root = made.apply()
            about = {"normzoo": made.to_json(), KEY: text_of(recipe_of(root))}
            save_model(root, str(part), metadata=about)
    except Exception as error:  # safetensors has a class of its own for what the system says
        raise SourceError(f"--out is {str(out)!r}, and writing it failed ({said(error)})") from error
    print(
        f"wrote {out}; after normzoo.apply_recipe(model, {str(out)!r}) safetensors.torch.load_model puts it "
        "into the same model, made anew",
        file=sys.stderr,
    )
