"""What a norm carries beside its mathematics: hooks, attributes of the user, further buffers, an activation."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from .trial import bare

_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]
_STATE = ("_save_to_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state")
_TABLES = ("_parameters", "_buffers", "_modules")
FROZEN_FROM = "_frozen_from"
"""Attribute of a frozen norm that holds the norm it was."""

_loads_plainly: WeakKeyDictionary[type[nn.Module], bool] = WeakKeyDictionary()


def obstacle(module: nn.Module) -> str:
    """Why `module` cannot be replaced without losing something, and what to do; empty where it can."""
    if parametrize.is_parametrized(module):
        return (
            "it is parametrized, and its replacement would not be; call "
            "torch.nn.utils.parametrize.remove_parametrizations, convert, then parametrize again"
        )
    if "forward" in vars(module):
        return "it has a forward of its own, which would be lost; convert first, then set it on the new module"
    own = [
        name
        for name in _STATE
        if not getattr(type(module), name).__module__.startswith(("torch.nn.", "normzoo."))
    ]
    if own and not (own == ["_load_from_state_dict"] and loads_plainly(module)):
        return f"its class has a {' and a '.join(own)} of its own, so that checkpoints would no longer load"
    # torch keeps a weak reference to the module beside such a hook.
    bound = [hook for hook in module._load_state_dict_pre_hooks.values() if isinstance(hook, _WrappedHook)]
    if any(hook.with_module for hook in bound):
        return "it has a load_state_dict hook tied to the module; remove it, convert, then register it again"
    return ""


def hooks(module: nn.Module) -> list[str]:
    """The kinds of hooks that `module` has."""
    return [name.strip("_") for name in _HOOKS if name.endswith("_hooks") and vars(module)[name]]


def loads_plainly(module: nn.Module) -> bool:
    """Whether the class of `module` loads a state dict as any module does, but for num_batches_tracked.

    Frozen batch norms of many libraries have a method for it, to load the checkpoint of a batch norm. Some do
    more there, such as filling in what an old checkpoint lacks.
    """
    cls = type(module)
    if cls not in _loads_plainly:
        try:
            _loads_plainly[cls] = _shows_plain_loading(module)
        except Exception:  # it is code that nobody here has seen
            _loads_plainly[cls] = False
    return _loads_plainly[cls]


def _shows_plain_loading(module: nn.Module) -> bool:
    own = module._parameters | module._buffers
    state = {name: torch.full(t.shape, 2.0).to(t.dtype) for name, t in own.items() if t is not None}
    versions = [{"version": version} for version in (None, 1, 2, 3)]
    for metadata in ({}, *versions):
        for absent in (None, *state):
            given = {name: t for name, t in state.items() if name != absent}
            watched = _Watched(given | {"num_batches_tracked": torch.tensor(5)})
            twins = [_twin(module) for _ in range(2)]
            told = ([], [], []), ([], [], [])
            type(module)._load_from_state_dict(twins[0], watched, "", metadata, True, *told[0])
            nn.Module._load_from_state_dict(twins[1], dict(given), "", metadata, True, *told[1])
            same = all(torch.equal(*(getattr(twin, name) for twin in twins)) for name in given)
            if told[0] != told[1] or not same or watched.asked - own.keys() - {*_ASKED}:
                return False
    return True


_ASKED = ("num_batches_tracked", "_extra_state")
"""What a plain class asks a state dict for, too."""


class _Watched(dict):
    """Notes the keys that it is asked for: a method may look for the names that old checkpoints have."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(state)
        self.asked: set[str] = set()

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def pop(self, key, *default):
        self.asked.add(key)
        return super().pop(key, *default)


def _twin(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own on the CPU, which are zero."""
    made = bare(module)
    for table in ("_parameters", "_buffers"):
        own = vars(module)[table]
        vars(made)[table] = {n: t if t is None else torch.zeros(t.shape, dtype=t.dtype) for n, t in own.items()}
    vars(made)["_modules"] = {}
    return made


def bring_along(old: nn.Module, new: nn.Module, leave: Collection[str]) -> tuple[str, ...]:
    """Gives `new` all of `old` that is not in `leave` and has a free name; returns the tensors that have none.

    Tables of hooks become shared, so that the handles of hooks go on working and hooks of the one are hooks of
    the other.
    """
    for name in _HOOKS:
        if not vars(new)[name]:
            vars(new)[name] = vars(old)[name]
    new._is_full_backward_hook = old._is_full_backward_hook
    new.training = old.training
    lost = []
    for table in _TABLES:
        for name, value in vars(old)[table].items():
            if name in leave or (value is None and hasattr(new, name)):
                continue
            if hasattr(new, name):
                inside = value.state_dict() if isinstance(value, nn.Module) else None
                lost += [name] if inside is None else [f"{name}.{each}" for each in inside]
                continue
            vars(new)[table][name] = value
            if name in old._non_persistent_buffers_set:
                new._non_persistent_buffers_set.add(name)
    for name, value in vars(old).items():
        if name not in leave and name != FROZEN_FROM and not hasattr(new, name):
            vars(new)[name] = value
    return tuple(lost)
