"""States of handles, read with care: what a file holds may be of another model, or nothing of the kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..conversion.trial import short
from ..radial import local
from .projecting import Held
from .refusals import CALLER
from .reporting import PENDING, Row, rows_from


@dataclass(frozen=True)
class Saved:
    """What a state says."""

    steps: int
    initial: dict[str, float]
    """Norms at the start, by the names of parameters."""
    held: list[Held]
    rows: list[Row]
    masters: dict[str, Tensor]

    @property
    def pending(self) -> bool:
        return any(row.verdict == PENDING for row in self.rows)


def read(
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    initial: Collection[str],
) -> Saved:
    """What `state` says.

    Args:
        options: of the call, which those of the state must equal.
        parameters: that the optimizer trains.
        initial: names of those whose norm at the start must be there.

    Raises:
        ValueError: the state is not one of this model and these options.
    """
    wanted = ("steps", "initial", "held", "rows", "masters", *options)
    if missing := [key for key in wanted if key not in state]:
        raise ValueError(f"{CALLER}: the state dict has no {', '.join(missing)}; load what state_dict() gave")
    for key, here in options.items():
        if state[key] != here:
            raise ValueError(
                f"{CALLER}: the state dict is of a call with {key}={state[key]!r}, this has {key}={here!r}; "
                "call normalize_and_project with the same arguments"
            )
    try:
        found = Saved(
            int(state["steps"]),
            {str(name): float(radius) for name, radius in state["initial"].items()},
            [Held(tuple(names), float(radius), float(shift)) for names, radius, shift in state["held"]],
            rows_from(state["rows"]),
            dict(state["masters"]),
        )
        shapes = {name: tuple(local(t).shape) for name, t in found.masters.items()}
        pending = found.pending
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{CALLER}: the state dict cannot be read ({short(error)}); load what state_dict() gave"
        ) from error
    for row in found.rows:
        _check_known(parameters, row.name, row.shape)
    for name in (*found.initial, *shapes, *(name for each in found.held for name in each.names)):
        _check_known(parameters, name)
    for name, shape in shapes.items():
        if shape != local(parameters[name]).shape:
            raise ValueError(
                f"{CALLER}: the float32 copy of {name} has shape {shape}, the parameter has "
                f"{tuple(parameters[name].shape)}; load the state of this model, on as many ranks"
            )
    if pending and (unknown := [name for name in initial if name not in found.initial]):
        raise ValueError(
            f"{CALLER}: the state dict has no norm at the start of {', '.join(unknown[:3])}; load the state of "
            "this model with this optimizer"
        )
    return found


def _check_known(parameters: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None) -> None:
    known = parameters.get(name)
    if known is None or (shape is not None and tuple(known.shape) != shape):
        what = "no such parameter" if known is None else f"one of shape {tuple(known.shape)}"
        raise ValueError(
            f"{CALLER}: the state dict is about {name}{'' if shape is None else f' {shape}'}; the "
            f"optimizer has {what}: load the state of this model"
        )
