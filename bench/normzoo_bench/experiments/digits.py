"""Handwritten digits, ways to corrupt them, and a small network that reads them.

The images are scikit-learn's copy of a test set of UCI (Alpaydin and Kaynak, 1998): they come with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
TRAINING = 1000
"""Images to train on, of the 1797 there are."""


class Split(NamedTuple):
    """Images (N, 1, 8, 8) of float32, from 0 (paper) to 1 (ink), and labels (N,) of int64."""

    images: Tensor
    labels: Tensor


def load(seed: int = 0, training: int = TRAINING) -> tuple[Split, Split]:
    """So many images for training and the others for tests, drawn by `seed`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed; try `pip install scikit-learn`"
        ) from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept, held_out = order[:training], order[training:]
    return Split(images[kept], labels[kept]), Split(images[held_out], labels[held_out])


def noise(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Gaussian noise of that standard deviation."""
    return images + strength * torch.randn(images.shape, generator=generator)


def contrast(images: Tensor, generator: torch.Generator, kept: float = 0.4) -> Tensor:
    """So much of the contrast around middle grey is left."""
    return 0.5 + kept * (images - 0.5)


def brightness(images: Tensor, generator: torch.Generator, added: float = 0.5) -> Tensor:
    """All intensities are so much higher."""
    return images + added


def blur(images: Tensor, generator: torch.Generator, times: int = 1) -> Tensor:
    """Every pixel becomes the mean of the 3 x 3 around it, so many times; the edge is continued."""
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return images


CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": noise,
    "contrast": contrast,
    "brightness": brightness,
    "blur": blur,
}
"""(images, generator) -> images of the same shape, which may leave the range from 0 to 1."""


class SmallCNN(nn.Sequential):
    """Images (N, 1, 8, 8) to logits (N, 10): three convolutions with a norm and a ReLU each, and a linear head.

    Args:
        norm: makes the norm of so many channels.
        width: channels of the first convolution; the others have twice as many.
    """

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    epochs: int = 25,
    batch_size: int = 50,
    rate: float = 0.01,
) -> nn.Module:
    """Trains `model` in place by Adam, whose rate falls to zero, and returns it in eval mode.

    The seed is that of the order of the images; the start values are the caller's.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64, order: Tensor | None = None
) -> float:
    """Per cent of the images that `model`, in the mode it is in, gets right in batches of that size.

    Args:
        model: (N, 1, 8, 8) to logits (N, 10).
        images: (N, 1, 8, 8).
        labels: (N,).
        batch_size: of N; the last batch is smaller where it does not divide N.
        order: (N,), the sequence in which the images come: `labels.argsort(stable=True)` sorts them by class;
            None takes them as they are.
    """
    order = torch.arange(len(images)) if order is None else order
    right = sum(int((model(images[b]).argmax(1) == labels[b]).sum()) for b in order.split(batch_size))
    return 100 * right / len(order)
