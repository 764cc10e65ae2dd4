"""Running statistics, estimated anew from data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..layers.alpha import AlphaBatchNorm
from ..layers.balance import AdaB2N
from ..layers.batch_channel import BatchChannelNorm
from ..layers.evo_batch import EvoNormB0, EvoNormB1
from ..layers.mean_square import MeanSquareNorm
from ..layers.power import PowerNorm
from . import report
from .candidates import statistics
from .examine import examine
from .freezing import thaw
from .rules import seen


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | int | None = None,
) -> nn.Module:
    """Estimate the running statistics of a model anew: the plain average over `batches`, in one pass.

    After a conversion that needs it, after averaging weights, or for data of another kind. All layers with
    running statistics take part: batch and instance norms of torch and of this library, their subclasses, and
    whatever has `momentum`, the weight of a batch, and ``reset_running_stats`` or buffers for a mean and a
    variance. AlphaBatchNorm is left out: what it stores are the statistics of the source, which never move.

    During the pass these layers alone are in training mode. All else, dropout above all, is in eval mode, so
    that the statistics are of what the layers see in eval mode. (:func:`torch.optim.swa_utils.update_bn` leaves
    dropout on.) Afterwards modes and momenta are as before; parameters do not change, and num_batches_tracked
    says how many batches there were. A layer that no batch reached keeps what it had. AdaB2N averages with
    equal weights whatever its kappa, and by task ids if `forward` gives them; BatchChannelNorm takes the
    statistics of the batch with estimate=True too, so that a batch must not be too small for that. PowerNorm
    and UnifiedNorm go by the batch, as in warm-up, and keep their statistics of gradients; afterwards `iters`
    is the number of batches at least.

    Args:
        model: any module.
        batches: an iterable of inputs, such as a list or a DataLoader. A tensor is passed as it is, a tuple or
            a list as positional arguments, a mapping as keyword arguments.
        forward: called as ``forward(model, batch)`` instead; where batches hold labels too, for example
            ``lambda model, batch: model(batch[0])``.
        device: where the tensors of a batch go first; None leaves them where they are.

    Returns:
        The model. With layers that have ``sync=True`` all ranks must call it, with as many batches each.

    Raises:
        TypeError: `model` is no module, `batches` is a tensor or cannot be iterated; the model does not take
            what a batch holds.
        ValueError: no layer has running statistics, one is lazy and has not run yet, or there is no batch.
            Whatever is raised, by the model too, statistics and modes are as before.

    >>> model = nn.BatchNorm1d(1)
    >>> recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]).running_mean
    tensor([4.])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recalibrate: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"recalibrate: batches is {report.a(type(batches).__name__)}; it must be an iterable of batches, "
            "such as [x] for one of them"
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"recalibrate: forward is {report.a(type(forward).__name__)}; it must be callable")
    norms = [module for module in model.modules() if _has_running_statistics(module)]
    if not norms:
        found = examine(model, "recalibrate")
        if way := thaw(found):
            raise ValueError(f"recalibrate: the running statistics are frozen: {way} first; {seen(found)}")
        if any(site.family == "alpha_batch" for site in found):
            raise ValueError(
                "recalibrate: the statistics of AlphaBatchNorm are those of the source and never move; for new "
                f'ones call convert(model, "batch_norm", types="alpha_batch") first; {seen(found)}'
            )
        raise ValueError(f"recalibrate: the model has no layer with running statistics; {seen(found)}")
    if any(is_lazy(buffer) for module in norms for buffer in module.buffers(recurse=False)):
        raise ValueError("recalibrate: a lazy norm has no statistics yet; run the model once")
    with _averaging(model, norms):
        count = 0
        for batch in batches:
            count += 1
            _run(model, _to(batch, device), forward)
        if not count:
            raise ValueError("recalibrate: there is no batch; batches is empty, or an iterator that is used up")
    return model


_OF_CLASS = object()
"""Stands for a value that is an attribute of the class."""


def _has_running_statistics(module: nn.Module) -> bool:
    if isinstance(module, AlphaBatchNorm):
        return False
    if isinstance(module, MeanSquareNorm):
        return True
    if isinstance(module, (EvoNormB0, EvoNormB1)):
        return module.apply_act
    if not hasattr(module, "momentum") or getattr(module, "track_running_stats", True) is False:
        return False
    own = [buffer for buffer in module.buffers(recurse=False) if is_lazy(buffer) or buffer.is_floating_point()]
    return bool(own) and (callable(getattr(module, "reset_running_stats", None)) or bool(_stored(module)))


def _stored(module: nn.Module) -> dict[str, float]:
    """The buffers with statistics of a module that cannot reset them, and what they start at."""
    if found := statistics(module):
        return dict(zip((*found, "num_batches_tracked"), (0, 1, 0), strict=True))
    # An EvoNorm of another library has no mean, and without an activation it has no use for the variance.
    alone = "running_var" in module._buffers and getattr(module, "apply_act", True)
    return {"running_var": 1} if alone else {}


@contextlib.contextmanager
def _averaging(model: nn.Module, norms: list[nn.Module]) -> Iterator[None]:
    """The `norms` average what they see; an exception puts back what they had."""
    modes = {module: module.training for module in model.modules()}
    before = {module: _state(module) for module in norms}
    settings: dict[Any, dict[str, Any]] = {
        module: {name: vars(module).get(name, _OF_CLASS) for name in ("momentum", *_meanwhile(module))}
        for module in norms
    }
    runs = dict.fromkeys(norms, 0)
    handles = []

    def about_to_run(module: Any, args: Any) -> None:
        runs[module] += 1
        if "decay" in _meanwhile(module):
            counted = int(module.get_buffer("iters"))  # a batch of padding alone is none
            module.decay = counted / (counted + 1)
        elif "momentum" not in _meanwhile(module):
            module.momentum = 1 / runs[module]  # that of the plain average

    try:
        model.eval()
        for module in settings:
            module.training = True
            for name, value in _meanwhile(module).items():
                setattr(module, name, value)
            _reset(module)
            handles.append(module.register_forward_pre_hook(about_to_run))
        yield
    except BaseException:
        for state in before.values():
            _restore(state)
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for module, before_that in settings.items():
            for name, value in before_that.items():
                if value is _OF_CLASS:
                    vars(module).pop(name, None)
                else:
                    setattr(module, name, value)
    for module, number in runs.items():
        if not number:
            _restore(before[module])
        elif isinstance(module, MeanSquareNorm):
            _stay_in_phase(before[module])


def _meanwhile(module: nn.Module) -> dict[str, Any]:
    """Attributes with which `module` averages plainly; where momentum is not among them, it has to be told."""
    if isinstance(module, AdaB2N):
        return {"kappa": 1.0}  # the weight of a batch is its momentum, then
    if isinstance(module, BatchChannelNorm):
        return {"momentum": None, "update_rate": None}
    if isinstance(module, MeanSquareNorm):
        # In warm-up a PowerNorm has a plain average beside the other; a UnifiedNorm is told its weights.
        return {"warmup_iters": sys.maxsize} | (
            {"alpha_fwd": 1.0} if isinstance(module, PowerNorm) else {"decay": 0.0}
        )
    # To an instance norm momentum=None means no average at all, and so to a norm that counts no batches.
    counts = isinstance(module, _NormBase) and getattr(module, "num_batches_tracked", None) is not None
    return {"momentum": None} if counts and not isinstance(module, _InstanceNorm) else {}


def _stay_in_phase(before: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Gives back what a pass without gradients says nothing of; a warm-up that was over stays over."""
    kept = ("ema_gz", "buffer_gz", "skip_counter")
    _restore([each for each in before if each[1] in kept])
    for module, name, _, value in before:
        if name == "iters":
            now = module.get_buffer(name)
            now.copy_(torch.maximum(now, value))


def _state(module: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    own = module._buffers.items()
    return [(module, name, buffer, buffer.clone()) for name, buffer in own if buffer is not None]


def _restore(state: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, value in state:
        module._buffers[name] = buffer
        buffer.copy_(value)


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_running_stats", None)
    if callable(reset):
        reset()
        return
    for name, start in _stored(module).items():
        if (buffer := module._buffers.get(name)) is not None:
            buffer.fill_(start)


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        try:
            model(*batch)
        except TypeError as error:
            if len(batch) == 1:
                raise
            raise TypeError(
                f"recalibrate: the model, called with the {len(batch)} entries of a batch, raised: {error}; if "
                "not all of them are its inputs (labels?), say how to call it, such as "
                "forward=lambda model, batch: model(batch[0])"
            ) from error
    else:
        model(batch)


def _to(batch: Any, device: Any) -> Any:
    if device is None:
        return batch
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
