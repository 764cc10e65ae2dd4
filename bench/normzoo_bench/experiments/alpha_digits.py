"""Alpha-BN on corrupted digits: accuracy against the weight of the stored statistics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from normzoo.adapt import configure

from ..figures import figure
from .digits import CORRUPTIONS, SmallCNN, accuracy, load, train
from .experiment import COLORS, Experiment, Table, deviation, spread, values


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    epochs: int = 25
    test_images: int = 797
    source_weights: tuple[float, ...] = (0, 0.2, 0.5, 0.7, 0.9, 1)
    batch_sizes: tuple[int, ...] = (4, 16, 64)


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    training, (images, labels) = load(seed)
    images, labels = images[: settings.test_images], labels[: settings.test_images]
    torch.manual_seed(seed)
    model = train(SmallCNN(), *training, seed=seed, epochs=settings.epochs)
    generator = torch.Generator().manual_seed(seed)
    shown = {"clean": images} | {name: of(images, generator) for name, of in CORRUPTIONS.items()}
    orders = {"iid": None, "sorted by class": labels.argsort(stable=True)}
    found = []
    for order, sequence in orders.items():
        for batch in settings.batch_sizes:
            for weight in settings.source_weights:
                mixed = configure(model, source_weight=weight)
                right = {name: accuracy(mixed, x, labels, batch, sequence) for name, x in shown.items()}
                right["corrupted"] = statistics.mean(right[name] for name in CORRUPTIONS)
                found.append(({"order": order, "batch": batch, "source_weight": weight}, right))
    return found


def _lines(document: dict) -> list[tuple[str, str, int]]:
    """(images, order, batch) of each line of the table."""
    batches = document["settings"]["batch_sizes"]
    return [
        (images, order, batch)
        for images in ("corrupted", "clean")
        for order in ("iid", "sorted by class")
        for batch in batches
    ]


def _table(document: dict) -> Table:
    weights = document["settings"]["source_weights"]
    cells = []
    for images, order, batch in _lines(document):
        tried = {"order": order, "batch": batch}
        numbers = [values(document, images, **tried, source_weight=weight) for weight in weights]
        cells.append((images, order, str(batch), *map(spread, numbers)))
    header = ("images", "order", "batch", *(f"{weight:g}" for weight in weights))
    return Table("Accuracy in per cent, against the weight of the stored statistics", header, cells)


def _draw(document: dict) -> str:
    settings = document["settings"]
    weights = settings["source_weights"]
    with figure(2.8, 7.0, 2, "white") as (panels, svg):
        for axes, order in zip(panels, ("iid", "sorted by class"), strict=True):
            for batch, color in zip(settings["batch_sizes"], COLORS, strict=False):
                tried = {"order": order, "batch": batch}
                numbers = [values(document, "corrupted", **tried, source_weight=w) for w in weights]
                around = [deviation(of_weight) or 0 for of_weight in numbers]
                means = [statistics.mean(of_weight) for of_weight in numbers]
                look = {"color": color, "marker": "o", "markersize": 3, "capsize": 2}
                axes.errorbar(weights, means, around, label=f"batches of {batch}", **look)
            axes.set_title(order)
            axes.set_xlabel("weight of the stored statistics")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("accuracy, corrupted (%)")
        panels[1].legend(frameon=False)
    return svg()


EXPERIMENT = Experiment(
    "alpha-digits",
    "alpha-BN on corrupted digits: accuracy against the weight of the stored statistics",
    Settings(),
    Settings(seeds=2, epochs=2, test_images=50, source_weights=(0, 0.5, 1), batch_sizes=(4, 16)),
    _run,
    _table,
    _draw,
)
