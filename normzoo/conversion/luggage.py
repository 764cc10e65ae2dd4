"""What a norm carries beside its mathematics: hooks, attributes of the user, further buffers, an activation."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]
_STATE = ("_save_to_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state")
_TABLES = ("_parameters", "_buffers", "_modules")


def obstacle(module: nn.Module) -> str:
    """Why `module` cannot be replaced without losing something, and what to do; empty where it can."""
    if parametrize.is_parametrized(module):
        return (
            "it is parametrized, and its replacement would not be; call "
            "torch.nn.utils.parametrize.remove_parametrizations, convert, then parametrize again"
        )
    if "forward" in vars(module):
        return "it has a forward of its own, which would be lost; convert first, then set it on the new module"
    own = [name for name in _STATE if not getattr(type(module), name).__module__.startswith("torch.nn.")]
    if own:
        return f"its class has a {' and a '.join(own)} of its own, so that checkpoints would no longer load"
    # torch keeps a weak reference to the module beside such a hook.
    bound = [hook for hook in module._load_state_dict_pre_hooks.values() if isinstance(hook, _WrappedHook)]
    if any(hook.with_module for hook in bound):
        return "it has a load_state_dict hook tied to the module; remove it, convert, then register it again"
    return ""


def hooks(module: nn.Module) -> list[str]:
    """The kinds of hooks that `module` has."""
    return [name.strip("_") for name in _HOOKS if name.endswith("_hooks") and vars(module)[name]]


def bring_along(old: nn.Module, new: nn.Module, leave: Collection[str]) -> tuple[str, ...]:
    """Gives `new` all of `old` that is not in `leave` and has a free name; returns what has not.

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
                lost.append(name)
                continue
            vars(new)[table][name] = value
            if name in old._non_persistent_buffers_set:
                new._non_persistent_buffers_set.add(name)
    for name, value in vars(old).items():
        if not hasattr(new, name):
            vars(new)[name] = value
    return tuple(lost)
