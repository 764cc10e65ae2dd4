r"""AdamP and SGDP: Adam and SGD whose momentum does not lengthen weights of which only the direction counts.

Heo, Chun, Oh, Han, Yun, Kim, Uh and Ha, *AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-Invariant Weights*, ICLR 2021, arXiv:2006.08217; code clovaai/AdamP.
The gradient of such a weight is orthogonal to it, in every row (before a batch norm) or as a whole (before a
layer norm), and that is how it is found. Momentum is not: its part along the weight is taken off.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import checks
from .radial import Batch, Group, descend, local, local_grad, placed

LARGEST = 2**24
"""Entries that are worked on at once, which bounds the memory that a step needs."""


class _Projecting(Optimizer):
    """What AdamP and SGDP share: their options, one step, the projection, and state dicts."""

    moments: tuple[str, ...]
    """State that is shaped like the parameter; float32 at least."""
    counts: tuple[str, ...] = ()
    """State that is one number."""

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        name = type(self).__name__
        try:
            self._check(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                if not p.is_floating_point() or p.layout != torch.strided:
                    raise TypeError(
                        f"{name}: a parameter of shape {tuple(p.shape)} is {p.dtype}, {p.layout}; it "
                        "must be dense and of a real floating-point dtype: leave it to another optimizer"
                    )
                if not placed(p):
                    raise TypeError(
                        f"{name}: a parameter of shape {tuple(p.shape)} is sharded by {p.placements}; it must "
                        "be by Shard and Replicate alone: shard one dimension over one dimension of the mesh"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        name, lr = type(self).__name__, group["lr"]
        for argument in ("eps", "weight_decay", "delta", "wd_ratio"):
            checks.not_negative(name, argument, group[argument])
        for argument in ("nesterov", "maximize", "capturable"):
            checks.flag(name, argument, group[argument])
        if not isinstance(lr, Tensor):
            checks.not_negative(name, "lr", lr)
        elif lr.numel() != 1:
            raise ValueError(f"{name}: lr is a tensor of shape {tuple(lr.shape)}; it must have one element")
        self._check_step(group)

    def _check_step(self, group: Group) -> None:
        """What a scheduler, a state dict or a capture may have brought since."""
        name, lr, capturable = type(self).__name__, group["lr"], group["capturable"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and not capturable:
            raise ValueError(
                f"{name}: lr is a tensor on {lr.device}, which a step would have to wait for; pass a "
                "number, or capturable=True"
            )
        if not capturable and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{name}: a step is being captured in a CUDA graph, but capturable is False, so that a replay "
                "would repeat its numbers; pass capturable=True"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returns.

        Raises:
            TypeError: a gradient is sparse. No parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, batch) for group in self.param_groups for batch in self._batches(group)]
        for group, batch in work:
            self._update(group, batch)
        return loss

    def _batches(self, group: Group) -> list[Batch]:
        """The parameters that have a gradient, those of one device and dtype together."""
        self._check_step(group)
        name = type(self).__name__
        batches: list[Batch] = []
        filling: dict[Any, tuple[Batch, int]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise TypeError(
                    f"{name}: a gradient of shape {tuple(p.shape)} is {p.grad.layout}; it must be dense: "
                    "use sparse=False in the embedding, or leave it to torch.optim.SparseAdam"
                )
            batch, entries = filling.get((p.device, p.dtype), ([], 0))
            if not batch or entries + p.numel() > LARGEST:
                batch, entries = [], 0
                batches.append(batch)
            batch.append(p)
            filling[p.device, p.dtype] = batch, entries + p.numel()
        return batches

    def _update(self, group: Group, params: Batch) -> None:
        dtype = checks.statistics_dtype(params[0])
        weights = [local(p).to(dtype) for p in params]
        grads = [local_grad(p).to(dtype) for p in params]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(params[0].device).reshape(()) if group["capturable"] else float(lr)
        states = [self._state(group, p) for p in params]
        state = {name: [local(one[name]) for one in states] for name in (*self.moments, *self.counts)}
        self._move(group, lr, params, weights, grads, state)
        if params[0].dtype != dtype:
            torch._foreach_copy_([local(p) for p in params], weights)

    def _state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        for name in self.moments:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=checks.statistics_dtype(p))
        return state

    def _move(
        self, group: Group, lr: Any, params: Batch, weights: Batch, grads: Batch, state: dict[str, Batch]
    ) -> None:
        """Changes `weights` and `state` in place, which are of one device and dtype."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, of this class or of the authors' class of that name."""
        given: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, last: given.update(last))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch rounds state to the dtype of its parameter, here that would be from float32 to half precision.
        for saved, group in zip(given["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                for name in self.moments:
                    value, dtype = given["state"].get(key, {}).get(name), checks.statistics_dtype(p)
                    if value is not None and p.dtype != dtype:
                        self.state[p][name] = value.to(p.device, dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)  # the authors' classes have fewer


class AdamP(_Projecting):
    r"""Adam, whose step on a scale-invariant weight is orthogonal to it, and decays it less.

    For a parameter W of two dimensions or more with gradient g, seen first as rows, one for each index of its
    first dimension, then as one row:

    .. math::
        \max_i |\cos(g_i, W_i)| < \delta / \sqrt{n}

    over its rows i of n entries says that W is scale-invariant in this view. Then the step loses, row by row,
    its part along W, and weight decay is multiplied by `wd_ratio`. All else is Adam with decoupled decay.
    No step waits for the device.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate; a tensor of one element needs `capturable` if it is not on the CPU.
        betas: weights of the old values in the averages of the gradient and of its square, from 0, below 1.
        eps: added to the denominator of Adam, and to the norm of W in the projection.
        weight_decay: decoupled, as in :class:`torch.optim.AdamW`.
        delta: how far from orthogonal counts as orthogonal; 0 turns the projection off.
        wd_ratio: what multiplies weight decay where there is a projection.
        nesterov: whether the gradient counts ahead in the momentum.
        maximize: ascend instead of descending.
        capturable: keep the count of steps on the device, so that a step can be captured in a CUDA graph.

    Raises:
        ValueError, TypeError: an argument does not fit; a parameter is complex or sparse.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.LayerNorm(8))
    >>> optimizer = AdamP(model.parameters(), lr=1e-2, weight_decay=1e-2)
    >>> model(torch.randn(16, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    moments = ("exp_avg", "exp_avg_sq")
    counts = ("step",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta}
        options |= {"wd_ratio": wd_ratio, "nesterov": nesterov, "maximize": maximize, "capturable": capturable}
        super().__init__(params, options)

    def _check(self, group: Group) -> None:
        super()._check(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_below_one, betas)):
            raise ValueError(
                f"{type(self).__name__}: betas is {betas!r}; it must be two numbers from 0, below 1"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                steps = self.state[p].get("step") if p in self.state else None
                if steps is not None and not isinstance(steps, Tensor):
                    self.state[p]["step"] = torch.tensor(float(steps))

    def _state(self, group: Group, p: Tensor) -> dict[str, Tensor]:
        state, device = super()._state(group, p), p.device if group["capturable"] else torch.device("cpu")
        steps = state.get("step")
        if steps is None:
            state["step"] = torch.zeros((), device=device)
        elif steps.device != device:  # `capturable` has changed, or the state is of the authors' class
            state["step"] = steps.to(device)
        return state

    def _move(
        self, group: Group, lr: Any, params: Batch, weights: Batch, grads: Batch, state: dict[str, Batch]
    ) -> None:
        (beta1, beta2), means, squares, times = (
            group["betas"],
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
        )
        torch._foreach_add_(times, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        # What corrects the start from zero is in the denominator, (sqrt(v / (1 − β2^t)) + eps) (1 − β1^t).
        scales, offsets = _corrections(times, beta1, beta2, group["eps"], weights[0].dtype, group["capturable"])
        below = torch._foreach_sqrt(squares)
        torch._foreach_mul_(below, scales)
        torch._foreach_add_(below, offsets)
        ahead = torch._foreach_lerp(means, grads, 1 - beta1) if group["nesterov"] else means
        steps = list(torch._foreach_div(ahead, below))
        del below, ahead
        descend(group, lr, lr * group["weight_decay"], params, weights, grads, steps)


class SGDP(_Projecting):
    r"""SGD with momentum, whose step on a scale-invariant weight is orthogonal to it, and decays it less.

    How such a weight is found, and what becomes of the step, is as in :class:`AdamP`. The momentum starts from
    zero, so that `dampening` holds for the first step too, unlike in :class:`torch.optim.SGD`; weight decay is
    decoupled and divided by 1 − momentum.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate; a tensor of one element needs `capturable` if it is not on the CPU.
        momentum: weight of the old value; below 1 if there is weight decay.
        dampening: share of the gradient that does not reach the momentum.
        weight_decay: decoupled.
        nesterov: whether the step is the gradient plus `momentum` times the momentum.
        eps: added to the norm of W in the projection.
        delta: how far from orthogonal counts as orthogonal; 0 turns the projection off.
        wd_ratio: what multiplies weight decay where there is a projection.
        maximize: ascend instead of descending.
        capturable: keep a learning rate that is a tensor on the device, for CUDA graphs.
        project_momentum: whether the stored momentum loses its part along W together with the step; False is
            the paper's formula. None is as in the authors' code: True without `nesterov`, False with it.

    Raises:
        ValueError, TypeError: an argument does not fit; a parameter is complex or sparse.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.LayerNorm(8))
    >>> optimizer = SGDP(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> model(torch.randn(16, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    moments = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        maximize: bool = False,
        capturable: bool = False,
        project_momentum: bool | None = None,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        options |= {"nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio}
        options |= {"maximize": maximize, "capturable": capturable, "project_momentum": project_momentum}
        super().__init__(params, options)

    def _check(self, group: Group) -> None:
        super()._check(group)
        name, project = type(self).__name__, group["project_momentum"]
        checks.not_negative(name, "momentum", group["momentum"])
        checks.number(name, "dampening", group["dampening"])
        if project is not None:
            checks.flag(name, "project_momentum", project)
        if project and group["nesterov"]:
            raise ValueError(
                f"{name}: project_momentum is True, but with nesterov the step that is projected is not the "
                "momentum; leave one of the two out"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, of this class, the authors', or :class:`torch.optim.SGD`."""
        state = {}
        for key, held in state_dict["state"].items():
            rest = {name: value for name, value in held.items() if name != "momentum_buffer"}
            buffer = held.get("momentum_buffer")  # None where it had no momentum
            state[key] = rest if buffer is None else {"momentum": buffer} | rest
        super().load_state_dict(state_dict | {"state": state})

    def _check_step(self, group: Group) -> None:
        super()._check_step(group)
        if group["momentum"] == 1 and group["weight_decay"]:
            raise ValueError(
                f"{type(self).__name__}: momentum is 1, but weight_decay is {group['weight_decay']!r}, and "
                "that is divided by 1 - momentum; make one of them smaller"
            )

    def _move(
        self, group: Group, lr: Any, params: Batch, weights: Batch, grads: Batch, state: dict[str, Batch]
    ) -> None:
        momentum, nesterov, project = group["momentum"], group["nesterov"], group["project_momentum"]
        momenta = state["momentum"]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, grads, alpha=1 - group["dampening"])
        steps = list(torch._foreach_add(grads, momenta, alpha=momentum)) if nesterov else momenta
        decay = lr * group["weight_decay"] / (1 - momentum) if group["weight_decay"] else 0.0
        in_place = not nesterov if project is None else project
        descend(group, lr, decay, params, weights, grads, steps, in_place=in_place)


def _below_one(beta: Any) -> bool:
    return isinstance(beta, (int, float)) and 0 <= beta < 1


def _corrections(
    times: Batch, beta1: float, beta2: float, eps: float, dtype: torch.dtype, on_device: bool
) -> tuple[Sequence, Sequence]:
    """(a / sqrt(b), eps · a), a = 1 − β1^t, b = 1 − β2^t, for each t of `times`; numbers or on the device."""
    if on_device:
        t = torch.stack(times).to(dtype)
        # 1 − β^t itself would cancel in the first steps.
        a, b = (-torch.expm1(t * (math.log(beta) if beta else -math.inf)) for beta in (beta1, beta2))
        return (a / b.sqrt()).unbind(), (eps * a).unbind()
    pairs = [(1 - beta1**t, 1 - beta2**t) for t in torch.stack(times).tolist()]
    return [a / math.sqrt(b) for a, b in pairs], [eps * a for a, _ in pairs]
