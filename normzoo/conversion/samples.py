"""Running a model on a sample, the same way each time, and what it returns."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..side_inputs import inputs

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A norm that runs in training mode."""

    name: str
    module: nn.Module
    statistics: tuple[str, ...]
    """Buffers to look at afterwards: mean, variance and the number of batches; a variance alone; or none."""


@dataclass(frozen=True)
class Sample:
    """What a model is run on."""

    input: Any
    """A tuple is taken as positional, a mapping as keyword arguments; or a function of the model."""
    beside: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Side inputs, for the models that take them."""

    def run(self, model: nn.Module) -> Any:
        taken = {name for module in model.modules() for name in getattr(module, "side_inputs", ())}
        given = {name: value for name, value in self.beside.items() if name in taken}
        with inputs(model, **given) if given else contextlib.nullcontext():
            return _call(model, pytree.tree_map(fresh, self.input))


def outputs(model: nn.Module, sample: Sample, trained: Sequence[Trained] = ()) -> Outputs:
    """The floating-point tensors that `model` returns for `sample` in eval mode, by their place in it.

    The next run finds `sample`, the buffers of the model and torch's random numbers as this one did.

    Args:
        trained: norms that are in training mode, whose statistics after the run are among the outputs.
    """
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices)), torch.no_grad(), _eval(model):
        for each in trained:
            each.module.training = True
        start = [_moved(each) for each in trained]
        returned = sample.run(model)
        moved = {}
        for each, first in zip(trained, start, strict=True):
            moved |= {name: torch.cat((t, first[name])) for name, t in _moved(each).items()}
        tensors = tensors_in(returned)
        if any(t.is_meta for t in tensors.values()):
            raise ValueError("verify: the model is on the meta device, where there are no numbers to compare")
        return tensors | {name: t.clone() for name, t in moved.items()}


def tensors_in(returned: Any) -> Outputs:
    """Copies of the floating-point tensors that a model returned, by their place in it."""
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_map(opened, returned))
    tensors = {
        pytree.keystr(path) or "output": _numbers(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)
    }
    return {name: t.clone() for name, t in tensors.items() if t.is_floating_point() and t.numel()}


def _moved(norm: Trained) -> Outputs:
    """The statistics of a norm: mean and deviation in one tensor, for a mean alone may be mere rounding."""
    if not norm.statistics:
        return {}
    held = [norm.module.get_buffer(name) for name in norm.statistics]
    *mean, var = held[:2]
    counts = held[2:]
    found = {f"{norm.name}: statistics": torch.cat((*mean, var.clamp(min=0).sqrt()))}
    return found | {f"{norm.name}: batches": count.double().reshape(1) for count in counts}


def _numbers(t: Tensor) -> Tensor:
    """Its entries in a dense, real tensor."""
    if t.is_nested:
        t = torch.nested.to_padded_tensor(t, 0.0)
    t = t.to_dense() if t.layout != torch.strided else t
    return torch.view_as_real(t) if t.is_complex() else t


def opened(leaf: Any) -> Any:
    """A dataclass as a mapping, which pytree can look into."""
    if not dataclasses.is_dataclass(leaf):
        return leaf
    return {
        field.name: pytree.tree_map(opened, getattr(leaf, field.name)) for field in dataclasses.fields(leaf)
    }


def fresh(leaf: Any) -> Any:
    """A copy, lest a model that writes to its input, or fills a cache, finds its own traces."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if callable(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # such as a generator
        return leaf


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, tuple):
        return model(*sample)
    return sample(model) if callable(sample) else model(sample)


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards the modes and the buffers are as before."""
    modes = {module: module.training for module in model.modules()}
    held = ((m, name, b) for m in modes for name, b in m._buffers.items() if b is not None and not is_lazy(b))
    buffers = [(m, name, b, b.clone()) for m, name, b in held]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)
