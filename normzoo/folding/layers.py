"""Folding a norm that maps each channel by scale · x + shift into the layer before or after it, for inference.

The algebra is in float64, and the result has the dtype of the layer. The layer itself is not changed, so that
one whose weight is tied, or that others use too, is safe. torch's own fuse_conv_bn_eval and fuse_linear_bn_eval
know the layer before alone, need a running mean, and take no groups of a transposed convolution.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..conversion.norm import Norm, tensor
from ..conversion.recognise import recognise
from ..conversion.report import a

_STORED = ("frozen_batch", "alpha_batch")
"""Families that go by stored statistics in training mode too, AlphaBatchNorm with source_weight=1."""

_STORED_IN_EVAL = ("batch", "ghost_batch", "adab2n", "instance", "power", "unified")

STORED = (*_STORED, *_STORED_IN_EVAL)
"""Families that may be such a map."""

LAYERS = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class Unfoldable(ValueError):
    """Why a norm cannot be folded into a layer."""


def affine_map(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a norm that computes scale · x + shift for every channel: (C,), in float64.

    Args:
        norm: one that goes by stored statistics alone: in eval mode BatchNorm, GhostBatchNorm, AdaB2N, an
            InstanceNorm that tracks statistics, UnifiedNorm, and PowerNorm without group scaling; in any mode
            FrozenBatchNorm, and AlphaBatchNorm with source_weight=1. Those of other libraries too, where
            :func:`normzoo.inspect` recognises them.

    Raises:
        Unfoldable: it is no such map.

    >>> affine_map(nn.BatchNorm1d(2, eps=3.0).eval())
    (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0., 0.], dtype=torch.float64))
    """
    _, scale, shift = _read(norm, "affine_map")
    return scale, torch.zeros_like(scale) if shift is None else shift


def into_next(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """A layer that computes ``layer(norm(x))`` from x. Whatever else reads the norm has to take it up too.

    Args:
        norm: as in :func:`affine_map`. Its channels must be those that `layer` takes; with a linear layer the
            last dimension, which dimension 1 of a batch norm or of channel_dim=1 is in (N, C) alone.
        layer: Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d. The zeros that a convolution pads with are not
            shifted: it takes up a shift only where it has none, a transposed one only where every output
            sees one input.

    Returns:
        A new layer, with a bias if `layer` has one, or the norm is of a kind that shifts and `layer` can take
        that up. All but weight and bias is shared.

    Raises:
        Unfoldable: `norm` is no such map, or `layer` cannot take it up exactly.

    >>> norm, linear, x = nn.BatchNorm1d(4).eval(), nn.Linear(4, 2), torch.randn(3, 4)
    >>> torch.testing.assert_close(into_next(norm, linear)(x), linear(norm(x)))
    """
    _check_order("into_next", norm, layer, "(norm, layer)")
    known, scale, shift = _read(norm, "into_next")
    old, weight = _checked("into_next", known, layer)
    _check_hooks("into_next", norm, layer, "_forward_pre_hooks")
    if isinstance(old, nn.Embedding):
        raise Unfoldable("into_next: an Embedding takes indices, which no norm scales")
    number = old.in_features if isinstance(old, nn.Linear) else old.in_channels
    _check_number("into_next", scale, old, number)
    bias = None if old.bias is None else old.bias.detach().double()
    axis = 0 if isinstance(old, _ConvTransposeNd) else 1
    why = _uneven(old) if isinstance(old, _ConvNd) else ""
    if why and shift is not None and shift.any():
        raise Unfoldable(f"into_next: {why}, and this norm shifts; fold it into the layer before it instead")
    if shift is not None and not why:
        each = weight.sum(-1) * _spread(shift, old, axis)
        groups = getattr(old, "groups", 1)
        added = each.sum(1) if axis == 1 else each.view(groups, -1, each.shape[1]).sum(1).flatten()
        bias = added if bias is None else bias + added
    return _remade("into_next", old, weight * _spread(scale, old, axis).unsqueeze(-1), bias)


def into_previous(layer: nn.Module, norm: nn.Module, *, activated: bool = False) -> nn.Module:
    """A layer that computes ``norm(layer(x))`` from x. Nothing else may read what `layer` returns.

    Args:
        layer: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d or Embedding.
        norm: as in :func:`affine_map`. Its channels must be those that `layer` makes; with a linear layer or
            an embedding the last dimension, which dimension 1 of a batch norm or of channel_dim=1 is in (N, C)
            alone.
        activated: whether `norm` may go on with an activation, as timm's BatchNormAct2d does, which is then
            left to be applied to what the new layer returns.

    Returns:
        A new layer, with a bias if `layer` has one or the norm is of a kind that shifts. All but weight and
        bias is shared.

    Raises:
        Unfoldable: `norm` is no such map, or `layer` cannot take it up exactly.

    >>> conv, norm, x = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 5, 5)
    >>> torch.testing.assert_close(into_previous(conv, norm)(x), norm(conv(x)))
    """
    _check_order("into_previous", norm, layer, "(layer, norm)")
    known, scale, shift = _read(norm, "into_previous", activated)
    old, weight = _checked("into_previous", known, layer)
    _check_hooks("into_previous", norm, layer, "_forward_hooks")
    if isinstance(old, nn.Embedding):
        _check_number("into_previous", scale, old, old.embedding_dim)
        if old.max_norm is not None:
            raise Unfoldable(
                f"into_previous: with max_norm={old.max_norm} the Embedding changes rows that it reads"
            )
        rows = weight * scale[:, None]
        return _remade("into_previous", old, rows if shift is None else rows + shift[:, None], None)
    _check_number(
        "into_previous", scale, old, old.out_features if isinstance(old, nn.Linear) else old.out_channels
    )
    bias = None if old.bias is None else old.bias.detach().double() * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    axis = 1 if isinstance(old, _ConvTransposeNd) else 0
    return _remade("into_previous", old, weight * _spread(scale, old, axis).unsqueeze(-1), bias)


def _check_order(caller: str, norm: nn.Module, layer: nn.Module, order: str) -> None:
    if isinstance(norm, LAYERS) and not isinstance(layer, LAYERS):
        raise Unfoldable(
            f"{caller}: the arguments are {order}, and {type(norm).__name__} came for the norm, "
            f"{type(layer).__name__} for the layer; swap them"
        )


def _check_hooks(caller: str, norm: nn.Module, layer: nn.Module, between: str) -> None:
    """Refuses hooks of what will be gone, and those of the layer that stand between the two."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module, hooks in ((norm, tables), (layer, (between,))):
        if any(getattr(module, table) for table in hooks):
            raise Unfoldable(
                f"{caller}: {type(module).__name__} has hooks that would be lost, or see other numbers; remove "
                "them first"
            )


def foldable(norm: nn.Module, caller: str) -> Norm:
    """What a norm computes, its activation aside.

    Raises:
        Unfoldable: it is no map as in :func:`affine_map`.
    """
    return _read(norm, caller, activated=True)[0]


def _read(module: nn.Module, caller: str, activated: bool = False) -> tuple[Norm, Tensor, Tensor | None]:
    """What a norm computes, and its map; without a shift where such a norm has none, whatever its values."""
    ((known, _, why),) = recognise([module])
    name = type(module).__name__
    if known is None:
        raise Unfoldable(f"{caller}: it is not known what {name} computes: {why}")
    if known.family == "alpha_batch" and getattr(module, "source_weight", None) != 1:
        raise Unfoldable(
            f"{caller}: {name} takes statistics of its input in eval mode too, unless source_weight is 1"
        )
    if known.family not in STORED:
        raise Unfoldable(f"{caller}: {a(known.family)} norm takes statistics of its input in eval mode too")
    if known.family == "power" and known.groups:
        raise Unfoldable(
            f"{caller}: {name} scales every position by its own root mean square first, with "
            f"group_num={known.groups}; only with group_num=None can it be folded"
        )
    of_mean_square = known.family in ("power", "unified")
    if len(known.statistics) < (1 if of_mean_square else 2):
        raise Unfoldable(f"{caller}: {name} has no running statistics and goes by those of its input")
    if module.training and known.family in _STORED_IN_EVAL:
        raise Unfoldable(f"{caller}: {name} is in training mode, where it goes by the batch; call eval() first")
    if known.after and not activated:
        raise Unfoldable(f"{caller}: {name} goes on with {', '.join(known.after)}, which would be lost")
    held = [tensor(module, name) for name in (*known.statistics[:2], known.weight, known.bias) if name]
    if any(t is None or t.is_meta for t in held):
        raise Unfoldable(f"{caller}: {name} is on the meta device, where there are no numbers")
    *mean, square = (getattr(module, name).detach().double() for name in known.statistics[: 2 - of_mean_square])
    scale = (square + (known.eps or 0.0)).rsqrt()
    weight, bias = (tensor(module, name) for name in (known.weight, known.bias))
    if weight is not None:
        scale = scale * (weight.detach().double() + known.offset)
    shift = None if bias is None else bias.detach().double()
    if mean:
        shift = -scale * mean[0] if shift is None else shift - scale * mean[0]
    return known, scale, shift


def _checked(caller: str, norm: Norm, layer: nn.Module) -> tuple[Any, Tensor]:
    """The layer, and its weight in float64: (rows, columns, kernel), a kernel of 1 where it has none."""
    cls = parametrize.type_before_parametrizations(layer)
    name = cls.__name__
    base = next((base for base in LAYERS if issubclass(cls, base)), None)
    if base is None:
        known = ", ".join(each.__name__ for each in LAYERS)
        raise Unfoldable(f"{caller}: the layer is {a(name)}; it must be one of {known}")
    overridden = [
        f for f in ("forward", "_conv_forward") if getattr(cls, f, None) is not getattr(base, f, None)
    ]
    if overridden or "forward" in vars(layer):
        raise Unfoldable(
            f"{caller}: {name} has a {(*overridden, 'forward')[0]} of its own, which may do anything"
        )
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer) or weight is None:
        raise Unfoldable(
            f"{caller}: a weight or bias of {name} is computed, not stored; remove the parametrization, or "
            "what else computes it (weight norm?), first"
        )
    if is_lazy(weight) or weight.is_meta:
        raise Unfoldable(
            f"{caller}: the weight of {name} has no numbers yet; it is lazy, or on the meta device"
        )
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        what = weight.dtype if type(weight) in (nn.Parameter, Tensor) else a(type(weight).__name__)
        raise Unfoldable(
            f"{caller}: the weight of {name} is {what}, not a plain tensor of real floating-point numbers; "
            "fold before the model is quantized or distributed"
        )
    if issubclass(base, _ConvNd):
        if norm.axis != 1:
            raise Unfoldable(
                f"{caller}: the channels of the norm are in dimension {norm.axis} of its input, and those of "
                f"{name} in dimension 1"
            )
    elif norm.axis != -1 and (norm.axis != 1 or norm.dims in (2, 3)):
        raise Unfoldable(
            f"{caller}: the channels of the norm are in dimension {norm.axis} of its input, and those of "
            f"{name} in the last"
        )
    wide = weight.detach().double()
    return layer, wide.flatten(2) if wide.dim() > 2 else wide.unsqueeze(2)


def _check_number(caller: str, scale: Tensor, layer: Any, number: int) -> None:
    if len(scale) != number:
        raise Unfoldable(
            f"{caller}: the norm has {len(scale)} channels and {type(layer).__name__} {number} where they meet"
        )


def _uneven(conv: _ConvNd) -> str:
    """Why a constant that is added to all inputs of a channel is no constant in its outputs; empty if it is."""
    name, ones = type(conv).__name__, (1,) * len(conv.kernel_size)
    if isinstance(conv, _ConvTransposeNd):
        if conv.kernel_size == conv.stride == ones and not any(conv.output_padding):
            return ""
        return f"outputs of {name} see one input or several"
    if conv.padding == "same":
        padded = conv.kernel_size != ones
    else:
        padded = conv.padding != "valid" and any(conv.padding)
    return f"{name} pads with zeros, which are not shifted" if padded and conv.padding_mode == "zeros" else ""


def _spread(values: Tensor, layer: Any, axis: int) -> Tensor:
    """Values of channels that are along `axis` of the weight, to be multiplied with its first two dimensions.

    Along dimension 1 there are the channels of one group.
    """
    if axis == 0:
        return values.unsqueeze(1)
    groups, rows = getattr(layer, "groups", 1), len(layer.weight)
    return values.view(groups, 1, -1).expand(groups, rows // groups, -1).flatten(0, 1)


def _remade(caller: str, layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of `layer` with other parameters; hooks are shared, for one may belong to something large."""
    old = layer.weight
    made = copy.copy(layer)
    for table in ("_parameters", "_buffers", "_modules"):
        vars(made)[table] = dict(vars(layer)[table])
    for name, value in (("weight", weight.reshape(old.shape)), ("bias", bias)):
        if value is None:
            continue
        held = layer._parameters.get(name)
        like = old if held is None else held
        new = value.to(like.dtype)
        if not new.isfinite().all() and value.isfinite().all():
            raise Unfoldable(
                f"{caller}: the new {name} goes up to {value.abs().max():.1e}, too large for {like.dtype}"
            )
        made._parameters[name] = nn.Parameter(new, requires_grad=like.requires_grad)
    return made
