r"""Batch-channel normalization: every channel over the batch, then groups of channels in each sample.

Qiao, Wang, Liu, Shen and Yuille, *Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization*, 2019, arXiv:1903.10520; code joe-siyuan-qiao/Batch-Channel-Normalization. Both stages are one
affine map of x, because the moments of the first stage's output follow from those of x.

Quirks of that code, kept: the second stage has one weight and one bias a group (``channel_affine``), and
``eps`` reaches that stage alone (``batch_eps``). In estimate mode the variance is taken around the running mean
before it moves (``order``), both averages move before they are used, num_batches_tracked rests, and nothing
corrects the start from 0 and 1.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ranks
from ..engine import normalize
from ..moments import Moments, standardized
from ..state import Running, advance, average, moved, recomputing, snapshot
from .stages import mixed, moved_first, second_stage

logger = logging.getLogger("normzoo")

ORDERS = ("variance_first", "mean_first")
CHANNEL_AFFINE = ("group", "channel")


def batch_channel_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    channel_weight: Tensor | None = None,
    channel_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    batch_eps: float = 1e-5,
) -> Tensor:
    r"""y = group_norm(batch_norm(x)), in two reads and one write of x.

    Args:
        x: (N, C, \*) or (N, C), contiguous or channels_last, any real floating dtype.
        running_mean, running_var: (C,) or None, of the first stage; in training they move, in place, as in
            :func:`normzoo.functional.batch_norm`, otherwise they take the place of the statistics of the batch.
        num_groups: groups of channels in the second stage.
        weight, bias: (C,) or None, of the first stage.
        channel_weight, channel_bias: (num_groups,), (C,) or None, of the second stage.
        training: whether the first stage takes the statistics of the batch.
        momentum: weight of the new statistics.
        eps: added to the variance of the second stage; positive.
        batch_eps: added to the variance of the first stage; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or there is one value per channel
            or group.

    >>> import torch
    >>> batch_channel_norm(torch.tensor([[1.0, 9.0], [3.0, 0.0]]), None, None, 1, training=True)
    tensor([[-1.0000,  1.0000],
            [ 1.0000, -1.0000]])
    """
    layer = "batch_channel_norm"
    checks.channels(layer, x, None, weight=weight, bias=bias)
    for argument, value in (("eps", eps), ("batch_eps", batch_eps)):
        checks.eps(layer, value, argument)
    checks.momentum(layer, momentum, average=False)
    checks.positive(layer, "num_groups", num_groups)
    running = checks.running(layer, x, running_mean, running_var, "training", training)
    stages = _Stages(layer, num_groups, weight, bias, channel_weight, channel_bias, batch_eps, eps)
    if not training:
        return stages.with_stored(x, *running)
    y, statistics = stages.with_batch(x)
    advance(running, statistics, momentum)
    return y


class _Stages:
    """The parameters of both stages, and what goes before the second."""

    def __init__(
        self,
        layer: str,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_weight: Tensor | None,
        channel_bias: Tensor | None,
        batch_eps: float,
        eps: float,
    ) -> None:
        self.layer, self.num_groups = layer, num_groups
        self.weight, self.bias, self.batch_eps = weight, bias, batch_eps
        self.channel_weight, self.channel_bias, self.eps = channel_weight, channel_bias, eps

    def with_stored(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        def combine(m: Moments):
            return self._then_groups(m, *self._by(m, mean, var))

        return self._normalize(x, combine)[0]

    def with_batch(self, x: Tensor, sync: bool = False, process_group: Any = None) -> tuple[Tensor, Any]:
        """(y, (mean, unbiased variance, count)) with the statistics of the batch."""
        sync = sync and ranks.size(process_group) > 1
        if not sync:
            checks.several_values(self.layer, x, ", eval mode, or estimate=True")

        def combine(m: Moments):
            batch = m.over_batch()
            batch = batch.across_ranks(process_group) if sync else batch
            first = batch.standardize(self.weight, self.bias, self.batch_eps)
            statistics = (batch.sets.mean, batch.sets.unbiased_var, batch.sets.count)
            return *self._then_groups(m, *first), statistics

        return self._normalize(x, combine)

    def with_estimate(
        self, x: Tensor, running: tuple[Tensor, Tensor], rate: float, order: str, sync: bool, process_group: Any
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(y, updates) with running statistics that move first; the updates are for :func:`state.commit`."""
        sync = sync and ranks.size(process_group) > 1

        def combine(m: Moments):
            batch = m.over_batch()
            batch = batch.across_ranks(process_group) if sync else batch
            mean, var, count = batch.sets.mean.detach(), batch.sets.var.detach(), batch.sets.count
            early = order == "variance_first"
            if m.kernels and not sync and count and (new := moved_first(mean, var, running, rate, early)):
                return *self._then_groups(m, *self._by(m, *new)), list(zip(running, new, strict=True))
            old_mean, old_var = (snapshot(t) for t in running)
            around = old_mean if early else average(old_mean, mean, rate)
            var = var + (mean - around).square()
            found = [new for _, new in moved(((old_mean, mean), (old_var, var)), count, rate)]
            new = found or [old_mean, old_var]
            updates = list(zip(running, found, strict=False))
            return *self._then_groups(m, *self._by(m, *new)), updates

        return self._normalize(x, combine)

    def _by(self, m: Moments, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the first stage by a given mean and variance."""
        if found := mixed(m, (mean, var), 1, self.weight, self.bias, self.batch_eps):
            return found[:2]
        var = var.to(m.pivot.dtype)
        return standardized(mean - m.pivot, var, self.weight, self.bias, self.batch_eps)

    def _then_groups(self, m: Moments, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) of both stages, given those of the first."""
        parameters = (self.channel_weight, self.channel_bias, self.eps)
        scale, shift = second_stage(m, scale, shift, self.num_groups, *parameters)
        return scale, shift

    def _normalize(self, x: Tensor, combine: Any) -> tuple[Tensor, Any]:
        self._check(x)
        return normalize(x, combine, per_sample=True)

    def _check(self, x: Tensor) -> None:
        """Refuses what does not fit, and brings what is one a group to one a channel."""
        groups, channels = self.num_groups, x.shape[1]
        if channels % groups:
            raise ValueError(f"{self.layer}: num_groups is {groups}; it must divide the {channels} channels")
        for name, t in (("channel_weight", self.channel_weight), ("channel_bias", self.channel_bias)):
            if isinstance(t, Tensor) and t.shape not in ((groups,), (channels,)):
                raise ValueError(
                    f"{self.layer}: {name} has shape {tuple(t.shape)}; it must be ({groups},), one a group, or "
                    f"({channels},)"
                )
        for name, t in (("channel_weight", self.channel_weight), ("channel_bias", self.channel_bias)):
            each: dict[str, Any] = {name: t[:1].expand(channels) if isinstance(t, Tensor) else t}
            checks.channels(self.layer, x, None, **each)
        if x.numel() and x[0].numel() == groups:
            raise ValueError(
                f"{self.layer}: Expected more than 1 value per group, got input size {tuple(x.shape)} for "
                f"{groups} groups; use fewer groups"
            )


class BatchChannelNorm(Running):
    r"""y = group_norm(batch_norm(x)), with running statistics in place of those of the batch for micro-batches.

    Input (N, C, \*) or (N, C), output alike in shape, dtype and memory format. The first stage is batch norm,
    in eval mode by running statistics; the second, over groups of channels in each sample, is the same in both
    modes. It costs as many passes over x as batch norm alone.

    With ``estimate=True``, for batches too small for statistics, the first stage normalises by running
    statistics in training too: they move towards the batch first, and are constants for autograd. Give it an
    update_rate and Weight Standardization beside it, as the paper does.

    State: that of :class:`torch.nn.BatchNorm2d`, for the first stage, and `channel_weight` and `channel_bias`
    for the second. Checkpoints of the authors' code load as they are, those of the README (``bn.*``) and of
    their ImageNet models (``pbn.*``): ``bn.weight`` → ``weight``, ``weight`` → ``channel_weight`` and so on,
    while ``bn.estbn_moving_speed`` is a setting here, update_rate; the logger ``normzoo`` warns where they
    differ.

    Args:
        num_features: channels, C.
        num_groups: groups of the second stage; it divides C.
        eps: added to the variance of the second stage; positive.
        momentum: weight of a batch in the running statistics where `estimate` is off; None averages all.
        estimate: whether the first stage normalises by running statistics in training.
        update_rate: weight of a batch in the running statistics where `estimate` is on, above 0; such as 0.01
            to 0.1. The authors' code starts at 0, with which nothing ever moves.
        batch_eps: added to the variance of the first stage; positive.
        channel_affine: ``"group"``: one weight and bias for each group in the second stage, as in the authors'
            code; ``"channel"``: one for each channel, as in group norm.
        order: in estimate mode the variance of a batch is taken around the running mean before it moves
            (``"variance_first"``, the authors' code) or after (``"mean_first"``).
        sync: take the statistics of the batch over all ranks of `process_group`.
        process_group, nonfinite: as in :class:`normzoo.BatchNorm2d`.

    In estimate mode activation checkpointing is an error: a recomputation would find running statistics that
    have moved.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> layer = BatchChannelNorm(2, 1, estimate=True, update_rate=0.5)
    >>> layer(torch.tensor([[0.0, 800.0]])).detach()
    tensor([[-1.0000,  1.0000]])
    >>> layer.running_mean
    tensor([  0., 400.])
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        estimate: bool = False,
        update_rate: float | None = None,
        *,
        batch_eps: float = 1e-5,
        channel_affine: str = "group",
        order: str = "variance_first",
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        device=None,
        dtype=None,
    ) -> None:
        layer = "BatchChannelNorm"
        checks.positive(layer, "num_features", num_features)
        checks.positive(layer, "num_groups", num_groups)
        if num_features % num_groups:
            raise ValueError(
                f"{layer}: num_groups is {num_groups}; it must divide num_features = {num_features}"
            )
        checks.flag(layer, "estimate", estimate)
        checks.eps(layer, batch_eps, "batch_eps")
        checks.choice(layer, "channel_affine", channel_affine, CHANNEL_AFFINE)
        checks.choice(layer, "order", order, ORDERS)
        _check_rate(estimate, update_rate, order)
        self.num_groups, self.batch_eps, self.channel_affine = num_groups, batch_eps, channel_affine
        self.estimate, self.update_rate, self.order = estimate, update_rate, order
        options = {"sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, True, True, device, dtype, **options)
        shape = num_groups if channel_affine == "group" else num_features
        self.channel_weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.channel_bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "channel_weight" in self._parameters:  # torch's constructor calls this before there is one
            nn.init.ones_(self.channel_weight)
            nn.init.zeros_(self.channel_bias)

    def forward(self, x: Tensor) -> Tensor:
        checks.channels("BatchChannelNorm", x, self.num_features, weight=self.weight)
        affine = (self.weight, self.bias, self.channel_weight, self.channel_bias, self.batch_eps, self.eps)
        stages = _Stages("BatchChannelNorm", self.num_groups, *affine)
        if not self.training:
            return stages.with_stored(x, *self._stored())
        if self.update_rate is None:
            y, statistics = stages.with_batch(x, self.sync, self.process_group)
            self._track(*statistics)
            return y
        if recomputing():
            raise RuntimeError(
                "BatchChannelNorm: with estimate=True it normalises by running statistics that have moved "
                "since the forward pass, so that activation checkpointing would give wrong gradients; leave "
                "it out of the checkpoint"
            )
        how = (self.update_rate, self.order, self.sync, self.process_group)
        y, updates = stages.with_estimate(x, self._stored(), *how)
        self._commit(updates)
        return y

    def extra_repr(self) -> str:
        said = f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, momentum={self.momentum}"
        if self.estimate:
            said += f", estimate=True, update_rate={self.update_rate}, order={self.order!r}"
        said += f", batch_eps={self.batch_eps}, channel_affine={self.channel_affine!r}"
        return said + self._options()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for official in (prefix + "bn.", prefix + "pbn."):
            if official + "running_mean" in state_dict:
                self._compare_rate(state_dict.pop(official + "estbn_moving_speed", None))
                _rename(state_dict, prefix, official)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _compare_rate(self, official: Tensor | None) -> None:
        """Tells of a checkpoint that was trained at another rate; 0 is one that was never set."""
        rate = 0.0 if official is None or official.is_meta else float(official)
        if rate and not math.isclose(rate, self.update_rate or 0.0, rel_tol=1e-6):
            logger.warning(
                "BatchChannelNorm: the checkpoint was trained in estimate mode with estbn_moving_speed=%g; "
                "here estimate=%s and update_rate=%s, which stay",
                *(rate, self.estimate, self.update_rate),
            )


def _check_rate(estimate: bool, update_rate: float | None, order: str) -> None:
    if not estimate:
        for name, given in (("update_rate", update_rate is not None), ("order", order != ORDERS[0])):
            if given:
                raise ValueError(
                    f"BatchChannelNorm: {name} is given and estimate is False; it needs estimate=True"
                )
    elif update_rate is None:
        raise ValueError(
            "BatchChannelNorm: estimate=True needs update_rate, the weight of a batch in the running "
            "statistics, such as 0.02"
        )
    elif isinstance(update_rate, bool) or not isinstance(update_rate, (int, float)) or not 0 < update_rate <= 1:
        raise ValueError(
            f"BatchChannelNorm: update_rate is {update_rate!r}; it must be above 0, with which the running "
            "statistics would never move, and at most 1"
        )


def _rename(state_dict: dict[str, Any], prefix: str, official: str) -> None:
    """The names of the authors' code to those of this layer, in place."""
    for name in ("weight", "bias"):
        if prefix + name in state_dict:
            state_dict[f"{prefix}channel_{name}"] = state_dict.pop(prefix + name).flatten()
    for name in [name for name in state_dict if name.startswith(official)]:
        state_dict[prefix + name.removeprefix(official)] = state_dict.pop(name)
