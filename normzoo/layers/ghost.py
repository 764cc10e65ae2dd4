r"""Ghost batch normalization: a large batch is normalized in small pieces, each by its own statistics.

Hoffer, Hubara and Soudry, *Train longer, generalize better: closing the generalization gap in large batch
training of neural networks*, 2017, arXiv:1705.08741, algorithm 1; code eladhoffer/bigBatch,
dreamquark-ai/tabnet (split="ceil"), mosaicml/composer (split="ceil", stats="scaled"). The running statistics
are the sequential averages of those codes; the decay that the paper prints would nearly erase the old ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, ranks
from ..dispatch import insisted, or_none, use_kernel
from ..engine import normalize
from ..moments import Moments, Sets
from ..state import Running, recomputing
from . import native

SPLITS = ("floor", "ceil", "interleaved")
STATS = ("sequential", "scaled")


def ghost_batch_norm(
    x: Tensor,
    ghost_batch_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    split: str = "floor",
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics over each ghost batch.

    Args:
        x: (N, C, \*) or (N, C), contiguous or channels_last, any real floating dtype.
        ghost_batch_size: samples of a ghost batch.
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to the biased variance; positive.
        split: as in :class:`GhostBatchNorm`.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel of a ghost batch has
            one value.

    >>> import torch
    >>> ghost_batch_norm(torch.tensor([[1.0], [3.0], [0.0], [8.0]]), 2).flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """
    checks.channels("ghost_batch_norm", x, None, weight=weight, bias=bias)
    checks.eps("ghost_batch_norm", eps)
    checks.positive("ghost_batch_norm", "ghost_batch_size", ghost_batch_size)
    checks.choice("ghost_batch_norm", "split", split, SPLITS)
    if split != "interleaved" and native.outruns(x, weight, bias):
        pieces = x.split(_size("ghost_batch_norm", x, ghost_batch_size, split))
        return native.by_pieces(x, pieces, (None, None), [0.0] * len(pieces), weight, bias, eps)
    return _with_ghosts("ghost_batch_norm", x, ghost_batch_size, weight, bias, eps, split)[0]


def _with_ghosts(layer, x, ghost_batch_size, weight, bias, eps, split) -> tuple[Tensor, Sets]:
    """(y, moments of the ghost batches)."""
    size = _size(layer, x, ghost_batch_size, split)

    def combine(m: Moments):
        m = m.over_chunks(size, interleaved=split == "interleaved")
        return *m.standardize(weight, bias, eps), m.sets

    return normalize(x, combine, per_sample=True)


def _followed(ghosts: Sets, step: float) -> tuple[Tensor, Tensor, float] | None:
    """(mean, unbiased variance, sum of the weights), averages of ghost batches of which each keeps 1 − step
    with the next, by a kernel; None where none runs."""
    tensors = (ghosts.count, ghosts.pivot, ghosts.delta, ghosts.m2)
    if torch.compiler.is_compiling() or ghosts.m2.dtype != torch.float32 or not ghosts.m2.numel():
        return None
    if recomputing() or not use_kernel(ghosts.m2):
        return None
    from normzoo_kernels import balance as kernels

    keep, number = 1 - step, len(ghosts.m2)
    total = (1 - keep**number) / step if step > 0 else float(number)
    options: Any = (*(t.detach() for t in tensors), keep, total)
    found = or_none(insisted(), kernels.follow, *options)
    return None if found is None else (*found, total)


def _size(layer: str, x: Tensor, ghost_batch_size: int, split: str) -> int:
    """Samples of a ghost batch, the last of which may have fewer: as torch.chunk divides the batch."""
    n = x.shape[0]
    if split == "interleaved":
        if n % ghost_batch_size:
            raise ValueError(
                f'{layer}: the batch has {n} samples; split="interleaved" needs a multiple of '
                f"ghost_batch_size = {ghost_batch_size}"
            )
        size, last = ghost_batch_size, ghost_batch_size
    else:
        chunks = max(n // ghost_batch_size if split == "floor" else -(-n // ghost_batch_size), 1)
        size = max(-(-n // chunks), 1)
        last = n % size or size
    if n and last * x.shape[2:].numel() == 1:
        raise ValueError(
            f"{layer}: Expected more than 1 value per channel when training, got input size {tuple(x.shape)} "
            f"in ghost batches of {size}, the last of {last}; choose another ghost_batch_size"
        )
    return size


class GhostBatchNorm(Running):
    r"""Batch normalization over small pieces of the batch in training, plain batch normalization in eval mode.

    Input (N, C, \*) or (N, C), output alike in shape, dtype and memory format. State as that of
    :class:`torch.nn.BatchNorm2d`, whose checkpoints load; num_batches_tracked counts ghost batches. To estimate
    the running statistics anew take :func:`normzoo.recalibrate`; torch's ``update_bn`` does not see this layer.

    Args:
        num_features: channels, C.
        ghost_batch_size: samples of a ghost batch.
        eps: added to the biased variance; positive.
        momentum: weight of the statistics of one ghost batch in the running ones; None averages all of them.
        affine: whether there are a weight and a bias.
        split: how N samples fall into ghost batches: ``"floor"`` (N // size consecutive pieces, as
            ``torch.chunk`` cuts them; the authors' code), ``"ceil"`` (⌈N / size⌉ pieces; TabNet, Composer), or
            ``"interleaved"`` (sample i goes to piece i modulo N / size, which must divide).
        stats: ``"sequential"`` moves the running statistics once for every ghost batch, in order; ``"scaled"``
            does so with momentum divided by the number of ghost batches (Composer).
        sync: average the running statistics over all ranks of `process_group`; ghost batches stay on theirs.
        process_group, nonfinite: as in :class:`normzoo.BatchNorm2d`.
        bias: whether an affine layer has a bias.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> GhostBatchNorm(1, 2)(torch.tensor([[1.0], [3.0], [0.0], [8.0]])).detach().flatten()
    tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        split: str = "floor",
        stats: str = "sequential",
        *,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        checks.positive("GhostBatchNorm", "ghost_batch_size", ghost_batch_size)
        checks.choice("GhostBatchNorm", "split", split, SPLITS)
        checks.choice("GhostBatchNorm", "stats", stats, STATS)
        self.ghost_batch_size, self.split, self.stats = ghost_batch_size, split, stats
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)

    def forward(self, x: Tensor) -> Tensor:
        checks.channels("GhostBatchNorm", x, self.num_features, weight=self.weight)
        if not self.training:
            return native.with_stored(x, self._stored(), self.weight, self.bias, self.eps)
        consecutive = self.split != "interleaved"
        if consecutive and not self.sync and native.outruns(x, self.weight, self.bias):
            pieces = x.split(_size("GhostBatchNorm", x, self.ghost_batch_size, self.split))
            momentum = self.momentum
            if momentum is not None and self.stats == "scaled":
                momentum /= len(pieces)
            y = native.tracked_by_torch(self, x, pieces, momentum)
            if y is not None:
                return y
        how = (self.ghost_batch_size, self.weight, self.bias, self.eps, self.split)
        y, ghosts = _with_ghosts("GhostBatchNorm", x, *how)
        self._follow(ghosts, x.shape[0] if x.numel() else 0)
        return y

    def extra_repr(self) -> str:
        own = f"ghost_batch_size={self.ghost_batch_size}, split={self.split!r}, stats={self.stats!r}"
        return f"{super().extra_repr()}, {own}"

    def _follow(self, ghosts: Sets, samples: Any) -> None:
        """Moves the running statistics by those of the ghost batches, one after the other."""
        batches: Any = ghosts.m2.shape[0]
        # What is left of each after those that follow it: the moves in a closed form.
        momentum = self.momentum or 0.0
        step = momentum / batches if self.stats == "scaled" and batches else momentum
        ranked = self.sync and ranks.size(self.process_group) > 1
        if not ranked and (found := _followed(ghosts, step)):
            mean, var, total = found
            self._track(mean, var, samples, batches, None if self.momentum is None else step * total)
            return
        means, variances = ghosts.mean.detach(), ghosts.unbiased_var.detach()
        after = torch.arange(batches, device=means.device, dtype=means.dtype).flip(0)
        left = torch.pow(1 - step, after)
        total = left.sum()
        weights = (left / total.clamp(min=1)).unsqueeze(1)
        mean, var = (weights * means).sum(0), (weights * variances).sum(0)
        factor: Any = step * total
        if self.momentum is None:
            factor = batches / (self.num_batches_tracked + batches).clamp(min=1).to(mean.dtype)
        if ranked:
            mean, var, factor, batches, samples = self._of_all_ranks(mean, var, factor, batches, samples)
        self._track(mean, var, samples, batches=batches, factor=factor)

    def _of_all_ranks(self, mean: Tensor, var: Tensor, factor: Any, batches: int, samples: int) -> tuple:
        """What moves the running statistics to the mean of where the ranks would move theirs."""
        told = torch.stack([mean.new_ones(()) * factor, mean.new_full((), batches)])
        moved = torch.cat((mean * factor, told))
        moved, var, samples_of_all = ranks.average(moved, var * factor, samples, self.process_group)
        factor, batches_of_all = moved[-2], moved[-1].round().long()
        whole = factor.clamp(min=torch.finfo(mean.dtype).tiny)
        return moved[:-2] / whole, var / whole, factor, batches_of_all, samples_of_all
