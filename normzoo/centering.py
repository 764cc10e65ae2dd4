"""Taking the mean of every row away: of weights, once or in every forward, and of what a module returns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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


def parametrize_alone(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """``register_parametrization`` that leaves copies of `module` as they are.

    Raises:
        Exception: as there; the class of `module` may be another by then, but none that others have changed.
    """
    with _own_class(module):
        parametrize.register_parametrization(module, name, parametrization)


def unparametrize_alone(module: nn.Module, name: str, *, leave_parametrized: bool) -> None:
    """``remove_parametrizations`` that leaves copies of `module` as they are."""
    with _own_class(module):
        parametrize.remove_parametrizations(module, name, leave_parametrized=leave_parametrized)


@contextlib.contextmanager
def _own_class(module: Any) -> Iterator[None]:
    """Gives a parametrized module a class of its own.

    torch makes one, with a property for every parametrized tensor, which deepcopy hands on: what is put into it
    or deleted from it is so for all copies.
    """
    cls = type(module)
    outer = (
        cls.zero_mean_dim if issubclass(cls, ZeroMeanOutput) and cls.__bases__[0] is ZeroMeanOutput else None
    )
    inner = cls if outer is None else plain_class(cls)
    if parametrize.is_parametrized(module):
        own = {key: value for key, value in vars(inner).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(inner.__name__, inner.__bases__, own)
    else:
        outer = None
    try:
        yield
    finally:
        if outer is not None:
            module.__class__ = with_zero_mean(type(module), outer)


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
