"""Launches of a training step of every layer: ``python -m normzoo_bench.launches [layer ...] [--output FILE]``.

Counted are the kernels of normzoo and the operators of torch that start one, in one call and one backward pass,
with kernels that do nothing, on a CPU, as for a device of 132 multiprocessors: statistics are so long that they
are merged from parts. Views, allocations and what only a CPU is asked do not count, and an operator counts
once, though on a GPU a convolution may start more.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normzoo
from normzoo.terminal import table
from normzoo.zoo import ZOO, Entry, find

from .environment import demand_triton, environment, now
from .host import HostCase, emptied
from .results import Document, conclude, demand_writable
from .workloads import Workload

FEW = ("batch_norm", "group_norm", "instance_norm", "power_norm")
MOST, MOST_OF_FEW, ROWS = (12, 12), (4, 4), (1, 2)
"""Launches allowed forward and backward: of a layer, of those in FEW, of a row norm."""

SHAPES = {
    "rows": (8, 512, 1024),
    "channels": (2, 64, 184, 184),
    "running": (4096, 256),
    "weights": (64, 64, 3, 3),
}
_SMS = 132
_NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach",
    "promote_types", "result_type",
    "aminmax", "_local_scalar_dense",  # a look at ids that lie on a CPU
}  # fmt: skip


class _Operators(TorchDispatchMode):
    def __init__(self, found: collections.Counter[str]) -> None:
        super().__init__()
        self.found = found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is traced here, and loading dynamo takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        name = func.overloadpacket.__name__
        if not (name in _NO_LAUNCH or func.is_view or torch.Tag.inplace_view in func.tags):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted:
    """What one direction of a step starts."""

    kernels: collections.Counter[str]
    operators: collections.Counter[str]

    @property
    def total(self) -> int:
        return self.kernels.total() + self.operators.total()

    def entry(self) -> dict[str, Any]:
        return {"launches": self.total, "kernels": dict(self.kernels), "operators": dict(self.operators)}

    def __str__(self) -> str:
        parts = (self.kernels + self.operators).items()
        return ", ".join(name if number == 1 else f"{number} {name}" for name, number in sorted(parts))


@contextlib.contextmanager
def _counting(kernels: collections.Counter[str], operators: collections.Counter[str]) -> Iterator[None]:
    from normzoo_kernels import _launch

    def start(kernel: Any, grid: tuple) -> Callable[..., None]:
        def note(*args: Any, **meta: Any) -> None:
            kernels[kernel.__name__] += 1

        return note

    with contextlib.ExitStack() as stack:
        stack.enter_context(emptied(start))
        for module in [m for name, m in sys.modules.items() if name.startswith("normzoo_kernels")]:
            if hasattr(module, "sm_count"):
                stack.enter_context(mock.patch.object(module, "sm_count", lambda device: _SMS))
        # Launchers are to be called, whose copies are seen then, not the operators that they are to a mode.
        stack.enter_context(mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0))
        stack.enter_context(_Operators(operators))
        _launch.forget()  # plans for another device
        yield
    _launch.forget()


def counted(call: Callable[[Tensor], Any], x: Tensor, parameters: Sequence[Tensor]) -> tuple[Counted, Counted]:
    """(forward, backward) of a call in training, with gradients for x and all parameters."""
    forward, backward = (Counted(collections.Counter(), collections.Counter()) for _ in range(2))
    x = x.detach().requires_grad_()
    with _counting(forward.kernels, forward.operators):
        y = call(x)
    ys = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
    ups = [torch.ones_like(t) for t in ys]
    with _counting(backward.kernels, backward.operators):
        torch.autograd.grad(ys, [x, *parameters], ups, allow_unused=True)
    return forward, backward


@dataclass(frozen=True)
class Step:
    """A layer, or one in another setting."""

    entry: Entry
    added: bool = False
    setting: str = ""
    make: Callable[[], tuple[nn.Module, Callable]] | None = None
    """The module and its call, where it is not the layer as the benchmark makes it."""

    @property
    def name(self) -> str:
        name = self.entry.added.__name__ if self.added and self.entry.added else self.entry.name
        return f"{name}, {self.setting}" if self.setting else name

    @property
    def limit(self) -> tuple[int, int]:
        if self.entry.name in FEW:
            return MOST_OF_FEW
        return ROWS if self.entry.family == "rows" and "time" not in self.entry.name else MOST

    def count(self) -> tuple[Counted, Counted]:
        mode = ("any", "training")[self.entry.couples_samples]
        shape = SHAPES[self.entry.family]
        case = HostCase(self.entry, Workload("parts", shape), "float32", "contiguous", mode, self.added)
        x = torch.zeros(case.shape)
        if self.make is not None:
            module, call = self.make()
        else:
            ours, *_ = case.contenders()
            module, call = ours.module, ours.call
        return counted(call, x, [p for p in module.parameters() if p.requires_grad])


def _channels(name: str, **options: Any) -> nn.Module:
    entry = find(name)
    channels = SHAPES["channels"][1]
    return entry.cls(channels, *entry.arguments[1:], **options)


def _with_tasks(**options: Any) -> tuple[nn.Module, Callable]:
    layer, ids = _channels("adab2n", **options), torch.arange(SHAPES["channels"][0])
    return layer, lambda x: layer(x, ids)


def _with_mask(**options: Any) -> tuple[nn.Module, Callable]:
    layer, (n, _, *size) = _channels("region_norm_b", **options), SHAPES["channels"]
    mask = torch.zeros(n, *size, dtype=torch.bool)
    return layer, lambda x: layer(x, mask)


def _plainly(layer: nn.Module) -> tuple[nn.Module, Callable]:
    return layer, layer


SETTINGS: dict[str, dict[str, Callable[[], tuple[nn.Module, Callable]]]] = {
    "ghost_batch_norm": {
        "momentum=None": lambda: _plainly(_channels("ghost_batch_norm", momentum=None)),
        "interleaved": lambda: _plainly(
            normzoo.GhostBatchNorm(SHAPES["channels"][1], 1, split="interleaved", stats="scaled")
        ),
    },
    "alpha_batch_norm": {"pseudo_count=4": lambda: _plainly(_channels("alpha_batch_norm", pseudo_count=4))},
    "adab2n": {
        "with task ids": _with_tasks,
        "with task ids, official, kappa=0.5": lambda: _with_tasks(absent="official", kappa=0.5),
    },
    "batch_channel_norm": {
        "estimate=True": lambda: _plainly(_channels("batch_channel_norm", estimate=True, update_rate=0.1)),
    },
    "region_norm_b": {"per_instance=True": lambda: _with_mask(per_instance=True)},
    "region_norm_l": {"per_instance=True": lambda: _plainly(_channels("region_norm_l", per_instance=True))},
}
"""In which layers do something else than by default."""


def steps(entries: Sequence[Entry]) -> list[Step]:
    """Every layer that has a kernel, its function with a residual, and its other settings."""
    found = []
    for entry in entries:
        if entry.kernel:
            found += [Step(entry, added) for added in ((False, True) if entry.added else (False,))]
            own = SETTINGS.get(entry.name, {})
            found += [Step(entry, setting=setting, make=make) for setting, make in own.items()]
    return found


def run(chosen: Sequence[Step], command: str) -> Document:
    settings = {"command": command, "shapes": SHAPES, "multiprocessors": _SMS, "time": now()}
    document = Document(environment(), settings, {})
    for step in chosen:
        forward, backward = step.count()
        row = {"layer": step.entry.name, "case": step.name, "limit": list(step.limit)}
        document.rows.append({**row, "forward": forward.entry(), "backward": backward.entry()})
        allowed = zip((forward, backward), step.limit, strict=True)
        if over := [f"{one.total} > {most}: {one}" for one, most in allowed if one.total > most]:
            document.failed.append({"layer": step.name, "reason": "; ".join(over)})
    return document


def show(document: Document) -> None:
    lines = []
    for row in document.rows:
        ways = [row[direction] for direction in ("forward", "backward")]
        torchs = sum(sum(way["operators"].values()) for way in ways)
        cells = [f"{way['launches']} of {most}" for way, most in zip(ways, row["limit"], strict=True)]
        lines.append((row["case"], *cells, str(torchs)))
    table("launches of a training step", ("layer", "forward", "backward", "torch's of them"), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 if a layer is over its limit, 2 for wrong usage or without Triton."""
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.launches",
        description="Counts the kernels that a training step starts, normzoo's and torch's, and holds limits.",
        epilog="Exit codes: 0 fine, 1 a layer is over its limit, 2 wrong usage.",
    )
    parser.add_argument("layer", nargs="*", metavar="LAYER", help="names or classes (default: all)")
    parser.add_argument("--output", metavar="FILE.json", help="where to write the results")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    try:
        demand_triton()
        if arguments.output:
            demand_writable(arguments.output)
        entries = {entry.name: entry for entry in map(find, arguments.layer)} or {e.name: e for e in ZOO}
        chosen = steps(list(entries.values()))
        if not chosen:
            raise ValueError(f"none of {', '.join(arguments.layer)} has a kernel")
    except ValueError as error:
        print(f"normzoo launches: {str(error).removeprefix('normzoo: ')}", file=sys.stderr)
        return 2
    document = run(chosen, shlex.join(["python", "-m", "normzoo_bench.launches", *given]))
    return conclude(document, arguments.output, show, lambda entry: entry["layer"])


if __name__ == "__main__":
    sys.exit(main())
