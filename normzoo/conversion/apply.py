"""Replacing the norms of a model: every replacement is built before the first one is put in place."""

from __future__ import annotations

import inspect
from collections import Counter

from torch import nn

from ..zoo import ZOO, Entry
from . import refusals


def convert(model: nn.Module, to: str | type[nn.Module]) -> nn.Module:
    """Replace torch's norms by normzoo's of the same mathematics, in place.

    The new modules hold the very same Parameter and buffer objects, so optimizers, tied weights,
    ``requires_grad``, dtype and device stay as they are, on the meta device too; ``training`` and attributes
    set by the user come along. A norm registered under several names or parents stays one shared module.

    Only modules whose type is exactly torch's class are replaced: a subclass may compute something else.
    :class:`torch.nn.TransformerEncoderLayer` in eval mode without grad reads the weight, bias and eps of its
    norms and never calls them; as these are the same after a conversion, so is its output, though torch's
    fused code computes it. Python references to a replaced norm outside the module tree keep the old one.

    Args:
        model: any module, itself a norm perhaps.
        to: name or class of a layer with a counterpart in torch, such as ``"layer_norm"`` or
            :class:`normzoo.RMSNorm`.

    Returns:
        `model`, or the new module where `model` itself was replaced.

    Raises:
        TypeError: `model` is no module, or `to` is neither a name nor a class.
        ValueError: `to` is unknown or has no counterpart in torch; nothing matches; a norm carries hooks,
            parametrizations or a forward of its own, which would be lost; the model is wrapped (DDP, FSDP,
            torch.compile, TorchScript). The model is left as it was.

    >>> from torch import nn
    >>> convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "layer_norm")[1]
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is a {type(model).__name__}; it must be a torch.nn.Module")
    entry, source = _target(to)
    refusals.wrapped(model)
    made = {}
    for name, module in model.named_modules():
        if refusals.is_source(name, module, source):
            made[module] = _replacement(name, module, entry)
    if not made:
        raise ValueError(_nothing(model, entry, source))
    for parent in list(model.modules()):
        # _modules rather than named_children, which hides the second name of a shared child.
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(model, model)


def _target(to: str | type[nn.Module]) -> tuple[Entry, type[nn.Module]]:
    """The entry that `to` means, and the class of torch it replaces."""
    possible = ", ".join(entry.name for entry in ZOO if entry.torch_class)
    if isinstance(to, str):
        entry = next((entry for entry in ZOO if to in (entry.name, entry.cls.__name__)), None)
        if entry is None:
            raise ValueError(f"convert: there is no layer called {to!r}; use one of {possible}")
    elif isinstance(to, type):
        entry = next((entry for entry in ZOO if entry.cls is to), None)
        if entry is None:
            raise ValueError(
                f"convert: {to.__module__}.{to.__qualname__} is not a layer of normzoo; use one of {possible}"
            )
    else:
        raise TypeError(f"convert: to is a {type(to).__name__}; it must be the name or the class of a layer")
    if entry.torch_class is None:
        raise ValueError(
            f"convert: {entry.name} has no counterpart in torch, so there is nothing it replaces with the "
            f"same result; use one of {possible}, or put {entry.cls.__name__} into the model by hand"
        )
    return entry, entry.torch_class


def _replacement(name: str, module: nn.Module, entry: Entry) -> nn.Module:
    """A module of the entry's class that holds the tensors of `module`."""
    arguments = {}
    for argument in inspect.signature(type(module)).parameters:
        if argument not in ("device", "dtype"):
            value = getattr(module, argument)
            # `bias` is a switch in the constructor and a parameter, or None, on the module.
            arguments[argument] = value is not None if argument == "bias" else value
    try:
        # On meta, because the tensors made here are dropped at once.
        new = entry.cls(**arguments, device="meta")
    except (TypeError, ValueError) as error:
        raise ValueError(f"convert: {refusals.called(name)} cannot become a {entry.name}: {error}") from error
    for attribute, value in vars(module).items():
        if attribute in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            vars(new)[attribute].update(value)
        elif attribute not in vars(new):
            vars(new)[attribute] = value
    new.training = module.training
    return new


def _nothing(model: nn.Module, entry: Entry, source: type[nn.Module]) -> str:
    seen = Counter(
        f"{type(module).__module__}.{type(module).__qualname__}"
        for module in model.modules()
        if any("norm" in base.__name__.lower() for base in type(module).__mro__)
    )
    found = ", ".join(f"{count} {name}" for name, count in sorted(seen.items())) or "none"
    return (
        f"convert: {entry.name} replaces torch.nn.{source.__name__} and no subclass of it, and the "
        f"model has no such module; norm classes seen: {found}"
    )
