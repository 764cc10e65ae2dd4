"""Ghost batches and tasks: launchers as operators over `_balance.py`. Statistics are float32 and contiguous."""

from __future__ import annotations

import torch
import triton

from ._balance import follow_ghosts, task_shares, task_shares_grad, task_targets
from ._channel_calls import contiguous
from ._launch import launch
from ._op import op

MOST_TASKS = 1024
"""That a kernel can hold."""


def _follow_like(n, base, rest, m2, keep, total):
    return m2.new_empty(m2.shape[-1]), m2.new_empty(m2.shape[-1])


@op(
    "follow_ghosts(Tensor n, Tensor base, Tensor rest, Tensor m2, float keep, float total) -> (Tensor, Tensor)",
    fake=_follow_like,
)
def follow(n, base, rest, m2, keep, total):
    """(mean, unbiased variance), (C,), averaged over ghost batches (K, C): the last has weight 1 / total, each
    before it `keep` times that of the next."""
    outputs = _follow_like(n, base, rest, m2, keep, total)
    ghosts, channels = m2.shape
    tensors = [contiguous(t) for t in (n, base, rest, m2)]
    numbers = (ghosts, channels, keep, total)
    launch(follow_ghosts, -(-channels // 128), m2.device, *tensors, *outputs, *numbers, E=128, num_warps=1)
    return outputs


def _tile(tasks: int) -> dict[str, int]:
    lanes = triton.next_power_of_2(max(tasks, 16))
    return {"T": lanes, "NB": max(2048 // lanes, 2), "num_warps": 4}


def _shares_like(ids, psi, tensor, ended, values):
    return psi.new_empty(ids.shape, dtype=torch.float32), psi.new_empty((), dtype=torch.float32)


@op(
    "task_shares(Tensor ids, Tensor psi, Tensor? cur, int ended, float values) -> (Tensor, Tensor)",
    fake=_shares_like,
)
def shares(ids, psi, cur, ended, values):
    """(how much a value of each sample counts, what the absent ones of the tasks 0 … ended take with them).

    Args:
        ids: (N,), the task of each sample.
        psi: (tasks,), at most `MOST_TASKS`, logarithms of prior counts.
        cur, ended: the number on the device, or here.
        values: of a sample.
    """
    outputs = _shares_like(ids, psi, cur, ended, values)
    tile = _tile(len(psi))
    grid = -(-len(ids) // tile["NB"])
    tensors = [contiguous(t) for t in (ids, psi, cur)]
    launch(task_shares, grid, psi.device, *tensors, *outputs, len(ids), len(psi), ended, values, **tile)
    return outputs


def _shares_grad_like(dshares, dlost, ids, psi, cur, ended, values):
    return torch.empty_like(psi).contiguous()


@op(
    "task_shares_grad(Tensor? dshares, Tensor? dlost, Tensor ids, Tensor psi, Tensor? cur, int ended,"
    " float values) -> Tensor",
    fake=_shares_grad_like,
)
def shares_backward(dshares, dlost, ids, psi, cur, ended, values):
    """The gradient of psi."""
    dpsi = _shares_grad_like(dshares, dlost, ids, psi, cur, ended, values)
    tensors = [contiguous(t) for t in (ids, psi, cur, dshares, dlost)]
    numbers = (len(ids), len(psi), ended, values)
    launch(task_shares_grad, 1, psi.device, *tensors, dpsi, *numbers, **_tile(len(psi)))
    return dpsi


def _targets_like(mean, var, old_mean, old_var, tracked, rate, decay, first, last):
    to_mean, to_var = (torch.empty_like(mean).contiguous() for _ in range(2))
    return to_mean, to_var, mean.new_empty(() if tracked is not None else 0)


@op(
    "task_targets(Tensor mean, Tensor var, Tensor old_mean, Tensor old_var, Tensor? tracked, float rate,"
    " float decay, float first, float last) -> (Tensor, Tensor, Tensor)",
    fake=_targets_like,
)
def targets(mean, var, old_mean, old_var, tracked, rate, decay, first, last):
    """(where the mean is drawn to, where the variance is, the rate), the last empty without `tracked`.

    tracked: batches before. With it the rate is 1 / (a * first + (a - 1) / last), a = exp(tracked * decay), or
    for last = 0 1 / (tracked + 1).
    """
    outputs = _targets_like(mean, var, old_mean, old_var, tracked, rate, decay, first, last)
    tensors = [contiguous(t) for t in (mean, var, old_mean, old_var, tracked)]
    made = [t if t.numel() else None for t in outputs]
    numbers = (len(mean), rate, decay, first, last)
    launch(task_targets, -(-len(mean) // 128), mean.device, *tensors, *made, *numbers, E=128, num_warps=1)
    return outputs
