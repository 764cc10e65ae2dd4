r"""Alpha batch normalization: stored statistics and those of the test batch, mixed, for test-time calibration.

You, Li and Zhao, *Test-time Batch Statistics Calibration for Covariate Shift*, 2021, arXiv:2110.04065. No
official code was to be had: the numbers are those of mariodoebler/test-time-adaptation, where alpha weighs the
test batch, and of bethgelab/robustness (Schneider et al., *Improving robustness against common corruptions by
covariate shift adaptation*, 2020, arXiv:2006.16971), where it weighs the source. Here every weight has a name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normzoo_kernels._op import needs_grad

from .. import checks, ranks
from ..engine import normalize
from ..moments import Moments, standardized
from ..passes import divisor
from ..state import Running, finite, recomputing
from . import native
from .balance import AdaB2N
from .batch import BatchNorm2d
from .frozen import FrozenBatchNorm
from .ghost import GhostBatchNorm
from .stages import mixed

USUAL = float("0.9")
"""The source weight where none is given: this very object, which tells it from a 0.9 that is."""

_FAR = 4.0
"""Deviations between a mean and zero over which a difference of two products costs digits."""


def alpha_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    source_weight: float = USUAL,
    eps: float = 1e-5,
    unbiased: bool = True,
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, of stored statistics and those of the batch, mixed:
    mean = source_weight · running_mean + (1 − source_weight) · mean of the batch, and var likewise.

    Args:
        x: (N, C, \*) or (N, C), contiguous or channels_last, any real floating dtype.
        running_mean, running_var: (C,).
        weight, bias: (C,) or None, of any floating dtype.
        source_weight: from 0 (the batch alone) to 1 (the stored statistics alone).
        eps: added to the variance; positive.
        unbiased: whether the variance of the batch is the unbiased one, as in the public codes.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too. The statistics are constants for autograd.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> x, stored = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0])
    >>> alpha_batch_norm(x, stored, stored + 1, source_weight=0.5, unbiased=False).flatten()
    tensor([0.0000, 2.0000])
    """
    checks.channels("alpha_batch_norm", x, None, weight=weight, bias=bias)
    stored = checks.running("alpha_batch_norm", x, running_mean, running_var, "stored statistics", False)
    checks.share("alpha_batch_norm", "source_weight", source_weight)
    checks.eps("alpha_batch_norm", eps)
    return _with_mixed("alpha_batch_norm", x, stored, weight, bias, eps, source_weight, unbiased)[0]


def _with_mixed(
    layer: str,
    x: Tensor,
    stored: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    source_weight: float | None,
    unbiased: bool,
    pseudo_count: float = 0.0,
    sync: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, mean and variance of the batch); without `source_weight`, pseudo_count stands against the samples."""
    if source_weight == 1:
        return native.with_stored(x, stored, weight, bias, eps), ()
    sync = sync and ranks.size(process_group) > 1
    if x.numel() == x.shape[1] and not sync and (unbiased or source_weight == 0):
        raise ValueError(
            f"{layer}: Expected more than 1 value per channel, got input size {tuple(x.shape)}, which has no "
            "variance to mix in; use a larger batch, source_weight=1 for the stored statistics alone, or "
            "unbiased=False to take it for 0"
        )

    count = x.numel() // x.shape[1] if x.numel() else 0
    if not sync and native.outruns(x, *stored, weight, bias) and not needs_grad(*stored):
        mean, var = native.statistics(x)
        var = var * (count / (count - 1)) if unbiased else var
        share = pseudo_count / (pseudo_count + x.shape[0]) if source_weight is None else source_weight
        of_both = [mean, var]
        if source_weight != 0:
            known = native.in_statistics_dtype(x, *stored)
            of_both = [torch.lerp(t, old, share) for t, old in zip(of_both, known, strict=True)]
        # Torch's operator takes scale · mean off scale · x, which is no worse where no mean is far away.
        far = _FAR**2 * (of_both[1] + eps)
        if ((of_both[0].square() <= far) & far.isfinite()).all():
            return native.with_stored(x, of_both, weight, bias, eps), (mean, var)

    def combine(m: Moments):
        batch = m.across_ranks(process_group) if sync else m
        share: Any = source_weight
        if share is None:
            samples: Any = x.shape[0]
            if sync:
                (samples,) = ranks.total((m.pivot.new_full((), samples),), process_group)
            share = pseudo_count / divisor(pseudo_count + samples)
        known = stored if source_weight != 0 else None
        if not sync and (found := mixed(m, known, share, weight, bias, eps, count - unbiased)):
            return *found[:2], found[2:]
        var_of_batch = (batch.sets.unbiased_var if unbiased else batch.var).detach()
        delta, var = batch.delta.detach(), var_of_batch
        if source_weight != 0:  # or a NaN that counts for nothing would spread
            stored_mean, stored_var = (t.to(m.pivot.dtype) for t in stored)
            delta = share * (stored_mean - m.pivot) + (1 - share) * delta
            var = share * stored_var + (1 - share) * var
        return *standardized(delta, var, weight, bias, eps), (batch.mean.detach(), var_of_batch)

    return normalize(x, combine)


_KNOWN = (
    *(cls.forward for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d)),
    *(cls.forward for cls in (FrozenBatchNorm, GhostBatchNorm, AdaB2N)),
)
"""What is batch norm by stored statistics in eval mode, and nothing more."""


class AlphaBatchNorm(Running):
    r"""Batch normalization by a mixture of stored statistics and those of the batch at hand, in every mode.

    mean = source_weight · running_mean + (1 − source_weight) · mean of the batch, and the variance likewise.
    For data that differ from those the statistics were taken of: calibration at test time, without training.
    Nothing stored changes, and the statistics are constants for autograd. Input (N, C, \*) or (N, C), output
    alike in shape, dtype and memory format. State as that of :class:`torch.nn.BatchNorm2d`, whose checkpoints
    load. :func:`normzoo.adapt.configure` puts it in place of all batch norms of a model.

    The variances are mixed linearly, as all codes do; that of a true mixture has one term more, for the
    distance of the means.

    Args:
        num_features: channels, C.
        eps: added to the variance; positive.
        source_weight: how much the stored statistics count, from 0 (the batch alone) to 1 (batch norm in eval
            mode). Where papers and codes say alpha, ask which side it weighs.
        affine: whether there are a weight and a bias.
        unbiased: whether the variance of the batch is the unbiased one, as in the public codes.
        test_weight: 1 − source_weight, in its place: for settings of codes whose alpha weighs the test batch.
        pseudo_count: in place of source_weight: the stored statistics count as so many samples, source_weight =
            pseudo_count / (pseudo_count + N), N the samples of the batch (of all ranks with `sync`).
        sync: take the statistics of the batch over all ranks of `process_group`.
        process_group: None means the world.
        nonfinite: with ``"skip"``, ``batches_skipped`` counts the batches with NaN or infinite statistics. The
            output is NaN in both cases, and there is no state that they could spoil.
        bias: whether an affine layer has a bias.

    One value per channel has no unbiased variance, which is an error, for an image of one pixel as for a batch
    of one vector.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> AlphaBatchNorm(1, source_weight=0.5, unbiased=False)(torch.tensor([[1.0], [3.0]])).detach().flatten()
    tensor([0.0000, 2.0000])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        source_weight: float = USUAL,
        affine: bool = True,
        unbiased: bool = True,
        *,
        test_weight: float | None = None,
        pseudo_count: float | None = None,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        checks.flag("AlphaBatchNorm", "unbiased", unbiased)
        self.source_weight, self.pseudo_count = _source(source_weight, test_weight, pseudo_count)
        self.unbiased = unbiased
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, 0.0, affine, True, device, dtype, **options)

    @classmethod
    def from_batch_norm(
        cls, bn: _NormBase | FrozenBatchNorm, source_weight: float = USUAL, **options: Any
    ) -> AlphaBatchNorm:
        """The layer with the parameters and statistics of `bn`, the very same tensors, in the mode of `bn`.

        Args:
            bn: a batch norm of torch or of this library, SyncBatchNorm too, with running statistics.
            source_weight: as in the constructor.
            options: further keyword arguments of the constructor.

        Raises:
            TypeError: `bn` is no batch norm, or one with a forward of its own, such as one with an activation,
                for which there is :func:`normzoo.convert`.
            ValueError: it has no running statistics, or an option is out of its range.
        """
        if not isinstance(bn, nn.Module) or type(bn).forward not in (*_KNOWN, cls.forward):
            raise TypeError(
                f"AlphaBatchNorm: bn is of type {type(bn).__name__}; it must be a batch norm, such as "
                "torch.nn.BatchNorm2d, with no forward of its own; normzoo.convert takes others apart"
            )
        if bn.running_mean is None or bn.running_var is None:
            raise ValueError(
                f"AlphaBatchNorm: bn, a {type(bn).__name__}, has no running statistics to mix with those of a "
                "batch; take a layer that was trained with track_running_stats=True"
            )
        where = {"device": bn.running_mean.device, "dtype": bn.running_mean.dtype}
        kept: dict[str, Any] = {"affine": bn.weight is not None, "bias": bn.bias is not None}
        kept["nonfinite"] = getattr(bn, "nonfinite", "propagate")
        new = cls(bn.num_features, bn.eps, source_weight, **(kept | options), **where)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            held = getattr(bn, name)
            if held is None or getattr(new, name) is None:
                continue
            if name in new._parameters and not isinstance(held, nn.Parameter):
                held = nn.Parameter(held, requires_grad=False)
            setattr(new, name, held)
        return new.train(bn.training)

    def forward(self, x: Tensor) -> Tensor:
        checks.channels("AlphaBatchNorm", x, self.num_features, weight=self.weight)
        how = (self.eps, self.source_weight, self.unbiased, self.pseudo_count or 0.0)
        ranks_of = (self.sync, self.process_group)
        y, batch = _with_mixed("AlphaBatchNorm", x, self._stored(), self.weight, self.bias, *how, *ranks_of)
        if batch and not recomputing():
            self._count_skipped(lambda: finite(*batch))
        return y

    def extra_repr(self) -> str:
        what = "source_weight" if self.pseudo_count is None else "pseudo_count"
        affine = f"affine={self.affine}" + (", bias=False" if self.affine and self.bias is None else "")
        said = f"eps={self.eps}, {what}={getattr(self, what)}, {affine}, unbiased={self.unbiased}"
        return f"{self.num_features}, {said}{self._options()}"


def _source(source_weight: float, test_weight: Any, pseudo_count: Any) -> tuple[float | None, float | None]:
    """(source_weight, pseudo_count), one of them None."""
    given = {"test_weight": test_weight, "pseudo_count": pseudo_count}
    if source_weight is not USUAL:
        given["source_weight"] = source_weight
    said = [name for name, value in given.items() if value is not None]
    if len(said) > 1:
        raise ValueError(
            f"AlphaBatchNorm: {' and '.join(said)} are given; each sets the weight of the source, pass "
            "one of them"
        )
    if pseudo_count is not None:
        checks.not_negative("AlphaBatchNorm", "pseudo_count", pseudo_count)
        return None, pseudo_count
    if test_weight is not None:
        checks.share("AlphaBatchNorm", "test_weight", test_weight)
        return 1 - test_weight, None
    checks.share("AlphaBatchNorm", "source_weight", source_weight)
    return source_weight, None
