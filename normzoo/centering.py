"""Taking the mean of every row away: of weights, once or in every forward, and of what a module returns."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def centered(x: Tensor, dim: int) -> Tensor:
    """x less its mean along `dim`, which is taken in float64 where `x` needs no gradient, else in float32.

    >>> centered(torch.tensor([1.0, 2.0, 6.0]), 0)
    tensor([-2., -1.,  3.])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if not (x.requires_grad and torch.is_grad_enabled()):
        wide = torch.float64
    return (x - x.mean(dim, keepdim=True, dtype=wide)).to(x.dtype)


class ZeroMean(nn.Module):
    """A parametrization: the weight less its mean along `dim`, in every forward."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        return centered(weight, self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ZeroMeanOutput:
    """Beside the class of a module: what it returns, less the mean along `zero_mean_dim`."""

    zero_mean_dim: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return centered(super().forward(*args, **kwargs), self.zero_mean_dim)  # type: ignore[misc]

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle cannot find it by name.
        state = super().__reduce_ex__(protocol)[2]
        return _empty, (plain_class(type(self)), self.zero_mean_dim), state


@functools.cache
def with_zero_mean(cls: type[nn.Module], dim: int) -> type[nn.Module]:
    """A subclass of `cls` whose output, a tensor, has mean zero along `dim`: the new class of a module."""
    return type(f"ZeroMean{cls.__name__}", (ZeroMeanOutput, cls), {"zero_mean_dim": dim})


def plain_class(cls: type[Any]) -> type[nn.Module]:
    """The class below that of :func:`with_zero_mean`; `cls` where it is none."""
    return cls.__mro__[2] if issubclass(cls, ZeroMeanOutput) else cls


def _empty(cls: type[nn.Module], dim: int) -> nn.Module:
    made = with_zero_mean(cls, dim)
    return made.__new__(made)
