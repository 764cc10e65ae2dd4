"""Learned scale and offset of norms, which have no norm to be put back to but sqrt(d)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.recognise import sites
from .projecting import Held, Masters, norms
from .reporting import OF_NORM, Row

MODES = ("joint", "free", "decay", "off")
FAR = "with scales and offsets that are not at the norm"


@dataclass(frozen=True)
class Affine:
    """The scale and the offset of one norm, as far as the optimizer trains them."""

    scale: str
    offset: str | None
    shift: float
    """What is applied is `shift` + scale."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.scale, self.offset) if self.offset else (self.scale,)


def affines(model: nn.Module, names: Mapping[int, str]) -> tuple[list[Affine], dict[str, str]]:
    """Those of `model`, and further parameters of norms with why they are left alone.

    Args:
        names: of the parameters that the optimizer trains, by their id.
    """
    found, left = [], {}
    taken: set[str] = set()
    for site in sites(model):
        own = {leaf: names.get(id(p), "") for leaf, p in site.module._parameters.items() if p is not None}
        own = {leaf: name for leaf, name in own.items() if name and name not in taken}
        norm = site.norm
        scale, offset = (own.get(leaf or "") for leaf in ((norm.weight, norm.bias) if norm else ("", "")))
        taken.update(own.values())
        if norm is None:
            left |= dict.fromkeys(own.values(), "of a norm that is not recognised")
            continue
        if scale is not None:
            found.append(Affine(scale, offset, norm.offset))
        elif offset is not None:
            left[offset] = "an offset without a scale that is trained"
        left |= {name: "" for name in own.values() if name not in (scale, offset)}
    return found, left


def joint(found: Sequence[Affine], parameters: Mapping[str, Tensor]) -> tuple[list[Held], list[Row], list[str]]:
    """Sets of scale and offset with the norm sqrt(d), their rows, and the scales that start elsewhere."""
    held, rows, far = [], [], []
    for each in found:
        scale = parameters[each.scale]
        with torch.no_grad():
            tensors = [scale + each.shift if each.shift else scale]
            tensors += [parameters[each.offset]] if each.offset else []
            now, radius = math.hypot(*norms(tensors)), math.sqrt(scale.numel())
        note = "scale and offset at joint norm sqrt(d)" if each.offset else "scale at norm sqrt(d)"
        if not now:
            radius, note = 0.0, "scale and offset start at zero" if each.offset else "scale starts at zero"
        elif abs(now / radius - 1) > 1e-3:
            note += f", from {now / radius:.2g} sqrt(d)"
            far.append(each.scale)
        held.append(Held(each.names, radius, each.shift))
        rows += _rows(each, parameters, note, bool(radius))
    return held, rows, far


def others(found: Sequence[Affine], parameters: Mapping[str, Tensor], note: str) -> list[Row]:
    """The rows of those that are not projected."""
    return [row for each in found for row in _rows(each, parameters, note, False)]


def _rows(each: Affine, parameters: Mapping[str, Tensor], note: str, projected: bool) -> list[Row]:
    return [Row(name, tuple(parameters[name].shape), OF_NORM, projected, note) for name in each.names]


class Decay:
    """Draws scales to 1 and offsets to 0, by lr · `rate` of the rest a step."""

    def __init__(
        self,
        found: Sequence[Affine],
        parameters: Mapping[str, Tensor],
        groups: Iterable[dict[str, Any]],
        rate: float,
        masters: Masters,
    ) -> None:
        group_of = {id(p): group for group in groups for p in group["params"]}
        self.rate, self.masters = rate, masters
        self.targets = []
        for each in found:
            for name, target in ((each.scale, 1.0 - each.shift), (each.offset, 0.0)):
                if name is not None:
                    masters.keep(name, parameters[name])
                    self.targets.append((name, parameters[name], target, group_of[id(parameters[name])]))

    @torch.no_grad()
    def __call__(self) -> None:
        for name, p, target, group in self.targets:
            here = self.masters.working(name, p)
            step = group["lr"] * self.rate
            here.sub_((here - target) * step)
            self.masters.write(name, p)
