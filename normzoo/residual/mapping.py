"""A residual stream as the user names it, where a run does not show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..conversion.layouts import layout_of
from ..conversion.report import a
from ..conversion.rules import matches, patterns
from .finding import Found
from .stream import Writer

KEYS = ("norms", "writers", "centered_outputs")

ModuleMap = Mapping[str, str | Sequence[str]]


def mapped(model: nn.Module, module_map: ModuleMap, norms: Sequence[str], caller: str) -> Found:
    """What a map says of the streams of `model`.

    Args:
        module_map: under ``norms``, ``writers`` and ``centered_outputs`` names, globs or ``"re:..."``: of
            norms; of modules that write the stream, or of parameters whose last dimension is that of the
            stream; and of modules whose output has its mean taken away.
        norms: the norms that may be meant.

    Raises:
        TypeError, ValueError: a key is unknown, a name matches nothing, or it is not known along which
            dimension a module writes.
    """
    if not isinstance(module_map, Mapping):
        raise TypeError(f"{caller}: module_map is {a(type(module_map).__name__)}; it must be a mapping")
    if unknown := sorted(set(module_map) - {*KEYS}):
        raise ValueError(f"{caller}: module_map has the key {unknown[0]!r}; it takes {', '.join(KEYS)}")
    named = {key: patterns(caller, f"module_map[{key!r}]", value) for key, value in module_map.items()}
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    found = Found()
    for pattern in named.get("norms", ()):
        found.norms |= _matching(pattern, norms, "LayerNorm", caller)
    for pattern in named.get("centered_outputs", ()):
        found.centered_outputs |= dict.fromkeys(_matching(pattern, modules, "module", caller), -1)
    for pattern in named.get("writers", ()):
        for name in sorted(_matching(pattern, [*modules, *tensors], "module and no parameter", caller)):
            found.writers |= {
                *(_writers(name, modules[name], caller) if name in modules else [Writer(name, -1)])
            }
    found.left = {name: "module_map does not name it" for name in norms if name not in found.norms}
    return found


def _matching(pattern: str, names: Any, what: str, caller: str) -> set[str]:
    found = {name for name in names if name and matches(pattern, [name])}
    if not found:
        raise ValueError(f"{caller}: {pattern!r} in module_map matches no {what} of the model")
    return found


def _writers(name: str, module: nn.Module, caller: str) -> Iterator[Writer]:
    """Weight and bias of a module, along the dimension of what it returns."""
    layout = layout_of(module)
    if layout is None:
        raise ValueError(
            f"{caller}: {name!r} in module_map is {a(type(module).__name__)}, and it is not known along which "
            "dimension that writes; name its parameters whose last dimension is that of the stream"
        )
    yield Writer(f"{name}.weight", layout.out)
    if getattr(module, "bias", None) is not None:
        yield Writer(f"{name}.bias", 0)
