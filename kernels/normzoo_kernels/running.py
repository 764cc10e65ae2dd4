"""The running engine on the GPU: launchers as operators over `_running.py` and `_running_rules.py`.

x is (N, C, *), a mask of padding (N, *) bool; parameters and statistics are (C,), sums (2, C). Counts of values
are a number, or two on the device: those of what is no padding, and all. Autograd is in `normzoo/running.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._channel_calls import beside, contiguous, in_place, lies, merge, problem_of, targets_of
from ._channel_layout import View, like
from ._channels_merge import merge_sums
from ._launch import launch
from ._op import op
from ._running import running_backward, running_forward
from ._running_forms import running_form
from ._running_rules import power_gradient, power_statistics, unified_gradient, unified_statistics

GROUP_EPS = 1e-5
_BLOCK = 1024


def _pair(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _lying(x: Tensor, view: View, dy_view: View | None = None):
    """(problem, numbers, constants) with all samples as one where one stride leads through them."""
    views = (view,) if dy_view is None else (view, dy_view)
    problem, views = problem_of(x, None, True, False, *views)
    numbers, constants = lies(problem, *views)
    del constants["PER_SAMPLE"]
    return problem, numbers, constants


def _forward(x, pad_mask, d, weight, bias, iters, warmup, groups, eps, y, sums):
    """One launch: y where it is given, sums where they are."""
    x, view = in_place(x)
    problem, numbers, constants = _lying(x, view)
    form = running_form(running_forward, problem, x.shape[1] // groups if groups else 0, pad_mask is not None)
    targets = (None, None, None) if sums is None else targets_of(form, tuple(sums), 2)
    pad = None if pad_mask is None else contiguous(pad_mask).view(torch.uint8)
    tensors = (x, pad, contiguous(d), contiguous(weight), contiguous(bias), iters, y, *targets)
    constants |= form.constants | {"WARMUP": warmup, "SUMS": sums is not None, "EPS": eps}
    constants["GROUP_EPS"] = GROUP_EPS
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    if sums is not None:
        merge(merge_sums, form, targets[-1], tuple(sums))


def _sweep_like(x, pad_mask, d, weight, bias, iters, warmup, groups, eps):
    return like(x), _pair(x)


@op(
    "running_sweep(Tensor x, Tensor? pad_mask, Tensor? d, Tensor? weight, Tensor? bias, Tensor? iters,"
    " int warmup, int groups, float eps) -> (Tensor, Tensor)",
    fake=_sweep_like,
)
def sweep(x, pad_mask, d, weight, bias, iters, warmup, groups, eps):
    """(y, sums of u * u, first of what is no padding): y is there where iters >= warmup, with `d`."""
    y, sums = like(x), _pair(x)
    if x.numel() == 0:
        return y, sums.zero_()
    _forward(x, pad_mask, d, weight, bias, iters, warmup, groups, eps, None if d is None else y, sums)
    return y, sums


@op(
    "running_map(Tensor(a!) y, Tensor x, Tensor d, Tensor? weight, Tensor? bias, Tensor? iters,"
    " int warmup, int groups, float? eps) -> ()",
    fake=lambda *_: None,
)
def map_into(y, x, d, weight, bias, iters, warmup, groups, eps):
    """y = weight * u / sqrt(d + eps) + bias, or weight * u * d + bias without eps; with `iters`, only where
    iters < warmup."""
    if x.numel():
        _forward(x, None, d, weight, bias, iters, warmup, groups, eps, y, None)


def _gradient_like(dy, x, a, b, weight, ema, rate, groups, summed):
    return x.new_empty(0) if a is None else like(x), _pair(x) if summed else _pair(x)[:0]


@op(
    "running_gradient(Tensor dy, Tensor x, Tensor? a, Tensor? b, Tensor? weight, Tensor? ema, float rate,"
    " int groups, bool summed) -> (Tensor, Tensor)",
    fake=_gradient_like,
)
def gradient(dy, x, a, b, weight, ema, rate, groups, summed):
    """(dx, sums of dy and of dy * u), of which the first needs a and b; the second is empty if not `summed`."""
    dx, sums = _gradient_like(dy, x, a, b, weight, ema, rate, groups, summed)
    if x.numel() == 0:
        return dx, sums.zero_()
    x, view = in_place(x)
    dy, dy_view = beside(dy, x, view.tokens)
    problem, numbers, constants = _lying(x, view, dy_view)
    form = running_form(running_backward, problem, x.shape[1] // groups if groups else 0, True)
    targets = targets_of(form, tuple(sums), 2) if summed else (None, None, None)
    rows = [contiguous(t) for t in (a, b, weight, ema)]
    tensors = (dy, x, *rows, None if a is None else dx, *targets)
    constants |= form.constants | {"RATE": rate, "SUMS": summed, "GROUP_EPS": GROUP_EPS}
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    if summed:
        merge(merge_sums, form, targets[-1], tuple(sums))
    return dx, sums


def _rule(kernel, tensors, channels, count, rows=1, **constants) -> None:
    """A program, whose inputs may lie in any way; `rows`: of its window."""
    block = min(_BLOCK, triton.next_power_of_2(channels), max(32, 4 * _BLOCK // rows))
    warps = 8 if block * rows >= _BLOCK else 4
    tensors = [contiguous(t) for t in tensors]
    launch(kernel, 1, tensors[0].device, *tensors, channels, count, B=block, num_warps=warps, **constants)


def _fresh(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _flag(t: Tensor) -> Tensor:
    return t.new_empty((), dtype=torch.long)


def _like(t: Tensor | None, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.long, device=device) if t is None else _fresh(t)


def _power_like(sums, counts, count, phi, iters, skipped, eps, alpha, warmup, paper, guard):
    r, counted = sums.new_empty((3, sums.shape[1])), _flag(sums)
    return r, counted, _fresh(phi), _fresh(iters), _like(skipped, phi.device)


@op(
    "power_statistics(Tensor sums, Tensor? counts, SymInt count, Tensor phi, Tensor iters, Tensor? skipped,"
    " float eps, float alpha, int warmup, bool paper, bool guard) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_power_like,
)
def power_forward(sums, counts, count, phi, iters, skipped, eps, alpha, warmup, paper, guard):
    """(r, counted, phi, iters, skipped): three rows for the two passes, a flag, the state after the step."""
    r, counted, *new = _power_like(sums, counts, count, phi, iters, skipped, eps, alpha, warmup, paper, guard)
    tensors = (sums, counts, phi, iters, skipped, r, *new, counted)
    numbers = {"EPS": eps, "ALPHA": alpha, "WARMUP": warmup, "PAPER": paper, "GUARD": guard}
    _rule(power_statistics, tensors, sums.shape[1], count, **numbers)
    return r, counted, *new


def _power_gradient_like(slope, total, counts, count, r, counted, weight, ema, skipped, rate, guard):
    return _fresh(slope), _fresh(ema), _like(skipped, ema.device)


@op(
    "power_gradient(Tensor slope, Tensor total, Tensor? counts, SymInt count, Tensor r, Tensor counted,"
    " Tensor? weight, Tensor ema, Tensor? skipped, float rate, bool guard) -> (Tensor, Tensor, Tensor)",
    fake=_power_gradient_like,
)
def power_backward(slope, total, counts, count, r, counted, weight, ema, skipped, rate, guard):
    """(dweight, ema, skipped), the last two after the step."""
    new = _power_gradient_like(slope, total, counts, count, r, counted, weight, ema, skipped, rate, guard)
    tensors = (slope, total, counts, r, counted, weight, ema, skipped, *new)
    _rule(power_gradient, tensors, len(slope), count, RATE=rate, GUARD=guard)
    return new


def _unified_like(sums, counts, count, var, squares, iters, outliers, skipped, *_):
    flags = iters.new_empty(5)
    state = (_fresh(var), _fresh(squares), _like(skipped, var.device))
    return _fresh(sums), flags, *state


@op(
    "unified_statistics(Tensor sums, Tensor? counts, SymInt count, Tensor var, Tensor squares, Tensor iters,"
    " Tensor outliers, Tensor? skipped, float eps, float decay, int warmup, int compensated, bool filtered,"
    " bool guard) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_unified_like,
)
def unified_forward(
    sums,
    counts,
    count,
    var,
    squares,
    iters,
    outliers,
    skipped,
    eps,
    decay,
    warmup,
    compensated,
    filtered,
    guard,
):
    """(r, flags, var, squares, skipped): two rows for the passes, flags as the kernel says, and the state after
    the step."""
    r, flags, *new = _unified_like(sums, counts, count, var, squares, iters, outliers, skipped)
    tensors = (sums, counts, var, squares, iters, outliers, skipped, r, *new[:2], flags, new[2])
    numbers = {"EPS": eps, "DECAY": decay, "WARMUP": warmup, "COMPENSATED": compensated, "FILTER": filtered}
    rows = triton.next_power_of_2(len(squares))
    numbers |= {"GUARD": guard, "M": len(squares), "MP": rows}
    _rule(unified_statistics, tensors, sums.shape[1], count, rows, **numbers)
    return r, flags, *new


def _unified_gradient_like(slope, total, counts, count, r, flags, weight, ema, slopes, skipped, *_):
    state = (_fresh(ema), _fresh(slopes), _like(skipped, ema.device))
    return _fresh(r), _fresh(slope), *state


@op(
    "unified_gradient(Tensor slope, Tensor total, Tensor? counts, SymInt count, Tensor r, Tensor flags,"
    " Tensor? weight, Tensor ema, Tensor slopes, Tensor? skipped, float decay, int warmup, bool guard)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_unified_gradient_like,
)
def unified_backward(slope, total, counts, count, r, flags, weight, ema, slopes, skipped, decay, warmup, guard):
    """((a, b), dweight, ema, slopes, skipped), the last three after the step."""
    made = _unified_gradient_like(slope, total, counts, count, r, flags, weight, ema, slopes, skipped)
    tensors = (slope, total, counts, r, flags, weight, ema, slopes, skipped, *made)
    rows = triton.next_power_of_2(len(slopes))
    numbers = {"DECAY": decay, "WARMUP": warmup, "GUARD": guard, "K": len(slopes), "KP": rows}
    _rule(unified_gradient, tensors, len(slope), count, rows, **numbers)
    return made
