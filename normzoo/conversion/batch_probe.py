"""The batch norm that an unknown module with a stored mean and variance computes, which may be frozen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .candidates import AGREES, Unrecognised, affine, gradients_agree, held_by, numbers, only
from .norm import Norm
from .trial import channel_batches, channel_inputs, distance

_MOMENTUM_AGREES = 1e-4
"""Largest difference of running statistics, of the old and the new ones; the biased variance is off by more."""


def identify_batch(twin: nn.Module, stored: tuple[str, str]) -> tuple[Norm, Tensor]:
    """The norm of `twin`, which is a copy in eval mode, and an input that shows it.

    stored: names of its mean and variance.
    """
    weight, bias = affine(twin, stored)
    x, y = _first_run(twin, len(twin.get_buffer(stored[0])))
    shape = tuple(twin.get_buffer(stored[0]).shape)
    held = itertools.product({weight, None}, {bias, None})
    candidates = (
        Norm("batch", shape, e, weight=w, bias=b, statistics=stored, axis=1)
        for (w, b), e in itertools.product(held, filter(None, numbers(twin)[0]))
    )
    found = only(candidates, y, lambda norm: _compute(twin, norm, x, False))
    before = _statistics(twin, found)
    trained = twin.train()(x)
    unmoved = all(torch.equal(a, b) for a, b in zip(before, _statistics(twin, found), strict=True))
    _restore(twin, found, before)
    twin.eval()
    if unmoved and torch.equal(trained, y):
        found = replace(found, family="frozen_batch")
        dims = _confirm(twin, found, x, training=False)
        _confirm(twin, found, x, training=True)
        return replace(found, dims=dims), x
    if distance(trained, _compute(twin, found, x, True), found.span(x)) > AGREES:
        raise Unrecognised(f"it computes a {found.describe()} in eval mode and something else in training")
    dims = _confirm(twin, found, x, training=False)
    _confirm(twin, found, x, training=True)
    _restore(twin, found, before)
    found = replace(found, dims=dims, momentum=_momentum(twin, found, x))
    if _counts(twin, x):
        found = replace(found, statistics=(*stored, "num_batches_tracked"))
    _restore(twin, found, before)
    return found, x


def _first_run(twin: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """An input of a rank that `twin` takes, and what it makes of it."""
    failure: Exception = Unrecognised("its output has another shape than its input")
    for dims in (2, 1, 0, 3):
        x = channel_inputs(channels, next(twin.buffers()).device, dims)
        try:
            y = twin(x)
        except Exception as error:  # another rank may suit it
            failure = error
            continue
        if isinstance(y, Tensor) and y.shape == x.shape:
            return x, y
    raise failure


def _compute(twin: nn.Module, norm: Norm, x: Tensor, training: bool) -> Tensor:
    training = training and norm.family != "frozen_batch"
    mean, var = (None, None) if training else _statistics(twin, norm)
    weight, bias = (None if t is None else t.reshape(-1) for t in held_by(twin, norm))
    return F.batch_norm(x, mean, var, weight, bias, training, eps=norm.eps or 0.0)


def _statistics(twin: nn.Module, norm: Norm) -> tuple[Tensor, Tensor]:
    mean, var = (twin.get_buffer(name).clone() for name in norm.statistics[:2])
    return mean, var


def _restore(twin: nn.Module, norm: Norm, statistics: tuple[Tensor, Tensor]) -> None:
    for name, value in zip(norm.statistics, statistics, strict=False):
        twin.get_buffer(name).copy_(value)


def _confirm(twin: nn.Module, found: Norm, x: Tensor, training: bool) -> int | None:
    """How many spatial dimensions the inputs of `twin` have; None where they may have any number.

    Raises Unrecognised where it has other gradients than `found`, or is another norm on other inputs.
    """
    mode = "training" if training else "eval mode"
    before = _statistics(twin, found)

    def run(x: Tensor) -> Tensor:
        _restore(twin, found, before)
        return twin.train(training)(x)

    def compute(x: Tensor) -> Tensor:
        _restore(twin, found, before)
        return _compute(twin, found, x, training)

    ranks = set()
    for other in channel_batches(x.shape[1], x.device):
        try:
            y = run(other)
        except Exception:  # it need not take inputs of every rank
            continue
        if not isinstance(y, Tensor) or y.shape != other.shape:
            continue
        if distance(compute(other), y, found.span(y)) > AGREES:
            raise Unrecognised(
                f"it computes a {found.describe()} for an input of shape {tuple(x.shape)} and something else "
                f"for one of shape {tuple(other.shape)} in {mode}"
            )
        ranks.add(other.dim())
    twin.requires_grad_()
    if not gradients_agree(run, compute, x, found.span(x), list(twin.parameters())):
        raise Unrecognised(f"it computes a {found.describe()}, but its gradients in {mode} are not those")
    twin.requires_grad_(False)
    _restore(twin, found, before)
    twin.eval()
    return 1 if ranks <= {2, 3} else {(4,): 2, (5,): 3}.get(tuple(ranks))


def _momentum(twin: nn.Module, norm: Norm, x: Tensor) -> float | None:
    """The weight of a batch in the running statistics of `twin`; None where they average all batches."""
    weights = [_weight_of(twin, norm, batch) for batch in (x, 2 * x + 0.1)]
    first, second = weights
    if abs(first - second) > _MOMENTUM_AGREES:
        # The n-th of n batches weighs 1 / n.
        if abs(1 / second - 1 / first - 1) < 1e-3 and abs(1 / first - round(1 / first)) < 1e-3:
            return None
        raise Unrecognised(f"its running statistics move by {first:.4g} of a batch, and then by {second:.4g}")
    given = [float(value) for value in vars(twin).values() if isinstance(value, (int, float))]
    near = [value for value in (*given, *(1 - value for value in given)) if abs(value - first) <= 1e-5]
    return near[0] if near else round(first, 5)


def _weight_of(twin: nn.Module, norm: Norm, x: Tensor) -> float:
    """How much a batch weighs in the running statistics, which are those of torch in all else."""
    before = _statistics(twin, norm)
    twin.train()(x)
    twin.eval()
    after, batch = _statistics(twin, norm), (x.transpose(0, 1).flatten(1))
    new = batch.mean(1), batch.var(1)
    moved = new[0] - before[0]
    place = moved.abs().argmax()
    weight = ((after[0] - before[0])[place] / moved[place]).item()
    for name, was, becomes, drawn in zip(norm.statistics, before, after, new, strict=False):
        apart = (becomes - torch.lerp(was, drawn, weight)).abs() / (was.abs() + drawn.abs())
        if not 0 <= weight <= 1 + 1e-6 or apart.max() > _MOMENTUM_AGREES:
            raise Unrecognised(f"it computes a {norm.describe()}, but its {name} moves in another way")
    return weight


def _counts(twin: nn.Module, x: Tensor) -> bool:
    """Whether it counts batches in num_batches_tracked."""
    counter = getattr(twin, "num_batches_tracked", None)
    if not isinstance(counter, Tensor) or counter.dim():
        return False
    before = counter.clone()
    twin.train()(x)
    twin.eval()
    return torch.equal(twin.get_buffer("num_batches_tracked"), before + 1)
