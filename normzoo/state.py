"""Stored state: how it enters a graph, and how new state is written.

New state is computed out of place and committed at the end of a successful forward. All of it is tensors, so
that nothing waits for the device and resuming is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import checks
from .dispatch import KERNEL_DTYPES, insisted, or_none, use_kernel

NONFINITE = ("propagate", "skip")

_library = torch.library.Library("normzoo", "FRAGMENT")
_library.define("snapshot(Tensor state) -> Tensor")
_library.define("present(Tensor state, Tensor after) -> Tensor")


def _snapshot(state: Tensor) -> Tensor:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "normzoo: a compiled graph reads stored statistics in the backward pass, where they have moved, so "
            "that gradients would be wrong; leave layers that normalize by them, or train by them, out of "
            "activation checkpointing"
        )
    return state.clone()


_library.impl("snapshot", _snapshot, "CompositeExplicitAutograd")
torch.library.register_fake("normzoo::snapshot", torch.empty_like, lib=_library)


def snapshot(state: Tensor) -> Tensor:
    """The value of a buffer now, for a computation that is differentiated while the buffer moves on.

    An operator that torch.compile does not look into: it would otherwise read the buffer again in the backward
    pass, after the update, and give wrong gradients without a word. Activation checkpointing makes it do so all
    the same, and there the operator raises.
    """
    return torch.ops.normzoo.snapshot(state.detach())


_library.impl("present", lambda state, after: state.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("normzoo::present", lambda state, after: torch.empty_like(state), lib=_library)


def present(state: Tensor, after: Tensor) -> Tensor:
    """The value of a buffer in a backward pass, which has `after`, a gradient.

    Without something of the backward pass among its inputs, torch.compile would read it in the forward pass.
    """
    return torch.ops.normzoo.present(state.detach(), after.detach())


def recomputing() -> bool:
    """Whether this runs inside of a backward pass, as the second forward of activation checkpointing does.

    Any other forward in there, such as one in a hook of a tensor, cannot be told from it.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def commit(updates: Iterable[tuple[Tensor, Tensor]], when: Tensor | None = None) -> None:
    """Writes new values into buffers; with `when`, a bool on the device, only if it is true."""
    for buffer, value in updates:
        value = value.detach().to(buffer.dtype)
        buffer.copy_(value if when is None else torch.where(when, value, buffer))


def average(old: Tensor, new: Tensor, factor: float | Tensor) -> Tensor:
    """(1 − factor) · old + factor · new, in the wider of their dtypes."""
    if old.dtype != new.dtype:
        old = old.to(torch.promote_types(old.dtype, new.dtype))
    kept, new = old * (1 - factor), new.detach()
    return kept + factor * new if isinstance(factor, Tensor) else torch.add(kept, new, alpha=factor)


def moved(
    pairs: Iterable[tuple[Tensor, Tensor]], count: Any, factor: float | Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Of each (running, new) pair the running tensor and the value it moves to, for :func:`commit`.

    A new value (N, C) stands for its mean over the samples. `count`: values that the new statistics were taken
    over; of nothing, nothing moves.
    """
    pairs = [(old, of_batch(new)) for old, new in pairs]
    if not isinstance(count, Tensor):
        return [(old, average(old, new, factor).to(old.dtype)) for old, new in pairs] if count else []
    some = (count != 0).all()  # across ranks, all of which may have empty batches; a NaN goes on
    return [(old, torch.where(some, average(old, new, factor).to(old.dtype), old)) for old, new in pairs]


def of_batch(statistic: Tensor) -> Tensor:
    """The mean over the samples of a statistic (N, C); one of the batch, (C,), as it is."""
    return statistic.mean(0) if statistic.dim() == 2 else statistic


def advance(running: Sequence[Tensor], statistics: Sequence[Any] | None, momentum: float) -> None:
    """Moves running statistics, if there are any, by (one or two statistics, count) of a batch."""
    if running and statistics and not recomputing():
        pairs = list(zip(running, statistics[:-1], strict=True))
        if not moved_by_kernel(pairs, statistics[-1], momentum):
            commit(moved(pairs, statistics[-1], momentum))


def moved_by_kernel(
    pairs: Sequence[tuple[Tensor, Tensor]],
    count: Any,
    factor: float | Tensor | None,
    tracked: Tensor | None = None,
    skipped: Tensor | None = None,
    batches: Any = 0,
) -> bool:
    """Whether a kernel has done all of :func:`moved` and :func:`commit`, counters included, in one launch.

    Args:
        pairs: one or two of (running, new).
        factor: the weight of the new; None for batches / tracked.
        tracked, skipped: as in :class:`Running`.
        batches: how many of them to add to `tracked`.
    """
    tensors = [t for pair in pairs for t in pair]
    # What a compiled graph has in their place, it fuses with its neighbours.
    if torch.compiler.is_compiling() or not (isinstance(count, int) and count > 0 and isinstance(batches, int)):
        return False
    if any(new.dtype != torch.float32 or not old.is_contiguous() for old, new in pairs):
        return False
    if not use_kernel(tensors[-1], *tensors[:-1]):
        return False
    rate = factor if isinstance(factor, Tensor) else None
    # PyTorch takes a number from another device, a kernel does not.
    if any(t is not None and t.device != tensors[-1].device for t in (*tensors, tracked, skipped, rate)):
        return False
    if any(old.dtype not in KERNEL_DTYPES for old, _ in pairs):
        return False
    number = None if factor is None or rate is not None else float(factor)
    state: list[Any] = [None, None, *tensors]

    def launched() -> bool:
        from normzoo_kernels import tracking

        tracking.track(*[*state[-4:], tracked, skipped, rate, number, batches])
        written = (*(old for old, _ in pairs), tracked, skipped)
        torch.autograd.graph.increment_version([t for t in written if t is not None])  # autograd sees no kernel
        return True

    return or_none(insisted(), launched) or False


def finite(*statistics: Tensor) -> Tensor:
    """Whether all of them are finite: one bool on the device."""
    return torch.stack([torch.isfinite(s).all() for s in statistics]).all()


class Guarded(_NormBase):
    """What layers with stored statistics share: options across ranks, and what guards the state.

    Args:
        sync: whether statistics are those of all ranks of `process_group`; no difference where
            torch.distributed is not set up or has one rank.
        process_group: None means the world.
        nonfinite: what a batch with NaN or infinite statistics does to the state: ``"propagate"`` (as in torch,
            it stays NaN) or ``"skip"`` (the state stays as it is, counters included, and ``batches_skipped``
            counts); so too where the statistics do not fit the dtype of the buffers.

    Raises:
        ValueError, TypeError: an argument is out of its range, or without effect.
    """

    batches_skipped: Tensor | None
    _usual = "propagate"
    """The default of `nonfinite`."""

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device,
        dtype,
        *,
        bias: bool,
        sync: bool,
        process_group: Any,
        nonfinite: str,
    ) -> None:
        layer = type(self).__name__
        checks.positive(layer, "num_features", num_features)
        checks.eps(layer, eps)
        checks.choice(layer, "nonfinite", nonfinite, NONFINITE)
        checks.flag(layer, "sync", sync)
        if process_group is not None and not sync:
            raise ValueError(f"{layer}: process_group is given and sync is False; it needs sync=True")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch 2.11 has no such argument
            self.register_parameter("bias", None)
        self.sync, self.process_group, self.nonfinite = sync, process_group, nonfinite
        self._count_in("batches_skipped", device)

    def _keep_others(self) -> None:
        """For a layer with other statistics than torch's: those become plain attributes, or free names."""
        # torch.export takes buffers after one that is None for others.
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            del self._buffers[name]
        self.running_mean = self.num_batches_tracked = None

    def _count_in(self, name: str, device) -> None:
        """Makes a counter of what is skipped, None where nothing is."""
        skipped = torch.zeros((), dtype=torch.long, device=device) if self.nonfinite == "skip" else None
        self.register_buffer(name, skipped, persistent=False)

    def _counters(self) -> list[tuple[str, Tensor]]:
        """(name, counter) of what is skipped; torch's constructor asks before there is one."""
        found = ((name, self._buffers.get(name)) for name in ("batches_skipped", "gradients_skipped"))
        return [(name, counter) for name, counter in found if counter is not None]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A checkpoint that is assigned to a layer on the meta device does not hold these counters.
        held = [b for b in self._buffers.values() if b is not None and not b.is_meta]
        for name, counter in self._counters():
            if held and counter.is_meta:
                self._buffers[name] = torch.zeros_like(counter, device=held[0].device)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for _, skipped in self._counters():
            skipped.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _options(self) -> str:
        """sync and nonfinite, where they are not the usual ones, for the end of extra_repr."""
        extra = ", sync=True" if self.sync else ""
        return extra if self.nonfinite == self._usual else f"{extra}, nonfinite={self.nonfinite!r}"

    def _commit(
        self, updates: list[tuple[Tensor, Tensor]], counted: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Writes new statistics, and counters along with them, as `nonfinite` says."""
        if self.batches_skipped is None or not updates:
            commit([*updates, *counted])
            return
        good = finite(*(new for _, new in updates))
        commit([*updates, *counted], good)
        self._count_skipped(lambda: good)

    def _count_skipped(self, good: Callable[[], Tensor]) -> None:
        """Counts a batch unless it is `good`, which is asked for only where batches are counted."""
        if self.batches_skipped is not None:
            commit([(self.batches_skipped, self.batches_skipped + 1)], ~good())


class Running(Guarded):
    """Running averages of mean and variance.

    Args:
        sync, process_group, nonfinite: as in :class:`Guarded`.

    Raises:
        ValueError, TypeError: an argument is out of its range, or without effect.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
    ) -> None:
        layer = type(self).__name__
        checks.momentum(layer, momentum)
        if nonfinite == "skip" and not track_running_stats:
            raise ValueError(f'{layer}: nonfinite="skip" needs track_running_stats=True, it is False')
        shared = {"bias": bias, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **shared)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._options()

    def _stored(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError(f"{type(self).__name__}: it has no running statistics; use it in training mode")
        return self.running_mean, self.running_var

    def _track(self, mean: Tensor, var: Tensor, count: Any, batches: Any = 1, factor: Any = None) -> None:
        """Moves the running averages towards `mean` and `var`, taken over `count` values.

        batches: how many batches these stand for, in num_batches_tracked.
        factor: weight of the new values; by default momentum, or that of the plain average.
        """
        running_mean, running_var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or recomputing():
            return
        pairs = ((running_mean, mean), (running_var, var))
        if factor is None:
            factor = self.momentum
        if factor is None and tracked is None:
            factor = 0.0
        if moved_by_kernel(pairs, count, factor, tracked, self.batches_skipped, batches):
            return
        number = None if tracked is None else tracked + batches
        if factor is None:
            factor = 0.0 if number is None else batches / number.to(mean.dtype)
        counted = [] if tracked is None or number is None else [(tracked, number)]
        self._commit(moved(pairs, count, factor), counted)
