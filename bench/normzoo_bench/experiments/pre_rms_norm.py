"""Whether a Pre-LN transformer and what it is rewritten to stay the same function while they are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normzoo import to_pre_crms_norm, to_pre_rms_norm

from ..figures import figure
from ..quiet import quiet
from .characters import CHARACTERS, CharacterModel
from .experiment import COLORS, Experiment, Table, spread, values

REWRITES: dict[str, Callable[..., nn.Module]] = {
    "Pre-RMSNorm, parametrized": partial(to_pre_rms_norm, zero_mean_writers="parametrize"),
    "Pre-RMSNorm, baked": partial(to_pre_rms_norm, zero_mean_writers="bake"),
    "Pre-CRMSNorm, truncated": partial(to_pre_crms_norm, basis="truncate"),
    "Pre-CRMSNorm, orthonormal": partial(to_pre_crms_norm, basis="orthonormal"),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, momentum": partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "SGD, L2": partial(torch.optim.SGD, lr=0.5, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.01),
}

ROUNDING = 1e-13
"""Smaller differences are told from each other by no more than the order of sums: all of them count as this."""


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    steps: int = 10
    blocks: int = 1
    width: int = 32
    heads: int = 4
    length: int = 24
    windows: int = 8
    """Of a batch."""


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    model, batches = start(settings, seed)
    found = []
    with quiet():
        for name, rewrite in REWRITES.items():
            for called, optimizer in OPTIMIZERS.items():
                logits = []
                for each in (model, rewrite(copy.deepcopy(model), batches[0][:, :-1])):
                    trained = train(copy.deepcopy(each), optimizer, batches)
                    with torch.no_grad():
                        logits.append(trained(batches[0][:, :-1]))
                apart = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
                numbers = {"difference": apart, "log10": math.log10(max(apart, ROUNDING))}
                found.append(({"model": name, "optimizer": called}, numbers))
    return found


def start(settings: Settings, seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A model in float64 whose norms have weights of their own, and windows (N, T + 1) for every step."""
    torch.manual_seed(seed)
    sizes = {name: getattr(settings, name) for name in ("width", "heads", "length")}
    made = CharacterModel(nn.LayerNorm, settings.blocks, True, inner=2 * settings.width, **sizes)
    model = made.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                for p in module.parameters():
                    p.add_(0.2 * torch.randn_like(p))
    shape = (settings.steps, settings.windows, settings.length + 1)
    return model, list(torch.randint(CHARACTERS, shape))


def train(
    model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], batches: list[Tensor]
) -> nn.Module:
    """A step a batch, of all parameters."""
    stepping = optimizer(model.parameters())
    for batch in batches:
        stepping.zero_grad()
        logits = model(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        stepping.step()
    return model


def shown(document: dict, model: str, optimizer: str) -> str:
    """Mean and deviation of a difference, or what all are below where it is no more than rounding."""
    tried = {"model": model, "optimizer": optimizer}
    differences = values(document, "difference", **tried)
    if max(values(document, "log10", **tried)) > math.log10(ROUNDING):
        return spread(differences, 3)
    return f"< {ROUNDING:.0e}".replace("-", "−")


def _table(document: dict) -> Table:
    cells = [(name, *(shown(document, name, called) for called in OPTIMIZERS)) for name in REWRITES]
    steps = document["settings"]["steps"]
    return Table(
        f"Largest difference of a logit from the Pre-LN model after {steps} steps, of its largest logit",
        ("trained", *OPTIMIZERS),
        cells,
    )


def _draw(document: dict) -> str:
    with figure(2.9, 7.0, len(OPTIMIZERS), "white") as (panels, svg):
        for axes, called in zip(panels, OPTIMIZERS, strict=True):
            for place, (name, color) in enumerate(zip(REWRITES, COLORS, strict=True)):
                exponents = values(document, "log10", model=name, optimizer=called)
                axes.plot(
                    [place] * len(exponents), exponents, "o", color=color, alpha=0.6, markersize=4, label=name
                )
            axes.set_title(called)
            axes.set_xticks([])
            axes.set_xlim(-0.6, len(REWRITES) - 0.4)
            axes.set_yticks((-13, -9, -5, -1), ["1e-13", "1e-9", "1e-5", "0.1"])
        panels[0].set_ylabel("difference of logits")
        handles = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    return svg()


EXPERIMENT = Experiment(
    "pre-rms-norm",
    "Pre-LN transformers and their rewrites with RMSNorm and CRMSNorm, trained side by side: whether they part",
    Settings(),
    Settings(seeds=2, steps=2, width=8, heads=2, length=6, windows=2),
    _run,
    _table,
    _draw,
    digits=False,
)
