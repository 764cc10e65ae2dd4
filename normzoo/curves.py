"""Maps of the channel engine that are no affine ones, in eager PyTorch: what their kernels are tested against.

    "bounded"   y = scale · x / max(bound, slope · x + level) + shift
    "swish"     y = scale · x · sigmoid(slope · x) + shift

x is (N, C, \\*), every parameter (N, C). All of it can be differentiated once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import at_least_float32

PARAMETERS = {
    "affine": ("scale", "shift"),
    "bounded": ("scale", "bound", "slope", "level", "shift"),
    "swish": ("scale", "slope", "shift"),
}
"""What a combine returns for each map."""


def apply(x: Tensor, curve: str, *parameters: Tensor) -> Tensor:
    """y, in the dtype of x."""
    scale, *inner, shift = _spread(x, parameters)
    return torch.addcmul(shift, scale, _shape(at_least_float32(x), curve, inner)).to(x.dtype)


def sums(dy: Tensor, x: Tensor, curve: str, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all parameters, (N, C); `parameters` without the shift."""
    scale, *inner = _spread(x, parameters)
    dy, h = at_least_float32(dy), at_least_float32(x)
    if curve == "swish":
        gate = torch.sigmoid(inner[0] * h)
        of_scale = dy * h * gate
        found = [of_scale, scale * of_scale * (h * (1 - gate))]  # no factor overflows
    else:
        m, beyond = _divisor(h, inner)
        of_scale = dy * h / m
        pull = -scale * of_scale / m
        found = [of_scale, pull * (1 - beyond), pull * beyond * h, pull * beyond]
    return tuple(_total(part) for part in (*found, dy))


def dx(dy: Tensor, x: Tensor, curve: str, parameters: tuple[Tensor, ...], *statistics: Tensor) -> Tensor:
    """dy times the derivative of the map, and with (pivot, slope, offset) what comes through the statistics,
    slope · (x − pivot) + offset; in the dtype of x. `parameters` without the shift."""
    scale, *inner = _spread(x, parameters)
    h = at_least_float32(x)
    if curve == "swish":
        (slope,) = inner
        gate = torch.sigmoid(slope * h)
        rise = gate + slope * h * gate * (1 - gate)
    else:
        bound, _, level = inner
        m, beyond = _divisor(h, inner)
        rise = torch.lerp(bound, level, beyond) / m / m  # of the line, m - slope · x is the level
    found = at_least_float32(dy) * scale * rise
    if statistics:
        pivot, slope, offset = _spread(x, statistics)
        found = found + torch.addcmul(offset, h - pivot, slope)
    return found.to(x.dtype)


def _shape(h: Tensor, curve: str, inner: list[Tensor]) -> Tensor:
    if curve == "swish":
        return h * torch.sigmoid(inner[0] * h)
    bound, slope, level = inner
    return h / torch.maximum(torch.addcmul(level, slope, h), bound)


def _divisor(h: Tensor, inner: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The larger of bound and line, and how much of it is the line: 1, 0, or a half of each where they meet."""
    bound, slope, level = inner
    line = torch.addcmul(level, slope, h)
    return torch.maximum(line, bound), torch.heaviside(line - bound, line.new_full((), 0.5)).detach()


def _spread(x: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    return [p.reshape(*p.shape, *(1,) * (x.dim() - 2)) for p in parameters]


def _total(v: Tensor) -> Tensor:
    return v.sum(tuple(range(2, v.dim()))) if v.dim() > 2 else v
