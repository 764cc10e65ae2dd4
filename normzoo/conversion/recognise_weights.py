"""Convolutions and linear maps: which of them standardize their weight, and how."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..dispatch import backend
from ..layers.weight_standardization import DENOMINATORS
from ..layers.ws_conv import CARRIERS, Standardized
from .candidates import AGREES, GRADIENTS_AGREE, Unrecognised, device_of, gradients_of, numbers
from .norm import Weighted
from .trial import bare, chance, distance, inputs_for, noise, own_tensors, short, undisturbed

LAYERS: dict[type[nn.Module], type[Standardized]] = {cls.torch_class: cls for cls in CARRIERS}
"""torch's layers that have a weight to be standardized, and the layer that does it."""

BESIDES = ("scale", "eps", "gain_init", "same_pad")
"""Attributes of timm's layers that standardize their weight."""

_NONE_KNOWN = "it computes none of the standardized layers known here"


def weighted(module: nn.Module) -> tuple[Weighted | None, str, str]:
    """What a convolution or linear map computes, how that is known, and why it is unknown."""
    cls = parametrize.type_before_parametrizations(module)
    try:
        if "forward" in vars(module):
            raise Unrecognised("its forward was replaced on the instance")
        if any(map(is_lazy, module.parameters())):
            raise Unrecognised("it has no shape yet; run the model once")
        if isinstance(module, Standardized) and cls in CARRIERS:
            how = {"variant": module.variant, "eps": module.ws_eps, "gamma": module.gamma}
            return replace(_plain(module), family="standardized", **how), "class", ""
        base = base_of(module)
        own = [
            name for name in ("forward", "_conv_forward") if getattr(cls, name, 0) is not getattr(base, name, 0)
        ]
        if not own:
            return _plain(module), "class" if cls is base else "subclass", ""
        if parametrize.is_parametrized(module):
            raise Unrecognised("it is parametrized, so that no copy of it can be run")
        return _identify(module, own[0]), "probe", ""
    except Unrecognised as reason:
        return None, "", str(reason)


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of torch that it is, or derives from."""
    return next(base for base in type(module).__mro__ if base in LAYERS)


def settings(module: nn.Module) -> dict[str, Any]:
    """The arguments with which torch's class makes such a layer."""
    names = inspect.signature(base_of(module)).parameters.keys() & vars(module).keys()
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}


def _plain(module: Any) -> Weighted:
    bias = None if module.bias is None else "bias"
    shape = _shape(module)
    if isinstance(module, nn.Linear):
        return Weighted("linear", shape, None, "weight", bias, example=(3, module.in_features))
    # Reflection takes less than there is; a stride shows where there are several steps.
    padding = [0] if isinstance(module.padding, str) else [*module.padding]
    reach = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    sizes = tuple(max(each, *padding) + 3 for each in reach)
    how = {"axis": 1, "groups": module.groups, "dims": len(sizes)}
    return Weighted("convolution", shape, None, "weight", bias, example=(module.in_channels, *sizes), **how)


def _shape(module: Any) -> tuple[int, ...]:
    """That of the weight, which torch's older weight norm computes at every call."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    first, second = module.out_channels, module.in_channels
    if isinstance(module, _ConvTransposeNd):
        first, second = second, first
    return (first, second // module.groups, *module.kernel_size)


def _identify(module: nn.Module, own: str) -> Weighted:
    """The standardized layer that a subclass of torch's with a forward of its own computes."""
    name = type(module).__name__
    if getattr(module, "same_pad", False) is True:
        raise Unrecognised(
            f"{name} pads by the size of its input, as TensorFlow's SAME does, which no layer here does"
        )
    held = {*own_tensors(module)}
    if isinstance(module, _ConvTransposeNd) or not {"weight"} <= held <= {"weight", "bias", "gain"}:
        raise Unrecognised(f"{name} has a {own} of its own, and {_NONE_KNOWN}")
    try:
        with undisturbed():
            twin = _small(module)
            found = _only(twin, name, own)
            _confirm(twin, found, name, own)
    except Unrecognised:
        raise
    except Exception as error:  # the module is code that nobody here has seen
        raise Unrecognised(f"a test run of it failed: {short(error)}") from error
    gamma = 1.0
    if found.variant == "scaled":
        gamma = round(found.gamma * math.prod(_shape(module)[1:]) ** 0.5, 12)  # of 1 / sqrt(n) else it is no 1
    return replace(_plain(module), family="standardized", variant=found.variant, eps=found.eps, gamma=gamma)


def _small(module: nn.Module) -> Any:
    """A copy with few channels and random weights; what it is to replace runs beside it in full size later."""
    twin: Any = bare(module)
    if isinstance(twin, nn.Linear):
        twin.in_features, twin.out_features = min(twin.in_features, 64), min(twin.out_features, 8)
    else:
        groups = min(twin.groups, 2)
        inputs, outputs = (min(each // twin.groups, 8) for each in (twin.in_channels, twin.out_channels))
        twin.in_channels, twin.out_channels, twin.groups = groups * inputs, groups * outputs, groups
    shape, draws, place = _shape(twin), chance(), device_of(module)
    # Rows of many sizes, so that eps shows.
    sizes = 10.0 ** (torch.arange(shape[0], device="cpu") % 4 - 4)
    drawn = {"weight": (noise(shape, draws) + 0.5) * sizes.view(-1, *(1,) * (len(shape) - 1))}
    drawn |= {
        name: noise((shape[0], *t.shape[1:]), draws)
        for name, t in own_tensors(module).items()
        if name != "weight"
    }
    vars(twin)["_parameters"] = {
        name: None
        if t is None
        else nn.Parameter(drawn[name].to("cpu" if place.type == "meta" else place), requires_grad=False)
        for name, t in module._parameters.items()
    }
    return twin.eval()


def _only(twin: Any, name: str, own: str) -> Weighted:
    """The one candidate that computes what `twin` does; its gamma is the whole factor, 1 / sqrt(n) too."""
    plain = _plain(twin)
    x = inputs_for(plain, twin.weight.device)
    y = twin(x)
    wide = (1, -1, *(1,) * (y.dim() - 2)) if plain.axis == 1 else (-1,)
    rows = twin.weight.flatten(1)
    n = rows.shape[1]
    rows = rows - rows.mean(1, keepdim=True)
    squares = rows.square().sum(1)
    # All candidates have this in common, and differ by a factor for each output.
    moved = _applied(twin, rows.view_as(twin.weight), x)
    bias = 0.0 if twin.bias is None else twin.bias.view(wide)
    gain = getattr(twin, "gain", None)
    variants = ("ws", "var", "timm") if gain is None else ("scaled",)
    factors = [1.0, *(v for v in vars(twin).values() if isinstance(v, float) and gain is not None)]
    eps = [*filter(None, numbers(twin)[0]), *(each.eps for each in DENOMINATORS.values())]
    errors: dict[Weighted, float] = {}
    for variant, e, factor in itertools.product(variants, dict.fromkeys(eps), dict.fromkeys(factors)):
        _, correction, outside, _ = DENOMINATORS[variant]
        var = squares / max(n - correction, 1)
        scale = 1 / (var.sqrt() + e if outside else (var + e).sqrt())
        how: dict[str, Any] = {"variant": variant, "eps": e}
        if gain is not None:
            scale = scale * gain.flatten() * factor
            how["gamma"] = factor
        elif variant == "timm" and e == DENOMINATORS["bit"].eps:
            how["variant"] = "bit"
        candidate = replace(plain, family="standardized", **how)
        errors[candidate] = distance(moved * scale.view(wide) + bias, y, plain.span(y))
    fitting = [candidate for candidate, error in errors.items() if error <= AGREES]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise Unrecognised(f"it fits several: {'; '.join(each.describe() for each in fitting[:3])}")
    near = min(errors, key=errors.__getitem__)
    close = f"; the nearest, {near.variant} with eps={near.eps}, is off by {errors[near]:.1e}"
    raise Unrecognised(f"{name} has a {own} of its own, and {_NONE_KNOWN}{close if errors[near] < 0.1 else ''}")


def _applied(twin: Any, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(twin, nn.Linear):
        return F.linear(x, weight)
    return base_of(twin)._conv_forward(twin, x, weight, None)  # type: ignore[attr-defined]


def _confirm(twin: Any, found: Weighted, name: str, own: str) -> None:
    """Raises Unrecognised where `twin` is another function on other inputs, in training, or backward."""
    n = twin.weight[0].numel()
    gamma = found.gamma * math.sqrt(n) if found.variant == "scaled" else 1.0
    how = {"variant": found.variant, "ws_eps": found.eps, "gamma": gamma}
    ours = LAYERS[base_of(twin)](**settings(twin), **how)
    ours._parameters.update(twin.requires_grad_()._parameters)
    x = inputs_for(found, twin.weight.device)
    with backend("reference"):
        for training, more in itertools.product((False, True), (0, 1, 2)):
            other = F.pad(x, (0, more) * (x.dim() - 2), "constant", 0.5) if found.axis == 1 else x[more:]
            wanted = twin.train(training)(other)
            mode = "training" if training else "eval mode"
            if distance(ours.train(training)(other), wanted, found.span(wanted)) > AGREES:
                raise Unrecognised(f"{name} has a {own} of its own, and in {mode} {_NONE_KNOWN}")
            if more:
                continue
            theirs, mine = (gradients_of(each, other, [*twin.parameters()]) for each in (twin, ours))
            # Of x as a whole, of a parameter for each output.
            apart = [
                distance(b, a, tuple(range(i > 0, a.dim())))
                for i, (a, b) in enumerate(zip(theirs, mine, strict=True))
            ]
            if max(apart) > GRADIENTS_AGREE:
                raise Unrecognised(f"{name} has a {own} of its own, whose gradients in {mode} are others")
