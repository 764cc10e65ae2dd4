"""Where the weight of a module has its outputs, and which attributes tell its sizes: by its type alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Layout:
    """The first two dimensions of a weight."""

    out: int
    """The one that is that of what the module returns."""
    attributes: tuple[str, str]
    """What tells their sizes; the second of a convolution is one of ``groups`` parts."""


_LINEAR = Layout(0, ("out_features", "in_features"))
_CONV = Layout(0, ("out_channels", "in_channels"))
_TRANSPOSED = Layout(1, ("in_channels", "out_channels"))
_HUGGING_FACE = Layout(1, ("nx", "nf"))
_EMBEDDING = Layout(1, ("num_embeddings", "embedding_dim"))


def layout_of(module: nn.Module) -> Layout | None:
    """None where it is not known, whatever shape its weight has."""
    if isinstance(module, nn.Linear):
        return _LINEAR
    if isinstance(module, _ConvNd):
        return _TRANSPOSED if isinstance(module, _ConvTransposeNd) else _CONV
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _EMBEDDING
    hugging_face = ("Conv1D", "transformers.pytorch_utils")
    if any((cls.__name__, cls.__module__) == hugging_face for cls in type(module).__mro__):
        return _HUGGING_FACE
    return None


def follow(module: Any, name: str) -> None:
    """Lets the attributes of `module` say the shape that its weight has now.

    Raises:
        ValueError: weight and bias do not fit together.
    """
    layout, weight = layout_of(module), module._parameters.get("weight")
    if layout is None or weight is None or weight.dim() < 2:
        return
    groups = module.groups if isinstance(module, _ConvNd) else 1
    sizes = weight.shape[0], weight.shape[1] * groups
    bias = module._parameters.get("bias")
    if bias is not None and bias.shape != (sizes[layout.out],):
        raise ValueError(
            f"{name}.bias has shape {(*bias.shape,)} where its weight makes {sizes[layout.out]} outputs"
        )
    if any(size % groups for size in sizes):
        raise ValueError(f"{name}.weight has shape {(*weight.shape,)}, which {groups} groups do not divide")
    for attribute, size in zip(layout.attributes, sizes, strict=True):
        setattr(module, attribute, size)
