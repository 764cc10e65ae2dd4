"""The training step of a small language model, with torch's norms and with normzoo's: the time of the whole."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normzoo
from normzoo.zoo import find

from . import checks
from .clocks import Rotation
from .measure import Settings, forget_compiled, timed
from .results import Document

CONTENDERS = ("torch", "normzoo", "torch.compile", "normzoo-compiled", "normzoo-opaque")
"""Compiled, normzoo is fused with its neighbours; opaque, its kernels are operators that are not."""


@dataclass(frozen=True)
class Step:
    layer: str
    blocks: int
    shape: tuple[int, int, int]
    """Sequences, tokens, width."""

    @property
    def key(self) -> dict:
        workload = f"gpt-{self.blocks}x{'x'.join(map(str, self.shape))}"
        form = {"dtype": "bfloat16", "memory_format": "contiguous", "mode": "training"}
        return {"layer": self.layer, "workload": workload, "shape": list(self.shape), **form}

    def __str__(self) -> str:
        return f"{self.layer} {self.key['workload']} step"


def steps(device: str, layers: Sequence[str]) -> list[Step]:
    size = (4, (8, 1024, 2048)) if device == "cuda" else (1, (2, 8, 32))
    return [Step(layer, *size) for layer in layers]


class Block(nn.Module):
    """Pre-norm attention with normalized queries and keys, then a perceptron."""

    def __init__(self, d: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.head = min(d, 128)
        self.norm1, self.norm2 = norm(d, eps=1e-6), norm(d, eps=1e-6)
        self.norm_q, self.norm_k = norm(self.head, eps=1e-6), norm(self.head, eps=1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (self.norm_q(q), self.norm_k(k), v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def measure_step(step: Step, settings: Settings, document: Document) -> None:
    """Adds the rows of the step to `document`, direction ``step``, by the clock that counts the host's work."""
    forget_compiled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = find(step.layer).torch_class
        model = nn.Sequential(*(Block(step.shape[-1], norm) for _ in range(step.blocks)))
        x, target = torch.randn(2, *step.shape).to(settings.device, torch.bfloat16)
    model.to(x)
    exact = _results(copy.deepcopy(model).double(), x.double(), target.double())
    allowed = {name: checks.LARGEST_ERROR[x.dtype] for name in exact}
    rows, rotations = [], []
    for name in settings.contenders:
        if settings.late:
            document.not_run.append(f"{step} {name}")
            continue
        try:
            own, context = _built(name, step.layer, model)
            with context():
                found = _results(own, x, target)
            error = {what: checks.relative_error(what, t, exact[what]) for what, t in found.items()}
            if name == "torch":
                allowed = {what: max(most, 2 * error[what]) for what, most in allowed.items()}
            checks.demand(error, allowed)
            run = _stepper(own, x, target, context)
            run(0)  # the state of the optimizer is no part of the memory of a step
            peak = checks.peak_bytes(lambda run=run: run(0), settings.device)
        except Exception as failure:
            document.add_failed(step, name, failure, "step")
            continue
        rotations.append(Rotation(run, 1))
        rest = {"saved_bytes": None, "peak_bytes": peak, "launches": None, "bytes": None, "cold": True}
        rows.append({**step.key, "contender": name, "runs": "", "direction": "step", "error": error, **rest})
    document.rows += timed(step, settings.clocks[-1], rows, rotations, settings.rounds, document)


def _built(name: str, layer: str, model: nn.Module) -> tuple[nn.Module, Callable]:
    own = copy.deepcopy(model)
    if name.startswith("normzoo"):
        normzoo.convert(own, layer)
    if name not in ("torch", "normzoo"):
        for block in own.children():
            block.compile(dynamic=False, fullgraph=True)
    return own, partial(normzoo.backend, "triton") if name == "normzoo-opaque" else contextlib.nullcontext


def _results(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(F.mse_loss(y, target), x)
    return {"y": y.detach(), "dx": dx}


def _stepper(model: nn.Module, x: Tensor, target: Tensor, context: Callable) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x = x.detach().requires_grad_()  # as what an embedding gives

    def run(_: int) -> None:
        optimizer.zero_grad()
        x.grad = None
        with context():
            F.mse_loss(model(x), target).backward()
        optimizer.step()

    return run
