"""Rules for EvoNorm, which takes the place of a norm and of the activation behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..state import Guarded
from .channels import of_channels, running
from .following import is_activation, unlike_relu
from .norm import Norm, tensor
from .recognise import Site
from .transfer import Carried, Exactness, Refused, transfer

Options = Mapping[str, Any]

_B = ("evo_norm_b0", "evo_norm_b1", "evo_norm_b2")
_S = ("evo_norm_s0", "evo_norm_s1", "evo_norm_s2")

_IN_TRAINING = ("momentum", "sync", "process_group", "nonfinite", "running_var_unbiased")
_GROUPING = ("groups", "group_size")
_OF_OTHERS = (
    *("affine", "track_running_stats", "running_mean", "running_var", "num_batches_tracked", "momentum"),
    *("sync", "process_group", "nonfinite", "batches_skipped", "num_features", "num_groups", "num_channels"),
)
"""Attributes of other norms that mean nothing to an EvoNorm, or something else."""

_PAIR = "it stands for the norm and the activation behind it; weights start anew"
_KEEPS = f"{_PAIR}, the running variance goes on"
_AFFINE = (
    "without an activation it is the map of eval mode, weight · x + bias, in training too: no norm any more"
)

_NO_NORM = "are no norms any more: apply_act=False leaves weight · x + bias"


def _of_batch(norm: Norm, module: nn.Module, batch: bool) -> Carried:
    """What an EvoNorm has of a batch norm; with `batch` it has a running variance."""
    carried = running(norm, module)
    if batch and "track_running_stats" in carried.attributes:
        raise Refused("its running statistics rest, and those of an EvoNorm-B always move")
    arguments = ("momentum", "sync", "process_group", "nonfinite") if batch else ()
    carried.arguments = {name: carried.arguments[name] for name in ("num_features", *arguments)}
    carried.kept = {"running_var": norm.statistics[1]} if batch and norm.statistics else {}
    carried.attributes = {}
    return carried


def _instead(
    norm: Norm, module: nn.Module, options: Options, site: Site, made: Callable[[Norm, nn.Module], Carried]
) -> Carried:
    """An EvoNorm in the place of a norm and its activation."""
    carried = made(norm, module)
    carried.one_of = _GROUPING
    carried.dropped = (*_OF_OTHERS, *(name for name in (norm.weight, norm.bias) if name))
    if options.get("apply_act") is False:
        return _affine(carried, norm, module)
    within = [name for name in norm.after if is_activation(getattr(module, name))]
    unlike = unlike_relu(getattr(module, within[0])) if within else ""
    if within and not unlike:
        carried.after = tuple(name for name in norm.after if name != within[0])
        carried.dropped += (within[0],)
        carried.note = _goes(carried, within[0], getattr(module, within[0]))
        return carried
    following = site.following()
    advice = following.advice
    if unlike:
        why, advice = f"its {type(getattr(module, within[0])).__name__} {unlike}", ""
    elif norm.after:
        why, advice = f"it goes on to its {', '.join(norm.after)}", ""
    elif following.activations:
        carried.beside = {activation: nn.Identity() for activation in following.activations}
        carried.note = _goes(carried, ", ".join(following.names), following.activations[0])
        return carried
    else:
        why = following.why_not
    if options.get("apply_act") is not True:
        raise Refused(
            f"no activation is behind it that could go ({why}); {f'{advice}, or ' if advice else ''}pass "
            "apply_act=True for an EvoNorm all the same, or apply_act=False for one without an activation, "
            "which is no norm"
        )
    carried.note = f"weights start anew; what is behind it stays ({why})"
    return carried


def _goes(carried: Carried, name: str, activation: nn.Module) -> str:
    return f"{_KEEPS if carried.kept else _PAIR}; {name} ({type(activation).__name__}) goes"


def _affine(carried: Carried, norm: Norm, module: nn.Module) -> Carried:
    """The map that a norm with stored statistics is in eval mode."""
    if len(norm.statistics) < 2:
        raise Refused(
            "without an activation an EvoNorm is weight · x + bias, and it has no stored statistics for that"
        )
    mean, var = (getattr(module, name).detach().double() for name in norm.statistics[:2])
    weight, bias = (
        torch.full_like(mean, usual) if held is None else held.detach().double()
        for held, usual in ((tensor(module, norm.weight), 1.0), (tensor(module, norm.bias), 0.0))
    )
    scale = weight / (var + (norm.eps or 0.0)).sqrt()
    made = {"weight": (norm.weight or norm.statistics[1], scale)}
    made["bias"] = (norm.bias or norm.statistics[0], bias - scale * mean)
    for name, (source, value) in made.items():
        held = getattr(module, source)
        trains = held.requires_grad or source in norm.statistics
        carried.converted[name] = source, nn.Parameter(value.to(held.dtype), requires_grad=trains)
    carried.exactness, carried.note, carried.warning = Exactness.EVAL_EXACT, _AFFINE, _NO_NORM
    return carried


def _from_batch_b(norm: Norm, module: nn.Module, options: Options, site: Site) -> Carried:
    return _instead(norm, module, options, site, functools.partial(_of_batch, batch=True))


def _from_batch_s(norm: Norm, module: nn.Module, options: Options, site: Site) -> Carried:
    carried = _instead(norm, module, options, site, functools.partial(_of_batch, batch=False))
    carried.arguments["groups"] = "auto"
    return _grouped(carried, norm)


def _groups(new: Any) -> str:
    """How many groups an EvoNorm-S has, where it has statistics."""
    if not new.apply_act:
        return ""
    return f"groups={new.groups}" + (", one channel each" if new.groups == new.num_features else "")


def _grouped(carried: Carried, norm: Norm) -> Carried:
    """An EvoNorm-S; Refused where a child of the norm has a name that this gives to another thing."""
    carried.told = _groups
    if "act" in (norm.after if carried.after is None else carried.after):
        raise Refused("its activation is its own, called act as that of an EvoNorm-S is: it cannot stay")
    return carried


def _of_groups(norm: Norm, module: nn.Module) -> Carried:
    carried = of_channels(norm, module)
    carried.arguments, carried.kept = {"num_features": norm.channels, "groups": norm.groups}, {}
    return carried


def _from_group(norm: Norm, module: nn.Module, options: Options, site: Site) -> Carried:
    return _grouped(_instead(norm, module, options, site, _of_groups), norm)


_ASKS: dict[str, Any] = {"by_options": True, "by_site": True}
for _target in _B:
    transfer("batch", _target, Exactness.REINITIALISED, _KEEPS, **_ASKS)(_from_batch_b)
for _target in _S:
    transfer("batch", _target, Exactness.REINITIALISED, _PAIR, **_ASKS)(_from_batch_s)
    transfer("group", _target, Exactness.REINITIALISED, f"{_PAIR}; in its groups", **_ASKS)(_from_group)


def _again(norm: Norm, module: nn.Module, options: Options) -> Carried:
    carried = of_channels(norm, module)
    carried.arguments |= {"num_features": norm.channels, "apply_act": norm.apply_act}
    carried.warning = _NO_NORM if norm.apply_act and options.get("apply_act") is False else ""
    carried.in_training, carried.dropped = _IN_TRAINING, ("act", "pre_act_norm")
    if tensor(module, "v") is not None:
        carried.kept["v"] = "v"
    if norm.family.startswith("evo_b"):
        carried.kept["running_var"] = norm.statistics[0]
        carried.arguments["momentum"] = norm.momentum
        if isinstance(module, Guarded):
            own = ("sync", "process_group", "nonfinite", "running_var_unbiased")
            carried.arguments |= {name: getattr(module, name) for name in own}
    else:
        carried.arguments["groups"] = norm.groups
        carried.one_of = _GROUPING
    if norm.family in ("evo_s1", "evo_s2") and norm.apply_act:
        carried.arguments["act_layer"] = _making(getattr(module, "act", None))
    return carried


def _making(activation: nn.Module | None) -> Callable[[], nn.Module]:
    if activation is None or type(activation) is nn.SiLU:
        return nn.SiLU
    return lambda: activation


for _target in (*_B, *_S):
    transfer(_target.replace("norm_", ""), _target, Exactness.EXACT, same=True, by_options=True)(_again)
