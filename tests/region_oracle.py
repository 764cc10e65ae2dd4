"""Region normalization written out: each region by boolean indexing, in the dtype of x."""

from __future__ import annotations

import torch
from torch import Tensor, nn

AFFINE = ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta")


def regions(
    x: Tensor,
    hole: Tensor,
    foreground_gamma: Tensor | float = 0.0,
    foreground_beta: Tensor | float = 0.0,
    background_gamma: Tensor | float = 0.0,
    background_beta: Tensor | float = 0.0,
    *,
    eps: float = 1e-5,
    per_instance: bool = False,
    separate_beta: bool = False,
) -> Tensor:
    """x (N, C, *), hole (N, *) bool. Variances are biased, and eps counts as eps * pixels / pixels inside."""
    both = foreground_beta + background_beta
    inside = foreground_gamma, foreground_beta if separate_beta else both
    outside = background_gamma, background_beta if separate_beta else both
    parts = []
    for samples in [[n] for n in range(len(x))] if per_instance else [list(range(len(x)))]:
        pixels, where = x[samples].movedim(1, -1), hole[samples]
        y = torch.zeros_like(pixels)
        for region, (gamma, beta) in ((where, inside), (~where, outside)):
            if region.any():
                v = pixels[region]
                mean = v.mean(0)
                var = (v - mean).square().mean(0)
                unit = (v - mean) / (var + eps * where.numel() / len(v)).sqrt()
                y = y.index_put((region,), unit * (1 + gamma) + beta)
        parts.append(y.movedim(-1, 1))
    return torch.cat(parts)


def oracle_of(layer: nn.Module):
    """The same as a :class:`RegionNormB` for masks of any size: (x, hole, *parameters)."""
    how = {name: getattr(layer, name) for name in ("eps", "per_instance", "separate_beta")}
    return lambda x, hole, *affine: regions(x, hole, *affine, **how)


def randomized(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape).to(p) / 2)
    return layer


def gradients(call, leaves, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every leaf; those are copied."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = call(*leaves)
    found = torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | {f"gradient {i}": g for i, g in enumerate(found)}


def called(layer: nn.Module, *others: Tensor):
    """The layer as a function of x and its parameters."""
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, *others))

    return call
