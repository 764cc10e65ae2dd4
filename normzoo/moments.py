"""What a combine works with: the statistics of x, and the sets that they belong to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, ranks
from .passes import divisor
from .sets import Pending, Scaling, Sets, fits, less, root, spread, standardized, united, weighted

__all__ = ["Moments", "Sets", "standardized"]


class Moments:
    r"""Statistics of x for every channel, or for every sample and channel: what a combine works with.

    ``count``, ``delta``, ``m2``, ``mean`` and ``var`` are those of the set that a channel (a sample's channel)
    belongs to. At first each is its own set; ``over_batch``, ``over_groups``, ``over_channels``,
    ``over_chunks`` and ``across_ranks`` merge sets, and the same attributes then tell about the union. So

    >>> import torch
    >>> m = Moments(4, torch.zeros(2, 6), torch.zeros(2, 6), torch.rand(2, 6))  # 2 samples of 6 channels
    >>> m.over_groups(3).var.shape  # each channel sees the variance of its group
    torch.Size([2, 6])
    >>> m.over_batch().var.shape  # one for all samples
    torch.Size([6])

    Args:
        count: values behind each entry: a number or a tensor that broadcasts.
        pivot: (C,) or (N, C), with a leading axis of size 2 where there are two regions. A constant.
        delta: mean − pivot, shaped like `pivot`.
        m2: the sum of (x − mean)², shaped like `pivot`.
        regions: whether there is that leading axis.
        kernels: whether sets are merged, and scales made of them, by kernels; statistics are float32 then.

    :func:`normzoo.engine.normalize` makes them and hands them to a combine.
    """

    def __init__(
        self,
        count: Any,
        pivot: Tensor,
        delta: Tensor,
        m2: Tensor,
        *,
        regions: bool = False,
        kernels: bool = False,
    ) -> None:
        self.pivot = pivot
        """x − pivot is what scale and shift act on; of every entry, merged or not."""
        self._sets: Sets | None = Sets(count, pivot, delta, m2)
        self._pending: Pending | None = Pending(self._sets, "own", 1) if kernels and m2.numel() else None
        """How kernels come from the entries to the sets; None where they do not."""
        self.kernels = self._pending is not None
        self._regions = regions
        self._chunks: tuple[int, bool] | None = None
        """Samples of a set, and whether these are interleaved."""
        self._samples = pivot.dim() - regions == 2
        """Whether the sets still have an axis for samples."""

    @property
    def sets(self) -> Sets:
        """The distinct sets, each once, as stored statistics want them."""
        if self._sets is None:
            assert self._pending is not None
            self._sets = self._pending.found(Scaling())[1]
        return self._sets

    @property
    def unmerged(self) -> bool:
        """Whether every entry is a set of its own."""
        return self._sets is not None and self._sets.pivot is self.pivot

    @property
    def count(self) -> Any:
        """How many values the set has, a number or a tensor that broadcasts."""
        return self._at_entries(self.sets.count) if isinstance(self.sets.count, Tensor) else self.sets.count

    @property
    def delta(self) -> Tensor:
        """The mean, less the pivot of the entry."""
        if self.unmerged:
            return self.sets.delta
        return (self._at_entries(self.sets.pivot) - self.pivot) + self._at_entries(self.sets.delta)

    @property
    def m2(self) -> Tensor:
        """The sum of the squared differences from the mean."""
        return self._at_entries(self.sets.m2)

    @property
    def mean(self) -> Tensor:
        """The mean, rounded, to store or to show. What is subtracted from x is better taken from delta."""
        return self._at_entries(self.sets.mean)

    @property
    def var(self) -> Tensor:
        """The biased variance."""
        return self._at_entries(self.sets.var)

    def standardize(
        self, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        """(scale, shift) of weight · (x − mean) / sqrt(var + eps) + bias, each of the shape of ``m.pivot``.

        Args:
            weight, bias: (C,), or of as many dimensions as ``m.pivot``, such as (2, 1, C) for one a region with
                statistics of samples; None leaves them out.
            eps: added to the biased variance.

        Raises:
            ValueError: weight or bias have another shape.
        """
        for name, t in (("weight", weight), ("bias", bias)):
            self._check_parameter("standardize", name, t)
        if found := self._by_kernel(Scaling("standardize", eps), weight, bias):
            scale, shift = found
            return scale, shift
        scale, shift = standardized(self.delta, self.var, weight, bias, eps)
        return self._of_entries(scale), shift

    def inverse_deviation(
        self, weight: Tensor | None = None, eps: float = 1e-5, about_zero: bool = False
    ) -> Tensor:
        """weight / sqrt(var + eps), of the shape of ``m.pivot``.

        Args:
            weight, eps: as for :meth:`standardize`.
            about_zero: take the mean of x² in the place of the variance.

        Raises:
            ValueError: weight has another shape.
        """
        self._check_parameter("inverse_deviation", "weight", weight)
        if found := self._by_kernel(Scaling("inverse", eps, about_zero), weight):
            return found[0]
        scale = root(self.var, self.mean if about_zero else None, eps, inverse=True)
        return self._of_entries(scale if weight is None else scale * weight)

    def deviation(self, eps: float = 1e-5, about_zero: bool = False) -> Tensor:
        """sqrt(var + eps), or with `about_zero` the root of the mean of x², plus eps; of the shape of
        ``m.pivot``."""
        found = self._by_kernel(Scaling("root", eps, about_zero))
        if found:
            return found[0]
        return self._of_entries(root(self.var, self.mean if about_zero else None, eps))

    def over_batch(self, weights: Tensor | None = None, group: Any = None) -> Moments:
        """One set for all samples, and for all ranks of the process group `group`.

        Args:
            weights: (N,), how much each sample counts; all the same by default.
            group: a process group, whose ranks are merged too, as by :meth:`across_ranks`; None stays on this
                rank.

        Raises:
            ValueError, TypeError: weights are no tensor of that shape, or samples are merged already.
        """
        found = self
        if weights is not None and not isinstance(weights, Tensor):
            raise TypeError(
                f"Moments.over_batch: weights is a {type(weights).__name__}; it must be a tensor of shape (N,)"
            )
        if self._samples:
            shape = self.sets.m2.shape[-2:-1]
            if weights is not None and (self._chunks or weights.shape != shape):
                raise ValueError(
                    f"Moments.over_batch: weights has shape {tuple(weights.shape)}; it must be (N,) = "
                    f"{tuple(shape)}, and the samples not merged yet"
                )
            found = self._united("batch", 1, weights)
            found._samples, found._chunks = False, None
        elif weights is not None:
            raise ValueError("Moments.over_batch: weights need statistics of samples, from per_sample=True")
        return found if group is None else found.across_ranks(group)

    def over_chunks(self, size: int, interleaved: bool = False) -> Moments:
        """One set for `size` samples: consecutive ones, of which the last may be fewer.

        With `interleaved`, sample i of N belongs to set i modulo N / size, which must divide.

        Raises:
            ValueError: size is not positive or does not divide, or samples are merged already.
        """
        checks.positive("Moments.over_chunks", "size", size)
        if not self._samples or self._chunks:
            raise ValueError(
                "Moments.over_chunks: needs statistics of samples (per_sample=True) that are not merged yet"
            )
        n = self.sets.m2.shape[-2]
        if interleaved and n % size:
            raise ValueError(f"Moments.over_chunks: size is {size}; interleaved it must divide the {n} samples")
        found = self._united("interleaved" if interleaved else "chunks", size)
        found._chunks = size, interleaved
        return found

    def over_groups(self, groups: int) -> Moments:
        """One set for each of `groups` blocks of consecutive channels.

        Groups of each sample with ``per_sample=True``; else the samples are merged already, and these are
        groups of the batch.

        Raises:
            ValueError: groups is not positive or does not divide the channels (or what they were merged to).
        """
        checks.positive("Moments.over_groups", "groups", groups)
        channels = self.sets.m2.shape[-1]
        if channels % groups:
            what = "channels" if channels == self.pivot.shape[-1] else "groups that are left"
            raise ValueError(f"Moments.over_groups: groups is {groups}; it must divide the {channels} {what}")
        return self._united("groups", channels // groups)

    def over_channels(self) -> Moments:
        """One set for all channels."""
        return self.over_groups(1)

    def across_ranks(self, process_group: Any = None) -> Moments:
        """One set for the same set on all ranks of `process_group`; None means the world.

        One gather of one packed tensor here, and one in the backward pass. Every rank has to call it, also one
        whose batch is empty. The identity where torch.distributed is not set up or has one rank.

        Raises:
            ValueError: the samples, each of which lives on one rank, are not merged yet.
        """
        if self._samples:
            raise ValueError(
                "Moments.across_ranks: a sample lives on one rank; merge with over_batch() before, or take the "
                "moments with per_sample=False"
            )
        if ranks.size(process_group) == 1:
            return self
        own = self.sets.counted()
        n, base, rest, m2 = _AcrossRanks.apply(own.count, own.pivot, own.delta, own.m2, process_group)
        return self._merged(Sets(n, base, rest, m2))

    def affine(self, scale: Tensor, shift: Tensor) -> Moments:
        """The moments of z = (x − pivot) · scale + shift, itself with pivot zero.

        A second map, z · scale2 + shift2, is (x − pivot) · (scale · scale2) + (shift · scale2 + shift2): two
        norms at the price of one.

        Raises:
            ValueError: sets are merged already, or scale and shift do not broadcast with ``m.pivot``.
        """
        if not self.unmerged:
            raise ValueError("Moments.affine: the sets are merged already; take it before merging them")
        for name, t in (("scale", scale), ("shift", shift)):
            self._check_parameter("affine", name, t)
        delta = self.sets.delta * scale + shift
        m2 = (self.sets.m2 * scale.square()).expand(delta.shape)
        how = {"regions": self._regions, "kernels": self.kernels}
        return Moments(self.sets.count, torch.zeros_like(delta), delta, m2, **how)

    def less(self, lost: Tensor) -> Moments:
        """With a share `lost` of the weight that is of no samples, and counts as zeros: for weights that sum up
        to 1 − lost, statistics whose mean is the weighted sum.

        lost: a number, on the device.
        """
        found = copy.copy(self)
        if self._pending and self._sets is None and self._pending.weights is not None:
            found._pending = self._pending._replace(lost=lost)
        else:
            found._sets, found._pending = less(self.sets, lost), None
        return found

    def _check_parameter(self, method: str, name: str, t: Tensor | None) -> None:
        shape = self.pivot.shape
        if t is None or t.dim() == 0 or (t.dim() == 1 and t.shape == shape[-1:]):
            return
        if t.dim() != len(shape) or any(a != 1 and a != b for a, b in zip(t.shape, shape, strict=True)):
            raise ValueError(
                f"Moments.{method}: {name} has shape {tuple(t.shape)}; it must be {tuple(shape[-1:])}, or "
                f"broadcast with the statistics, {tuple(shape)}, and have as many dimensions"
            )

    def _united(self, how: str, size: int, weights: Tensor | None = None) -> Moments:
        sets, found = self.sets, copy.copy(self)
        simple = not self._regions or how in ("batch", "groups")
        # A gradient for counts have weights alone.
        counts = sets.count.requires_grad if isinstance(sets.count, Tensor) else False
        if self.kernels and simple and not counts and (weights is None or not self._regions):
            w = None if weights is None else weights.to(sets.m2.dtype)
            found._sets, found._pending = None, Pending(sets, how, size, self._regions, w)
            return found
        return self._merged(
            united(sets if weights is None else weighted(sets, weights), how, size, self._regions)
        )

    def _merged(self, sets: Sets) -> Moments:
        found = copy.copy(self)
        found._sets, found._pending = sets, None
        return found

    def _by_kernel(
        self, scaling: Scaling, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What becomes of the entries; nothing where no kernel makes it."""
        pending = self._pending
        if pending is None or pending.source.pivot is not self.pivot or not fits(weight, bias):
            return ()
        found, sets = pending.found(scaling, weight, bias)
        self._sets = self._sets or sets
        return found

    def _of_entries(self, t: Tensor) -> Tensor:
        """What broadcasts with the entries, as large as these."""
        return t.expand(self.pivot.shape)

    def _at_entries(self, t: Tensor) -> Tensor:
        """A statistic of the sets, where the entries of x can see it."""
        if not t.dim():
            return t
        size, interleaved = self._chunks or (1, None)
        how = {None: "own", False: "chunks", True: "interleaved"}[interleaved]
        return spread(
            t, how, size, *self.pivot.shape[-2:] if interleaved is False else (0, self.pivot.shape[-1])
        )


class _AcrossRanks(Function):
    @staticmethod
    def forward(count, pivot, delta, m2, process_group):
        n, base, rest, square = ranks.gather((count, pivot, delta, m2), process_group)
        found = Sets(n, base, rest, square).merged(0)
        return found.count, found.pivot, found.delta, found.m2

    @staticmethod
    def setup_context(ctx, inputs, output):
        count, pivot, delta, _, ctx.process_group = inputs
        n, base, rest, _ = output
        ctx.mark_non_differentiable(base)
        ctx.save_for_backward(count, pivot, delta, n, base, rest)

    @staticmethod
    def backward(ctx, *grads):
        d_n, _, d_rest, d_m2 = grads
        count, pivot, delta, n, base, rest = ctx.saved_tensors
        d_n, d_rest, d_m2 = _Total.apply(d_n, d_rest, d_m2, ctx.process_group)
        away = (pivot - base) + delta - rest
        d_rest = d_rest / divisor(n)
        d_count = d_n + away * d_rest + away.square() * d_m2
        return d_count, None, count * (d_rest + 2 * away * d_m2), d_m2, None


class _Total(Function):
    """The sum over the ranks; its own derivative is the same sum."""

    @staticmethod
    def forward(a, b, c, process_group):
        return ranks.total((a, b, c), process_group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.process_group = inputs[-1]

    @staticmethod
    def backward(ctx, *grads):
        return *_Total.apply(*grads, ctx.process_group), None
