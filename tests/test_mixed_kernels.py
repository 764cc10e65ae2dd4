"""AlphaBatchNorm, AdaB2N and BatchChannelNorm on the channel kernels: on a GPU, else in the interpreter."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor, nn

import normzoo
from normzoo import AdaB2N, AlphaBatchNorm, BatchChannelNorm

pytest.importorskip("triton")

from normzoo_kernels._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {
    "alpha": (partial(AlphaBatchNorm, 6, source_weight=0.4), None),
    "alpha, pseudo_count": (partial(AlphaBatchNorm, 6, pseudo_count=2, unbiased=False), None),
    "adab2n": (partial(AdaB2N, 6, 4, kappa=0.4), None),
    "adab2n, tasks": (partial(AdaB2N, 6, 4), [0, 2, 0, 0, 2]),
    "adab2n, tasks, official": (partial(AdaB2N, 6, 4, absent="official"), [0, 2, 0, 0, 2]),
    "bcn": (partial(BatchChannelNorm, 6, 3), None),
    "bcn, channel": (partial(BatchChannelNorm, 6, 2, channel_affine="channel"), None),
    "bcn, estimate": (partial(BatchChannelNorm, 6, 3, estimate=True, update_rate=0.3), None),
    "bcn, estimate, mean first": (
        partial(BatchChannelNorm, 6, 1, estimate=True, update_rate=0.3, order="mean_first"),
        None,
    ),
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}
SUMMED = "gradients of parameters"
per_form = pytest.mark.parametrize(("make", "ids"), FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(layer: nn.Module, backend: str, x: Tensor, dy: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """Of a step: output, the loss of a layer that has one, gradients and new state."""
    layer, x = copy.deepcopy(layer), x.detach().requires_grad_()
    with normzoo.backend(backend):
        y = layer(x) if ids is None else layer(x, ids)
        loss = getattr(layer, "loss", None)
        torch.autograd.backward((y,) if loss is None else (y, loss), (dy,) if loss is None else (dy, None))
    found = {"y": y.detach(), "dx": x.grad} | ({} if loss is None else {"loss": loss.detach()})
    # In one, and as a hard range, because terms cancel: with two channels a group nearly all of them.
    found[SUMMED] = torch.cat([p.grad for p in layer.parameters()])
    return found | {name: b for name, b in layer.named_buffers() if b.is_floating_point()}


def check(make: partial, x: Tensor, ids: list[int] | None) -> dict[str, Tensor]:
    layer = make().to(DEVICE)
    with torch.no_grad():
        for t in layer.parameters():
            t.add_(torch.randn_like(t) / 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    if isinstance(layer, AdaB2N):
        layer.end_task()
    dy, tasks = torch.randn(x.shape, device=DEVICE).to(x.dtype), ids and torch.tensor(ids, device=DEVICE)
    before = launches.total()
    ours = results(layer, "triton", x, dy, tasks)
    assert launches.total() - before >= 4, "no kernel ran"
    before = launches.total()
    eager = results(layer, "reference", x, dy, tasks)
    assert launches.total() == before
    exact = results(copy.deepcopy(layer).double(), "reference", x.double(), dy.double(), tasks)
    for name in exact:
        assert_as_good(name, ours[name], eager[name], exact[name], hard=name == SUMMED)
    return ours


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@per_form
def test_a_step(make, ids, dtype, lay_out):
    x = torch.randn(5, 6, 7, 3, device=DEVICE) + 2 * torch.randn(5, 6, 1, 1, device=DEVICE)
    x = lay_out(x.to(dtype))
    ours = check(make, x, ids)
    assert ours["y"].stride() == ours["dx"].stride() == x.stride()


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 6, 17, 9), (5, 6)], ids=str)
@per_form
def test_odd_sizes(make, ids, shape):
    check(make, torch.randn(shape, device=DEVICE) + 2, ids)


@per_form
def test_an_empty_batch(make, ids):
    layer, x = make().to(DEVICE), torch.empty(0, 6, 3, 2, device=DEVICE)
    tasks = None if ids is None else torch.empty(0, dtype=torch.long, device=DEVICE)
    found = results(layer, "triton", x, x, tasks)
    assert found["y"].shape == found["dx"].shape == x.shape
    for name, b in layer.named_buffers():
        assert name not in found or torch.equal(found[name], b)


@pytest.mark.parametrize("make", [FORMS["alpha"][0], FORMS["adab2n"][0], FORMS["bcn"][0]], ids=str)
def test_few_launches_each_way(make):
    layer, x = make().to(DEVICE), torch.randn(4, 6, 5, 5, device=DEVICE, requires_grad=True)
    with normzoo.backend("triton"):
        before = launches.copy()
        y = layer(x)
        forward, before = launches - before, launches.copy()
        y.sum().backward()
    assert forward.total() <= 6 and (launches - before).total() <= 6
