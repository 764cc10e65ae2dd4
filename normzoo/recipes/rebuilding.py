"""A layer of this library as plain values, and the layer again from these."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..centering import ZeroMean, plain_class
from ..conversion.adapted import adapted, bare_class, manner
from ..conversion.report import a
from ..folding.steps import Folded
from ..layers.weight_standardization import WeightStandardization
from ..zoo import ZOO

PARAMETRIZATIONS: dict[str, type[nn.Module]] = {cls.__name__: cls for cls in (ZeroMean, WeightStandardization)}

LAYERS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (*(cls for entry in ZOO for cls in entry.exported), Folded)
    if cls.__name__ not in PARAMETRIZATIONS
}
"""What may stand in a model. Names in a recipe are looked up here, and nowhere else."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid),
        *(nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh),
    )
}
"""What the act_layer of an EvoNorm may be."""

Value = Any
"""Of JSON: None, a bool, a number, text, or a list of these."""


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The class among LAYERS that `module` is of, as this library made it; None where it is another, or one
    derived from it."""
    cls = type(module)
    if parametrize.is_parametrized(module) and cls.__name__.startswith("Parametrized"):
        cls = cls.__bases__[0]
    cls = bare_class(plain_class(cls))
    return cls if LAYERS.get(cls.__name__) is cls else None


def arguments_of(module: Any, cls: type[nn.Module]) -> dict[str, Value]:
    """The constructor arguments that `module`, of `cls`, has now.

    Raises:
        ValueError: one has a value that is none of JSON.
    """
    found = {}
    for name in _parameters(cls):
        value = _ASKED[name](module) if name in _ASKED else getattr(module, name)
        if value is not _UNKNOWN:
            found[name] = _plain(f"{name} of its {cls.__name__}", value)
    return found


def manner_of(module: nn.Module) -> dict[str, Value]:
    """How it applies its layer, in the terms of :func:`adapted`; empty where as the layer is."""
    how = manner(module)
    if not how:
        return {}
    return {"over_channels": "axis" in how, "then": [*how["after"]], "any_rank": "dims" in how}


def build(
    table: Mapping[str, type[nn.Module]],
    name: str,
    arguments: Mapping[str, Value],
    how: Mapping[str, Value],
    **where: Any,
) -> nn.Module:
    """The layer or parametrization called `name` in `table`.

    Raises:
        ValueError: there is none, or it cannot be made from these arguments.
    """
    cls = table.get(name)
    if cls is None:
        raise ValueError(f"there is no {name!r}; there are {', '.join(table)}")
    parameters = _parameters(cls)
    given = {}
    for key, value in arguments.items():
        if key not in parameters:
            raise ValueError(
                f"{name} has no argument {key!r} that a recipe may give; it has {', '.join(parameters)}"
            )
        if key == "act_layer":
            value = _activation(name, value)
        elif not _fits(value, str(parameters[key].annotation)):
            raise ValueError(f"{name}: {key} is {value!r}; it must be {parameters[key].annotation}")
        given[key] = tuple(value) if isinstance(value, list) else value
    if how:
        cls = adapted(cls, how["over_channels"], tuple(how["then"]), how["any_rank"])
    try:
        return cls(**given, **{key: value for key, value in where.items() if key in _places(cls)})
    except (TypeError, ValueError, RuntimeError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"{a(name)} cannot be made of {dict(arguments)}: {error}") from error


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names, those outside of the state dict too."""
    return dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    )


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """What a recipe says of the constructor: the model decides on the rest, ranks and place."""
    found = inspect.signature(cls).parameters
    return {n: p for n, p in found.items() if n not in ("device", "dtype", "process_group")}


def _places(cls: type[nn.Module]) -> set[str]:
    return {"device", "dtype"} & inspect.signature(cls).parameters.keys()


_UNKNOWN = object()
"""Another argument says the same."""


def _bias(module: Any) -> bool:
    return getattr(module, "bias" if hasattr(module, "bias") else "offset") is not None


def _act_layer(module: Any) -> Any:
    activation = getattr(module, "act", None)
    cls = _ACTIVATIONS.get(type(activation).__name__)
    if cls is None or type(activation) is not cls or repr(cls()) != repr(activation):
        return _UNKNOWN  # it has to come from the model
    return cls.__name__


_ASKED: dict[str, Callable[[Any], Any]] = {
    "bias": _bias,
    "track_running_stats": lambda module: module.running_mean is not None,
    "outputs": lambda module: None if module.gain is None else len(module.gain),
    "act_layer": _act_layer,
    "group_size": lambda module: _UNKNOWN,
    "test_weight": lambda module: _UNKNOWN,
}
"""How to know the arguments that have no attribute of their name."""


def _activation(layer: str, name: Value) -> type[nn.Module]:
    cls = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"{layer}: act_layer is {name!r}; it must be one of {', '.join(_ACTIVATIONS)}")
    return cls


def _plain(what: str, value: Any) -> Value:
    if value is None or isinstance(value, (bool, str)):
        return value
    for number in (int, float):
        if isinstance(value, number):
            return number(value)  # numpy has classes of its own
    if isinstance(value, (tuple, list, torch.Size)):
        return [_plain(what, each) for each in value]
    raise ValueError(f"{what} is {value!r}, {a(type(value).__name__)}, which has no place in a recipe")


def _fits(value: Value, annotation: str) -> bool:
    """Whether a value may be of the type that the constructor names; coarse, for it has checks of its own."""
    if isinstance(value, list):
        several = any(word in annotation for word in ("Sequence", "tuple", "Tuple"))
        kind = str if "[str]" in annotation else int
        return several and all(type(each) is kind for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    words = {
        type(None): ("None", "Optional"),
        bool: ("bool",),
        int: ("int", "float"),
        float: ("float",),
        str: ("str", "Literal"),
    }
    return any(word in annotation for word in words.get(type(value), ()))
