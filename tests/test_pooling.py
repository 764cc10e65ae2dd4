"""The mean and the maximum of the channels: the kernels against torch's operators, in every dtype, layout."""

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo.pooling import mean_and_max

pytest.importorskip("triton")

from normzoo_kernels import pooling
from normzoo_kernels._launch import KernelUnavailable, launches, warn_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plain(x: Tensor) -> Tensor:
    """(N, 2, *) in float32 at least; what the channels share goes to the first maximum."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.stack((x.mean(1), x.max(1).values), 1)


def values(shape, dtype, last=False) -> Tensor:
    if last:
        return values((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)
    return (torch.randn(shape, device=DEVICE) * 2 + 3).to(dtype)


def both(call, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return y.detach(), torch.autograd.grad(y, x, d.to(y.dtype))[0]


def by_kernels(x: Tensor) -> Tensor:
    with normzoo.backend("triton"):
        return mean_and_max(x)


def check(x: Tensor, d: Tensor | None = None) -> Tensor:
    """Output and gradient against float64, the maximum to the last bit."""
    d = torch.randn(x.shape[0], 2, *x.shape[2:], device=x.device) if d is None else d
    before = launches.copy()
    ours = both(by_kernels, x, d)
    assert launches - before == {"channel_pool": 1, "channel_unpool": 1}
    theirs, exact = both(plain, x, d), both(plain, x.double(), d.double())
    assert torch.equal(ours[0][:, 1], theirs[0][:, 1])
    for name, *three in zip(("y", "dx"), ours, theirs, exact, strict=True):
        assert_as_good(name, *three)
    with torch.no_grad():
        assert torch.equal(by_kernels(x), ours[0])
    return ours[1]


@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, last):
    dx = check(values((3, 11, 7, 5), dtype, last))
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


SHAPES = [(1, 1, 1, 1), (4, 5, 1, 1), (2, 1, 3, 3), (5, 3), (2, 40, 4, 25), (2, 4, 2, 3, 5), (2, 1030, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    """Single samples, channels and positions; tiles that end before, at and after an edge; several tiles."""
    for last in (False, True):
        check(values(shape, torch.float32, last))


LAYOUTS = {
    "channels sliced": lambda: values((3, 9, 4, 6), torch.float32)[:, 1:],
    "samples sliced": lambda: values((5, 5, 4, 6), torch.float32, True)[1::2],
    "channels last sliced": lambda: values((3, 9, 4, 6), torch.float32, True)[:, 1:],
    "width cut": lambda: values((3, 5, 4, 6), torch.float32)[..., :-1],
    "transposed": lambda: values((3, 5, 4, 6), torch.float32).transpose(2, 3),
    "one channel for all": lambda: values((3, 1, 4, 6), torch.float32).expand(3, 5, 4, 6),
    "odd offset": lambda: values((3 * 5 * 8 + 1,), torch.float32)[1:].view(3, 5, 8),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make):
    check(make())


GRADIENTS = {
    "one number": lambda *size: torch.randn(()).expand(size),
    "channels last": lambda n, c, *size: torch.randn(n, *size, c).movedim(-1, 1),
    "in bfloat16": lambda *size: torch.randn(size).bfloat16().float(),
}


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_layouts_of_the_upstream_gradient(make):
    check(values((2, 5, 3, 4), torch.bfloat16), make(2, 2, 3, 4).to(DEVICE))


@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_a_large_offset_costs_no_digits(last):
    x = values((2, 300, 4, 4), torch.float32, last)
    check(x + 1e4)
    check(x - 1e4)


@pytest.mark.parametrize("channels", [6, 300], ids=["one tile", "several"])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_the_first_of_equal_maxima(last, channels):
    x = values((2, channels, 3, 4), torch.float32, last)
    for c in (1, channels // 2, 257 % channels, channels - 1):  # 257 is where 1 is in a tile
        x[:, c] = 50
    d = torch.stack((torch.zeros(2, 3, 4), torch.ones(2, 3, 4)), 1).to(DEVICE)
    dx = check(x, d)
    assert (dx[:, 1] == 1).all() and dx.sum() == d.sum()
    assert torch.equal(both(mean_and_max, x, d)[1], dx)


SPECIAL = {
    "nan": ((float("nan"), 2), (float("inf"), 0)),
    "two nan": ((float("nan"), 270), (-float("nan"), 3)),
    "inf": ((float("inf"), 4), (float("inf"), 280)),
    "both infinities": ((float("inf"), 4), (-float("inf"), 1)),
    "all -inf": ((-float("inf"), slice(None)),),
    "all nan": ((float("nan"), slice(None)),),
    "minus zero first": ((-1.0, slice(None)), (-0.0, 7), (0.0, 290)),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter, of inf - inf
@pytest.mark.parametrize("entries", SPECIAL.values(), ids=SPECIAL)
def test_what_is_not_finite(entries):
    """Maximum, mean and the channel that the gradient goes to are those of torch."""
    for last in (False, True):
        x = values((1, 300, 2, 2), torch.float32, last)
        for value, channel in entries:
            x[0, channel, 1] = value
        d = torch.stack((torch.zeros(1, 2, 2), torch.ones(1, 2, 2)), 1).to(DEVICE)
        ours, theirs = both(by_kernels, x, d), both(plain, x, d)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_nothing_to_do(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    before = launches.total()
    y = by_kernels(x)
    y.sum().backward()
    assert y.shape == (shape[0], 2, *shape[2:]) and x.grad is not None and x.grad.shape == shape
    assert launches.total() == before


def test_second_derivatives():
    """With respect to the gradient of the output; and by batches, as in a Jacobian."""
    x = values((2, 5, 3, 2), torch.float32).requires_grad_()
    v, w = torch.randn(2, 2, 3, 2, device=DEVICE, requires_grad=True), torch.randn_like(x)
    found = []
    for call in (by_kernels, plain):
        (dx,) = torch.autograd.grad(call(x), x, v, create_graph=True)
        (dv,) = torch.autograd.grad(dx, v, w)
        each = torch.eye(v.numel(), device=DEVICE).view(-1, *v.shape)
        (rows,) = torch.autograd.grad(call(x), x, each, is_grads_batched=True)
        found.append((dx.detach(), dv, rows))
    torch.testing.assert_close(*found)


def test_the_operators_pass_torchs_checks():
    d, index = torch.randn(2, 2, 4, 3, device=DEVICE), torch.zeros(2, 4, 3, dtype=torch.int32, device=DEVICE)
    for last in (False, True):
        x = values((2, 5, 4, 3), torch.bfloat16, last)
        torch.library.opcheck(torch.ops.normzoo.channel_pool.default, (x, last))
        args = d, index, 5, torch.bfloat16, last
        torch.library.opcheck(torch.ops.normzoo.channel_unpool.default, args)


def test_compiled():
    x = values((2, 5, 4, 3), torch.bfloat16, last=True)
    d = torch.randn(2, 2, 4, 3, device=DEVICE)
    compiled = torch.compile(by_kernels, fullgraph=True, backend="aot_eager")
    before = launches.total()
    found = both(compiled, x, d)
    assert launches.total() - before == 2
    for a, b in zip(found, both(by_kernels, x, d), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_nothing_but_the_index_is_kept():
    x = values((2, 8, 4, 3), torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by_kernels(x)
    assert [(t.shape, t.dtype) for t in kept] == [((2, 4, 3), torch.int32)]


@pytest.mark.parametrize("broken", ["pool", "unpool"])
def test_a_kernel_that_does_not_compile(broken, monkeypatch):
    def fails(*_):
        raise KernelUnavailable(f"{broken}: planted")

    x, d = values((2, 5, 4, 3), torch.bfloat16), torch.randn(2, 2, 4, 3, device=DEVICE)
    expected = both(plain, x, d)
    monkeypatch.setattr(pooling, broken, fails)
    with pytest.raises(KernelUnavailable, match="planted"):
        both(by_kernels, x, d)
    monkeypatch.setattr("normzoo.pooling.use_kernel", lambda *_, **__: True)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{broken}: planted"):
        found = both(mean_and_max, x, d)
    torch.testing.assert_close(found, expected)
