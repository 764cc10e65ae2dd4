"""The running engine on the GPU: launchers as operators over `_running.py` and `_running_rules.py`.

x is (N, C, *), a mask of padding (N, *) bool; parameters and statistics are (C,), windows of those (rows, C),
counters single numbers. A rule is (rows, flags), as `_running_rules.py` says. Sums of u * u are (2, C + 1),
with counts of positions at the end, those of gradients (2, C). Autograd is in `normzoo/running.py`.

State is written in place, by the last launch of a direction alone: a kernel that does not compile has moved
nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._channel_calls import Call, beside, contiguous, in_place, lies, merge
from ._channel_layout import View, like
from ._channels_merge import merge_rows
from ._launch import launch, remembered
from ._op import op
from ._running import running_backward, running_forward
from ._running_forms import running_form
from ._running_rules import power_gradient, power_statistics, unified_gradient, unified_statistics
from .channels import Plan

GROUP_EPS = 1e-5
_BLOCK = 1024


def _wide(t: Tensor, *shape: int) -> Tensor:
    return t.new_empty(shape, dtype=torch.float32)


@remembered
def _plan(call: Call, groups: int, two: bool, *views: View) -> Plan:
    """Of a sweep over x, or over x and dy. `two`: tensors to read, dy or a mask being the other."""
    problem, places = call.problem(True, False, *views)
    numbers, constants = lies(problem, *places)
    del constants["PER_SAMPLE"]
    if 0 in call.shape:  # no sample of one position
        numbers = (0, numbers[1], 1, *numbers[3:])
    kernel = running_forward if len(views) == 1 else running_backward
    form = running_form(kernel, problem, call.shape[1] // groups if groups else 0, two)
    return Plan(form, numbers, constants | form.constants)


def _forward(x, pad_mask, d, weight, bias, iters, warmup, groups, eps, y, sums, flags, state):
    """One launch: y where it is given, sums where they are, and the state behind `flags`."""
    x, view = in_place(x)
    form, numbers, constants, _ = _plan(Call.of(x), groups, pad_mask is not None, view)
    window = state[1]
    parts = sums
    if sums is not None and form.parts > 1:
        parts = _wide(sums, form.parts, *sums.shape)
    pad = None if pad_mask is None else pad_mask.contiguous().view(torch.uint8)
    tensors = (x, pad, contiguous(d), contiguous(weight), contiguous(bias), iters, y, parts, flags, *state)
    rows = 0 if window is None else window.shape[0]
    own = {"WARMUP": warmup, "EPS": eps, "WINDOW": rows, "GROUP_EPS": GROUP_EPS}
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **own, **constants)
    if parts is not sums:
        merge(merge_rows, form, parts, (sums,))


def _sweep_like(x, pad_mask, d, weight, bias, iters, warmup, groups, eps):
    return like(x), _wide(x, 2, x.shape[1] + 1)


@op(
    "running_sweep(Tensor x, Tensor? pad_mask, Tensor? d, Tensor? weight, Tensor? bias, Tensor? iters,"
    " int warmup, int groups, float eps) -> (Tensor, Tensor)",
    fake=_sweep_like,
)
def sweep(x, pad_mask, d, weight, bias, iters, warmup, groups, eps):
    """(y, sums of u * u, first of what is no padding): y is there where iters >= warmup, with `d`."""
    y, sums = like(x), _wide(x, 2, x.shape[1] + 1)
    target = None if d is None else y
    _forward(x, pad_mask, d, weight, bias, iters, warmup, groups, eps, target, sums, None, (None,) * 5)
    return y, sums


@op(
    "running_map(Tensor(a!) y, Tensor x, Tensor d, Tensor? weight, Tensor? bias, int? warmup, int groups,"
    " float? eps, Tensor? flags=None, Tensor(b!)? mean=None, Tensor(c!)? window=None, Tensor(d!)? iters=None,"
    " Tensor(e!)? outliers=None, Tensor(f!)? skipped=None) -> ()",
    fake=lambda *_: None,
)
def map_into(
    y,
    x,
    d,
    weight,
    bias,
    warmup,
    groups,
    eps,
    flags=None,
    mean=None,
    window=None,
    iters=None,
    outliers=None,
    skipped=None,
):
    """y = weight * u / sqrt(d + eps) + bias, or weight * u * d + bias without eps.

    With the flags of a rule, whose rows are `d`, its state is written, and with `warmup` y only where the step
    is before the end of it.
    """
    if flags is None and x.numel() == 0:
        return
    state = (mean, window, iters, outliers, skipped)
    phase = None if warmup is None else flags
    _forward(x, None, d, weight, bias, phase, warmup or 0, groups, eps, y, None, flags, state)


def _backward(dy, x, rows, weight, ema, rate, groups, wanted, summed, flags, state):
    """(dx, sums of dy and of dy * u), each where it is wanted; the state behind `flags`."""
    dx = like(x) if wanted else None
    x, view = in_place(x)
    # Of nothing any view will do, and dy may have none like that of x.
    dy, dy_view = beside(dy, x, view.tokens) if x.numel() else (x, view)
    form, numbers, constants, _ = _plan(Call.of(x), groups, True, view, dy_view)
    mean, window, skipped = state
    sums = parts = _wide(x, 2, x.shape[1]) if summed else None
    if summed and form.parts > 1:
        parts = _wide(x, form.parts, 2, x.shape[1])
    tensors = (dy, x, rows, contiguous(weight), ema, dx, parts, flags, mean, window, skipped)
    own = {"RATE": rate, "WINDOW": 0 if window is None else window.shape[0], "GROUP_EPS": GROUP_EPS}
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **own, **constants)
    if parts is not sums:
        merge(merge_rows, form, parts, (sums,))
    return dx, sums


def _gradient_like(dy, x, rows, weight, ema, rate, groups):
    return x.new_empty(0) if rows is None else like(x), _wide(x, 2, x.shape[1])


@op(
    "running_gradient(Tensor dy, Tensor x, Tensor? rows, Tensor? weight, Tensor? ema, float rate, int groups)"
    " -> (Tensor, Tensor)",
    fake=_gradient_like,
)
def gradient(dy, x, rows, weight, ema, rate, groups) -> tuple[Tensor, Tensor]:
    """(dx, sums of dy and of dy * u), of which the first needs the rest."""
    known = rows is not None
    dx, sums = _backward(dy, x, rows, weight, ema, rate, groups, known, True, None, (None,) * 3)
    return dx if known else x.new_empty(0), sums


def _late_like(dy, x, rows, groups, wanted, flags, mean, window, skipped):
    return like(x) if wanted else x.new_empty(0)


@op(
    "running_late_gradient(Tensor dy, Tensor x, Tensor rows, int groups, bool wanted, Tensor flags,"
    " Tensor(a!) mean, Tensor(b!) window, Tensor(c!)? skipped) -> Tensor",
    fake=_late_like,
)
def late_gradient(dy, x, rows, groups, wanted, flags, mean, window, skipped):
    """dx, if it is `wanted`, by the rows of a rule, whose state is written."""
    dx, _ = _backward(dy, x, rows, None, None, 0.0, groups, wanted, False, flags, (mean, window, skipped))
    return x.new_empty(0) if dx is None else dx


@remembered
def _block(channels: int, rows: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(channels), max(32, 4 * _BLOCK // rows))
    return {"B": block, "num_warps": 8 if block * rows >= _BLOCK else 4}


def _rule(kernel, tensors, numbers, rows=1, **constants) -> None:
    """A program, whose window has so many rows. `numbers` begin with the channels."""
    block = _block(numbers[0], triton.next_power_of_2(rows) if rows > 1 else 1)
    launch(kernel, 1, tensors[0].device, *tensors, *numbers, **block, **constants)


def _rule_like(t: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return _wide(t, 4, channels), t.new_empty(5, dtype=torch.long)


def _parameters_like(weight, bias, channels, t):
    """Gradients of weight and bias, empty where there is no such."""
    dw = t.new_empty(0) if weight is None else weight.new_empty(channels)
    return dw, t.new_empty(0 if bias is None else channels, dtype=bias)


@op(
    "power_statistics(Tensor sums, Tensor phi, Tensor iters, float eps, float alpha, int warmup, bool paper,"
    " bool guard) -> (Tensor, Tensor)",
    fake=lambda sums, phi, *_: _rule_like(sums, phi.shape[0]),
)
def power_forward(sums, phi, iters, eps, alpha, warmup, paper, guard):
    """(rows, flags)."""
    rows, flags = _rule_like(sums, phi.shape[0])
    numbers = {"EPS": eps, "ALPHA": alpha, "WARMUP": warmup, "PAPER": paper, "GUARD": guard}
    _rule(power_statistics, (sums, phi, iters, rows, flags), (phi.shape[0],), **numbers)
    return rows, flags


def _power_gradient_like(sums, total, whole, count, rows, flags, weight, bias, ema, *_):
    return _parameters_like(weight, bias, ema.shape[0], sums)


@op(
    "power_gradient(Tensor sums, Tensor? total, Tensor? whole, SymInt count, Tensor rows, Tensor flags,"
    " Tensor? weight, ScalarType? bias, Tensor(a!) ema, Tensor(b!)? skipped, float rate, bool guard)"
    " -> (Tensor, Tensor)",
    fake=_power_gradient_like,
)
def power_backward(sums, total, whole, count, rows, flags, weight, bias, ema, skipped, rate, guard):
    """(dweight, dbias). `total`: the second of the sums over all ranks, `whole`: their positions."""
    dw, db = _parameters_like(weight, bias, ema.shape[0], sums)
    made = (None if weight is None else dw, None if bias is None else db)
    tensors = (sums, total, whole, rows, flags, contiguous(weight), ema, skipped, *made)
    _rule(power_gradient, tensors, (ema.shape[0], count), RATE=rate, GUARD=guard)
    return dw, db


@op(
    "unified_statistics(Tensor sums, Tensor var, Tensor squares, Tensor iters, float eps, float decay,"
    " int warmup, int compensated, bool filtered, bool guard) -> (Tensor, Tensor)",
    fake=lambda sums, var, *_: _rule_like(sums, var.shape[0]),
)
def unified_forward(sums, var, squares, iters, eps, decay, warmup, compensated, filtered, guard):
    """(rows, flags)."""
    rows, flags = _rule_like(sums, var.shape[0])
    size = squares.shape[0]
    numbers = {"EPS": eps, "DECAY": decay, "WARMUP": warmup, "COMPENSATED": compensated, "FILTER": filtered}
    numbers |= {"GUARD": guard, "M": size, "MP": triton.next_power_of_2(size)}
    _rule(unified_statistics, (sums, var, squares, iters, rows, flags), (var.shape[0],), size, **numbers)
    return rows, flags


def _unified_gradient_like(sums, total, whole, count, rows, flags, weight, bias, ema, *_):
    return *_rule_like(sums, ema.shape[0]), *_parameters_like(weight, bias, ema.shape[0], sums)


@op(
    "unified_gradient(Tensor sums, Tensor? total, Tensor? whole, SymInt count, Tensor rows, Tensor flags,"
    " Tensor? weight, ScalarType? bias, Tensor ema, Tensor slopes, float decay, int warmup, bool guard)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_unified_gradient_like,
)
def unified_backward(sums, total, whole, count, rows, flags, weight, bias, ema, slopes, decay, warmup, guard):
    """(rows, flags, dweight, dbias), with arguments as those of :func:`power_backward`."""
    late, late_flags = _rule_like(sums, ema.shape[0])
    dw, db = _parameters_like(weight, bias, ema.shape[0], sums)
    made = (None if weight is None else dw, None if bias is None else db)
    tensors = (sums, total, whole, rows, flags, contiguous(weight), ema, slopes, late, late_flags, *made)
    size = slopes.shape[0]
    numbers = {"DECAY": decay, "WARMUP": warmup, "GUARD": guard, "K": size}
    numbers["KP"] = triton.next_power_of_2(size)
    _rule(unified_gradient, tensors, (ema.shape[0], count), size, **numbers)
    return late, late_flags, dw, db
