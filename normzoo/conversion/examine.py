"""What norms a model has, and what is to be known about each before anything is done to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from ..terminal import plain
from . import bypass, luggage, report
from .recognise import Site, sites
from .surgery import references

AnySite = TypeVar("AnySite", bound=Site)


@dataclass
class Inspection:
    """The norms of a model; ``print()`` shows them as a table."""

    sites: list[Site]
    functional: dict[str, tuple[str, ...]]
    """Classes that call a norm as a function, and which."""
    raw_weights: dict[str, str] = field(default_factory=dict)
    """Layers that standardize their weight, and the class of a parent that reads the raw one."""

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        items = []
        for site in self.sites:
            notes = "; ".join(filter(None, (site.note, *site.flags)))
            items.append((site.name, (site.cls.__name__, site.describe(), site.how or "-", notes), None))
        return ("norm", "class", "computes", "known by", "notes"), [row[:-1] for row in report.grouped(items)]

    def summary(self) -> str:
        """How many norms of which family there are, and what an inspection cannot see."""
        if not self.sites:
            lines = ["no norms"]
        else:
            lines = [
                f"{report.count(len(self.sites), 'norm')}: {report.tally(site.family for site in self.sites)}"
            ]
        lines += [
            f"{name} calls {', '.join(functions)} as a function" for name, functions in self.functional.items()
        ]
        lines += [
            f"{name} standardizes its weight, but {parent} reads the raw one itself"
            for name, parent in self.raw_weights.items()
        ]
        return "\n".join(lines)

    def table(self) -> str:
        """The inspection as text; norms that differ by a number in their name share a row."""
        return f"{plain(*self.rows())}\n\n{self.summary()}" if self.sites else self.summary()

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sites = [site.to_dict() for site in self.sites]
        return {"sites": sites, "functional": self.functional, "raw_weights": self.raw_weights}

    def to_json(self) -> str:
        """Every norm with all that is known about it."""
        return json.dumps(self.to_dict(), indent=2)


def inspect(model: nn.Module) -> Inspection:
    """The norms of a model: where they are, what each computes, and what stands in the way of a conversion.

    The class of torch and of this library are known; a subclass counts as one only where it inherits the
    forward. Of anything else that calls itself a norm, a copy runs beside the candidates: layer or RMS norm,
    over the last dimension or the channels, with ``w`` or ``1 + w``, in groups, a batch norm, a frozen one;
    in bfloat16 it shows where it rounds. What agrees with none stays unknown.

    Norms that are called as functions, such as ``F.layer_norm`` in a forward, are no modules: they are named
    by the class that calls them, as far as its source tells. So are layers that standardize their weight, such
    as :class:`normzoo.WSLinear`, where a parent reads the raw one.

    Args:
        model: any module, on any device, the meta device included. It is not changed.

    Raises:
        TypeError: `model` is no module.

    >>> print(inspect(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))))
    norm  class      computes               known by  notes
    ----  ---------  ---------------------  --------  -----
    1     LayerNorm  layer (4,), eps=1e-05  class
    <BLANKLINE>
    1 norm: 1 layer
    """
    found = examine(model, "inspect")
    functional = bypass.functional_norms(model, [site.module for site in found])
    return Inspection(found, functional, bypass.raw_weights(model))


def examine(model: nn.Module, caller: str) -> list[Site]:
    """The norms of `model` with their flags; errors name `caller`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")
    return look_around(model, sites(model))


def look_around(model: nn.Module, found: Sequence[AnySite]) -> list[AnySite]:
    """`found`, with what their surroundings in `model` say about each."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    outside = references(model, [site.module for site in found])
    for site in found:
        own = site.module._parameters.items()
        site.shared = tuple(name for name, p in own if p is not None and owners[id(p)] > 1)
        site.outside = outside.get(site.module, "")
        site.flags = list(_flags(site))
    return list(found)


def _is_layer_norm(site: Site) -> bool:
    """Whether its weight, bias and eps, put into torch's operator, give what it computes."""
    norm = site.norm
    return norm is not None and norm.family == "layer" and not (norm.offset or norm.after) and norm.axis == -1


def _flags(site: Site) -> Iterator[str]:
    module = site.module
    if len(site.names) > 1:
        yield f"also called {', '.join(site.names[1:])}"
    if site.shared:
        yield "shares a parameter with another module"
    if parametrize.is_parametrized(module):
        yield "parametrized"
    if kinds := luggage.hooks(module):
        yield f"has {', '.join(kinds)}"
    if site.outside:
        yield f"{site.outside} holds it too, outside the module tree"
    for parent, child in site.parents:
        if bypass.fast_path(parent, child):
            if bypass.takes_fast_path(parent):
                yield bypass.COMPUTED if _is_layer_norm(site) else bypass.REPLACED
        elif names := bypass.reads(parent, child):
            yield f"{type(parent).__name__} reads its {', '.join(names)} itself"
    momentum = getattr(module, "momentum", None)
    if site.family == "batch" and isinstance(momentum, float) and momentum > 0.5:
        yield f"momentum={momentum}: the running statistics are almost those of the last batch"
