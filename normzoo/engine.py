r"""The channel engine: a norm is a combine.

Statistics of x, a little arithmetic on small tensors, one affine map of x: three passes over x forward and five
backward, whatever the arithmetic is. The backward passes meet without a further one because the gradient of
y reaches the node of the statistics untouched: ``_Apply`` hands dy to its view of x and the scale to a carrier,
and ``_Moments`` writes dx from both in one pass, together with what came through the statistics. A map that is
not affine hands over all its parameters, each to a carrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad

from . import blocks, checks, curves, passes
from .carry import expanded, slope_and_offset
from .dispatch import insisted, or_none, transformed, use_kernel
from .moments import Moments

Combine = Callable[[Moments], tuple]


def normalize(
    x: Tensor,
    combine: Combine,
    mask: Tensor | None = None,
    per_sample: bool = False,
    *,
    channel_dim: int = 1,
    curve: str = "affine",
) -> tuple[Tensor, Any]:
    r"""y = (x − pivot) · scale + shift, where `combine` makes scale and shift from the statistics of x.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        combine: takes a :class:`normzoo.moments.Moments` and returns ``(scale, shift)`` or ``(scale, shift,
            aux)``, tensors that broadcast with ``m.pivot``. Differentiable PyTorch; parameters come in by
            closure. It runs in float32 at least (float64 for float64), with autocast off.
        mask: (N, \*) or (N, 1, \*) of bool or uint8: every pixel belongs to one of two regions with statistics
            of their own, and those have a leading axis of size 2 (0: where the mask is 0). A bool one is kept
            for the backward pass, and must stay as it is until then.
        per_sample: whether statistics are (N, C), of each sample, rather than (C,), of the batch.
        channel_dim: where the channels are; -1 for tokens (N, \*, C), with one sample a sequence. Tokens of
            which each is a sample of its own are (M, C).
        curve: ``"affine"``; ``"bounded"``, y = scale · x / max(bound, slope · x + level) + shift; or
            ``"swish"``, y = scale · x · sigmoid(slope · x) + shift. The last two need ``per_sample=True`` and
            no mask, and `combine` returns their parameters in that order, such as ``(scale, slope, shift)``.

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
    checks.choice("normalize", "curve", curve, tuple(curves.PARAMETERS))
    if curve != "affine" and (mask is not None or not per_sample):
        raise ValueError(f"normalize: curve={curve!r} needs per_sample=True and takes no mask")
    if mask is not None:
        mask = _checked_mask(mask, x)
    y, aux = _normalize(x, combine, mask, per_sample, curve)
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
    # The bytes of a bool are 0 and 1, but for code that looks through.
    if mask.dtype == torch.bool and not (torch.compiler.is_compiling() or transformed()):
        return mask.view(torch.uint8)
    return (mask != 0).to(torch.uint8)


def _normalize(
    x: Tensor, combine: Combine, mask: Tensor | None, per_sample: bool, curve: str
) -> tuple[Tensor, Any]:
    body = _body(curve, use_kernel(x, fusible=False))
    # Where nothing goes in blocks, autograd is faster through a curve than the passes, which read x once more.
    whole = torch.compiler.is_compiling() or x.device.type != "cpu" or not blocks.large(x)
    seen_through = transformed() or (curve != "affine" and not body.kernels and whole)
    carriers: Sequence[Tensor] = ()
    if seen_through or not needs_grad(x):
        pivot, delta, m2, *counts = body.moments(x, mask, per_sample)
        pseudo, real = None, x  # Dynamo takes no tensor twice
    else:
        pivot, delta, m2, pseudo, real, *others = _Moments.apply(x, mask, per_sample, body)
        carriers, counts = others[: body.carried], others[body.carried :]
    count = counts[0] if counts else passes.counts(x, mask, per_sample)
    m = Moments(count, pivot, delta, m2, regions=mask is not None, kernels=body.small)
    with without_autocast(x.device.type):
        parameters, aux = _combined(combine, m, curve)
    if not seen_through and needs_grad(pseudo, *parameters):
        return _Apply.apply(pseudo, real, pivot, mask, body, *parameters, *carriers), aux
    return body.apply(x, mask, pivot, *parameters), aux


def without_autocast(device: str) -> AbstractContextManager:
    """A block in which autocast is off on `device`."""
    if not torch.amp.is_autocast_available(device):  # meta, whose context raises
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _combined(combine: Combine, m: Moments, curve: str) -> tuple[list[Tensor], Any]:
    made, names = combine(m), curves.PARAMETERS[curve]
    if not isinstance(made, tuple) or len(made) not in (len(names), len(names) + 1):
        wanted = ", ".join(names)
        raise TypeError(f"normalize: combine must return ({wanted}) or ({wanted}, aux)")
    shape, dtype = m.pivot.shape, m.pivot.dtype
    for name, t in zip(names, made, strict=False):
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
    aux = made[len(names)] if len(made) > len(names) else None
    return expanded([t.to(dtype) for t in made[: len(names)]], shape, m.kernels), aux


class _Passes:
    """The four passes: by kernels where these run, else in eager PyTorch."""

    carried = 1
    """How many of the parameters of the map, the first ones, the backward pass needs."""

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels
        self.strict = kernels and insisted()
        # Inductor fuses arithmetic on small tensors itself.
        self.small = kernels and not torch.compiler.is_compiling()

    def plain(self) -> _Passes:
        """The same in eager PyTorch, which can be differentiated."""
        return _Passes(kernels=False)

    def moments(self, x, mask, per_sample):
        """(pivot, delta, m2), and how many values these were taken over where a kernel tells."""
        if mask is not None and self.kernels:
            from normzoo_kernels import channels

            if found := or_none(self.strict, channels.region_moments, x, mask, per_sample):
                return found
            return passes.moments(x, mask, per_sample)
        return self._run("moments", x, mask, per_sample)

    def affine(self, x, mask, pivot, scale, shift):
        return self._run("apply", x, mask, pivot, scale, shift)

    def apply(self, x, mask, pivot, *parameters):
        return self.affine(x, mask, pivot, *parameters)

    def sums(self, dy, x, mask, pivot, *carried):
        """The gradients of all parameters of the map."""
        d_shift, d_scale = self._run("sums", dy, x, mask, pivot, _of_samples(pivot, mask))
        return d_scale, d_shift

    def dx(self, dy, x, mask, pivot, carried, *statistics):
        """dx from dy, what the map carries, and (slope, offset), where x gets a gradient through them."""
        (scale,) = carried
        if not statistics:
            zero = torch.zeros_like(pivot)
            return self.affine(dy, mask, zero, scale, zero)
        return self._run("dx", dy, x, mask, pivot, scale, *statistics)

    def _run(self, name: str, *args):
        if not self.kernels:
            return getattr(passes, name)(*args)
        from normzoo_kernels import channels

        return self._try(channels, passes, name, args)

    def _try(self, kernels: ModuleType, eager: ModuleType, name: str, args: tuple):
        found = or_none(self.strict, getattr(kernels, name), *args)
        return getattr(eager, name)(*args) if found is None else found


class _Curve(_Passes):
    """The passes of a map that is not affine: those of the statistics are the same."""

    def __init__(self, curve: str, kernels: bool) -> None:
        super().__init__(kernels)
        self.curve, self.carried = curve, len(curves.PARAMETERS[curve]) - 1

    def plain(self) -> _Passes:
        return _Curve(self.curve, kernels=False)

    def apply(self, x, mask, pivot, *parameters):
        return self._map("apply", x, self.curve, *parameters)

    def sums(self, dy, x, mask, pivot, *carried):
        return self._map("sums", dy, x, self.curve, *carried)

    def dx(self, dy, x, mask, pivot, carried, *statistics):
        through = (pivot, *statistics) if statistics else ()
        return self._map("dx", dy, x, self.curve, carried, *through)

    def _map(self, name: str, *args):
        if not self.kernels:
            return getattr(curves, name)(*args)
        from normzoo_kernels import curves as kernels

        return self._try(kernels, curves, name, args)


def _body(curve: str, kernels: bool) -> _Passes:
    return _Passes(kernels) if curve == "affine" else _Curve(curve, kernels)


class _Moments(Function):
    """Statistics of x, and x for ``_Apply``: once to bring the gradient of y back (pseudo), once to be saved
    there (real). The carriers bring parameters of the map back."""

    @staticmethod
    def forward(ctx, x, mask, per_sample, body):
        pivot, delta, m2, *count = body.moments(x, mask, per_sample)
        ctx.save_for_backward(x, mask, pivot, delta, *count)
        ctx.body = body
        ctx.mark_non_differentiable(pivot, *count)
        ctx.set_materialize_grads(False)
        carriers = [torch.empty_like(delta) for _ in range(body.carried)]  # only their gradients say anything
        return pivot, delta, m2, x.view_as(x), x.view_as(x), *carriers, *count

    @staticmethod
    def backward(ctx, *grads):
        _, d_delta, d_m2, dy, d_real, *others = grads
        carried = others[: ctx.body.carried]
        x, mask, pivot, delta, *counts = ctx.saved_tensors
        body = ctx.body.plain() if dy is None or differentiated(dy) else ctx.body
        count = counts[0] if counts else passes.counts(x, mask, _of_samples(pivot, mask))
        through = slope_and_offset(d_delta, d_m2, delta, count, body.small, body.strict)
        if dy is not None:
            dx = body.dx(dy, x, mask, pivot, carried, *through)
        else:
            dx = body.affine(x, mask, pivot, *through) if through else None
        if d_real is not None:
            dx = d_real if dx is None else dx + d_real
        return dx, None, None, None


def _of_samples(pivot: Tensor, mask: Tensor | None) -> bool:
    return pivot.dim() == (2 if mask is None else 3)


class _Apply(Function):
    """The map. The gradient of y goes to pseudo as it is, those of the carriers are parameters; none of them is
    looked at, and x is read and saved as real."""

    @staticmethod
    def forward(ctx, pseudo, real, pivot, mask, body, *rest):
        parameters = rest[: len(rest) - body.carried] if pseudo is not None else rest
        ctx.save_for_backward(real, pivot, mask, *parameters[: body.carried])
        ctx.body, ctx.pseudo = body, pseudo is not None
        ctx.set_materialize_grads(False)
        return body.apply(real, mask, pivot, *parameters)

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        wants_x, *_ = wants = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(wants)
        x, pivot, mask, *carried = ctx.saved_tensors
        body = ctx.body.plain() if differentiated(dy) else ctx.body
        number = len(wants) - 5 - (len(carried) if ctx.pseudo else 0)
        found: Sequence[Tensor | None] = [None] * number
        if any(wants[5 : 5 + number]):
            found = body.sums(dy, x, mask, pivot, *carried)
        found = [*found, *(carried if ctx.pseudo else ())]
        found = [t if wanted else None for t, wanted in zip(found, wants[5:], strict=True)]
        return dy if wants_x else None, None, None, None, None, *found
