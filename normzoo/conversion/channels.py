"""Rules for batch, frozen, ghost, group and instance norms; for those that adapt to data see adapting.py."""

from __future__ import annotations

from torch import nn

from ..layers.ghost import GhostBatchNorm
from ..state import Running
from .norm import Norm, tensor
from .report import a
from .transfer import Carried, Exactness, Refused, transfer

OF_STATISTICS = (
    *("running_mean", "running_var", "num_batches_tracked", "momentum", "track_running_stats"),
    *("sync", "process_group", "nonfinite", "batches_skipped", "num_features"),
)
"""Attributes of a norm with running statistics that mean nothing to one without."""

_OF_GROUPS = ("num_groups", "num_channels")

OF_GHOSTS = ("ghost_batch_size", "split", "stats")

_IN_TRAINING = ("momentum", "sync", "process_group", "nonfinite")


def of_channels(norm: Norm, module: nn.Module) -> Carried:
    """eps, weight and bias, as every norm of channels has them."""
    if norm.arguments:
        raise Refused(f"its callers may pass {', '.join(norm.arguments)}, and the layer takes the input alone")
    if norm.shape is None:
        raise Refused("it does not say how many channels it has, and the layer has to know")
    held = {name: tensor(module, name) for name in (norm.weight, norm.bias, *norm.statistics[:2]) if name}
    for name, value in held.items():
        if value is None:
            raise Refused(f"it has no tensor called {name}")
        if tuple(value.shape) != norm.shape:
            raise Refused(f"it normalises {norm.shape} channels with a {name} of shape {tuple(value.shape)}")
    if norm.bias and not norm.weight:
        raise Refused("it has a bias and no weight")
    kept = {"weight": norm.weight, "bias": norm.bias}
    return Carried({"eps": norm.eps}, {name: source for name, source in kept.items() if source})


def add_affine(carried: Carried, norm: Norm) -> None:
    carried.arguments |= {"affine": norm.weight is not None, "bias": norm.bias is not None}


def add_statistics(carried: Carried, norm: Norm) -> None:
    carried.kept |= dict(
        zip(("running_mean", "running_var", "num_batches_tracked"), norm.statistics, strict=False)
    )


def running(norm: Norm, module: nn.Module) -> Carried:
    """What a norm with running statistics has, or may have."""
    carried = of_channels(norm, module)
    add_statistics(carried, norm)
    stored = len(norm.statistics) >= 2
    carried.arguments |= {"num_features": norm.channels, "momentum": norm.momentum}
    carried.arguments |= {"track_running_stats": stored, "sync": False, "process_group": None}
    carried.arguments["nonfinite"] = "propagate"
    carried.in_training = _IN_TRAINING
    if isinstance(module, (Running, nn.SyncBatchNorm)):
        carried.arguments["process_group"] = module.process_group
        carried.arguments["sync"] = getattr(module, "sync", True)  # torch's class has no such switch
        carried.arguments["nonfinite"] = getattr(module, "nonfinite", "propagate")
    elif named := [base.__name__ for base in type(module).__mro__ if "sync" in base.__name__.lower()]:
        raise Refused(
            f"it is {a(named[0])}, and how it shares statistics with other ranks a test run on one does not "
            "show; make a plain batch norm of it, then convert with sync=True"
        )
    # Switched off after the fact, the statistics rest and are used all the same.
    if stored and getattr(module, "track_running_stats", True) is False:
        carried.attributes["track_running_stats"] = False
    return carried


def _normalized(norm: Norm, module: nn.Module) -> Carried:
    """What a norm of samples keeps of any norm of channels."""
    carried = of_channels(norm, module)
    add_affine(carried, norm)
    carried.dropped = OF_STATISTICS
    return carried


@transfer("batch", "batch_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    return carried


@transfer("group", "group_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_channels(norm, module)
    add_affine(carried, norm)
    carried.arguments |= {"num_groups": norm.groups, "num_channels": norm.channels}
    return carried


@transfer("instance", "instance_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    return carried


@transfer("frozen_batch", "frozen_batch_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = frozen(norm, module)
    if carried.converted:  # statistics were frozen and the weights were not
        carried.exactness = Exactness.EVAL_EXACT
        carried.note = "weight and bias are constants from now on, in training too"
    return carried


@transfer(
    "batch", "frozen_batch_norm", Exactness.EVAL_EXACT, "weight, bias and statistics are constants, always"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    return frozen(norm, module)


def frozen(norm: Norm, module: nn.Module) -> Carried:
    if len(norm.statistics) < 2:
        raise Refused("it has no running statistics, by which a frozen batch norm normalises")
    carried = of_channels(norm, module)
    add_statistics(carried, norm)
    carried.arguments["num_features"] = norm.channels
    carried.dropped = tuple(name for name in OF_STATISTICS if name not in norm.statistics)
    for name in ("weight", "bias"):
        source = carried.kept.get(name)
        if source is None:
            carried.attributes[name] = None
        elif source in module._parameters:
            # A copy: a parameter that somebody else trains must not move a constant.
            carried.converted[name] = source, getattr(module, source).detach().clone()
            del carried.kept[name]
    return carried


@transfer(
    "frozen_batch",
    "batch_norm",
    Exactness.EVAL_EXACT,
    "in training it takes statistics of the batch; weight and bias become parameters that train",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    for name in ("weight", "bias"):
        source = carried.kept.get(name)
        if source in module._buffers:
            carried.converted[name] = source, nn.Parameter(getattr(module, source).detach().clone())
            del carried.kept[name]
    return carried


@transfer("batch", "ghost_batch_norm", Exactness.EVAL_EXACT, "in training it takes statistics of small batches")
def _(norm: Norm, module: nn.Module) -> Carried:
    return _ghost(norm, module)


@transfer("ghost_batch", "ghost_batch_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _ghost(norm, module)
    if isinstance(module, GhostBatchNorm):
        carried.arguments |= {name: getattr(module, name) for name in OF_GHOSTS}
        carried.in_training += OF_GHOSTS
    return carried


def _ghost(norm: Norm, module: nn.Module) -> Carried:
    carried = moving(norm, module, "a ghost batch norm")
    add_affine(carried, norm)
    return carried


def moving(norm: Norm, module: nn.Module, layer: str) -> Carried:
    """As :func:`running`, for a layer whose statistics always move in training."""
    if len(norm.statistics) < 2:
        raise Refused(f"it has no running statistics, by which {layer} normalises in eval mode")
    carried = running(norm, module)
    if "track_running_stats" in carried.attributes:
        raise Refused(f"its running statistics rest, and those of {layer} always move")
    del carried.arguments["track_running_stats"]
    return carried


@transfer(
    "ghost_batch", "batch_norm", Exactness.EVAL_EXACT, "in training it takes statistics of the whole batch"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    carried.dropped = OF_GHOSTS
    return carried


@transfer(
    "ghost_batch",
    "frozen_batch_norm",
    Exactness.EVAL_EXACT,
    "weight, bias and statistics are constants, always",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = frozen(norm, module)
    carried.dropped += OF_GHOSTS
    return carried


@transfer("batch", "group_norm", Exactness.APPROXIMATE, "running statistics are dropped")
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _normalized(norm, module)
    carried.arguments["num_channels"] = norm.channels
    return carried


@transfer("batch", "instance_norm", Exactness.APPROXIMATE, "running statistics are dropped")
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _normalized(norm, module)
    carried.any_rank = norm.dims == 1  # InstanceNorm1d takes (N, C) for one sample
    carried.arguments["num_features"] = norm.channels
    return carried


@transfer(
    "group", "instance_norm", Exactness.EXACT, "for groups of one channel; one value a channel is an error"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_channels(norm, module)
    if norm.groups != norm.channels:
        raise Refused(
            f"its groups have {norm.channels // norm.groups} channels, and an instance norm takes each channel "
            "alone; make it a group_norm"
        )
    add_affine(carried, norm)
    carried.dropped = _OF_GROUPS
    carried.arguments["num_features"] = norm.channels
    return carried


@transfer("instance", "group_norm", Exactness.EXACT, "in groups of one channel; inputs need a batch dimension")
def _(norm: Norm, module: nn.Module) -> Carried:
    if norm.statistics:
        raise Refused("it normalises by running statistics in eval mode, and a group norm has none")
    carried = _normalized(norm, module)
    carried.arguments |= {"num_groups": norm.channels, "num_channels": norm.channels}
    return carried


CALIBRATE = "running statistics start at 0 and 1: normzoo.recalibrate(model, batches) before eval mode"


@transfer("group", "batch_norm", Exactness.CALIBRATE, CALIBRATE)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_channels(norm, module)
    add_affine(carried, norm)
    carried.dropped = _OF_GROUPS
    carried.arguments["num_features"] = norm.channels
    return carried


@transfer("instance", "batch_norm", Exactness.CALIBRATE, f"inputs need a batch dimension; {CALIBRATE}")
def _(norm: Norm, module: nn.Module) -> Carried:
    if norm.statistics:
        carried = running(norm, module)
        carried.exactness = Exactness.EVAL_EXACT
        carried.note = (
            "its running statistics go on, in training those of the batch; inputs need a batch dimension"
        )
    else:
        carried = of_channels(norm, module)
        carried.dropped = ("track_running_stats",)
        carried.arguments |= {"num_features": norm.channels, "momentum": norm.momentum}
    add_affine(carried, norm)
    return carried
