"""The EvoNorm that an unknown module computes: one that calls itself so, with timm's names of tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..dispatch import backend
from .candidates import AGREES, Unrecognised, device_of, gradients_agree, numbers, only
from .norm import Norm, tensor
from .trial import channel_batches, channel_inputs, distance, own_tensors

_FORM = re.compile(r"[bs][0-2]")
_HELD = {"weight", "bias", "v", "running_var"}
_MOMENTUM_AGREES = 1e-4
"""Largest difference of a running variance; the biased one is off by more."""


def calls_itself_evolved(module: nn.Module) -> bool:
    return "evonorm" in _plain_name(module)


def _plain_name(module: nn.Module) -> str:
    return " ".join(base.__name__ for base in type(module).__mro__).replace("_", "").lower()


def identify_evolved(twin: nn.Module) -> Norm:
    """The EvoNorm that `twin` computes, which is a copy in eval mode.

    Raises:
        Unrecognised: it agrees with none.
    """
    held = own_tensors(twin)
    if not {"weight", "bias"} <= held.keys() <= _HELD:
        raise Unrecognised(f"it holds {', '.join(held)}, and an EvoNorm weight and bias, and v or running_var")
    if len(children := list(twin.children())) > 1:
        raise Unrecognised(f"it has {len(children)} children, and an EvoNorm one activation at most")
    act = children[0] if children else None
    channels = len(held["weight"])
    x = channel_inputs(channels, device_of(twin))
    y = twin(x)
    plain = Norm("evo_b0", (channels,), 1e-5, "weight", "bias", axis=1, apply_act=False)
    if distance(_compute(twin, plain, act, x, False), y, plain.span(x)) <= AGREES:
        found = _inactive(twin, plain)
    elif getattr(twin, "apply_act", True) is False:
        raise Unrecognised(
            "without an activation it still divides by the statistics of groups, and an EvoNorm with "
            "apply_act=False is weight · x + bias"
        )
    else:
        found = only(_candidates(twin, channels), y, lambda norm: _compute(twin, norm, act, x, False))
    if "running_var" in held:
        found = replace(found, statistics=("running_var",), momentum=float(getattr(twin, "momentum", 0.1)))
    ranks = _confirm(twin, found, act, x, training=False) | _confirm(twin, found, act, x, training=True)
    return replace(found, dims=2 if ranks == {4} else None)


def _inactive(twin: nn.Module, plain: Norm) -> Norm:
    """All forms are the same then, so that the name decides which one it is."""
    forms = [*_FORM.findall(_plain_name(twin)), "b0" if tensor(twin, "running_var") is not None else "s0"]
    groups = numbers(twin)[1] if forms[0].startswith("s") else [1]
    eps = float(getattr(twin, "eps", 1e-5))
    return replace(plain, family=f"evo_{forms[0]}", eps=eps, groups=groups[0] if groups else 1)


def _candidates(twin: nn.Module, channels: int) -> Iterator[Norm]:
    stored, v = (tensor(twin, name) is not None for name in ("running_var", "v"))
    forms = (("b0",) if v else ("b1", "b2")) if stored else (("s0",) if v else ("s1", "s2"))
    eps, sizes = numbers(twin)
    groups = [1] if stored else sorted({1, channels} | {g for g in sizes if channels % g == 0})
    for form, e, g in itertools.product(forms, filter(None, eps), groups):
        yield Norm(f"evo_{form}", (channels,), e, "weight", "bias", axis=1, groups=g)


def _compute(twin: Any, norm: Norm, act: nn.Module | None, x: Tensor, training: bool) -> Tensor:
    weight, bias, v = (tensor(twin, name) for name in ("weight", "bias", "v"))
    if not norm.apply_act:
        wide = (-1, *(1,) * (x.dim() - 2))
        return x * twin.weight.view(wide) + twin.bias.view(wide)
    how: dict[str, Any] = {"weight": weight, "bias": bias, "eps": norm.eps}
    function = getattr(functional, norm.family.replace("evo_", "evo_norm_"))
    if v is not None:
        how["v"] = v
    if norm.family.startswith("evo_b"):
        how |= {"running_var": None if training else twin.running_var, "training": training}
    else:
        how |= {"groups": norm.groups}
    if norm.family in ("evo_s1", "evo_s2"):
        how["act"] = act
    with backend("reference"):
        return function(x, **how)


def _confirm(twin: nn.Module, found: Norm, act: nn.Module | None, x: Tensor, training: bool) -> set[int]:
    """The ranks of inputs that `twin` takes; raises Unrecognised where it is another norm there."""
    mode = "training" if training else "eval mode"
    before = {name: t.clone() for name, t in twin.named_buffers()}

    def anew(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for name, value in before.items():
            twin.get_buffer(name).copy_(value)
        return compute(x)

    def compute(x: Tensor) -> Tensor:
        return _compute(twin, found, act, x, training)

    ranks = set()
    for other in (x, *channel_batches(x.shape[1], x.device)):
        try:
            y = anew(twin.train(training), other)
        except Exception:  # it need not take inputs of every rank
            continue
        if training and found.statistics:
            _check_moved(twin, found, before["running_var"], other)
        wanted, nudged = anew(compute, other), anew(compute, other * (1 + 2**-22))
        # Where a denominator is a small difference, a last bit of x shows.
        rounding = distance(nudged, wanted, found.span(y))
        if distance(wanted, y, found.span(y)) > max(AGREES, 4 * rounding):
            raise Unrecognised(f"it computes another function than {found.describe()} in {mode}")
        ranks.add(other.dim())
    twin.requires_grad_()
    own = [p for p in twin.parameters(recurse=False)]
    theirs, ours = (lambda x, run=run: anew(run, x) for run in (twin, compute))
    if not gradients_agree(theirs, ours, x, found.span(x), own):
        raise Unrecognised(f"it computes a {found.describe()}, but its gradients in {mode} are not those")
    twin.requires_grad_(False).eval()
    anew(lambda x: x, x)
    return ranks


def _check_moved(twin: Any, found: Norm, before: Tensor, x: Tensor) -> None:
    """Raises Unrecognised where the running variance is not torch's after x, in the manner of a batch norm."""
    momentum = found.momentum if found.apply_act else 0.0
    wanted = torch.lerp(before, x.transpose(0, 1).flatten(1).var(1), momentum or 0.0)
    if distance(twin.running_var, wanted, ()) > _MOMENTUM_AGREES or twin.running_var.isnan().any():
        raise Unrecognised(f"it computes a {found.describe()}, but its running_var moves in another way")
