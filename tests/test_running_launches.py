"""How often a step of PowerNorm or UnifiedNorm goes to the device, whose last launch writes the state."""

from __future__ import annotations

import collections
import contextlib
import copy
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from running_checks import DEVICE, prepared, randn, state_of, step, values
from torch.utils._python_dispatch import TorchDispatchMode
from training import same

import normzoo
from normzoo import PowerNorm, UnifiedNorm
from normzoo_kernels import _channel_calls, _running_forms
from normzoo_kernels import running as kernels
from normzoo_kernels._launch import KernelUnavailable, launch, launches, warn_once

Power, Unified = partial(PowerNorm, warmup_iters=3), partial(UnifiedNorm, window_size=(3, 2), warmup_iters=2)
PHASES = {"warm-up": 0, "later": 5}
POWER = {"running_forward": 2, "power_statistics": 1}, {"running_backward": 1, "power_gradient": 1}
UNIFIED = {"running_forward": 2, "unified_statistics": 1}, {"running_backward": 2, "unified_gradient": 1}
TOKENS = 4200
"""For two parts at least."""
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def per(name: str, table: dict):
    return pytest.mark.parametrize(name, table.values(), ids=table)


class Operators(TorchDispatchMode):
    """What torch itself does beside our launches, other than views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        free = func.is_view or name in ALLOCATIONS or name in ("detach", "_unsafe_view")
        if not (free or func.namespace == "normzoo"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(found: dict):
    before = launches.copy()
    with Operators() as operators:
        yield
    found |= (launches - before) + operators.found


def launched(layer, x, dy, mask=None) -> tuple[dict, dict]:
    """All that goes to the device in each direction."""
    forward, backward, leaves = {}, {}, [t for t in (x, *layer.parameters()) if t.requires_grad]
    with normzoo.backend("triton"):
        with counted(forward):
            y = layer(x, mask)
        with counted(backward):
            torch.autograd.grad(y, leaves, dy)
    return forward, backward


LAYERS = {
    "no groups": partial(Power, group_num=None),
    "groups": partial(Power, group_num=2),
    "not guarded": partial(Power, nonfinite="propagate"),
    "of the paper": partial(Power, backward="paper", bias=False),
    "not affine": partial(Power, affine=False),
    "unified": Unified,
    "unified, filtered": partial(Unified, outlier_filtration=True, nonfinite="propagate"),
}


@pytest.mark.parametrize(
    ("steps", "masked", "programs"),
    [(0, False, 64), (5, True, 64), (5, False, 0)],
    ids=["warm-up", "later, padded", "later, one part"],
)
@per("make", LAYERS)
def test_all_that_goes_to_the_device(monkeypatch, make, steps, masked, programs):
    """In half precision, whose gradients torch would otherwise have to convert."""
    monkeypatch.setattr(_running_forms, "sm_count", lambda device: programs)
    layer = prepared(partial(make, 6), torch.bfloat16)
    layer.iters.fill_(steps)
    x, dy = values(TOKENS, 6, dtype=torch.bfloat16), randn(TOKENS, 6, dtype=torch.bfloat16)
    wanted = [dict(each) for each in (POWER if isinstance(layer, PowerNorm) else UNIFIED)]
    for each in wanted:
        each |= {"merge_rows": 1} if programs else {}
    found = launched(layer, x, dy, torch.rand(TOKENS, device=DEVICE) < 0.3 if masked else None)
    assert [*found] == wanted
    assert all(sum(each.values()) <= 4 for each in found)


@per("make", {"power": Power, "unified": Unified})
def test_launches_without_some_gradients(make):
    layer, x, dy = prepared(partial(make, 6)), values(30, 6), randn(30, 6)
    forward, backward = POWER if isinstance(layer, PowerNorm) else UNIFIED
    assert launched(layer, x.detach(), dy) == (forward, backward)
    layer.requires_grad_(False)
    assert launched(layer, x, dy) == (forward, backward)
    with normzoo.backend("triton"):
        found = {}
        with counted(found):
            layer(x.detach())
        assert found == forward
        found.clear()
        with torch.no_grad(), counted(found):
            layer.eval()(x)
        assert found == {"running_forward": 1}
        before = launches.copy()
        layer(x)
        assert launches == before


def failing(monkeypatch, number: int) -> None:
    """The launch of this number finds no compiler."""
    left = iter(range(number))

    def launch_or_not(*args, **constants):
        if next(left, None) is None:
            raise KernelUnavailable("running: no compiler")
        launch(*args, **constants)

    for module in (kernels, _channel_calls):
        monkeypatch.setattr(module, "launch", launch_or_not)


FAILING = [*((Power, 0, n) for n in (3, 6)), *((Power, 5, n) for n in (0, 1, 2, 3, 4, 6, 7))]
FAILING += [(Unified, 5, n) for n in (2, 3, 6, 7, 8)]


@pytest.mark.parametrize(
    ("make", "steps", "number"), FAILING, ids=lambda v: v.func.__name__ if isinstance(v, partial) else v
)
def test_state_moves_once_whatever_does_not_compile(monkeypatch, make, steps, number):
    """A launch, or any after it."""
    monkeypatch.setattr(_running_forms, "sm_count", lambda device: 64)
    layer, x, dy = prepared(partial(make, 6)), values(TOKENS, 6), randn(TOKENS, 6)
    mask = torch.rand(TOKENS, device=DEVICE) < 0.3
    layer.iters.fill_(steps)
    wanted = step(copy.deepcopy(layer), "reference", x, dy, mask)
    before, strict = state_of(layer), copy.deepcopy(layer)
    monkeypatch.setattr(normzoo.running, "use_kernel", lambda *args, **kwargs: True)
    warn_once.cache_clear()
    whole = 7 if isinstance(layer, PowerNorm) else 8
    with monkeypatch.context() as patch:
        failing(patch, number)
        with pytest.warns(RuntimeWarning, match="no compiler") if number < whole else contextlib.nullcontext():
            ours = step(layer, "auto", x, dy, mask)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)
    with monkeypatch.context() as patch:
        failing(patch, number)
        with pytest.raises(KernelUnavailable) if number < whole else contextlib.nullcontext():
            step(strict, "triton", x, dy, mask)
    moved = {name for name, t in state_of(strict).items() if not torch.equal(t, before[name])}
    gradient = moved & {"ema_gz", "buffer_gz"}
    assert bool(moved - gradient) == (number >= 4) and bool(gradient) == (number >= whole)


@per("make", {"power": partial(Power, 6), "unified": partial(Unified, 6)})
def test_autograd_knows_of_what_kernels_write(make):
    """A graph that has saved a statistic cannot go on after the next step, as with any buffer."""
    layer = prepared(make)
    saved = layer._divisor() * torch.ones(6, requires_grad=True, device=DEVICE)
    before = {name: b._version for name, b in layer.named_buffers()}
    step(layer, "triton", values(20, 6), randn(20, 6))
    assert all(b._version > before[name] for name, b in layer.named_buffers())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@per("make", {"power": partial(Power, 6), "unified": partial(Unified, 6)})
def test_statistics_that_are_not_contiguous(make):
    """Kernels write copies of them."""
    layer, x, dy = prepared(make), values(20, 6), randn(20, 6)
    wanted = step(copy.deepcopy(layer), "triton", x, dy)
    for name, buffer in layer.named_buffers():
        if buffer.dim():
            setattr(layer, name, buffer.repeat_interleave(2, -1)[..., ::2])
    same(step(layer, "triton", x, dy), wanted)


def test_a_launch_is_worked_out_once_for_a_shape():
    layer = prepared(partial(Power, 6))
    for x in (values(33, 6), values(33, 6), values(34, 6)):
        step(layer, "triton", x, randn(*x.shape))
    found = kernels._plan.cache_info()  # type: ignore[attr-defined]
    assert found.misses == 4  # forward and backward of two
