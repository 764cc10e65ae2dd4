"""Measuring whether a conversion kept the function: of one norm, and of the whole model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .norm import Norm
from .probe import bare, distance, inputs_for, undisturbed


def site_error(old: nn.Module, new: nn.Module, norm: Norm) -> tuple[float, bool]:
    """How far two modules differ on one input: (of the largest entry in a row, whether rounding explains it).

    Copies run in eval mode, with the parameters they have.
    """
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), torch.empty(0))
    x = inputs_for(norm, like.device).to(like.dtype)
    with undisturbed():
        theirs, ours = (copy.deepcopy(bare(module)).eval()(x).double() for module in (old, new))
    error = distance(ours, theirs, norm.span(x))
    # Many norms are no better than float32 whatever the dtype.
    return error, error <= 8 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Difference:
    """How one output of a model changed."""

    output: str
    error: float
    """Largest difference, relative to the largest entry."""
    rounding: float
    """The same for the original model with the last bit of every converted norm's output changed at random."""
    cosine: float


@dataclass(frozen=True)
class Proof:
    """What a conversion did to the outputs of a model on a sample, in eval mode.

    ``str()`` of it is a sentence.
    """

    outputs: tuple[Difference, ...]
    exact: bool
    """Whether every converted norm claims to compute the same in eval mode."""

    @property
    def error(self) -> float:
        """The largest difference of an output, relative to its largest entry."""
        return max(each.error for each in self.outputs)

    @property
    def rounding(self) -> float:
        """The largest difference that a last bit in the converted norms makes."""
        return max(each.rounding for each in self.outputs)

    @property
    def cosine(self) -> float:
        """The smallest cosine between an output before and after."""
        return min(each.cosine for each in self.outputs)

    @property
    def same(self) -> bool:
        """Whether rounding explains every difference: four times, for errors of one sign add up faster."""
        return all(each.error <= 4 * each.rounding for each in self.outputs)

    @property
    def passed(self) -> bool:
        """Whether the outputs are what the conversion claims: the same, or finite where it claims no more."""
        return self.same if self.exact else self.error < math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        outputs = [vars(each) for each in self.outputs]
        keys = ("passed", "same", "exact", "error", "rounding", "cosine")
        return {key: getattr(self, key) for key in keys} | {"outputs": outputs}

    def __str__(self) -> str:
        if self.same:
            found = "the model computes the same function"
        else:
            found = "the model computes another function"
            if self.exact:
                found = f"FAILED: {found}, although every conversion claims to be exact"
        if self.error == 0:
            return f"{found}: outputs are equal to the last bit"
        return (
            f"{found}: outputs differ by at most {self.error:.1e} of their largest entry (the last bit of the "
            f"converted norms explains {self.rounding:.1e}), cosine at least {self.cosine:.6f}"
        )


@torch.no_grad()
def compare(
    before: Mapping[str, Tensor], rounded: Mapping[str, Tensor], after: Mapping[str, Tensor], exact: bool
) -> Proof:
    """The proof from the outputs of a model before a conversion, with its norms nudged, and after.

    Raises:
        ValueError: there are no outputs, or other ones than before, or all are zero, which shows nothing.
    """
    if not before or before.keys() != after.keys():
        raise ValueError(
            f"verify: the model returned the floating-point tensors {list(before)} before and {list(after)} "
            "after; it must return the same ones, and at least one"
        )
    found = []
    for name, old in before.items():
        new, moved, old = (t.double().flatten() for t in (after[name], rounded[name], old))
        if not old.any() and not new.any():
            continue
        largest = old.abs().max().clamp_min(1e-300)
        error, step = (((t - old).abs().max() / largest).nan_to_num(math.inf).item() for t in (new, moved))
        cosine = F.cosine_similarity(new, old, dim=0).item()
        found.append(Difference(name, error, step + torch.finfo(before[name].dtype).eps, cosine))
    if not found:
        raise ValueError("verify: every output is zero on this sample, before and after, which shows nothing")
    return Proof(tuple(found), exact)


def outputs(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """The floating-point tensors that `model` returns for `sample` in eval mode, by their place in it."""
    with torch.no_grad(), _eval(model):
        leaves, _ = pytree.tree_flatten_with_path(_call(model, sample))
    tensors = {pytree.keystr(path) or "output": leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    return {name: t.clone() for name, t in tensors.items() if t.is_floating_point() and t.numel()}


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, tuple):
        return model(*sample)
    return sample(model) if callable(sample) else model(sample)


@contextlib.contextmanager
def nudged(modules: Sequence[tuple[nn.Module, float]]) -> Iterator[None]:
    """While it lasts, the outputs of each module are off by a share of themselves, up or down at random."""
    chance = torch.Generator().manual_seed(0)

    def nudge(share: float) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            sign = torch.randint(2, y.shape, generator=chance).to(y.device, torch.float32) * 2 - 1
            step = max(share, torch.finfo(y.dtype).eps)
            return (y + y.to(torch.promote_types(y.dtype, torch.float32)) * step * sign).to(y.dtype)

        return hook

    handles = [module.register_forward_hook(nudge(share)) for module, share in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
