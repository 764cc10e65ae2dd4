"""Side inputs (masks, task ids, times) for layers deep inside a model, for the span of a ``with`` block."""

from __future__ import annotations

import threading
from typing import overload
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .state import recomputing

NAMES = ("mask", "pad_mask", "task_ids", "t")


class _Frame:
    """A block that is entered, and the backward pass that it was entered in, if any."""

    def __init__(self, block: inputs, task: int) -> None:
        self.block = block
        self.task = task


# A threading.local because dynamo traces it, as in dispatch.py.
class _State(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_state = _State()

_had: WeakSet[nn.Module] = WeakSet()
"""Modules that were once given by a block what they can do without."""


class MissingInput(ValueError):
    """A layer needs a side input and there is none."""


class inputs:
    """Give side inputs to the layers of a model that take them, inside a ``with`` block and in this thread.

    A layer takes a side input if its class names it in ``side_inputs``; it looks there where its forward got
    none. Every layer of `model` that takes an input gets the same one; of nested blocks the inner holds.

    Args:
        model: the model that is called inside the block.
        mask: 1 or True inside holes or regions, as the layers of the model say.
        pad_mask: True at padding.
        task_ids: the task of every sample.
        t: the time of every sample.

    Raises:
        TypeError: a value is no tensor.
        ValueError: nothing is given, or no layer of `model` takes what is given.

    In a recomputation of activation checkpointing the block may be over, or another may be open. There a layer
    refuses, unless the block was entered for the recomputation: inside of the function that is checkpointed, or
    by ``checkpoint(..., use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(),
    normzoo.inputs(model, mask=mask)))``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        t: Tensor | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"inputs: model is a {type(model).__name__}; it must be a torch.nn.Module")
        # Plain loops: dynamo stops at variables that a comprehension or a generator shares with the method.
        self.values: dict[str, Tensor] = {}
        for name, value in (("mask", mask), ("pad_mask", pad_mask), ("task_ids", task_ids), ("t", t)):
            if value is not None:
                if not isinstance(value, Tensor):
                    how = "; torch.from_numpy makes one" if type(value).__name__ == "ndarray" else ""
                    raise TypeError(
                        f"inputs: {name} is a {type(value).__name__}; it must be a torch.Tensor{how}"
                    )
                self.values[name] = value
        if not self.values:
            raise ValueError(f"inputs: nothing is given; pass one of {', '.join(NAMES)}")
        takers: list[nn.Module] = []
        taken: list[tuple[str, ...]] = []
        for module in model.modules():
            takes = getattr(module, "side_inputs", ())
            if takes:
                takers.append(module)
                taken.append(takes)
        for name in self.values:
            if not any([name in takes for takes in taken]):
                both = zip(takers, taken, strict=True)
                known = sorted({f"{type(taker).__name__} ({', '.join(takes)})" for taker, takes in both})
                raise ValueError(
                    f"inputs: no layer of the model takes {name}; it has "
                    f"{', '.join(known) or 'none that take any'}"
                )
        self.modules = frozenset([id(taker) for taker in takers])
        self.alive = takers  # or another module could get the id of one that is gone

    def __enter__(self) -> None:
        task = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        _state.frames.append(_Frame(self, task))

    def __exit__(self, *_) -> None:
        # Not always the last: a generator may hold a block open.
        mine = [place for place, frame in enumerate(_state.frames) if frame.block is self]
        del _state.frames[mine[-1]]


_RECOMPUTES = (
    "activation checkpointing recomputes; pass it to forward, or enter the block inside of the function that "
    "is checkpointed, or in the context_fn of a checkpoint with use_reentrant=False"
)


@overload
def side_input(module: nn.Module, name: str) -> Tensor: ...


@overload
def side_input(module: nn.Module, name: str, *, required: bool) -> Tensor | None: ...


def side_input(module: nn.Module, name: str, *, required: bool = True) -> Tensor | None:
    """The side input `name` of the innermost block of :class:`inputs` about `module`; None where it has none.

    Raises:
        ValueError: `required`, and there is none.
        RuntimeError: this is a recomputation (activation checkpointing), and no block was entered for it though
            the input is `required` or a block was entered before, for this pass or an earlier one; or a copy of
            torch.nn.DataParallel.
    """
    for frame in reversed(_state.frames):
        if name in frame.block.values and id(module) in frame.block.modules:
            if not torch.compiler.is_compiling() and frame.task != torch._C._current_graph_task_id():
                raise RuntimeError(
                    f"{type(module).__name__}: {name} comes from a `with inputs(...)` block that was entered "
                    f"before the backward pass, and may belong to another batch than the one that {_RECOMPUTES}"
                )
            if not required and not torch.compiler.is_compiling():
                _had.add(module)
            return frame.block.values[name]
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"{type(module).__name__}: torch.nn.DataParallel has copied it, and {name} of a `with inputs(...)` "
            "block does not reach copies; use DistributedDataParallel, or pass it to forward"
        )
    if recomputing() and (required or module in _had):
        raise RuntimeError(
            f"{type(module).__name__}: there is no {name} now, and there may have been one in the forward "
            f"pass that {_RECOMPUTES}"
        )
    if required:
        raise MissingInput(
            f"{type(module).__name__}: there is no {name}; pass it to forward, or call the model inside "
            f"`with normzoo.inputs(model, {name}=...)`"
        )
    return None


def entered(model: nn.Module) -> dict[str, Tensor]:
    """The side inputs of the blocks about layers of `model` that are entered now, by name."""
    own = {id(module) for module in model.modules()}
    found: dict[str, Tensor] = {}
    for frame in _state.frames:
        if not own.isdisjoint(frame.block.modules):
            found |= frame.block.values
    return found
