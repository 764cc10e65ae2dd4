"""How often a call goes over tensors of the size of x: ``python -m normzoo_bench.passes``.

A dispatch mode sees every operator of torch. What an operator is given it reads once, what it returns or
changes it writes once, in units of the bytes of x; views cost nothing. An operator that goes over its input
several times, as batch norm in training does, still counts as one that does so once: these are the fewest
accesses of a program.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normzoo.terminal import say, table
from normzoo.zoo import ZOO, find

from . import peers
from .cases import Case
from .measure import call_of
from .peers import unchanged_state
from .workloads import Workload
from .workloads import passes as fewest

MANY = 8
"""Passes of batch norm, 3 forward and 5 backward; an official code that makes more can be beaten by far."""

_SHAPES = {"rows": (64, 1024), "channels": (16, 32, 16, 16), "running": (512, 256), "weights": (64, 64, 3, 3)}
_LEAST = 1 / 64
"""Of the entries of x: what has fewer is a statistic, a parameter or a mask, and left out."""

_OVERWRITES = ("copy_", "fill_", "zero_")
"""What writes to its argument without reading it, besides what has ``out=``."""


@dataclass
class Counted:
    passes: float = 0.0
    operators: int = 0
    """Also on what is smaller than x."""


class Counter(TorchDispatchMode):
    """Counts what goes over tensors of at least 1 / 64 of the entries of x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.least, self.unit, self.found = x.numel() * _LEAST, x.nbytes, Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = (_tensors(part) for part in ((args, kwargs), result))
        mutable, name = func._schema.is_mutable, func.overloadpacket.__name__
        places = {t.untyped_storage().data_ptr() for t in given}
        if not mutable and (not made or {t.untyped_storage().data_ptr() for t in made} & places):
            return result  # a view, or a look at a number
        if "empty" in name:
            return result
        written = _tensors([_argument(i, a, args, kwargs) for i, a in enumerate(func._schema.arguments)])
        known = {id(t) for t in written}
        if name in _OVERWRITES or func._overloadname.endswith("out"):
            given = [t for t in given if id(t) not in known]
        self.found.operators += 1
        self._add((*given, *written, *(t for t in made if id(t) not in known)))
        return result

    def _add(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            entries = 1
            for size, stride in zip(t.shape, t.stride(), strict=True):
                entries *= size if stride else 1
            if entries >= self.least:
                self.found.passes += entries * t.itemsize / self.unit


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _argument(place: int, argument: Any, args: tuple, kwargs: dict) -> Any:
    """The value of an argument that the operator writes to, else None."""
    if argument.alias_info is None or not argument.alias_info.is_write:
        return None
    return args[place] if place < len(args) else kwargs.get(argument.name)


def count(case: Case, contender: str) -> dict[str, Counted]:
    """What a call does in training, by direction: ``forward``, with what autograd needs, and ``backward``.

    Raises:
        normzoo_bench.peers.Absent: there is no such contender for the layer.
    """
    device, found = torch.device("cpu"), {}
    layer, buffers = case.layer(device), case.buffers(device, 1)[:1]
    made = peers.contender(contender, case, layer, device)
    for name, direction in (("forward", "saving"), ("backward", "backward")):
        with unchanged_state(made.module):
            call = call_of(made, direction, buffers)
            with Counter(buffers[0].x) as counter:
                call(0)
        found[name] = counter.found
    return found


def case_of(name: str) -> Case:
    """The layer on a small image, or as small rows."""
    entry = find(name)
    mode = "training" if entry.couples_samples else "any"
    return Case(entry, Workload("passes", _SHAPES[entry.family]), "float32", "contiguous", mode)


def counted(name: str) -> dict:
    """Of a layer: the fewest passes in training, and what the contenders make, None where they are absent."""
    case, found = case_of(name), {}
    for contender in ("official", "torch", "normzoo"):
        try:
            found[contender] = {what: asdict(c) for what, c in count(case, contender).items()}
        except peers.Absent:
            found[contender] = None
    fewest_of = {what: fewest(case.entry, case.mode, what) for what in ("forward", "backward")}
    return {"layer": name, "fewest": fewest_of, **found}


def many(row: dict) -> bool:
    """Whether the official code makes more than 8 passes in a step of training."""
    official = row["official"]
    return official is not None and round(sum(part["passes"] for part in official.values()), 1) > MANY


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the passes of the layers."""
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.passes",
        description="Counts how often the authors' codes go over tensors of the size of x.",
    )
    parser.add_argument("layer", nargs="*", metavar="LAYER", help="names or classes (default: all)")
    parser.add_argument("--json", action="store_true", help="machine-readable, on stdout")
    arguments = parser.parse_args(argv)
    try:
        names = [find(name).name for name in arguments.layer] or [entry.name for entry in ZOO]
    except ValueError as error:
        print(f"normzoo_bench.passes: {error}", file=sys.stderr)
        return 2
    rows = [counted(name) for name in names]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    cells = [(row["layer"], *_cells(row)) for row in rows]
    table(
        "Passes over x, forward + backward, and operators", ("layer", "fewest", "official", "torch", ""), cells
    )
    say(f"The last column are the operators of normzoo, which goes over large x in blocks; * more than {MANY}.")
    return 0


def _cells(row: dict) -> tuple[str, ...]:
    def of(found: dict | None) -> str:
        if found is None:
            return "-"
        forward, backward = found["forward"], found["backward"]
        operators = forward["operators"] + backward["operators"]
        return f"{forward['passes']:.1f} + {backward['passes']:.1f} ({operators})"

    own = row["normzoo"]
    operators = own["forward"]["operators"], own["backward"]["operators"]
    least = row["fewest"]["forward"], row["fewest"]["backward"]
    star = " *" if many(row) else ""
    return "{} + {}".format(*least), of(row["official"]) + star, of(row["torch"]), "{} + {}".format(*operators)


if __name__ == "__main__":
    sys.exit(main())
