"""The change that a rewrite makes to a model, by names, so that it can be tried on a copy first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..conversion import bypass
from ..conversion.recognise import Site
from ..conversion.surgery import Swap
from ..conversion.transfer import Choice, replacement
from ..zoo import find
from ..centering import ZeroMean, with_zero_mean
from .finding import Found
from .stream import Writer


@dataclass
class Edit:
    """What becomes of norms, weights and outputs."""

    sites: Sequence[Site]
    found: Found
    parametrized: bool
    untied: Collection[str] = ()
    """Modules that get a weight of their own."""

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Changes `model` in place; returns what undoes it."""
        undone: list[Callable[[], None]] = []
        try:
            for step in (self._untie, self._zero_weights, self._exchange, self._zero_outputs):
                undone += step(model)
        except BaseException:
            _undo(undone)
            raise
        return lambda: _undo(undone)

    def _untie(self, model: nn.Module) -> list[Callable[[], None]]:
        return [untie(model, name) for name in self.untied]

    def _zero_weights(self, model: nn.Module) -> list[Callable[[], None]]:
        undone: list[Callable[[], None]] = []
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        for writer in sorted(self.found.writers, key=lambda w: w.name):
            held = tensors[writer.name]
            if self.parametrized and isinstance(held, nn.Parameter):
                prefix, _, name = writer.name.rpartition(".")
                owner = model.get_submodule(prefix)
                undone.append(_parametrize(owner, name, writer.axis))
            else:
                undone.append(_write(held, zero_mean(held, writer, tensors)))
        for name in sorted({name for writer in self.found.writers for name in writer.scale}):
            undone.append(_write(tensors[name], torch.ones_like(tensors[name])))
        return undone

    def _exchange(self, model: nn.Module) -> list[Callable[[], None]]:
        made = {}
        for site in self.sites:
            here = dataclasses.replace(site, module=model.get_submodule(site.name))
            made[here.module] = replacement(here, Choice(find("rms_norm"))).module
        slowed = {
            module
            for module in model.modules()
            for child in ("norm1", "norm2")
            if bypass.fast_path(module, child) and getattr(module, child) in made
        }
        swap = Swap(model, made, bypass.without_fast_path(model, slowed))
        swap.do()
        return [swap.undo]

    def _zero_outputs(self, model: nn.Module) -> list[Callable[[], None]]:
        undone: list[Callable[[], None]] = []
        for name, (axis, when) in sorted(self.found.cuts.items()):
            module = model.get_submodule(name)
            before = type(module)
            module.__class__ = with_zero_mean(before, axis, when)
            undone.append(lambda module=module, before=before: setattr(module, "__class__", before))
        return undone


def zero_mean(tensor: Tensor, writer: Writer, tensors: dict[str, Any]) -> Tensor:
    """`tensor` less its mean along the axis of `writer`, after what multiplies it: in float64."""
    wide = tensor.detach().double()
    for name in writer.scale:
        gain = tensors[name].detach().double()
        wide = wide * gain.reshape(-1, *(1 for _ in range(wide.dim() - writer.axis % wide.dim() - 1)))
    return wide - wide.mean(writer.axis, keepdim=True)


def untie(model: nn.Module, name: str) -> Callable[[], None]:
    """Gives a module a weight of its own, with the numbers that the shared one has; returns what undoes it."""
    module: Any = model.get_submodule(name)
    shared = module.weight
    config: Any = getattr(model, "config", None)  # Hugging Face would tie them again
    tied = getattr(config, "tie_word_embeddings", None)

    def undo() -> None:
        module.weight = shared
        if tied:
            config.tie_word_embeddings = tied

    module.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    if tied:
        config.tie_word_embeddings = False
    return undo


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> Callable[[], None]:
    before = tensor.detach().clone()
    tensor.copy_(value)

    @torch.no_grad()
    def undo() -> None:
        tensor.copy_(before)

    return undo


def _parametrize(owner: nn.Module, name: str, axis: int) -> Callable[[], None]:
    order = list(owner._parameters)
    parametrize.register_parametrization(owner, name, ZeroMean(axis))

    def undo() -> None:
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        for each in order:  # it comes back as the last, and optimizers go by the order
            owner._parameters[each] = owner._parameters.pop(each)

    return undo


def _undo(steps: list[Callable[[], None]]) -> None:
    for step in reversed(steps):
        step()
