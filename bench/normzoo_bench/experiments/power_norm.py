"""PowerNorm and Unified Normalization against batch norm in a character model: what a loss in eval mode is
against one by the statistics of the batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normzoo import BatchNorm1d, LayerNorm, PowerNorm, UnifiedNorm

from ..figures import figure
from .characters import CharacterModel, load, loss, train
from .experiment import COLORS, Experiment, Table, difference, signed, spread, values

MODES = ("train mode", "eval")


@dataclass(frozen=True)
class Regime:
    model: str
    """``"post-norm"`` or ``"pre-norm"``."""
    blocks: int
    windows: int
    """Of a batch: one, whose characters depend on each other, or more, from different places."""


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    regimes: tuple[Regime, ...] = (Regime("post-norm", 6, 1), Regime("pre-norm", 3, 4))
    width: int = 64
    heads: int = 4
    inner: int = 128
    length: int = 64
    """Characters of a window."""
    steps: int = 1500
    warmup: int = 150
    """Steps, of the rate and of the norms that have one."""
    rate: float = 0.003
    groups: int = 4
    window_size: int = 4
    """Of UN, in steps."""
    held_out: int = 500
    """Windows that the loss is taken on."""


class TokenBatchNorm(BatchNorm1d):
    """For (N, T, C), over N and T."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def _norms(settings: Settings) -> dict[str, Callable[[int], nn.Module]]:
    steps = {"warmup_iters": settings.warmup}
    return {
        "LN": LayerNorm,
        "BN": TokenBatchNorm,
        "PN-V": partial(UnifiedNorm, window_size=1, **steps),
        "PN": partial(PowerNorm, group_num=settings.groups, **steps),
        "PN, no groups": partial(PowerNorm, group_num=None, **steps),
        "UN": partial(UnifiedNorm, window_size=settings.window_size, **steps),
    }


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    texts = load(seed)
    sizes = {name: getattr(settings, name) for name in ("width", "heads", "inner", "length")}
    found = []
    for regime in settings.regimes:
        for name, norm in _norms(settings).items():
            torch.manual_seed(seed)
            model = CharacterModel(norm, regime.blocks, regime.model == "pre-norm", **sizes)
            how = {"windows": regime.windows, "rate": settings.rate, "warmup": settings.warmup}
            train(model, texts.training, seed=seed, steps=settings.steps, **how)
            batches = settings.held_out // regime.windows
            numbers = {
                mode: loss(model, texts.held_out, batches, regime.windows, training=mode == "train mode")
                for mode in MODES
            }
            numbers["gap"] = numbers["eval"] - numbers["train mode"]
            found.append(({"model": regime.model, "windows": regime.windows, "norm": name}, numbers))
    return found


def _table(document: dict) -> Table:
    cells = []
    for row in document["rows"]:
        numbers = row["values"]
        gap = numbers["gap"]
        cells.append(
            (
                f"{row['model']}, {row['windows']}",
                row["norm"],
                *(spread(numbers[mode], 2) for mode in MODES),
                difference(gap, 2),
                signed(min(gap), 2),
                signed(max(gap), 2),
            )
        )
    return Table(
        "Validation loss in nats a character; eval minus train mode within a seed, ± its standard error",
        ("model, windows", "norm", *MODES, "eval − train mode", "least", "most"),
        cells,
    )


def _draw(document: dict) -> str:
    regimes = document["settings"]["regimes"]
    with figure(3.2, 7.0, len(regimes), "white") as (panels, svg):
        for axes, regime in zip(panels, regimes, strict=True):
            tried = {"model": regime["model"], "windows": regime["windows"]}
            names = [row["norm"] for row in document["rows"] if row.items() >= tried.items()]
            for aside, mode, color in zip((-0.17, 0.17), MODES, COLORS, strict=False):
                for place, norm in enumerate(names):
                    numbers, at = values(document, mode, **tried, norm=norm), place + aside
                    label = mode if place == 0 else None
                    look = {"color": color, "alpha": 0.6, "markersize": 4}
                    axes.plot([at] * len(numbers), numbers, "o", label=label, **look)
                    axes.hlines(statistics.mean(numbers), at - 0.15, at + 0.15, color=color)
            axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
            axes.set_xlim(-0.6, len(names) - 0.4)
            windows = regime["windows"]
            axes.set_title(f"{regime['model']}, {windows} window{'s' * (windows > 1)} a batch")
        panels[0].set_ylabel("validation loss (nats a character)")
        panels[0].figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )
    return svg()


EXPERIMENT = Experiment(
    "power_norm",
    "PowerNorm and Unified Normalization against batch norm in a character model: eval against train mode",
    Settings(),
    Settings(
        seeds=2,
        regimes=(Regime("post-norm", 1, 1), Regime("pre-norm", 1, 2)),
        width=16,
        steps=10,
        warmup=3,
        held_out=8,
    ),
    _run,
    _table,
    _draw,
    digits=False,
)
