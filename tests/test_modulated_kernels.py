"""The kernels of row norms with a scale and a shift of samples or tokens, against the reference."""

import itertools

import pytest
import torch
from tolerance import assert_as_good
from torch import nn

import normzoo
from normzoo.layers.modulated import modulated

pytest.importorskip("triton")

from normzoo_kernels import _forms, _launch
from normzoo_kernels import modulated as kernels
from normzoo_kernels._modulated_forms import _share, forward_runs

# Importing torch's compiler warns about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {"layer": {}, "rms": {}, "root": {}, "part": {"kind": "root", "part": 7}}
RARE = {"rms, part": {"kind": "rms", "part": 7}}
OWNERS = ("ss", "tt", "st", "ts", "s-", "t-")
"""Whom scale and shift belong to: samples, tokens, or there is none."""


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def norm(name, x, scale, shift=None, offset=1.0):
    how = {"kind": name, "part": None} | (KINDS | RARE)[name]
    return modulated("norm", how["kind"], x, scale, shift, 1e-5, offset=offset, part=how["part"])


def beside(x, owners, dtype=None):
    """Scale and shift for x."""
    sizes = {"s": (x.shape[0], x.shape[-1]), "t": x.shape}
    return [
        None if owner == "-" else torch.randn(sizes[owner], device=x.device).to(dtype or x.dtype)
        for owner in owners
    ]


def rows(*shape, dtype=torch.float32, shift=0.5):
    return (torch.randn(shape, device=DEVICE) * 2 + shift).to(dtype)


def results(name, backend, tensors, dy, **how):
    """Output and gradients by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    wanted = {key: t for key, t in zip(("dx", "dscale", "dshift"), leaves, strict=True) if t is not None}
    with normzoo.backend(backend):
        y = norm(name, *leaves, **how)
        grads = torch.autograd.grad(y, [*wanted.values()], dy.to(y.dtype))
    return {"y": y} | dict(zip(wanted, grads, strict=True))


def check(name, x, scale, shift, *, dy=None, hard=False, **how):
    """Kernel, reference in the same dtype, and float64 on the same numbers; the kernels that ran."""
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    before = _launch.launches.copy()
    ours = results(name, "triton", (x, scale, shift), dy, **how)
    ran = _launch.launches - before
    assert ran["modulated_fwd"] == ran["modulated_bwd"] == 1, "no kernel ran"
    theirs = results(name, "reference", (x, scale, shift), dy, **how)
    wide = [None if t is None else t.double() for t in (x, scale, shift)]
    exact = results(name, "reference", wide, dy.double(), **how)
    for key in exact:
        assert_as_good(key, ours[key], theirs[key], exact[key], hard=hard)
    return ran


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients(name, owners):
    for dtype in DTYPES if owners in ("ss", "tt") else DTYPES[:1]:
        x = rows(2, 3, 33, dtype=dtype)
        check(name, x, *beside(x, owners))


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.5])
def test_offset_of_the_scale(offset):
    x = rows(2, 3, 40)
    for owners in ("ss", "tt"):
        check("rms", x, *beside(x, owners), offset=offset)


@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 2, 128, 257, 1025, 8192])
def test_block_edges(name, width):
    x = rows(2, 1 if width > 8000 else 2, width, dtype=torch.float16)
    # In the narrowest rows the gradient is the difference of two equal numbers.
    check(name, x, *beside(x, "ss" if width > 1000 else "st"), hard=width < 3)


@pytest.mark.parametrize(
    ("dtype", "of_scale", "of_shift"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("owners", ["st", "ts"])
def test_parameters_of_another_dtype(owners, dtype, of_scale, of_shift):
    x = rows(2, 3, 51, dtype=dtype)
    scale, shift = beside(x, owners, torch.float32)
    check("layer", x, scale.to(of_scale), shift.to(of_shift))


LAYOUTS = {
    "slice of wider rows": lambda d: rows(3, 4, 2 * d)[..., d:],
    "tokens before samples": lambda d: rows(4, 3, d).transpose(0, 1),
    "first token dropped": lambda d: rows(3, 5, d)[:, 1:],
    "every other sample": lambda d: rows(6, 4, d)[::2],
    "padded rows": lambda d: rows(3, 4, d + -d % 4)[..., :d],
    "columns first": lambda d: rows(3, d, 4).transpose(1, 2),
    "one row many times": lambda d: rows(d).expand(3, 4, d),
    "height and width": lambda d: rows(3, 2, 4, d).transpose(1, 2),
    "samples inside": lambda d: rows(2, 3, 4, d).permute(1, 2, 0, 3),
    "offset by one entry": lambda d: rows(12 * d + 1)[1:].view(3, 4, d),
    "one token": lambda d: rows(5, 3, d)[:, :1],
    "no tokens": lambda d: rows(5, 3, d)[:, 1],
}
per_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@per_layout
def test_layouts(make):
    """Of all that has one, each beside others that lie in another way."""
    x = make(51)
    # Chunks of what one linear layer makes.
    shift, scale, *_ = rows(x.shape[0], 6 * 51).chunk(6, dim=1)
    check("layer", x, scale, shift)
    x = rows(*x.shape)
    check("layer", x, make(51), shift, dy=rows(*x.shape[:-1], 60)[..., :51])
    check("root", x, rows(*x.shape[:-1], 60)[..., 9:], make(51), dy=make(51))


@pytest.mark.parametrize("owners", ["ss", "tt"])
@pytest.mark.parametrize(
    "layout", ["tokens before samples", "first token dropped", "padded rows", "samples inside"]
)
def test_fakes_know_the_layout(layout, owners):
    x = LAYOUTS[layout](51)
    scale, shift = beside(x, owners)
    ops = torch.ops.normzoo
    args = (x, scale, shift, "layer", 1e-5, 1.0, 51, True)
    torch.library.opcheck(ops.modulated_norm_fwd.default, args, test_utils="test_faketensor")
    _, stats = kernels.forward(*args)
    shift = shift if shift.dim() < x.dim() else None
    args = (torch.randn_like(x), x, stats, scale, shift, "layer", 1.0, 51, [True, True, shift is not None])
    torch.library.opcheck(ops.modulated_norm_bwd.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("owners", ["ss", "tt", "ts"])
def test_padding_is_not_read_as_data(owners):
    def padded():
        wide = torch.full((3, 4, 52), float("nan"), device=DEVICE)
        return wide[..., :51].copy_(torch.randn(3, 4, 51))

    x = padded()
    found = [padded() if owner == "t" else beside(x, owner)[0] for owner in owners]
    check("layer", x, *found, dy=padded())
    with normzoo.backend("triton"):
        assert norm("layer", x, *found).stride() == x.stride()


@pytest.mark.parametrize("owners", ["ss", "tt"])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_expanded_upstream_gradient(reduce, owners):
    x = rows(3, 4, 20)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *beside_once(x, owners))]
        with normzoo.backend(backend):
            reduce(norm("layer", *leaves)).backward()
        found.append([t.grad for t in leaves])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def beside_once(x, owners):
    torch.manual_seed(1)
    return beside(x, owners)


SHARED = [
    # programs, samples, tokens, rows of a tile
    (1, 1, 1, 1),
    (7, 1, 5, 1),
    (8, 3, 5, 2),
    (5, 6, 2, 1),
    (4, 2, 31, 4),
    (16, 2, 7, 1),
    (2, 1, 37, 2),
]


@pytest.mark.parametrize(("programs", "samples", "tokens", "at_once"), SHARED)
def test_runs_share_the_tokens_of_a_sample(monkeypatch, programs, samples, tokens, at_once):
    """Runs of unlike length, samples that are more or fewer than the programs, tiles that end in the midst."""
    monkeypatch.setattr(_forms, "sm_count", lambda device: programs)
    monkeypatch.setattr(_forms, "_tile", lambda *args, **kwargs: {"K": 1, "R": at_once, "C": 32})
    x = rows(samples, tokens, 24)
    cut = _share(programs, samples, -(-tokens // at_once)) > 1
    assert check("layer", x, *beside(x, "ss"))["sum_runs"] == cut
    if tokens == 7:
        assert check("layer", x, *beside(x, "st"))["sum_runs"] == 1
        assert check("layer", x, *beside(x, "ts"))["sum_runs"] == 1
        assert check("layer", x, *beside(x, "tt"))["sum_runs"] == 0


def test_tiles_of_short_samples():
    """A tile has no more rows than a sample, rounded up to a power of two."""
    for tokens, most in ((1, 1), (3, 4), (5, 8), (1000, 128)):
        assert forward_runs(64, 2, False, 40, tokens, torch.device("cpu")).constants["R"] == most


def test_how_many_runs():
    assert _share(132, 32, 64) == 4  # DiT-XL/2: all at a time
    assert _share(132, 1, 1024) == 132
    assert _share(132, 1, 3) == 3
    assert _share(132, 5000, 64) == 1
    for samples, tiles in itertools.product((1, 2, 31, 67, 131, 133, 200, 1000), (1, 2, 7, 64, 1000)):
        each = _share(132, samples, tiles)
        waves = -(-samples * each // 132)
        assert 1 <= each <= tiles
        assert waves <= max(8, -(-samples // 132))
        even = samples * tiles / 132
        assert waves * -(-tiles // each) <= (1.25 if tiles > 7 else 2) * even + 1


@pytest.mark.parametrize("shape", [(20, 2, 24), (2, 700, 24), (900, 24), (20, 1, 24)])
def test_many_rows(shape):
    x = rows(*shape)
    scale, shift = torch.randn(2, shape[0], 24, device=DEVICE).unbind()
    check("rms", x, scale, shift)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)])
@pytest.mark.parametrize("owners", ["ss", "tt", "st"])
def test_no_rows(shape, owners):
    x = torch.empty(shape, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, *beside(x, owners))]
    with normzoo.backend("triton"):
        y = norm("layer", *leaves)
        y.sum().backward()
    assert y.shape == shape
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("owners", ["ss", "tt", "st", "ts"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_wanted(owners, wanted):
    x = rows(3, 4, 40)
    tensors, dy = (x, *beside(x, owners)), torch.randn_like(x)
    expected = results("layer", "reference", tensors, dy)
    leaves = [t.clone().requires_grad_(place in wanted) for place, t in enumerate(tensors)]
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        norm("layer", *leaves).backward(dy)
    for place, key in enumerate(("dx", "dscale", "dshift")):
        if place in wanted:
            torch.testing.assert_close(leaves[place].grad, expected[key])
        else:
            assert leaves[place].grad is None
    # The gradient of a shift of the tokens is dy.
    assert (_launch.launches - before)["modulated_bwd"] == (wanted != (2,) or owners[1] == "s")


def test_without_gradients_nothing_is_kept():
    x = rows(3, 4, 40)
    scale, shift = beside(x, "ss")
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        y = norm("layer", x, scale, shift)
        with torch.no_grad():
            norm("layer", x.clone().requires_grad_(), scale, shift)
    assert not y.requires_grad
    assert _launch.launches - before == {"modulated_fwd": 2}


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
