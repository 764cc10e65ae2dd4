r"""The running engine: norms by a mean square, whose gradient has running statistics of its own.

y = weight · u · r + bias, where r comes from stored statistics of u², from those of the batch, or from both;
and the gradient of u is a · dy + b · u, where a and b are no derivatives but come from stored statistics of the
gradient. Which statistics they are is the little arithmetic of a layer, its rule. State is written last, after
a pass that succeeded.

Where r, or a and b, are known before the statistics of a step, one sweep over x uses them and sums up those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad

from . import ranks, sweeps
from .dispatch import insisted, or_none, use_kernel
from .passes import divisor
from .state import commit, present, snapshot

State = Sequence[Tensor | None]
"""Of a forward pass (mean, window, iters, outliers, skipped), of a backward pass (mean, window, skipped): None
for what a layer has not."""

_WIDEST = 8192
"""Channels of a group that a kernel can hold."""

_LONGEST = 256
"""Rows of a window that a kernel can hold."""


class Rule(Protocol):
    """What a layer does between the passes. Tensors are (C,) or single numbers, float32 at least.

    ``kept`` is what the backward pass needs of the forward pass. New state is that of a step which may have
    been skipped: then it is the old.
    """

    layer: str

    @property
    def state(self) -> State:
        """The buffers that a forward pass moves."""
        ...

    @property
    def gradient_state(self) -> State:
        """The buffers that a backward pass moves."""
        ...

    def forward(self, q: Tensor, whole: Tensor, some: Tensor | None) -> tuple[Tensor, State, State]:
        """(r, kept, new state) from the mean square over what is no padding and that over everything.

        some: a bool, whether there was anything but padding; None where that is certain.
        """
        ...

    def backward(
        self, kept: Any, weight: Tensor | None, slope: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """(a, b, factor, new state): du = a · dy + b · u and dweight = factor · Σ dy · u.

        slope: the mean of dy · u over everything. after: a gradient, for :func:`normzoo.state.present`.
        """
        ...

    def known(self, state: State) -> tuple[Tensor | None, Tensor | None, int | None]:
        """What the first sweep forward needs in order to write y: d, iters, warmup; see the kernels."""
        ...

    def known_backward(self, state: State) -> tuple[Any, float] | None:
        """What the first sweep backward needs in order to write dx: ema and rate; None where it cannot."""
        ...

    def launch_forward(self, kernels: Any, sums: Tensor, state: State) -> Any:
        """What is kept, by the kernel, which leaves the state to the last sweep."""
        ...

    def launch_backward(
        self, kernels: Any, sums: Sequence[Any], kept: Any, parameters: Any, state: State
    ) -> Any:
        """(dweight, dbias) by the kernel, which moves the state; or, where no sweep wrote dx,
        (dweight, dbias, rows, flags) for that which does."""
        ...

    def plain(self, kept: Any) -> State:
        """What a kernel kept as :meth:`backward` takes it."""
        ...


def run(
    x: Tensor,
    pad_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int | None,
    rule: Rule,
    sync: bool = False,
    process_group: Any = None,
) -> Tensor:
    """A step of training; x (N, C, \\*), pad_mask (N, \\*) bool, True for padding.

    groups: each position is first divided by the root mean square of each of so many groups of channels.
    """
    kernels = use_kernel(x, weight, bias, fusible=False)
    kernels = kernels and _fits(x, groups, *_there(rule.state), *_there(rule.gradient_state))
    ranked = sync and ranks.size(process_group) > 1
    y, *new = _Run.apply(x, weight, bias, pad_mask, groups, rule, ranked, process_group, kernels, insisted())
    if new:
        commit(zip(_there(rule.state), new, strict=True))
    return y


def _there(state: State) -> list[Tensor]:
    return [t for t in state if t is not None]


def by_stored(
    x: Tensor, stored: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int | None
) -> Tensor:
    """weight · u / sqrt(stored + eps) + bias for x (N, C, \\*): eval mode, differentiable."""
    plain = needs_grad(x, stored, weight, bias) or not use_kernel(x, stored, weight, bias)
    if not plain and _fits(x, groups, stored):
        y = or_none(insisted(), _stored_by_kernel, x, stored, weight, bias, eps, groups)
        if y is not None:
            return y
    u, _ = sweeps.unit(x, groups)
    r = torch.rsqrt(stored.to(u.dtype) + eps)
    return sweeps.scaled(u, r if weight is None else r * weight, bias).to(x.dtype)


def _fits(x: Tensor, groups: int | None, *state: Tensor) -> bool:
    """Whether the kernels can take groups so wide and such statistics.

    Raises:
        RuntimeError: they cannot, and ``backend("triton")`` was asked for.
    """
    if groups is not None and x.shape[1] // groups > _WIDEST:
        what = f"groups of up to {_WIDEST} channels, here they have {x.shape[1] // groups}"
    elif windows := [len(t) for t in state if t.dim() == 2 and len(t) > _LONGEST]:
        what = f"windows of up to {_LONGEST} steps, here one has {windows[0]}"
    elif wrong := [t.dtype for t in state if t.dtype not in (torch.float32, torch.long)]:
        what = f"statistics in float32, these are {wrong[0]}"
    else:
        return True
    if insisted():
        raise RuntimeError(
            f'backend("triton"): the kernels of norms by a mean square take {what}; use backend("auto")'
        )
    return False


class _Run(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, pad_mask, groups, rule, ranked, process_group, kernels, strict):
        how = (groups, rule, ranked, process_group)
        found = None
        if kernels:
            found = or_none(strict, _forward_by_kernels, x, weight, bias, pad_mask, *how)
        ctx.kernels, ctx.strict, ctx.how = found is not None, strict, how
        ctx.bias = None if bias is None else bias.dtype
        y, counts, kept, new = found or _forward(x, weight, bias, pad_mask, *how)
        new = _there(new)
        ctx.save_for_backward(x, weight, counts, *kept)
        ctx.mark_non_differentiable(*new)
        ctx.set_materialize_grads(False)
        return y, *new

    @staticmethod
    def backward(ctx, *grads):
        nothing = (None,) * 10
        dy = grads[0]
        if dy is None:
            return nothing
        if differentiated(dy):  # with once_differentiable a path through dx would end without a word
            raise RuntimeError(
                f"{ctx.how[1].layer}: in training its backward pass is no derivative and has none, so that "
                "create_graph=True and batched gradients cannot go through it; use eval mode"
            )
        x, weight, counts, *kept = ctx.saved_tensors
        rule, found, wants_x = ctx.how[1], None, ctx.needs_input_grad[0]
        if ctx.kernels:
            step = (dy, x, weight, ctx.bias, counts, kept, wants_x)
            found = or_none(ctx.strict, _backward_by_kernels, *step, *ctx.how)
            kept = kept if found else rule.plain(kept)
        dx, dweight, dbias, new = found or _backward(dy, x, weight, counts, kept, wants_x, *ctx.how)
        if new:
            commit(zip(_there(rule.gradient_state), _there(new), strict=True))
        dweight = None if weight is None else dweight.to(weight.dtype)
        return dx, dweight, None if ctx.bias is None else dbias, *nothing[3:]


def _stored_by_kernel(x, stored, weight, bias, eps, groups):
    from normzoo_kernels import running as kernels
    from normzoo_kernels._channel_layout import like

    y = like(x)
    kernels.map_into(y, x, stored, weight, bias, None, groups or 0, eps)
    return y


def _counts(x: Tensor, pad_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """How many positions are no padding, and how many there are."""
    count = x.numel() // x.shape[1]
    whole = torch.full((), count, dtype=dtype, device=x.device)
    return torch.stack((whole if pad_mask is None else (~pad_mask).sum().to(dtype), whole))


def _forward(x, weight, bias, pad_mask, groups, rule, ranked, process_group):
    """(y, counts, kept, new state)."""
    u, _ = sweeps.unit(x, groups)
    whole = sweeps.squares(u)
    valid = whole if pad_mask is None else sweeps.squares(u, pad_mask)
    counts = _counts(x, pad_mask, u.dtype)
    if ranked:  # packed as the sums of the kernels, which other ranks may have run
        valid, here, whole, count = ranks.total((valid, counts[0], whole, counts[1]), process_group)
        counts = torch.stack((here, count))
    certain = pad_mask is None and not ranked and x.numel() > 0
    here, count = divisor(counts).unbind()
    r, kept, new = rule.forward(valid / here, whole / count, None if certain else counts[0] > 0)
    y = sweeps.scaled(u, r if weight is None else r * weight, bias).to(x.dtype)
    return y, counts, kept, new


def _backward(dy, x, weight, counts, kept, wants_x, groups, rule, ranked, process_group):
    """(dx, dweight, dbias, new state)."""
    u, s = sweeps.unit(x, groups)
    dbias, slope = sweeps.sums(dy, u)
    total = ranks.total((slope,), process_group)[0] if ranked else slope
    count = x.numel() // x.shape[1] if counts is None else divisor(counts)[1]
    a, b, factor, new = rule.backward(kept, weight, total / count, dy)
    dx = sweeps.gradient(dy, u, a, b, s, groups).to(x.dtype) if wants_x else None
    return dx, factor * slope, dbias, new


def _forward_by_kernels(x, weight, bias, pad_mask, groups, rule, ranked, process_group):
    from normzoo_kernels import running as kernels

    state = _lying(rule.state, snapshot)
    d, iters, warmup = rule.known(state)
    y, sums = kernels.sweep(x, pad_mask, d, weight, bias, iters, warmup or 0, groups or 0, rule.eps)
    if ranked:
        (sums,) = ranks.total((sums,), process_group)
    rows, flags = rule.launch_forward(kernels, sums, state)
    kernels.map_into(y, x, rows, weight, bias, warmup, groups or 0, None, flags, *state)
    return y, sums[:, -1] if ranked else None, (rows, flags), _written(rule.state, state)


def _backward_by_kernels(dy, x, weight, bias, counts, kept, wants_x, groups, rule, ranked, process_group):
    from normzoo_kernels import running as kernels

    state = _lying(rule.gradient_state, lambda b: present(b, dy))
    known = rule.known_backward(state) if wants_x else None
    ema, rate = known or (None, 0.0)
    rows, factor = (kept[0], weight) if known else (None, None)
    dx, sums = kernels.gradient(dy, x, rows, factor, ema, rate, groups or 0)
    total = ranks.total((sums[1],), process_group)[0] if ranked else None
    whole = None if counts is None else counts[1]
    found = (sums, total, whole, x.numel() // x.shape[1])
    dweight, dbias, *late = rule.launch_backward(kernels, found, kept, (weight, bias), state)
    if late:
        dx = kernels.late_gradient(dy, x, late[0], groups or 0, wants_x, late[1], *state)
    return dx if wants_x else None, dweight, dbias, _written(rule.gradient_state, state)


def _lying(buffers: State, copy: Callable[[Tensor], Tensor]) -> State:
    """What the kernels write: the buffers as they are, but copies in a graph, and of what is not contiguous."""
    if torch.compiler.is_compiling():
        return [None if b is None else copy(b) for b in buffers]
    return [None if b is None else b.contiguous() for b in buffers]


def _written(buffers: State, state: State) -> State:
    """What is left to commit when kernels have written `state`. Autograd, which sees no kernel, is told."""
    if torch.compiler.is_compiling() or any(a is not b for a, b in zip(state, buffers, strict=True)):
        return state
    torch.autograd.graph.increment_version(_there(state))
    return ()
