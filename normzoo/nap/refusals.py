"""What Normalize-and-Project refuses before it changes anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..conversion import report
from ..conversion.rules import Names, matches
from ..radial import sharded
from .affine import MODES

CALLER = "normalize_and_project"
DECAY = 0.01


def check_arguments(
    model: Any, optimizer: Any, every: Any, scale_offset: Any, insert: Any, example: Any, decay: Any
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{CALLER}: optimizer is {report.a(type(optimizer).__name__)}; it must be a torch.optim.Optimizer"
        )
    checks.positive(CALLER, "every", every)
    checks.flag(CALLER, "insert", insert)
    checks.not_negative(CALLER, "decay", decay)
    if scale_offset not in MODES:
        raise ValueError(f"{CALLER}: scale_offset is {scale_offset!r}; it must be one of {', '.join(MODES)}")
    if decay != DECAY and scale_offset != "decay":
        raise ValueError(
            f"{CALLER}: decay={decay:g} is for scale_offset='decay'; with {scale_offset!r} leave it out"
        )
    if insert and example is None:
        raise ValueError(f"{CALLER}: insert=True has to run the model to see what comes in; pass example=")


def innermost(optimizer: Optimizer) -> Optimizer:
    """The one that steps, where another stands around it, as Accelerate's does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    for hook in optimizer._optimizer_step_post_hooks.values():
        if type(getattr(hook, "__self__", None)).__name__ == "NormalizeAndProject":
            raise ValueError(
                f"{CALLER}: this optimizer is projected already; call remove() of the first handle before"
            )
    for name, p in model.named_parameters():
        if type(p).__name__ == "FlatParameter":
            raise ValueError(
                f"{CALLER}: {name} is a flat parameter of FullyShardedDataParallel (FSDP1), which mixes "
                "weights; use torch.distributed.fsdp.fully_shard"
            )
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ValueError(
                f"{CALLER}: {name or 'the model'} is wrapped (FullyShardedDataParallel, FSDP1), whose "
                "parameters are parts of flat ones; use torch.distributed.fsdp.fully_shard"
            )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{CALLER}: the optimizer has none of the model's parameters; make it from model.parameters(), "
            "after the model was moved, converted or sharded"
        )


def check_placement(name: str, p: Tensor) -> None:
    if p.is_meta or nn.parameter.is_lazy(p):
        what = "on the meta device" if p.is_meta else "of a lazy module that has not run"
        raise ValueError(f"{CALLER}: {name} is {what}, so that it has no norm yet; give it values first")
    if sharded(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{CALLER}: {name} is a DTensor with a Partial placement, whose norm no rank knows; redistribute "
            "it to Shard or Replicate"
        )


def patterns_of(argument: str, value: Names | None) -> tuple[str, ...]:
    patterns = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{CALLER}: {argument} holds {pattern!r}; it must hold names, globs or 're:' expressions"
            )
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{CALLER}: {pattern!r} in {argument} is no regular expression: {error}") from None
    return patterns


def check_patterns(argument: str, patterns: Sequence[str], candidates: Mapping[str, Sequence[str]]) -> None:
    """`candidates`: by the first name of a weight, all that it has."""
    for pattern in patterns:
        if not any(fits((pattern,), names) for names in candidates.values()):
            known = ", ".join([*candidates][:20]) + (", ..." if len(candidates) > 20 else "")
            raise ValueError(
                f"{CALLER}: {pattern!r} in {argument} matches no weight of two dimensions or more that the "
                f"optimizer trains; there are {known or 'none'}"
            )


def fits(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of them names the parameter, by one of its names, or its module."""
    every = [each for name in names for each in (name, name.rpartition(".")[0])]
    return any(matches(pattern, every) for pattern in patterns)


def outside() -> int:
    """How many frames up the first one is that is not of this package, for a warning to point at."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("normzoo.nap"):
        depth, frame = depth + 1, frame.f_back
    return depth
