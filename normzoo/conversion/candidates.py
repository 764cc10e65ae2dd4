"""What the test runs of unknown modules share: names, candidates, and how close is close enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .norm import Norm, tensor
from .trial import chance, distance, noise, own_tensors, shifts

AGREES = 3e-6
"""Largest difference from a candidate, relative to the largest entry of a row."""

GRADIENTS_AGREE = 1e-4
"""Largest difference of two gradients, times the size of the input; another function is off by 1e-2."""

_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


class Unrecognised(Exception):
    """Why a module is no norm that this library knows."""


def statistics(module: nn.Module) -> tuple[str, str] | None:
    """The names of the buffers that hold a mean and a variance for each channel."""
    buffers = [name for name, b in module.named_buffers(recurse=False) if b.dim() == 1]
    means, variances = ([name for name in buffers if word in name] for word in ("mean", "var"))
    return (means[0], variances[0]) if len(means) == len(variances) == 1 else None


def affine(module: nn.Module, besides: Sequence[str] = ()) -> tuple[str | None, str | None]:
    """The names of the weight and of the bias."""
    # A number on its own counts calls, or the like.
    names = [name for name, t in own_tensors(module).items() if name not in besides and t.dim()]
    weights, biases = [n for n in names if not shifts(n)], [n for n in names if shifts(n)]
    if len(weights) > 1 or len(biases) > 1:
        raise Unrecognised(f"it holds {', '.join(names)}, more than a weight and a bias")
    return next(iter(weights), None), next(iter(biases), None)


def numbers(module: nn.Module) -> tuple[list[float | None], list[int]]:
    """Values that eps and the number of groups may have, from the attributes of the module."""
    eps: list[float | None] = []
    groups = []
    for name, value in vars(module).items():
        if (isinstance(value, float) and 0 < value < 0.05) or (value is None and "eps" in name):
            eps.append(value)
        elif isinstance(value, int) and "group" in name and value > 0:
            groups.append(value)
    return list(dict.fromkeys((*eps, *_USUAL_EPS))), groups


@torch.enable_grad()
def gradients_of(run: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Those of a random sum of ``run(x)``, for x and for `parameters`."""
    leaves = [x.detach().clone().requires_grad_(), *parameters]
    y = run(leaves[0])
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    weights = noise(y.shape, chance()).to(y)
    return list(torch.autograd.grad(y, leaves, weights, allow_unused=True, materialize_grads=True))


def gradients_agree(
    theirs: Callable[[Tensor], Tensor],
    ours: Callable[[Tensor], Tensor],
    x: Tensor,
    span: tuple[int, ...],
    parameters: list[nn.Parameter],
) -> bool:
    """Whether two functions have the same gradients at x, where the dimensions `span` share statistics."""
    theirs_at, ours_at = (gradients_of(each, x, parameters) for each in (theirs, ours))
    size = x.abs().amax(span, keepdim=True)  # the gradient of a small row is large
    apart = [((theirs_at[0] - ours_at[0]) * size).abs().max().item()]
    apart += [distance(b, a, tuple(range(a.dim()))) for a, b in zip(theirs_at[1:], ours_at[1:], strict=True)]
    return max(apart) <= GRADIENTS_AGREE


def device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in own_tensors(module).values()), torch.device("cpu"))


def held_by(module: nn.Module, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = (tensor(module, name) for name in (norm.weight, norm.bias))
    return (None if weight is None else weight.squeeze(), None if bias is None else bias.squeeze())


def only(candidates: Iterator[Norm], y: Tensor, compute: Callable[[Norm], Tensor]) -> Norm:
    """The one candidate that computes y."""
    errors = {norm: distance(compute(norm), y, norm.span(y)) for norm in candidates}
    fitting = [norm for norm, error in errors.items() if error <= AGREES]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise Unrecognised(f"it fits several norms: {'; '.join(norm.describe() for norm in fitting[:3])}")
    nearest = min(errors, key=errors.__getitem__)
    raise Unrecognised(
        f"it agrees with no norm known here; the nearest, {nearest.describe()}, is off by {errors[nearest]:.1e}"
    )
