"""AdaB2N layers, batches of tasks and the formula, for the tests of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training import tensors

from normzoo import AdaB2N

C, TASKS = 4, 3
ABSENT = ("renormalize", "official")
IDS = {
    "all there": [0, 1, 1, 2, 0, 0],
    "one absent": [0, 2, 2, 2, 0, 2],
    "the last alone": [2] * 6,
    "one of them new": [1, 1, 0, 1, 1, 1],
}

per_absent = pytest.mark.parametrize("absent", ABSENT)
per_ids = pytest.mark.parametrize("ids", [torch.tensor(ids) for ids in IDS.values()], ids=IDS)


def by_hand(x, ids, psi, weight, bias, ended: int, eps: float = 1e-5):
    """(y, mean, var), task after task; a task up to `ended` counts where it is absent, too."""
    n = [int((ids == k).sum()) for k in range(len(psi))]
    concentration = [psi[k].exp() + n[k] for k in range(len(psi)) if n[k] or k <= ended]
    share = [(psi[k].exp() + n[k]) / sum(concentration) for k in range(len(psi))]
    rows = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    each = [share[k] / n[k] for k in ids.tolist()]
    mean = sum(w * row.mean(1) for w, row in zip(each, rows, strict=True))
    var = sum(w * (row - mean[:, None]).square().mean(1) for w, row in zip(each, rows, strict=True))
    wide = [t.view(-1, *(1,) * (x.dim() - 2)) for t in (mean, (var + eps).rsqrt() * weight, bias)]
    return (x - wide[0]) * wide[1] + wide[2], mean, var


def regulariser(mean, var, running_mean, running_var, rate):
    """Against the running statistics after they have moved."""
    total = 0.0
    for new, old in ((mean, running_mean), (var, running_var)):
        total = total + (new - ((1 - rate) * old + rate * new).detach()).square().mean()
    return total


def make(dtype=torch.float64, **options) -> AdaB2N:
    """In the middle of its second task, with parameters and buffers that are not those of the start."""
    layer = AdaB2N(C, TASKS, **options).to(dtype)
    with torch.no_grad():
        for t in layer.parameters():
            t.add_(torch.randn(t.shape) / 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    layer.num_batches_tracked += 6
    layer.end_task()
    return layer


def sample(*shape: int, dtype=torch.float64) -> Tensor:
    """(6, C, *shape), samples of different means."""
    shape = (6, C, *(shape or (2, 3)))
    return (torch.randn(shape) + 2 * torch.randn(6, C, *(1,) * (len(shape) - 2)) + 3).to(dtype)


def stream(dtype=torch.float32):
    """Batches of five steps, the third with a task that is not there and the fourth without ids."""
    ids = [torch.tensor(k) for k in IDS.values()]
    return list(zip([sample(dtype=dtype) for _ in range(5)], [*ids[:3], None, ids[3]], strict=True))


def train(layer: AdaB2N, call, batches, optimizer=None, end: int = 2) -> dict[str, Tensor]:
    """A step a batch with the loss, task `end` steps in over; all there is to see."""
    optimizer = optimizer or torch.optim.SGD(layer.parameters(), lr=0.02)
    found = {}
    for i, (x, ids) in enumerate(batches):
        if i == end:
            layer.end_task()
        x = x.clone().requires_grad_()
        optimizer.zero_grad()
        y = call(x, ids)
        y, loss = y if isinstance(y, tuple) else (y, layer.loss)
        (y.pow(3).sum() + 0.5 * loss).backward()
        found |= {f"{i}: y": y.detach(), f"{i}: loss": loss.detach(), f"{i}: dx": x.grad}
        found |= {f"{i}: d{name}": p.grad.clone() for name, p in layer.named_parameters()}
        optimizer.step()
        found |= {f"{i}: {name}": t for name, t in tensors(layer).items()}
    return found
