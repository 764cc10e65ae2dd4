"""The part of a step along its weight, row by row or as a whole, for many weights at once."""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
"""A parameter group of an optimizer."""
Batch = list[Tensor]
"""Tensors of one device and dtype. A sharded one, a DTensor, goes with its local part."""


def descend(
    group: Group,
    lr: float | Tensor,
    decay: float | Tensor,
    params: Batch,
    weights: Batch,
    grads: Batch,
    steps: Batch,
    *,
    in_place: bool = False,
) -> None:
    """w ← (1 − decay · ratio) w − lr · (the step without its part along w), in place.

    The ratio is wd_ratio where there is a projection, else 1. With `in_place` the steps change too.

    Args:
        group: has weight_decay, delta, wd_ratio and eps.
        params: whose weights these are; they themselves, or DTensors of them, or others of lower precision.
    """
    decays = group["weight_decay"] > 0
    apart = [group["delta"] > 0 and p.dim() > 1 and p.numel() > 0 for p in params]
    if any(apart):
        matrices, w, g, u = (list(compress(batch, apart)) for batch in (params, weights, grads, steps))
        along, ratio = _radial_parts(matrices, w, g, u, group["delta"], group["wd_ratio"], group["eps"])
        if in_place:
            _add_multiples(matrices, u, w, -along)
        if decays or not in_place:
            _add_multiples(matrices, w, w, (0.0 if in_place else lr * along) - decay * ratio)
    if decays and not all(apart):
        torch._foreach_mul_([w for w, done in zip(weights, apart, strict=True) if not done], 1 - decay)
    if isinstance(lr, Tensor):
        torch._foreach_add_(weights, torch._foreach_mul(steps, -lr))
    else:
        torch._foreach_add_(weights, steps, alpha=-lr)


def _radial_parts(
    params: Batch, weights: Batch, grads: Batch, steps: Batch, delta: float, ratio: float, eps: float
) -> tuple[Tensor, Tensor]:
    """What times a row of a weight is the part to take off its step, and the ratio of weight decay there.

    A weight counts as scale-invariant in its rows, or else as a whole, where the largest absolute cosine with
    its gradient is below delta / sqrt(entries); elsewhere nothing is taken off, and the ratio is 1.
    Everything stays on the device, decisions too.

    Args:
        params: of two dimensions or more, and not empty.
        weights, grads, steps: of each parameter, or of its local part.
        delta: how far from orthogonal counts as orthogonal.
        ratio: of a weight that counts as scale-invariant.
        eps: lower bound of norms in the cosine; added to the norm of a weight in the projection.

    Returns:
        Two vectors, with a number for each row of each parameter.
    """
    rows = [len(p) for p in params]

    def of_rows(reduce: Callable[..., Tensor], batch: Iterable[Tensor]) -> Batch:
        # By dimensions rather than by a view, which not every memory format has.
        return [reduce(t, dim=tuple(range(1, t.dim()))) for t in batch]

    def each(values: Tensor) -> Batch:
        return list(values.split(rows))

    def spread(values: Tensor) -> Tensor:
        return torch.cat([value.expand(n) for value, n in zip(values.unbind(), rows, strict=True)])

    def norm(values: Tensor) -> Tensor:
        return torch.stack(torch._foreach_norm(each(values)))

    def total(values: Tensor) -> Tensor:
        # There is no _foreach_sum.
        above, below = (torch._foreach_norm(each(part.clamp(min=0)), 1) for part in (values, -values))
        return torch.stack(above) - torch.stack(below)

    def cosine(dots: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return dots.abs() / (g.clamp(min=eps) * w.clamp(min=eps))

    def orthogonal(largest: Sequence[Tensor], entries: Sequence[float]) -> Tensor:
        return torch.stack(torch._foreach_mul(list(largest), [math.sqrt(n) for n in entries])) < delta

    def along(pushes: Tensor, w: Tensor) -> Tensor:
        return pushes / (w + eps) / (w + eps)  # the square of a norm can overflow

    # On a CPU a product is summed up while it is in the cache.
    products = torch._foreach_mul if weights[0].is_cuda else partial(map, torch.mul)
    found = [of_rows(torch.linalg.vector_norm, batch) for batch in (grads, weights)]
    found += [of_rows(torch.sum, products(batch, weights)) for batch in (grads, steps)]
    for i, p in enumerate(params):
        if sharded(p):
            for numbers, whole in zip(found, _gathered(p, *(numbers[i] for numbers in found)), strict=True):
                numbers[i] = whole
    g, w, dots, pushes = map(torch.cat, found)
    whole_w = norm(w)

    sizes = [p.numel() for p in params]
    in_rows = orthogonal(
        torch._foreach_norm(each(cosine(dots, g, w)), math.inf),
        [size / n for size, n in zip(sizes, rows, strict=True)],
    )
    as_whole = orthogonal(cosine(total(dots), norm(g), whole_w).unbind(), sizes)

    whole = torch.where(as_whole, along(total(pushes), whole_w), 0.0)
    ratios = torch.where(in_rows | as_whole, torch.full_like(whole, ratio), 1.0)
    return torch.where(spread(in_rows), along(pushes, w), spread(whole)), spread(ratios)


def _add_multiples(params: Batch, targets: Batch, weights: Batch, factors: Tensor) -> None:
    """target += factor · weight, with the factor of each row of each parameter."""
    for p, target, w, c in zip(params, targets, weights, factors.split([len(p) for p in params]), strict=True):
        own = _own_rows(p, c) if sharded(p) else c
        target.addcmul_(w, own.view(-1, *[1] * (w.dim() - 1)))


def sharded(t: Any) -> bool:
    """Whether it is a DTensor, whose module takes long to import."""
    return isinstance(t, Tensor) and hasattr(t, "device_mesh")


def placed(t: Any) -> bool:
    """Whether `_gathered` and `_own_rows` can deal with how it is sharded."""
    if not sharded(t):
        return True
    from torch.distributed.tensor import Replicate, Shard

    return all(type(at) in (Shard, Replicate) for at in t.placements)


def local(t: Any) -> Tensor:
    return t.to_local() if sharded(t) else t


def local_grad(p: Any) -> Tensor:
    """The gradient of a parameter, sharded as that is."""
    return p.grad.redistribute(placements=p.placements).to_local() if sharded(p) else p.grad


def _gathered(p: Any, g: Tensor, w: Tensor, dots: Tensor, pushes: Tensor) -> Sequence[Tensor]:
    """The same of all rows, from what is here, in one collective."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    layout = [(Partial() if at.dim else Shard(1)) if at.is_shard() else at for at in p.placements]
    here = torch.stack([g.square(), w.square(), dots, pushes])
    size = torch.Size((len(here), len(p)))
    there = DTensor.from_local(here, p.device_mesh, layout, run_check=False, shape=size, stride=(len(p), 1))
    g, w, dots, pushes = there.full_tensor()
    return g.sqrt(), w.sqrt(), dots, pushes


def _own_rows(p: Any, values: Tensor) -> Tensor:
    """Of `values`, one for each row of all of p, those of the rows that are here."""
    from torch.distributed.tensor import DTensor, Replicate

    layout = [at if at.is_shard(0) else Replicate() for at in p.placements]
    everywhere = DTensor.from_local(values, p.device_mesh, [Replicate()] * len(layout), run_check=False)
    return everywhere.redistribute(placements=layout).to_local()
