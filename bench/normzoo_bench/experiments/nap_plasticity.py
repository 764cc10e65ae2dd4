"""Normalize-and-Project over digits that get random labels again and again: can a network still learn them?"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo import LayerNorm, normalize_and_project

from ..figures import figure
from .digits import CLASSES, load
from .experiment import COLORS, Experiment, Table, difference, spread, values


@dataclass(frozen=True)
class Net:
    norm: str
    """``"none"``, ``"LN"``, or ``"NaP"``, which is LN with weights that are projected."""
    affine: bool = True
    """Whether the norms have a learned scale and offset."""


@dataclass(frozen=True)
class Run:
    pixels: str
    """``"0 to 1"``, ``"centered"``: each minus its mean, or ``"standardized"``: by its deviation, too."""
    tasks: int
    steps: int
    """Of a task."""
    rate: float
    part: int
    """Tasks that an accuracy is the mean of."""
    nets: tuple[Net, ...] = (Net("LN"), Net("NaP"), Net("LN", False), Net("NaP", False))


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    runs: tuple[Run, ...] = (
        Run("standardized", 40, 400, 0.001, 5, (Net("none"), Net("LN"), Net("NaP"))),
        Run("standardized", 160, 100, 0.001, 10),
        Run("centered", 160, 100, 0.001, 10, (Net("LN"), Net("NaP"))),
        Run("0 to 1", 80, 100, 0.001, 10, (Net("LN"), Net("NaP"))),
        Run("standardized", 20, 400, 0.01, 5, (Net("LN"), Net("NaP"))),
    )
    images: int = 512
    width: int = 128
    batch: int = 64


def _network(net: Net, width: int) -> nn.Sequential:
    """Images (N, 64) to logits (N, 10): three layers with a ReLU each, and a linear head. The generator gives
    the same weights whatever the norm."""
    layers: list[nn.Module] = []
    for before in (64, width, width):
        layers.append(linear := nn.Linear(before, width))
        if net.norm != "none":
            linear.register_parameter("bias", None)  # NaP's paper leaves it out in front of a norm
            layers.append(LayerNorm(width, elementwise_affine=net.affine))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def _hidden(model: nn.Sequential) -> list[Tensor]:
    """The weights of all linear layers but the head."""
    return [module.weight for module in list(model)[:-1] if isinstance(module, nn.Linear)]


def _pixels(images: Tensor, how: str) -> Tensor:
    """Images (N, 1, 8, 8) as rows (N, 64); constant pixels become 0 where each has its mean taken off."""
    rows = images.flatten(1)
    if how == "0 to 1":
        return rows
    rows = rows - rows.mean(0)
    return rows if how == "centered" else rows / rows.std(0).clamp(min=1e-3)


def _learned(model: nn.Sequential, images: Tensor, run: Run, net: Net, batch: int, seed: int) -> list[float]:
    """For each task, the per cent of the images that the model gets right when they come, before the step.

    The weights and what Adam has stored go on from task to task; nothing but the labels is new.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), run.rate, fused=True)
    if net.norm == "NaP":
        scale_offset = "joint" if net.affine else "off"
        normalize_and_project(model, optimizer, scale_offset=scale_offset, example=images[:batch])
    found = []
    for _ in range(run.tasks):
        labels = torch.randint(CLASSES, (len(images),), generator=generator)
        epochs = -(-run.steps * batch // len(images))
        order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
        order = order[: run.steps * batch]
        right = torch.zeros((), dtype=torch.int64)
        for x, y in zip(images[order].split(batch), labels[order].split(batch), strict=True):
            logits = model(x)
            right += (logits.detach().argmax(1) == y).sum()
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
        found.append(100 * right.item() / len(order))
    return found


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    images = load(seed, settings.images)[0].images
    found = []
    for run in settings.runs:
        rows = _pixels(images, run.pixels)
        for net in run.nets:
            torch.manual_seed(seed)
            model = _network(net, settings.width)
            before = _size(model)
            right = _learned(model, rows, run, net, settings.batch, seed)
            tried = _of(dataclasses.asdict(run)) | dataclasses.asdict(net)
            found.append((tried, _parts(right, run.part) | {"growth": _size(model) / before}))
    return found


def _size(model: nn.Sequential) -> float:
    """The norm of all hidden weights together."""
    return sum(weight.square().sum().item() for weight in _hidden(model)) ** 0.5


def _parts(right: list[float], part: int) -> dict[str, float]:
    """Means over so many tasks: the first, the middle and the last ones; and all parts, by their first task."""
    starts = range(0, len(right), part)
    middle = (len(right) - part) // 2
    named = {"first": 0, "middle": middle, "last": len(right) - part} | {f"from {i + 1}": i for i in starts}
    return {name: statistics.mean(right[start : start + part]) for name, start in named.items()}


def _name(net: dict) -> str:
    plain = {"none": "no norm"}.get(net["norm"], net["norm"])
    return plain if net["affine"] else f"{plain}, no affine"


def _of(run: dict) -> dict:
    """What rows of a run have in common."""
    return {name: run[name] for name in ("pixels", "tasks", "steps", "rate")}


def _rows(document: dict, run: dict) -> list[dict]:
    return [row for row in document["rows"] if row.items() >= _of(run).items()]


def _ahead(document: dict, run: dict, affine: bool) -> list[float]:
    """By how much NaP is above LN in the last tasks, one a seed."""
    nap, ln = (values(document, "last", **_of(run), norm=norm, affine=affine) for norm in ("NaP", "LN"))
    return [a - b for a, b in zip(nap, ln, strict=True)]


def _table(document: dict) -> Table:
    cells = []
    for run in document["settings"]["runs"]:
        for row in _rows(document, run):
            numbers = row["values"]
            tried = (f"{run['tasks']} of {run['steps']}", run["pixels"], f"{run['rate']:g}", _name(row))
            ahead = difference(_ahead(document, run, row["affine"])) if row["norm"] == "NaP" else ""
            means = (spread(numbers[name]) for name in ("first", "middle", "last"))
            cells.append((*tried, *means, ahead, f"{statistics.mean(numbers['growth']):.1f}"))
    tried = ("tasks of steps", "pixels", "rate", "net")
    return Table(
        "Per cent right when they come, in the first, middle and last 5 tasks of 400 steps or 10 of 100; the "
        "last of NaP minus LN within a seed, ± its standard error; norm of the hidden weights, end / start",
        (*tried, "first", "middle", "last", "last − LN's", "norm"),
        cells,
    )


def _draw(document: dict) -> str:
    runs = document["settings"]["runs"]
    colors = dict(zip(("NaP", "LN", "none"), COLORS, strict=False))
    with figure(3.6, 9.0, len(runs), "white") as (panels, svg):
        labels: dict[str, object] = {}
        for axes, run in zip(panels, runs, strict=True):
            for row in _rows(document, run):
                starts = range(0, run["tasks"], run["part"])
                places = [start + run["part"] / 2 for start in starts]
                parts = [row["values"][f"from {start + 1}"] for start in starts]
                look = {"color": colors[row["norm"]], "linestyle": "-" if row["affine"] else "--"}
                axes.plot(places, parts, linewidth=0.6, alpha=0.35, **look)
                (labels[_name(row)],) = axes.plot(places, list(map(statistics.mean, parts)), **look)
            axes.axhline(100 / CLASSES, color=COLORS[-1], linewidth=0.8, linestyle=":")
            axes.set_title(f"{run['pixels']},\n{run['steps']} steps a task,\nrate {run['rate']:g}", fontsize=9)
            axes.set_xlabel("task")
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("right when they come (%)")
        panels[0].figure.legend(
            labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels), frameon=False
        )
    return svg()


EXPERIMENT = Experiment(
    "nap_plasticity",
    "Normalize-and-Project against layer norm alone: digits that get random labels again and again",
    Settings(),
    Settings(
        seeds=2,
        runs=(
            Run("standardized", 4, 3, 0.001, 1, (Net("none"), Net("LN"), Net("NaP"))),
            Run("0 to 1", 4, 2, 0.001, 2),
        ),
        images=32,
        width=8,
        batch=8,
    ),
    _run,
    _table,
    _draw,
)
