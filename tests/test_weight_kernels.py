"""The kernels of weight standardization against the reference, in every dtype and layout."""

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

import normzoo
from normzoo import dispatch
from normzoo.functional import weight_standardize
from normzoo.layers.weight_standardization import DENOMINATORS

pytest.importorskip("triton")

from normzoo_kernels import weights
from normzoo_kernels._launch import KernelUnavailable, launches, warn_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weight(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.01) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * 0.05 + mean).to(dtype)


def gain_for(variant: str, outputs: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return torch.rand(outputs, device=DEVICE).add(0.5).to(dtype) if variant == "scaled" else None


def results(backend: str, w: Tensor, variant: str, gain: Tensor | None, dy: Tensor, **how) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (w, gain) if t is not None]
    with normzoo.backend(backend):
        y = weight_standardize(leaves[0], variant, gain=None if gain is None else leaves[1], **how)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    return dict(zip(("y", "dw", "dgain"), (y.detach(), *grads), strict=False))


def check(
    w: Tensor, variant: str = "ws", gain: Tensor | None = None, dy: Tensor | None = None, *, hard=False, **how
) -> dict[str, Tensor]:
    """Kernels, reference in the same dtype and float64 on the same numbers; one launch each way."""
    dy = torch.randn(w.shape, device=DEVICE) if dy is None else dy
    if variant == "scaled":
        how.setdefault("gamma", 1.7)
    before = launches.copy()
    ours = results("triton", w, variant, gain, dy, **how)
    assert launches - before == {"standardize_fwd": 1, "standardize_bwd": 1}
    theirs = results("reference", w, variant, gain, dy, **how)
    wide = None if gain is None else gain.double()
    exact = results("reference", w.double(), variant, wide, dy.to(w.dtype).double(), **how)
    for name, found in ours.items():
        case = f"{name} of {variant} {tuple(w.shape)} {w.dtype}"
        assert_as_good(case, found, theirs[name], exact[name], hard=hard)
    assert ours["y"].stride() == theirs["y"].stride()
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    for variant in DENOMINATORS:
        for width in (2, 33, 256):
            # In the narrowest rows the gradient is the difference of two equal numbers.
            check(weight(5, width, dtype=dtype), variant, gain_for(variant, 5), hard=width == 2)
    check(weight(6, 3, 7, 7, dtype=dtype), "scaled", eps=0.1)
    check(weight(6, 3, 7, 7, dtype=dtype), "ws", eps=0.1)


@pytest.mark.parametrize("width", [1024, 1025, 4608, 16384])
def test_rows_on_chip(width):
    check(weight(5, width), "ws")
    check(weight(2, width, dtype=torch.float16), "scaled", gain_for("scaled", 2))


@pytest.mark.parametrize("width", [16385, 24576])
def test_wide_rows(width):
    check(weight(5, width), "ws")
    check(weight(2, width, dtype=torch.bfloat16), "scaled", gain_for("scaled", 2))


def test_many_rows(monkeypatch):
    """More tiles than programs, the last one in part."""
    monkeypatch.setattr(weights, "sm_count", lambda device: 1)
    for rows, width in ((75, 200), (9, 1500), (3, 17000)):
        programs, form = weights._form(weight(1, width), 1)
        assert rows > programs * form["R"]
        check(weight(rows, width), "scaled", gain_for("scaled", rows))


def test_a_large_offset_costs_no_digits():
    for width, variant in ((27, "ws"), (1000, "timm"), (17000, "ws")):
        for mean in (50.0, -50.0):
            check(weight(2, width, mean=mean), variant)


def test_rows_without_spread():
    """Zeros and constants: finite gradients, those of torch's std, whose derivative at zero is zero."""
    for width in (6, 17000):
        w = weight(3, width)
        w[0], w[1] = 0, 0.25
        dy = torch.randn(3, width, device=DEVICE)
        for variant, eps in (("ws", 1e-5), ("var", 1e-5), ("scaled", 1e-6)):
            found = check(w, variant, gain_for(variant, 3), dy)
            assert torch.equal(found["y"][:2], torch.zeros(2, width, device=DEVICE)), variant
            if variant == "ws":
                expected = (dy[:2].double() - dy[:2].double().mean(1, keepdim=True)) / eps
                torch.testing.assert_close(found["dw"][:2].double(), expected, rtol=1e-5, atol=0.2)
            if variant == "scaled":
                assert torch.equal(found["dgain"][:2], torch.zeros(2, device=DEVICE))


LAYOUTS = {
    "channels last": lambda: weight(4, 3, 3, 6).movedim(-1, 1),
    "sliced": lambda: weight(4, 40)[:, 3:-2],
    "transposed": lambda: weight(30, 4).t(),
    "one number a row": lambda: weight(4, 1).expand(4, 30),
    "odd offset": lambda: weight(4 * 32 + 1)[1:].view(4, 32),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make):
    """Of the weight, and of the gradient of its standardized form."""
    w = make()
    check(w, "scaled", gain_for("scaled", 4))
    check(weight(*w.shape), "ws", dy=make())


def test_a_gradient_that_was_expanded():
    check(weight(4, 30), dy=torch.randn((), device=DEVICE).expand(4, 30))
    w = weight(4, 30).requires_grad_()
    with normzoo.backend("triton"):
        weight_standardize(w).sum().backward()
    assert w.grad is not None and w.grad.abs().max() < 1e-4


def test_negated_views():
    w = weight(2, 24).to(torch.complex64).mul(1 + 2j).conj().imag
    assert w.is_neg()
    check(w, "ws")


def test_transposed_convolutions():
    w = weight(6, 5, 3, 3)
    check(w, "ws", transposed=True)
    check(w, "scaled", gain_for("scaled", 10), transposed=True, groups=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_gain_of_another_dtype(dtype):
    for of_weight in (torch.float32, torch.bfloat16):
        check(weight(5, 20, dtype=of_weight), "scaled", gain_for("scaled", 5, dtype))


def test_only_what_is_wanted():
    w, gain, dy = weight(4, 20), gain_for("scaled", 4), torch.randn(4, 20, device=DEVICE)
    expected = results("reference", w, "scaled", gain, dy)
    for of_w, of_gain in ((True, False), (False, True)):
        a, b = w.clone().requires_grad_(of_w), gain.clone().requires_grad_(of_gain)
        with normzoo.backend("triton"):
            weight_standardize(a, "scaled", gain=b).backward(dy)
        for leaf, name in ((a, "dw"), (b, "dgain")):
            assert (leaf.grad is None) != leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected[name])


def test_what_is_kept():
    """The weight itself and four numbers a row; nothing without gradients."""
    w, kept = weight(8, 3, 3, 3).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with normzoo.backend("triton"):
            y = weight_standardize(w)
            with torch.no_grad():
                assert torch.equal(weight_standardize(w), y)
    assert [tuple(t.shape) for t in kept] == [(8, 27), (8, 4)] and kept[0].data_ptr() == w.data_ptr()


def test_no_rows():
    w = torch.empty(0, 9, device=DEVICE, requires_grad=True)
    gain = torch.empty(0, device=DEVICE, requires_grad=True)
    before = launches.total()
    with normzoo.backend("triton"):
        weight_standardize(w, "scaled", gain=gain).sum().backward()
    assert w.grad is not None and w.grad.shape == (0, 9) and gain.grad is not None
    assert launches.total() == before


def test_second_derivatives():
    """With respect to the weight, the gain and the gradient; by batches, as in a Jacobian; and by vmap."""
    w, gain = weight(3, 7, mean=0.0), gain_for("scaled", 3)
    v, u = torch.randn(3, 7, device=DEVICE), torch.randn(3, 7, device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (w, gain, v)]

        def call(w, gain=leaves[1], backend=backend):
            with normzoo.backend(backend):
                return weight_standardize(w, "scaled", gain=gain)

        (dw,) = torch.autograd.grad(call(leaves[0]), leaves[0], leaves[2], create_graph=True)
        second = torch.autograd.grad(dw, leaves, u)
        each = torch.eye(21, device=DEVICE).view(-1, 3, 7)
        (rows,) = torch.autograd.grad(call(leaves[0]), leaves[0], each, is_grads_batched=True)
        mapped = torch.vmap(call)(torch.stack((w, v))).detach()
        found.append((dw.detach(), *second, rows, mapped))
    torch.testing.assert_close(*found)


def test_the_operators_pass_torchs_checks():
    ops = torch.ops.normzoo
    for gain in (None, gain_for("scaled", 3)):
        for save in (True, False):
            args = weight(3, 20, dtype=torch.bfloat16), gain, 1, True, 1e-5, 0.5, save
            torch.library.opcheck(ops.weight_standardize_fwd.default, args, test_utils="test_faketensor")
        needs = [gain is None, gain is not None]
        args = weight(20, 3).t(), weight(3, 20), weight(3, 4), gain, 0.5, needs
        torch.library.opcheck(ops.weight_standardize_bwd.default, args)


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_kernel_that_does_not_compile(broken, monkeypatch):
    def fails(*_):
        raise KernelUnavailable(f"{broken}: planted")

    case = weight(4, 20), "scaled", gain_for("scaled", 4), torch.randn(4, 20, device=DEVICE)
    expected = results("reference", *case)
    monkeypatch.setattr(weights, broken, fails)
    with pytest.raises(KernelUnavailable, match="planted"):
        results("triton", *case)
    unless_reference = lambda *_: dispatch._state.names[-1] != "reference"  # noqa: E731
    monkeypatch.setattr("normzoo.layers.weight_standardization.use_kernel", unless_reference)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{broken}: planted"):
        found = results("auto", *case)
    torch.testing.assert_close(found, expected)
