"""Parameters of another shape, new biases and ties, for a model that is to become that of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.layouts import layout_of
from ..conversion.report import a
from ..conversion.tying import untie
from ..folding.steps import Folded
from . import describing
from .describing import held
from .files import DTYPES, Recipe, Shape

Find = Mapping[str, nn.Module]
"""Modules by all of their names."""


OTHER = "which no conversion makes of it: make the model with the settings that it was converted with"


def kind_of(dtype: torch.dtype) -> str:
    """What a tensor cannot change without being another thing."""
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


@dataclass(frozen=True)
class Changes:
    """What a conversion may have done to the tensors of modules that are none of this library's layers."""

    widths: Collection[int]
    """Those of norms: where a stream has one entry less, tensors become that wide."""
    folded: Collection[str]
    """Modules that a norm was folded into, which may have got a bias."""

    def explain(self, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
        """Whether a tensor of one shape can have become one of the other."""
        if len(old) != len(new):
            return False
        return all(a == b or (a == b + 1 and b in self.widths) for a, b in zip(old, new, strict=True))


def changes_of(recipe: Recipe) -> Changes:
    shapes = (layer.arguments.get("normalized_shape") for layer in recipe.layers)
    widths = {
        shape[0] for shape in shapes if isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int
    }
    into = (layer.arguments.get("into") for layer in recipe.layers if layer.layer == Folded.__name__)
    names = [name for those in into if isinstance(those, list) for name in those if isinstance(name, str)]
    return Changes(widths, {*names})


def reshape(modules: Find, name: str, wanted: Shape, changes: Changes) -> bool:
    """Gives the parameter `name` the shape that is wanted, or makes it where a conversion may have made one.

    Returns:
        Whether it had another.

    Raises:
        ValueError: there is no such tensor, or no conversion gives it that shape.
    """
    parent, _, leaf = name.rpartition(".")
    module = modules.get(parent)
    table: dict[str, Any] = {} if module is None else module._buffers if wanted.buffer else module._parameters
    if module is None or leaf not in table:
        raise ValueError(f"the recipe has {_said(name, wanted)}, and the model has none of that name")
    tensor = table[leaf]
    if tensor is None:
        if wanted.buffer:
            raise ValueError(f"the recipe has {_said(name, wanted)}, and the model has None there")
        if leaf != "bias" or not (parent in changes.folded or changes.widths):
            raise ValueError(f"the recipe has {_said(name, wanted)}, and the model has None there, {OTHER}")
        around = [*module.parameters(), *(p for each in modules.values() for p in each.parameters())]
        like = next((p for p in around if p.is_floating_point()), torch.empty(0))
        new = torch.zeros(wanted.shape, dtype=like.dtype, device=like.device)
        table[leaf] = nn.Parameter(new, requires_grad=like.requires_grad)
        return True
    if (*tensor.shape,) != wanted.shape:
        _refuse_shape(module, name, leaf, tensor, wanted, changes)
        new = torch.zeros(wanted.shape, dtype=tensor.dtype, device=tensor.device)
        table[leaf] = nn.Parameter(new, requires_grad=tensor.requires_grad)
        return True
    if kind_of(tensor.dtype) != kind_of(DTYPES[wanted.dtype]):
        raise ValueError(f"the recipe has {_said(name, wanted)}, and in the model it is of {tensor.dtype}")
    return False


def _said(name: str, wanted: Shape) -> str:
    return f"a {'buffer' if wanted.buffer else 'parameter'} {name!r} of shape {wanted.shape} in {wanted.dtype}"


def _refuse_shape(
    module: nn.Module, name: str, leaf: str, tensor: Tensor, wanted: Shape, changes: Changes
) -> None:
    """Raises ValueError where the rest of the module would not follow."""
    differ = f"the recipe has {_said(name, wanted)}, and in the model its shape is {(*tensor.shape,)}"
    if wanted.buffer or not changes.explain((*tensor.shape,), wanted.shape):
        raise ValueError(f"{differ}, {OTHER}")
    if layout_of(module) is None and _of_torch(module):
        raise ValueError(f"{differ}, which {a(type(module).__name__)} cannot follow")


def _of_torch(module: nn.Module) -> bool:
    """Whether its mathematics are torch's, and go by attributes of their own."""
    modules = (base.__module__ for base in type(module).__mro__)
    return any(
        name.startswith("torch.nn.modules.") and name.rpartition(".")[2] not in ("module", "container")
        for name in modules
    )


def _table(modules: Find, name: str) -> dict[str, Any]:
    """What holds a tensor."""
    parent, _, leaf = name.rpartition(".")
    module = modules[parent]
    return module._parameters if leaf in module._parameters else module._buffers


def tie(
    root: nn.Module, groups: Collection[tuple[str, ...]], kept: Collection[int]
) -> Iterator[Callable[[], None]]:
    """Makes one tensor of every group of names, and of no others; yields what undoes it outside of the tables.

    Args:
        kept: ids of tensors that go before others of their group.
    """
    modules, now = by_name(root), held(root)
    of_group = {name: names for names in groups for name in names}
    owner: dict[int, tuple[str, ...]] = {}
    for name, tensor in now.items():
        names = of_group.get(name, (name,))
        if owner.setdefault(id(tensor), names) != names:
            yield untie(root, name)
            now[name] = _table(modules, name)[name.rpartition(".")[2]]
    for names in groups:
        found = [now[name] for name in names if name in now]
        first = next((t for t in found if id(t) in kept), *found[:1])
        for name in names:
            if now.get(name) is not first and name in now:
                _table(modules, name)[name.rpartition(".")[2]] = first


def by_name(root: nn.Module) -> dict[str, nn.Module]:
    return dict(root.named_modules(remove_duplicate=False))


def differences(root: nn.Module, wanted: Mapping[str, Shape]) -> Iterator[str]:
    """How the tensors of `root` differ from those of a recipe; dtypes may."""
    now = describing.shapes(root)
    for name, shape in wanted.items():
        if name not in now:
            yield f"the recipe has {_said(name, shape)}, and the model has none of that name"
        elif (now[name].shape, now[name].buffer) != (shape.shape, shape.buffer):
            yield f"the recipe has {_said(name, shape)}, and in the model it is {_said(name, now[name])}"
    for name, shape in now.items():
        if name not in wanted:
            yield f"the model has {_said(name, shape)}, and the recipe has none of that name"
