"""A forward pass of a small language model: Pre-LN, and the Pre-RMSNorm that is the same function."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normzoo

from . import checks
from .clocks import Rotation
from .measure import Settings, forget_compiled, timed
from .quiet import quiet
from .results import Document
from .step import Block

EAGER = ("torch", "normzoo", "normzoo-pre-rms")
"""The first two have LayerNorms; the last is what to_pre_rms_norm makes of them."""

CONTENDERS = (*EAGER, "torch.compile", "normzoo-compiled", "normzoo-pre-rms-compiled")

_WORDS = 1024


@dataclass(frozen=True)
class Inference:
    blocks: int
    shape: tuple[int, int, int]
    """Sequences, tokens, width."""

    @property
    def key(self) -> dict:
        workload = f"gpt-{self.blocks}x{'x'.join(map(str, self.shape))}"
        form = {"dtype": "bfloat16", "memory_format": "contiguous", "mode": "eval"}
        return {"layer": "layer_norm", "workload": workload, "shape": list(self.shape), **form}

    def __str__(self) -> str:
        return f"layer_norm {self.key['workload']} inference"


def inferences(device: str) -> list[Inference]:
    sizes = [(4, (8, 1024, 2048)), (12, (1, 128, 768))] if device == "cuda" else [(1, (2, 8, 32))]
    return [Inference(*size) for size in sizes]


def language_model(blocks: int, width: int) -> nn.Module:
    """Pre-LN, with random weights."""
    torch.manual_seed(0)
    body = [Block(width, nn.LayerNorm) for _ in range(blocks)]
    embedding = nn.Embedding(_WORDS, width)
    return nn.Sequential(embedding, *body, nn.LayerNorm(width), nn.Linear(width, _WORDS, bias=False)).eval()


@torch.no_grad()
def measure_inference(case: Inference, settings: Settings, document: Document) -> None:
    """Adds the rows of the case to `document`, as :func:`~normzoo_bench.step.measure_step` does."""
    forget_compiled()
    with torch.random.fork_rng(devices=[]):
        model = language_model(case.blocks, case.shape[-1])
        tokens = torch.randint(_WORDS, case.shape[:2])
    model.to(settings.device, torch.bfloat16)
    tokens = tokens.to(settings.device)
    exact = {"y": copy.deepcopy(model).double()(tokens)}
    allowed = {"y": checks.LARGEST_ERROR[torch.bfloat16]}
    rows, rotations = [], []
    for name in settings.contenders:
        if settings.late:
            document.not_run.append(f"{case} {name}")
            continue
        try:
            own = built(name, model, tokens)
            error = {"y": checks.relative_error("y", own(tokens), exact["y"])}
            if name == "torch":
                allowed = {"y": max(allowed["y"], 2 * error["y"])}
            checks.demand(error, allowed)
            peak = checks.peak_bytes(lambda own=own: own(tokens), settings.device)
        except Exception as failure:
            document.add_failed(case, name, failure, "inference")
            continue
        rotations.append(Rotation(lambda _, own=own: own(tokens), 1))
        rest = {"saved_bytes": None, "peak_bytes": peak, "launches": None, "bytes": None, "cold": True}
        rows.append(
            {**case.key, "contender": name, "runs": "", "direction": "inference", "error": error, **rest}
        )
    document.rows += timed(case, settings.clocks[-1], rows, rotations, settings.rounds, document)


def built(name: str, model: nn.Module, tokens: Tensor) -> nn.Module:
    own = copy.deepcopy(model)
    if "pre-rms" in name:
        with quiet():
            normzoo.to_pre_rms_norm(own, tokens, exclude="*norm_[qk]")
    if name.startswith("normzoo"):
        normzoo.convert(own)
    if name.endswith(("compile", "compiled")):
        own.compile(dynamic=False, fullgraph=True)
    return own
