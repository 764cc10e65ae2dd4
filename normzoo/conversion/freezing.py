"""Freezing the batch norms of a model, and giving them back as they were."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..layers.frozen import FrozenBatchNorm
from . import luggage, report
from .examine import examine
from .planning import plan, tell
from .recognise import Site
from .rules import seen
from .surgery import Swap, refuse_wrapped

logger = logging.getLogger("normzoo")

_FAMILIES = ("batch", "ghost_batch", "adab2n")
_ADAPTING = ("alpha_batch", "batch_channel")
"""Families of norms that take statistics of their input in eval mode too, which a frozen norm would not."""


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    r"""Replace every batch norm of a model by a :class:`normzoo.FrozenBatchNorm` with the same values.

    It normalises by the stored statistics whatever the mode, so that ``model.train()`` wakes nothing, and its
    weight and bias are buffers, which do not train. The outputs in eval mode stay as they are. Batch norms are
    those of torch (SyncBatchNorm too), of this library (GhostBatchNorm and AdaB2N too) and whatever computes
    one, such as timm's with an activation, which then follows the frozen norm. The keys of the state dict stay,
    but for AdaB2N's task_weight and cur_tasks, which are away as long as it is frozen. AlphaBatchNorm and
    BatchChannelNorm stay as they are: in eval mode too they depend on statistics of the input.

    :func:`unfreeze_batch_norm` gives back what was there: the old norms are kept for it, out of sight of the
    model. An optimizer that holds their parameters may go on holding them; they get no gradients.

    Args:
        model: any module that holds norms of inputs (N, C, \*), or is one.

    Returns:
        The model, or the new module where the model itself is a norm.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no batch norm that could be frozen, or is wrapped (DDP, FSDP, torch.compile). It is
            left as it is. A norm that cannot be frozen beside others that can, such as one without running
            statistics, stays, and the logger ``normzoo`` warns.

    >>> model = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).train()
    >>> model[1]
    FrozenBatchNorm(8, eps=1e-05)
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias']
    >>> [name for name, _ in unfreeze_batch_norm(model).named_parameters()]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    found = examine(model, "freeze_batch_norm")
    refuse_wrapped(model, "freeze_batch_norm", "freeze")
    if not any(site.family in _FAMILIES for site in found):
        none = (
            "the batch norms of the model are frozen already" if thaw(found) else "the model has no batch norm"
        )
        raise ValueError(f"freeze_batch_norm: {none}{_left(found)}; {seen(found)}")
    meant = {site.module for site in found if site.family in _FAMILIES}
    # Of these the log shall say that they stay.
    meant |= {site.module for site in found if site.norm is None and isinstance(site.module, _NormBase)}
    try:
        made = plan(model, "frozen_batch_norm", where=lambda name, module: module in meant)
    except ValueError as error:
        why = str(error).removeprefix("convert: nothing can be converted; ")
        raise ValueError(f"freeze_batch_norm: none of the batch norms can be frozen; {why}") from error
    root = made.apply()
    for old, frozen, sources in made.replaced():
        # Not as a child: its tensors are none of the model's.
        vars(frozen)[luggage.FROZEN_FROM] = (old, sources)
    tell(made)
    if left := _left(found):
        logger.warning("freeze_batch_norm: the batch norms are frozen%s", left)
    return root


def _left(found: Sequence[Site]) -> str:
    """What to know about norms with stored statistics that are not frozen; empty where there are none."""
    kinds = {site.family: type(site.module).__name__ for site in found if site.family in _ADAPTING}
    if not kinds:
        return ""
    names = " and ".join(kinds.values())
    way = '; convert(model, "frozen_batch_norm", types="alpha_batch") lets the stored statistics count alone'
    stay = f", and {names} stay, for in eval mode too they depend on statistics of the input"
    return stay + (way if "alpha_batch" in kinds else "")


def unfreeze_batch_norm(model: nn.Module) -> nn.Module:
    """Give a model back the batch norms that :func:`freeze_batch_norm` took, with the values of today.

    The very modules return, with class, settings, ``requires_grad``, hooks and activation as they were, in the
    mode that the model is in now, and their parameters are the same objects. Values, dtype and device are those
    of the frozen norms: of a checkpoint that was loaded in between, for example. Without such a change a round
    trip is exact to the last bit. Deep copies and pickled files of a frozen model remember too, state dicts do
    not.

    Norms that were frozen when :func:`freeze_batch_norm` came stay so, as they do in detectors;
    ``convert(model, "batch_norm", types="frozen_batch")`` makes batch norms of those.

    Args:
        model: a model whose batch norms were frozen.

    Returns:
        The model, or the norm where the model itself is one.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no norm that :func:`freeze_batch_norm` froze, or is wrapped. It is left as it is.

    >>> norm = nn.BatchNorm1d(4)
    >>> unfreeze_batch_norm(freeze_batch_norm(norm)) is norm
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"unfreeze_batch_norm: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module"
        )
    refuse_wrapped(model, "unfreeze_batch_norm", "unfreeze")
    frozen = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
    old = {
        module: vars(module)[luggage.FROZEN_FROM] for module in frozen if luggage.FROZEN_FROM in vars(module)
    }
    if not old:
        others = f", though {report.count(len(frozen), 'FrozenBatchNorm')} of other origin" if frozen else ""
        way = thaw(examine(model, "unfreeze_batch_norm"))
        raise ValueError(
            f"unfreeze_batch_norm: the model has no norm that freeze_batch_norm froze{others}"
            + (f"; {way} makes batch norms of frozen ones" if way else "")
        )
    swap = Swap(model, {module: before for module, (before, _) in old.items()})
    for module, (before, sources) in old.items():
        _bring_back(module, before, sources)
    swap.do()
    for module in old:
        del vars(module)[luggage.FROZEN_FROM]
    if left := len(frozen) - len(old):
        logger.info(
            "unfreeze_batch_norm: %s stay, which freeze_batch_norm did not make", report.count(left, "norm")
        )
    return swap.root


def thaw(found: Sequence[Site]) -> str:
    """The call that makes batch norms of the frozen ones among `found`; empty where none is frozen."""
    frozen = [site.module for site in found if site.family == "frozen_batch"]
    if any(luggage.FROZEN_FROM in vars(module) for module in frozen):
        return "unfreeze_batch_norm(model)"
    return 'convert(model, "batch_norm", types="frozen_batch")' if frozen else ""


@torch.no_grad()
def _bring_back(frozen: nn.Module, old: nn.Module, sources: Mapping[str, str]) -> None:
    """Gives `old` the values, the mode and the children of `frozen`; `sources`: its names for their tensors."""
    old.training = frozen.training
    rest = {name: name for name in frozen.state_dict(keep_vars=True) if name not in sources}
    for now, name in (rest | dict(sources)).items():
        value = getattr(frozen, now, None)
        if not isinstance(value, Tensor):
            continue
        if old._buffers.get(name) is not None:
            old._buffers[name] = value
        elif (parameter := old._parameters.get(name)) is not None:
            _set(old, name, parameter, value)
    for name in old._modules.keys() & frozen._modules.keys():
        old._modules[name] = frozen._modules[name]


def _set(old: nn.Module, name: str, parameter: nn.Parameter, value: Tensor) -> None:
    """A parameter stays the object it is, unless it moves to where this cannot be."""
    if (parameter.dtype, parameter.device) == (value.dtype, value.device):
        parameter.copy_(value)
    elif parameter.is_meta == value.is_meta:
        parameter.grad = None  # of the old dtype
        parameter.data = value.detach().clone()
    else:
        old._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)
