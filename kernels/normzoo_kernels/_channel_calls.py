"""What launchers over (N, C, *) do around a kernel: tensors where they lie, extents and strides, and parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._channel_forms import Form, Problem, merge_tile
from ._channel_layout import View, like, one_sample, unit, view_as, view_of
from ._launch import launch

SUMS = {"RB": 16, "CB": 32}
"""Rows and columns at once, where small statistics are summed up for parameters."""


def row_unit(columns: int) -> int:
    """What rows of so many float32 are multiples of: a vector, or nothing."""
    return 4 if columns % 4 == 0 else 1


def in_place(x: Tensor) -> tuple[Tensor, View]:
    """x where it lies, or a copy where its layout has no such form."""
    x = x.resolve_neg()
    view = view_of(x)
    if view is None:
        x = x.contiguous()
        view = view_of(x)
    return x, view


def beside(dy: Tensor, x: Tensor, tokens: bool) -> tuple[Tensor, View]:
    """dy where it lies, if it lies as x does, else a copy that does."""
    dy = dy.resolve_neg()
    view = view_as(dy, tokens, broadcast=True)
    if view is None:
        dy = like(x).copy_(dy)
        view = view_as(dy, tokens)
    return dy, view


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


class Call(NamedTuple):
    """What a launcher has to know of a call before it can say how to launch."""

    shape: torch.Size
    itemsize: int
    device: torch.device
    masked: bool

    @staticmethod
    def of(x: Tensor, mask: Tensor | None = None) -> Call:
        return Call(x.shape, x.element_size(), x.device, mask is not None)

    def problem(self, together: bool, per_sample: bool, *views: View) -> tuple[Problem, tuple[View, ...]]:
        """(problem, views), the tokens of all samples as one where nothing tells samples apart (`together`)."""
        samples, channels, count = self.shape[0], self.shape[1], self.shape[2:].numel()
        rows = [one_sample(view, samples, count) for view in views] if together else [None]
        if all(rows):
            samples, count, views = 1, samples * count, tuple(rows)
        what = (views[0].tokens, per_sample, self.masked, self.device)
        return Problem(samples, channels, count, self.itemsize, *what), views


def problem_of(x: Tensor, mask: Tensor | None, together: bool, per_sample: bool, *views: View):
    return Call.of(x, mask).problem(together, per_sample, *views)


def lies(problem: Problem, view: View, dy: View | None = None) -> tuple[tuple, dict]:
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


def side_by_side(view: View, problem: Problem) -> bool:
    """Whether the planes of a sample follow each other without a gap, or are all one entry."""
    return problem.channels == 1 or view.step == view.inner * problem.count


def lies_flat(problem: Problem, view: View, dy: View) -> tuple[tuple, dict]:
    """The same for a flat kernel: samples of `total` entries, counted in units."""
    p, total = problem, problem.channels * problem.count
    x_unit = unit(View(False, view.sample, 0), p.itemsize, total)
    numbers = (p.samples, p.count, total // x_unit, view.sample // x_unit)
    constants = {"UNIT": x_unit, "PER_SAMPLE": p.per_sample}
    if dy == view:
        return (*numbers, None), constants | {"DY_UNIT": 1, "DY_INNER": 1}
    own = unit(View(False, dy.sample, 0), p.itemsize, 0)
    return (*numbers, dy.sample // own), constants | {"DY_UNIT": own, "DY_INNER": dy.inner}


def targets_of(form: Form, outputs: tuple[Tensor, ...], arrays: int) -> tuple[Tensor | None, ...]:
    """Where the statistics go: (*outputs, None), or, where there are several parts, `arrays` of those alone."""
    if form.parts == 1:
        return *outputs, None
    parts = outputs[0].new_empty((arrays, form.parts, outputs[0].numel()))
    return *(None for _ in outputs), parts


def merge(kernel, form: Form, parts: Tensor | None, outputs: tuple[Tensor, ...]) -> None:
    if parts is not None:
        size, tile = outputs[0].numel(), merge_tile(form.parts)
        grid = -(-size // tile["E"])
        launch(kernel, grid, parts.device, parts, *outputs, size, form.parts, **tile)
