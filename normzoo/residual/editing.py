"""The change that a rewrite makes to a model, by names, so that it can be tried on a copy first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..centering import ZeroMean, with_zero_mean
from ..conversion import bypass
from ..conversion.recognise import Site
from ..conversion.surgery import Swap
from ..conversion.transfer import Choice, replacement
from ..zoo import find
from .finding import Found
from .stream import Writer

Undo = Callable[[], None]


@dataclass
class Edit:
    """What becomes of norms, weights and outputs."""

    sites: Sequence[Site]
    found: Found
    parametrized: bool
    untied: Collection[str] = ()
    """Modules that get a weight of their own."""

    rewrite: ClassVar[str] = "pre_rms_norm"
    target: ClassVar[str] = "rms_norm"

    @property
    def training(self) -> str:
        """What becomes of training; empty where it goes on as it would have."""
        if self.parametrized:
            return ""
        return 'for inference: further training goes another way (zero_mean_writers="parametrize" does not)'

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        writers = sorted(self.found.writers, key=lambda w: w.name)
        return {
            "rewrite": self.rewrite,
            "target": self.target,
            "norms": [site.name for site in self.sites],
            "writers": [vars(writer) for writer in writers],
            "centered_outputs": dict(self.found.centered_outputs),
            "zero_mean_writers": "parametrize" if self.parametrized else "bake",
            "untied": [*self.untied],
        }

    @property
    def plain(self) -> Edit:
        """What of it takes means away and leaves all else."""
        return self

    def rows(self) -> list[tuple[str, tuple[str, str, str]]]:
        """A line for all that changes: name, what it is, what becomes of it, and what else to know."""
        kept = "the weight is stored as it is, and centered in every forward"
        how = kept if self.parametrized else "centered once"
        writers = sorted(self.found.writers, key=lambda w: w.name)
        return [
            *((site.name, ("norm", f"{self.target}: exact", "")) for site in self.sites),
            *((w.name, ("writer", how, _times(w.scale))) for w in writers),
            *((name, ("output", "its mean is taken away", "")) for name in self.found.centered_outputs),
            *((f"{name}.weight", ("tied weight", "gets a weight of its own", "")) for name in self.untied),
        ]

    def apply(self, model: nn.Module) -> Undo:
        """Changes `model` in place; returns what undoes it."""
        return carry_out(
            step(model) for step in (self._untie, self._zero_weights, self._exchange, self._zero_outputs)
        )

    def _untie(self, model: nn.Module) -> Iterator[Undo]:
        for name in self.untied:
            yield untie(model, name)

    def _zero_weights(self, model: nn.Module) -> Iterator[Undo]:
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        for writer in sorted(self.found.writers, key=lambda w: w.name):
            held = tensors[writer.name]
            if self.parametrized and isinstance(held, nn.Parameter):
                for owner, name in _owners(model, held):
                    yield _parametrize(owner, name, writer.axis)
            else:
                yield _write(held, zero_mean(held, writer, tensors))
        for name in sorted({name for writer in self.found.writers for name in writer.scale}):
            yield _write(tensors[name], torch.ones_like(tensors[name]))

    def _exchange(self, model: nn.Module) -> Iterator[Undo]:
        made = {}
        for site in self.sites:
            here = dataclasses.replace(site, module=model.get_submodule(site.name))
            made[here.module] = replacement(here, Choice(find("rms_norm"))).module
        swap = Swap(model, made, without_fast_path(model, made))
        swap.do()
        yield swap.undo

    def _zero_outputs(self, model: nn.Module) -> Iterator[Undo]:
        for name, axis in sorted(self.found.centered_outputs.items()):
            yield _zero_output(model.get_submodule(name), axis)


def _times(scale: tuple[str, ...]) -> str:
    return f"times {' and '.join(scale)}, which becomes one" if scale else ""


def _zero_output(module: nn.Module, axis: int) -> Undo:
    before = type(module)
    module.__class__ = with_zero_mean(before, axis)
    return lambda: setattr(module, "__class__", before)


def without_fast_path(model: nn.Module, made: Collection[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Settings under which torch's encoder layers call the norms `made`, and compute none themselves."""
    slowed = {
        module
        for module in model.modules()
        for child in ("norm1", "norm2")
        if bypass.fast_path(module, child) and getattr(module, child) in made
    }
    return bypass.without_fast_path(model, slowed)


def zero_mean(tensor: Tensor, writer: Writer, tensors: dict[str, Any]) -> Tensor:
    """`tensor` less its mean along the axis of `writer`, after what multiplies it: in float64."""
    wide = tensor.detach().double()
    for name in writer.scale:
        gain = tensors[name].detach().double()
        wide = wide * gain.reshape(-1, *(1 for _ in range(wide.dim() - writer.axis % wide.dim() - 1)))
    return wide - wide.mean(writer.axis, keepdim=True)


def untie(model: nn.Module, name: str) -> Undo:
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
def _write(tensor: Tensor, value: Tensor) -> Undo:
    before = tensor.detach().clone()
    tensor.copy_(value)

    @torch.no_grad()
    def undo() -> None:
        tensor.copy_(before)

    return undo


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """The modules that hold a parameter, and its name there."""
    return [
        (owner, name)
        for owner in model.modules()
        for name, held in owner._parameters.items()
        if held is parameter
    ]


def _parametrize(owner: Any, name: str, axis: int) -> Undo:
    order = list(owner._parameters)
    before = type(owner)
    if parametrize.is_parametrized(owner):  # copies of it share the class, which gets another property
        own = {key: value for key, value in vars(before).items() if key not in ("__dict__", "__weakref__")}
        owner.__class__ = type(before.__name__, before.__bases__, own)
    parametrize.register_parametrization(owner, name, ZeroMean(axis))

    def undo() -> None:
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        owner.__class__ = before
        for each in order:  # it comes back as the last, and optimizers go by the order
            owner._parameters[each] = owner._parameters.pop(each)

    return undo


def carry_out(steps: Iterable[Iterable[Undo]]) -> Undo:
    """Takes all steps, or none where one fails; returns what takes them back."""
    undone: list[Undo] = []

    def undo() -> None:
        for each in reversed(undone):
            each()

    try:
        for step in steps:
            undone.extend(step)
    except BaseException:
        undo()
        raise
    return undo
