"""What the tests over ZOO share: cases, trained layers, and functions called with what a layer holds."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from normzoo.layers.alpha import AlphaBatchNorm
from normzoo.layers.region_learned import RegionNormL
from normzoo.state import Guarded
from normzoo.zoo import ZOO, Entry


def named(entries) -> list:
    return [pytest.param(entry, id=entry.name) for entry in entries]


ENTRIES = named(ZOO)
CHANNELS = named(entry for entry in ZOO if entry.family == "channels")
ROWS = named(entry for entry in ZOO if entry.family == "rows")
DISTINCT = named(entry for entry in ZOO if not entry.like)
BACKENDS = ["auto", "triton"]
ON_BACKENDS = [
    pytest.param(entry, backend, id=f"{entry.name}-{backend}")
    for entry in ZOO
    for backend in BACKENDS
    if backend == "auto" or not entry.like
]
CASES = [
    pytest.param(entry, kwargs, id=f"{entry.name}-{'-'.join(map(str, kwargs)) or 'default'}")
    for entry in ZOO
    for kwargs in entry.variants
]
CLASSES = [pytest.param(entry, cls, id=cls.__name__) for entry in ZOO for cls in entry.classes]
_SPACES = {"1d": (6,), "2d": (3, 2), "3d": (2, 3, 2)}


class _Beside:
    """A hook that adds what a call needs beside x; whatever x is, so that the layer can refuse it."""

    def __init__(self, entry: Entry) -> None:
        self.beside, self.sample = entry.beside, entry.sample

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0]
        proper = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1
        return args, self.beside(x if proper else self.sample()) | kwargs


def made(entry: Entry, cls: type[nn.Module] | None = None, **kwargs) -> nn.Module:
    """A new layer that can be called with x alone."""
    layer = (cls or entry.cls)(*entry.arguments, **kwargs)
    if entry.beside is not Entry.beside:
        layer.register_forward_pre_hook(_Beside(entry), with_kwargs=True)
    return layer


def trained(entry: Entry, kwargs: dict | None = None, cls: type[nn.Module] | None = None, **where) -> nn.Module:
    """As `made`, with parameters and floating-point buffers that are not at their initial values."""
    layer = made(entry, cls, **(kwargs or {}), **where)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 2)
        for b in layer.buffers():
            if b.is_floating_point():
                b.add_(torch.rand_like(b) / 2)  # a variance stays positive
    return layer


def sample_for(entry: Entry, cls: type[nn.Module], batch: int = 4, **kwargs) -> Tensor:
    """An input with as many dimensions as `cls` takes."""
    return entry.sample(batch, *_SPACES.get(cls.__name__[-2:], ()), **kwargs)


def small(entry: Entry) -> Tensor:
    """An input in float64 whose every entry can be moved."""
    lead = (3,) if entry.family == "rows" else (4, 1, 2)
    return entry.sample(*lead, dtype=torch.float64)


def torchs(entry: Entry, cls: type[nn.Module]) -> type[nn.Module]:
    """torch's class for `cls`, which has the same name."""
    assert entry.torch_class is not None
    return getattr(nn, cls.__name__)


def function_of(layer: nn.Module, entry: Entry, **changed):
    """The function of an entry with the arguments that `layer` holds under their names; a function of x."""
    held = {"use_input_stats": layer.training} | _convolutions(layer) | changed
    beside = _Beside(entry)
    _, *parameters = inspect.signature(entry.function).parameters.values()
    arguments = {p.name: held.get(p.name, getattr(layer, p.name, None)) for p in parameters}
    absent = [p for p in parameters if arguments[p.name] is None and p.default is not p.empty]
    omitted = {p.name for p in absent if p.default is None or "None" not in str(p.annotation)}
    given = {name: value for name, value in arguments.items() if name not in omitted}
    own = {name: value for name, value in given.items() if name in changed}

    def function(x):
        return entry.function(x, **given | beside(layer, (x,), own)[1])

    return function


def _convolutions(layer: nn.Module) -> dict:
    if not isinstance(layer, RegionNormL):
        return {}
    both = {name: getattr(layer.sa, f"{name}_conv") for name in ("gamma", "beta")}
    return {"importance": layer.sa.conv1.weight} | {name: (c.weight, c.bias) for name, c in both.items()}


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those outside of the state dict too, as they are now."""
    return {name: t.detach().clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}


def assert_state(layer: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit."""
    now = state_of(layer)
    assert now.keys() == before.keys()
    changed = [name for name, t in now.items() if not torch.equal(t, before[name])]
    assert not changed, f"{type(layer).__name__}: changed {changed}"


def modes(layer: nn.Module) -> tuple[bool, ...]:
    """Training and eval mode; without buffers these are the same."""
    return (True, False) if list(layer.buffers()) else (True,)


def moves_state(layer: nn.Module) -> bool:
    """Whether a forward pass writes buffers, which function transforms refuse; those of torch's layers too."""
    tracks = isinstance(layer, Guarded) and not isinstance(layer, AlphaBatchNorm)
    return tracks and layer.training and layer.running_var is not None


def step(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward pass, by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) if dy is None else dy)
    assert x.grad is not None
    grads = {f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}
