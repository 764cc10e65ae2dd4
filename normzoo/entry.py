"""What the rest of the library knows about a layer, and inputs to try it with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """What the rest of the library needs to know about a layer."""

    cls: type[nn.Module]
    function: Callable
    title: str
    family: str
    """The engine: ``rows``, ``channels`` or ``running``; ``weights`` where the input is a layer's weight."""
    layout: str
    """Shape of the input."""
    couples_samples: bool
    """Whether the output of one sample depends on the others in the batch."""
    paper: str
    """arXiv identifier."""
    kernel: bool = True
    """Whether a Triton kernel serves it."""
    stored: bool = False
    """Whether it takes stored statistics in training too, and has nothing to train."""
    activates: bool = False
    """Whether an activation is part of it, so that it bends every pixel."""
    searches: bool = False
    """Whether it reads the input once more, for what its statistics depend on."""
    eval_statistics: bool = False
    """Whether it takes statistics of the input in eval mode too, where it couples samples in training."""
    constant: bool = False
    """Whether the statistics of the batch are constants for autograd."""
    swept: bool = False
    """Whether a step of training goes once over its tensors each way, for statistics that are known before."""
    like: str = ""
    """The entry that it shares kernels and graphs with, but for a line: what is slow is done for that one."""
    approximate: bool = False
    """Whether the backward pass in training is no derivative of the forward pass."""
    official: str = ""
    """The authors' code, where there is any."""
    added: Callable | None = None
    """The function with a fused residual addition."""
    torch_class: type[nn.Module] | None = None
    """torch's class with the same mathematics and state."""
    others: tuple[type[nn.Module], ...] = ()
    """Classes that do the same for inputs of other dimensions."""
    carriers: tuple[type[nn.Module], ...] = ()
    """Layers that do it to their own weight."""
    arguments: tuple = (16,)
    """Positional constructor arguments for tests and demonstrations."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for measuring, where the usual ones do not show what training mostly does."""
    variants: tuple[dict, ...] = ({},)
    """Keyword arguments that a test should try."""
    sample: Callable[..., Tensor] = lambda *lead, **kwargs: torch.randn(*(lead or (4, 3)), 16, **kwargs)
    """Makes an input from leading sizes and the keyword arguments of torch.randn."""
    beside: Callable[[Tensor], dict[str, Tensor]] = lambda x: {}
    """Makes what a call needs beside an input, by name."""

    @property
    def name(self) -> str:
        """Snake-case name, the one `convert` and the command line take."""
        return self.function.__name__

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        return (self.cls, *self.others)

    @property
    def exported(self) -> tuple[type[nn.Module], ...]:
        """All that the package has under its name."""
        return (*self.classes, *self.carriers)

    def called(self, name: str) -> type[nn.Module] | None:
        """The one of its classes that is called `name`, in whatever spelling."""
        return next((cls for cls in self.exported if spelling(cls.__name__) == spelling(name)), None)

    def make(self, **kwargs) -> nn.Module:
        return self.cls(*self.arguments, **kwargs)


def spelling(name: str) -> str:
    """Equal for names that differ in case and underscores alone: AdaB2N, adab2n, ada_b2n."""
    return name.replace("_", "").lower()


def find_in(entries: Sequence[Entry], name: str, caller: str, others: str) -> Entry:
    """What `normzoo.zoo.find` does."""
    known = [
        (text, entry) for entry in entries for text in (entry.name, *(cls.__name__ for cls in entry.exported))
    ]
    for text, entry in known:
        if spelling(text) == spelling(name):
            return entry
    word, shown = spelling(name), {spelling(text): text for text, _ in reversed(known)}
    within = [entry.name for entry in entries if word and word in spelling(entry.name)]
    short = [entry.name for entry in entries if word == "".join(part[0] for part in entry.name.split("_"))]
    close = short or [shown[near] for near in difflib.get_close_matches(word, shown, 1)] or within[:3]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    names = ", ".join(entry.name for entry in entries)
    raise ValueError(f"{caller}: there is no layer called {name!r}; there are {names}{others}{meant}")


def images(*lead: int, **kwargs) -> Tensor:
    """(N, 16, H, W) from N or from (N, H, W)."""
    n, *space = lead or (4,)
    return torch.randn(n, 16, *(space or (3, 2)), **kwargs)


def tokens(*lead: int, **kwargs) -> Tensor:
    """(B, *, 16), of 4 samples of 3 tokens by default."""
    return torch.randn(*(lead if len(lead) > 1 else (*(lead or (4,)), 3)), 16, **kwargs)


def _wave(x: Tensor, *size: int) -> Tensor:
    """A tensor without chance, beside x; of eighths, which every dtype has."""
    steps = torch.arange(math.prod(size), device=x.device).view(size)
    return steps.mul(0.7).sin().mul(8).round().div(8).to(x.dtype)


def hole(x: Tensor) -> dict[str, Tensor]:
    """A mask for every sample."""
    return {"mask": _wave(x, x.shape[0], 1, *x.shape[2:]) > 0}


def modulation(x: Tensor) -> dict[str, Tensor]:
    """A scale and a shift for every sample."""
    wave = _wave(x, 2, x.shape[0], x.shape[-1])
    return {"scale": wave[0], "shift": wave[1]}


def times(x: Tensor) -> dict[str, Tensor]:
    """A time for every sample."""
    return {"t": _wave(x, x.shape[0])}
