"""The passes of the running engine over x, in eager PyTorch: what its kernels are tested against.

x is (N, C, \\*), statistics are (C,), in float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import Grid, Room, mapped, summed, total, unrecorded
from .checks import at_least_float32

GROUP_EPS = 1e-5
"""Added to the mean square of a group; the eps of a layer is for its channels."""


def unit(x: Tensor, groups: int | None) -> tuple[Tensor, Any]:
    """(u, s): u = x / s, with s the root mean square of each of `groups` groups of channels at a position."""
    x = at_least_float32(x)
    if groups is None:
        return x, None
    parts = x.unflatten(1, (groups, -1))
    s = (parts.square().mean(2, keepdim=True) + GROUP_EPS).sqrt()
    return (parts / s).flatten(1, 2), s


def squares(u: Tensor, pad_mask: Tensor | None = None) -> Tensor:
    """The sum of u² for every channel, over positions that are no padding."""
    if pad_mask is None and unrecorded(u) and (grid := Grid.of(u, False)):
        room = Room(u)
        return summed(grid, (u,), lambda _, h: (total(torch.mul(h, h, out=room.like(h))),), False)[0]
    if pad_mask is not None:
        u = u.masked_fill(pad_mask.unsqueeze(1), 0)
    return u.square().sum(_positions(u))


def scaled(u: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """u · scale + shift."""
    if shift is not None and unrecorded(u, scale, shift) and (grid := Grid.of(u, False)):
        y = grid.affine(u, scale.to(u.dtype), shift.to(u.dtype))
        if y is not None:
            return y
    return u * _wide(scale, u) if shift is None else torch.addcmul(_wide(shift, u), u, _wide(scale, u))


def sums(dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy · u for every channel."""
    if unrecorded(dy, u) and (grid := Grid.of(u, False)):
        wide, room = Room(u), Room(u)

        def body(_, dy, h):
            dy = wide.wide(dy)
            return total(dy), total(torch.mul(dy, h, out=room.like(h)))

        of_dy, of_both = summed(grid, (dy, u), body, False)
        return of_dy, of_both
    dy = dy.to(u.dtype)
    return dy.sum(_positions(u)), (dy * u).sum(_positions(u))


def gradient(dy: Tensor, u: Tensor, a: Tensor, b: Tensor, s: Any, groups: int | None) -> Tensor:
    """The gradient of x where that of u is a · dy + b · u."""
    if groups is None and unrecorded(dy, u, a, b) and (grid := Grid.of(u, False)):
        return _gradient_of_blocks(dy, u, grid, a.to(u.dtype), b.to(u.dtype))
    du = (dy.to(u.dtype) * _wide(a, u)).addcmul_(u, _wide(b, u))
    if groups is None:
        return du
    du, u = (t.unflatten(1, (groups, -1)) for t in (du, u))
    return du.sub_(u * (du * u).mean(2, keepdim=True)).div_(s).flatten(1, 2)


def _gradient_of_blocks(dy: Tensor, u: Tensor, grid: Grid, a: Tensor, b: Tensor) -> Tensor:
    wide, room = Room(u), Room(u)
    a, b = grid.spread(a), grid.spread(b)

    def body(out, s, dy, h):
        torch.mul(h, b[s], out=out)
        out.add_(torch.mul(wide.wide(dy), a[s], out=room.like(h)))

    return mapped(u, grid, (dy, u), body)


def _positions(u: Tensor) -> tuple[int, ...]:
    return (0, *range(2, u.dim()))


def _wide(statistic: Tensor, u: Tensor) -> Tensor:
    return statistic.to(u.dtype).view(-1, *(1,) * (u.dim() - 2))
