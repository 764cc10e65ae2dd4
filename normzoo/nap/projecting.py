"""Putting sets of parameters back to the norms that they had, also in low precision and in shards."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from ..radial import local, sharded

_ROW = 1024
"""Entries that one sum in float32 goes over: torch's norm of 2 million entries is off by 4e-5."""
_BUCKET = 1 << 20
"""Entries that are read for their norm and, while a cache has them, scaled."""


@dataclass(frozen=True)
class Held:
    """Parameters whose joint norm is held."""

    names: tuple[str, ...]
    radius: float
    shift: float = 0.0
    """Added to the first parameter before the norm is taken: the scale of an RMSNorm with 1 + w. An offset that
    goes with it is as it is."""


class Masters:
    """Parameters at the precision they are projected in: those below float32 as a float32 copy.

    A projection moves a weight by a part in ten thousand, which a bfloat16 has no digits for: rounded at every
    step it would be lost. The copy takes over what the optimizer changes, and the parameter is its rounding.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, p: Tensor) -> None:
        if p.dtype.itemsize < 4:
            self.kept.setdefault(name, p.detach().float())

    def working(self, name: str, p: Tensor) -> Tensor:
        """What to change in place of `p`, up to date; :meth:`write` it afterwards."""
        here = local(p)
        if p.dtype.itemsize >= 4:
            return here
        if name not in self.kept:  # the model was converted meanwhile
            self.keep(name, p)
        master = self.kept[name]
        if master.device != p.device:
            master = self.kept[name] = master.to(p.device)
        master, now = local(master), here.float()
        change = now - master.to(p.dtype).float()
        # After a NaN, or once new values are loaded over one, the parameter is all there is.
        master.copy_(torch.where(change.isfinite(), master + change, now))
        return master

    def load(self, name: str, p: Tensor, saved: Tensor) -> None:
        """Go on from a copy that was kept; a parameter in float32 needs none."""
        self.keep(name, p)
        if name in self.kept:
            local(self.kept[name]).copy_(local(saved))

    def write(self, name: str, p: Tensor) -> None:
        if p.dtype.itemsize < 4:
            local(p).copy_(local(self.kept[name]))


@dataclass
class _Batch:
    """Sets that are projected together."""

    held: list[Held]
    names: list[str] = field(default_factory=list)
    """Of the tensors: those that are reduced over the same ranks one after another."""
    sets: list[int] = field(default_factory=list)
    """Which set each of them belongs to."""
    shifts: list[float] = field(default_factory=list)
    reductions: list[tuple[int, int, Any]] = field(default_factory=list)
    """From which tensor to which, over which process group."""
    radii: Tensor = field(default_factory=lambda: torch.empty(0))
    narrow: Tensor = field(default_factory=lambda: torch.empty(0))
    """The radii in float32."""
    index: Tensor | None = None
    plain: list[Tensor] | None = None
    """The tensors, where they are the parameters themselves."""


class Projector:
    """Projects `held` sets of `parameters`, as often as it is called, without waiting for the device."""

    def __init__(self, parameters: Mapping[str, Tensor], held: Sequence[Held], masters: Masters) -> None:
        self.held = [each for each in held if each.radius]
        self.parameters = {name: parameters[name] for each in self.held for name in each.names}
        self.masters = masters
        for name, p in self.parameters.items():
            masters.keep(name, p)
        self._laid: list[tuple[torch.dtype, torch.device]] = []
        self._batches: list[_Batch] = []

    @torch.no_grad()
    def __call__(self) -> None:
        layout = [(p.dtype, p.device) for p in self.parameters.values()]
        if layout != self._laid:  # a model may move to another device
            self._batches = [_lay_out(held, self.parameters) for held in _split(self.held, self.parameters)]
            self._laid = layout
        for batch in self._batches:
            self._project(batch)

    def _project(self, batch: _Batch) -> None:
        bare = batch.plain
        if bare is None:
            bare = [self.masters.working(name, self.parameters[name]) for name in batch.names]
        shifted = any(batch.shifts)
        tensors = [t + shift for t, shift in zip(bare, batch.shifts, strict=True)] if shifted else bare
        if shifted or not _by_kernel(tensors, batch):
            total = squares(tensors, batch.reductions)
            if batch.index is not None:
                total = torch.zeros_like(batch.radii).index_add_(0, batch.index, total)
            factors = batch.radii / total.sqrt()
            # Nothing to scale: a norm of zero gives inf or NaN, one that is not finite 0 or NaN.
            factors = torch.where((factors > 0) & factors.isfinite(), factors, 1.0)
            factors = factors if batch.index is None else factors[batch.index]
            torch._foreach_mul_(tensors, factors.to(tensors[0].dtype).unbind())
        if shifted:
            for t, new, shift in zip(bare, tensors, batch.shifts, strict=True):
                t.copy_(new - shift)
        for name in batch.names if batch.plain is None else ():
            self.masters.write(name, self.parameters[name])


def norms(parameters: Sequence[Tensor]) -> list[float]:
    """Frobenius norms, of DTensors those of the whole; every rank that has a shard must ask."""
    found = []
    with torch.no_grad():
        for p in parameters:
            here = local(p).detach()
            here = here.float() if p.dtype.itemsize < 4 else here
            reductions = [(0, 1, group) for group in groups_over(p)]
            found.append(squares([here], reductions).sqrt().item())
    return found


def squares(tensors: Sequence[Tensor], reductions: Sequence[tuple[int, int, Any]] = ()) -> Tensor:
    """(number of tensors,) squared norms in float64, exact to 1e-7 or better, summed over the process groups of
    `reductions`; float32 on devices without float64."""
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    if tensors[0].device.type == "cpu":
        found = torch.stack([_norm(t) for t in tensors])
    else:
        found = torch.stack(torch._foreach_norm(list(tensors))).to(wide)
    found = found.square_()
    for start, stop, group in reductions:
        dist.all_reduce(found[start:stop], group=group)
    return found


def _norm(t: Tensor) -> Tensor:
    flat = t.view(-1) if t.is_contiguous() else _flat(t)
    rest = flat.numel() % _ROW
    if rest == flat.numel():
        return torch.linalg.vector_norm(flat, dtype=torch.float64)
    rows = torch.linalg.vector_norm((flat[:-rest] if rest else flat).view(-1, _ROW), dim=1)
    if rest:
        rows = torch.cat((rows, torch.linalg.vector_norm(flat[-rest:]).view(1)))
    return torch.linalg.vector_norm(rows, dtype=torch.float64)


def dense(t: Tensor) -> bool:
    """Whether its entries fill its memory, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((t.stride(i), t.shape[i]) for i in range(t.dim()) if t.shape[i] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(t: Tensor) -> Tensor:
    return t.as_strided((t.numel(),), (1,)) if dense(t) else t.reshape(-1)


def groups_over(p: Any) -> tuple[Any, ...]:
    """The process groups over which parts of a parameter lie."""
    if not sharded(p):
        return ()
    mesh = p.device_mesh
    spread = [i for i, each in enumerate(p.placements) if not each.is_replicate() and mesh.size(i) > 1]
    return tuple(mesh.get_group(i) for i in spread)


def _split(held: Sequence[Held], parameters: Mapping[str, Tensor]) -> Iterator[list[Held]]:
    """Sets by device, dtype and whether ranks must meet; small enough for a cache where that pays."""
    batches: dict[tuple[Any, ...], list[Held]] = {}
    entries: dict[tuple[Any, ...], int] = {}
    for each in held:
        first = parameters[each.names[0]]
        meets = any(groups_over(parameters[name]) for name in each.names)
        key = (first.device, torch.promote_types(first.dtype, torch.float32), meets, bool(each.shift))
        size = sum(local(parameters[name]).numel() for name in each.names)
        if first.device.type == "cpu" and not meets and entries.get(key, 0) + size > _BUCKET and key in batches:
            yield batches.pop(key)
            entries[key] = 0
        batches.setdefault(key, []).append(each)
        entries[key] = entries.get(key, 0) + size
    yield from batches.values()


def _lay_out(held: list[Held], parameters: Mapping[str, Tensor]) -> _Batch:
    members = [(name, i, groups_over(parameters[name])) for i, each in enumerate(held) for name in each.names]
    by_groups: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for name, i, groups in members:
        by_groups.setdefault(groups, []).append((name, i))
    batch = _Batch(held)
    for groups, some in by_groups.items():
        start, stop = len(batch.names), len(batch.names) + len(some)
        batch.reductions += [(start, stop, group) for group in groups]
        batch.names += [name for name, _ in some]
        batch.sets += [i for _, i in some]
    members_at = zip(batch.names, batch.sets, strict=True)
    batch.shifts = [held[i].shift if name == held[i].names[0] else 0.0 for name, i in members_at]
    device = parameters[batch.names[0]].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    batch.radii = torch.tensor([each.radius for each in held], dtype=wide, device=device)
    batch.narrow = batch.radii.float()
    if all(not sharded(parameters[name]) and parameters[name].dtype.itemsize >= 4 for name in batch.names):
        batch.plain = [parameters[name] for name in batch.names]
    if batch.sets != list(range(len(held))):
        batch.index = torch.tensor(batch.sets, device=device)
    return batch


def _by_kernel(tensors: list[Tensor], batch: _Batch) -> bool:
    """Whether a kernel did it."""
    first = tensors[0]
    if (
        batch.reductions
        or first.dtype != torch.float32
        or not dispatch.use_kernel(first, *tensors[1:], fusible=False)
    ):
        return False
    if any(t.dtype != torch.float32 or not dense(t) for t in tensors):
        return False
    from normzoo_kernels.projection import project

    def run() -> bool:
        project(tensors, batch.sets, batch.narrow)
        torch.autograd.graph.increment_version(tensors)  # as an operator that writes in place does
        return True

    return dispatch.or_none(dispatch.insisted(), run) is not None
