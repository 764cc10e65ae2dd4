"""What an unknown module computes, found by running a copy of it beside every norm it might be.

float32 shows the family and bfloat16 the order of rounding. float64 cannot judge: many norms go to float32
whatever the input.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .batch_probe import identify_batch
from .candidates import (
    AGREES,
    Unrecognised,
    affine,
    device_of,
    gradients_agree,
    held_by,
    numbers,
    only,
    statistics,
)
from .evo_probe import calls_itself_evolved, identify_evolved
from .norm import Norm, tensor
from .trial import channel_inputs, distance, other_inputs, own_tensors, row_inputs, short, stand_in, undisturbed

_SAME_ENTRIES = 0.98
"""Share of bfloat16 entries that the right order of rounding reproduces; a wrong one misses a quarter."""

_ROUNDING = 0.1
"""What the roundings to bfloat16 may add up to."""

_MOST_ENTRIES = 1 << 22
_WIDTHS = ("normalized_shape", "num_features", "hidden_size", "dim")


def identify(module: nn.Module) -> Norm:
    """The norm that `module` computes.

    A copy of it with random parameters runs on its device (on the CPU, if that is meta).

    Raises:
        Unrecognised: it does not run on one input, or agrees with no norm, or with several.
    """
    extra, needed = _arguments(module)
    if needed:
        raise Unrecognised(f"its forward needs {', '.join(needed)} beside the input")
    if sum(t.numel() for t in own_tensors(module).values()) > _MOST_ENTRIES:
        raise Unrecognised(f"it holds more than {_MOST_ENTRIES} numbers, too many to copy for a test run")
    try:
        with undisturbed():
            found = _identify(stand_in(module))
    except Unrecognised:
        raise
    except Exception as error:  # the module is code that nobody here has seen
        raise Unrecognised(f"a test run of it failed: {short(error)}") from error
    return replace(found, arguments=extra)


def _arguments(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What forward takes beside its first argument, and which of that it cannot do without."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in various]
    return tuple(p.name for p in parameters), tuple(needed)


def _identify(twin: nn.Module) -> Norm:
    if calls_itself_evolved(twin):
        return identify_evolved(twin)
    children = dict(twin.named_children())
    plain = dict.fromkeys(children, nn.Identity())
    marks = {name: _Mark(place) for place, name in enumerate(children)}
    found, x = _alone(_with(twin, plain))
    if not children:
        return found
    for training in (False, True):
        y, marked = (_with(twin, each).train(training)(x) for each in (plain, marks))
        for mark in marks.values():
            y = mark(y)
        if not torch.equal(marked, y):
            raise Unrecognised(f"what it does with its children ({', '.join(children)}) is unclear")
    after = tuple(name for name, child in children.items() if not isinstance(child, nn.Identity))
    return replace(found, after=after)


class _Mark(nn.Module):
    """Stands for a child: shows where forward calls it, whatever the mode."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x * (2 + self.place))


def _with(twin: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `twin` with other children."""
    twin = copy.deepcopy(twin)
    for name, child in children.items():
        setattr(twin, name, child)
    return twin


def _alone(twin: nn.Module) -> tuple[Norm, Tensor]:
    stored = statistics(twin)
    return identify_batch(twin, stored) if stored else _rows(twin)


def _rows(twin: nn.Module) -> tuple[Norm, Tensor]:
    """The layer or RMS norm that `twin` computes, and an input that shows it."""
    weight, bias = affine(twin)
    held = tensor(twin, weight or bias)
    known = tuple(held.shape) if held is not None else _declared(twin)
    # A weight of shape (C, 1, 1) belongs to channels, one of (1, 1, d) to the last dimension.
    shape = tuple(size for size in known if size != 1) or known or (48,)
    if math.prod(shape) < 2:
        raise Unrecognised(f"its weight has shape {shape}, which does not tell what it normalises")
    failure: Exception = Unrecognised("its output has another shape than its input")
    unlike: Unrecognised | None = None
    for axis in (1,) if known and known[-1] == 1 else (-1, 1):
        x = row_inputs(shape, device_of(twin)) if axis == -1 else channel_inputs(shape[0], device_of(twin))
        try:
            y = twin(x)
        except Exception as error:  # another layout may suit it
            failure = error
            continue
        if isinstance(y, Tensor) and y.shape == x.shape:
            candidates = _row_candidates(twin, axis, shape, weight, bias)
            try:
                found = only(candidates, y, lambda norm, x=x: norm.compute(x, *held_by(twin, norm)))
            except Unrecognised as error:
                unlike = unlike or error
                continue
            if not torch.equal(twin.train()(x), y):
                raise Unrecognised(
                    f"it computes a {found.describe()} in eval mode and something else in training"
                )
            _confirm(twin, found, x)
            found = replace(found, cast=_cast(copy.deepcopy(twin.eval()), found, x))
            return found if known else replace(found, shape=None), x
    raise unlike or failure


def _confirm(twin: nn.Module, found: Norm, x: Tensor) -> None:
    """Raises Unrecognised where `twin` has other gradients than `found`, or is another norm on other inputs."""

    def compute(x: Tensor) -> Tensor:
        return found.compute(x, *held_by(twin, found))

    for other in other_inputs(found, x.device):
        try:
            y = twin(other)
        except Exception:  # it need not take inputs of every rank
            continue
        if y.shape == other.shape and distance(compute(other), y, found.span(y)) > AGREES:
            raise Unrecognised(
                f"it computes a {found.describe()} for an input of shape {tuple(x.shape)} and something else "
                f"for one of shape {tuple(other.shape)}"
            )
    twin.requires_grad_()
    if not gradients_agree(twin, compute, x, found.span(x), list(twin.parameters())):
        raise Unrecognised(f"it computes a {found.describe()}, but its gradients are not those")


def _declared(module: nn.Module) -> tuple[int, ...]:
    """The width that a module without parameters says it has."""
    for name in _WIDTHS:
        width: Any = getattr(module, name, None)
        sizes = tuple(width) if isinstance(width, (tuple, list)) else (width,)
        if all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            return sizes
    return ()


def _row_candidates(
    module: nn.Module, axis: int, shape: tuple[int, ...], weight: str | None, bias: str | None
) -> Iterator[Norm]:
    eps, sizes = numbers(module)
    width = shape[0] if axis == 1 else shape[-1]
    spans = [(width,)] if axis == 1 or len(shape) == 1 else [shape, (width,)]
    groups = {1} | {g for size in sizes if width % size == 0 for g in (size, width // size)} - {width}
    # A buffer may go by the name of a weight and be ignored.
    held = list(itertools.product({weight, None}, {bias, None}))
    for (w, b), family, e, span, g in itertools.product(held, ("layer", "rms"), eps, spans, sorted(groups)):
        for offset in (0.0, 1.0) if w else (0.0,):
            if e is None and family == "layer":
                continue
            yield Norm(family, span, e, weight=w, bias=b, offset=offset, axis=axis, groups=g)
    if axis == 1:
        of_group = {1, width} | {g for g in sizes if width % g == 0}
        for (w, b), e, g in itertools.product(held, filter(None, eps), sorted(of_group)):
            yield Norm("group", (width,), e, weight=w, bias=b, axis=axis, groups=g)


def _cast(twin: nn.Module, norm: Norm, x: Tensor) -> str | None:
    """The order of rounding that reproduces the module in bfloat16."""
    twin.bfloat16()
    x = x.bfloat16()
    y = twin(x)
    if y.dtype != x.dtype:
        return None
    held = held_by(twin, norm)
    for cast in ("torch", "llama"):
        if (replace(norm, cast=cast).compute(x, *held) == y).float().mean() >= _SAME_ENTRIES:
            return "gemma" if norm.offset and norm.family == "rms" and cast == "torch" else cast
    if distance(norm.compute(x, *held).float(), y.float(), norm.span(y)) > _ROUNDING:
        raise Unrecognised(f"it computes a {norm.describe()} in float32 and something else in bfloat16")
    return None
