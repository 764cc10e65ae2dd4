"""What a conversion made of a model, read off the model alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..centering import ZeroMeanOutput
from ..conversion.luggage import FROZEN_FROM
from ..layers.ws_conv import CARRIERS
from .files import Centered, Layer, Parametrized, Recipe, Shape
from .rebuilding import (
    LAYERS,
    PARAMETRIZATIONS,
    arguments_of,
    build,
    layer_class,
    manner_of,
    tensors,
)

logger = logging.getLogger("normzoo")

PLAIN: dict[str, type[nn.Module]] = {cls.torch_class.__name__: cls.torch_class for cls in CARRIERS}


def describe(model: nn.Module) -> Recipe:
    """The recipe of `model`.

    Raises:
        ValueError: it holds a layer of this library that cannot be made again, or parameters without a shape.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found = Recipe((), (), {}, (), (), (), shapes(model), ties(model))
    layers, centered, parametrized, plain = [], [], [], {}
    for module, called in names.items():
        if layer_class(module) is not None:
            layers.append(described(module, tuple(called)))
        if isinstance(module, ZeroMeanOutput):
            centered.append(Centered(tuple(called), module.zero_mean_dim))
        parametrized += parametrizations(module, tuple(called))
        if PLAIN.get(type(module).__name__) is type(module):
            plain.setdefault(type(module).__name__, []).extend(called)
    groups = [m.process_group for m in names if getattr(m, "process_group", None) is not None]
    if groups:
        logger.warning(
            "save_recipe: %d layers share statistics in a process group of their own, which a recipe cannot "
            "hold: layers made from it take those of all ranks",
            len(groups),
        )
    return Recipe(
        tuple(layers),
        tuple(name for module, called in names.items() if type(module) is nn.Identity for name in called),
        {cls: tuple(called) for cls, called in plain.items()},
        tuple(centered),
        tuple(parametrized),
        tuple(name for module, called in names.items() if slow(module) for name in called),
        found.tensors,
        found.ties,
    )


def described(module: Any, names: tuple[str, ...]) -> Layer:
    """The layer of this library that `module` is.

    Raises:
        ValueError: it cannot be made again from what is known of it.
    """
    cls = layer_class(module)
    called = names[0] or "the model itself"
    if cls is None:
        raise ValueError(f"{called!r} is no layer of this library")
    try:
        arguments, how = arguments_of(module, cls), manner_of(module)
        again: Any = build(LAYERS, cls.__name__, arguments, how, device="meta")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{called!r} cannot be made again: {error}") from error
    if resting := bool(getattr(again, "track_running_stats", False) and not module.track_running_stats):
        again.track_running_stats = False
    own = {name: t.shape for name, t in tensors(again).items()}
    other = {name: t.shape for name, t in tensors(module).items() if own.get(name, t.shape) != t.shape}
    if again.extra_repr() != module.extra_repr() or other:
        raise ValueError(
            f"{called!r} cannot be made again: {cls.__name__}({module.extra_repr()}) would be "
            f"{cls.__name__}({again.extra_repr()}) from its arguments"
            + "".join(
                f", with {name} of shape {(*own[name],)}, not {(*shape,)}" for name, shape in other.items()
            )
        )
    made = {*again._modules, "parametrizations"}
    attributes = vars(module).keys() - vars(again).keys() - {FROZEN_FROM}
    old = vars(module).get(FROZEN_FROM)
    return Layer(
        names,
        cls.__name__,
        arguments,
        how,
        tuple(child for child in module._modules if child not in made),
        tuple(sorted(attributes)),
        resting,
        None if old is None else _thawed(*old),
    )


def _thawed(old: nn.Module, sources: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"sources": dict(sources)}
    if (cls := layer_class(old)) is not None:
        found |= {"layer": cls.__name__, "arguments": arguments_of(old, cls)}
        found |= {"how": how} if (how := manner_of(old)) else {}
    return found


def parametrizations(module: nn.Module, names: tuple[str, ...]) -> list[Parametrized]:
    """The tensors of `module` with parametrizations of this library."""
    if not parametrize.is_parametrized(module):
        return []
    found = []
    for tensor, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
        links = tuple(map(_link, chain))
        if any(links):
            found.append(Parametrized(names, tensor, links))
    return found


def _link(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    cls = PARAMETRIZATIONS.get(type(module).__name__)
    return None if cls is None or type(module) is not cls else (cls.__name__, arguments_of(module, cls))


def slow(module: nn.Module) -> bool:
    """Whether it is an encoder, or a layer of one, that calls its norms in eval mode."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return not module.activation_relu_or_gelu
    return isinstance(module, nn.TransformerEncoder) and not module.use_nested_tensor


def held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers of the state dict, by all of their names.

    Raises:
        ValueError: a parameter has no shape yet.
    """
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        left = module._non_persistent_buffers_set
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or (table is module._buffers and name in left):
                    continue
                if is_lazy(tensor):
                    raise ValueError(f"{start}{name} has no shape yet; run the model once")
                found[start + name] = tensor
    return found


def shapes(model: nn.Module) -> dict[str, Shape]:
    return {
        name: Shape((*t.shape,), str(t.dtype).removeprefix("torch."), not isinstance(t, nn.Parameter))
        for name, t in held(model).items()
    }


def ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of tensors that have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in held(model).items():
        groups.setdefault(id(tensor), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
