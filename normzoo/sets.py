r"""Sets of values by their mean and variance, and their unions.

A mean is kept as pivot + delta: the pivot is a number near it, treated as a constant, and delta what is left.
Sets are merged on differences of pivots by the formula of Chan, Golub and LeVeque, *Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances*, 1979. The sum pivot + delta is never formed on the way,
because it would round away what delta knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import KERNEL_DTYPES, plain
from .fused import Tensors, fused
from .passes import divisor


@dataclass(frozen=True, eq=False)
class Sets:
    """Disjoint sets of values. Tensors are ([2 regions,] [sets of samples,] sets of channels).

    With regions a merged batch leaves an axis of size 1.
    """

    count: Any
    """Values in each set: a number, or a tensor that broadcasts with the others."""
    pivot: Tensor
    delta: Tensor
    m2: Tensor
    found: tuple[Tensor, Tensor] | None = None
    """Mean and variance, where a kernel has found them too."""

    @property
    def mean(self) -> Tensor:
        """The mean, rounded."""
        return self.found[0] if self.found else self.pivot + self.delta

    @property
    def var(self) -> Tensor:
        """The biased variance, m2 / count."""
        return self.found[1] if self.found else self.m2 / divisor(self.count)

    @property
    def unbiased_var(self) -> Tensor:
        """m2 / (count − 1)."""
        return self.m2 / divisor(self.count - 1)

    def merged(self, dim: int, keepdim: bool = False) -> Sets:
        """The unions of the sets along `dim`."""
        if isinstance(self.count, Tensor):
            count = self.count.expand(self.m2.shape)
            n = count.sum(dim, keepdim=True)
            share = count / divisor(n)
        else:
            count, n = self.count, self.count * self.m2.shape[dim]
            share = 1 / max(self.m2.shape[dim], 1)
        pivot = (share * self.pivot).sum(dim, keepdim=True).detach()
        away = (self.pivot - pivot) + self.delta
        delta = (share * away).sum(dim, keepdim=True)
        m2 = (self.m2 + count * (away - delta).square()).sum(dim, keepdim=True)
        found = Sets(n, pivot, delta, m2)
        return found if keepdim else found.each(lambda t: t.squeeze(dim))

    def each(self, change: Callable[[Tensor], Tensor]) -> Sets:
        """Every tensor changed."""
        count = change(self.count) if isinstance(self.count, Tensor) else self.count
        return Sets(count, change(self.pivot), change(self.delta), change(self.m2))

    def counted(self) -> Sets:
        """With a tensor for the count, as large as the others."""
        count = self.count if isinstance(self.count, Tensor) else torch.full_like(self.m2, self.count)
        return Sets(count.expand(self.m2.shape), self.pivot, self.delta, self.m2)


def standardized(
    delta: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of weight · (x − pivot − delta) / sqrt(var + eps) + bias, for statistics of any origin."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    if bias is None:
        return scale, -delta * scale
    return scale, torch.addcmul(bias.to(scale.dtype), delta, scale, value=-1)


def root(var: Tensor, mean: Tensor | None, eps: float, inverse: bool = False) -> Tensor:
    """sqrt(var + eps), with `mean` that of the mean square, or its inverse."""
    square = var if mean is None else var + mean.square()
    return torch.rsqrt(square + eps) if inverse else torch.sqrt(square + eps)


def less(sets: Sets, lost: Tensor) -> Sets:
    """Where a share `lost` of the weight is that of values which are not there, and count as zeros: with the
    mean Σ w x, Σ w = 1 − lost, and the squares around that."""
    missed = lost * sets.mean
    m2 = divisor(sets.count) * (1 - lost) * (sets.var + missed.square())
    return Sets(sets.count, sets.pivot, sets.delta - missed, m2)


def united(sets: Sets, how: str, size: int, regions: bool = False) -> Sets:
    """Unions of `sets`.

    how: ``"batch"``, of all samples; ``"chunks"``, of `size` samples, the last of which may be fewer;
        ``"interleaved"``, of `size` samples, as far apart as there are unions; ``"groups"``, of `size` columns.
    """
    if how == "batch":
        return sets.merged(-2, keepdim=regions)
    if how == "groups":
        sets = sets.counted() if isinstance(sets.count, Tensor) else sets
        return sets.each(lambda t: t.unflatten(-1, (-1, size))).merged(-1)
    n = sets.m2.shape[-2]
    if how == "interleaved":
        return sets.counted().each(lambda t: t.unflatten(-2, (size, n // size))).merged(-3)
    padded = sets.counted().each(lambda t: F.pad(t, (0, 0, 0, -n % size)))
    return padded.each(lambda t: t.unflatten(-2, (-1, size))).merged(-2)


def spread(t: Tensor, how: str, size: int, rows: int, channels: int) -> Tensor:
    """A statistic of sets, where the entries can see it: so many rows of channels."""
    if t.shape[-1] != channels:
        t = t.unsqueeze(-1).expand(*t.shape, channels // t.shape[-1]).flatten(-2)
    if how == "interleaved":
        return t.repeat(*(1,) * (t.dim() - 2), size, 1)
    return t.repeat_interleave(size, -2)[..., :rows, :] if how == "chunks" else t


class Scaling(NamedTuple):
    """What becomes of the entries: ``"standardize"``, (scale, shift); ``"inverse"``, a scale; ``"root"``."""

    kind: str = "none"
    eps: float = 1.0
    about_zero: bool = False
    """Whether the root is that of the mean square, not of the variance."""


class Pending(NamedTuple):
    """Sets that kernels unite, see :func:`united`, once it is known what for. `how` may be ``"own"``: each is
    left as it is."""

    source: Sets
    how: str
    size: int
    regions: bool = False
    weights: Tensor | None = None
    lost: Tensor | None = None

    def found(
        self, scaling: Scaling, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Sets]:
        """(what becomes of the entries, the sets)."""
        s = self.source
        count, number = (s.count, 0) if isinstance(s.count, Tensor) else (None, s.count)
        size = s.m2.shape[-2] if self.how == "batch" else self.size
        union = Union(number, self.how, size, self.regions, self.weights is not None, scaling)
        out = fused(union, s.pivot, s.delta, s.m2, count, self.weights, self.lost, weight, bias)
        entries, unions = out[: union.entries], out[union.entries :]
        if not unions:
            return entries, s
        rest, m2, mean, var, n, base = unions
        if count is None and self.weights is None and self.how in ("batch", "groups"):
            n = number * size
        if self.lost is not None:  # as mean and variance have it in them
            rest, m2 = torch.addcmul(rest, self.lost, base + rest, value=-1), n * var
        return entries, Sets(n, base, rest, m2, (mean, var))


@dataclass(frozen=True)
class Union:
    """The arithmetic of that. Its tensors are pivot, delta and m2 of the sets, their counts (None: all have
    `number`), weights of the samples, the share that is lost of these, and weight and bias of a scaling."""

    number: int | float
    how: str
    size: int
    regions: bool
    weighted: bool
    scaling: Scaling

    @property
    def differentiable(self) -> int:
        return self.entries + (0 if self.how == "own" else 4 + self.weighted)

    @property
    def entries(self) -> int:
        """How many tensors of entries there are."""
        return {"none": 0, "standardize": 2}.get(self.scaling.kind, 1)

    def plain(self, tensors: Any) -> tuple[Tensor, ...]:
        pivot, delta, m2, count, weights, lost, weight, bias = tensors
        sets = Sets(self.number if count is None else count, pivot, delta, m2)
        if weights is not None:
            sets = weighted(sets, weights)
        union = sets if self.how == "own" else united(sets, self.how, self.size, self.regions)
        shown = union if lost is None else less(union, lost)
        rows, channels = m2.shape[-2] if m2.dim() > 1 else 1, m2.shape[-1]

        def at_entries(t: Tensor) -> Tensor:
            return spread(t, self.how, self.size, rows, channels).expand(m2.shape)

        kind, eps, about_zero = self.scaling
        entries: tuple[Tensor, ...] = ()
        if kind == "standardize":
            gap = (at_entries(shown.pivot) - pivot) + at_entries(shown.delta)
            entries = standardized(gap, at_entries(shown.var), weight, bias, eps)
        elif kind != "none":
            mean = shown.mean if about_zero else None
            scale = at_entries(root(shown.var, mean, eps, kind == "inverse"))
            entries = (scale if weight is None else scale * weight,)
        if self.how == "own":
            return entries
        union = union.counted()
        return *entries, union.delta, union.m2, shown.mean, shown.var, union.count, union.pivot

    def forward(self, tensors: Any) -> tuple[tuple[Tensor, ...], Tensors]:
        from normzoo_kernels import sets as kernels

        pivot, delta, m2, count, *others = tensors
        count = None if count is None else count.expand(m2.shape)
        given: Any = (pivot, delta, m2, count, *others, *self._options())
        found = kernels.forward(*given)
        entries = found[: self.entries]
        if self.how == "own":
            return entries, ()
        n, base, *unions = (_shaped(t, self._shape(m2.shape)) for t in found[2:])
        return (*entries, *unions, n, base), (n, base, *unions[:2])

    def backward(self, tensors: Any, kept: Any, grads: Tensors, needs: Sequence[bool]) -> Tensors:
        from normzoo_kernels import sets as kernels

        pivot, delta, m2, count, *others = tensors
        count = None if count is None else count.expand(m2.shape)
        entries, unions = grads[: self.entries], grads[self.entries :]
        dscale, dshift = (*entries, None, None)[:2]
        drest, dunion, dmean, dvar, dn = (*unions, *(None,) * 5)[:5]
        of_samples = others[0] is not None and (needs[4] or needs[5])
        wanted = [needs[1], needs[2], of_samples, needs[6], needs[7]]
        given = (dscale, dshift, dn, drest, dunion, dmean, dvar, pivot, delta, m2, count, *others)
        unions = kept or (m2, m2, m2, m2)  # not looked at
        found: Any = (*given, *unions, *self._options(), wanted)
        ddelta, dm2, dweights, dweight, dbias = kernels.backward(*found)
        dlost = None
        if of_samples:
            dweights, dlost = dweights[:-1], dweights[-1]
        return None, ddelta, dm2, None, dweights, dlost, dweight, dbias

    def _options(self) -> tuple[Any, ...]:
        kind, eps, about_zero = self.scaling
        return float(self.number), self.how, self.size, kind, about_zero, eps

    def _shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.how == "groups":
            return *shape[:-1], shape[-1] // self.size
        *lead, n, c = shape
        if self.how == "batch":
            return (*lead, 1, c) if self.regions else (*lead, c)
        return *lead, -(-n // self.size), c


def _shaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """t, which nobody else has, in a shape; no view where that can be, which could not be changed in place."""
    if t.shape[1:] == shape:
        return t.squeeze_(0)
    return t if t.shape == shape else t.view(shape)


def weighted(sets: Sets, weights: Tensor) -> Sets:
    """With samples that count for more or less."""
    w = weights.to(sets.m2.dtype).unsqueeze(-1)
    return Sets(sets.count * w, sets.pivot, sets.delta, sets.m2 * w)


def fits(*parameters: Tensor | None) -> bool:
    """Whether the kernels take such parameters of channels."""
    return all(t is None or (t.dim() == 1 and t.dtype in KERNEL_DTYPES and plain(t)) for t in parameters)
