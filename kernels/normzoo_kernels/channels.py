"""The channel engine on the GPU: launchers as operators over `_channels.py`, where there is a glossary,
`_channels_masked.py`, `_channels_merge.py` and `_channels_map.py`. Autograd is the engine's own
(`normzoo/engine.py`).

x is (N, C, *); a mask (N, *) of 0 and 1 tells two regions apart, and then every statistic and parameter has a
leading axis of regions. Statistics and parameters are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._channel_forms import (
    Form,
    Problem,
    flat_form,
    map_form,
    may_read_vectors,
    merge_tile,
    moments_form,
    sums_form,
)
from ._channel_layout import View, like, one_sample, positions, reads_past, unit, view_as, view_of
from ._channels_merge import merge_moments, merge_sums
from ._launch import launch
from ._op import op


def _in_place(x: Tensor) -> tuple[Tensor, View]:
    """x where it lies, or a copy where its layout has no such form."""
    x = x.resolve_neg()
    view = view_of(x)
    if view is None:
        x = x.contiguous()
        view = view_of(x)
    return x, view


def _beside(dy: Tensor, x: Tensor, tokens: bool) -> tuple[Tensor, View]:
    """dy where it lies, if it lies as x does, else a copy that does."""
    dy = dy.resolve_neg()
    view = view_as(dy, tokens, broadcast=True)
    if view is None:
        dy = like(x).copy_(dy)
        view = view_as(dy, tokens)
    return dy, view


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def _problem(x: Tensor, mask: Tensor | None, together: bool, per_sample: bool, *views: View):
    """(problem, views), the tokens of all samples as one where nothing tells samples apart (`together`)."""
    samples, count = x.shape[0], positions(x)
    rows = [one_sample(view, samples, count) for view in views] if together else [None]
    if all(rows):
        samples, count, views = 1, samples * count, tuple(rows)
    masked, tokens = mask is not None, views[0].tokens
    return Problem(samples, x.shape[1], count, x.element_size(), tokens, per_sample, masked, x.device), views


def _lies(problem: Problem, view: View, dy: View | None = None) -> tuple[tuple, dict]:
    """Extents and strides as the kernels take them, in units, and the units."""
    p = problem
    extent = p.channels if p.tokens else p.count
    # What int32 cannot hold must not come in units that fit: the kernels multiply in the type they are given.
    x_unit = unit(view, p.itemsize, extent) if extent < 1 << 31 else 1
    channels, count = (p.channels // x_unit, p.count) if p.tokens else (p.channels, p.count // x_unit)
    numbers = (p.samples, channels, count, view.sample // x_unit, view.step // x_unit)
    constants = {"TOKENS": p.tokens, "UNIT": x_unit, "PER_SAMPLE": p.per_sample}
    if dy is None:
        return numbers, constants
    if dy == view:
        return (*numbers, None, None), constants | {"DY_UNIT": 1, "DY_INNER": 1}
    own = unit(dy, p.itemsize, 0)
    return (*numbers, dy.sample // own, dy.step // own), constants | {"DY_UNIT": own, "DY_INNER": dy.inner}


def _each_sample(parameter: Tensor | None, mask: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > (1 if mask is None else 2)


def _statistics(x: Tensor, mask: Tensor | None, per_sample: bool, number: int) -> tuple[Tensor, ...]:
    size = (2,) * (mask is not None) + tuple(x.shape[:2] if per_sample else x.shape[1:2])
    return tuple(x.new_empty(size, dtype=torch.float32) for _ in range(number))


def _targets(form: Form, outputs: tuple[Tensor, ...], arrays: int) -> tuple[Tensor | None, ...]:
    """Where the statistics go: (*outputs, None), or, where there are several parts, `arrays` of those alone."""
    if form.parts == 1:
        return *outputs, None
    parts = outputs[0].new_empty((arrays, form.parts, outputs[0].numel()))
    return *(None for _ in outputs), parts


def _merge(kernel, form: Form, parts: Tensor | None, outputs: tuple[Tensor, ...]) -> None:
    if parts is not None:
        size, tile = outputs[0].numel(), merge_tile(form.parts)
        grid = -(-size // tile["E"])
        launch(kernel, grid, parts.device, parts, *outputs, size, form.parts, **tile)


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
    x, view = _in_place(x)
    problem, (view,) = _problem(x, mask, not per_sample, per_sample, view)
    vectors = may_read_vectors(problem) and reads_past(x, view, problem.vector)
    form = moments_form(problem, vectors)
    targets = _targets(form, outputs, 4)
    tensors = (x, *targets) if mask is None else (x, _contiguous(mask), *targets)
    numbers, constants = _lies(problem, view)
    constants |= form.constants
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    _merge(merge_moments, form, targets[-1], outputs)
    return outputs


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
    x, view = _in_place(x)
    dy, dy_view = _beside(dy, x, view.tokens)
    pivots = _each_sample(pivot, mask)
    problem, (view, dy_view) = _problem(x, mask, not (per_sample or pivots), per_sample, view, dy_view)
    vectors = may_read_vectors(problem) and reads_past(x, view, problem.vector)
    vectors &= dy_view.inner == 0 or (dy_view == view and reads_past(dy, dy_view, problem.vector))
    form = sums_form(problem, vectors)
    targets = _targets(form, outputs, 2)
    tensors = (dy, x, _contiguous(mask), _contiguous(pivot), *targets)
    numbers, constants = _lies(problem, view, dy_view)
    constants |= form.constants | {"PIVOTS": pivots}
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    _merge(merge_sums, form, targets[-1], outputs)
    return outputs


def _map(x, dy, mask, pivot, scale, slope, offset):
    out = like(x)
    if x.numel() == 0:
        return out
    x, view = _in_place(x)
    dy_view = view
    if dy is not None:
        dy, dy_view = _beside(dy, x, view.tokens)
    each = {
        name: _each_sample(t, mask) for name, t in (("PIVOTS", pivot), ("SCALES", scale), ("SLOPES", slope))
    }
    per_sample = any(each.values())
    problem, views = _problem(x, mask, not per_sample, per_sample, view, dy_view)
    form = flat_form(problem) if all(_side_by_side(view, problem) for view in views) else None
    regions = (_contiguous(mask),) if form is None else ()
    numbers, constants = _lies(problem, *views) if form is None else _flat(problem, *views)
    form = form or map_form(problem, dy is not None)
    parameters = [_contiguous(t) for t in (pivot, scale, slope, offset)]
    tensors = (x, dy, *regions, *parameters, out)
    constants |= each | form.constants
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    return out


def _side_by_side(view: View, problem: Problem) -> bool:
    """Whether the planes of a sample follow each other without a gap, or are all one entry."""
    return problem.channels == 1 or view.step == view.inner * problem.count


def _flat(problem: Problem, view: View, dy: View) -> tuple[tuple, dict]:
    """The same for the flat kernel: samples of `total` entries, counted in units."""
    p, total = problem, problem.channels * problem.count
    x_unit = unit(View(False, view.sample, 0), p.itemsize, total)
    numbers = (p.samples, p.count, total // x_unit, view.sample // x_unit)
    constants = {"UNIT": x_unit, "PER_SAMPLE": p.per_sample}
    if dy == view:
        return (*numbers, None), constants | {"DY_UNIT": 1, "DY_INNER": 1}
    own = unit(View(False, dy.sample, 0), p.itemsize, 0)
    return (*numbers, dy.sample // own), constants | {"DY_UNIT": own, "DY_INNER": dy.inner}


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
