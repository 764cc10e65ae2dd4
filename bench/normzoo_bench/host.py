"""Host time of the dispatch path: ``python -m normzoo_bench.host [layer ...] [--rounds N] [--output FILE]``.

Layers run with kernels that do nothing, on tensors so small that torch's own layers beside them, on the same
tensors, are host time as well. Everything of normzoo up to the point where it starts a kernel really runs. What
Triton does between that point and the driver is not normzoo's to change; it is measured apart, by kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import operator
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

import normzoo
from normzoo import dispatch
from normzoo.terminal import progress, table
from normzoo.zoo import ZOO, Entry, find

from . import peers
from .cases import Buffers, Case
from .clocks import Prepared, Rotation, WallClock, seconds_a_call
from .environment import demand_triton, environment, now
from .measure import call_of, timed
from .peers import Absent, Contender
from .results import Document, conclude, demand_writable
from .timing import summary
from .workloads import Workload

if TYPE_CHECKING:  # where there is no Triton, the command says so
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

OURS, TORCHS = "normzoo-empty", "torch"
DIRECTIONS = ("forward", "saving", "both")
DTYPES = ("float32", "bfloat16")
SHAPES = {
    "rows": ((4, 64), (64, 1024)),
    "channels": ((4, 16, 4, 4), (16, 64, 8, 8)),
    "running": ((4, 64), (64, 1024)),
    "weights": ((8, 4, 3, 3), (64, 64, 3, 3)),
}
_CPU = torch.device("cpu")
_SAMPLE_SECONDS = 0.004
_ROUNDS = 30


@dataclass(frozen=True)
class HostCase(Case):
    """A layer, or its function with a residual, with parameters wherever it can have them."""

    def __str__(self) -> str:
        return f"{self.key['layer']} {self.workload.name} {self.dtype}"

    @property
    def keywords(self) -> dict[str, Any]:
        affine = {"elementwise_affine": True} if self.entry.name == "crms_norm" else {}
        return super().keywords | affine

    def inputs(self) -> Buffers:
        return self.buffers(_CPU, 1)[0]

    def contenders(self) -> list[Contender]:
        """normzoo's and, where torch has such a layer or models write it in a few operators, torch's."""
        layer = self.layer(_CPU)
        ours, theirs = Contender(OURS, layer, layer), None
        if self.entry.name == "crms_norm":
            module = self.module(nn.RMSNorm, _CPU)  # as many parameters, and the rows as they are stored
            theirs = Contender(TORCHS, module, module)
        else:
            with contextlib.suppress(Absent):
                theirs = peers.contender(TORCHS, self, layer, _CPU)
        return [ours] if theirs is None else [ours, theirs]


def plan(entries: Sequence[Entry]) -> list[HostCase]:
    """Every layer that has a kernel, and its function with a residual, in both sizes and dtypes."""
    return [
        HostCase(entry, Workload("tiny", shape), dtype, "contiguous", mode, added)
        for entry in entries
        if entry.kernel
        for added in ((False, True) if entry.added else (False,))
        for shape in SHAPES[entry.family]
        for dtype in DTYPES
        for mode in [("any", "training")[entry.couples_samples]]
    ]


Start = Callable[..., None]
"""What stands for a kernel with its grid."""


@contextlib.contextmanager
def emptied(start: Callable[[Any, tuple], Start] = lambda kernel, grid: _nothing) -> Iterator[None]:
    """Inside, layers start kernels for CPU tensors too, by `start(kernel, grid)(...)`, which does nothing."""
    from triton.runtime.jit import KernelInterface

    patches = (
        mock.patch.object(KernelInterface, "__getitem__", start),
        mock.patch.object(dispatch, "_insist", _nothing),  # on a device, or on Triton's interpreter
        normzoo.backend("triton"),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _nothing(*args, **meta) -> None:
    pass


@dataclass(frozen=True)
class Started:
    """One launch as Triton gets it."""

    kernel: Any
    grid: tuple[int]
    args: tuple
    meta: dict[str, Any]

    @property
    def key(self) -> tuple[str, int, int]:
        """(kernel, arguments, constants): what Triton's time depends on."""
        constants = len(set(self.meta) & set(self.kernel.arg_names))
        return self.kernel.__name__, len(self.args), constants

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.meta)


def started(call: Callable[[], object]) -> list[Started]:
    """The launches of a call."""
    found: list[Started] = []

    def start(kernel: Any, grid: tuple) -> Start:
        return lambda *args, **meta: found.append(Started(kernel, grid, args, meta))

    with emptied(start):
        call()
    return found


class HostClock(WallClock):
    """The processor's time of the calling thread, which on a CPU runs the backward pass as well: what other
    processes take meanwhile does not count."""

    def __init__(self, seconds: float) -> None:
        super().__init__(_CPU, seconds)
        self.name, self.stopwatch = "host", self._of_thread

    @staticmethod
    def _of_thread(function: Callable[[], object]) -> float:
        start = time.thread_time()
        function()
        return time.thread_time() - start


def measure(case: HostCase, clock: WallClock, rounds: int, document: Document) -> list[Started]:
    """Adds the rows of a case; returns what one forward and backward pass of normzoo launches."""
    contenders, buffers = case.contenders(), [case.inputs()]
    launched: list[Started] = []
    for direction in DIRECTIONS:
        with torch.set_grad_enabled(direction != "forward"):
            calls = [call_of(contender, direction, buffers) for contender in contenders]
            launched = started(lambda ours=calls[0]: ours(0))
            rows = [
                {
                    **case.key,
                    "contender": contender.name,
                    "direction": direction,
                    "error": {},
                    "bytes": None,
                    "launches": len(launched) if contender.name == OURS else None,
                    "kernels": [one.key[0] for one in launched] if contender.name == OURS else None,
                }
                for contender in contenders
            ]
            with emptied():
                rotations = [Rotation(call, 1) for call in calls]
                document.rows += timed(case, clock, rows, rotations, rounds, document)
    return launched


class _Driver:
    """A device for Triton's own launch path, which is not there."""

    def get_current_target(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "none"  # the key under which Triton keeps what it has compiled

    def get_current_stream(self, device: str) -> int:
        return 0


class _Compiled:
    """What Triton takes for a compiled kernel; only the call into the driver is missing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, grid: tuple, stream: int, *args) -> None:
        return None

    def run(self, *args) -> None:
        pass


def _compile(kernel: JITFunction, key: str, signature, device: str, *args, **kwargs) -> _Compiled:
    return kernel.device_caches[device][0].setdefault(key, _Compiled())


def triton_share(launched: Sequence[Started], clock: WallClock, rounds: int) -> list[dict]:
    """What each kernel costs from ``kernel[grid](...)`` to the driver: binding, specialisation and the look
    into the cache, with nothing compiled and nothing launched."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    ones = list({one.key: one for one in launched}.values())
    with (
        mock.patch.object(driver, "_active", _Driver()),
        mock.patch.object(JITFunction, "_do_compile", _compile),
    ):
        prepared: list[Prepared] = [clock.prepare(Rotation(lambda _, one=one: one(), 1)) for one in ones]
        samples = seconds_a_call(clock, prepared, rounds)
    return [
        {"kernel": name, "arguments": args, "constants": constants, "seconds": summary(own)._asdict()}
        for (name, args, constants), own in sorted(zip([one.key for one in ones], samples, strict=True))
    ]


def run(cases: Sequence[HostCase], rounds: int, command: str) -> Document:
    """Measures all cases, then Triton's share of what they launch."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    settings = {
        "command": command,
        "time": now(),
        "rounds": rounds,
        "sample_seconds": _SAMPLE_SECONDS,
        "load": load,
    }
    document = Document(environment(_CPU), settings, {})
    clock = HostClock(_SAMPLE_SECONDS)
    launched: list[Started] = []
    with progress("measuring", len(cases)) as step:
        for case in cases:
            try:
                launched += measure(case, clock, rounds, document)
            except Exception as error:
                document.add_failed(case, OURS, error)
            step(str(case))
    document.extra["triton"] = triton_share(launched, clock, rounds)
    return document


def show(document: Document) -> None:
    """Medians as a table, with how often torch's time they are."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in document.rows:
        if row["contender"] == OURS:
            key = row["layer"], "x".join(map(str, row["shape"])), row["dtype"]
            by_case.setdefault(key, {})[row["direction"]] = row
    lines = [
        (*key, *(_cell(rows[name]) for name in DIRECTIONS), str(rows["both"]["launches"]))
        for key, rows in by_case.items()
    ]
    header = ("layer", "shape", "dtype", *DIRECTIONS, "launches")
    table("microseconds of normzoo with empty kernels (in torch's)", header, lines)
    of_triton = document.extra["triton"]
    lines = [(one["kernel"], one["arguments"], one["constants"], _microseconds(one)) for one in of_triton]
    header = ("kernel", "arguments", "constants", "microseconds")
    table("Triton's own part of a launch", header, [tuple(map(str, line)) for line in lines])


def _microseconds(row: dict) -> str:
    return f"{1e6 * row['seconds']['median']:.1f}"


def _cell(row: dict) -> str:
    times = f" ({1 / row['speedup']['median']:.2f})" if row["baseline"] == TORCHS else ""
    return _microseconds(row) + times


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is well, 1 if a layer could not be measured, 2 for wrong usage or without Triton."""
    parser = argparse.ArgumentParser(
        prog="python -m normzoo_bench.host",
        description="Times layers with empty kernels beside torch's layers, on a CPU and one thread.",
        epilog="Exit codes: 0 fine, 1 a layer could not be measured, 2 wrong usage.",
    )
    parser.add_argument("layer", nargs="*", metavar="LAYER", help="names or classes (default: all)")
    parser.add_argument(
        "--rounds", type=int, default=_ROUNDS, metavar="N", help="samples of each, at least 2 (%(default)s)"
    )
    parser.add_argument("--output", metavar="FILE.json", help="where to write the results")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    try:
        demand_triton()
        from triton import knobs

        if knobs.runtime.interpret:
            raise ValueError(
                "TRITON_INTERPRET is set; unset it, Triton's launches are part of what is measured"
            )
        if arguments.rounds < 2:
            raise ValueError(f"--rounds is {arguments.rounds}; it must be at least 2")
        if arguments.output:
            demand_writable(arguments.output)
        chosen = {entry.name: entry for entry in map(find, arguments.layer)} or {e.name: e for e in ZOO}
        cases = plan(list(chosen.values()))
        if not cases:
            raise ValueError(f"none of {', '.join(arguments.layer)} has a kernel")
    except ValueError as error:
        print(f"normzoo host: {str(error).removeprefix('normzoo: ')}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # that of the call, which is all that counts here
    torch.set_flush_denormal(True)  # what empty kernels leave unwritten may hold such numbers, which are slow
    command = shlex.join(["python", "-m", "normzoo_bench.host", *given])
    document = run(cases, arguments.rounds, command)
    place = operator.itemgetter("layer", "workload", "dtype")
    return conclude(document, arguments.output, show, lambda entry: " ".join(place(entry)))


if __name__ == "__main__":
    sys.exit(main())
