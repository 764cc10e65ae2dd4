r"""Unified Normalization: division by a mean square smoothed over the last steps, for folding at inference.

Yang, Zhang, Chen et al., *Unified Normalization for Accelerating and Stabilizing Transformers*, ACM MM 2022,
arXiv:2208.01313; code hikvision-research/Unified-Normalization. A geometric mean over a window of steps
smooths the statistic of the forward pass, an arithmetic one that of the backward pass, and steps whose
statistics jump go by their own.

Where the statistic of a channel falls to eps or below (a dead unit), the authors' geometric mean becomes zero
and the outputs of the steps after it grow 316-fold; here such steps are left out of that mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..running import Rule, State
from ..state import average, present, snapshot
from .mean_square import (
    MeanSquareNorm,
    Step,
    check_channel_dim,
    check_input,
    in_widest,
    laid_back,
    without_state,
)

_COMPENSATED_AFTER = 1000
"""Steps without compensation of the gradient, whatever the warm-up: the authors' number."""


def unified_norm(
    x: Tensor,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel_dim: int = -1,
    pad_mask: Tensor | None = None,
) -> Tensor:
    r"""y = weight · x / sqrt(running_var + eps) + bias.

    Args:
        x: (\*, C), or with the channels in `channel_dim`; any real floating dtype.
        running_var: (C,), a mean of x²; None takes that of x, with its true gradient.
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to running_var; positive.
        channel_dim: where the channels are, not the first dimension.
        pad_mask: bool, the shape of x without its channels, True for padding, which a mean of x² leaves out;
            without effect where running_var is given.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> unified_norm(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([4.0, 1.0]))
    tensor([[1.5000, 0.0000],
            [2.5000, 0.0000]])
    """
    check_channel_dim("unified_norm", channel_dim)
    checks.eps("unified_norm", eps)
    h = check_input("unified_norm", x, None, channel_dim, None, pad_mask, weight, bias)
    checks.channels("unified_norm", h, None, running_var=running_var)
    y = without_state(h, running_var, pad_mask, weight, bias, eps, None)
    return laid_back(y, x, channel_dim)


class _Unified(Step):
    """The arithmetic of a step t, with windows of the last M statistics and K gradient statistics."""

    def __init__(self, layer: UnifiedNorm) -> None:
        super().__init__(layer)
        self.running_var, self.buffer_x2, self.buffer_gz = layer.running_var, layer.buffer_x2, layer.buffer_gz
        self.iters, self.skip_counter = layer.iters, layer.skip_counter
        self.warmup_iters, self.decay, self.filtered = layer.warmup_iters, layer.decay, layer.outlier_filtration

    @property
    def state(self) -> State:
        return self.running_var, self.buffer_x2, self.iters, self.skip_counter, self.batches_skipped

    @property
    def gradient_state(self) -> State:
        return self.ema_gz, self.buffer_gz, self.gradients_skipped

    def forward(self, q: Tensor, whole: Tensor, some: Tensor | None):
        state = (snapshot(b) for b in (self.running_var, self.buffer_x2))
        q, stored, squares = in_widest(q, *state)
        before, eps, M = snapshot(self.iters), self.eps, len(squares)
        t = before + 1
        if some is not None:
            q = torch.where(some, q, stored)
        slot = _slot(squares, t)
        window = torch.where(slot, q, squares)
        odd = torch.zeros((), dtype=torch.bool, device=q.device)
        if self.filtered:
            spread = M * squares.sqrt().var() if squares.numel() > 1 else math.inf  # one number has none
            odd = (window.mean(0) - window.log().mean(0).exp() > spread).any() & (t >= self.warmup_iters)
            if some is not None:
                odd = odd & some
            window = torch.where(slot & odd, stored, window)
        own = odd | (M == 1)
        by_batch = (t <= M) | (t < self.warmup_iters) | own
        d = torch.where(by_batch, q, _geometric_mean(window, q, eps))
        ratio = ((d + eps) / (stored + eps)).sqrt().clamp(1 / 5, 5)
        ratio = torch.where((t <= max(_COMPENSATED_AFTER, self.warmup_iters)) | own, 1, ratio)
        moved = average(stored, d, 1 - self.decay)
        good = self.fits(moved, window)
        kept = good if some is None else good & some
        r = torch.rsqrt(d + eps)
        counters = (before + kept, self.skip_counter + (odd & kept), self.skipped(~good))
        new = (torch.where(kept, moved, stored), torch.where(kept, window, squares))
        return r, (r, ratio, own, t, kept), (*new, *counters)

    def backward(self, kept: Any, weight: Tensor | None, slope: Tensor, after: Tensor):
        r, ratio, own, t, counted = kept
        ema, slopes = (present(b, after).to(r.dtype) for b in (self.ema_gz, self.buffer_gz))
        w = ratio if weight is None else ratio * weight.to(r.dtype)
        gz = w * r * slope
        window = torch.where(_slot(slopes, t), torch.where(own, ema, gz), slopes)
        by_batch = (t <= len(window)) | (t < self.warmup_iters) | own
        smooth = torch.where(by_batch, gz, window.mean(0))
        moved = average(ema, smooth, 1 - self.decay)
        c = torch.where(own, smooth, moved)
        good = self.fits(moved, window)
        stored = counted & good
        new = (torch.where(stored, moved, ema), torch.where(stored, window, slopes))
        return w * r, -c * r.square(), ratio * r, (*new, self.gradient_skipped(counted & ~good))

    def known(self, state: State):
        return None, None, None

    def known_backward(self, state: State) -> None:
        return None

    def launch_forward(self, kernels: Any, sums: Tensor, state: State):
        plain = max(_COMPENSATED_AFTER, self.warmup_iters)
        how = (self.eps, self.decay, self.warmup_iters, plain, self.filtered, self.guard)
        return kernels.unified_forward(sums, *state[:3], *how)

    def launch_backward(self, kernels: Any, sums: Sequence[Any], kept: Any, parameters: Any, state: State):
        how = (*state[:2], self.decay, self.warmup_iters, self.guard)
        rows, flags, dweight, dbias = kernels.unified_backward(*sums, *kept, *parameters, *how)
        return dweight, dbias, rows, flags

    def plain(self, kept: Any):
        rows, flags = kept
        return *rows[:2], flags[2] != 0, flags[0] + 1, flags[1] != 0


def _slot(window: Tensor, t: Tensor) -> Tensor:
    """Which row of a window step t writes, (rows, 1)."""
    rows = len(window)
    return (torch.arange(rows, device=window.device) == t % rows).unsqueeze(1)


def _geometric_mean(window: Tensor, q: Tensor, eps: float) -> Tensor:
    """Of each channel, over the steps where it was above eps; q where it never was. A NaN goes on."""
    alive = ~(window <= eps)
    logs = torch.where(alive, window, 1).log().sum(0)
    number = alive.sum(0)
    found = (logs / number.clamp(min=1)).exp()
    return torch.where(number > 0, found, q)


class UnifiedNorm(MeanSquareNorm):
    r"""y = weight · x / sqrt(d + eps) + bias, d a geometric mean of the mean squares of the last steps.

    In the first steps of training d is the mean square of the batch: until `warmup_iters`, and until the window
    is full. The gradient is the paper's approximation, with a smoothed statistic of past gradients, also in
    warm-up. After 1000 steps, and after the warm-up, it is also compensated: weight and input get the gradients
    of a layer that had divided by the root of running_var, within a factor of 5. Eval mode divides by
    running_var, and can be folded into a neighbour.

    Args:
        num_features: channels, C.
        window_size: steps of the window, of 1 or more; a pair for those of the forward and the backward pass.
            1 is PN-V of the PowerNorm paper: the statistics of the batch, with the exact gradient as long as
            there is no padding. Under a mask the correction is the mean over padding too, as in the authors'
            code: ``functional.unified_norm(x, pad_mask=...)`` has the exact one.
        warmup_iters: steps that go by the batch. For fine-tuning set `iters` back to 0, or there is none.
        outlier_filtration: a step whose statistics jump goes by its own, with the gradient of window_size=1,
            and `skip_counter` counts it. The authors have it on for images and off for text. Watch the counter:
            with few channels, or a short warm-up, every later step can become an outlier.
        eps: added to the mean square; positive.
        decay: weight of the old value in the running statistics, from 0 to 1; the authors call it momentum.
        channel_dim: where the channels are: -1 for tokens (\*, C), 1 for (N, C, \*).
        affine: whether there are a weight and a bias. The authors' class always has them.
        sync, process_group, nonfinite, bias: as in :class:`normzoo.PowerNorm`.

    Input (\*, C) or as `channel_dim` says, output alike in shape and dtype. A call also takes `pad_mask`, as
    :class:`normzoo.PowerNorm` does.

    State: `running_var` (C,), a mean of squares, `ema_gz` (C,), the windows `buffer_x2` and `buffer_gz`
    (steps, C), all float32 or wider whatever the layer is cast to, `iters` and `skip_counter`. Checkpoints of
    the authors' code load as they are, where the windows are as long.

    A causal language model sees the future through the statistics of the batch, in every step of training.
    Activation checkpointing is an error in training, for the state has moved when it recomputes.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> layer = UnifiedNorm(2, window_size=2, warmup_iters=0)
    >>> x = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    >>> for scale in (1, 1, 2):  # the window holds 12.5 and 50, whose geometric mean is 25
    ...     y = layer(scale * x).detach()
    >>> y
    tensor([[1.2000, 1.4142],
            [1.6000, 1.4142]])
    """

    running_var: Tensor  # type: ignore[assignment]
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        num_features: int,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        decay: float = 0.9,
        channel_dim: int = -1,
        *,
        affine: bool = True,
        bias: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "skip",
        device=None,
        dtype=None,
    ) -> None:
        layer = "UnifiedNorm"
        forward, backward = _windows(window_size)
        checks.count(layer, "warmup_iters", warmup_iters)
        checks.flag(layer, "outlier_filtration", outlier_filtration)
        checks.share(layer, "decay", decay)
        checks.positive(layer, "num_features", num_features)
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, affine, channel_dim, device, dtype, **options)
        self.window_size = forward if forward == backward else (forward, backward)
        self.warmup_iters, self.outlier_filtration, self.decay = warmup_iters, outlier_filtration, decay
        self._statistic("running_var", 1.0, num_features, device=device, dtype=dtype)
        self._statistic("ema_gz", 0.0, num_features, device=device, dtype=dtype)
        self._statistic("buffer_x2", 0.0, forward, num_features, device=device, dtype=dtype)
        self._statistic("buffer_gz", 0.0, backward, num_features, device=device, dtype=dtype)
        self._counter("iters", device=device)
        self._counter("skip_counter", device=device)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "iters" in self._buffers:  # torch's constructor calls this before there is one
            self.running_var.fill_(1)
            for zero in (self.ema_gz, self.buffer_x2, self.buffer_gz, self.iters, self.skip_counter):
                zero.zero_()

    def _divisor(self) -> Tensor:
        return self.running_var

    def _rule(self) -> Rule:
        return _Unified(self)

    def extra_repr(self) -> str:
        said = f"{self.num_features}, window_size={self.window_size}, warmup_iters={self.warmup_iters}"
        said += f", outlier_filtration={self.outlier_filtration}, eps={self.eps}, decay={self.decay}"
        return f"{said}, channel_dim={self.channel_dim}, affine={self.affine}{self._options()}"


def _windows(size: Any) -> tuple[int, int]:
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(
            f"UnifiedNorm: window_size is {size!r}; it must be a positive int, or a pair of them for the "
            "forward and the backward pass"
        )
    return sizes
