"""ZOO: one entry a layer. Tests, benchmarks, the docs gallery and the command line iterate over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import functional
from .layers.layer import LayerNorm
from .layers.rms import CRMSNorm, RMSNorm


@dataclass(frozen=True)
class Entry:
    """What the rest of the library needs to know about a layer."""

    cls: type[nn.Module]
    function: Callable
    title: str
    family: str
    """The engine, ``rows``."""
    layout: str
    """Shape of the input."""
    kernel: bool
    """Whether a Triton kernel serves it."""
    couples_samples: bool
    """Whether the output of one sample depends on the others in the batch."""
    paper: str
    """arXiv identifier."""
    official: str = ""
    """The authors' code, where there is any."""
    added: Callable | None = None
    """The function with a fused residual addition."""
    torch_class: type[nn.Module] | None = None
    """torch's class with the same mathematics and state."""
    arguments: tuple = (16,)
    """Positional constructor arguments for tests and demonstrations."""
    variants: tuple[dict, ...] = ({},)
    """Keyword arguments that a test should try."""
    sample: Callable[..., Tensor] = lambda *lead, **kwargs: torch.randn(*(lead or (4, 3)), 16, **kwargs)
    """Makes an input from leading sizes and the keyword arguments of torch.randn."""

    @property
    def name(self) -> str:
        """Snake-case name, the one `convert` and the command line take."""
        return self.function.__name__

    def make(self, **kwargs) -> nn.Module:
        return self.cls(*self.arguments, **kwargs)


ZOO: tuple[Entry, ...] = (
    Entry(
        cls=LayerNorm,
        function=functional.layer_norm,
        added=functional.add_layer_norm,
        title="Layer normalization",
        family="rows",
        layout="(*, d)",
        kernel=True,
        couples_samples=False,
        paper="1607.06450",
        official="ryankiros/layer-norm",
        torch_class=nn.LayerNorm,
        variants=({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}),
    ),
    Entry(
        cls=RMSNorm,
        function=functional.rms_norm,
        added=functional.add_rms_norm,
        title="RMS normalization",
        family="rows",
        layout="(*, d)",
        kernel=True,
        couples_samples=False,
        paper="1910.07467",
        official="bzhangGo/rmsnorm",
        torch_class=nn.RMSNorm,
        variants=(
            {},
            {"bias": True},
            {"elementwise_affine": False},
            {"offset": 1.0, "cast": "gemma"},
            {"eps": 1e-5, "cast": "llama"},
        ),
    ),
    Entry(
        cls=CRMSNorm,
        function=functional.crms_norm,
        title="Compressed RMS normalization",
        family="rows",
        layout="(*, d - 1)",
        kernel=True,
        couples_samples=False,
        paper="2305.14858",
        official="ZixuanJiang/pre-rmsnorm-transformer",
        variants=({}, {"elementwise_affine": True}),
    ),
)


def find(name: str) -> Entry:
    """The entry called `name`: snake case, or the class name.

    Raises:
        ValueError: there is none.
    """
    for entry in ZOO:
        if name in (entry.name, entry.cls.__name__):
            return entry
    known = ", ".join(entry.name for entry in ZOO)
    raise ValueError(f"normzoo: there is no layer called {name!r}; there are {known}")
