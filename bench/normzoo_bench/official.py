"""The authors' code of each layer as a contender: the same operators of torch in the same order, written anew.

It follows the descriptions of those codes, not their text, and uses the parameters and buffers of the layer
that it is compared with, so that both compute one function. Where a code makes copies that it does not need,
takes a mean in several steps or computes what nobody reads, so does this; where a description leaves the
operators open, the fewest are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case
from .official_running import Call, move, power_norm, spread, unified_norm


def build(case: Case, layer: nn.Module) -> Call | str:
    """A function of x with the parameters of `layer`, or why there is none."""
    entry = case.entry
    if entry.name not in BUILDERS:
        if not entry.official:
            return "there is no code of the authors"
        return "the authors' code is that of torch, or what the contender torch does"
    if reason := _not_taken(case):
        return reason
    own: Any = getattr(layer, "layer", layer)  # inside of what it needs beside x
    call = BUILDERS[entry.name](own, layer)

    def in_dtype_of_x(x: Tensor) -> Tensor:
        y = call(x)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    return in_dtype_of_x


def _not_taken(case: Case) -> str:
    """Why the authors' code does not take the input of a case."""
    last = case.memory_format == "channels_last"
    if case.entry.family == "running" and len(case.shape) == 4:
        return "the authors' code takes tokens, no images"
    if last and case.entry.name in ("batch_channel_norm", "weight_standardize"):
        return "the authors' code takes a view that channels_last does not have"
    return ""


def _others(x: Tensor) -> tuple[int, ...]:
    """The dimensions of samples and pixels."""
    return (0, *range(2, x.dim()))


# Rows


def _crms_norm(layer: Any, _: nn.Module) -> Call:
    """In float32; weight and bias are left out, as there."""

    def call(x: Tensor) -> Tensor:
        h = x.to(torch.float32) if x.dtype.itemsize < 4 else x
        dropped = h.sum(-1, keepdim=True)
        square = (h * h).sum(-1, keepdim=True) + dropped * dropped
        return h * torch.rsqrt(square / (x.shape[-1] + 1) + layer.eps)

    return call


def _at_time(p: Any, t: Tensor) -> Tensor:
    gate = torch.sigmoid((1 + p.nodecay_weight) * t + p.nodecay_bias)
    return (gate * p.param0 + (1 - gate) * p.param1).unsqueeze(1)


def _time_dependent_layer_norm(layer: Any, beside: Any) -> Call:
    def call(x: Tensor) -> Tensor:
        t = beside.t.unsqueeze(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=layer.eps)
        return _at_time(layer.weight, t) * normed + _at_time(layer.bias, t)

    return call


def _time_dependent_rms_norm(layer: Any, beside: Any) -> Call:
    def call(x: Tensor) -> Tensor:
        rms = x.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5
        return _at_time(layer.scale, beside.t.unsqueeze(1)) * (x / (rms + layer.eps))

    return call


# Channels


def _frozen_batch_norm(layer: Any, _: nn.Module) -> Call:
    """A product and a sum where there are gradients, and else torch's operator."""

    def call(x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            own = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            return F.batch_norm(x, *own, False, 0.0, layer.eps)
        scale = layer.weight * (layer.running_var + layer.eps).rsqrt()
        shift = layer.bias - layer.running_mean * scale
        return x * spread(scale, x).to(x.dtype) + spread(shift, x).to(x.dtype)

    return call


def _ghost_batch_norm(layer: Any, _: nn.Module) -> Call:
    """Batch norm of every piece, and the pieces put together."""

    def one(x: Tensor) -> Tensor:
        own = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        if layer.training:
            layer.num_batches_tracked.add_(1)
        return F.batch_norm(x, *own, layer.training, layer.momentum, layer.eps)

    def call(x: Tensor) -> Tensor:
        if not layer.training:
            return one(x)
        pieces = x.chunk(max(x.shape[0] // layer.ghost_batch_size, 1))
        return torch.cat([one(piece) for piece in pieces])

    return call


def _alpha_batch_norm(layer: Any, _: nn.Module) -> Call:
    """A batch norm whose output nobody reads extracts the statistics, in eval mode too: there the codes are
    wrapped around layers that are in eval mode already."""

    def call(x: Tensor) -> Tensor:
        mean, var = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)
        F.batch_norm(x, mean, var, None, None, True, 1.0, layer.eps)
        alpha = 1 - layer.source_weight
        mean = (1 - alpha) * layer.running_mean + alpha * mean
        var = (1 - alpha) * layer.running_var + alpha * var
        return F.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)

    return call


def _adab2n(layer: Any, beside: Any) -> Call:
    """Without the regulariser, which is small. Every task so far is there, so that no weight is lost."""

    def call(x: Tensor) -> Tensor:
        if not layer.training:
            own = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            return F.batch_norm(x, *own, False, 0.0, layer.eps)
        ids, pixels = beside.task_ids, tuple(range(2, x.dim()))
        counts = torch.bincount(ids)
        prior = layer.task_weight[: len(counts)].exp() + counts
        share = ((prior / prior.sum())[ids] / counts[ids]).to(x.dtype)
        mean = (share.unsqueeze(1) * x.mean(pixels)).sum(0)
        away = x - spread(mean, x)
        var = (share.unsqueeze(1) * (away * away).mean(pixels)).sum(0)
        move(layer.running_mean, mean, layer.momentum)
        move(layer.running_var, var, layer.momentum)
        normed = (x - spread(mean, x)) / torch.sqrt(spread(var, x) + layer.eps)
        return spread(layer.weight, x) * normed + spread(layer.bias, x)

    return call


def _batch_channel_norm(layer: Any, _: nn.Module) -> Call:
    """Batch norm, another that sees every group of a sample as a channel, and the affine map of groups."""

    def call(x: Tensor) -> Tensor:
        own = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        z = F.batch_norm(x, *own, layer.training, layer.momentum, layer.batch_eps)
        groups = layer.num_groups
        rows = z.view(1, x.shape[0] * groups, -1)
        rows = torch.batch_norm(rows, None, None, None, None, True, 0.0, layer.eps, False)
        rows = rows.view(x.shape[0], groups, -1)
        rows = layer.channel_weight.view(1, -1, 1) * rows + layer.channel_bias.view(1, -1, 1)
        return rows.view(x.shape)

    return call


def _of_region(x: Tensor, region: Tensor, eps: float) -> Tensor:
    """What is outside of a region filled with its mean, batch norm of that, and scaled back."""
    inside = x * region
    size = region.sum()
    size = torch.where(size == 0, 1, size)
    mean = inside.sum(_others(x)) / size
    filled = inside + (1 - region) * spread(mean, x)
    normed = F.batch_norm(filled, None, None, None, None, True, 0.0, eps)
    return normed * torch.sqrt(size / (x.numel() // x.shape[1]))


def _of_regions(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    return _of_region(x, mask, eps) + _of_region(x, 1 - mask, eps)


def _region_norm_b(layer: Any, beside: Any) -> Call:
    def call(x: Tensor) -> Tensor:
        mask = F.interpolate(beside.mask.to(x.dtype), x.shape[2:], mode="nearest")
        normed = _of_regions(x, mask, layer.eps)
        gammas = (layer.foreground_gamma, layer.background_gamma)
        betas = (layer.foreground_beta, layer.background_beta)
        parts = [
            (normed * region) * (1 + spread(gamma, x)) + spread(beta, x)
            for region, gamma, beta in zip((mask, 1 - mask), gammas, betas, strict=True)
        ]
        return parts[0] + parts[1]

    return call


def _region_norm_l(layer: Any, _: nn.Module) -> Call:
    """Which pixels are in a region is decided in float32, lest both compute different functions."""
    sa = layer.sa

    def conv(x: Tensor, of: nn.Conv2d) -> Tensor:
        bias = None if of.bias is None else of.bias.to(x.dtype)
        return F.conv2d(x, of.weight.to(x.dtype), bias, padding=of.padding)  # type: ignore[arg-type]

    def call(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, most = x.mean(1, keepdim=True, dtype=wide), x.max(1, keepdim=True).values
        importance = torch.sigmoid(conv(torch.cat((mean, most.to(wide)), 1), sa.conv1))
        mask = (importance.detach() >= layer.threshold).to(x.dtype)
        importance = importance.to(x.dtype)
        gamma, beta = conv(importance, sa.gamma_conv), conv(importance, sa.beta_conv)
        return _of_regions(x, mask, layer.eps) * (1 + gamma) + beta

    return call


def _evo_norm_b0(layer: Any, _: nn.Module) -> Call:
    def call(x: Tensor) -> Tensor:
        if layer.training:
            var = x.var(_others(x), correction=0)
            move(layer.running_var, var, layer.momentum)
        else:
            var = layer.running_var
        pixels = tuple(range(2, x.dim()))
        of_image = torch.sqrt(x.var(pixels, correction=0, keepdim=True) + layer.eps)
        line = spread(layer.v, x) * x + of_image
        of_batch = torch.sqrt(spread(var, x) + layer.eps)
        return x / torch.maximum(of_batch, line) * spread(layer.weight, x) + spread(layer.bias, x)

    return call


def _evo_norm_s0(layer: Any, _: nn.Module) -> Call:
    """The deviations of groups are laid out as large as x."""

    def call(x: Tensor) -> Tensor:
        parts = x.reshape(x.shape[0], layer.groups, -1, *x.shape[2:])
        std = torch.sqrt(parts.var(tuple(range(2, parts.dim())), correction=0, keepdim=True) + layer.eps)
        std = std.expand(parts.shape).reshape(x.shape)
        swish = x * torch.sigmoid(spread(layer.v, x) * x)
        return swish / std * spread(layer.weight, x) + spread(layer.bias, x)

    return call


def _weight_standardize(layer: Any, _: nn.Module) -> Call:
    """The mean dimension by dimension."""

    def call(w: Tensor) -> Tensor:
        mean = w
        for dim in range(1, w.dim()):
            mean = mean.mean(dim, keepdim=True)
        w = w - mean
        std = w.view(len(w), -1).std(1).view(-1, *(1,) * (w.dim() - 1)) + layer.eps
        return w / std.expand_as(w)

    return call


BUILDERS: dict[str, Callable[[Any, Any], Call]] = {
    "crms_norm": _crms_norm,
    "time_dependent_layer_norm": _time_dependent_layer_norm,
    "time_dependent_rms_norm": _time_dependent_rms_norm,
    "frozen_batch_norm": _frozen_batch_norm,
    "ghost_batch_norm": _ghost_batch_norm,
    "alpha_batch_norm": _alpha_batch_norm,
    "adab2n": _adab2n,
    "batch_channel_norm": _batch_channel_norm,
    "region_norm_b": _region_norm_b,
    "region_norm_l": _region_norm_l,
    "evo_norm_b0": _evo_norm_b0,
    "evo_norm_s0": _evo_norm_s0,
    "power_norm": power_norm,
    "unified_norm": unified_norm,
    "weight_standardize": _weight_standardize,
}
"""By the name of the entry; of the authors' inner layer and of the module with what it needs beside x."""
