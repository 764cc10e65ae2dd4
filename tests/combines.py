"""Norms as combines, each beside the same norm written out over all of x by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normzoo.engine import normalize

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    combine: Callable
    """(m, weight, bias, mix) -> (scale, shift)."""
    plain: Callable
    """(x, weight, bias, mix) -> y, the parameters as they broadcast with x."""
    per_sample: bool = True

    def engine(self, x: Tensor, *parameters: Tensor, channel_dim: int = 1) -> Tensor:
        def combine(m):
            return self.combine(m, *parameters)

        return normalize(x, combine, per_sample=self.per_sample, channel_dim=channel_dim)[0]

    def exact(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """Statistics corrected as the engine corrects them, so that float32 means the same in both."""
        wide = [p.reshape(-1, *(1,) * (x.dim() - 2)) if p.dim() else p for p in parameters]
        return self.plain(x, *wide)


def spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def mean_of(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A mean over no dimensions is x itself, which torch sees otherwise."""
    return x.mean(dims, keepdim=True) if dims else x


def centred(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x − mean and the biased variance."""
    pivot = mean_of(x, dims).detach()
    away = x - pivot
    away = away - mean_of(away, dims)
    return away, mean_of(away.square(), dims)


def unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    away, var = centred(x, dims)
    return away / torch.sqrt(var + EPS)


def _batch(m, w, b, a):
    return m.standardize(w, b, EPS)


def _group(m, w, b, a):
    return m.over_groups(2).standardize(w, b, EPS)


def _group_plain(x, w, b, a):
    folded = x.unflatten(1, (2, -1))
    return unit(folded, (2, *(d + 1 for d in spatial(x)))).flatten(1, 2) * w + b


def _batch_channel(m, w, b, a):
    """GroupNorm of BatchNorm as one map (closed form of the composition)."""
    scale, shift = m.over_batch().standardize(w, b, EPS)
    scale2, shift2 = m.affine(scale, shift).over_groups(2).standardize(eps=EPS)
    return scale * scale2, shift * scale2 + shift2


def _batch_channel_plain(x, w, b, a):
    z = (unit(x, (0, *spatial(x))) * w + b).unflatten(1, (2, -1))
    return unit(z, (2, *(d + 1 for d in spatial(x)))).flatten(1, 2)


def _mixed(m, w, b, a):
    batch = m.over_batch()
    scale = w * torch.rsqrt(a * batch.var + (1 - a) * m.var + EPS)
    return scale, b - (a * batch.delta + (1 - a) * m.delta) * scale


def _mixed_plain(x, w, b, a):
    batch, own = centred(x, (0, *spatial(x))), centred(x, spatial(x))
    away = a * batch[0] + (1 - a) * own[0]
    return away / torch.sqrt(a * batch[1] + (1 - a) * own[1] + EPS) * w + b


def _detached(m, w, b, a):
    scale = w * torch.rsqrt(m.var.detach() + EPS)
    return scale, b - m.delta.detach() * scale


def _detached_plain(x, w, b, a):
    away, var = centred(x.detach(), (0, *spatial(x)))
    return (x - x.detach() + away) / torch.sqrt(var + EPS) * w + b


def _half_detached(m, w, b, a):
    """The mean is differentiated, the variance is not."""
    scale = w * torch.rsqrt(m.var.detach() + EPS)
    return scale, b - m.delta * scale


def _half_detached_plain(x, w, b, a):
    away, var = centred(x, (0, *spatial(x)))
    return away / torch.sqrt(var.detach() + EPS) * w + b


def _ghost(m, w, b, a):
    return m.over_chunks(3).standardize(w, b, EPS)


def _ghost_plain(x, w, b, a):
    return torch.cat([unit(part, (0, *spatial(x))) for part in x.split(3)]) * w + b


def _weighted(m, w, b, a):
    weights = torch.linspace(0.5, 2, m.pivot.shape[0], dtype=m.pivot.dtype)
    return m.over_batch(weights).standardize(w, b, EPS)


def _weighted_plain(x, w, b, a):
    weights = torch.linspace(0.5, 2, len(x), dtype=x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    pivot = x.mean((0, *spatial(x)), keepdim=True).detach()
    share = (weights / weights.sum()).expand(len(x), 1, *x.shape[2:]) / x[0, 0].numel()
    away = (x - pivot) - (share * (x - pivot)).sum((0, *spatial(x)), keepdim=True)
    return away / torch.sqrt((share * away.square()).sum((0, *spatial(x)), keepdim=True) + EPS) * w + b


CASES = {
    "batch": Case(_batch, lambda x, w, b, a: unit(x, (0, *spatial(x))) * w + b, per_sample=False),
    "instance": Case(_batch, lambda x, w, b, a: unit(x, spatial(x)) * w + b),
    "group": Case(_group, _group_plain),
    "batch then group": Case(_batch_channel, _batch_channel_plain),
    "mixed": Case(_mixed, _mixed_plain),
    "ghost": Case(_ghost, _ghost_plain),
    "weighted": Case(_weighted, _weighted_plain),
    "detached": Case(_detached, _detached_plain, per_sample=False),
    "half detached": Case(_half_detached, _half_detached_plain, per_sample=False),
}


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weight, bias and a mixing weight, all of them trained."""
    chosen = torch.rand(channels) + 0.5, torch.randn(channels), torch.tensor(0.3)
    return [p.to(dtype).requires_grad_() for p in chosen]
