"""Rules for norms that adapt: alpha-BN to test data, AdaB2N to tasks, batch-channel norm to batch sizes."""

from __future__ import annotations

from torch import nn

from ..layers.alpha import AlphaBatchNorm
from ..layers.balance import AdaB2N
from ..layers.batch_channel import BatchChannelNorm
from .channels import OF_GHOSTS, add_affine, add_statistics, frozen, moving, of_channels, running
from .norm import Norm
from .transfer import Carried, Exactness, Refused, transfer

_SOURCE = ("source_weight", "test_weight", "pseudo_count")
_OF_ALPHA = ("source_weight", "pseudo_count", "unbiased")
_OF_TASKS = ("num_tasks", "kappa", "init_weight", "absent")
_ALL_OF_TASKS = (*_OF_TASKS, "task_weight", "cur_tasks", "_pulled", "_differentiable")
_OF_STAGES = ("num_groups", "batch_eps", "channel_affine", "estimate", "update_rate", "order")

_MIXED = "in every mode the batch at hand has a part in the statistics, which never move"
_STORED = "with source_weight=1 the stored statistics count alone, in training too, and never move"


def _alpha(norm: Norm, module: nn.Module) -> Carried:
    """What alpha-BN makes of a norm that normalises by stored statistics in eval mode."""
    if len(norm.statistics) < 2:
        raise Refused("it has no running statistics to mix with those of a batch")
    carried = of_channels(norm, module)
    add_affine(carried, norm)
    add_statistics(carried, norm)
    # Not the sync of the norm: ranks that evaluate on their own would wait for each other.
    carried.arguments |= {"num_features": norm.channels, "nonfinite": getattr(module, "nonfinite", "propagate")}
    carried.in_training = ("nonfinite",)
    carried.provided = {"source_weight": 1}
    carried.exactness, carried.note = Exactness.EVAL_EXACT, _STORED
    carried.dropped = (*OF_GHOSTS, *_ALL_OF_TASKS)
    return carried


@transfer("batch", "alpha_batch_norm", Exactness.APPROXIMATE, f"{_MIXED}; eval-exact with source_weight=1")
@transfer(
    "ghost_batch", "alpha_batch_norm", Exactness.APPROXIMATE, f"{_MIXED}; eval-exact with source_weight=1"
)
@transfer("adab2n", "alpha_batch_norm", Exactness.APPROXIMATE, f"{_MIXED}; eval-exact with source_weight=1")
def _(norm: Norm, module: nn.Module) -> Carried:
    return _alpha(norm, module)


@transfer(
    "frozen_batch",
    "alpha_batch_norm",
    Exactness.APPROXIMATE,
    f"{_MIXED}; eval-exact with source_weight=1; weight and bias become parameters, which do not train yet",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _alpha(norm, module)
    carried.note = f"{_STORED}; weight and bias become parameters, which do not train yet"
    for name in ("weight", "bias"):
        source = carried.kept.get(name)
        if source in module._buffers:
            held = getattr(module, source).detach().clone()
            carried.converted[name] = source, nn.Parameter(held, requires_grad=False)
            del carried.kept[name]
    return carried


@transfer("alpha_batch", "alpha_batch_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _alpha(norm, module)
    carried.exactness, carried.note, carried.provided, carried.one_of = None, "", {}, _SOURCE
    if isinstance(module, AlphaBatchNorm):
        carried.arguments |= {"sync": module.sync, "process_group": module.process_group}
        carried.arguments["unbiased"] = module.unbiased
        carried.provided = {name: getattr(module, name) for name in ("source_weight", "pseudo_count")}
        carried.arguments |= {name: value for name, value in carried.provided.items() if value is not None}
    return carried


def _source_alone(module: nn.Module) -> bool:
    return isinstance(module, AlphaBatchNorm) and module.source_weight == 1


@transfer(
    "alpha_batch",
    "batch_norm",
    Exactness.APPROXIMATE,
    "in eval mode the stored statistics count alone, in training the batch's; momentum is 0.1 unless given",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    carried.dropped = _OF_ALPHA
    carried.exactness = Exactness.EVAL_EXACT if _source_alone(module) else None
    return carried


@transfer(
    "alpha_batch", "frozen_batch_norm", Exactness.APPROXIMATE, "the stored statistics count alone, always"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = frozen(norm, module)
    carried.dropped += _OF_ALPHA
    carried.exactness = Exactness.EVAL_EXACT if _source_alone(module) else None
    return carried


def _adab2n(norm: Norm, module: nn.Module) -> Carried:
    carried = moving(norm, module, "AdaB2N")
    add_affine(carried, norm)
    return carried


_BALANCED = "in training tasks are in balance, by ids from normzoo.inputs, and the running variance is biased"


@transfer("batch", "adab2n", Exactness.EVAL_EXACT, _BALANCED)
@transfer("ghost_batch", "adab2n", Exactness.EVAL_EXACT, _BALANCED)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _adab2n(norm, module)
    carried.dropped = OF_GHOSTS
    return carried


@transfer("adab2n", "adab2n", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = _adab2n(norm, module)
    if isinstance(module, AdaB2N):
        carried.arguments |= {name: getattr(module, name) for name in _OF_TASKS}
        carried.kept |= {"task_weight": "task_weight", "cur_tasks": "cur_tasks"}
        carried.in_training += _OF_TASKS
        carried.growing = ("task_weight",)
    return carried


@transfer(
    "adab2n", "batch_norm", Exactness.EVAL_EXACT, "in training it takes no task ids, and weighs samples alike"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = running(norm, module)
    add_affine(carried, norm)
    carried.dropped = _ALL_OF_TASKS
    return carried


@transfer(
    "adab2n", "frozen_batch_norm", Exactness.EVAL_EXACT, "weight, bias and statistics are constants, always"
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = frozen(norm, module)
    carried.dropped += _ALL_OF_TASKS
    return carried


@transfer(
    "batch",
    "batch_channel_norm",
    Exactness.APPROXIMATE,
    "a second stage over groups of channels follows, new; eps is batch_eps from now on",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = moving(norm, module, "the first stage")
    carried.arguments["batch_eps"] = carried.arguments.pop("eps")
    return carried


@transfer(
    "group",
    "batch_channel_norm",
    Exactness.EVAL_EXACT,
    "a first stage goes before, over the batch: the identity at first; training and recalibrate() change it",
)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = of_channels(norm, module)
    carried.kept = {f"channel_{name}": source for name, source in carried.kept.items()}
    carried.arguments |= {"num_features": norm.channels, "num_groups": norm.groups, "channel_affine": "channel"}
    carried.dropped = ("num_channels",)
    carried.begin = _as_identity
    return carried


def _as_identity(layer: nn.Module) -> None:
    """Lets a first stage without weights change nothing in eval mode, up to rounding."""
    if isinstance(layer, BatchChannelNorm) and layer.running_var is not None:
        layer.running_var.fill_(max(1 - layer.batch_eps, 0))


@transfer("batch_channel", "batch_channel_norm", Exactness.EXACT, same=True)
def _(norm: Norm, module: nn.Module) -> Carried:
    carried = moving(norm, module, "the first stage")
    if isinstance(module, BatchChannelNorm):
        carried.arguments |= {name: getattr(module, name) for name in _OF_STAGES}
        carried.kept |= {name: name for name in ("channel_weight", "channel_bias")}
        carried.in_training += ("estimate", "update_rate", "order")
    return carried
