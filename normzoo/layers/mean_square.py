"""What norms by a mean square share: layouts, padding, stored state, and the map by a given mean square."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks, sweeps
from ..dispatch import transformed
from ..engine import normalize
from ..moments import Moments
from ..running import Rule, by_stored, run
from ..side_inputs import side_input
from ..state import Guarded, finite, recomputing


def check_input(
    layer: str,
    x: Tensor,
    number: int | None,
    channel_dim: int,
    groups: int | None = None,
    pad_mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x with its channels in dimension 1, after all checks; :func:`laid_back` undoes that.

    Contiguous tokens become rows, (M, C), for the order of dimensions decides how fast torch sums on a CPU.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: the input is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim() or channel_dim in (0, -x.dim()):
        raise ValueError(
            f"{layer}: the input has shape {tuple(x.shape)} and channel_dim is {channel_dim}; it must have two "
            "dimensions or more, and the channels not be the first"
        )
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(
            f"{layer}: the input is nested or sparse; it must be a dense tensor, with a pad_mask for what is "
            "not there"
        )
    if number is not None and x.shape[channel_dim] != number:
        raise ValueError(
            f"{layer}: num_features is {number} but the input has shape {tuple(x.shape)}; its dimension "
            f"{channel_dim} must match, or channel_dim say where the channels are"
        )
    if pad_mask is not None:
        _check_mask(layer, x, channel_dim, pad_mask)
    tokens = channel_dim % x.dim() == x.dim() - 1 and x.is_contiguous()
    x = x.flatten(0, -2) if tokens else x.movedim(channel_dim, 1)
    checks.channels(layer, x, None, weight=weight, bias=bias)
    if groups is not None and x.shape[1] % groups:
        raise ValueError(f"{layer}: group_num is {groups}; it must divide the {x.shape[1]} channels")
    return x


def laid_back(y: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """y, made of what :func:`check_input` made of x, in the dimensions of x."""
    if y.dim() != x.dim():
        return y.view(x.shape)
    # Not a view where there is nothing to move: FSDP2 loses its hooks when a view is changed in place.
    return y if channel_dim % x.dim() == 1 else y.movedim(1, channel_dim)


def _check_mask(layer: str, x: Tensor, channel_dim: int, pad_mask: Tensor) -> None:
    if not isinstance(pad_mask, Tensor) or pad_mask.dtype != torch.bool:
        what = pad_mask.dtype if isinstance(pad_mask, Tensor) else f"a {type(pad_mask).__name__}"
        raise TypeError(
            f"{layer}: pad_mask is {what}; it must be a tensor of bool, True for padding: pad_mask.bool()"
        )
    channel = channel_dim % x.dim()
    wanted = (*x.shape[:channel], *x.shape[channel + 1 :])
    if pad_mask.shape != wanted:
        hint = "; pad_mask.T fits" if pad_mask.dim() == 2 and pad_mask.T.shape == wanted else ""
        raise ValueError(
            f"{layer}: pad_mask has shape {tuple(pad_mask.shape)} but the input has shape {tuple(x.shape)}; it "
            f"must be {wanted}, the input without its channels{hint}"
        )
    checks.same_device(layer, "pad_mask", pad_mask, x)


def check_group_num(layer: str, group_num: int | None, num_features: int | None = None) -> None:
    if group_num is None:
        return
    checks.positive(layer, "group_num", group_num)
    if num_features is not None and num_features % group_num:
        raise ValueError(
            f"{layer}: group_num is {group_num}; it must divide num_features = {num_features}, or be None for "
            "no group scaling"
        )


def check_channel_dim(layer: str, channel_dim: int) -> None:
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool) or channel_dim == 0:
        raise ValueError(
            f"{layer}: channel_dim is {channel_dim!r}; it must be an int other than 0, such as -1 for "
            "(*, C) and 1 for (N, C, *)"
        )


def without_state(
    x: Tensor,
    stored: Tensor | None,
    pad_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int | None,
) -> Tensor:
    """weight · u / sqrt(q + eps) + bias for x (N, C, \\*), with the true gradient. q is the stored mean square,
    or else that of the batch: PN-V of the PowerNorm paper."""
    if stored is not None:
        return by_stored(x, stored, weight, bias, eps, groups)

    def combine(m: Moments):
        q = m.var + m.mean.square()
        if pad_mask is not None:
            q = torch.where(m.count > 0, q, 1)[:1]  # where all is padding
        scale = torch.rsqrt(q + eps)
        scale = scale if weight is None else scale * weight
        shift = m.pivot * scale
        return scale, shift if bias is None else shift + bias

    u = x if groups is None else sweeps.unit(x, groups)[0]
    return normalize(u, combine, mask=_over(x, pad_mask))[0].to(x.dtype)


def _over(x: Tensor, pad_mask: Tensor | None) -> Tensor | None:
    """The mask for x (N, C, \\*) or (M, C)."""
    return None if pad_mask is None else pad_mask.reshape(x.shape[0], *x.shape[2:])


class MeanSquareNorm(Guarded):
    """A layer that divides by the root of a mean square. Its state is never cast to less than float32.

    Squares of half precision overflow above 255, and a mean of logarithms of theirs is a coarse thing.
    """

    side_inputs = ("pad_mask",)
    ema_gz: Tensor
    gradients_skipped: Tensor | None
    group_num: int | None = None
    _usual = "skip"

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        channel_dim: int,
        device,
        dtype,
        *,
        bias: bool,
        sync: bool,
        process_group: Any,
        nonfinite: str,
    ) -> None:
        check_channel_dim(type(self).__name__, channel_dim)
        for name, flag in (("affine", affine), ("bias", bias)):
            checks.flag(type(self).__name__, name, flag)
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, None, affine, False, device, dtype, **options)
        self._keep_others()
        self.channel_dim = channel_dim
        self._count_in("gradients_skipped", device)

    def _statistic(self, name: str, start: float, *shape: int, device=None, dtype=None) -> None:
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.full(shape, start, dtype=wide, device=device))

    def _counter(self, name: str, device=None) -> None:
        self.register_buffer(name, torch.zeros((), dtype=torch.long, device=device))

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer) of those that a checkpoint holds."""
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                yield name, buffer

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._state())
        super()._apply(fn, recurse)
        for name, now in [*self._state()]:
            real = now.is_floating_point()
            if real != before[name].is_floating_point() or (real and now.dtype.itemsize < 4):
                self._buffers[name] = before[name].to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, own in self._state():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.squeeze().shape == own.squeeze().shape:
                # As it will be stored with assign=True.
                state_dict[prefix + name] = given.reshape(own.shape).to(own.dtype).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _divisor(self) -> Tensor:
        """The running mean square."""
        raise NotImplementedError

    def _rule(self) -> Rule:
        """What a step of training does."""
        raise NotImplementedError

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        if pad_mask is None and self.training:
            pad_mask = side_input(self, "pad_mask", required=False)
        own = (self.num_features, self.channel_dim, None, pad_mask)
        h = check_input(type(self).__name__, x, *own, self.weight, self.bias)
        if self.training:
            y = self._train(h, pad_mask)
        else:
            y = by_stored(h, self._divisor(), self.weight, self.bias, self.eps, self.group_num)
        return laid_back(y, x, self.channel_dim)

    def _train(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        layer = type(self).__name__
        if recomputing():
            raise RuntimeError(
                f"{layer}: it normalizes by running statistics that have moved since the forward pass, so that "
                "activation checkpointing would give wrong gradients; leave it out of the checkpoint"
            )
        if transformed():
            raise RuntimeError(
                f"{layer}: in training its backward pass is no derivative, which torch.func, forward-mode AD, "
                "torch.export and tracing would lose; use eval mode"
            )
        how = (self.weight, self.bias, self.group_num, self._rule(), self.sync, self.process_group)
        return run(x, _over(x, pad_mask), *how)

    def _options(self) -> str:
        return (", bias=False" if self.affine and self.bias is None else "") + super()._options()


class Step:
    """What the rules of the layers share: what they need of a layer, not the layer itself, which may hold the
    graph that holds the rule."""

    def __init__(self, layer: MeanSquareNorm) -> None:
        self.layer, self.eps, self.ema_gz = type(layer).__name__, layer.eps, layer.ema_gz
        self.guard = layer.nonfinite == "skip"
        self.batches_skipped, self.gradients_skipped = layer.batches_skipped, layer.gradients_skipped

    def skipped(self, lost: Tensor) -> Tensor | None:
        """`batches_skipped` after a step, which may be `lost`."""
        return None if self.batches_skipped is None else self.batches_skipped + lost

    def gradient_skipped(self, lost: Tensor) -> Tensor | None:
        return None if self.gradients_skipped is None else self.gradients_skipped + lost

    def fits(self, *statistics: Tensor) -> Tensor:
        """Whether new statistics may be stored, and fit the dtype of the state: a bool on the device."""
        if self.guard:
            return finite(*(s.to(self.ema_gz.dtype) for s in statistics))
        return torch.ones((), dtype=torch.bool, device=statistics[0].device)


def in_widest(*statistics: Tensor) -> tuple[Tensor, ...]:
    """In the widest of their dtypes: those of a batch may be narrower than the stored ones, or wider."""
    dtype = functools.reduce(torch.promote_types, (s.dtype for s in statistics))
    return tuple(s.to(dtype) for s in statistics)
