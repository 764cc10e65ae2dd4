"""The second part of the demonstration: alpha-BN over a small CNN that reads corrupted images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normzoo_bench.experiments import digits

from .. import adapt
from ..layers.alpha import AlphaBatchNorm
from ..terminal import progress
from .measurements import ROUNDING
from .pictures import data_uri
from .settings import Settings


def study(settings: Settings) -> dict | None:
    """Trains a CNN with batch norms on digits, and measures how alpha-BN reads corrupted ones.

    Returns None where scikit-learn, which has the digits, is not installed.
    """
    try:
        learnt, test = digits.load(settings.seed)
    except ModuleNotFoundError:
        return None
    torch.manual_seed(settings.seed)
    test = digits.Split(*(part[: settings.test_images] for part in test))
    with _one_thread():
        model = digits.train(digits.SmallCNN(), *learnt, seed=settings.seed, epochs=settings.epochs)
        found = calibrate(model, test, settings)
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "learnt": len(learnt.labels),
        "tested": len(test.labels),
        "batch": settings.test_batch,
    }
    return about | found


def calibrate(model: nn.Module, test: digits.Split, settings: Settings) -> dict:
    """Per cent that `model`, in eval mode, gets right with alpha-BN of each source weight, by corruption."""
    chance = torch.Generator().manual_seed(settings.seed)
    corrupted = {name: corrupt(test.images, chance) for name, corrupt in digits.CORRUPTIONS.items()}
    images = {**corrupted, "clean": test.images}
    right: dict[str, list[float]] = {name: [] for name in images}
    with progress("digits", len(settings.source_weights)) as step:
        for source_weight in settings.source_weights:
            adapted = adapt.configure(copy.deepcopy(model), source_weight=source_weight)
            for name, some in images.items():
                right[name].append(digits.accuracy(adapted, some, test.labels, settings.test_batch))
            step(f"source weight {source_weight:g}")
    means = [sum(column) / len(column) for column in zip(*(right[name] for name in corrupted), strict=True)]
    best = max(range(1, len(means) - 1), key=means.__getitem__)
    kept = adapt.configure(copy.deepcopy(model), source_weight=1)
    found = {
        "norms": sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
        "replaced": sum(isinstance(m, AlphaBatchNorm) for m in kept.modules()),
        "difference": _difference(model, kept, torch.cat(list(images.values()))),
        "source_weights": list(settings.source_weights),
        "right": right,
        "means": means,
        "shown": [0, best, len(means) - 1],
        "pictures": [
            {
                "corruption": name,
                "digit": int(test.labels[i]),
                "clean": data_uri(test.images[i, 0]),
                "corrupted": data_uri(some[i, 0]),
            }
            for i, (name, some) in enumerate(corrupted.items())
        ],
    }
    found["passed"] = (
        found["replaced"] == found["norms"] > 0
        and found["difference"] <= ROUNDING
        and means[best] > max(means[0], means[-1])
    )
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a few thousand numbers gain nothing by threads, and wait for them on a CPU that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _difference(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Between logits, relative to the largest."""
    logits = model(images)
    return float((logits - other(images)).abs().max() / logits.abs().max())
