"""Three probes that show on a sample whether a rewrite is exact: shift, mean, and output.

The first alone would pass a post-LN model, whose norms write into the stream; the last alone says nothing of
other inputs.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..conversion.samples import Outputs, Sample, outputs, tensors_in
from ..conversion.trial import chance, distance, noise, short, undisturbed
from ..conversion.tying import untie
from .editing import Edit, along
from .finding import Found
from .stream import Writer

_EXACT = 1e-9
"""What float64 is held to: a thousand times the rounding of a transformer, and far below any error."""
_NARROW = 1e-4
"""The same where numbers go through float32 on their way."""


class Unshown(ValueError):
    """Why the probes show nothing."""


@dataclass(frozen=True)
class StreamProof:
    """What the probes of a rewrite found; ``str()`` of it is a sentence or two."""

    shift: float
    """How far outputs move, of their largest entry, when every writer of the stream is shifted at random."""
    mean: float
    """Largest mean at the input of a rewritten norm, of the root mean square there."""
    output: float
    """How far outputs are from those before, of their largest entry, in float64; in training mode too, where
    weights are centered in every forward."""
    rounding: float
    """How far outputs of the rewritten model are from those of the original in float64, in its own dtype."""
    rounding_before: float
    """The same of the original model."""
    tolerance: float
    """What these must not exceed: the rounding of float64, or of float32 where there is some."""
    culprit: str = ""
    """The writer or the norm that fails."""

    @property
    def passed(self) -> bool:
        """Whether the rewrite computes the same."""
        exact = max(self.shift, self.mean, self.output) <= self.tolerance
        return exact and self.rounding <= max(10 * self.rounding_before, self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "passed": self.passed}

    def __str__(self) -> str:
        said = "the model computes the same function" if self.passed else "FAILED: another function"
        at = f" (at {self.culprit})" if self.culprit else ""
        return (
            f"{said}. In float64, of the largest entry: outputs move by {self.shift:.1e} when all that writes "
            f"the stream is shifted, the mean that the norms see is {self.mean:.1e}, outputs differ by "
            f"{self.output:.1e} (at most {self.tolerance:.0e} is rounding){at}. In its own dtype the model is "
            f"{self.rounding:.1e} from that, and was {self.rounding_before:.1e}"
        )


class Probe:
    """A model, and a sample that its outputs are looked at with."""

    def __init__(self, model: nn.Module, sample: Sample) -> None:
        self.model = model
        self.sample = sample
        self.narrow = False
        """Whether what the norms make goes through less than float64 in a model of float64."""

    def twin(self) -> nn.Module:
        """A copy in float64 and eval mode that takes inputs of any floating dtype."""
        twin = copy.deepcopy(self.model).double().eval()
        twin.register_forward_pre_hook(_widen, with_kwargs=True, prepend=True)
        return twin

    def prove(self, edit: Edit) -> StreamProof:
        """Runs the three probes, on copies of the model but for the last run; it is as it was afterwards.

        Raises:
            Unshown: outputs are zero on the sample, or there are none, or the model does not run on it.
        """
        tolerance = _NARROW if self.narrow else _EXACT
        try:
            own = outputs(self.model, self.sample)
        except Exception as error:  # it ran in float64
            raise Unshown(f"the model does not run on the sample: {short(error)}") from error
        twin = self.twin()
        exact = outputs(twin, self.sample)
        _stir(twin)
        before = outputs(twin, self.sample)
        if not before:
            raise Unshown("the model returns no floating-point tensor, so that nothing can be compared")
        if not any(t.any() for t in before.values()):
            raise Unshown("every output of the model is zero on this sample, which shows nothing")
        for name in edit.untied:
            untie(twin, f"{name}.weight")
        shift, culprit = _shift(twin, self.sample, edit.found, before, tolerance)
        untouched = copy.deepcopy(twin) if edit.parametrized else None
        undo = edit.plain.apply(twin)
        with _means(twin, [site.name for site in edit.sites]) as means:
            output = apart(outputs(twin, self.sample), before)
        if edit.plain is not edit:
            undo()
            edit.apply(twin)
            output = max(output, apart(outputs(twin, self.sample), before))
        if untouched is not None:
            output = max(output, apart(*(_in_training(each, self.sample) for each in (twin, untouched))))
        mean = max(means.get(site.name, math.inf) for site in edit.sites)
        if not culprit and mean > tolerance:
            culprit = max((site.name for site in edit.sites), key=lambda name: means.get(name, math.inf))
        rounding = apart(self._rewritten(edit), exact)
        return StreamProof(shift, mean, output, rounding, apart(own, exact), tolerance, culprit)

    def _rewritten(self, edit: Edit) -> Outputs:
        """What the model itself returns with the edit: what it shares with others, or holds in a closure, a
        copy does not."""
        undo = edit.apply(self.model)
        try:
            return outputs(self.model, self.sample)
        finally:
            undo()


def _in_training(twin: nn.Module, sample: Sample) -> Outputs:
    """What a copy returns in training mode, the random numbers the same each time."""
    with undisturbed():
        return tensors_in(sample.run(twin.train()))


def _widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        (args, kwargs),
    )


@torch.no_grad()
def _stir(twin: nn.Module) -> None:
    """Gives other values to parameters that have one throughout: a gate of zero shows nothing."""
    numbers = chance()
    for p in twin.parameters():
        if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
            p.add_(0.1 * noise(p.shape, numbers).to(p))


def apart(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference of any output, of its largest entry."""
    if not theirs or ours.keys() != theirs.keys():
        return math.inf
    return max(distance(ours[name].double(), t.double(), ()) for name, t in theirs.items())


def _shift(
    twin: nn.Module, sample: Sample, found: Found, before: Outputs, tolerance: float
) -> tuple[float, str]:
    """How far outputs move when each row of each writer is shifted by a number of its own; whose fault."""
    writers = sorted(found.writers, key=lambda w: w.name)
    with _shifted(twin, writers, found.centered_outputs):
        moved = apart(outputs(twin, sample), before)
    if moved <= tolerance:
        return moved, ""
    for writer in writers:
        with _shifted(twin, [writer], {}):
            if apart(outputs(twin, sample), before) > tolerance:
                return moved, writer.name
    return moved, next(iter(found.centered_outputs), "")


@contextlib.contextmanager
def _shifted(twin: nn.Module, writers: Sequence[Writer], cuts: Mapping[str, int]) -> Iterator[None]:
    numbers = chance()
    tensors: dict[str, Tensor] = dict((*twin.named_parameters(), *twin.named_buffers()))
    kept = {writer.name: tensors[writer.name].detach().clone() for writer in writers}

    def shift(tensor: Tensor, axis: int) -> Tensor:
        shape = [1 if d == axis % tensor.dim() else size for d, size in enumerate(tensor.shape)]
        return noise(shape, numbers).to(tensor) * tensor.square().mean().sqrt().clamp_min(0.01)

    def shifts(axis: int) -> Callable[..., Tensor]:
        return lambda module, args, y: y + shift(y, axis)

    handles = [twin.get_submodule(name).register_forward_hook(shifts(axis)) for name, axis in cuts.items()]
    try:
        with torch.no_grad():
            for writer in writers:
                tensor = tensors[writer.name]
                by = shift(tensor, writer.axis)
                for name in writer.scale:
                    gain = along(tensors[name], tensor, writer.axis)
                    by = by * gain.abs().mean() / gain
                if by.isfinite().all():  # what is multiplied by zero has no shift
                    tensor.add_(by)
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, value in kept.items():
                tensors[name].copy_(value)


@contextlib.contextmanager
def _means(model: nn.Module, norms: Sequence[str]) -> Iterator[dict[str, float]]:
    """While it lasts, collects the largest mean of a row, of the root mean square, that each norm takes."""
    found: dict[str, float] = {}

    def hook_of(name: str, axis: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (x, *_) = (*args, *kwargs.values())
            size = x.square().mean(axis).sqrt().clamp_min(1e-30)
            found[name] = max(found.get(name, 0.0), (x.mean(axis).abs() / size).max().item())

        return hook

    handles = []
    for name in norms:
        norm: Any = model.get_submodule(name)
        axis = 1 if getattr(norm, "over_channels", False) else -1
        handles.append(norm.register_forward_pre_hook(hook_of(name, axis), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
