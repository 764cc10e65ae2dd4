"""A handle without an example waits for the first call of its model in training mode."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .refusals import CALLER

NOT_CHECKED = (
    "the model has not run yet in training mode through its forward, or only inside of a compiled function "
    "(calls of other methods are not seen), so that it is not known which weights are scale invariant; pass "
    "example= or load a state dict"
)


def refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before a step."""
    if (*args[1:], kwargs.get("closure"))[0] is not None:  # which may run the model, as Lightning's does
        return
    raise RuntimeError(f"{CALLER}: before the first step of the optimizer {NOT_CHECKED}")


class FirstCall:
    """A hook for the first call of the model; copies of it, as in a copy of the model, do nothing.

    Calls in eval mode are passed over: they may be of a single sample, which a batch norm cannot train on.
    """

    def __init__(self, handle: Any = None) -> None:
        self.handle = None if handle is None else weakref.ref(handle)

    def __reduce__(self):
        return FirstCall, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # where nothing can be tried out
            return
        handle = None if self.handle is None else self.handle()
        if handle is not None and handle.report.pending and handle.model.training:
            handle.settle(args, kwargs)
