"""Rules for norms of rows: LayerNorm, RMSNorm and what goes by other names."""

from __future__ import annotations

import torch
from torch import nn

from .norm import Norm, tensor
from .transfer import Carried, Exactness, Refused, transfer


def of_rows(norm: Norm, module: nn.Module) -> Carried:
    """Shape, eps, weight and bias, as every row norm has them."""
    if norm.offset and norm.weight is None:
        raise Refused(f"it adds {norm.offset:g} to a weight that it does not have")
    if norm.groups != 1:
        raise Refused(f"it normalises {norm.groups} groups of a row one by one, and the layer a row")
    if norm.arguments:
        raise Refused(f"its callers may pass {', '.join(norm.arguments)}, and the layer takes the input alone")
    if norm.shape is None:
        raise Refused("it does not say how wide its rows are, and the layer has to know")
    weight, bias = tensor(module, norm.weight), tensor(module, norm.bias)
    for name, held in ((norm.weight, weight), (norm.bias, bias)):
        if name and held is None:
            raise Refused(f"it has no tensor called {name}")
        if held is not None and tuple(held.shape) != norm.shape:
            raise Refused(f"it normalises {norm.shape} with a {name} of shape {tuple(held.shape)}")
    if bias is not None and weight is None:
        raise Refused("it has a bias and no weight")
    arguments = {
        "normalized_shape": norm.shape,
        "eps": norm.eps,
        "elementwise_affine": weight is not None,
        "bias": bias is not None,
    }
    kept = {"weight": norm.weight, "bias": norm.bias}
    return Carried(
        arguments, {name: source for name, source in kept.items() if source}, over_channels=norm.axis == 1
    )


def add_offset(carried: Carried, norm: Norm, module: nn.Module) -> None:
    """Makes the weight ``offset + weight``, for a layer that has no offset."""
    source = carried.kept.pop("weight")
    carried.converted["weight"] = source, getattr(module, source).detach() + norm.offset


@transfer("layer", "layer_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_rows(norm, module)
    if norm.offset:
        add_offset(carried, norm, module)
        carried.exactness = Exactness.EVAL_EXACT
        carried.note = f"the weight becomes {norm.offset:g} + weight, which weight decay treats differently"
    return carried


@transfer("rms", "rms_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_rows(norm, module)
    carried.arguments |= {"offset": norm.offset, "cast": norm.cast or "torch"}
    return carried


@transfer("crms", "crms_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    if norm.bias:
        raise Refused("it has a bias, and a CRMSNorm has none")
    carried = of_rows(norm, module)
    del carried.arguments["bias"]
    return carried


@transfer("layer", "rms_norm", Exactness.APPROXIMATE, "the mean is no longer taken away")
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_rows(norm, module)
    carried.arguments |= {"offset": norm.offset}
    return carried


@transfer("rms", "layer_norm", Exactness.APPROXIMATE, "the mean is taken away")
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_rows(norm, module)
    if norm.eps is None:
        held = tensor(module, norm.weight)
        double = held is not None and held.dtype == torch.float64
        carried.arguments["eps"] = torch.finfo(torch.float64 if double else torch.float32).eps
    if norm.offset:
        add_offset(carried, norm, module)
    return carried
