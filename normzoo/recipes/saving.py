"""Recipes: the architecture of a converted model as a file, to make it again before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion.report import a
from ..conversion.surgery import refuse_wrapped
from .describing import describe
from .files import read, write
from .refitting import Refit


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """What :func:`normzoo.save_recipe` writes, as a dict of JSON values.

    For the metadata of a safetensors file, put ``json.dumps`` of it under ``"normzoo.recipe"``.

    Args:
        model: any module.

    Raises:
        TypeError, ValueError: as there.

    >>> recipe_of(nn.Linear(2, 1))["tensors"]
    {'weight': {'shape': [1, 2], 'dtype': 'float32'}, 'bias': {'shape': [1], 'dtype': 'float32'}}
    """
    return _recipe_of(model, "recipe_of")


def save_recipe(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the architecture of a converted model to a JSON file, for :func:`normzoo.apply_recipe`.

    It is read off the model as it is now: the layers of this library in it with their arguments, what was
    folded away or centered, and names, shapes and ties of all parameters and buffers. It holds no weights, and
    of the rest of the model nothing but these shapes; the class of the model makes that.

    Args:
        model: any module.
        path: a file that is there is replaced.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is wrapped (DDP, FSDP, torch.compile), has parameters without a shape yet, or a layer of
            this library that was changed into what its constructor cannot make.

    >>> import tempfile
    >>> import normzoo
    >>> def make():
    ...     return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> model = normzoo.convert(make(), "time_dependent_layer_norm")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_recipe(model, f"{folder}/recipe.json")
    ...     again = apply_recipe(make(), f"{folder}/recipe.json")
    >>> again.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"save_recipe: path is {str(path)!r}, and a recipe is JSON; for the metadata of a safetensors file "
            'pass {"normzoo.recipe": json.dumps(normzoo.recipes.recipe_of(model))} to what writes it'
        )
    write(_recipe_of(model, "save_recipe"), path)


def apply_recipe(model: nn.Module, recipe: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Make the architecture of a converted model of a fresh one, in place, before weights are loaded.

    `model` is of the class, and was made with the settings, of the model that was converted. Tensors that keep
    their name and shape stay the very objects they are, so that weights of the original may be in it already,
    and its dtype and device stay; it may be on the meta device. Parameters of another shape are zero until
    weights are loaded. Hooks, attributes and buffers outside of the state dict that were given to a norm come
    along; the state dict is that of the recipe. Nothing in the file is run, imported or unpickled: names of
    layers are looked up in a fixed table, names of modules in the model alone.

    Args:
        model: any module, itself a norm perhaps.
        recipe: a JSON file of :func:`normzoo.save_recipe`; a ``.safetensors`` file that
            ``normzoo convert --out`` wrote, or that has a recipe in its metadata, of which the header alone is
            read; or what :func:`normzoo.recipes.recipe_of` returned.

    Returns:
        `model`, or the new module where `model` itself is replaced.

    Raises:
        TypeError: an argument is of another kind.
        OSError: the file cannot be read.
        ValueError: the recipe is of another version, holds a layer or an argument that this release does not
            know, or is damaged; it is the recipe of another model; the model is wrapped (DDP, FSDP,
            torch.compile). The model is left as it was.
    """
    _check(model, "apply_recipe")
    if not isinstance(recipe, (str, os.PathLike, Mapping)):
        raise TypeError(f"apply_recipe: recipe is {a(type(recipe).__name__)}; it must be a path, or a dict")
    refuse_wrapped(model, "apply_recipe", "apply the recipe to")
    try:
        found = read(recipe)
        refit = Refit(model, found)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                return refit.do()
        except BaseException:
            refit.undo()
            raise
    except ValueError as error:
        raise ValueError(f"apply_recipe: {error}") from error


def _recipe_of(model: nn.Module, caller: str) -> dict[str, Any]:
    _check(model, caller)
    refuse_wrapped(model, caller, "save the recipe of")
    try:
        return describe(model).to_dict()
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error


def _check(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is {a(type(model).__name__)}; it must be a torch.nn.Module")
