r"""AdaB2N, adaptive balance of batch normalization, for continual learning with replay.

Lyu, Wang, Zhang et al., *Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and
Adaptation*, NeurIPS 2023, arXiv:2310.08855; code lvyilin/AdaB2N. Each task gets the weight that the mean of a
Dirichlet posterior gives it, with the learned prior exp(task_weight) and the samples of the batch for counts.

The authors' code loses the weight of a task that is absent from a batch, so that weights sum to less than one
and the output is not centred; that is ``absent="official"``. The rate of the running averages is a closed form
of num_batches_tracked here, which a checkpoint holds; theirs starts anew when training resumes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, ranks
from ..dispatch import transformed
from ..engine import normalize
from ..moments import Moments
from ..side_inputs import side_input
from ..state import Running, recomputing, snapshot
from . import native
from .tasks import shares_of, target, targets_by_kernel

ABSENT = ("renormalize", "official")

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def adab2n(
    x: Tensor,
    task_ids: Tensor | None = None,
    task_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    absent: str = "renormalize",
    cur_tasks: int | Tensor | None = None,
) -> Tensor:
    r"""y = weight · (x − mean) / sqrt(var + eps) + bias, statistics over the batch with tasks in balance.

    Args:
        x: (N, C, \*) or (N, C), contiguous or channels_last, any real floating dtype.
        task_ids: (N,) of an integer dtype, the task of every sample, counted from 0; None weighs samples alike.
        task_weight: (tasks,), the logarithm of the prior count of every task; needed with `task_ids`.
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to the biased variance; positive.
        absent: as in :class:`AdaB2N`.
        cur_tasks: tasks that have ended, for ``absent="official"``; by default all others than the last.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> x, ids = torch.tensor([[0.0], [0.0], [0.0], [8.0]]), torch.tensor([0, 0, 0, 1])
    >>> adab2n(x, ids, torch.tensor([20.0, 20.0])).flatten()  # of equal weight, however many they are
    tensor([-1.0000, -1.0000, -1.0000,  1.0000])
    """
    checks.channels("adab2n", x, None, weight=weight, bias=bias)
    checks.eps("adab2n", eps)
    checks.choice("adab2n", "absent", absent, ABSENT)
    if task_ids is not None and task_weight is None:
        raise ValueError(
            "adab2n: task_ids are given and task_weight is None; it needs the weight of every task"
        )
    if not (cur_tasks is None or isinstance(cur_tasks, (int, Tensor))) or isinstance(cur_tasks, bool):
        raise TypeError(
            f"adab2n: cur_tasks is {cur_tasks!r}; it must be how many tasks have ended, an int or a tensor"
        )
    return _with_balance("adab2n", x, task_ids, task_weight, weight, bias, eps, absent, cur_tasks)[0]


def _with_balance(
    layer: str,
    x: Tensor,
    task_ids: Tensor | None,
    task_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    absent: str,
    cur_tasks: int | Tensor | None,
    sync: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Any]]:
    """(y, (mean, biased variance, count)) with the statistics of the batch, across ranks with `sync`."""
    sync = sync and ranks.size(process_group) > 1
    if not sync:
        checks.several_values(layer, x, " or eval mode")
    if task_weight is not None:
        _check_task_weight(layer, x, task_weight)
        if task_ids is not None:
            _check_ids(layer, x, task_ids, task_weight)

    def combine(m: Moments):
        if task_ids is None or task_weight is None:
            batch, lost = m, None
        else:
            ended = len(task_weight) - 1 if cur_tasks is None else cur_tasks
            ended = ended if absent == "official" else -1
            group = (process_group,) if sync else None
            # By samples, whatever the size of their maps is on this rank.
            values = max(x.shape[2:].numel(), 1)
            shares, lost = shares_of(m, task_ids, task_weight, ended, values, group)
            batch = m.over_batch(shares)
        batch = batch.across_ranks(process_group) if sync else batch
        if lost is not None and absent == "official":
            batch = batch.less(lost)
        scale, shift = batch.standardize(weight, bias, eps)
        if task_ids is None and task_weight is not None:
            shift = shift + task_weight[:0].sum()  # a gradient of zero rather than none, for DDP
        count = batch.sets.count if sync else x.numel()
        return scale, shift, (batch.sets.mean, batch.sets.var, count)

    return normalize(x, combine, per_sample=task_ids is not None)


def _check_task_weight(layer: str, x: Tensor, task_weight: Tensor) -> None:
    if not isinstance(task_weight, Tensor) or not task_weight.is_floating_point():
        what = task_weight.dtype if isinstance(task_weight, Tensor) else f"of type {type(task_weight).__name__}"
        raise TypeError(f"{layer}: task_weight is {what}; it must be a tensor of a real floating-point dtype")
    if task_weight.dim() != 1:
        raise ValueError(
            f"{layer}: task_weight has shape {tuple(task_weight.shape)}; it must be (tasks,), one for each task"
        )
    checks.same_device(layer, "task_weight", task_weight, x)


def _check_ids(layer: str, x: Tensor, task_ids: Tensor, task_weight: Tensor) -> None:
    if not isinstance(task_ids, Tensor) or task_ids.dtype not in _INTEGERS:
        what = task_ids.dtype if isinstance(task_ids, Tensor) else f"of type {type(task_ids).__name__}"
        raise TypeError(f"{layer}: task_ids is {what}; it must be a tensor of integers")
    if task_ids.shape != x.shape[:1]:
        raise ValueError(
            f"{layer}: task_ids has shape {tuple(task_ids.shape)} but the input has shape {tuple(x.shape)}; it "
            f"must be ({x.shape[0]},), one task for each sample"
        )
    checks.same_device(layer, "task_ids", task_ids, x)
    # A look at ids that live on a device would wait for it; there strangers make the output NaN.
    seen = type(task_ids) is Tensor and task_ids.device.type == "cpu" and task_ids.numel()
    if seen and not (torch.compiler.is_compiling() or transformed()):
        low, high = (int(t) for t in task_ids.aminmax())
        if low < 0 or high >= len(task_weight):
            raise ValueError(
                f"{layer}: task_ids go from {low} to {high}; they must be from 0 to {len(task_weight) - 1}, "
                f"for the {len(task_weight)} tasks it was made for"
            )


class AdaB2N(Running):
    r"""Batch normalization that balances the statistics of old and new tasks, for continual learning with
    replay.

    In training the task k of a sample counts with the weight (exp(task_weight[k]) + n_k) / Σ_j (...), n_k the
    samples of k in the batch and j the tasks that are there; the weight of a task is shared by its samples.
    Eval mode is batch norm by the running statistics, and knows no tasks. Input (N, C, \*) or (N, C), output
    alike in shape, dtype and memory format.

    Task ids come with the call or from ``with continual.tasks(model, task_ids)``, and hold for that call alone;
    a batch without ids weighs its samples alike. Current and replayed samples belong into one batch, and the
    ids of all layers are those of the batch.

    State: that of :class:`torch.nn.BatchNorm2d`, `task_weight` and `cur_tasks`, as in the authors' checkpoints,
    which load. Unlike batch norm, the running variance averages biased variances, as in the paper's code.

    Args:
        num_features: channels, C.
        num_tasks: how many tasks there will be.
        eps: added to the biased variance; positive.
        momentum: weight of a batch in the running statistics where kappa is 1; above 0.
        kappa: from 1 (an exponential average) to 0 (the plain average of all batches); between them the weight
            begins at momentum^kappa and falls to 1 − (1 − momentum)^kappa.
        init_weight: start value of task_weight, the logarithm of the prior count of a task.
        affine: whether there are a weight and a bias.
        absent: ``"renormalize"``: weights of the tasks in the batch sum to one; ``"official"``: a task that was
            seen before and is absent from the batch keeps its weight to itself, which shrinks mean and
            variance.
        sync: take statistics and counts over all ranks of `process_group` (one more gather, for the counts).
            All ranks have task ids, or none has.
        process_group, nonfinite: as in :class:`normzoo.BatchNorm2d`.
        bias: whether an affine layer has a bias.

    Attributes:
        cur_tasks: how many tasks have ended, a buffer; :meth:`end_task` counts. It makes a difference for
            ``absent="official"`` alone.

    An id that is none of 0 … num_tasks − 1 is an error where the ids are on the CPU; elsewhere, and in a
    compiled graph, a look at them would stop the device, and the output for such a batch is NaN instead.

    Activation checkpointing with use_reentrant=False gives the gradients of the plain layer, with :attr:`loss`
    too. Under torch.compile it is an error, of Dynamo or of the backward pass.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> layer = AdaB2N(1, num_tasks=2, init_weight=20.0)
    >>> x, ids = torch.tensor([[0.0], [0.0], [0.0], [8.0]]), torch.tensor([0, 0, 0, 1])
    >>> layer(x, ids).detach().flatten()
    tensor([-1.0000, -1.0000, -1.0000,  1.0000])
    >>> layer.running_mean  # 0.1 of the way to 4, the middle between the tasks
    tensor([0.4000])
    """

    side_inputs = ("task_ids",)
    cur_tasks: Tensor

    def __init__(
        self,
        num_features: int,
        num_tasks: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        kappa: float = 1.0,
        init_weight: float = 0.0,
        affine: bool = True,
        absent: str = "renormalize",
        *,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        checks.positive("AdaB2N", "num_tasks", num_tasks)
        checks.momentum("AdaB2N", momentum, average=False)
        if momentum == 0:
            raise ValueError("AdaB2N: momentum is 0; it must be positive, or the running statistics never move")
        checks.share("AdaB2N", "kappa", kappa)
        checks.number("AdaB2N", "init_weight", init_weight)
        checks.choice("AdaB2N", "absent", absent, ABSENT)
        self.num_tasks, self.kappa, self.init_weight, self.absent = num_tasks, kappa, init_weight, absent
        self._pulled: tuple[tuple[Tensor, Tensor], ...] = ()
        """Mean and variance of the last batch in training, each with where it is drawn to."""
        self._differentiable = True
        options = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.task_weight = nn.Parameter(
            torch.full((num_tasks,), float(init_weight), device=device, dtype=dtype)
        )
        self.register_buffer("cur_tasks", torch.zeros((), dtype=torch.long, device=device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._pulled = ()
        if "task_weight" in self._parameters:  # torch's constructor calls this before there is one
            nn.init.constant_(self.task_weight, self.init_weight)
            self.cur_tasks.zero_()

    @property
    def loss(self) -> Tensor | None:
        """The paper's regulariser, of the last forward pass in training: the mean over channels of the squared
        distances of mean and variance of the batch from the running ones, which are constants. None before.

        Raises:
            RuntimeError: that pass ran without gradients, and this is asked for with gradients.
        """
        if not self._pulled:
            return None
        if not self._differentiable and torch.is_grad_enabled():
            raise RuntimeError(
                "AdaB2N: its last forward pass in training ran without gradients (torch.no_grad, or activation "
                "checkpointing with use_reentrant=True), so that the loss would train nothing; use "
                "use_reentrant=False, or read it under torch.no_grad"
            )
        of_mean, of_var = ((found - target).square().mean() for found, target in self._pulled)
        return of_mean + of_var

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy or a file has no part in the graph of the last pass.
        return {**vars(self), "_pulled": ()}

    def forward(self, x: Tensor, task_ids: Tensor | None = None) -> Tensor:
        checks.channels("AdaB2N", x, self.num_features, weight=self.weight)
        if not self.training:
            return native.with_stored(x, self._stored(), self.weight, self.bias, self.eps)
        if task_ids is None:
            task_ids = side_input(self, "task_ids", required=False)
        parameters = (self.task_weight, self.weight, self.bias, self.eps, self.absent, self.cur_tasks)
        how = (*parameters, self.sync, self.process_group)
        y, (mean, var, count) = _with_balance("AdaB2N", x, task_ids, *how)
        if not recomputing():
            if transformed():  # of which nothing may stay behind
                rate = self._rate(mean.dtype)
            else:
                *to, rate = self._targets(mean, var, count)
                self._differentiable = torch.is_grad_enabled()
                self._pulled = tuple(zip((mean, var), to, strict=True))
            self._track(mean, var, count, factor=rate)
        return y

    @torch.no_grad()
    def end_task(self) -> None:
        """The current task is over. Call it once after each task; :func:`normzoo.continual.end_task` does it
        for a model.

        Raises:
            ValueError: all tasks have ended.
        """
        if int(self.cur_tasks) >= self.num_tasks:
            raise ValueError(
                f"AdaB2N: all of its {self.num_tasks} tasks have ended; normzoo.convert(model, "
                '"adab2n", num_tasks=...) makes room for more'
            )
        self.cur_tasks += 1

    def extra_repr(self) -> str:
        own = f"num_tasks={self.num_tasks}, kappa={self.kappa}, absent={self.absent!r}"
        return f"{super().extra_repr()}, {own}"

    def _targets(self, mean: Tensor, var: Tensor, count: Any) -> tuple[Tensor, Tensor, float | Tensor]:
        """Where mean and variance are drawn to, and the rate of this batch."""
        stored, falls = self._stored(), self._falls()
        tracked = self.num_batches_tracked if falls else None
        found = targets_by_kernel(mean, var, stored, tracked, self.momentum or 0.0, self.kappa, count)
        if found is not None:
            return found
        rate = self._rate(mean.dtype)
        to_mean, to_var = (target(old, new, rate, count) for old, new in zip(stored, (mean, var), strict=True))
        return to_mean, to_var, rate

    def _falls(self) -> bool:
        """Whether the rate depends on the number of batches."""
        return (
            self.num_batches_tracked is not None and self.kappa != 1 and (self.momentum != 1 or not self.kappa)
        )

    def _rate(self, dtype: torch.dtype = torch.float32) -> float | Tensor:
        """The weight of this batch in the running statistics: 1/η_t = a^(t−1) / m^κ + (1 − a^(t−1)) / (1 − a),
        a = (1 − m)^κ, the closed form of η_1 = m^κ, η_t = η_{t−1} / (η_{t−1} + a)."""
        momentum, kappa, tracked = self.momentum or 0.0, self.kappa, self.num_batches_tracked
        if tracked is None or not self._falls():
            return momentum
        before = snapshot(tracked).to(dtype)
        if kappa == 0:
            return 1 / (before + 1)
        decay = kappa * math.log1p(-momentum)
        left = torch.exp(before * decay)
        return 1 / (left * momentum**-kappa + torch.expm1(before * decay) / math.expm1(decay))
