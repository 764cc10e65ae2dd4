r"""The channel engine: a norm is a combine.

Statistics of x, a little arithmetic on small tensors, one affine map of x: three passes over x forward and five
backward, whatever the arithmetic is. The backward passes meet without a further one because the gradient of
y reaches the node of the statistics untouched: ``_Apply`` hands dy to its view of x and the scale to a carrier,
and ``_Moments`` writes dx from both in one pass, together with what came through the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad

from . import passes
from .dispatch import insisted, transformed, use_kernel
from .moments import Moments

Combine = Callable[[Moments], tuple]


def normalize(
    x: Tensor,
    combine: Combine,
    mask: Tensor | None = None,
    per_sample: bool = False,
    *,
    channel_dim: int = 1,
) -> tuple[Tensor, Any]:
    r"""y = (x − pivot) · scale + shift, where `combine` makes scale and shift from the statistics of x.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        combine: takes a :class:`normzoo.moments.Moments` and returns ``(scale, shift)`` or ``(scale, shift,
            aux)``, tensors that broadcast with ``m.pivot``. Differentiable PyTorch; parameters come in by
            closure. It runs in float32 at least (float64 for float64), with autocast off.
        mask: (N, \*) or (N, 1, \*) of bool or uint8: every pixel belongs to one of two regions with statistics
            of their own, and those have a leading axis of size 2 (0: where the mask is 0).
        per_sample: whether statistics are (N, C), of each sample, rather than (C,), of the batch.
        channel_dim: where the channels are; -1 for tokens (N, \*, C), with one sample a sequence. Tokens of
            which each is a sample of its own are (M, C).

    Returns:
        ``(y, aux)``: y has the shape, dtype and memory format of x; aux is None where `combine` returns none.

    Raises:
        ValueError, TypeError: an argument, or what `combine` returns, does not fit.

    A saved x is packed twice by :class:`torch.autograd.graph.saved_tensors_hooks`.

    >>> import torch
    >>> def batch_norm(m):
    ...     scale = (m.var + 1e-5).rsqrt()
    ...     return scale, -m.delta * scale
    >>> y, _ = normalize(torch.tensor([[1.0], [3.0]]), batch_norm)
    >>> y
    tensor([[-1.0000],
            [ 1.0000]])
    """
    x = _channels_second(x, channel_dim)
    if not callable(combine):
        raise TypeError(f"normalize: combine is of type {type(combine).__name__}; it must be callable")
    if mask is not None:
        mask = _checked_mask(mask, x)
    y, aux = _normalize(x, combine, mask, per_sample)
    # Not a view where there is nothing to move: FSDP2 loses its hooks when a view is changed in place.
    return (y if channel_dim == 1 else y.movedim(1, channel_dim)), aux


def _channels_second(x: Tensor, channel_dim: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"normalize: x is a {type(x).__name__}; it must be a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"normalize: x is {x.dtype}; it must be of a real floating-point dtype")
    if x.dim() < 2:
        raise ValueError(f"normalize: x has shape {tuple(x.shape)}; it must be (N, C, *)")
    if not -x.dim() <= channel_dim < x.dim() or channel_dim in (0, -x.dim()):
        raise ValueError(
            f"normalize: channel_dim is {channel_dim}; x has {x.dim()} dimensions, the first for samples"
        )
    return x if channel_dim == 1 else x.movedim(channel_dim, 1)


def _checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.uint8):
        what = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"normalize: mask is {what}; it must be a tensor of bool or uint8")
    if mask.dim() == x.dim() and mask.shape[1] == 1:
        mask = mask.squeeze(1)
    wanted = (x.shape[0], *x.shape[2:])
    if mask.shape != wanted:
        raise ValueError(
            f"normalize: mask has shape {tuple(mask.shape)}; for this x it must be {wanted}, or with a "
            "channel axis of one"
        )
    if mask.device != x.device:
        raise ValueError(f"normalize: mask is on {mask.device} but x is on {x.device}; move one to the other")
    return (mask != 0).to(torch.uint8)


def _normalize(x: Tensor, combine: Combine, mask: Tensor | None, per_sample: bool) -> tuple[Tensor, Any]:
    body = _Passes(use_kernel(x, fusible=False))
    seen_through = transformed()
    if seen_through or not needs_grad(x):
        pivot, delta, m2 = body.moments(x, mask, per_sample)
        inputs = None, x, None  # Dynamo takes no tensor twice
    else:
        pivot, delta, m2, *inputs = _Moments.apply(x, mask, per_sample, body)
    m = Moments(passes.counts(x, mask, per_sample), pivot, delta, m2, regions=mask is not None)
    with _without_autocast(x.device.type):
        scale, shift, aux = _combined(combine, m)
    if not seen_through and needs_grad(inputs[0], scale, shift):
        return _Apply.apply(*inputs, pivot, scale, shift, mask, body), aux
    return body.apply(x, mask, pivot, scale, shift), aux


def _without_autocast(device: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device):  # meta, whose context raises
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _combined(combine: Combine, m: Moments) -> tuple[Tensor, Tensor, Any]:
    made = combine(m)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise TypeError("normalize: combine must return (scale, shift) or (scale, shift, aux)")
    scale, shift, *aux = made
    shape, dtype = m.pivot.shape, m.pivot.dtype
    for name, t in (("scale", scale), ("shift", shift)):
        if not isinstance(t, Tensor):
            raise TypeError(f"normalize: combine returned a {type(t).__name__} for {name}; it must be a tensor")
        if not t.is_floating_point() or t.device != m.pivot.device:
            raise TypeError(
                f"normalize: combine returned a {name} of {t.dtype} on {t.device}; it must be real and on "
                f"{m.pivot.device}"
            )
        if t.dim() > len(shape) or any(
            a != 1 and a != b for a, b in zip(t.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"normalize: combine returned a {name} of shape {tuple(t.shape)}; it must broadcast to the "
                f"statistics, {tuple(shape)}"
            )
    return scale.to(dtype).expand(shape), shift.to(dtype).expand(shape), aux[0] if aux else None


class _Passes:
    """The four passes: by kernels where these run, else in eager PyTorch."""

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels
        self.strict = kernels and insisted()

    def moments(self, *args):
        return self._run("moments", args)

    def apply(self, *args):
        return self._run("apply", args)

    def sums(self, *args):
        return self._run("sums", args)

    def dx(self, *args):
        return self._run("dx", args)

    def _run(self, name: str, args: tuple):
        if self.kernels:
            from normzoo_kernels import channels
            from normzoo_kernels._launch import KernelUnavailable, warn_once

            try:
                return getattr(channels, name)(*args)
            except KernelUnavailable as error:
                if self.strict:
                    raise
                warn_once(str(error))
        return getattr(passes, name)(*args)


_PLAIN = _Passes(kernels=False)


class _Moments(Function):
    """Statistics of x, and x for ``_Apply``: once to bring the gradient of y back (pseudo), once to be saved
    there (real). The carrier brings the scale back."""

    @staticmethod
    def forward(ctx, x, mask, per_sample, body):
        pivot, delta, m2 = body.moments(x, mask, per_sample)
        ctx.save_for_backward(x, mask, pivot, delta)
        ctx.body = body
        ctx.mark_non_differentiable(pivot)
        ctx.set_materialize_grads(False)
        carrier = torch.empty_like(delta)  # only its gradient says anything
        return pivot, delta, m2, x.view_as(x), x.view_as(x), carrier

    @staticmethod
    def backward(ctx, *grads):
        _, d_delta, d_m2, dy, d_real, scale = grads
        x, mask, pivot, delta = ctx.saved_tensors
        slope, offset = _slope_and_offset(x, mask, pivot, delta, d_delta, d_m2)
        plain = dy is None or differentiated(dy)
        body = _PLAIN if plain else ctx.body
        if slope is None:  # statistics were constants
            zero = torch.zeros_like(pivot)
            dx = None if dy is None else body.apply(dy, mask, zero, scale, zero)
        elif dy is None:
            dx = body.apply(x, mask, pivot, slope, offset)
        else:
            dx = body.dx(dy, x, mask, pivot, scale, slope, offset)
        if d_real is not None:
            dx = d_real if dx is None else dx + d_real
        return dx, None, None, None


def _slope_and_offset(x, mask, pivot, delta, d_delta, d_m2) -> tuple[Tensor | None, Tensor | None]:
    """Of the gradient that x gets through its statistics: slope · (x − pivot) + offset."""
    if d_delta is None and d_m2 is None:
        return None, None
    if d_delta is None:
        offset = torch.zeros_like(pivot)
    else:
        offset = d_delta / passes.divisor(passes.counts(x, mask, _of_samples(pivot, mask)))
    if d_m2 is None:
        return torch.zeros_like(pivot), offset
    slope = 2 * d_m2
    return slope, torch.addcmul(offset, slope, delta, value=-1)


def _of_samples(pivot: Tensor, mask: Tensor | None) -> bool:
    return pivot.dim() == (2 if mask is None else 3)


class _Apply(Function):
    """The affine map. The gradient of y goes to pseudo as it is, that of the carrier is the scale; neither is
    looked at, and x is read and saved as real."""

    @staticmethod
    def forward(ctx, pseudo, real, carrier, pivot, scale, shift, mask, body):
        ctx.save_for_backward(real, pivot, scale, mask)
        ctx.body = body
        ctx.set_materialize_grads(False)
        return body.apply(real, mask, pivot, scale, shift)

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        if dy is None:
            return (None,) * 8
        x, pivot, scale, mask = ctx.saved_tensors
        body = _PLAIN if differentiated(dy) else ctx.body
        wants_x, _, wants_carrier, _, wants_scale, wants_shift, *_ = ctx.needs_input_grad
        d_scale = d_shift = None
        if wants_scale or wants_shift:
            d_shift, d_scale = body.sums(dy, x, mask, pivot, _of_samples(pivot, mask))
        return (
            dy if wants_x else None,
            None,
            scale if wants_carrier else None,
            None,
            d_scale if wants_scale else None,
            d_shift if wants_shift else None,
            None,
            None,
        )
