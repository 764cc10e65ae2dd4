"""Launchers of the kernels that hold the sets of a norm on chip, for `standardize.py` to choose."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._channel_calls import Call, contiguous, lies
from ._channel_layout import View
from ._launch import launch, remembered
from ._layout import unit_of
from ._on_chip import standardize_on_chip, standardize_on_chip_grad
from ._on_chip_forms import on_chip_form


class _Plan(NamedTuple):
    kernel: Any
    grid: int
    numbers: tuple
    constants: dict[str, Any]


@remembered
def _plan(call: Call, view: View, dy_view: View | None, groups: int) -> _Plan | None:
    """None where another form is to run; a backward pass has a `dy_view`."""
    views = (view,) if dy_view is None else (view, dy_view)
    problem, views = call.problem(groups == 0, groups > 0, *views)
    width = problem.channels // groups if groups else 1
    form = on_chip_form(problem, width, standardize_on_chip if dy_view is None else standardize_on_chip_grad)
    if form is None:
        return None
    unit = unit_of(width, problem.itemsize)
    numbers, constants = lies(problem, *views)
    return _Plan(
        form.kernel, form.programs, (*numbers, width // unit), constants | form.constants | {"WU": unit}
    )


def forward_on_chip(
    x: Tensor, view: View, weight, bias, groups: int, eps: float, y: Tensor, stats: Tensor
) -> bool:
    """Fills y and stats as `standardize.forward` tells; False, with nothing done, where it runs otherwise."""
    plan = _plan(Call.of(x), view, None, groups)
    if plan is None:
        return False
    tensors = (x, contiguous(weight), contiguous(bias), y, stats)
    launch(plan.kernel, plan.grid, x.device, *tensors, *plan.numbers, EPS=eps, **plan.constants)
    return True


def backward_on_chip(dy, dy_view: View, x, view: View, stats, weight, groups: int, dx, found, dw, db) -> bool:
    """Likewise: dx, and dw and db of a batch; else what these come from, the sums for each sample, in `found`.
    What is None is not wanted."""
    plan = _plan(Call.of(x), view, dy_view, groups)
    if plan is None:
        return False
    gradients = (None, dw, db) if groups == 0 else (found, None, None)
    tensors = (dy, x, stats, contiguous(weight), dx, *gradients)
    launch(plan.kernel, plan.grid, x.device, *tensors, *plan.numbers, **plan.constants)
    return True
