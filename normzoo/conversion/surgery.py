"""Putting modules into a model and taking them out again: all of it, or nothing."""

from __future__ import annotations

import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

WRAPPERS = {
    "DistributedDataParallel": "the module inside, then wrap it",
    "FullyShardedDataParallel": "the module first, then wrap it",
    "FSDPModule": "the module first, then call fully_shard",
    "OptimizedModule": "the module first, then call torch.compile",
    "ScriptModule": "the Python module, then script or trace it",
    "DeepSpeedEngine": "the module first, then call deepspeed.initialize",
}
"""Classes of models that a conversion refuses, and what to convert instead."""


def refuse_wrapped(model: nn.Module, caller: str = "convert", do: str = "convert") -> None:
    """Raises ValueError where `model` is, or contains, a wrapper, which would go on with the old norms.

    By name along the bases: importing torch.distributed.fsdp to ask isinstance would cost every user.

    Args:
        caller: begins the error.
        do: a verb, for what is to be done with the model inside.
    """
    for name, module in model.named_modules():
        called = repr(name) if name else "the model itself"
        if vars(module).get("_compiled_call_impl") is not None:
            raise ValueError(
                f"{caller}: {called} is compiled (by its compile()) and may go on with the old norms; {do} the "
                "model first, then compile it"
            )
        for base in type(module).__mro__:
            if base.__name__ in WRAPPERS and base.__module__.startswith(("torch.", "deepspeed.")):
                raise ValueError(
                    f"{caller}: {called} is wrapped ({base.__name__}) and would go on with the old norms; {do} "
                    f"{WRAPPERS[base.__name__]}"
                )


def places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For every module below `model`, the parents that hold it and its name there."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # _modules rather than named_children, which hides the second name of a shared child.
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, name))
    return found


def references(model: nn.Module, wanted: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Of the modules `wanted`, those that an attribute holds outside the module tree, and its name."""
    by_id = {id(module): module for module in wanted}
    found = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            for held in _modules_in(value):
                if id(held) in by_id and held is not module:
                    found[by_id[id(held)]] = f"{name}.{attribute}".lstrip(".")
    return found


def _modules_in(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The modules that an attribute leads to: itself, in containers, or bound to a function."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, types.MethodType):
        yield from _modules_in(value.__self__)
    elif depth:
        for inner in _parts(value):
            yield from _modules_in(inner, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.FunctionType):
        return inspect.getclosurevars(value).nonlocals.values()
    return ()


class Swap:
    """Modules that take the places of others, and settings that go with them, both to be undone."""

    def __init__(
        self,
        model: nn.Module,
        new_of: Mapping[nn.Module, nn.Module],
        settings: Sequence[tuple[nn.Module, str, Any]] = (),
    ) -> None:
        self.model = model
        self.new_of = new_of
        self.settings = [(module, name, value, getattr(module, name)) for module, name, value in settings]

    @property
    def root(self) -> nn.Module:
        """The model once the modules are in place: another one where the model itself is replaced."""
        return self.new_of.get(self.model, self.model)

    def do(self) -> None:
        """Raises ValueError, and changes nothing, where a module is no longer in the model."""
        self._exchange(self.model, self.new_of)
        for module, name, value, _ in self.settings:
            setattr(module, name, value)

    def undo(self) -> None:
        """Raises ValueError, and changes nothing, where a module is no longer in the model."""
        self._exchange(self.root, {new: old for old, new in self.new_of.items()})
        for module, name, _, before in self.settings:
            setattr(module, name, before)

    def _exchange(self, root: nn.Module, other: Mapping[nn.Module, nn.Module]) -> None:
        found = places(root)
        gone = [type(module).__name__ for module in other if module not in found and module is not root]
        if gone:
            raise ValueError(
                f"convert: the model has changed since the plan was made: {len(gone)} module(s) that it is "
                f"about are no longer in it ({', '.join(gone[:3])}); make a new plan"
            )
        for module, replacement in other.items():
            for parent, name in found.get(module, ()):
                parent._modules[name] = replacement


@dataclass
class Exchange:
    """What becomes of the parameters of one norm, for an optimizer."""

    pairs: list[tuple[nn.Parameter, nn.Parameter]]
    """Old ones, and what was computed from them."""
    added: dict[str, nn.Parameter]
    """New ones by name."""
    old: list[nn.Parameter]
    """All old ones: the new join the group of the first that the optimizer has."""


def edit(optimizer: Optimizer, exchanges: Sequence[Exchange], model: nn.Module) -> Callable[[], None]:
    """Keeps `optimizer` in step with parameters of `model` that were exchanged; returns what undoes that.

    What was computed from a parameter takes its place in its group, new parameters join the group of their
    norm, and those that `model` has no more leave; the state of what leaves is dropped.
    """
    keys = ("params", "param_names")
    before = [{key: list(group[key]) for key in keys if key in group} for group in optimizer.param_groups]
    states = {}
    alive = {id(p) for p in model.parameters()}

    def undo() -> None:
        for group, values in zip(optimizer.param_groups, before, strict=False):  # a user may have added groups
            for key in values:
                group[key][:] = values[key]
        for exchange in exchanges:
            for new in (*(new for _, new in exchange.pairs), *exchange.added.values()):
                optimizer.state.pop(new, None)
        optimizer.state.update(states)

    try:
        for exchange in exchanges:
            new_of = {id(old): new for old, new in exchange.pairs}
            home = _home(optimizer, exchange.old)
            for group in optimizer.param_groups:
                group["params"][:] = [new_of.get(id(p), p) for p in group["params"]]
            if home is not None:
                home["params"].extend(exchange.added.values())
                if "param_names" in home:
                    home["param_names"].extend(exchange.added)
            for old in exchange.old:
                if id(old) not in alive:
                    if old in optimizer.state:
                        states[old] = optimizer.state[old]
                    _leave(optimizer, old)
    except BaseException:
        undo()
        raise
    return undo


def _home(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> dict[str, Any] | None:
    """The group of `parameters`, the last one if there are none; None where the optimizer has none of them."""
    wanted = {id(p) for p in parameters}
    groups = (group for group in optimizer.param_groups if any(id(p) in wanted for p in group["params"]))
    return next(groups, None if parameters else optimizer.param_groups[-1])


def _leave(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p is parameter:
                del group["params"][i]
                if "param_names" in group:
                    del group["param_names"][i]
                break
