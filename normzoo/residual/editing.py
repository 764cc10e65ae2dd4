"""The change that a rewrite makes to a model, by names, so that it can be tried on a copy first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..centering import (
    ZeroMean,
    ZeroMeanOutput,
    parametrize_alone,
    plain_class,
    unparametrize_alone,
    with_zero_mean,
)
from ..conversion import bypass
from ..conversion.recognise import Site
from ..conversion.surgery import Swap
from ..conversion.transfer import Choice, replacement
from ..conversion.tying import holders, untie
from ..zoo import find
from .finding import Found
from .stream import Writer


@dataclass(frozen=True)
class Undo:
    """What takes a change back, by names: tensors may be other objects by then."""

    do: Callable[[], object]
    check: Callable[[], object] = lambda: None
    """Raises ValueError where that cannot be."""


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

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Changes `model` in place; returns what undoes it."""
        return carry_out(
            step(model) for step in (self._untie, self._zero_weights, self._exchange, self._zero_outputs)
        )

    def _untie(self, model: nn.Module) -> Iterator[Undo]:
        for name in self.untied:
            yield _untie(model, f"{name}.weight")

    def _zero_weights(self, model: nn.Module) -> Iterator[Undo]:
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        for writer in sorted(self.found.writers, key=lambda w: w.name):
            held = tensors[writer.name]
            if self.parametrized and isinstance(held, nn.Parameter):
                for owner, name in holders(model, held):
                    yield _parametrize(model, owner, name, writer.axis)
            else:
                yield write(model, held, zero_mean(held, writer, tensors))
        for name in sorted({name for writer in self.found.writers for name in writer.scale}):
            yield write(model, tensors[name], torch.ones_like(tensors[name]))

    def _exchange(self, model: nn.Module) -> Iterator[Undo]:
        made = {}
        for site in self.sites:
            here = dataclasses.replace(site, module=model.get_submodule(site.name))
            made[here.module] = replacement(here, Choice(find("rms_norm"))).module
        yield exchange(model, made)

    def _zero_outputs(self, model: nn.Module) -> Iterator[Undo]:
        for name, axis in sorted(self.found.centered_outputs.items()):
            yield _zero_output(model, name, axis)


def _times(scale: tuple[str, ...]) -> str:
    return f"times {' and '.join(scale)}, which becomes one" if scale else ""


def without_fast_path(model: nn.Module, made: Collection[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """Settings under which torch's encoder layers call the norms `made`, and compute none themselves."""
    slowed = {
        module
        for module in model.modules()
        for child in ("norm1", "norm2")
        if bypass.fast_path(module, child) and getattr(module, child) in made
    }
    return bypass.without_fast_path(model, slowed)


def along(values: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """`values`, one for each entry of `tensor` along `axis`, so that they broadcast with it."""
    return values.reshape(-1, *(1 for _ in range(tensor.dim() - axis % tensor.dim() - 1)))


def zero_mean(tensor: Tensor, writer: Writer, tensors: dict[str, Any]) -> Tensor:
    """`tensor` less its mean along the axis of `writer`, after what multiplies it: in float64."""
    wide = tensor.detach().double()
    for name in writer.scale:
        wide = wide * along(tensors[name].detach().double(), wide, writer.axis)
    return wide - wide.mean(writer.axis, keepdim=True)


def refuse_sparse(model: nn.Module, writers: Iterable[Writer], caller: str) -> None:
    """Raises ValueError where a weight that is to be centered in every forward has sparse gradients."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for writer in writers:
        for prefix, _ in holders(model, tensors[writer.name]):
            if getattr(model.get_submodule(prefix), "sparse", False):
                raise ValueError(
                    f"{caller}: {prefix!r} makes sparse gradients, and {writer.name}, centered in every "
                    'forward, has dense ones; set its sparse to False, or pass zero_mean_writers="bake"'
                )


def tensor_at(model: nn.Module, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """The parameter or buffer called `name`, whatever object that is now.

    Raises:
        ValueError: there is none, or one of another shape.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(prefix)
        tensor = {**owner._parameters, **owner._buffers}[leaf]
    except (AttributeError, KeyError):
        tensor = None
    if tensor is None:
        raise ValueError(f"the model has no tensor {name!r} any more")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name!r} has shape {(*tensor.shape,)} by now, and had {(*shape,)}")
    return tensor


def names_of(model: nn.Module, tensor: Tensor) -> list[str]:
    """All names of a tensor, but for those of modules that have several."""
    return [f"{prefix}.{leaf}".lstrip(".") for prefix, leaf in holders(model, tensor)]


def _untie(model: nn.Module, name: str) -> Undo:
    names = names_of(model, tensor_at(model, name))
    undo = untie(model, name)
    return Undo(undo, lambda: [tensor_at(model, each) for each in names])


@torch.no_grad()
def write(model: nn.Module, tensor: Tensor, value: Tensor) -> Undo:
    """Puts numbers into a parameter or buffer of `model`."""
    before, names = tensor.detach().clone(), names_of(model, tensor)
    tensor.copy_(value)

    def now() -> list[Tensor]:
        return [tensor_at(model, name, before.shape) for name in names]

    @torch.no_grad()
    def undo() -> None:
        for each in now():
            each.copy_(before)

    return Undo(undo, now)


def _parametrize(model: nn.Module, prefix: str, name: str, axis: int) -> Undo:
    owner = model.get_submodule(prefix)
    order, before = list(owner._parameters), type(owner)
    parametrize_alone(owner, name, ZeroMean(axis))

    def now() -> nn.Module:
        found = dict(model.named_modules()).get(prefix)
        chain: Any = ()
        if found is not None and parametrize.is_parametrized(found, name):
            chain = found.parametrizations[name]  # type: ignore[operator, index]
        if found is None or [type(each) for each in chain] != [ZeroMean]:
            called = f"{prefix}.{name}".lstrip(".")
            raise ValueError(f"{called!r} is not centered in every forward any more, or has more done to it")
        return found

    def undo() -> None:
        found = now()
        unparametrize_alone(found, name, leave_parametrized=False)
        if vars(type(found)).keys() == vars(before).keys():
            found.__class__ = before
        for each in order:  # it comes back as the last, and optimizers go by the order
            if each in found._parameters:
                found._parameters[each] = found._parameters.pop(each)

    return Undo(undo, now)


def _zero_output(model: nn.Module, name: str, axis: int) -> Undo:
    module = model.get_submodule(name)
    module.__class__ = with_zero_mean(type(module), axis)

    def now() -> nn.Module:
        found = dict(model.named_modules()).get(name)
        if found is None or ZeroMeanOutput not in type(found).__bases__:
            raise ValueError(f"the class of {name!r} is another by now")
        return found

    def undo() -> None:
        found = now()
        found.__class__ = plain_class(type(found))

    return Undo(undo, now)


def exchange(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> Undo:
    """Puts norms in the places of others; these come back with the tensors that both have, as they are then."""
    swap = Swap(model, made, without_fast_path(model, made))
    shared = [
        (old, new, table, leaf)
        for old, new in made.items()
        for table in ("_parameters", "_buffers")
        for leaf, t in vars(old)[table].items()
        if t is not None and vars(new)[table].get(leaf) is t
    ]
    name, kind = next(((name, (p.device, p.dtype)) for name, p in model.named_parameters()), ("", None))
    swap.do()

    def check() -> None:
        there = {*model.modules()}
        if gone := [type(new).__name__ for new in made.values() if new not in there]:
            raise ValueError(f"{len(gone)} of the new norms ({gone[0]}) are no longer in the model")

    def undo() -> None:
        swap.undo()
        like = dict(model.named_parameters()).get(name)
        for old, new in made.items():
            old.train(new.training)
            if like is not None and (like.device, like.dtype) != kind:
                old.to(like.device, like.dtype)
        for old, new, table, leaf in shared:
            vars(old)[table][leaf] = vars(new)[table][leaf]

    return Undo(undo, check)


def carry_out(steps: Iterable[Iterable[Undo]]) -> Callable[[], None]:
    """Takes all steps, or none where one fails; returns what takes them back.

    That raises ValueError, and changes nothing, where one of them cannot be taken back.
    """
    undone: list[Undo] = []

    def undo() -> None:
        for each in undone:
            each.check()
        for each in reversed(undone):
            each.do()

    try:
        for step in steps:
            undone.extend(step)
    except BaseException:
        for each in reversed(undone):
            each.do()
        raise
    return undo
