"""Plain layers in place of those that standardize their weight or take its mean away, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..centering import ZeroMean, ZeroMeanOutput, unparametrize_alone
from ..layers.weight_standardization import WeightStandardization
from ..layers.ws_conv import CARRIERS, Standardized
from .bypass import raw_weights
from .luggage import bring_along
from .norm import Weighted
from .recognise import Site
from .recognise_weights import BESIDES, LAYERS, base_of, settings
from .report import a, some
from .surgery import Swap, refuse_wrapped

_LEFT = ("weight", "bias", "gain", "variant", "ws_eps", "gamma", "_kept")


def bake(model: nn.Module) -> nn.Module:
    """Store the weights that layers compute in every forward: standardized ones, and those of mean zero.

    For inference: :class:`normzoo.WSConv2d`, :class:`normzoo.WSLinear` and their like become
    :class:`torch.nn.Conv2d`, :class:`torch.nn.Linear` and theirs, in place. The outputs stay, to the last bit,
    in both modes, and so do the keys of the state dict, but for ``gain``, which is part of the weight then.
    Hooks, ``training`` and attributes set by the user come along. A layer under several names stays one.

    Weights that ``normzoo.to_pre_rms_norm(model, zero_mean_writers="parametrize")`` made become parameters
    again, of mean zero and under the names that they had; in eval mode the outputs stay, up to rounding.

    There is no way back, for mean and scale of the weights are gone: bake a copy where training is to go on.

    Args:
        model: any module, itself such a layer perhaps.

    Returns:
        `model`, or the new layer where `model` itself is one.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no such layer, or is wrapped (DDP, FSDP, torch.compile); the weight of one is
            computed by another parametrization; a parent reads the raw weight of one, as a
            :class:`torch.nn.MultiheadAttention` does. The model is left as it was.

    >>> import normzoo
    >>> bake(nn.Sequential(normzoo.WSConv2d(3, 8, 3), nn.GroupNorm(2, 8)))[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"bake: model is {a(type(model).__name__)}; it must be a torch.nn.Module")
    refuse_wrapped(model, "bake", "bake")
    for name, parent in raw_weights(model).items():
        plain = model.get_submodule(name).torch_class.__name__
        raise ValueError(
            f"bake: {name!r} standardizes its weight, but {parent} reads the raw one itself, so that "
            f"outputs would change; put torch's {plain} there"
        )
    baked = {}
    for name, module in model.named_modules():
        if isinstance(module, Standardized):
            try:
                baked[module] = module.bake()
            except ValueError as error:
                raise ValueError(f"bake: {name!r} cannot be baked: {error}") from error
    centered = list(_centered(model))
    if not baked and not centered:
        outputs = [name for name, module in model.named_modules() if isinstance(module, ZeroMeanOutput)]
        if outputs:
            raise ValueError(
                f"bake: what {some(outputs)} return has its mean taken away in every forward, which no weight "
                "can take up; train the model with its LayerNorms, and rewrite it afterwards"
            )
        names = ", ".join(cls.__name__ for cls in CARRIERS)
        raise ValueError(
            f"bake: the model has no layer that standardizes its weight ({names}), and none whose mean is "
            "taken away in every forward"
        )
    for module, name in centered:
        unparametrize_alone(module, name, leave_parametrized=True)
    for old, new in baked.items():
        bring_along(old, new, _LEFT)
    swap = Swap(model, baked)
    swap.do()
    return swap.root


def _centered(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and tensors of theirs that lose their mean in every forward, the last first.

    Raises:
        ValueError: something else is done to such a tensor, too.
    """
    for name, module in model.named_modules():
        chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
        for tensor, chain in reversed(list(chains.items())):
            if not any(isinstance(each, ZeroMean) for each in chain):
                continue
            if len(chain) > 1:
                others = ", ".join(type(each).__name__ for each in chain if not isinstance(each, ZeroMean))
                raise ValueError(
                    f"bake: {f'{name}.{tensor}'.lstrip('.')!r} has other parametrizations too ({others}); "
                    "remove them first"
                )
            yield module, tensor


def baker(site: Site) -> Callable[[], nn.Module] | None:
    """Makes the plain layer in place of one that standardizes its weight; None where `site` does not.

    Those of timm and the like too, and :class:`normzoo.WeightStandardization` as a parametrization. What it
    returns raises ValueError where that cannot be.
    """
    module: Any = site.module
    if parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations["weight"]
        if any(isinstance(each, WeightStandardization) for each in chain):
            return lambda: _unparametrized(module)
    if site.family != "standardized":
        return None
    if isinstance(module, Standardized):
        return lambda: _along(module, module.bake())
    norm = site.norm
    return None if not isinstance(norm, Weighted) else lambda: _along(module, _ours(module, norm).bake())


def _along(old: nn.Module, new: nn.Module) -> nn.Module:
    bring_along(old, new, (*_LEFT, *BESIDES))
    return new


def _ours(module: Any, norm: Weighted) -> Standardized:
    """The layer of this library that computes what one of another library does, with its tensors."""
    how = {"variant": norm.variant, "ws_eps": norm.eps, "gamma": norm.gamma, "device": "meta"}
    made = LAYERS[base_of(module)](**settings(module), **how)
    made._parameters.update(module._parameters)
    return made.train(module.training)


def _unparametrized(module: Any) -> nn.Module:
    """A copy whose weight is the standardized one, stored."""
    if {*module.parametrizations} != {"weight"} or len(module.parametrizations["weight"]) != 1:
        raise ValueError("it has other parametrizations too; remove them first")
    cls: Any = parametrize.type_before_parametrizations(module)
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    trains = module.parametrizations["weight"].original.requires_grad
    weight = nn.Parameter(module.weight.detach().clone(), requires_grad=trains)
    vars(made)["_parameters"] = {"weight": weight, **module._parameters}
    vars(made)["_modules"] = {n: child for n, child in module._modules.items() if n != "parametrizations"}
    return made
