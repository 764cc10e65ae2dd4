"""The channel engine on the GPU: launchers as operators over `_channels.py`, where there is a glossary,
`_channels_masked.py`, `_channels_merge.py` and `_channels_map.py`. Autograd is the engine's own
(`normzoo/engine.py`).

x is (N, C, *); a mask (N, *) of 0 and 1 tells two regions apart, and then every statistic and parameter has a
leading axis of regions. Statistics and parameters are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._channel_calls import (
    Call,
    beside,
    contiguous,
    in_place,
    lies,
    lies_flat,
    merge,
    side_by_side,
    targets_of,
)
from ._channel_forms import Form, flat_form, map_form, may_read_vectors, moments_form, sums_form
from ._channel_layout import View, like, reads_past
from ._channels_map import channel_map_flat
from ._channels_masked import merge_regions
from ._channels_merge import merge_moments, merge_sums
from ._choices import chosen
from ._launch import launch, remembered
from ._op import op


def _each_sample(parameter: Tensor | None, mask: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > (1 if mask is None else 2)


def _statistics(x: Tensor, mask: Tensor | None, per_sample: bool, number: int) -> tuple[Tensor, ...]:
    size = (2,) * (mask is not None) + tuple(x.shape[:2] if per_sample else x.shape[1:2])
    return tuple(x.new_empty(size, dtype=torch.float32) for _ in range(number))


def _moments_like(x, mask, per_sample):
    return _statistics(x, mask, per_sample, 3)


@op("channel_moments(Tensor x, Tensor? mask, bool per_sample) -> (Tensor, Tensor, Tensor)", fake=_moments_like)
def moments(x, mask, per_sample):
    """(pivot, delta, m2) of shape ([2,] C), or ([2,] N, C) with `per_sample`.

    pivot is the mean, rounded, and delta what rounding left over; m2 is the sum of squares about the mean. An
    empty region has zeros.
    """
    outputs = _statistics(x, mask, per_sample, 3)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    form, parts = find_moments(*in_place(x), mask, per_sample, outputs)
    merge(merge_moments, form, parts, outputs)
    return outputs


def _regions_like(x, mask, per_sample):
    return _statistics(x, mask, per_sample, 4)


@op(
    "channel_regions(Tensor x, Tensor mask, bool per_sample) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_regions_like,
)
def region_moments(x, mask, per_sample):
    """(pivot, delta, m2, count) as :func:`moments`, and how many values each was taken over."""
    outputs = _statistics(x, mask, per_sample, 4)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    form, parts = find_moments(*in_place(x), mask, per_sample, outputs)
    merge(merge_regions, form, parts, outputs)
    return outputs


class Plan(NamedTuple):
    """A launch but for its tensors."""

    form: Form
    numbers: tuple
    constants: dict[str, Any]
    vector: int = 0
    """Entries of the whole vectors in which planes that start anywhere may be read, if storage goes so far."""

    def launch(self, *tensors: Tensor | None) -> None:
        form = self.form
        launch(
            form.kernel, form.programs, tensors[0].device, *tensors, *self.numbers, form.parts, **self.constants
        )


@remembered
def _plan_moments(call: Call, view: View, per_sample: bool, vectors: bool) -> Plan:
    problem, (view,) = call.problem(not per_sample, per_sample, view)
    numbers, constants = lies(problem, view)
    form = moments_form(problem, vectors)
    return Plan(form, numbers, constants | form.constants, problem.vector if may_read_vectors(problem) else 0)


def find_moments(x, view, mask, per_sample, outputs):
    """Launches the statistics; into `outputs` and (form, None), or (form, what is to be merged)."""
    call = Call.of(x, mask)
    plan = _plan_moments(call, view, per_sample, False)
    if plan.vector and reads_past(x, view, plan.vector):
        plan = _plan_moments(call, view, per_sample, True)
    *found, parts = targets_of(plan.form, outputs, 4)
    if mask is None:
        plan.launch(x, *found, parts)
    else:
        count = found[3] if len(found) == 4 else None
        plan.launch(x, contiguous(mask), *found[:3], count, parts)
    return plan.form, parts


def _sums_like(dy, x, mask, pivot, per_sample):
    return _statistics(x, mask, per_sample, 2)


@op(
    "channel_sums(Tensor dy, Tensor x, Tensor? mask, Tensor pivot, bool per_sample) -> (Tensor, Tensor)",
    fake=_sums_like,
)
def sums(dy, x, mask, pivot, per_sample):
    """Sums of dy and of dy * (x - pivot), shaped as in :func:`moments`; pivot has a granularity of its own."""
    outputs = _statistics(x, mask, per_sample, 2)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    x, view = in_place(x)
    pivot = pivot.contiguous()
    form, parts = find_sums(*beside(dy, x, view.tokens), x, view, mask, pivot, per_sample, outputs)
    merge(merge_sums, form, parts, outputs)
    return outputs


@remembered
def _plan_sums(call: Call, view: View, dy_view: View, per_sample: bool, pivots: bool, vectors: bool) -> Plan:
    problem, views = call.problem(not (per_sample or pivots), per_sample, view, dy_view)
    numbers, constants = lies(problem, *views)
    form = sums_form(problem, vectors)
    constants |= form.constants | {"PIVOTS": pivots}
    return Plan(form, numbers, constants, problem.vector if may_read_vectors(problem) else 0)


def find_sums(dy, dy_view, x, view, mask, pivot, per_sample, outputs):
    """As :func:`find_moments`."""
    call, pivots = Call.of(x, mask), _each_sample(pivot, mask)
    plan = _plan_sums(call, view, dy_view, per_sample, pivots, False)
    if plan.vector and reads_past(x, view, plan.vector):
        if dy_view.inner == 0 or (dy_view == view and reads_past(dy, dy_view, plan.vector)):
            plan = _plan_sums(call, view, dy_view, per_sample, pivots, True)
    targets = targets_of(plan.form, outputs, 2)
    plan.launch(dy, x, contiguous(mask), pivot, *targets)
    return plan.form, targets[-1]


def _map(x, dy, mask, pivot, scale, slope, offset):
    out = like(x)
    if x.numel() == 0:
        return out
    x, view = in_place(x)
    dy, dy_view = (None, view) if dy is None else beside(dy, x, view.tokens)
    parameters = [contiguous(t) for t in (pivot, scale, slope, offset)]
    write_map(out, x, view, dy, dy_view, mask, *parameters)
    return out


@remembered
def _plan_map(call: Call, view: View, dy_view: View, backward: bool, each: tuple[bool, ...]) -> Plan:
    """`each`: whether every sample has a pivot, a scale and a slope of its own."""
    per_sample = any(each)
    problem, views = call.problem(not per_sample, per_sample, view, dy_view)
    back = bool(chosen("reversed_map"))
    form = flat_form(problem, back) if all(side_by_side(view, problem) for view in views) else None
    numbers, constants = lies(problem, *views) if form is None else lies_flat(problem, *views)
    form = form or map_form(problem, backward, back)
    constants |= dict(zip(("PIVOTS", "SCALES", "SLOPES"), each, strict=True))
    return Plan(form, numbers, constants | form.constants)


def write_map(out, x, view, dy, dy_view, mask, pivot, scale, slope, offset):
    """out = scale * dy + slope * (x - pivot) + offset, without the first term where dy is None; of contiguous
    parameters."""
    each = tuple(_each_sample(t, mask) for t in (pivot, scale, slope))
    plan = _plan_map(Call.of(x, mask), view, dy_view, dy is not None, each)
    regions = () if plan.form.kernel is channel_map_flat else (contiguous(mask),)
    plan.launch(x, dy, *regions, pivot, scale, slope, offset, out)


def _apply_like(x, mask, pivot, scale, shift):
    return like(x)


@op(
    "channel_apply(Tensor x, Tensor? mask, Tensor pivot, Tensor scale, Tensor shift) -> Tensor",
    fake=_apply_like,
)
def apply(x, mask, pivot, scale, shift):
    """(x - pivot) * scale + shift, rounded once; every parameter ([2,] C) or ([2,] N, C)."""
    return _map(x, None, mask, pivot, None, scale, shift)


def _dx_like(dy, x, mask, pivot, scale, slope, offset):
    return like(x)


@op(
    "channel_dx(Tensor dy, Tensor x, Tensor? mask, Tensor pivot, Tensor scale, Tensor slope, Tensor offset)"
    " -> Tensor",
    fake=_dx_like,
)
def dx(dy, x, mask, pivot, scale, slope, offset):
    """scale * dy + slope * (x - pivot) + offset, rounded once and laid out like x."""
    return _map(x, dy, mask, pivot, scale, slope, offset)
