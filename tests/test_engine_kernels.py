"""The channel engine on its kernels: on a GPU where there is one, else in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from combines import CASES, Case, parameters
from tolerance import assert_as_good
from torch import Tensor, nn

import normzoo
from normzoo.engine import normalize

pytest.importorskip("triton")

from normzoo_kernels import channels
from normzoo_kernels._launch import KernelUnavailable, launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(call, backend: str, tensors, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    with normzoo.backend(backend):
        y = call(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"gradient {i}": g for i, g in enumerate(grads)}}


def check(case: Case, x: Tensor, *, hard: bool = False) -> dict[str, Tensor]:
    """Kernels, eager engine and the norm written out in float64, on the same numbers."""
    tensors = [x, *(p.detach().to(x.device) for p in parameters(x.shape[1]))]
    dy = torch.randn(x.shape, device=x.device).to(x.dtype)
    before = launches.total()
    ours = results(case.engine, "triton", tensors, dy)
    assert launches.total() - before >= 4, "no kernel ran"
    eager = results(case.engine, "reference", tensors, dy)
    exact = results(case.exact, "reference", [t.double() for t in tensors], dy.double())
    for name in ours:
        assert_as_good(name, ours[name], eager[name], exact[name], hard=hard)
    return ours


FORMATS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "samples last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("lay_out", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_combine(case: Case, lay_out):
    x = lay_out(torch.randn(4, 6, 5, 3, device=DEVICE) + torch.randn(4, 6, 1, 1, device=DEVICE))
    ours = check(case, x)
    dense = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
    assert ours["y"].stride() == dense.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch", "mixed", "batch then group"])
def test_low_precision(name, dtype):
    check(CASES[name], (2 * torch.randn(3, 4, 7, 7, device=DEVICE) + 1).to(dtype))


def test_regions():
    x = torch.randn(3, 4, 5, 6, device=DEVICE) + 2
    mask = torch.rand(3, 5, 6, device=DEVICE) > 0.6
    mask[0] = False
    dy, w = torch.randn_like(x), torch.rand(2, 4, device=DEVICE)

    def call(x, w):
        return normalize(x, lambda m: m.standardize(w), mask)[0]

    ours, eager = (results(call, backend, (x, w), dy) for backend in ("triton", "reference"))
    exact = results(call, "reference", (x.double(), w.double()), dy.double())
    for name in ours:
        assert_as_good(name, ours[name], eager[name], exact[name])


def batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return normzoo.functional.batch_norm(x, None, None, w, b, True)


def torchs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, True)


def _outlier(x: Tensor) -> Tensor:
    x[0, 0, 0, 0] = 1e6
    return x


HARD = {
    "large mean": lambda: torch.randn(8, 4, 16, 16) + 1e4,
    "outlier first": lambda: _outlier(torch.randn(8, 4, 16, 16)),
    "tiny": lambda: torch.randn(8, 4, 16, 16) * 1e-4,
    "huge": lambda: torch.randn(8, 4, 16, 16) * 1e12,
    "samples apart": lambda: torch.randn(8, 4, 16, 16) + 1e3 * torch.randn(8, 1, 1, 1),
    "constant": lambda: torch.full((4, 4, 8, 8), 1e4),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", HARD.values(), ids=HARD)
def test_hard_ranges_against_torch(make, channels_last):
    x = make().to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    _against_torch(x, hard=True)


def test_a_large_mean_keeps_its_digits():
    x = torch.randn(8, 4, 16, 16, device=DEVICE) + 1e4
    exact = torchs(x.double(), None, None)
    with normzoo.backend("triton"):
        ours = batch_norm(x, None, None)
    assert (ours - exact).abs().max() < 2e-6 < 100 * (torchs(x, None, None) - exact).abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_long_reduction_in_bfloat16(channels_last):
    x = (torch.randn(17, 2, 64, 64, device=DEVICE) + 0.5).bfloat16()  # 69,632 values a channel
    _against_torch(x.contiguous(memory_format=torch.channels_last) if channels_last else x)


def _against_torch(x: Tensor, hard: bool = False) -> None:
    w, b = torch.rand(x.shape[1], device=DEVICE) + 0.5, torch.randn(x.shape[1], device=DEVICE)
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    ours = results(batch_norm, "triton", (x, w, b), dy)
    theirs = results(torchs, "reference", (x, w, b), dy)
    exact = results(torchs, "reference", (x.double(), w.double(), b.double()), dy.double())
    for name in ours:
        assert_as_good(name, ours[name], theirs[name], exact[name], hard=hard)


def test_few_launches_each_way():
    x = torch.randn(4, 8, 6, 6, device=DEVICE, requires_grad=True)
    with normzoo.backend("triton"):
        before = launches.copy()
        y, _ = normalize(x, lambda m: m.standardize())
        forward, before = launches - before, launches.copy()
        y.sum().backward()
    assert forward.total() <= 3 and (launches - before).total() <= 4


def test_a_second_derivative_leaves_the_kernels():
    # Several, for a gradient that is one number may be exact by chance.
    draws = [
        [torch.randn(3, 4, 5, 2, device=DEVICE), *(p.detach().to(DEVICE) for p in parameters(4))]
        for _ in range(4)
    ]

    def penalties(backend, dtype):
        for draw in draws:
            leaves = [t.to(dtype).requires_grad_() for t in draw]
            with normzoo.backend(backend):
                y = CASES["mixed"].engine(*leaves)
            (slope,) = torch.autograd.grad(y.sin().sum(), leaves[0], create_graph=True)
            yield torch.autograd.grad(slope.square().sum(), leaves)

    def penalty(backend, dtype):
        return [torch.stack(found) for found in zip(*penalties(backend, dtype), strict=True)]

    exact = penalty("reference", torch.float64)
    for i, (ours, eager) in enumerate(
        zip(penalty("triton", torch.float32), penalty("reference", torch.float32), strict=True)
    ):
        assert_as_good(f"gradient {i}", ours, eager, exact[i])


def test_several_rows_of_gradients_at_once():
    x = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    with normzoo.backend("triton"):
        y = normalize(x, lambda m: m.standardize())[0]
    dys = torch.randn(2, *y.shape, device=DEVICE)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for found, dy in zip(together, dys, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, dy, retain_graph=True)[0])


def test_two_runs_are_bitwise_equal():
    x, (w, b, _) = torch.randn(5, 6, 9, 9, device=DEVICE), parameters(6)
    dy = torch.randn_like(x)
    first, second = (results(batch_norm, "triton", (x, w.to(DEVICE), b.to(DEVICE)), dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_and_gradients_are_left_alone():
    x, dy = torch.randn(2, 3, 4, 4, device=DEVICE), torch.randn(2, 3, 4, 4, device=DEVICE)
    before = x.clone(), dy.clone()
    results(CASES["batch"].engine, "triton", (x, *(p.detach().to(DEVICE) for p in parameters(3))), dy)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


def test_in_place_relu_behind_the_layer():
    x = torch.randn(3, 4, 5, 5, device=DEVICE)
    model = nn.Sequential(normzoo.BatchNorm2d(4), nn.ReLU(inplace=True)).to(DEVICE)
    found, expected = (results(model, backend, (x,), torch.ones_like(x)) for backend in ("triton", "reference"))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def _unavailable(*args):
    raise KernelUnavailable("channel_moments: no compiler")


def test_a_kernel_that_does_not_compile_is_an_error_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(channels, "moments", _unavailable)
    with normzoo.backend("triton"), pytest.raises(KernelUnavailable, match="no compiler"):
        normalize(torch.randn(2, 3, 4, device=DEVICE), lambda m: m.standardize())


def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(monkeypatch):
    monkeypatch.setattr(channels, "moments", _unavailable)
    monkeypatch.setattr(normzoo.engine, "use_kernel", lambda *args, **kwargs: True)
    from normzoo_kernels._launch import warn_once

    warn_once.cache_clear()
    x = torch.randn(2, 3, 4, device=DEVICE)
    with pytest.warns(RuntimeWarning, match=r"did not compile .*no compiler"):
        y, _ = normalize(x, lambda m: m.standardize())
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    normalize(x, lambda m: m.standardize())
