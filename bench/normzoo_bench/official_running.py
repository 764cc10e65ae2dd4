"""The authors' codes of PowerNorm and Unified Norm as contenders, and what all of :mod:`.official` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

Call = Callable[[Tensor], Tensor]


def spread(t: Tensor, x: Tensor) -> Tensor:
    """(C,) beside x (N, C, *)."""
    return t.view(1, -1, *(1,) * (x.dim() - 2))


@torch.no_grad()
def move(running: Tensor, new: Tensor, momentum: float) -> None:
    running.copy_((1 - momentum) * running + momentum * new)


class _Power(Function):
    """A step for x (B, C, T, 1) by the batch's mean square of `flat` (M, C), or by the stored one."""

    @staticmethod
    def forward(ctx, x, weight, bias, flat, layer):
        steps = int(layer.iters.item())
        q = (flat * flat).mean(0)
        phi = layer.running_phi
        z = x / torch.sqrt(spread(q if steps <= layer.warmup_iters else phi, x) + layer.eps)
        ctx.save_for_backward(z, q, weight)
        ctx.layer = layer
        if steps < layer.warmup_iters:
            phi.copy_(phi * (steps - 1) / steps + q / steps)
        phi.copy_(layer.alpha_fwd * phi + (1 - layer.alpha_fwd) * q)
        return spread(weight, x) * z + spread(bias, x)

    @staticmethod
    def backward(ctx, *grads):
        (dy,), (z, q, weight), layer = grads, ctx.saved_tensors, ctx.layer
        g = dy * spread(weight, dy)
        g = g * 1
        (g * z).mean(3).mean(2).mean(0)  # which nobody reads
        h = g - (1 - layer.alpha_bkw) * spread(layer.ema_gz, dy) * z
        layer.ema_gz.add_((h * z).mean(3).mean(2).mean(0))
        dx = 1 / torch.sqrt(spread(q, dy) + layer.eps) * h
        return dx, (dy * z).sum(3).sum(2).sum(0), dy.sum(3).sum(2).sum(0), None, None


def power_norm(layer: Any, _: nn.Module) -> Call:
    """Group scaling with its divisors laid out as large as x, a copy for the statistics, and one each way for
    the order of dimensions."""

    def scaled(x: Tensor) -> Tensor:
        parts = x.contiguous().reshape(*x.shape[:-1], layer.group_num, -1)
        square = (parts * parts).mean(-1, keepdim=True)
        square = square.repeat_interleave(parts.shape[-1], -1).reshape(x.shape)
        return x / torch.sqrt(square + 1e-5)

    def call(x: Tensor) -> Tensor:
        tokens = scaled(x if x.dim() == 3 else x.unsqueeze(0))
        flat = tokens.clone().reshape(-1, tokens.shape[-1])
        u = tokens.permute(1, 2, 0).contiguous().unsqueeze(-1)
        if layer.training:
            layer.iters.add_(1)
            y = _Power.apply(u, layer.weight, layer.bias, flat, layer)
        else:
            y = u / torch.sqrt(spread(layer.running_phi, u) + layer.eps)
            y = spread(layer.weight, u) * y + spread(layer.bias, u)
        return y.squeeze(-1).permute(2, 0, 1).contiguous().view(x.shape)

    return call


class _Unified(Function):
    """A step for x (M, C) without the filter of outliers."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        step, window = int(layer.iters.item()), layer.buffer_x2
        q = (x * x).mean(0)
        window[step % len(window)] = q
        own = len(window) <= 1
        by_batch = step <= len(window) or step < layer.warmup_iters or own
        d = q if by_batch else window.log().mean(0).exp()
        ratio = torch.sqrt(d + layer.eps) / torch.sqrt(layer.running_var + layer.eps)
        late = step > max(1000, layer.warmup_iters) and not own
        ratio = ratio.clamp(1 / 5, 5) if late else torch.ones_like(ratio)
        z = x / torch.sqrt(d + layer.eps)
        move(layer.running_var, d, 1 - layer.decay)
        ctx.save_for_backward(z, d, ratio, weight)
        ctx.layer, ctx.step, ctx.own = layer, step, own
        return weight * z + bias

    @staticmethod
    def backward(ctx, *grads):
        (dy,), (z, d, ratio, weight), layer = grads, ctx.saved_tensors, ctx.layer
        g = dy * weight * ratio
        gz, window = (g * z).mean(0), layer.buffer_gz
        window[ctx.step % len(window)] = layer.ema_gz if ctx.own else gz
        by_batch = ctx.step <= len(window) or ctx.step < layer.warmup_iters or ctx.own
        mean = gz if by_batch else window.mean(0)
        move(layer.ema_gz, mean, 1 - layer.decay)
        c = mean if ctx.own else layer.ema_gz
        dx = (g - c * z) / torch.sqrt(d + layer.eps)
        return dx, ratio * (dy * z).sum(0), dy.sum(0), None


def unified_norm(layer: Any, _: nn.Module) -> Call:
    def call(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if layer.training:
            layer.iters.add_(1)
            y = _Unified.apply(rows, layer.weight, layer.bias, layer)
        else:
            y = layer.weight * (rows / torch.sqrt(layer.running_var + layer.eps)) + layer.bias
        return y.view(x.shape)

    return call
