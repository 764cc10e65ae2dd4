"""Maps of the channel engine that are no affine ones, in eager PyTorch: what their kernels are tested against.

    "bounded"   y = scale · x / max(bound, slope · x + level) + shift
    "swish"     y = scale · x · sigmoid(slope · x) + shift

x is (N, C, \\*), every parameter (N, C). All of it can be differentiated once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Grid, Room, less, mapped, summed, total, unrecorded
from .checks import at_least_float32

PARAMETERS = {
    "affine": ("scale", "shift"),
    "bounded": ("scale", "bound", "slope", "level", "shift"),
    "swish": ("scale", "slope", "shift"),
}
"""What a combine returns for each map."""


def apply(x: Tensor, curve: str, *parameters: Tensor) -> Tensor:
    """y, in the dtype of x."""
    if grid := _grid(x, x, *parameters):
        scale, *inner, shift = (grid.spread(p) for p in parameters)
        room = Room(x)

        def body(out, s, h):
            h = room.wide(h)
            own = [p[s] for p in inner]
            if curve == "swish":
                torch.mul(h, own[0], out=out).sigmoid_().mul_(h)
            else:
                bound, slope, level = own
                line = torch.mul(h, slope, out=out).add_(level)
                torch.div(h, torch.maximum(line, bound, out=out), out=out)
            out.mul_(scale[s]).add_(shift[s])

        return mapped(x, grid, (x,), body)
    scale, *inner, shift = _spread(x, parameters)
    return torch.addcmul(shift, scale, _shape(at_least_float32(x), curve, inner)).to(x.dtype)


def sums(dy: Tensor, x: Tensor, curve: str, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The gradients of all parameters, (N, C); `parameters` without the shift."""
    if grid := _grid(x, dy, x, *parameters):
        return (_sums_of_swish if curve == "swish" else _sums_of_bounded)(grid, dy, x, *parameters)
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
    if grid := _grid(x, dy, x, *parameters, *statistics):
        return _dx_of_blocks(grid, dy, x, curve, parameters, statistics)
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


def _grid(x: Tensor, *tensors: Tensor) -> Grid | None:
    """The blocks of x, where these can be gone through in blocks."""
    return Grid.of(x, True) if unrecorded(*tensors) else None


def _sums_of_swish(grid: Grid, dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    spread, rooms = grid.spread(slope), [Room(x) for _ in range(4)]

    def body(s, dy, h):
        dy, h = rooms[0].wide(dy), rooms[1].wide(h)
        gate = torch.mul(h, spread[s], out=rooms[2].like(h)).sigmoid_()
        part = torch.mul(dy, h, out=rooms[3].like(h)).mul_(gate)
        of_scale = total(part)
        return of_scale, total(part.mul_(gate.sub_(1).mul_(h))), total(dy)  # no factor overflows

    of_scale, rest, of_shift = summed(grid, (dy, x), body, True)
    return of_scale, -scale * rest, of_shift


def _sums_of_bounded(
    grid: Grid, dy: Tensor, x: Tensor, scale: Tensor, bound: Tensor, slope: Tensor, level: Tensor
) -> tuple[Tensor, ...]:
    inner, rooms = [grid.spread(p) for p in (bound, slope, level)], [Room(x) for _ in range(5)]

    def body(s, dy, h):
        dy, h = rooms[0].wide(dy), rooms[1].wide(h)
        m, beyond = _divisor_of_block(h, [p[s] for p in inner], rooms[2], rooms[3])
        part = torch.mul(dy, h, out=rooms[4].like(h)).div_(m)
        of_scale = total(part)
        pull = part.div_(m)
        of_both, of_level = total(pull), total(beyond.mul_(pull))
        return of_scale, of_both, total(beyond.mul_(h)), of_level, total(dy)

    of_scale, of_both, of_slope, of_level, of_shift = summed(grid, (dy, x), body, True)
    half = -scale / 2
    return of_scale, half * (2 * of_both - of_level), half * of_slope, half * of_level, of_shift


def _dx_of_blocks(
    grid: Grid,
    dy: Tensor,
    x: Tensor,
    curve: str,
    parameters: tuple[Tensor, ...],
    statistics: tuple[Tensor, ...],
) -> Tensor:
    scale, *inner = (grid.spread(p) for p in parameters)
    through = [grid.spread(t) for t in statistics]
    wide, memory = (Room(x), Room(x)), (Room(x), Room(x))
    bound, half = (inner[0], (inner[2] - inner[0]) / 2) if curve == "bounded" else (None, None)

    def body(out, s, dy, h):
        dy, h = wide[0].wide(dy), wide[1].wide(h)
        if bound is None or half is None:
            z = torch.mul(h, inner[0][s], out=out)
            gate = torch.sigmoid(z, out=memory[0].like(h))
            z.mul_(torch.sub(1, gate, out=memory[1].like(h))).add_(1).mul_(gate)
        else:
            m, beyond = _divisor_of_block(h, [p[s] for p in inner], memory[0], memory[1])
            # Of the line, m - slope · x is the level.
            torch.mul(beyond, half[s], out=out).add_(bound[s]).div_(m).div_(m)
        out.mul_(dy).mul_(scale[s])
        if through:
            pivot, slope, offset = (t[s] for t in through)
            out.add_(less(memory[0].like(h), h, pivot).mul_(slope).add_(offset))

    return mapped(x, grid, (dy, x), body)


def _divisor_of_block(h: Tensor, inner: list[Tensor], room: Room, other: Room) -> tuple[Tensor, Tensor]:
    """As :func:`_divisor`, but twice how much of it is the line: other comparisons take torch long on a CPU."""
    bound, slope, level = inner
    line = torch.mul(h, slope, out=room.like(h)).add_(level)
    beyond = torch.sub(line, bound, out=other.like(h)).sign_().add_(1)
    return torch.maximum(line, bound, out=line), beyond


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
