"""The passes of the running engine over x, in eager PyTorch: what its kernels are tested against.

x is (N, C, \\*), statistics are (C,), in float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if pad_mask is not None:
        u = u.masked_fill(pad_mask.unsqueeze(1), 0)
    return u.square().sum(_positions(u))


def scaled(u: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """u · scale + shift."""
    return u * _wide(scale, u) if shift is None else torch.addcmul(_wide(shift, u), u, _wide(scale, u))


def sums(dy: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy · u for every channel."""
    dy = dy.to(u.dtype)
    return dy.sum(_positions(u)), (dy * u).sum(_positions(u))


def gradient(dy: Tensor, u: Tensor, a: Tensor, b: Tensor, s: Any, groups: int | None) -> Tensor:
    """The gradient of x where that of u is a · dy + b · u."""
    du = (dy.to(u.dtype) * _wide(a, u)).addcmul_(u, _wide(b, u))
    if groups is None:
        return du
    du, u = (t.unflatten(1, (groups, -1)) for t in (du, u))
    return du.sub_(u * (du * u).mean(2, keepdim=True)).div_(s).flatten(1, 2)


def _positions(u: Tensor) -> tuple[int, ...]:
    return (0, *range(2, u.dim()))


def _wide(statistic: Tensor, u: Tensor) -> Tensor:
    return statistic.to(u.dtype).view(-1, *(1,) * (u.dim() - 2))
