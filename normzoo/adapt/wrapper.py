"""A model that adapts as it runs, and goes back."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..conversion import report
from .losses import entropy_loss

logger = logging.getLogger("normzoo")


class Adapted(nn.Module):
    """A model that adapts to what it is shown: every call takes steps on a loss without labels, and answers.

    What comes back are the outputs that the last loss was taken of, before the step that follows from it, as in
    Tent, without a graph. Calls under ``torch.no_grad()`` and ``torch.inference_mode()`` adapt too. Without an
    optimizer the model just runs, with what :func:`configure` made of it, and the outputs keep their graph.

    Args:
        model: what :func:`configure` returned; any other model whose parameters the optimizer has.
        optimizer: steps after each loss; its gradients are zeroed before and after. One whose step needs a
            closure, such as LBFGS, is refused.
        loss: takes what `model` returns, and that alone, and gives a scalar.
        steps: how many passes, losses and steps to a call.
        episodic: whether every call starts from the beginning, with :meth:`reset`.

    A batch whose loss or gradients are NaN or infinite teaches nothing: no step follows from it, the logger
    ``normzoo`` warns, and ``updates_skipped``, which :meth:`reset` leaves alone, counts it. Its outputs come
    back as they are. That look at the gradients waits for the device.

    The state dict holds that of the model under ``model.``; the optimizer has its own.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the optimizer has no parameter that requires grad, or one that is not of the model; `steps`
            is no positive int, or is more than one without an optimizer; the optimizer's step needs a closure;
            the model is, or holds, an Adapted; at a call, the loss is no scalar, or does not depend on what the
            optimizer trains.

    >>> from normzoo.adapt import collect_params, configure
    >>> model = configure(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), train_affine=True)
    >>> params, _ = collect_params(model)
    >>> adapted = Adapted(model, torch.optim.Adam(params, lr=1e-3))
    >>> adapted(torch.randn(8, 4)).shape
    torch.Size([8, 3])
    >>> bool((model[0].weight == 1).any())
    False
    >>> adapted.reset()
    >>> bool((model[0].weight == 1).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        loss: Callable[[Any], Tensor] = entropy_loss,
        *,
        steps: int = 1,
        episodic: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Adapted: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")
        if any(isinstance(module, Adapted) for module in model.modules()):
            raise ValueError(
                "Adapted: the model is wrapped (Adapted) already; pass the model inside, its .model"
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Adapted: optimizer is {report.a(type(optimizer).__name__)}; it must be a "
                "torch.optim.Optimizer"
            )
        if not callable(loss):
            raise TypeError(f"Adapted: loss is {report.a(type(loss).__name__)}; it must be callable")
        checks.positive("Adapted", "steps", steps)
        checks.flag("Adapted", "episodic", episodic)
        if optimizer is None and steps != 1:
            raise ValueError(
                f"Adapted: steps is {steps} and there is no optimizer that could take them; pass one"
            )
        if optimizer is not None:
            _check_step(optimizer)
            _check_parameters(model, optimizer)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.steps, self.episodic = steps, episodic
        self.updates_skipped = 0
        self._start = {name: t.detach().clone() for name, t in self._tensors().items()}
        self._start_of_optimizer = (
            None if optimizer is None else _copied((optimizer.state, optimizer.param_groups))
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.episodic:
            self.reset()
        if self.optimizer is None:
            return self.model(*args, **kwargs)
        output = None
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = pytree.tree_map_only(Tensor, _differentiable, (args, kwargs))
            for _ in range(self.steps):
                output = self.model(*args, **kwargs)
                if not self._step(self.optimizer, self.loss(output)):
                    break
        return pytree.tree_map_only(Tensor, Tensor.detach, output)

    def reset(self) -> None:
        """Put the model and the optimizer back to what they were when they were wrapped, to the last bit.

        Parameters and buffers get their values back in place, so that the optimizer goes on with the same ones.
        Settings of the optimizer, such as lr, go back too; a scheduler keeps its own count. Modes and
        ``requires_grad`` stay as they are.

        Raises:
            ValueError: the model has other tensors now. Nothing is changed.
        """
        now = self._tensors()
        changed = [
            name for name in now.keys() | self._start.keys() if _shape(now, name) != _shape(self._start, name)
        ]
        if changed:
            raise ValueError(
                f"Adapted.reset: the model has changed since it was wrapped "
                f"({', '.join(sorted(changed)[:3])}); wrap it anew"
            )
        with torch.inference_mode(False), torch.no_grad():
            for name, t in now.items():
                t.copy_(self._start[name])
            torch.clear_autocast_cache()
            if self.optimizer is not None and self._start_of_optimizer is not None:
                state, groups = _copied(self._start_of_optimizer)
                self.optimizer.state.clear()
                self.optimizer.state.update(state)
                self.optimizer.param_groups[:] = groups

    def extra_repr(self) -> str:
        optimizer = None if self.optimizer is None else type(self.optimizer).__name__
        loss = getattr(self.loss, "__name__", type(self.loss).__name__)
        return f"optimizer={optimizer}, loss={loss}, steps={self.steps}, episodic={self.episodic}"

    def _tensors(self) -> dict[str, Tensor]:
        return dict((*self.named_parameters(), *self.named_buffers()))

    def _step(self, optimizer: Optimizer, loss: Tensor) -> bool:
        """Whether a step was taken."""
        if not isinstance(loss, Tensor) or loss.dim():
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ValueError(f"Adapted: the loss is of {what}; it must be a scalar tensor, such as a mean")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [p for p in held if p.requires_grad]
        optimizer.zero_grad()
        if trained and loss.requires_grad:
            loss.backward(inputs=trained)
        gradients = [p.grad for p in trained if p.grad is not None]
        if not gradients:
            resting = len(held) - len(trained)
            why = (
                f"{resting} of the optimizer's parameters do not require grad any more; was configure called "
                "again without train_affine=True?"
            )
            raise ValueError(
                "Adapted: the loss does not depend on the parameters that the optimizer trains; "
                + (why if resting else "do the model and the loss keep the graph?")
            )
        good = _all_finite(loss.detach(), *gradients)
        if good:
            optimizer.step()
            torch.clear_autocast_cache()  # or a caller's autocast goes on with the weights of before
        else:
            self.updates_skipped += 1
            logger.warning("Adapted: the loss of a batch, or its gradients, are not finite; no step was taken")
        optimizer.zero_grad()
        return good


def _check_step(optimizer: Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"Adapted: the step of {type(optimizer).__name__} needs a closure, and Adapted has none to "
            "give; use an optimizer that steps without, such as torch.optim.SGD or Adam"
        )


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in held):
        raise ValueError(
            "Adapted: no parameter of the optimizer requires grad; adapt.configure(model, train_affine=True), "
            "then adapt.collect_params(model) for a new optimizer"
        )
    own = {id(p) for p in model.parameters()}
    if strangers := sum(id(p) not in own for p in held):
        raise ValueError(
            f"Adapted: the optimizer has {report.count(strangers, 'parameter')} that the model has not; make "
            "the optimizer after adapt.configure"
        )


def _copied(saved: tuple[Any, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Of the state and the groups of an optimizer; the parameters are the same.

    load_state_dict would cast the state to the dtype of the parameters.
    """
    state, groups = saved
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    copies = [
        {"params": [*group["params"]]} | copy.deepcopy(own) for group, own in zip(groups, settings, strict=True)
    ]
    return {key: copy.deepcopy(value) for key, value in state.items()}, copies


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _differentiable(t: Tensor) -> Tensor:
    """A tensor of torch.inference_mode cannot be saved for a backward pass; a copy can."""
    return t.clone() if t.is_inference() else t


def _all_finite(*tensors: Tensor) -> bool:
    flags = [torch.isfinite(t).all().to(tensors[0].device) for t in tensors]
    return bool(torch.stack(flags).all())
