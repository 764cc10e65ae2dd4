"""Maps of the channel engine that are no affine ones, on the GPU: launchers as operators over `_curves.py`.

x is (N, C, *), every parameter (N, C) of float32. Names and arguments are those of `normzoo/curves.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._channel_calls import beside, in_place, lies, lies_flat, merge, problem_of, side_by_side, targets_of
from ._channel_forms import may_read_vectors
from ._channel_layout import like, reads_past
from ._channels_merge import merge_rows
from ._curve_forms import curve_map_form, curve_sums_form
from ._curves import curve_map_flat
from ._launch import launch
from ._op import op

_PLACES = {"bounded": (0, 2, 1, 3, 4), "swish": (0, 1, 4)}
"""Where the parameters go that a curve takes, in the order scale, slope, bound, level, offset."""


def apply(x: Tensor, curve: str, *parameters: Tensor) -> Tensor:
    return curve_apply(x, curve, parameters)


def sums(dy: Tensor, x: Tensor, curve: str, *carried: Tensor) -> tuple[Tensor, ...]:
    return curve_sums(dy, x, curve, carried).unbind()


def dx(dy: Tensor, x: Tensor, curve: str, carried: tuple[Tensor, ...], *statistics: Tensor) -> Tensor:
    return curve_dx(dy, x, curve, carried, statistics)


def _parameters(curve: str, given, statistics=()) -> tuple[list[Tensor | None], int]:
    """Scale, slope, bound, level, offset, pivot and tilt, and how they lie."""
    places = dict(zip(_PLACES[curve], given, strict=False))
    if statistics:
        pivot, tilt, offset = statistics
        places |= {4: offset, 5: pivot, 6: tilt}
    found, lying = [], 0
    for place in range(7):
        t = places.get(place)
        kind = None if t is None else _lies(t)
        if t is not None and kind is None:
            t, kind = t.contiguous(), 2
        found.append(t)
        lying |= (kind or 0) << 2 * place
    return found, lying


def _lies(t: Tensor) -> int | None:
    """0: one number for all, 1: one a channel, 2: one a channel of each sample; None: in another way."""
    sample, channel = t.stride()
    if channel == 0 and sample == 0:
        return 0
    if (channel != 1 and t.shape[1] > 1) or t.is_neg():
        return None
    return 1 if sample == 0 else 2 if sample == t.shape[1] else None


def _map(x: Tensor, dy: Tensor | None, curve: str, parameters: list[Tensor | None], lying: int) -> Tensor:
    out = like(x)
    if x.numel() == 0:
        return out
    x, view = in_place(x)
    dy_view = view
    if dy is not None:
        dy, dy_view = beside(dy, x, view.tokens)
    problem, views = problem_of(x, None, False, True, view, dy_view)
    form = curve_map_form(problem, dy is not None, all(side_by_side(view, problem) for view in views))
    flat = form.kernel is curve_map_flat
    numbers, constants = (lies_flat if flat else lies)(problem, *views)
    constants |= form.constants | {"CURVE": curve, "LIES": lying}
    launch(form.kernel, form.programs, x.device, x, dy, *parameters, out, *numbers, form.parts, **constants)
    return out


def _apply_like(x, curve, parameters):
    return like(x)


@op("curve_apply(Tensor x, str curve, Tensor[] parameters) -> Tensor", fake=_apply_like)
def curve_apply(x, curve, parameters):
    """y of the curve, rounded once."""
    return _map(x, None, curve, *_parameters(curve, parameters))


def _sums_like(dy, x, curve, parameters):
    return x.new_empty((len(_PLACES[curve]), *x.shape[:2]), dtype=torch.float32)


@op("curve_sums(Tensor dy, Tensor x, str curve, Tensor[] parameters) -> Tensor", fake=_sums_like)
def curve_sums(dy, x, curve, parameters):
    """The gradients of all parameters, one after another; `parameters` without the shift."""
    out = _sums_like(dy, x, curve, parameters)
    if x.numel() == 0:
        return out.zero_()
    x, view = in_place(x)
    dy, dy_view = beside(dy, x, view.tokens)
    problem, (view, dy_view) = problem_of(x, None, False, True, view, dy_view)
    vectors = may_read_vectors(problem) and reads_past(x, view, problem.vector)
    vectors &= dy_view.inner == 0 or (dy_view == view and reads_past(dy, dy_view, problem.vector))
    form = curve_sums_form(problem, vectors)
    _, parts = targets_of(form, (out,), 1)
    found, lying = _parameters(curve, parameters)
    numbers, constants = lies(problem, view, dy_view)
    constants |= form.constants | {"CURVE": curve, "LIES": lying}
    tensors = (x, dy, *found[:4], out if parts is None else parts)
    launch(form.kernel, form.programs, x.device, *tensors, *numbers, form.parts, **constants)
    merge(merge_rows, form, parts, (out,))
    return out


def _dx_like(dy, x, curve, parameters, statistics):
    return like(x)


@op(
    "curve_dx(Tensor dy, Tensor x, str curve, Tensor[] parameters, Tensor[] statistics) -> Tensor",
    fake=_dx_like,
)
def curve_dx(dy, x, curve, parameters, statistics):
    """dx, rounded once and laid out like x; `parameters` without the shift, `statistics` (pivot, slope, offset)
    or none."""
    return _map(x, dy, curve, *_parameters(curve, parameters, statistics))
