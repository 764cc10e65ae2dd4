"""Which weights are scale invariant: tried out on a copy of the model, whose weights are doubled one by one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..conversion.samples import tensors_in
from ..conversion.trial import distance, noise, short
from .projecting import groups_over
from .rehearsing import EpsAside, Rehearsal, Unfit
from .reporting import CAUTIOUS, DEAD, INVARIANT, JUMPS, MOVES, WITH_BIAS

_SAME = 1e-6
"""An output that moves less, of what a change of the weight's direction moves it by, does not move."""
_NONE = 1e-9
"""A change of direction that moves the output less has no influence."""
_LITTLE = 1e-4
"""A change of direction, relative to the weight, that an output which does not jump follows in proportion."""
_FEW = "these inputs do not tell whether it is scale invariant; use more samples"


@dataclass(frozen=True)
class Finding:
    """What the check says of one weight."""

    verdict: str
    moved: float
    """How far the output moves when the weight is doubled, relative to its largest entry."""
    note: str = ""


def check(
    model: nn.Module,
    weights: Mapping[str, str | None],
    trained: Collection[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    groups: Sequence[Any],
) -> dict[str, Finding]:
    """What is found of each of `weights`, which have the bias that they are mapped to, if any.

    Args:
        trained: names of parameters that may change; those that have one value throughout, as at the start of
            training, get others for the check.
        groups: process groups whose ranks make the check together and agree on it.

    Raises:
        ValueError: the copy of the model does not run, returns something else each time, or nothing finite.
    """
    found, failure = {}, ""
    try:
        trial = _trial(model, trained, args, kwargs)
        for weight, bias in weights.items():
            found[weight] = _look(trial, weight, bias, bias in trained)
    except Exception as error:
        if not groups:
            raise
        failure = f"{type(error).__name__}: {error}"
    for group in groups:
        found, failure = _agreed(found, failure, group)
    if failure:
        raise ValueError(f"normalize_and_project: the check failed on a rank: {failure}")
    return found


def _look(trial: _Trial, weight: str, bias: str | None, bias_trains: bool) -> Finding:
    moved, verdict = trial.verdict([weight])
    if verdict == MOVES and bias is not None:
        together = trial.verdict([weight, bias])[1]
        if together == INVARIANT and not bias_trains:
            return Finding(MOVES, moved, f"invariant only with {bias}, which the optimizer does not train")
        verdict = {INVARIANT: WITH_BIAS, JUMPS: JUMPS}.get(together, MOVES)
    return Finding(verdict, moved, _FEW if verdict == JUMPS else "")


def _trial(
    model: nn.Module, trained: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Trial:
    """In float64, or where the model insists on another dtype or the device has no float64, in its own."""
    failure = None
    for dtype in (torch.float64, None):
        try:
            return _Trial(Rehearsal(model, args, kwargs, trained, dtype))
        except Unfit:
            raise
        except Exception as error:
            failure = failure or error
    raise Unfit(
        "normalize_and_project: a copy of the model does not run, so that its weights cannot be tried out "
        f"({failure and short(failure)}); pass other inputs as example=, or load the state dict of another run"
    ) from failure


class _Trial:
    """What the outputs of a model do when its weights change."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        self.before = self._outputs()
        drift = self._distance()
        if drift > _NONE:
            raise Unfit(
                "normalize_and_project: the model returns something else each time it runs on the same inputs "
                f"(by {drift:.1e} of the largest entry), so that its weights cannot be tried out; pass an "
                "example= on which it does not, or load a state dict"
            )

    def verdict(self, names: Sequence[str]) -> tuple[float, str]:
        """How far the outputs move when the tensors are doubled, and what that says of them."""
        moved = self._moved(names, scale=2.0)
        if moved > _SAME:
            return moved, MOVES
        turned = self._moved(names, turn=1.0)
        if turned <= _NONE:
            return moved, DEAD
        # Far up and down too: a clamp shows, or an activation that is a ReLU only where it is large.
        moved = max(moved, *(self._moved(names, scale=scale) for scale in (2.0**10, 2.0**-10)))
        if moved > _SAME * min(turned, 1.0):
            return moved, MOVES
        # A norm of two numbers gives 1 and -1, whatever made them: no doubling shows behind it.
        little = max(_LITTLE, *(8 * torch.finfo(self.rehearsal.tensors[name].dtype).eps for name in names))
        jumps = self._moved(names, turn=little) <= 0.01 * little * turned
        return moved, JUMPS if jumps else INVARIANT

    def _moved(self, names: Sequence[str], scale: float = 1.0, turn: float = 0.0) -> float:
        before = {name: self.rehearsal.tensors[name].clone() for name in names}
        chance = torch.Generator("cpu").manual_seed(1)
        with torch.no_grad():
            for name, old in before.items():
                self.rehearsal.tensors[name].mul_(scale)
                if turn:
                    size = turn * old.square().mean().sqrt()
                    self.rehearsal.tensors[name].add_(
                        noise(old.shape, chance).to(old) * torch.where(size > 0, size, turn)
                    )
        try:
            return self._distance()
        finally:
            with torch.no_grad():
                for name, old in before.items():
                    self.rehearsal.tensors[name].copy_(old)

    def _distance(self) -> float:
        now = self._outputs()
        if now.keys() != self.before.keys():
            return math.inf
        return max(distance(now[name], old, ()) for name, old in self.before.items())

    def _outputs(self) -> dict[str, Tensor]:
        found = tensors_in(self.rehearsal(EpsAside()))
        found = {name: t for name, t in found.items() if t.isfinite().any()}
        if not found:
            raise Unfit(
                "normalize_and_project: on these inputs the model returns no finite floating-point tensor, so "
                "that its weights cannot be tried out; pass others as example="
            )
        return found


def groups_of(parameters: Sequence[Any]) -> tuple[Any, ...]:
    """The process groups over which DTensors are spread, each once."""
    found = []
    for p in parameters:
        found += [group for group in groups_over(p) if group not in found]
    return tuple(found)


def biases(model: nn.Module, parameters: Collection[str]) -> dict[str, str]:
    """Of weights, the bias in the same module; also of torch's RNNs, and of parametrized and pruned weights."""
    pairs = model.named_parameters(remove_duplicate=False)
    all_names = {name for name, p in pairs if not nn.parameter.is_lazy(p) and p.dim() == 1}
    found = {}
    for name in parameters:
        prefix, _, leaf = name.rpartition(".")
        owner, parametrized, tensor = prefix.rpartition("parametrizations.")
        if parametrized:
            bias = owner + tensor.replace("weight", "bias")
        else:
            bias = f"{prefix}.{leaf.replace('weight', 'bias')}".lstrip(".")
        whole = bias.removesuffix("_orig").removesuffix("_v").removesuffix("_g")  # as old hooks call parts
        for each in (bias, whole):
            if each in all_names and each != name:
                found.setdefault(name, each)
    return found


def _agreed(found: dict[str, Finding], failure: str, group: Any) -> tuple[dict[str, Finding], str]:
    """The most cautious finding of all ranks: what has no influence on one may have some on another."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (found, failure), group)
    failures = [each[1] for each in every if each[1]]
    if failures:
        return found, failures[0]
    agreed = {}
    for name in found:
        of_ranks = [each[0][name] for each in every]
        worst = max(of_ranks, key=lambda each: CAUTIOUS.index(each.verdict))
        agreed[name] = replace(worst, moved=max(each.moved for each in of_ranks))
    return agreed, ""
