"""What a conversion refuses, because something would be lost or left inconsistent without a word."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

WRAPPERS = {
    "DistributedDataParallel": "convert the module inside, then wrap it",
    "FullyShardedDataParallel": "convert the module first, then wrap it",
    "FSDPModule": "convert the module first, then call fully_shard",
    "OptimizedModule": "convert the module first, then call torch.compile",
    "ScriptModule": "convert the Python module, then script or trace it",
}


def called(name: str) -> str:
    """The module's name in a sentence; the root has none."""
    return f"{name!r}" if name else "the model itself"


def wrapped(model: nn.Module) -> None:
    """Refuses a model that is, or contains, a wrapper.

    By name along the bases: importing torch.distributed.fsdp to ask isinstance would cost every user.
    """
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in WRAPPERS and base.__module__.startswith("torch."):
                raise ValueError(
                    f"convert: {called(name)} is wrapped ({base.__name__}) and would go on with the old norms; "
                    f"{WRAPPERS[base.__name__]}"
                )


def is_source(name: str, module: nn.Module, source: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `source`; raises where it is one that carries more than its tensors."""
    if parametrize.type_before_parametrizations(module) is not source:
        return False
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"convert: {called(name)} is parametrized, and the new module would not be; call "
            "torch.nn.utils.parametrize.remove_parametrizations, convert, then parametrize again"
        )
    hooks = sorted(key for key, value in vars(module).items() if key.endswith("_hooks") and value)
    if hooks:
        raise ValueError(
            f"convert: {called(name)} has hooks ({', '.join(hooks)}), which would be lost; remove them, "
            "convert, then register them on the new module"
        )
    if "forward" in vars(module) or "_compiled_call_impl" in vars(module):
        raise ValueError(
            f"convert: {called(name)} has a forward of its own (set on the instance, or made by its "
            "compile()), which would be lost; convert first, then set it on the new module"
        )
    return True
