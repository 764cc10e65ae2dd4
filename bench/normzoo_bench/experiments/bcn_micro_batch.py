"""Batch-channel norm in estimate mode against batch norm and group norm, with two images a batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from normzoo import BatchChannelNorm, BatchNorm2d, GroupNorm

from ..figures import figure
from .digits import CLASSES, accuracy, load
from .experiment import COLORS, Experiment, Table, spread


@dataclass(frozen=True)
class Regime:
    batch: int
    rate: float
    epochs: int


@dataclass(frozen=True)
class Settings:
    seeds: int = 6
    regimes: tuple[Regime, ...] = (Regime(2, 0.005, 3), Regime(32, 0.05, 4))
    images: int = 800
    width: int = 16
    groups: int = 4
    update_rate: float = 0.02
    momentum: float = 0.9


def _norms(settings: Settings) -> dict[str, Callable[[int], nn.Module]]:
    groups = settings.groups
    return {
        "BN": BatchNorm2d,
        "GN": lambda channels: GroupNorm(groups, channels),
        "BCN, batch": lambda channels: BatchChannelNorm(channels, groups),
        "BCN, estimate": lambda channels: BatchChannelNorm(
            channels, groups, estimate=True, update_rate=settings.update_rate
        ),
    }


def _network(norm: Callable[[int], nn.Module], width: int) -> nn.Sequential:
    """Images (N, 1, 8, 8) to logits (N, 10): six convolutions, down to one position, where the batch is all
    that batch norm has."""
    layers: list[nn.Module] = []
    for before, stride in ((1, 1), (width, 2), (width, 1), (width, 2), (width, 1), (width, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES))


def _trained(norm: Callable[[int], nn.Module], regime: Regime, settings: Settings, seed: int) -> nn.Module:
    """By SGD, whose rate falls to zero. The seed decides start values, images and their order for all norms."""
    (images, labels), _ = load(seed)
    torch.manual_seed(seed)
    model = _network(norm, settings.width)
    optimizer = torch.optim.SGD(model.parameters(), regime.rate, settings.momentum)
    steps = regime.epochs * -(-settings.images // regime.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(regime.epochs):
        for batch in torch.randperm(settings.images, generator=generator).split(regime.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    _, held_out = load(seed)
    found = []
    for regime in settings.regimes:
        for name, norm in _norms(settings).items():
            model = _trained(norm, regime, settings, seed)
            found.append(({"batch": regime.batch, "norm": name}, {"accuracy": accuracy(model, *held_out)}))
    return found


def _table(document: dict) -> Table:
    cells = []
    for row in document["rows"]:
        numbers = row["values"]["accuracy"]
        cells.append(
            (str(row["batch"]), row["norm"], spread(numbers), f"{min(numbers):.1f}", f"{max(numbers):.1f}")
        )
    return Table("Test accuracy in per cent", ("batch", "norm", "accuracy", "least", "most"), cells)


def _draw(document: dict) -> str:
    batches = [regime["batch"] for regime in document["settings"]["regimes"]]
    with figure(2.8, 7.0, len(batches), "white") as (panels, svg):
        for axes, batch in zip(panels, batches, strict=True):
            rows = [row for row in document["rows"] if row["batch"] == batch]
            for place, (row, color) in enumerate(zip(rows, COLORS, strict=True)):
                numbers = row["values"]["accuracy"]
                axes.plot([place] * len(numbers), numbers, "o", color=color, alpha=0.6, markersize=4)
                axes.hlines(statistics.mean(numbers), place - 0.3, place + 0.3, color=color)
            axes.set_xticks(range(len(rows)), [row["norm"].replace(", ", "\n") for row in rows])
            axes.set_xlim(-0.6, len(rows) - 0.4)
            axes.set_title(f"batches of {batch}")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("test accuracy (%), by seed")
    return svg()


EXPERIMENT = Experiment(
    "bcn-micro-batch",
    "batch-channel norm in estimate mode against batch norm and group norm, with two images a batch",
    Settings(),
    Settings(seeds=2, images=32, regimes=(Regime(2, 0.005, 1), Regime(32, 0.05, 1))),
    _run,
    _table,
    _draw,
)
