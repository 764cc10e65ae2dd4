r"""PowerNorm: division by a running quadratic mean, with a running correction of the gradient.

Shen, Yao, Gholami, Mahoney and Keutzer, *PowerNorm: Rethinking Batch Normalization in Transformers*, ICML 2020,
arXiv:2003.07845; code sIncerass/powernorm. There a group scaling comes before it, which is an RMSNorm of each
token in `group_num` groups, and a warm-up in which the forward pass goes by the batch.
"""

from __future__ import annotations

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
    check_group_num,
    check_input,
    in_widest,
    laid_back,
    without_state,
)

BACKWARDS = ("official", "paper")


def power_norm(
    x: Tensor,
    running_phi: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    group_num: int | None = 1,
    channel_dim: int = -1,
    pad_mask: Tensor | None = None,
) -> Tensor:
    r"""y = weight · u / sqrt(phi + eps) + bias, where u = x / (root mean square of the group of channels).

    Args:
        x: (\*, C), or with the channels in `channel_dim`; any real floating dtype.
        running_phi: (C,), a mean of u²; None takes that of the batch at hand, with the true gradient. With
            ``group_num=None`` that is PN-V of the paper.
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to phi; positive. Groups have 1e-5.
        group_num: groups of C / group_num neighbouring channels; None for u = x.
        channel_dim: where the channels are, not the first dimension.
        pad_mask: bool, the shape of x without its channels, True for padding, which a mean of u² leaves out;
            without effect where running_phi is given.

    Returns:
        Shape and dtype of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> power_norm(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([4.0, 1.0]), group_num=None)
    tensor([[1.5000, 0.0000],
            [2.5000, 0.0000]])
    """
    check_channel_dim("power_norm", channel_dim)
    check_group_num("power_norm", group_num)
    checks.eps("power_norm", eps)
    h = check_input("power_norm", x, None, channel_dim, group_num, pad_mask, weight, bias)
    checks.channels("power_norm", h, None, running_phi=running_phi)
    y = without_state(h, running_phi, pad_mask, weight, bias, eps, group_num)
    return laid_back(y, x, channel_dim)


class _Power(Step):
    """The arithmetic of a step t, in the paper's words: phi is a mean of squares, nu corrects the gradient."""

    def __init__(self, layer: PowerNorm) -> None:
        super().__init__(layer)
        self.running_phi, self.iters, self.warmup_iters = layer.running_phi, layer.iters, layer.warmup_iters
        self.alpha_fwd, self.alpha_bkw, self.paper = layer.alpha_fwd, layer.alpha_bkw, layer.backward == "paper"

    @property
    def state(self) -> State:
        return self.running_phi, None, self.iters, None, self.batches_skipped

    @property
    def gradient_state(self) -> State:
        return self.ema_gz, None, self.gradients_skipped

    def forward(self, q: Tensor, whole: Tensor, some: Tensor | None):
        phi, before = snapshot(self.running_phi), snapshot(self.iters)
        q, whole, phi = in_widest(q, whole, phi)
        t, warmup = before + 1, self.warmup_iters
        if some is not None:
            q = torch.where(some, q, phi)
        d = torch.where(t <= warmup, q, phi)
        # In warm-up a plain average runs beside the exponential one; it stops a step before the end.
        steps = t.to(q.dtype)  # integers divide in float32
        plain = torch.where(t < warmup, phi * ((steps - 1) / steps) + q / steps, phi)
        moved = average(plain, q, 1 - self.alpha_fwd)
        good = self.fits(moved)
        stored = good if some is None else good & some
        r = torch.rsqrt(d + self.eps)
        inverse = r if self.paper else torch.rsqrt(q + self.eps)
        new = (torch.where(stored, moved, phi), None, before + stored, None, self.skipped(~good))
        return r, (r, inverse, whole * r.square(), stored), new

    def backward(self, kept: Any, weight: Tensor | None, slope: Tensor, after: Tensor):
        r, inverse, power, counted = kept
        ema = present(self.ema_gz, after).to(r.dtype)
        w = 1 if weight is None else weight.to(r.dtype)
        nu = (1 - self.alpha_bkw) * ema
        moved = ema + w * r * slope - nu * power
        good = self.fits(moved)
        new = (torch.where(counted & good, moved, ema), None, self.gradient_skipped(counted & ~good))
        return w * inverse, -nu * r * inverse, r, new

    def known(self, state: State):
        return state[0], state[2], self.warmup_iters

    def known_backward(self, state: State):
        return state[0], 1 - self.alpha_bkw

    def launch_forward(self, kernels: Any, sums: Tensor, state: State):
        how = (self.eps, self.alpha_fwd, self.warmup_iters, self.paper, self.guard)
        return kernels.power_forward(sums, state[0], state[2], *how)

    def launch_backward(self, kernels: Any, sums: Sequence[Any], kept: Any, parameters: Any, state: State):
        how = (state[0], state[2], 1 - self.alpha_bkw, self.guard)
        return kernels.power_backward(*sums, *kept, *parameters, *how)

    def plain(self, kept: Any):
        rows, flags = kept
        return *rows[:3], flags[1] != 0


class PowerNorm(MeanSquareNorm):
    r"""y = weight · u / sqrt(running_phi + eps) + bias, where u is x after group scaling.

    In the first `warmup_iters` steps of training the mean square of the batch stands for running_phi, later
    that from before the step, so that no token sees the others. The gradient is the paper's approximation: the
    statistic counts as a constant, and a running mean of past gradients (`ema_gz`) corrects it, in warm-up too.

    Args:
        num_features: channels, C.
        eps: added to the mean square; positive. Groups have 1e-5.
        alpha_fwd, alpha_bkw: weight of the old value in running_phi and in the correction, from 0 to 1.
        affine: whether there are a weight and a bias. The authors' class always has them.
        warmup_iters: steps that go by the batch. With 0 the first step divides by 1, the start of running_phi.
        group_num: groups of C / group_num neighbouring channels, each scaled to a root mean square of one at
            every token; 1 is an RMSNorm before the layer. None for none, which alone can be folded into a
            neighbour at inference but is less stable in training.
        backward: ``"official"``: the gradient is divided by the root of the batch's own mean square, as in the
            authors' code; ``"paper"``: by the number that the forward pass divided by.
        channel_dim: where the channels are: -1 for tokens (\*, C), 1 for (N, C, \*).
        sync: take the mean square, and the statistics of the gradient, over all ranks of `process_group`.
        process_group: None means the world.
        nonfinite: ``"skip"``: a batch or a gradient that is not finite, such as in an overflow step of AMP,
            leaves the state as it is, and ``batches_skipped`` or ``gradients_skipped`` counts;
            ``"propagate"``: it is lost for ever, as in the authors' code.
        bias: whether an affine layer has a bias.

    Input (\*, C) or as `channel_dim` says, output alike in shape and dtype. A call takes `pad_mask`, bool, of
    the shape of the input without its channels, True for padding, or finds it in
    ``with normzoo.inputs(model, pad_mask=...)``. Padding is normalized, but left out of the mean square; it
    counts in the statistics of the gradient, as in the authors' code. A batch of padding alone moves nothing.
    In eval mode the mask has no effect.

    State: `running_phi`, `ema_gz`, (C,) float32 or wider whatever the layer is cast to, and `iters`.
    Checkpoints of the authors' code load as they are.

    PN-V of the paper is ``functional.power_norm(x, group_num=None)`` without running_phi, and as a layer
    ``UnifiedNorm(num_features, window_size=1)``. Activation checkpointing is an error in training, for the
    state has moved when it recomputes.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> layer = PowerNorm(2, warmup_iters=2, group_num=None)
    >>> layer(torch.tensor([[3.0, 1.0], [4.0, 1.0]])).detach()
    tensor([[0.8485, 1.0000],
            [1.1314, 1.0000]])
    >>> layer.running_phi
    tensor([12.5000,  1.0000])
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        affine: bool = True,
        warmup_iters: int = 10000,
        group_num: int | None = 1,
        backward: str = "official",
        channel_dim: int = -1,
        *,
        bias: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "skip",
        device=None,
        dtype=None,
    ) -> None:
        checks.share("PowerNorm", "alpha_fwd", alpha_fwd)
        checks.share("PowerNorm", "alpha_bkw", alpha_bkw)
        checks.count("PowerNorm", "warmup_iters", warmup_iters)
        checks.positive("PowerNorm", "num_features", num_features)
        check_group_num("PowerNorm", group_num, num_features)
        checks.choice("PowerNorm", "backward", backward, BACKWARDS)
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, affine, channel_dim, device, dtype, **options)
        self.alpha_fwd, self.alpha_bkw, self.warmup_iters = alpha_fwd, alpha_bkw, warmup_iters
        self.group_num, self.backward = group_num, backward
        self.running_var = None
        self._statistic("running_phi", 1.0, num_features, device=device, dtype=dtype)
        self._statistic("ema_gz", 0.0, num_features, device=device, dtype=dtype)
        self._counter("iters", device=device)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "iters" in self._buffers:  # torch's constructor calls this before there is one
            self.running_phi.fill_(1)
            self.ema_gz.zero_()
            self.iters.zero_()

    def _divisor(self) -> Tensor:
        return self.running_phi

    def _rule(self) -> Rule:
        return _Power(self)

    def extra_repr(self) -> str:
        said = f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}"
        said += f", affine={self.affine}, warmup_iters={self.warmup_iters}, group_num={self.group_num}"
        return f"{said}, backward={self.backward!r}, channel_dim={self.channel_dim}{self._options()}"
