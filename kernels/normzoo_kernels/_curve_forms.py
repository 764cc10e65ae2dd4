"""Which form of a kernel of curves runs: the tiles and parts of `_channel_forms.py`, with the warps that five
sums need in order not to leave the registers."""

from __future__ import annotations

from dataclasses import replace

from ._channel_forms import Form, Problem, flat_form, map_form, sums_form
from ._curves import curve_map, curve_map_flat, curve_sums
from ._launch import remembered


@remembered
def curve_sums_form(problem: Problem, vectors: bool) -> Form:
    form = sums_form(problem, vectors)
    return replace(form, kernel=curve_sums, constants=form.constants | {"num_warps": 8})


@remembered
def curve_map_form(problem: Problem, backward: bool, flat: bool) -> Form:
    """`flat`: planes lie side by side."""
    found = flat_form(problem) if flat else None
    if found is not None:
        return replace(found, kernel=curve_map_flat)
    return replace(map_form(problem, backward), kernel=curve_map)
