"""Argument checks shared by the layers. Each raises before any state changes and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def normalized_shape(layer: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """The trailing dimensions as a tuple of positive ints."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ValueError(
            f"{layer}: normalized_shape is {shape!r}; it must be a positive int or a sequence of them"
        )
    return sizes


def eps(layer: str, value: float, argument: str = "eps") -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be a positive finite number")


def positive(layer: str, argument: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be a positive int")


def count(layer: str, argument: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be an int, 0 or more")


def momentum(layer: str, value: float | None, *, average: bool = True) -> None:
    """A number from 0 to 1; with `average` also None."""
    if average and value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        end = ", or None for their plain average" if average else ""
        raise ValueError(
            f"{layer}: momentum is {value!r}; it must be a number from 0 to 1, the weight of the new "
            f"statistics{end}"
        )


def share(layer: str, argument: str, value: float) -> None:
    """A number from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be a number from 0 to 1")


def number(layer: str, argument: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be a finite number")


def not_negative(layer: str, argument: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be a finite number, 0 or more")


def flag(layer: str, argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{layer}: {argument} is {value!r}; it must be True or False")


def rows(
    layer: str,
    x: Tensor,
    shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[int, ...]:
    """x (*, *shape) of a floating dtype; weight and bias of `shape`; residual shaped like x; one device.

    Returns `shape` as a tuple. This runs at every call, hence the long look only where the short one fails.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: the input is a {type(x).__name__}; it must be a torch.Tensor")
    if isinstance(shape, tuple):
        sizes = shape
    else:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape) if isinstance(shape, Sequence) else ()
    if not sizes or x.shape[-len(sizes) :] != sizes or 0 in sizes:
        sizes = normalized_shape(layer, shape)
        raise ValueError(
            f"{layer}: normalized_shape is {sizes} but the input has shape {tuple(x.shape)}; "
            f"its last {len(sizes)} dimension(s) must match"
        )
    if not x.is_floating_point():
        raise TypeError(f"{layer}: the input is {x.dtype}; it must be of a real floating-point dtype")
    if weight is not None:
        beside(layer, "weight", weight, x, sizes)
    if bias is not None:
        beside(layer, "bias", bias, x, sizes)
    if residual is not None:
        beside(layer, "residual", residual, x, x.shape)
    return sizes


def dimensions(layer: str, x: Tensor, check: Callable[[Tensor], None]) -> None:
    """Runs `check`, torch's own of how many dimensions x has, with the layer in front of what it says."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: the input is a {type(x).__name__}; it must be a torch.Tensor")
    try:
        check(x)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}, of shape {tuple(x.shape)}; reshape it") from None


def channels(
    layer: str, x: Tensor, number: int | None, argument: str = "num_features", **tensors: Tensor | None
) -> None:
    """x (N, C, *) of a floating dtype, C = `number`, which is `argument`; `tensors` (C,) or None."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: the input is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dim() < 2:
        raise ValueError(f"{layer}: the input has shape {tuple(x.shape)}; it must be (N, C, *)")
    if not x.is_floating_point():
        raise TypeError(f"{layer}: the input is {x.dtype}; it must be of a real floating-point dtype")
    if number is not None and x.shape[1] != number:
        raise ValueError(
            f"{layer}: {argument} is {number} but the input has shape {tuple(x.shape)}; "
            "its dimension 1 must match"
        )
    for name, t in tensors.items():
        if t is not None:
            beside(layer, name, t, x, x.shape[1:2])


def several_values(layer: str, x: Tensor, otherwise: str) -> None:
    """More than one value per channel, as statistics of a batch need; no value at all is fine."""
    if x.numel() == x.shape[1] and x.numel():
        raise ValueError(
            f"{layer}: Expected more than 1 value per channel when training, got input size {tuple(x.shape)}; "
            f"use a larger batch{otherwise}"
        )


def running(
    layer: str, x: Tensor, mean: Tensor | None, var: Tensor | None, argument: str, own: bool
) -> tuple[Tensor, ...]:
    """Running mean and variance, (C,) both, or neither; needed unless `own`, the value of `argument`."""
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is not None:
            beside(layer, name, t, x, x.shape[1:2])
    if mean is not None and var is not None:
        return mean, var
    if mean is not None or var is not None:
        raise ValueError(f"{layer}: running_mean and running_var must both be given, or neither")
    if not own:
        raise ValueError(f"{layer}: without {argument} it needs running_mean and running_var")
    return ()


def beside(layer: str, name: str, p: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """A parameter of `shape`, of a floating dtype and on the device of x."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{layer}: {name} is a {type(p).__name__}; it must be a torch.Tensor")
    if p.shape != shape:
        raise ValueError(
            f"{layer}: {name} has shape {tuple(p.shape)}; for this input it must be {tuple(shape)}"
        )
    if p.dtype is not x.dtype and not p.is_floating_point():
        raise TypeError(f"{layer}: {name} is {p.dtype}; it must be of a real floating-point dtype")
    same_device(layer, name, p, x)


def same_device(layer: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(
            f"{layer}: {name} is on {t.device} but the input is on {x.device}; move one to the other"
        )


def choice(layer: str, argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{layer}: {argument} is {value!r}; it must be one of {', '.join(allowed)}")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: statistics are never taken in half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """x in the dtype of its statistics."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
