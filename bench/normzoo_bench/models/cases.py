"""A case: a model with torch's norms, of some size, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import normzoo
from normzoo.zoo import find

from ..cases import DTYPES
from .architectures import GPT, Norm, ResNet50, ViT
from .conversions import CONTENDERS

DIRECTIONS = ("step", "inference")
_WORDS, _CLASSES = 1024, 1000


class Size(NamedTuple):
    blocks: int
    samples: int
    extent: int
    """Tokens, or pixels a side."""
    width: int
    """Of a ResNet that of the bottlenecks in the first stage; 64 in ResNet-50, which has 16 blocks."""


class Batch(NamedTuple):
    x: Tensor
    target: Tensor

    def beside(self, model: nn.Module) -> Batch:
        """For the model as it is now: on its device, images in its dtype."""
        like = next(model.parameters())
        x = self.x.to(like.device, like.dtype if self.x.is_floating_point() else None)
        return Batch(x, self.target.to(like.device))


def _gpt(norm: Norm, size: Size) -> tuple[nn.Module, Batch]:
    ids = torch.randint(_WORDS, (size.samples, size.extent + 1))
    model = GPT(norm, size.blocks, size.width, size.extent, _WORDS)
    return model, Batch(ids[:, :-1].contiguous(), ids[:, 1:].flatten())


def _vit(norm: Norm, size: Size) -> tuple[nn.Module, Batch]:
    return ViT(norm, size.blocks, size.width, size.extent, classes=_CLASSES), _images(size)


def _resnet50(norm: Norm, size: Size) -> tuple[nn.Module, Batch]:
    return ResNet50(norm, size.blocks, size.width, _CLASSES), _images(size)


def _images(size: Size) -> Batch:
    images = torch.randn(size.samples, 3, size.extent, size.extent)
    return Batch(images, torch.randint(_CLASSES, (size.samples,)))


@dataclass(frozen=True)
class Model:
    make: Callable[[Norm, Size], tuple[nn.Module, Batch]]
    layer: str
    """The norm that it usually has."""
    optimizer: Callable[..., torch.optim.Optimizer]
    sizes: dict[str, tuple[Size, ...]]
    """By what :func:`cases` is asked for."""
    memory_formats: tuple[str, ...] = ("contiguous",)


MODELS = {
    "gpt": Model(
        _gpt,
        "layer_norm",
        torch.optim.AdamW,
        {
            "smoke": (Size(1, 2, 8, 32),),
            "cpu default": (Size(6, 4, 128, 384),),
            "cpu full": (Size(6, 4, 128, 384), Size(4, 8, 128, 256), Size(12, 1, 256, 768)),
            "cuda default": (Size(4, 8, 1024, 2048), Size(12, 1, 128, 768)),
            "cuda full": (Size(4, 8, 1024, 2048), Size(12, 1, 128, 768), Size(12, 16, 1024, 768)),
        },
    ),
    "vit": Model(
        _vit,
        "layer_norm",
        torch.optim.AdamW,
        {
            "smoke": (Size(1, 2, 32, 32),),
            "cpu default": (Size(12, 8, 128, 192),),
            "cpu full": (Size(12, 8, 128, 192), Size(12, 1, 224, 768)),
            "cuda default": (Size(12, 64, 224, 768),),
            "cuda full": (Size(12, 64, 224, 768), Size(12, 1, 224, 768)),
        },
    ),
    "resnet50": Model(
        _resnet50,
        "batch_norm",
        torch.optim.SGD,
        {
            "smoke": (Size(4, 4, 64, 8),),
            "cpu default": (Size(16, 8, 64, 64),),
            "cpu full": (Size(16, 8, 64, 64), Size(16, 2, 224, 64)),
            "cuda default": (Size(16, 64, 224, 64),),
            "cuda full": (Size(16, 64, 224, 64), Size(16, 1, 224, 64)),
        },
        ("contiguous", "channels_last"),
    ),
}


@dataclass(frozen=True)
class Case:
    model: str
    layer: str
    """The norm of the model before any conversion."""
    size: Size
    direction: str
    dtype: str
    memory_format: str = "contiguous"

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples and tokens, or of images."""
        n, extent = self.size[1:3]
        return (n, extent) if self.model == "gpt" else (n, 3, extent, extent)

    @property
    def key(self) -> dict:
        """What tells this case from others, as it stands in a row of results."""
        return {
            "layer": self.layer,
            "workload": f"{self.model}-{'x'.join(map(str, self.size))}",
            "shape": list(self.shape),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "mode": "training" if self.direction == "step" else "eval",
        }

    def __str__(self) -> str:
        words = (self.key["workload"], self.layer, self.dtype, self.memory_format, self.direction)
        return " ".join(word for word in words if word != "contiguous")

    def contenders(self, among: Sequence[str]) -> list[str]:
        """Those that there are for this model, in this direction."""
        found = []
        for name in among:
            conversion = CONTENDERS[name].conversion
            if conversion is None or (self.layer in conversion.of and self.direction in conversion.directions):
                found.append(name)
        return found

    def start(self, device: torch.device) -> tuple[nn.Module, Batch]:
        """The model with torch's norms, and what it is run on; the same numbers in every run.

        Weights of norms are not one, nor are biases zero, and running statistics are those of the batch, lest
        a conversion that forgets them pass.
        """
        norm = find(self.layer).torch_class
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, batch = MODELS[self.model].make(norm, self.size)
            for module in model.modules():
                if isinstance(module, norm):
                    for t in module.parameters(recurse=False):
                        t.data += 0.1 * torch.randn_like(t)
        batch = batch.beside(model.to(device))
        if self.layer == "batch_norm":
            normzoo.recalibrate(model, [batch.x])
        if self.memory_format == "channels_last":
            batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
            model.to(memory_format=torch.channels_last)
        model.to(DTYPES[self.dtype][0])
        if self.layer == "batch_norm":
            for module in model.modules():
                if isinstance(module, norm):
                    module.float()  # as under AMP; cuDNN takes no others
        return model.train(self.direction == "step"), batch.beside(model)


def cases(
    names: Sequence[str],
    device: str,
    size: str = "default",
    dtypes: Sequence[str] = ("float32",),
    directions: Sequence[str] = DIRECTIONS,
    layers: Sequence[str] = (),
) -> list[Case]:
    """Those of the models called `names`; with other norms than usual where `layers` says so."""
    found = []
    for name in names:
        model = MODELS[name]
        found += [
            Case(name, layer, each, direction, dtype, memory_format)
            for each in model.sizes["smoke" if size == "smoke" else f"{device} {size}"]
            for layer in layers or (model.layer,)
            for dtype in dtypes
            for memory_format in model.memory_formats
            for direction in directions
        ]
    return found
