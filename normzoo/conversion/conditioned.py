"""Rules for norms that take more than x: region norms a mask, time-dependent norms the time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.region import RegionNormB
from ..layers.region_learned import RegionNormL
from ..layers.time_dependent import TimeDependentLayerNorm, TimeDependentRMSNorm
from .adapted import bare_class
from .channels import OF_STATISTICS, running
from .norm import Norm, tensor
from .rows import of_rows
from .transfer import Carried, Exactness, Refused, transfer

_OF_BATCH = (*OF_STATISTICS, "affine")
_OF_ROWS = ("normalized_shape", "elementwise_affine", "offset", "cast")

_BY_CALL = ["scale", "shift"]

_BY_MASK = "normzoo.inputs gives the mask"
_BY_TIME = "normzoo.inputs gives t"


def _region(norm: Norm, module: nn.Module) -> Carried:
    """What the regions have of a batch norm that takes the statistics of the batch."""
    carried = running(norm, module)
    arguments = {
        name: carried.arguments[name] for name in ("num_features", "sync", "process_group", "nonfinite")
    }
    carried.arguments = arguments | {"eps": norm.eps}
    carried.attributes, carried.dropped, carried.in_training = {}, _OF_BATCH, ()
    return carried


@transfer(
    "batch",
    "region_norm_b",
    Exactness.APPROXIMATE,
    "hole and rest go by their own statistics of the batch, in eval mode too; both gammas are weight − 1; "
    f"{_BY_MASK}",
    by_options=True,
)
def _(norm: Norm, module: nn.Module, options: Mapping[str, Any]) -> Carried:
    carried = _region(norm, module)
    carried.kept = {"background_beta": norm.bias} if norm.bias else {}
    weight, bias = tensor(module, norm.weight), tensor(module, norm.bias)
    if norm.weight and weight is not None:
        for name in ("foreground_gamma", "background_gamma"):
            carried.converted[name] = norm.weight, weight.detach() - 1
    apart = options.get("separate_beta") is True  # else it is the sum that counts
    if apart and norm.bias and bias is not None:
        carried.converted["foreground_beta"] = norm.bias, bias.detach().clone()
    return carried


@transfer(
    "batch",
    "region_norm_l",
    Exactness.REINITIALISED,
    "it finds two regions by convolutions that start anew, and goes by the batch in eval mode too",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    if norm.dims in (1, 3):
        raise Refused(f"it takes inputs of {norm.dims} spatial dimension(s), and region_norm_l (N, C, H, W)")
    carried = _region(norm, module)
    carried.kept, carried.dropped = {}, (*_OF_BATCH, *(name for name in (norm.weight, norm.bias) if name))
    return carried


def _timed(norm: Norm, module: nn.Module, weight: str, bias: str) -> Carried:
    """A row norm whose weight and bias are both values of a parameter that depends on the time."""
    carried = of_rows(norm, module)
    if norm.shape is None or len(norm.shape) != 1:
        raise Refused(f"it normalises {norm.shape} together, and the layer the last dimension")
    carried.kept, carried.dropped = {}, _OF_ROWS
    carried.arguments = {"dim": norm.shape[0]}
    for name, source, offset in ((weight, norm.weight, norm.offset), (bias, norm.bias, 0.0)):
        held = tensor(module, source)
        for place in ("param0", "param1"):
            if source and held is not None:
                carried.converted[f"{name}.{place}"] = source, (held.detach() + offset).clone()
    return carried


@transfer(
    "layer",
    "time_dependent_layer_norm",
    Exactness.EVAL_EXACT,
    f"the same at every time, until training moves the two values of weight and bias apart; {_BY_TIME}",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _timed(norm, module, "weight", "bias")
    carried.arguments["eps"] = norm.eps
    return carried


@transfer(
    "rms",
    "time_dependent_rms_norm",
    Exactness.APPROXIMATE,
    "its eps, 1e-8 unless given, adds to the root mean square and not inside of the root; the same at every "
    f"time, until training moves the two values of a scale apart; {_BY_TIME}",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _timed(norm, module, "scale", "offset")
    carried.arguments["bias"] = norm.bias is not None
    return carried


def _again(norm: Norm, module: nn.Module) -> Carried:
    """The same layer, with all that it has."""
    _, cls = _LAYERS[norm.family]
    names = [name for name in inspect.signature(cls).parameters if name not in ("device", "dtype")]
    arguments = {name: getattr(module, name) for name in names if name != "bias"}
    if "bias" in names:
        arguments["bias"] = module.offset is not None
    tensors: dict[str, Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
    children = tuple(name for name, _ in module.named_children() if name not in norm.after)
    return Carried(
        arguments,
        {name: name for name in tensors if name.partition(".")[0] not in norm.after},
        dropped=children,
        in_training=("sync", "process_group", "nonfinite"),
        over_channels=norm.axis == 1 and not norm.family.startswith("region"),
    )


_LAYERS: dict[str, tuple[str, type[nn.Module]]] = {
    "region_b": ("region_norm_b", RegionNormB),
    "region_l": ("region_norm_l", RegionNormL),
    "time_layer": ("time_dependent_layer_norm", TimeDependentLayerNorm),
    "time_rms": ("time_dependent_rms_norm", TimeDependentRMSNorm),
}
for _family, (_target, _cls) in _LAYERS.items():
    transfer(_family, _target, Exactness.EXACT, same=True)(_again)


def _adaptive(norm: Norm, module: nn.Module) -> Carried:
    """A norm that its caller gives scale and shift."""
    if norm.weight or norm.bias:
        raise Refused("it has a weight or a bias of its own, and the layer what comes with a call alone")
    if norm.shape is None or len(norm.shape) != 1:
        raise Refused(f"it normalises {norm.shape} together, and the layer the last dimension")
    _, _, *taken = inspect.signature(bare_class(type(module)).forward).parameters
    if not taken or taken != _BY_CALL[: len(taken)]:
        raise Refused(
            f"its callers may pass {', '.join(taken) or 'the input alone'}, and the layer takes "
            f"{', '.join(_BY_CALL)}, in this order"
        )
    return Carried({"dim": norm.shape[0], "eps": norm.eps}, over_channels=norm.axis == 1)


transfer("adaptive_layer", "adaptive_layer_norm", Exactness.EXACT, same=True)(_adaptive)
transfer("adaptive_rms", "adaptive_rms_norm", Exactness.EXACT, same=True)(_adaptive)
transfer("adaptive_layer", "adaptive_rms_norm", Exactness.APPROXIMATE, "the mean is no longer taken away")(
    _adaptive
)
transfer("adaptive_rms", "adaptive_layer_norm", Exactness.APPROXIMATE, "the mean is taken away")(_adaptive)
