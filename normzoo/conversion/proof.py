"""Measuring whether a conversion kept the function: of one norm, and of the whole model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import Norm, tensor
from .report import count
from .samples import Outputs, Sample, Trained, outputs
from .surgery import Swap
from .trial import alone, bare, distance, inputs_for, run, short, undisturbed

Beside = Callable[[Tensor], Mapping[str, Tensor]]
"""Makes what a layer takes beside an input."""


def site_error(old: nn.Module, new: nn.Module, norm: Norm, beside: Beside) -> tuple[float, bool]:
    """How far two modules differ on one input: (of the largest entry in a row, whether rounding explains it).

    Copies run in eval mode, with the parameters they have.
    """
    like = next(
        (t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), torch.empty(0, device="cpu")
    )
    x = inputs_for(norm, like.device).to(like.dtype)
    with undisturbed():
        theirs, ours = (run(copy.deepcopy(bare(module)).eval(), x, beside(x)) for module in (old, new))
    if theirs.dtype != ours.dtype:
        raise TypeError(f"of {x.dtype} the old one makes {theirs.dtype}, the new one {ours.dtype}")
    error = distance(ours.double(), theirs.double(), norm.span(x))
    # Many norms are no better than float32 whatever the dtype.
    return error, error <= 8 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)


def trains_by_itself(norm: Norm) -> bool:
    """Whether it does in training what it does not do in eval mode."""
    of_batch = ("batch", "ghost_batch", "adab2n", "batch_channel", "evo_b0", "evo_b1", "evo_b2")
    return norm.family in of_batch or (norm.family == "instance" and bool(norm.statistics))


def trained_error(old: nn.Module, new: nn.Module, norm: Norm) -> tuple[float, bool]:
    """As :func:`site_error`, of the outputs in training mode and of the running statistics afterwards."""
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), torch.empty(0))
    x = inputs_for(norm, like.device).to(like.dtype)
    copies = [copy.deepcopy(bare(module)).train() for module in (old, new)]
    for each in (*copies[0].children(), *copies[1].children()):
        each.eval()  # an activation or a dropout after the norm
    with undisturbed():
        theirs, ours = (each(x).double() for each in copies)
    error = distance(ours, theirs, norm.span(x))
    for name, by_us in norm.stored.items():
        # Relative to the value before, too: of a large one the small rest has the rounding of the whole.
        start, theirs, ours = (
            torch.zeros(1) if t is None else t.double().reshape(-1)
            for t in (tensor(old, name), tensor(copies[0], name), tensor(copies[1], by_us))
        )
        # Of each channel but for the mean, which is as exact as the deviation is large.
        span = (0, 1) if by_us == "running_mean" else (0,)
        error = max(error, distance(torch.stack((ours, start)), torch.stack((theirs, start)), span))
    return error, error <= 8 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Difference:
    """How one output of a model changed."""

    output: str
    error: float
    """Largest difference, relative to the largest entry."""
    rounding: float
    """The same for the original model with the output of every converted norm off at random: by a last bit, or
    where all claim to be exact by the error of that norm, if this is more."""
    cosine: float


@dataclass(frozen=True)
class Proof:
    """What a conversion did to the outputs of a model on a sample, in eval mode.

    Norms with batch statistics whose conversion claims to be exact are compared in training mode too.

    ``str()`` of it is a sentence.
    """

    outputs: tuple[Difference, ...]
    exact: bool
    """Whether every converted norm claims to compute the same in eval mode."""
    idle: int = 0
    """How many of the converted norms did not run, so that nothing is known of them."""
    trained: int = 0
    """How many of them were compared in training mode too."""
    untrained: str = ""
    """Why there is no comparison in training mode, where there should be one."""
    kind: str = "norm"
    """A word for what was converted."""

    @property
    def error(self) -> float:
        """The largest difference of an output, relative to its largest entry."""
        return max(each.error for each in self.outputs)

    @property
    def rounding(self) -> float:
        """The largest difference that a last bit in the converted norms makes."""
        return max(each.rounding for each in self.outputs)

    @property
    def cosine(self) -> float:
        """The smallest cosine between an output before and after."""
        return min(each.cosine for each in self.outputs)

    @property
    def same(self) -> bool:
        """Whether rounding explains every difference: four times, for errors of one sign add up faster."""
        return all(not each.error or each.error <= 4 * each.rounding < math.inf for each in self.outputs)

    @property
    def passed(self) -> bool:
        """Whether the outputs are what the conversion claims: the same, or finite where it claims no more."""
        return self.same if self.exact else self.error < math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        outputs = [vars(each) for each in self.outputs]
        keys = ("passed", "same", "exact", "error", "rounding", "cosine", "idle", "trained", "untrained")
        return {key: getattr(self, key) for key in keys} | {"outputs": outputs}

    def __str__(self) -> str:
        what = f"converted {self.kind}"
        found = f"the model computes {'the same' if self.same else 'another'} function"
        if self.exact and not self.same:
            found = f"FAILED: {found}, although every conversion claims to be exact"
        unseen = f"; {count(self.idle, what)} did not run on this sample" if self.idle else ""
        unseen += f"; not compared in training mode ({self.untrained})" if self.untrained else ""
        if self.trained:
            found += f", with {count(self.trained, 'norm')} in training mode too"
        if self.error == 0:
            return f"{found}: outputs are equal to the last bit{unseen}"
        return (
            f"{found}: outputs differ by at most {self.error:.1e} of their largest entry (the last bit of the "
            f"{what}s explains {self.rounding:.1e}), cosine at least {self.cosine:.6f}{unseen}"
        )


def compare(before: Outputs, rounded: Outputs, again: Outputs, after: Outputs, exact: bool, idle: int) -> Proof:
    """The proof from the outputs of a model before a conversion, with its norms nudged, once more, and after.

    Raises:
        ValueError: there are no outputs, or other ones than before; all are zero, which shows nothing; or the
            model returns something else each time.
    """
    if not before or before.keys() != after.keys():
        raise ValueError(
            f"verify: the model returned the floating-point tensors {list(before)} before and {list(after)} "
            "after; it must return the same ones, and at least one"
        )
    found = []
    for name, old in before.items():
        new, moved, repeated = (each.get(name, old.new_empty(0)) for each in (after, rounded, again))
        error, step, drift = (distance(t.double(), old.double(), ()) for t in (new, moved, repeated))
        rounding = step + torch.finfo(old.dtype).eps
        if drift == math.inf or 4 * drift > rounding:
            raise ValueError(
                f"verify: before the conversion the model returns another {name} each time it runs on this "
                f"sample (by {drift:.1e} of the largest entry), so that a comparison shows nothing; pass a "
                "function that calls it in the same state, with the same random numbers"
            )
        if error or old.nan_to_num(0.0, 0.0, 0.0).any():
            found.append(Difference(name, error, rounding, _cosine(new.double(), old.double())))
    if not found:
        raise ValueError(
            "verify: every output is zero on this sample, or not finite, before and after, which shows nothing"
        )
    return Proof(tuple(found), exact, idle)


def _cosine(a: Tensor, b: Tensor) -> float:
    """That of the finite entries; zero where the shapes differ."""
    if a.shape != b.shape:
        return 0.0
    finite = a.isfinite() & b.isfinite()
    return F.cosine_similarity(a[finite], b[finite], dim=0).item()


def prove(
    model: nn.Module,
    swap: Swap,
    sample: Sample,
    sites: Sequence[tuple[nn.Module, float]],
    exact: bool,
    old: Sequence[Trained],
    new: Sequence[Trained],
) -> Proof:
    """The proof of a conversion that is not in place.

    Args:
        sites: the converted norms, and how far their outputs are off where rounding is tried.
        old, new: the norms to be compared in training mode too, before and after.

    Raises:
        ValueError: as in :func:`compare`.
    """

    def after(*trained: Trained) -> Outputs:
        swap.do()
        try:
            return outputs(swap.root, sample, trained)
        finally:
            swap.undo()

    before = outputs(model, sample)
    with nudged(sites) as ran:
        rounded = outputs(model, sample)
    proof = compare(before, rounded, outputs(model, sample), after(), exact, idle=len(sites) - len(ran))
    live = [i for i, each in enumerate(old) if each.module in ran]
    if not live:
        return proof
    old, new = [old[i] for i in live], [new[i] for i in live]
    with alone():
        try:
            before = outputs(model, sample, old)
        except Exception as error:  # such as a batch that is too small for training
            return dataclasses.replace(proof, untrained=short(error))
        with nudged(sites):
            rounded = outputs(model, sample, old)
        trained = compare(before, rounded, outputs(model, sample, old), after(*new), exact, idle=0)
    both = (
        *proof.outputs,
        *(dataclasses.replace(o, output=f"{o.output} in training") for o in trained.outputs),
    )
    return dataclasses.replace(proof, outputs=both, trained=len(live))


@contextlib.contextmanager
def nudged(modules: Sequence[tuple[nn.Module, float]]) -> Iterator[set[nn.Module]]:
    """While it lasts, the outputs of each module are off by a share of themselves, up or down at random.

    Yields a set that collects the modules that run.
    """
    chance = torch.Generator("cpu").manual_seed(0)
    ran = set()

    def nudge(y: Tensor, share: float) -> Tensor:
        if y.is_nested:
            return torch.nested.as_nested_tensor([nudge(part, share) for part in y.unbind()])
        sign = torch.randint(2, y.shape, generator=chance, device="cpu").to(y.device, torch.float32) * 2 - 1
        step = max(share, torch.finfo(y.dtype).eps)
        return (y + y.to(torch.promote_types(y.dtype, torch.float32)) * step * sign).to(y.dtype)

    def hook_of(norm: nn.Module, share: float) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            ran.add(norm)  # `module` may be a replica of it
            return nudge(y, share)

        return hook

    handles = [norm.register_forward_hook(hook_of(norm, share)) for norm, share in modules]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
