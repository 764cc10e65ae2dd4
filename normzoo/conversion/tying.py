"""Tensors that belong to several modules, and one of these that gets one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def holders(model: nn.Module, tensor: Tensor) -> list[tuple[str, str]]:
    """The modules that hold a parameter or buffer, by their first names, and its name there."""
    return [
        (prefix, leaf)
        for prefix, module in model.named_modules()
        for leaf, held in (*module._parameters.items(), *module._buffers.items())
        if held is tensor
    ]


def untie(model: nn.Module, name: str) -> Callable[[], None]:
    """Gives a module a tensor of its own, with the numbers of the shared one; returns what undoes it.

    Models of Hugging Face tie embedding and head again whenever they are asked to, unless their config says
    otherwise.

    Args:
        model: holds it, itself or deeper down.
        name: of the parameter or buffer.
    """
    prefix, _, leaf = name.rpartition(".")
    owner = model.get_submodule(prefix)
    table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    shared = table[leaf]
    others = [(p, n) for p, n in holders(model, shared) if (model.get_submodule(p), n) != (owner, leaf)]
    configs = [*_configs(model, prefix, shared)]
    own = shared.detach().clone()
    table[leaf] = nn.Parameter(own, shared.requires_grad) if isinstance(shared, nn.Parameter) else own
    for config in configs:
        config.tie_word_embeddings = False

    def undo() -> None:
        found = shared
        if others:  # it is another object perhaps, after load_state_dict(assign=True)
            other = model.get_submodule(others[0][0])
            found = {**other._parameters, **other._buffers}[others[0][1]]
        now = model.get_submodule(prefix)
        (now._parameters if table is owner._parameters else now._buffers)[leaf] = found
        for config in configs:
            config.tie_word_embeddings = True

    return undo


def _configs(model: nn.Module, prefix: str, shared: Tensor) -> Iterator[Any]:
    """Those of the modules around `prefix` by which `shared` would be tied again."""
    seen: list[Any] = []
    module: Any = model
    for part in ("", *prefix.split(".")):
        module = getattr(module, part) if part else module
        config = getattr(module, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or any(config is each for each in seen):
            continue
        if _embeds(module, shared):
            seen.append(config)
            yield config


def _embeds(module: Any, weight: Tensor) -> bool:
    """Whether it is the weight of the embedding or of the head, as far as the module tells."""
    found = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(module, method)())
        except (AttributeError, NotImplementedError):
            continue
    return not found or any(getattr(each, "weight", None) is weight for each in found)
