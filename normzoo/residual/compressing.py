"""Rows of mean zero, stored in one entry less: Pre-CRMSNorm transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..conversion.layouts import follow
from ..conversion.luggage import bring_along
from ..conversion.norm import tensor
from ..conversion.recognise import Site
from ..layers.rms import CRMSNorm, RMSNorm
from .consuming import Consumer
from .editing import Edit, Undo, along, carry_out, exchange, names_of, tensor_at, write, zero_mean

BASES = ("truncate", "orthonormal")


def compressed(x: Tensor, axis: int, basis: str) -> Tensor:
    """Of `x`, whose mean along `axis` is zero, the coordinates: one less.

    Args:
        basis: ``"truncate"`` leaves the last entry out, which is minus the sum of the others; with
            ``"orthonormal"`` lengths and angles stay.
    """
    if basis == "truncate":
        return x.narrow(axis, 0, x.shape[axis] - 1)
    return torch.movedim(torch.movedim(x, axis, -1) @ helmert(x.shape[axis], x), -1, axis)


def reading(weight: Tensor, axis: int, basis: str) -> Tensor:
    """A weight that makes of coordinates what `weight` makes of the row, along `axis`."""
    if basis == "truncate":
        size = weight.shape[axis]
        return weight.narrow(axis, 0, size - 1) - weight.narrow(axis, size - 1, 1)
    return compressed(weight, axis, basis)


def helmert(size: int, like: Tensor) -> Tensor:
    """(size, size - 1), orthonormal columns of mean zero: each weighs the entries before one against that."""
    k = torch.arange(1, size, dtype=like.dtype, device=like.device)
    rows = torch.arange(size, dtype=like.dtype, device=like.device)[:, None]
    return ((rows < k).to(like.dtype) - k * (rows == k)) / (k * (k + 1)).sqrt()


@dataclass
class CompressedEdit(Edit):
    """What becomes of norms and weights where the stream has one entry less."""

    consumers: Collection[Consumer] = field(default_factory=tuple)
    basis: str = "truncate"

    rewrite: ClassVar[str] = "pre_crms_norm"

    @property
    def training(self) -> str:
        return "for inference: further training goes another way"

    def to_dict(self) -> dict[str, Any]:
        readers = sorted(self.consumers, key=lambda c: c.name)
        return super().to_dict() | {"basis": self.basis, "readers": [vars(reader) for reader in readers]}

    @property
    def target(self) -> str:  # type: ignore[override]
        return "crms_norm" if self.basis == "truncate" else "rms_norm"

    @property
    def plain(self) -> Edit:
        """The same with all entries."""
        return Edit(self.sites, self.found, False, self.untied)

    def rows(self) -> list[tuple[str, tuple[str, str, str]]]:
        how = "one entry less" if self.basis == "truncate" else "one entry less, turned"
        taken = "takes up weight and bias of the norm before it"
        return [
            *(
                (name, (what, f"{becomes}, {how}" if what == "writer" else becomes, note))
                for name, (what, becomes, note) in super().rows()
            ),
            *((name, ("reader", how, taken)) for name in sorted(each.name for each in self.consumers)),
        ]

    def apply(self, model: nn.Module) -> Callable[[], None]:
        steps = (self._untie, self._consume, self._compress, self._replace, self._follow)
        return carry_out(step(model) for step in steps)

    def _follow(self, model: nn.Module) -> Iterator[Undo]:
        """Modules say the sizes that their weights have."""
        touched = {writer.name for writer in self.found.writers} | {each.name for each in self.consumers}
        for prefix in sorted({name.rpartition(".")[0] for name in touched}):
            owner = model.get_submodule(prefix)
            before = dict(vars(owner))
            follow(owner, prefix)
            changed = {key: value for key, value in before.items() if vars(owner)[key] is not value}
            yield Undo(lambda prefix=prefix, to=changed: vars(model.get_submodule(prefix)).update(to))

    def _consume(self, model: nn.Module) -> Iterator[Undo]:
        """Weights behind a norm take up its weight and bias, then the new basis."""
        sites = {site.name: site for site in self.sites}
        for consumer in sorted(self.consumers, key=lambda c: c.name):
            prefix, _, _ = consumer.name.rpartition(".")
            weight = model.get_parameter(consumer.name)
            gain, shift = affine(sites[consumer.norm], model.get_submodule(consumer.norm))
            wide = weight.detach().double()
            width = wide.shape[consumer.axis]
            if shift is not None and shift.any():
                added = (wide * along(shift, wide, consumer.axis)).sum(consumer.axis)
                yield _add_bias(model, prefix, weight, added.flatten(1).sum(1) if added.dim() > 1 else added)
            wide = wide if gain is None else wide * along(gain, wide, consumer.axis)
            wide = reading(wide, consumer.axis, self.basis)
            if self.basis == "orthonormal":  # the norm divides by one entry less
                wide = wide * math.sqrt(width / (width - 1))
            yield _resize(model, consumer.name, wide)

    def _compress(self, model: nn.Module) -> Iterator[Undo]:
        tensors = dict((*model.named_parameters(), *model.named_buffers()))
        made = {}
        for writer in self.found.writers:
            axis = writer.axis % tensors[writer.name].dim()
            made[writer.name] = compressed(zero_mean(tensors[writer.name], writer, tensors), axis, self.basis)
            made |= {name: torch.ones(len(tensors[name]) - 1) for name in writer.scale}
        for name in sorted(made):
            yield _resize(model, name, made[name])

    def _replace(self, model: nn.Module) -> Iterator[Undo]:
        made: dict[nn.Module, nn.Module] = {}
        for site in self.sites:
            old, norm = model.get_submodule(site.name), site.norm
            if norm is None or norm.shape is None or norm.eps is None:
                continue
            (width,) = norm.shape
            if self.basis == "truncate":
                new: nn.Module = CRMSNorm(width - 1, norm.eps)
            else:
                new = RMSNorm(width - 1, norm.eps * width / (width - 1), elementwise_affine=False)
            bring_along(old, new, ("weight", "bias"))
            made[old] = new
        yield exchange(model, made)


def affine(site: Site, norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias that a norm applies, in float64."""
    if site.norm is None:
        return None, None
    weight, bias = (tensor(norm, name) for name in (site.norm.weight, site.norm.bias))
    gain = None if weight is None else weight.detach().double() + site.norm.offset
    return gain, None if bias is None else bias.detach().double()


@torch.no_grad()
def _resize(model: nn.Module, name: str, value: Tensor) -> Undo:
    """The same parameter or buffer with other numbers, of another shape; returns what undoes it."""
    tensor = tensor_at(model, name)
    before, grad, names = tensor.data, tensor.grad, names_of(model, tensor)
    tensor.grad = None
    tensor.data = value.to(before).contiguous()

    def now() -> list[Tensor]:
        return [tensor_at(model, each, value.shape) for each in names]

    def undo() -> None:
        for each in now():
            each.grad = None
            each.data = before.to(each)
            each.grad = None if grad is None else grad.to(each)

    return Undo(undo, now)


def _add_bias(model: nn.Module, prefix: str, weight: Tensor, added: Tensor) -> Undo:
    """Adds to the bias of a layer, which gets one where it has none; returns what undoes it."""
    owner: Any = model.get_submodule(prefix)
    if owner.bias is not None:
        return write(model, owner.bias, owner.bias.detach().double() + added)
    owner.bias = nn.Parameter(added.to(weight), requires_grad=weight.requires_grad)
    return Undo(
        lambda: setattr(model.get_submodule(prefix), "bias", None),
        lambda: tensor_at(model, f"{prefix}.bias", added.shape),
    )
