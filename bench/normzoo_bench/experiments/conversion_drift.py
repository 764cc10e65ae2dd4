"""Networks that read digits, converted by every rule that is not exact: what that costs, and what
recalibration brings back."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normzoo
from normzoo import AdaptiveLayerNorm, AdaptiveRMSNorm
from normzoo.conversion import TRANSFERS, Exactness

from ..figures import figure
from ..quiet import quiet
from .digits import CLASSES, SmallCNN, Split, load, train
from .experiment import COLORS, Experiment, Table, spread

_CLASSES = (Exactness.APPROXIMATE, Exactness.CALIBRATE, Exactness.REINITIALISED)
_OPTIONS = {"group_norm": {"num_groups": 4}, "batch_channel_norm": {"num_groups": 4}}


@dataclass(frozen=True)
class Rule:
    norm: str
    """Its family."""
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    by: str | None = None
    """A layer that the norm becomes first."""

    @property
    def becomes(self) -> str:
        """Target and options in a few words, without those that it cannot do without."""
        said = {} if self.target in _OPTIONS else self.options
        target = ", ".join((self.target, *(f"{name}={value}" for name, value in said.items())))
        return f"{self.by}, then {target}" if self.by else target


_OTHERS = (
    Rule("batch", "power_norm", {"group_num": 1}),
    Rule("layer", "power_norm", {"group_num": None}),
    Rule("batch", "batch_norm", by="group_norm"),
)
"""Beside the rules as they are: what options make less exact, and a way back that needs calibration."""


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    epochs: int = 12
    training_images: int = 1000
    test_images: int = 797
    width: int = 16
    batch: int = 64
    families: tuple[str, ...] = tuple(dict.fromkeys(family for family, _ in TRANSFERS))
    """Norms to start from."""


class Conditioned(nn.Module):
    """Gives an adaptive norm a scale and a shift that depend on the input."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        self.condition, self.norm = nn.Linear(width, 2 * width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, *self.condition(x).tanh().chunk(2, -1))


class Perceptron(nn.Sequential):
    """Images (N, 1, 8, 8) to logits (N, 10): three linear maps, each with a norm and a ReLU, and a head."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int) -> None:
        layers: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(64, width)), norm(width), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), norm(width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, CLASSES))


_NETWORKS: dict[str, Callable[[int], nn.Sequential]] = {
    "batch": lambda width: SmallCNN(nn.BatchNorm2d, width),
    "group": lambda width: SmallCNN(lambda channels: nn.GroupNorm(4, channels), width),
    "instance": lambda width: SmallCNN(lambda channels: nn.InstanceNorm2d(channels, affine=True), width),
    "layer": lambda width: Perceptron(nn.LayerNorm, 4 * width),
    "rms": lambda width: Perceptron(nn.RMSNorm, 4 * width),
    "adaptive_layer": lambda width: Perceptron(
        lambda channels: Conditioned(AdaptiveLayerNorm, channels), 4 * width
    ),
    "adaptive_rms": lambda width: Perceptron(
        lambda channels: Conditioned(AdaptiveRMSNorm, channels), 4 * width
    ),
}
"""By the norm that they are trained with; the width is that of :class:`SmallCNN`."""

_MADE: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "convolution": ("batch", None, {}),
    "linear": ("layer", None, {}),
    "frozen_batch": ("batch", "frozen_batch_norm", {}),
    "ghost_batch": ("batch", "ghost_batch_norm", {"ghost_batch_size": 25}),
    "alpha_batch": ("batch", "alpha_batch_norm", {}),
    "adab2n": ("batch", "adab2n", {"num_tasks": 5}),
}
"""The others are made of one that was trained: by which, and converted to what."""


def rules(families: tuple[str, ...]) -> list[Rule]:
    """Those that are not exact, by their class."""
    found = [
        Rule(family, target, _OPTIONS.get(target, {}))
        for claim in _CLASSES
        for (family, target), rule in TRANSFERS.items()
        if rule.exactness is claim
    ]
    return [rule for rule in (*found, *_OTHERS) if rule.norm in families]


@contextmanager
def _side_inputs(model: nn.Module, images: Tensor) -> Iterator[None]:
    """A mask without a hole, and one time for all, where `model` takes them."""
    taken = {name for module in model.modules() for name in getattr(module, "side_inputs", ())}
    held = {"mask": torch.zeros_like(images), "t": images.new_full((len(images),), 0.5)}
    given = {name: held[name] for name in taken & held.keys()}
    if not given:
        yield
        return
    with normzoo.inputs(model, **given):
        yield


@torch.no_grad()
def outputs(model: nn.Sequential, images: Tensor, batch: int, part: slice = slice(None)) -> Tensor:
    """What a part of `model` returns for batches of `images`, in eval mode."""
    shown = nn.Sequential(*list(model.eval())[part])
    made = []
    for x in images.split(batch):
        with _side_inputs(model, x):
            made.append(shown(x))
    return torch.cat(made)


def drift(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in per cent of the largest entry."""
    return 100 * ((found - expected).abs().max() / expected.abs().max()).item()


def _right(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def convert(
    before: nn.Sequential, rule: Rule, training: Split, test: Split, batch: int
) -> tuple[Exactness, dict[str, float]]:
    """What the conversion of a copy of `before` does on `test`, and what recalibration on `training` then does.

    Returns:
        The class that the plan gives it, and the numbers; without those after recalibration where no layer has
        running statistics of its own.
    """
    model = copy.deepcopy(before)
    if rule.by:
        normzoo.convert(model, rule.by, **_OPTIONS[rule.by])
    made = normzoo.plan(model, rule.target, **rule.options)
    if len(made.changes) != 3:
        raise ValueError(f"{rule}: {len(made.changes)} of 3 norms convert:\n{made}")
    made.apply()
    first = slice(3)  # what is in front of the first norm, the norm, and the activation
    old, new = (outputs(each, test.images, batch) for each in (before, model))
    numbers = {
        "first block": drift(*(outputs(each, test.images, batch, first) for each in (model, before))),
        "output": drift(new, old),
        "cosine": F.cosine_similarity(new.flatten(), old.flatten(), dim=0).item(),
        "before": _right(old, test.labels),
        "after": _right(new, test.labels),
    }
    try:
        normzoo.recalibrate(model, training.images.split(50))
    except ValueError:  # it has no running statistics, or those of the source
        return made.exactness, numbers
    new = outputs(model, test.images, batch)
    again = {"output, recalibrated": drift(new, old), "recalibrated": _right(new, test.labels)}
    return made.exactness, numbers | again


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    training, test = load(seed, settings.training_images)
    test = Split(test.images[: settings.test_images], test.labels[: settings.test_images])
    networks: dict[str, Any] = {}

    def network(family: str) -> Any:
        if family not in networks:
            if family in _MADE:
                by, target, options = _MADE[family]
                made = copy.deepcopy(network(by))
                networks[family] = normzoo.convert(made, target, **options) if target else made
            else:
                torch.manual_seed(seed)
                made = _NETWORKS[family](settings.width)
                networks[family] = train(made, *training, seed=seed, epochs=settings.epochs)
        return networks[family]

    found = []
    with quiet():
        for rule in rules(settings.families):
            before = network(rule.norm)
            torch.manual_seed(seed)
            claim, numbers = convert(before, rule, training, test, settings.batch)
            found.append(({"norm": rule.norm, "becomes": rule.becomes, "class": claim.value}, numbers))
    return found


def _mean(row: dict, name: str, places: int = 2) -> str:
    found = row["values"].get(name)
    if found is None:
        return ""
    mean, least = statistics.mean(found), 10.0**-places
    return f"< {least}" if 0 <= mean < least / 2 else f"{mean:.{places}f}".replace("-", "−")


def _rows(document: dict) -> list[dict]:
    """By transfer class."""
    return sorted(document["rows"], key=lambda row: [claim.value for claim in _CLASSES].index(row["class"]))


def _table(document: dict) -> Table:
    cells = []
    for row in _rows(document):
        shown = [row["norm"], f"`{row['becomes']}`", row["class"]]
        shown += [_mean(row, "first block"), _mean(row, "output"), _mean(row, "cosine", 4)]
        for name in ("before", "after", "recalibrated"):
            numbers = row["values"].get(name)
            shown.append("" if numbers is None else spread(numbers))
        cells.append((*shown, _mean(row, "output, recalibrated")))
    header = (
        *("norm", "becomes", "transfer class", "first block", "output", "cosine"),
        *("before", "after", "recalibrated", "output then"),
    )
    title = (
        "Drift of the first block and of the output in per cent of the largest entry, and cosine of the output "
        "(means); accuracy in per cent"
    )
    return Table(title, header, cells)


def _draw(document: dict) -> str:
    rows = _rows(document)[::-1]
    marks = {"before": ("|", COLORS[3]), "after": ("o", COLORS[1]), "recalibrated": ("D", COLORS[0])}
    with figure(0.9 + 0.22 * len(rows), 7.0, background="white") as (axes, svg):
        for name, (mark, color) in marks.items():
            held = [(i, row["values"][name]) for i, row in enumerate(rows) if name in row["values"]]
            places, means = [i for i, _ in held], [statistics.mean(numbers) for _, numbers in held]
            size = 10 if mark == "|" else 4
            axes.plot(means, places, mark, color=color, markersize=size, label=name, markeredgewidth=1.5)
        axes.set_yticks(range(len(rows)), [f"{row['norm']} to {row['becomes']}" for row in rows])
        axes.set_xlim(0, 102)
        axes.set_xlabel("accuracy (%)")
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return svg()


EXPERIMENT = Experiment(
    "conversion_drift",
    "networks that read digits, converted by every rule that is not exact, and recalibrated",
    Settings(),
    Settings(seeds=2, epochs=1, training_images=200, test_images=64, width=4, families=("group", "rms")),
    _run,
    _table,
    _draw,
)
