"""Ranks for test_distributed*.py: a register of checks, and a server that forks the ranks of one.

The server imports torch once; a forked rank costs milliseconds, so every check has processes of its own.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import interpreting
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CHECKS: defaultdict[str, dict[str, tuple[int, Callable[[], None]]]] = defaultdict(dict)
"""By module and name: how many ranks, and what each of them runs."""

WAIT, HANGS = 120, 240
"""Seconds after which a collective gives up, and after which a rank is ended."""


def check(ranks: int, **cases: Sequence) -> Callable:
    """Registers a check, once a case: its name and the arguments."""

    def register(function: Callable) -> Callable:
        checks = CHECKS[function.__module__]
        for case, args in cases.items():
            checks[f"{function.__name__}-{case}"] = ranks, functools.partial(function, *args)
        if not cases:
            checks[function.__name__] = ranks, function
        return function

    return register


def run(module: str, name: str, folder: Path) -> list[str]:
    """Has the server run a check; what went wrong, a text a rank."""
    server = _server()
    print(json.dumps((module, name, str(folder))), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, "the server ended"
    return json.loads(answer)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for all files of checks; it ends with this process."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parent / "kernels", here.parent / "bench")))
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", f"import {Path(__file__).stem} as work; work.serve()"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    with server:
        server.kill()


def serve() -> None:
    """Reads a module, a name and a folder a line, runs that check and answers with what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        module, name, folder = json.loads(line)
        importlib.import_module(module)
        size, function = CHECKS[module][name]
        reports = [Path(folder, f"{rank}.txt") for rank in range(size)]
        ranks = [fork.Process(target=_run, args=(function, size, *each)) for each in enumerate(reports)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        outcomes = [
            f"rank {rank} of {name}, exit code {process.exitcode}:\n{reports[rank].read_text()}"
            for rank, process in enumerate(ranks)
            if process.exitcode
        ]
        print(json.dumps(outcomes), file=answers, flush=True)


def _warm_up() -> None:
    """What every rank would spend its time on: imports, and the first graph."""
    import torch.distributed.fsdp

    import normzoo_kernels.channels  # noqa: F401

    interpreting.prepare()
    torch.set_num_threads(1)
    x = torch.ones(3, 2, requires_grad=True)
    torch.compile(nn.BatchNorm1d(2), fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch._dynamo.reset()


def _run(function: Callable[[], None], ranks: int, rank: int, report: Path) -> None:
    with report.open("w") as out:
        faulthandler.dump_traceback_later(HANGS, exit=True, file=out)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*autograd.function.Function", DeprecationWarning)
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)  # Triton's interpreter, inf - inf
        torch.manual_seed(0)
        try:
            store = (report.parent / "store").as_uri()
            dist.init_process_group("gloo", store, timedelta(seconds=WAIT), ranks, rank)
            function()
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=out)
            out.flush()
            os._exit(1)  # at once, so that the others need not wait for this rank


def of_ranks(value, group=None) -> list:
    """What every rank has."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return found


class Collectives(TorchDispatchMode):
    """Counts the collectives of its body and holds them to a number."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected, self.seen = expected, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(("wait", "_wrap")):
            self.seen.append(func.__name__)
        return func(*args, **kwargs or {})

    def __exit__(self, kind, *rest) -> None:
        super().__exit__(kind, *rest)
        assert kind or len(self.seen) == self.expected, f"{self.seen}, expected {self.expected}"


def parts_of_ranks(sizes: Sequence[int], *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A batch a rank, the same list on all of them. Means and variances differ, so that merging matters."""
    return [torch.randn(n, *shape, dtype=dtype) * (r + 1) + 10 * r for r, n in enumerate(sizes)]
