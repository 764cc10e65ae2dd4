"""What is found out about a contender before it is timed: whether it is right, and what memory it takes."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normzoo

from . import peers
from .cases import Buffers, Case
from .peers import Contender, unchanged_state
from .results import Unfit

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest entry. Rounding stays below, another function is above."""


_JUMPS = 1e-3
"""Share of the entries that may be off where rounding decides on which side of a jump they lie."""


class Check:
    """A layer and an input, and what is right for them: the reference in float64.

    An error, relative to the largest entry, may be as large as ``LARGEST_ERROR``, or twice that of torch's own
    layer if this is more: on a CPU its weight gradients in low precision lose digits with every row.
    """

    def __init__(self, case: Case, layer: nn.Module, buffers: Buffers) -> None:
        self.buffers = buffers
        # The gradient of a maximum jumps where its arguments meet, as does what a threshold decides.
        entry = case.entry
        self.jumps = _JUMPS if entry.searches or (entry.activates and entry.couples_samples) else 0.0
        self.may_run_kernels = case.entry.kernel and buffers.x.is_cuda
        exact = copy.deepcopy(layer).double()
        x = buffers.x.detach().double().requires_grad_()
        dy = tuple(t.double() for t in _each(buffers.dy))
        with normzoo.backend("reference"):
            self.exact = _results(exact, dict(exact.named_parameters()), Buffers(x, dy))
        self.allowed = dict.fromkeys(self.exact, LARGEST_ERROR[buffers.x.dtype])
        if case.entry.torch_class is not None:
            torchs = peers.contender("torch", case, layer, buffers.x.device)
            with contextlib.suppress(RuntimeError):  # it does not take every mixture of dtypes
                of_torch = self._errors(_results(torchs.call, torchs.parameters, buffers))
                self.allowed = {name: max(most, 2 * of_torch[name]) for name, most in self.allowed.items()}

    def forward(self, contender: Contender) -> dict[str, float]:
        """Error of the output without gradients.

        Raises:
            Unfit: the error is too large or not finite, or x or dy were written to.
        """
        with torch.no_grad():
            return self._examined(contender, lambda: _outputs(contender.call(self.buffers.x)))

    def both(self, contender: Contender) -> dict[str, float]:
        """Errors of the output, ``y``, of a ``sum`` beside it, and of the gradients, ``dx`` and by the names of
        the parameters.

        Raises:
            Unfit: as in :meth:`forward`.
        """
        return self._examined(contender, lambda: _results(contender.call, contender.parameters, self.buffers))

    def runs(self, contender: Contender) -> str:
        """Of normzoo ``kernel`` or ``eager``: where kernels cannot run they raise if one insists on them, and
        what has none, such as batch norm by stored statistics, launches none."""
        if contender.name != "normzoo":
            return ""
        if self.may_run_kernels:
            with (
                contextlib.suppress(ImportError, RuntimeError),
                unchanged_state(contender.module),
                normzoo.backend("triton"),
            ):
                from normzoo_kernels._launch import launches

                before = launches.total()
                _results(contender.call, contender.parameters, self.buffers)
                return "kernel" if launches.total() > before else "eager"
        return "eager"

    def _examined(self, contender: Contender, call: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        given = [("x", self.buffers.x), *(("dy", t) for t in _each(self.buffers.dy))]
        before = [t.detach().clone() for _, t in given]
        with unchanged_state(contender.module):
            found = self._errors(call())
        for (name, t), was in zip(given, before, strict=True):
            if not torch.equal(t, was):
                t.detach().copy_(was)
                raise Unfit(f"writes to {name}")
        demand(found, self.allowed)
        return found

    def _errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: relative_error(name, value, self.exact[name], self.jumps) for name, value in results.items()
        }


def _each(tensors: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if isinstance(tensors, tuple) else (tensors,)


def _outputs(found: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("y", "sum"), _each(found), strict=False))


def _results(
    call: Callable[[Tensor], Any], parameters: dict[str, Tensor], buffers: Buffers
) -> dict[str, Tensor]:
    outputs = _outputs(call(buffers.x))
    # A gradient of zero for a parameter of the other mode.
    wanted = (buffers.x, *parameters.values())
    grads = torch.autograd.grad(
        tuple(outputs.values()), wanted, _each(buffers.dy), allow_unused=True, materialize_grads=True
    )
    own = {name: y.detach() for name, y in outputs.items()}
    return own | dict(zip(("dx", *parameters), grads, strict=True))


def demand(errors: dict[str, float], allowed: dict[str, float]) -> None:
    """Raises :class:`Unfit` where an error is larger than allowed, or not finite."""
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise Unfit(
                f"{name} is off by {error:.1e} of its largest entry; rounding explains {allowed[name]:.0e}"
            )


def relative_error(name: str, found: Tensor, exact: Tensor, jumps: float = 0.0) -> float:
    """The largest, over the largest entry; but for a share of `jumps` of the entries, those furthest off."""
    if found.shape != exact.shape:
        raise Unfit(f"{name} has the shape {tuple(found.shape)}, it should be {tuple(exact.shape)}")
    off = (found.double() - exact).abs()
    left_out = 0 if off.isnan().any() else int(jumps * off.numel())
    most = off.flatten().kthvalue(off.numel() - left_out).values if left_out else off.max()
    return float(most) / (float(exact.abs().max()) or 1.0)


def saved_bytes(call: Callable[[], object], apart: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of a call; a storage that is kept twice counts once, that
    of a tensor in `apart` not at all."""
    kept: dict[int, int] = {}
    there = {t.untyped_storage().data_ptr() for t in apart}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # alive to the end, lest a storage be freed and its address used again
    del result
    return sum(count for place, count in kept.items() if place not in there)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at once, beyond what was held before; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated(device) - before
    held = most = 0
    for event in _traced(call):
        if event.get("name") == "[memory]":
            held += event["args"]["Bytes"]
            most = max(most, held)
    return most


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call starts on the GPU: the nodes of its graph.

    The profiler would tell too, but may leave hooks behind that slow the host down later, and torch has
    workarounds for its crashes beside CUDA graphs. As for :class:`.clocks.KernelClock`, the call must have run
    before, on a stream that is not the default one.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = call()
    count = ctypes.c_size_t()
    nodes_of = _driver()
    status = nodes_of(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    del result
    if status:
        raise RuntimeError(f"the nodes of the CUDA graph cannot be counted: status {status}")
    return count.value


def _driver() -> Callable[..., int]:
    if torch.version.hip:
        return ctypes.CDLL("libamdhip64.so").hipGraphGetNodes
    return ctypes.CDLL("libcuda.so.1").cuGraphGetNodes


def _traced(call: Callable[[], object]) -> list[dict]:
    """The profiler's events in order of time, from the one form of them that is documented."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every start on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(events, key=lambda event: event.get("ts", 0))
