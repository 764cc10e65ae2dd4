"""Rules for PowerNorm and UnifiedNorm, which divide by the root of a running mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.mean_square import MeanSquareNorm
from ..layers.power import PowerNorm
from ..layers.unified import UnifiedNorm
from ..sweeps import GROUP_EPS
from .channels import OF_GHOSTS, add_affine, moving, of_channels
from .norm import Norm, tensor
from .rows import add_offset, of_rows
from .transfer import Carried, Exactness, Refused, transfer

Options = Mapping[str, Any]
Layer = type[PowerNorm] | type[UnifiedNorm]

_SHARED = ("sync", "process_group", "nonfinite")
_OF_POWER = ("alpha_fwd", "alpha_bkw", "warmup_iters", "backward")
_OF_UNIFIED = ("warmup_iters", "outlier_filtration", "decay")
_IN_TRAINING = (*_OF_POWER, *_OF_UNIFIED, "window_size", *_SHARED)
_STATE = ("ema_gz", "iters", "skip_counter")
_WINDOWS = ("buffer_x2", "buffer_gz")
_BESIDES = (
    *("running_phi", "running_var", *_STATE, *_WINDOWS, "batches_skipped", "gradients_skipped"),
    *(*_OF_POWER, *_OF_UNIFIED, "window_size", "group_num", "channel_dim"),
)
"""Attributes of these layers that mean nothing to another one."""
_OF_ROWS = ("normalized_shape", "elementwise_affine", "offset", "cast")

_FROM_BATCH = "training takes no mean away, and its gradient is approximate"
_FROM_FROZEN = "statistics move in training; weight and bias become parameters, which do not train yet"
_TO_BATCH = "in training it takes mean and variance of the batch; running_mean is 0"
_UNGROUPED = "without group scaling"
_FRESH = "running mean squares start at 1: normzoo.recalibrate(model, batches) before eval mode"
_PADDING = "padding counts unless normzoo.inputs gives pad_mask"
_BEGINS = f"until training or recalibrate() moves its statistics; {_PADDING}"


def _statistic(layer: Layer) -> str:
    return "running_phi" if layer is PowerNorm else "running_var"


def _groups(layer: Layer, options: Options, usual: int | None) -> int | None:
    return options.get("group_num", usual) if layer is PowerNorm else None


def _past_warmup(seen: Tensor | bool):
    """Lets a PowerNorm go by its statistics from the first step on, if they are of something `seen`.

    In warm-up the first batch would drop them. A UnifiedNorm keeps them there, and has to fill its windows.
    """

    def begin(layer: nn.Module) -> None:
        if isinstance(layer, PowerNorm):
            layer.iters.fill_(layer.warmup_iters).mul_(seen)

    return begin


def _seen(counter: Tensor | None) -> Tensor | bool:
    return True if counter is None else counter.detach().reshape(()) > 0


def _from_batch(norm: Norm, module: nn.Module, options: Options, layer: Layer) -> Carried:
    """The map by mean and variance as one by phi = var + mean²: weight and bias make up for the mean."""
    carried = moving(norm, module, f"a {layer.__name__}")
    kept = {name: carried.arguments[name] for name in ("num_features", "sync", "process_group")}
    carried.arguments = kept | {"eps": options.get("eps", norm.eps), "channel_dim": 1}
    if norm.momentum is not None:
        carried.arguments["alpha_fwd" if layer is PowerNorm else "decay"] = 1 - norm.momentum
    carried.in_training, carried.dropped = _IN_TRAINING, (*norm.statistics, *OF_GHOSTS)
    groups = _groups(layer, options, None)
    if layer is PowerNorm:
        carried.arguments["group_num"] = groups
    mean_name, var_name, *counter = norm.statistics
    mean, var = (getattr(module, name).detach().double() for name in (mean_name, var_name))
    weight, bias = (
        torch.full_like(mean, usual) if held is None else held.detach().double()
        for held, usual in ((tensor(module, norm.weight), 1.0), (tensor(module, norm.bias), 0.0))
    )
    carried.kept = {}
    if groups is not None:
        carried.exactness, carried.note = Exactness.CALIBRATE, f"with group scaling {_FRESH}"
        add_affine(carried, norm)
        made = {"weight": (norm.weight, weight), "bias": (norm.bias, bias)}
    else:
        carried.arguments |= {"affine": True, "bias": True}
        phi, scale = var + mean.square(), weight / (var + norm.eps).sqrt()
        made = {
            "weight": (norm.weight or var_name, scale * (phi + carried.arguments["eps"]).sqrt()),
            "bias": (norm.bias or mean_name, bias - scale * mean),
            _statistic(layer): (var_name, phi),
        }
        if "warmup_iters" not in options:
            carried.begin = _past_warmup(_seen(tensor(module, counter[0]) if counter else None))
    for name, (source, value) in made.items():
        if source is not None:
            dtype = getattr(module, source).dtype
            wide = torch.promote_types(dtype, torch.float32)  # as the layer has its statistics
            carried.converted[name] = source, value.to(wide if name == _statistic(layer) else dtype)
    return carried


@transfer("batch", "power_norm", Exactness.EVAL_EXACT, f"{_UNGROUPED}; {_FROM_BATCH}", by_options=True)
@transfer("ghost_batch", "power_norm", Exactness.EVAL_EXACT, f"{_UNGROUPED}; {_FROM_BATCH}", by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _from_batch(norm, module, options, PowerNorm)


@transfer(
    "frozen_batch",
    "power_norm",
    Exactness.EVAL_EXACT,
    f"{_UNGROUPED}; {_FROM_FROZEN}",
    by_options=True,
)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _from_batch(norm, module, options, PowerNorm)


@transfer("frozen_batch", "unified_norm", Exactness.EVAL_EXACT, _FROM_FROZEN, by_options=True)
@transfer("batch", "unified_norm", Exactness.EVAL_EXACT, _FROM_BATCH, by_options=True)
@transfer("ghost_batch", "unified_norm", Exactness.EVAL_EXACT, _FROM_BATCH, by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _from_batch(norm, module, options, UnifiedNorm)


def _from_rows(norm: Norm, module: nn.Module, options: Options, layer: Layer) -> Carried:
    carried = of_rows(norm, module)
    if norm.shape is None or len(norm.shape) != 1:
        raise Refused(
            f"it normalises {norm.shape} together, and a {layer.__name__} the channels of one dimension"
        )
    if norm.offset:
        add_offset(carried, norm, module)
    affine = carried.arguments
    carried.arguments = {"num_features": norm.shape[0], "channel_dim": norm.axis}
    carried.arguments |= {"affine": affine["elementwise_affine"], "bias": affine["bias"]}
    carried.over_channels, carried.in_training, carried.dropped = False, _IN_TRAINING, _OF_ROWS
    groups = _groups(layer, options, 1)
    if layer is PowerNorm:
        carried.arguments["group_num"] = groups
        if groups is None:
            carried.exactness, carried.note = Exactness.CALIBRATE, f"{_FRESH}; {_PADDING}"
        else:
            carried.begin = _as_group_scaling
            if norm.family == "rms" and groups == 1 and norm.eps == GROUP_EPS:
                carried.exactness = Exactness.EVAL_EXACT
    return carried


def _as_group_scaling(layer: nn.Module) -> None:
    """Lets a PowerNorm do no more than scale groups in eval mode, up to rounding."""
    if isinstance(layer, PowerNorm):
        layer.running_phi.fill_(max(1 - layer.eps, 0))


@transfer("layer", "power_norm", Exactness.APPROXIMATE, f"an RMSNorm {_BEGINS}", by_options=True)
@transfer(
    "rms",
    "power_norm",
    Exactness.APPROXIMATE,
    f"an RMSNorm with eps={GROUP_EPS:g} {_BEGINS}",
    by_options=True,
)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _from_rows(norm, module, options, PowerNorm)


@transfer("layer", "unified_norm", Exactness.CALIBRATE, f"{_FRESH}; {_PADDING}", by_options=True)
@transfer("rms", "unified_norm", Exactness.CALIBRATE, f"{_FRESH}; {_PADDING}", by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _from_rows(norm, module, options, UnifiedNorm)


def _stored(norm: Norm, module: nn.Module) -> Carried:
    """What any norm keeps of one by a mean square."""
    if len(norm.statistics) != 1:
        raise Refused("it has no running mean square")
    carried = of_channels(norm, module)
    add_affine(carried, norm)
    carried.arguments |= {"num_features": norm.channels}
    if isinstance(module, MeanSquareNorm):
        carried.arguments |= {name: getattr(module, name) for name in _SHARED}
    carried.in_training, carried.dropped = _IN_TRAINING, _BESIDES
    return carried


def _again(norm: Norm, module: nn.Module, options: Options, layer: Layer) -> Carried:
    """From one of the two layers to the other, or to itself."""
    carried = _stored(norm, module)
    own = (norm.groups or None) if norm.family == "power" else None
    groups = _groups(layer, options, own)
    carried.arguments["channel_dim"] = norm.axis
    if layer is PowerNorm:
        carried.arguments["group_num"] = groups
    if norm.momentum is not None:
        carried.arguments["alpha_fwd" if layer is PowerNorm else "decay"] = round(1 - norm.momentum, 12)
    if isinstance(module, layer):
        names = _OF_POWER if isinstance(module, PowerNorm) else (*_OF_UNIFIED, "window_size")
        carried.arguments |= {name: getattr(module, name) for name in names}
    if groups != own:
        carried.exactness, carried.note = Exactness.CALIBRATE, f"its groups change, and {_FRESH}"
        return carried
    carried.kept[_statistic(layer)] = norm.statistics[0]
    if isinstance(module, layer):
        same = {"buffer_x2", "buffer_gz"} if _same_windows(module, options) else set()
        carried.kept |= {name: name for name, _ in module.named_buffers() if name in {*_STATE, *same}}
        return carried
    carried.exactness = Exactness.EVAL_EXACT
    if "warmup_iters" not in options:
        carried.begin = _past_warmup(_seen(tensor(module, "iters")))
    return carried


def _same_windows(module: nn.Module, options: Options) -> bool:
    size = options.get("window_size", getattr(module, "window_size", None))
    return size == getattr(module, "window_size", None)


@transfer("power", "power_norm", Exactness.EXACT, same=True, by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _again(norm, module, options, PowerNorm)


@transfer("unified", "unified_norm", Exactness.EXACT, same=True, by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _again(norm, module, options, UnifiedNorm)


@transfer(
    "power",
    "unified_norm",
    Exactness.EVAL_EXACT,
    "its windows are empty",
    by_options=True,
)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _again(norm, module, options, UnifiedNorm)


@transfer("unified", "power_norm", Exactness.EVAL_EXACT, _UNGROUPED, by_options=True)
def _(norm: Norm, module: nn.Module, options: Options) -> Carried:
    return _again(norm, module, options, PowerNorm)


@transfer("power", "batch_norm", Exactness.EVAL_EXACT, _TO_BATCH)
@transfer("unified", "batch_norm", Exactness.EVAL_EXACT, _TO_BATCH)
def _(norm: Norm, module: nn.Module) -> Carried:
    if norm.family == "power" and norm.groups:
        raise Refused("it scales groups of channels at every position first, and a batch norm does not")
    if norm.axis != 1:
        raise Refused(
            f"its channels are in dimension {norm.axis}, and those of a batch norm in dimension 1 of (N, C, *)"
        )
    carried = _stored(norm, module)
    carried.arguments["momentum"] = norm.momentum
    if isinstance(module, MeanSquareNorm):
        carried.note = f"{_TO_BATCH}; nonfinite stays {module.nonfinite!r}"
    carried.kept["running_var"] = norm.statistics[0]
    carried.kept |= {"num_batches_tracked": "iters"} if tensor(module, "iters") is not None else {}
    return carried
