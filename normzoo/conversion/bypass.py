"""Parents that read the tensors of their norm, or layer, themselves and never call it.

torch.nn.TransformerEncoderLayer does so in eval mode, the fused training paths of Mamba-like models too. A
replacement there is without effect, or breaks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from ..layers.ws_conv import Standardized
from .surgery import places

_READ = re.compile(
    r"\bself\.(\w+)\.(weight|bias|eps|variance_epsilon|running_mean|running_var)\b(?!\s*\.\s*(?:dtype|device|shape))"
)
_FUNCTIONAL = re.compile(r"\b(?:F|functional|torch)\.(\w*_norm|normalize)\(")
# Methods that prepare or describe a module and compute nothing, such as zero_init_last. All others count, even
# those that forward does not lead to: somebody outside the class may call them.
_SETTING_UP = re.compile(r"(^|_)(init|initiali[sz]e|reset|prune)(_|$)|^extra_repr$")

COMPUTED = "its encoder layer computes it itself in eval mode"
REPLACED = (
    "its encoder layer computes a LayerNorm in its place in eval mode without gradients, which is WRONG: call "
    "torch.backends.mha.set_fastpath_enabled(False)"
)
TURNED_OFF = "its encoder layer would compute it itself in eval mode: its fast path is turned off"
"""What is said of a norm in an encoder layer; the last where a plan changes a norm of that layer."""


def reads(parent: nn.Module, child: str) -> tuple[str, ...]:
    """The attributes of its `child` that the methods of `parent` read, as the source tells."""
    return _scan(type(parent))[0].get(child, ())


def functional_norms(model: nn.Module, norms: Collection[nn.Module]) -> dict[str, tuple[str, ...]]:
    """Classes in `model` that call a norm as a function, `norms` aside: no module, so nothing to replace."""
    classes = {type(module) for module in model.modules()} - {type(norm) for norm in norms}
    called = {cls.__qualname__: _scan(cls)[1] for cls in classes if not cls.__module__.startswith("torch.")}
    return {name: functions for name, functions in sorted(called.items()) if functions}


@functools.cache
def _scan(cls: type[nn.Module]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    functions: set[str] = set()
    for source in _sources(cls):
        for child, attribute in _READ.findall(source):
            found.setdefault(child, set()).add(attribute)
        functions.update(_FUNCTIONAL.findall(source))
    return {child: tuple(sorted(names)) for child, names in found.items()}, tuple(sorted(functions))


@functools.cache
def mentions(cls: type[nn.Module], pattern: str) -> bool:
    """Whether the source of a method of `cls` has the regular expression `pattern` in it."""
    return any(re.search(pattern, source) for source in _sources(cls))


def _sources(cls: type[nn.Module]) -> Iterator[str]:
    seen: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if inspect.isfunction(value) and name not in seen and not _SETTING_UP.search(name):
                seen.add(name)
                try:
                    yield inspect.getsource(value)
                except (OSError, TypeError):  # made at run time
                    continue


def fast_path(parent: nn.Module, child: str) -> bool:
    """Whether torch's fused encoder may compute the norm called `child` in its place."""
    return isinstance(parent, nn.TransformerEncoderLayer) and child in ("norm1", "norm2")


def raw_weights(model: nn.Module) -> dict[str, str]:
    """Layers that standardize their weight, by name, and the class of a parent that reads the raw one."""
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, Standardized)
    }
    return {
        names[module]: type(parent).__name__
        for module, held in (places(model) if names else {}).items()
        for parent, child in held
        if module in names
        and "weight" in reads(parent, child)
        # Of the encoder layer that is its fast path alone.
        and (not isinstance(parent, nn.TransformerEncoderLayer) or takes_fast_path(parent))
    }


def takes_fast_path(parent: Any) -> bool:
    """Whether the settings of an encoder layer let it; its input may yet forbid it."""
    allowed = parent.activation_relu_or_gelu and parent.self_attn.batch_first
    return bool(allowed) and torch.backends.mha.get_fastpath_enabled()


def without_fast_path(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Settings (module, attribute, value) under which the encoder `layers` of `model` call their norms."""
    settings: list[tuple[nn.Module, str, Any]] = [(layer, "activation_relu_or_gelu", 0) for layer in layers]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(layer in layers for layer in module.layers):
            # It would hand them nested tensors, for that path alone.
            settings.append((module, "use_nested_tensor", False))
    return settings
