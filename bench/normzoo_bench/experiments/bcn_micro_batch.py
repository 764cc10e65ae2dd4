"""Batch-channel norm in estimate mode against batch norm and group norm, with two images a batch; each with and
without Weight Standardization."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo import BatchChannelNorm, BatchNorm2d, GroupNorm, WSConv2d

from ..figures import figure
from .digits import CLASSES, accuracy, load
from .experiment import COLORS, Experiment, Table, spread, values

CONVOLUTIONS: dict[str, type[nn.Conv2d]] = {"plain": nn.Conv2d, "WS": WSConv2d}


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


class EstimatedBatchNorm(nn.BatchNorm2d):
    """The first stage of BCN in estimate mode, alone; its momentum is the update rate."""

    def forward(self, input: Tensor) -> Tensor:
        running_mean, running_var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        if self.training:
            with torch.no_grad():
                mean = input.mean((0, 2, 3))
                var = (input - running_mean[:, None, None]).square().mean((0, 2, 3))
                running_mean.lerp_(mean, self.momentum)
                running_var.lerp_(var, self.momentum)
        return F.batch_norm(input, running_mean, running_var, self.weight, self.bias, eps=self.eps)


def _norms(settings: Settings) -> dict[str, Callable[[int], nn.Module]]:
    groups = settings.groups
    return {
        "BN": BatchNorm2d,
        "GN": lambda channels: GroupNorm(groups, channels),
        "BCN, batch": lambda channels: BatchChannelNorm(channels, groups),
        "BCN, estimate": lambda channels: BatchChannelNorm(
            channels, groups, estimate=True, update_rate=settings.update_rate
        ),
        "EstBN": lambda channels: EstimatedBatchNorm(channels, momentum=settings.update_rate),
    }


def _network(norm: Callable[[int], nn.Module], width: int, weights: str = "plain") -> nn.Sequential:
    """Images (N, 1, 8, 8) to logits (N, 10): six convolutions, down to one position, where the batch is all
    that batch norm has."""
    layers: list[nn.Module] = []
    for before, stride in ((1, 1), (width, 2), (width, 1), (width, 2), (width, 1), (width, 2)):
        layers += [CONVOLUTIONS[weights](before, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES))


def _trained(
    norm: Callable[[int], nn.Module], weights: str, regime: Regime, settings: Settings, seed: int
) -> nn.Module:
    """By SGD, whose rate falls to zero. The seed decides start values, images and their order for all norms."""
    (images, labels), _ = load(seed)
    torch.manual_seed(seed)
    model = _network(norm, settings.width, weights)
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
            for weights in CONVOLUTIONS:
                model = _trained(norm, weights, regime, settings, seed)
                tried = {"batch": regime.batch, "norm": name, "weights": weights}
                found.append((tried, {"accuracy": accuracy(model, *held_out)}))
    return found


def _table(document: dict) -> Table:
    cells = []
    for row in document["rows"]:
        numbers = row["values"]["accuracy"]
        tried = str(row["batch"]), row["norm"], row["weights"]
        cells.append((*tried, spread(numbers), f"{min(numbers):.1f}", f"{max(numbers):.1f}"))
    return Table("Test accuracy in per cent", ("batch", "norm", "weights", "accuracy", "least", "most"), cells)


def _draw(document: dict) -> str:
    batches = [regime["batch"] for regime in document["settings"]["regimes"]]
    with figure(3.0, 7.0, len(batches), "white") as (panels, svg):
        for axes, batch in zip(panels, batches, strict=True):
            names = list(dict.fromkeys(row["norm"] for row in document["rows"]))
            for aside, weights, color in zip((-0.17, 0.17), CONVOLUTIONS, COLORS, strict=False):
                for place, norm in enumerate(names):
                    numbers = values(document, "accuracy", batch=batch, norm=norm, weights=weights)
                    label = {"plain": "plain weights", "WS": "standardized weights"}[weights]
                    look = {"color": color, "alpha": 0.6, "markersize": 4}
                    at = place + aside
                    axes.plot([at] * len(numbers), numbers, "o", label=None if place else label, **look)
                    axes.hlines(statistics.mean(numbers), at - 0.15, at + 0.15, color=color)
            axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.set_title(f"batches of {batch}")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("test accuracy (%), by seed")
        panels[0].figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )
    return svg()


EXPERIMENT = Experiment(
    "bcn-micro-batch",
    "batch-channel norm in estimate mode, and Weight Standardization, with two images a batch",
    Settings(),
    Settings(seeds=2, images=8, regimes=(Regime(2, 0.005, 1), Regime(8, 0.05, 1))),
    _run,
    _table,
    _draw,
)
