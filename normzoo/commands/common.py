"""What the commands about a model share: arguments, samples, proofs, and files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..conversion.proof import Proof
from ..files import whole
from ..model_source import Source, SourceError, said
from ..recipes.files import KEY, text_of
from ..recipes.saving import recipe_of
from ..side_inputs import MissingInput

WRAP = ("computes", "notes")


def result_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that change a model: what it is tried on, and where the result goes."""
    parser.add_argument(
        "--input", metavar="SIZES", help="sizes of a random input to try the model on, such as 2,3,224,224"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and its proof, write nothing")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the converted weights to a new file, as safetensors; this or --dry-run is needed",
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


class Provable(Protocol):
    """What can be tried on a sample: a plan."""

    def verify(self, sample: Any) -> Proof: ...


class Change(Protocol):
    """What is written once it is applied: a plan, or a rewrite."""

    def apply(self) -> nn.Module: ...

    def to_json(self) -> str: ...


def aside() -> contextlib.redirect_stdout:
    """What a model prints is no result."""
    return contextlib.redirect_stdout(sys.stderr)


def usage(command: str, error: Exception | str) -> int:
    """Says what is wrong; the exit code."""
    print(f"normzoo {command}: {spelt(str(error).removeprefix('convert: '))}", file=sys.stderr)
    return 2


def spelt(text: str) -> str:
    """`text` with a constructor argument that is asked for as the command line takes it."""
    return re.sub(r"\bpass (\w+)=(?!\w)", r"pass --option \1=N", text)


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
        sizes = ",".join(map(str, given.shape))
        raise SourceError(
            f"--input is {sizes}, and the model does not run on random numbers of these sizes "
            f"({said(error)}); for other inputs name a factory that returns (model, sample)"
        ) from error


def check_out(arguments: argparse.Namespace) -> None:
    """Raises SourceError unless there is one of ``--dry-run`` and ``--out``, and that names a new file."""
    out = arguments.out
    if arguments.dry_run == (out is not None):
        raise SourceError("say --dry-run to see the plan, or --out FILE to write the converted weights")
    if out is None:
        return
    if out.exists():
        raise SourceError(f"--out is {str(out)!r}, which exists already; name another file")
    if not out.parent.is_dir():
        raise SourceError(f"--out is {str(out)!r}, and there is no folder {str(out.parent)!r}; make it first")
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
