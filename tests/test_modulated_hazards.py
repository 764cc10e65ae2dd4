"""Modulated row norms where kernels go wrong: corners of autograd, zeros and NaN, wide rows, compilers."""

import pytest
import torch
from tolerance import assert_as_good
from torch import nn

pytest.importorskip("triton")

from modulated_checks import DEVICE, KINDS, RARE, beside, beside_once, check, norm, results, rows

import normzoo
from normzoo_kernels import _launch
from normzoo_kernels import modulated as kernels

# Importing torch's compiler warns about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("owners", "entries"), [("ss", 3 * 40 + 3 * 40 + 12 * 3), ("tt", 12 * 40 + 12 * 3)])
def test_what_is_saved(owners, entries):
    """x, scale, a shift of samples, and float32 statistics; no shift of tokens, which is as large as x."""
    x = rows(3, 4, 40, dtype=torch.float16).requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    tensors = [t.requires_grad_() for t in beside(x, owners)]
    with normzoo.backend("triton"), hooks:
        norm("layer", x, *tensors)
    assert sum(t.numel() for t in saved) == x.numel() + entries
    assert sorted(str(t.dtype) for t in saved if t.shape[-1] != 40) == ["torch.float32"]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so in the interpreter
def test_a_bad_row_stays_in_its_sample():
    x = rows(3, 4, 40)
    x[1, 2, 7] = float("nan")
    scale, shift = beside(x, "ss")
    found = results("layer", "triton", (x, scale, shift), torch.randn_like(x))
    bad = ~torch.isfinite(found["y"]).flatten(0, 1).all(-1)
    assert bad.nonzero().tolist() == [[6]]
    assert torch.isfinite(found["dscale"][[0, 2]]).all()
    assert torch.isfinite(found["dshift"]).all()


@pytest.mark.parametrize("name", KINDS | RARE)
@pytest.mark.parametrize("owners", ["ss", "tt"])
def test_rows_of_zeros(name, owners):
    """Also rows that are zero where the mean square is taken, and not behind."""
    x = rows(2, 3, 24)
    x[0, 1] = 0
    x[1, 2, :7] = 0
    check(name, x, *beside(x, owners))


def test_eps_lies_outside_of_the_root():
    x = torch.full((1, 2, 4), 1e-5, device=DEVICE)
    with normzoo.backend("triton"):
        y = norm("root", x, torch.zeros(1, 4, device=DEVICE))
        rms = norm("rms", x, torch.zeros(1, 4, device=DEVICE))
    torch.testing.assert_close(y, torch.full_like(y, 0.5))
    torch.testing.assert_close(rms, torch.full_like(y, 1e-5 / (1e-5 + 1e-10) ** 0.5))


def test_large_mean_keeps_its_digits():
    """At mean 1e4 the kernel is at least a hundred times nearer to the truth than torch, gradients too."""
    x = torch.randn(2, 8, 2048, device=DEVICE) + 1e4
    tensors, dy = (x, *beside(x, "ss")), torch.randn_like(x)
    exact = results("layer", "reference", [t.double() for t in tensors], dy.double())
    ours, torchs = (results("layer", name, tensors, dy) for name in ("triton", "reference"))
    for key in ("y", "dx", "dscale"):
        errors = [(r[key].double() - exact[key]).abs().max() for r in (ours, torchs)]
        assert errors[0] * 100 <= errors[1], f"{key}: {errors[0]:.2e}, torch {errors[1]:.2e}"


def test_half_precision_keeps_its_range():
    x = torch.randn(2, 3, 512, device=DEVICE).half() * 8000
    x[..., 0] = 60000
    for name in KINDS:
        check(name, x, *beside(x, "ss"), hard=True)


def test_runs_are_bitwise_equal():
    x = rows(3, 37, 100)
    tensors, dy = (x, *beside(x, "ss")), torch.randn_like(x)
    first, *others = (results("layer", "triton", tensors, dy) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_incoming_gradients_are_not_written():
    x = rows(3, 4, 40)
    leaves = [t.requires_grad_() for t in (x, *beside(x, "tt"))]
    dy = torch.randn_like(x)
    before = dy.clone()
    with normzoo.backend("triton"):
        y = norm("layer", *leaves)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(dy, before)
    assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


@pytest.mark.parametrize("owners", ["ss", "tt"])
def test_output_may_be_overwritten(owners):
    x = rows(3, 4, 51)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *beside_once(x, owners))]
        with normzoo.backend(backend):
            y = norm("layer", *leaves)
            (torch.relu_(y) if backend == "triton" else torch.relu(y)).sum().backward()
        grads.append([t.grad for t in leaves])
    torch.testing.assert_close(*grads)


def test_saved_tensors_may_come_back_in_another_layout():
    x = torch.randn(2, 3, 4, 16, device=DEVICE).permute(1, 2, 0, 3).requires_grad_()
    scale, shift = (t.requires_grad_() for t in beside(x, "tt"))
    dy = torch.randn(x.shape, device=DEVICE)
    with normzoo.backend("triton"):
        expected = torch.autograd.grad(norm("layer", x, scale, shift), (x, scale, shift), dy)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
            y = norm("layer", x, scale, shift)
        found = torch.autograd.grad(y, (x, scale, shift), dy)
    torch.testing.assert_close(found, expected)


def test_negated_views():
    x = rows(3, 2, 16)
    scale, shift = beside(x, "ss")
    with normzoo.backend("triton"):
        found = norm("layer", *map(torch._neg_view, (x, scale, shift)))
        torch.testing.assert_close(found, norm("layer", -x, -scale, -shift))


@pytest.mark.parametrize("owners", ["ss", "tt", "s-"])
@pytest.mark.parametrize("name", KINDS)
def test_second_derivatives(name, owners):
    """Against float64, where the input depends on the scale itself."""
    x = rows(2, 3, 16)
    tensors = (x, *beside(x, owners))

    def slopes(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors if t is not None]
        with normzoo.backend(backend):
            y = norm(name, norm(name, *leaves), *leaves[1:])
            grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            return grads + torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, exact in zip(slopes("triton", torch.float32), slopes("reference", torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_batched_gradients():
    x = rows(2, 3, 16)
    leaves = [t.requires_grad_() for t in (x, *beside(x, "st"))]
    dys = torch.randn(4, *x.shape, device=DEVICE)
    with normzoo.backend("triton"):
        y = norm("layer", *leaves)
        found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for batched, *single in zip(found, *each, strict=True):
        torch.testing.assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("owners", ["ss", "tt", "s-", "t-"])
@pytest.mark.parametrize(
    ("name", "width", "dtype"), [("layer", 8200, torch.bfloat16), ("rms", 8193, torch.float32)]
)
def test_rows_that_no_program_holds(name, width, dtype, owners):
    """The norm by its own kernels; scale and shift by torch."""
    x = rows(2, 2, width, dtype=dtype)
    tensors, dy = (x, *beside(x, owners)), torch.randn(x.shape, device=DEVICE).to(dtype)
    before = _launch.launches.copy()
    ours = results(name, "triton", tensors, dy, offset=0.25)
    assert sorted(_launch.launches - before) == ["norm_bwd_wide", "norm_fwd"]
    theirs = results(name, "reference", tensors, dy, offset=0.25)
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(name, "reference", wide, dy.double(), offset=0.25)
    for key in exact:
        assert_as_good(key, ours[key], theirs[key], exact[key])


def test_wide_rows_round_once():
    x, scale, dy = rows(2, 2, 8200, dtype=torch.bfloat16), rows(2, 8200), rows(2, 2, 8200, dtype=torch.bfloat16)
    found = results("layer", "triton", (x, scale, None), dy)
    exact = results("layer", "reference", (x.double(), scale.double(), None), dy.double())
    (key,) = [key for key, t in exact.items() if t.shape == scale.shape]
    torch.testing.assert_close(
        found[key].double(), exact[key], rtol=0, atol=1e-5 * exact[key].abs().max().item()
    )


@pytest.mark.parametrize("name", ["root", "part", "rms, part"])
def test_wide_rows_without_kernels(name):
    x = rows(2, 2, 8200)
    tensors, dy = (x, *beside(x, "ss")), torch.randn_like(x)
    before = _launch.launches.total()
    found = results(name, "triton", tensors, dy)
    assert _launch.launches.total() == before
    torch.testing.assert_close(found, results(name, "reference", tensors, dy), rtol=0, atol=0)


def test_second_derivatives_of_wide_rows():
    x = rows(1, 2, 8200)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *beside_once(x, "st"))]
        with normzoo.backend(backend):
            grads = torch.autograd.grad(norm("layer", *leaves).sin().sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.fixture
def broken(monkeypatch):
    """Kernels that do not compile, from the named one on."""

    def install(which):
        def fail(kernel, grid, device, *args, **meta):
            if which in kernel.__name__:
                raise _launch.KernelUnavailable(f"{kernel.__name__}: planted {which}")
            return launch(kernel, grid, device, *args, **meta)

        launch = _launch.launch
        monkeypatch.setattr(kernels, "launch", fail)
        chosen = lambda x, *_: normzoo.dispatch._state.names[-1] != "reference"  # noqa: E731
        monkeypatch.setattr("normzoo.layers.modulated.use_kernel", chosen)
        _launch.warn_once.cache_clear()

    return install


@pytest.mark.parametrize("owners", ["ss", "tt"])
@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_kernel_that_does_not_compile(broken, which, owners):
    broken(which)
    x = rows(2, 3, 40)
    leaves = [t.requires_grad_() for t in (x, *beside(x, owners))]
    with pytest.warns(RuntimeWarning, match=f"planted {which}"):
        grads = torch.autograd.grad(norm("layer", *leaves).square().sum(), leaves)
    with normzoo.backend("reference"):
        expected = torch.autograd.grad(norm("layer", *leaves).square().sum(), leaves)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    norm("layer", *leaves)  # a second warning would be an error here


def test_a_kernel_that_does_not_compile_but_was_asked_for(broken):
    broken("fwd")
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match="planted fwd"):
        norm("layer", torch.randn(2, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE))


class Block(nn.Module):
    """x with a scale of the tokens and a shift of the samples, and the same the other way round."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, x, c):
        first, second = self.linear(x).chunk(2, dim=-1)
        scale, shift = self.linear(c).chunk(2, dim=-1)
        x = normzoo.functional.adaptive_layer_norm(x, first, shift)
        return normzoo.functional.adaptive_rms_norm(x, scale, second)


def test_one_graph_serves_all_batches():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    block = Block().to(DEVICE)
    call = torch.compile(block, fullgraph=True, backend=backend)
    before = _launch.launches.copy()
    for batch, tokens in ((3, 4), (5, 7), (2, 3)):
        x, c = rows(batch, tokens, 16), rows(batch, 16)
        found = []
        for function, name in ((call, "triton"), (block, "reference")):
            leaves = [t.clone().requires_grad_() for t in (x, c)]
            block.zero_grad()
            with normzoo.backend(name):
                function(*leaves).sin().sum().backward()
            found.append([*(t.grad for t in leaves), *(p.grad.clone() for p in block.parameters())])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2
    assert _launch.launches - before == {"modulated_fwd": 6, "modulated_bwd": 6}
    torch._dynamo.reset()
