"""AdaB2N against batch norm in continual learning with replay, with and without a shift between the tasks."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo import AdaB2N, BatchNorm2d
from normzoo.continual import end_task, tasks

from ..figures import figure
from .digits import CLASSES, Split, accuracy, load
from .experiment import COLORS, Experiment, Table, difference, spread, standard_error, values

IMAGES = ("shifted", "plain")
NORMS: dict[str, dict[str, float] | None] = {
    "BN": None,
    "AdaB2N": {},
    "AdaB2N, init_weight 3": {"init_weight": 3.0},
    "AdaB2N, init_weight 3, kappa 0.8": {"init_weight": 3.0, "kappa": 0.8},
}
"""The arguments of AdaB2N; None for batch norm."""


@dataclass(frozen=True)
class Regime:
    head: str
    """``"pooled"`` or ``"flat"``: what of the last map the linear head sees, means over positions or all."""
    rate: float


@dataclass(frozen=True)
class Settings:
    seeds: int = 24
    regimes: tuple[Regime, ...] = (Regime("pooled", 0.03), Regime("pooled", 0.1), Regime("flat", 0.03))
    training: int = 1297
    tasks: int = 5
    width: int = 32
    batch: int = 10
    """New images of a step; as many are replayed."""
    reservoir: int = 100


class Reservoir:
    """A sample of all that was put in, each with the same chance to be there, of at most `size`."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator, self.seen = size, generator, 0
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def put(self, images: Tensor, labels: Tensor) -> None:
        for image, label in zip(images, labels, strict=True):
            self.seen += 1
            if len(self.images) < self.size:
                self.images.append(image)
                self.labels.append(label)
                continue
            place = int(torch.randint(self.seen, (), generator=self.generator))
            if place < self.size:
                self.images[place], self.labels[place] = image, label

    def draw(self, count: int) -> Split:
        """So many of the images that are there, or all."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[:count].tolist()
        return Split(
            torch.stack([self.images[i] for i in chosen]), torch.stack([self.labels[i] for i in chosen])
        )


def _shifted(images: Tensor, task: int) -> Tensor:
    """Contrast falls and brightness rises from task to task."""
    return images * (1.6 - 0.3 * task) + 0.4 * (task - 2)


def _of_tasks(split: Split, count: int, shifted: bool) -> list[Split]:
    """Two classes each."""
    found = []
    for task in range(count):
        mine = split.labels // 2 == task
        images = split.images[mine]
        found.append(Split(_shifted(images, task) if shifted else images, split.labels[mine]))
    return found


def _network(norm: Callable[[int], nn.Module], width: int, head: str) -> nn.Sequential:
    """Images (N, 1, 8, 8) to logits (N, 10); a head that is pooled sees means over positions alone."""
    pooled = head == "pooled"
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), norm(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), norm(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
        nn.Flatten(), nn.Linear(2 * width * (1 if pooled else 16), CLASSES),
    )  # fmt: skip


def _learnt(
    model: nn.Module, training: list[Split], held_out: list[Split], settings: Settings, rate: float, seed: int
) -> list[list[float]]:
    """The accuracy of every task after each task. Each image is seen once as a new one; new and replayed images
    go through the model as one batch."""
    generator = torch.Generator().manual_seed(seed)
    memory = Reservoir(settings.reservoir, generator)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    balanced = any(isinstance(module, AdaB2N) for module in model.modules())
    after = []
    for task in training:
        model.train()
        for chosen in torch.randperm(len(task.labels), generator=generator).split(settings.batch):
            new = Split(task.images[chosen], task.labels[chosen])
            both = [new, memory.draw(settings.batch)] if memory.seen else [new]
            images, labels = (torch.cat(parts) for parts in zip(*both, strict=True))
            optimizer.zero_grad()
            with tasks(model, labels // 2) if balanced else nullcontext():
                logits = model(images)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            memory.put(*new)
        if balanced:
            end_task(model)
        model.eval()
        after.append([accuracy(model, *other) for other in held_out])
    return after


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    found = []
    for images in IMAGES:
        training, held_out = (
            _of_tasks(split, settings.tasks, images == "shifted") for split in load(seed, settings.training)
        )
        for regime in settings.regimes:
            of_bn: dict[str, float] = {}
            for name, options in NORMS.items():
                torch.manual_seed(seed)
                norm = BatchNorm2d if options is None else partial(AdaB2N, num_tasks=settings.tasks, **options)
                model = _network(norm, settings.width, regime.head)
                after = _learnt(model, training, held_out, settings, regime.rate, seed)
                numbers = {"forgetting": _forgetting(after), "accuracy": statistics.mean(after[-1])}
                of_bn = of_bn or numbers
                more = {f"{what}, more than BN": numbers[what] - of_bn[what] for what in numbers}
                found.append(({"images": images, **dataclasses.asdict(regime), "norm": name}, numbers | more))
    return found


def _forgetting(after: list[list[float]]) -> float:
    """What each task but the last has lost at the end against its best after an earlier task, on average."""
    *earlier, last = after
    lost = [max(then[task] for then in earlier) - last[task] for task in range(len(last) - 1)]
    return statistics.mean(lost)


def _table(document: dict) -> Table:
    cells = []
    for row in document["rows"]:
        numbers = row["values"]
        differences = [
            "" if row["norm"] == "BN" else difference(numbers[f"{what}, more than BN"])
            for what in ("forgetting", "accuracy")
        ]
        tried = (row["images"], f"{row['head']}, {row['rate']:g}", row["norm"])
        cells.append((*tried, *(spread(numbers[what]) for what in ("forgetting", "accuracy")), *differences))
    header = ("images", "head, rate", "norm", "forgetting", "accuracy", "forgetting − BN's", "accuracy − BN's")
    return Table(
        "Forgetting and final accuracy in points; differences from BN within a seed, ± their standard error",
        header,
        cells,
    )


def _draw(document: dict) -> str:
    regimes = document["settings"]["regimes"]
    with figure(3.2, 7.0, len(IMAGES), "white") as (panels, svg):
        for axes, images in zip(panels, IMAGES, strict=True):
            axes.axhline(0, color=COLORS[-1], linewidth=0.8)
            for i, (name, color) in enumerate(zip(list(NORMS)[1:], COLORS, strict=False)):
                tried = {"images": images, "norm": name}
                numbers = [
                    values(document, "forgetting, more than BN", **tried, **regime) for regime in regimes
                ]
                places = [place + 0.2 * (i - 1) for place in range(len(regimes))]
                look = {"fmt": "o", "color": color, "markersize": 4, "capsize": 2}
                errors = [standard_error(of_regime) or 0 for of_regime in numbers]
                axes.errorbar(places, list(map(statistics.mean, numbers)), errors, label=name, **look)
            axes.set_xticks(
                range(len(regimes)), [f"{regime['head']}, {regime['rate']:g}" for regime in regimes]
            )
            axes.set_title(f"{images} digits")
        panels[0].set_ylabel("forgetting − BN's (points)")
        panels[0].figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
        )
    return svg()


EXPERIMENT = Experiment(
    "adab2n-forgetting",
    "AdaB2N against batch norm in continual learning: forgetting, with and without a shift between tasks",
    Settings(),
    Settings(seeds=2, training=200, tasks=2, width=8, regimes=(Regime("pooled", 0.1), Regime("flat", 0.03))),
    _run,
    _table,
    _draw,
)
