"""Task streams: what the layers of a model have to be told when tasks follow each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conversion import luggage, report
from .layers.balance import AdaB2N
from .side_inputs import inputs


def tasks(model: nn.Module, task_ids: Tensor) -> inputs:
    """The task of every sample, for a ``with`` block: :class:`normzoo.inputs` with `task_ids`.

    Args:
        model: the model that is called inside the block, wrapped or not.
        task_ids: (N,) of an integer dtype, counted from 0, where the batch is.

    Raises:
        TypeError: `model` is no module, or `task_ids` no tensor of integers.
        ValueError: no layer of `model` takes them.

    >>> import torch
    >>> from normzoo import AdaB2N
    >>> model, x = AdaB2N(1, num_tasks=2, init_weight=20.0), torch.tensor([[0.0], [0.0], [0.0], [8.0]])
    >>> with tasks(model, torch.tensor([0, 0, 0, 1])):
    ...     model(x).detach().flatten()
    tensor([-1.0000, -1.0000, -1.0000,  1.0000])
    """
    _check("tasks", model)
    if not isinstance(task_ids, Tensor):
        raise TypeError(
            f"continual.tasks: task_ids is {report.a(type(task_ids).__name__)}; it must be a torch.Tensor"
        )
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise TypeError(f"continual.tasks: task_ids is {task_ids.dtype}; it must be a tensor of integers")
    if not any("task_ids" in getattr(module, "side_inputs", ()) for module in model.modules()):
        raise ValueError(f"continual.tasks: no layer of the model takes task ids; {_way(model)}")
    return inputs(model, task_ids=task_ids)


def end_task(model: nn.Module) -> None:
    """Tell every :class:`normzoo.AdaB2N` of `model` that the current task is over; once after each task.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no such layer, or one whose tasks have all ended. No layer is changed.

    >>> from normzoo import AdaB2N
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), AdaB2N(4, num_tasks=2))
    >>> end_task(model)
    >>> model[1].cur_tasks
    tensor(1)
    """
    layers = _balanced("end_task", model)
    over = [name or "the model itself" for name, layer in layers.items() if layer.cur_tasks >= layer.num_tasks]
    if over:
        raise ValueError(
            f"continual.end_task: all tasks of {report.count(len(over), 'layer')} have ended "
            f'({", ".join(over[:3])}); normzoo.convert(model, "adab2n", num_tasks=...) makes '
            "room for more"
        )
    for layer in layers.values():
        layer.end_task()


def regularizer(model: nn.Module) -> Tensor:
    """The sum of :attr:`normzoo.AdaB2N.loss` over the layers of a model, after a forward pass in training.

    The paper adds it to the loss of the task, times a factor, in steps with replay: it pulls the statistics of
    batches to the running ones. It belongs to the last forward pass: of several, take it after each.

    Returns:
        A scalar with a graph. Layers that have not run in training are left out.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no such layer, or none of them has run in training.
        RuntimeError: a layer ran without gradients.

    >>> import torch
    >>> from normzoo import AdaB2N
    >>> model = nn.Sequential(AdaB2N(1, num_tasks=2), AdaB2N(1, num_tasks=2))
    >>> y = model(torch.tensor([[1.0], [3.0]]))
    >>> regularizer(model)  # (0.9 · 2)² of the first mean and nothing else
    tensor(3.2400, grad_fn=<AddBackward0>)
    """
    layers = _balanced("regularizer", model)
    losses = [loss for layer in layers.values() if (loss := layer.loss) is not None]
    if not losses:
        raise ValueError(
            "continual.regularizer: no layer has run in training yet; run the model in training mode first"
        )
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def _balanced(function: str, model: nn.Module) -> dict[str, AdaB2N]:
    _check(function, model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaB2N)}
    if not layers:
        raise ValueError(f"continual.{function}: the model has no AdaB2N; {_way(model)}")
    return layers


def _way(model: nn.Module) -> str:
    """What to do for a model without AdaB2N."""
    frozen = (vars(module).get(luggage.FROZEN_FROM) for module in model.modules())
    if any(isinstance(of[0], AdaB2N) for of in frozen if of):
        return "AdaB2N that it had are frozen; normzoo.unfreeze_batch_norm(model) brings them back"
    return 'normzoo.convert(model, "adab2n", num_tasks=...) puts them in place of its batch norms'


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"continual.{function}: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module"
        )
