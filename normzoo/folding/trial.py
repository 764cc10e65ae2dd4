"""Test runs of a layer and a norm beside the layer that has taken the norm up."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.recognise_weights import weighted
from ..conversion.trial import bare, chance, distance, noise, short, undisturbed
from .layers import Unfoldable
from .steps import BEFORE, Fold, folded, take_up

AGREES = 1e-10
"""In float64, of the largest entry of a channel."""


def fold_error(fold: Fold, layer: Any, new: nn.Module) -> float:
    """How far `new` is from `layer` and the norm of `fold` on random inputs, of the largest entry.

    In float64 they must be the same. In the dtype of the layer the error against that must be at most twice
    the one of today, and two last bits of the largest entry.

    Raises:
        Unfoldable: it is not so, or they do not run.
    """
    norm = fold.site.module
    now = _pair(fold, _twin(layer), _twin(norm))
    then = _pair_of(fold, _twin(new), _twin(norm))
    wide_norm, wide_layer = _twin(norm).double(), _twin(layer).double()
    wide = dataclasses.replace(fold, site=dataclasses.replace(fold.site, module=wide_norm))
    x = _input(fold, layer)
    wide_x = x.double() if x.is_floating_point() else x
    try:
        with undisturbed():
            exact = _pair(fold, wide_layer, wide_norm)(wide_x)
            again = _pair_of(fold, take_up(wide, wide_layer), wide_norm)(wide_x)
            old, made = now(x), then(x)
    except Unfoldable:
        raise
    except Exception as error:  # a norm may be code that nobody here has seen
        raise Unfoldable(f"a test run failed: {short(error)}") from error
    return _judge(layer, exact, again, old, made)


def bake_error(layer: nn.Module, new: Any) -> float:
    """How far `new` is from `layer`, which standardizes its weight, on random inputs, of the largest entry."""
    x = _input(None, new)
    layers = [_twin(layer), _twin(new), _twin(layer).double()]
    try:
        with undisturbed():
            old, made = (each(x) for each in layers[:2])
            exact = layers[2](x.double())
    except Exception as error:
        raise Unfoldable(f"a test run failed: {short(error)}") from error
    return _judge(new, exact, None, old, made)


def _judge(layer: Any, exact: Tensor, again: Tensor | None, old: Tensor, made: Tensor) -> float:
    if not exact.isfinite().all():
        raise Unfoldable("a test run of it gives numbers that are not finite")
    along = 1 if getattr(layer, "kernel_size", ()) else exact.dim() - 1
    span = tuple(dim for dim in range(exact.dim()) if dim != along)
    if again is not None and distance(again, exact, span) > AGREES:
        raise Unfoldable("a test run shows another function")
    if made.dtype != old.dtype:
        raise Unfoldable(f"it returns {old.dtype}, and the layer alone {made.dtype}")
    if (dtype := layer.weight.dtype) != torch.float64:
        error, allowed = (distance(each.double(), exact, ()) for each in (made, old))
        if error > 2 * allowed + 2 * torch.finfo(dtype).eps:
            raise Unfoldable(
                f"in {dtype} the error would be {error:.1e} of the largest entry, and is {allowed:.1e}; "
                "fold in a wider dtype"
            )
    return distance(made.double(), old.double(), ())


def _twin(module: nn.Module) -> nn.Module:
    """A copy in eval mode, without hooks."""
    return copy.deepcopy(bare(module)).eval()


def _pair(fold: Fold, layer: nn.Module, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return (lambda x: norm(layer(x))) if fold.where == BEFORE else (lambda x: layer(norm(x)))


def _pair_of(fold: Fold, layer: nn.Module, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """As :func:`_pair`, where `layer` has taken the norm up."""
    then = fold.site.norm.after if fold.site.norm else ()
    return _pair(fold, layer, folded(norm, fold.into, fold.dims, then))


def _input(fold: Fold | None, layer: Any) -> Tensor:
    """As many random numbers that a few outputs of luck do not decide."""
    like = layer.weight
    if isinstance(layer, nn.Embedding):
        rows = torch.randint(layer.num_embeddings, (64,), generator=chance(), device="cpu").to(like.device)
        return rows if fold and fold.dims == 2 else rows.view(4, 16)
    known = weighted(layer)[0]
    if known is None:
        raise Unfoldable(f"it is not known what {type(layer).__name__} takes")
    if isinstance(layer, nn.Linear):
        rows = min(max(1024 // layer.out_features, 8), 256)
        shape = (rows, layer.in_features) if fold and fold.dims == 2 else (rows // 4, 4, layer.in_features)
    else:
        shape = (3, *known.example)
    return noise(shape, chance()).to(like.device, like.dtype)
