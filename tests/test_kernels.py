"""The Triton kernels against the reference: on a GPU where there is one, else in the interpreter."""

import threading

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

import normzoo
from normzoo import functional

pytest.importorskip("triton")

from normzoo_kernels import _forms, _launch, _layout, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(x, w=None, b=None):
    return functional.layer_norm(x, x.shape[-1], w, b)


def rms(x, w=None, b=None):
    return functional.rms_norm(x, x.shape[-1], w, 1e-5, bias=b)


def offset(x, w=None, b=None):
    return functional.rms_norm(x, x.shape[-1], w, 1e-5, bias=b, offset=1.0, cast="gemma")


def llama(x, w=None, b=None):
    return functional.rms_norm(x, x.shape[-1], w, 1e-5, cast="llama")


def crms(x, w=None, b=None):
    return functional.crms_norm(x, x.shape[-1], w)


# torch's own operator where it has one; elsewhere the reference in the dtype of the test takes its place,
# also for RMSNorm with a bias, which added to torch's would be rounded twice
TORCH = {
    layer: lambda x, w=None, b=None: F.layer_norm(x, x.shape[-1:], w, b),
    rms: lambda x, w=None, b=None: F.rms_norm(x, x.shape[-1:], w, 1e-5) if b is None else rms(x, w, b),
}
NORMS = (layer, rms, offset, llama, crms)


def results(function, backend, tensors, seeds):
    """Outputs and gradients of `function(*tensors)` for the upstream gradients `seeds`."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with normzoo.backend(backend):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t in leaves if t is not None]
        dys = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, wanted, dys)
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(grads))]
    return dict(zip(names, (*outputs, *grads), strict=True))


def check(function, tensors, *, torchs=None, seeds=None, hard=False, launches=2):
    """Kernel, reference in the same dtype and float64 on the same numbers; the kernel must have run."""
    x = tensors[0]
    if seeds is None:
        seeds = [torch.randn(x.shape, device=DEVICE).to(x.dtype) for _ in range(2)]
    outputs = 2 if function.__name__.startswith("add") else 1
    before = _launch.launches.total()
    ours = results(function, "triton", tensors, seeds[:outputs])
    assert _launch.launches.total() - before >= launches, "no kernel ran"
    torchs = torchs or TORCH.get(function, function)
    theirs = results(torchs, "reference", tensors, seeds[:outputs])
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(function, "reference", wide, [s.double() for s in seeds[:outputs]])
    for name in ours:
        assert_as_good(name, ours[name], theirs[name], exact[name], hard=hard)
    return ours


def inputs(lead, width, dtype, *, weight_dtype=None, shift=0.5):
    x = (torch.randn(*lead, width, device=DEVICE) * 2 + shift).to(dtype)
    w, b = (torch.randn(width, device=DEVICE).to(weight_dtype or dtype) for _ in range(2))
    return x, w, b


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 33, 256, 1000])
def test_values_and_gradients(function, dtype, width):
    x, w, b = inputs((3, 5), width, dtype)
    # In the narrowest rows the gradient is the difference of two equal numbers.
    check(function, (x, w, b) if function in (layer, rms, offset) else (x, w), hard=width < 3)


@pytest.mark.parametrize("function", [layer, rms, crms])
@pytest.mark.parametrize("width", [1023, 1024, 1025, 2047, 2048, 2049, 4097, 8192])
def test_block_edges(function, width):
    x, w, b = inputs((5,), width, torch.float16)
    check(function, (x, w, b) if function in (layer, rms) else (x, w))


@pytest.mark.parametrize(
    ("function", "width", "dtype"),
    [
        (layer, 12288, torch.float16),
        (rms, 12288, torch.float16),
        (rms, 16385, torch.float32),
        (crms, 9001, torch.float32),
    ],
)
def test_wide_rows(function, width, dtype):
    x, w, b = inputs((3,), width, dtype)
    check(function, (x, w, b) if function in (layer, rms) else (x, w))


def test_wide_rows_with_a_residual():
    x, w, b = inputs((2,), 17000, torch.float32)
    check(add_layer, (x, torch.randn_like(x), w, b), torchs=torch_add_layer)


def add_layer(x, r, w, b):
    return functional.add_layer_norm(x, r, x.shape[-1], w, b)


def torch_add_layer(x, r, w, b):
    return F.layer_norm(x + r, x.shape[-1:], w, b), x + r


def add_rms(x, r, w):
    return functional.add_rms_norm(x, r, x.shape[-1], w, 1e-5, offset=1.0)


@pytest.mark.parametrize("function", [add_layer, add_rms])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 1001])
def test_residual(function, dtype, width):
    x, w, b = inputs((2, 5), width, dtype)
    tensors = (x, torch.randn_like(x), w, b) if function is add_layer else (x, torch.randn_like(x), w)
    check(function, tensors)


def test_residual_in_float32():
    x, w, _ = inputs((7,), 96, torch.float16)
    ours = check(add_rms, (x, torch.randn(7, 96, device=DEVICE), w))
    assert ours["output 0"].dtype == torch.float16
    assert ours["output 1"].dtype == torch.float32


def test_residual_in_float64_is_left_to_the_reference():
    x, r = torch.randn(3, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE, dtype=torch.float64)
    y, total = functional.add_layer_norm(x, r, 8)
    assert torch.equal(total, x + r) and y.dtype == torch.float32
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match=r"input is torch\.float64"):
        functional.add_layer_norm(x, r, 8)


def test_only_the_sum_is_used():
    x, w, b = inputs((4,), 32, torch.float32)
    r = torch.randn_like(x).requires_grad_()
    with normzoo.backend("triton"):
        _, total = add_layer(x, r, w, b)
        total.sum().backward()
    assert torch.equal(r.grad, torch.ones_like(r))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(dtype, weight_dtype):
    x, w, b = inputs((9,), 72, dtype, weight_dtype=weight_dtype)
    ours = check(layer, (x, w, b), torchs=layer)
    assert ours["output 0"].dtype == dtype
    assert ours["gradient 1"].dtype == weight_dtype


LAYOUTS = {
    "slice of wider rows": lambda d: torch.randn(6, 2 * d, device=DEVICE)[:, d:],
    "offset by one entry": lambda d: torch.randn(6 * d + 1, device=DEVICE)[1:].view(6, d),
    "heads before tokens": lambda d: torch.randn(2, 3, 4, d, device=DEVICE).transpose(1, 2),
    "first token": lambda d: torch.randn(5, 3, d, device=DEVICE)[:, 0],
    "last token dropped": lambda d: torch.randn(3, 4, d, device=DEVICE)[:, :-1],
    "padded rows": lambda d: torch.randn(5, d + -d % 4, device=DEVICE)[:, :d],
    "padded, no end": lambda d: torch.empty_strided((5, d), (d + -d % 4, 1), device=DEVICE).normal_(),
    "columns first": lambda d: torch.randn(d, 6, device=DEVICE).t(),
    "one row many times": lambda d: torch.randn(d, device=DEVICE).expand(4, d),
    "single row": lambda d: torch.randn(d, device=DEVICE),
    "reversed batch of views": lambda d: torch.randn(4, 3, 2, d, device=DEVICE).permute(2, 0, 1, 3),
}


@pytest.mark.parametrize("width", [48, 51])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make, width):
    x = make(width)
    w, b = torch.randn(2, width, device=DEVICE).unbind()
    check(layer, (x, w, b))
    check(add_rms, (x, torch.randn_like(x), w))


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_the_upstream_gradient(make):
    dy = make(51)
    x, w, b = inputs(dy.shape[:-1], 51, torch.float32)
    check(layer, (x, w, b), seeds=[dy])


def test_padding_is_not_read_as_data():
    wide = torch.full((5, 52), float("nan"), device=DEVICE)
    x = wide[:, :51]
    x.copy_(torch.randn(5, 51))
    w, b = torch.randn(2, 51, device=DEVICE).unbind()
    ours = check(layer, (x, w, b))
    assert ours["output 0"].stride() == (52, 1)
    dy = wide.clone()[:, :51]
    check(layer, (x, w, b), seeds=[dy.copy_(torch.randn(5, 51))])


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_expanded_upstream_gradient(reduce):
    x, w, b = inputs((6,), 20, torch.float32)
    x.requires_grad_()
    grads = []
    for name in ("triton", "reference"):
        with normzoo.backend(name):
            grads.append(torch.autograd.grad(reduce(layer(x, w, b)), x)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("function", [layer, rms, crms])
def test_no_rows(function, shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    w = torch.ones(8, device=DEVICE, requires_grad=True)
    with normzoo.backend("triton"):
        y = function(x, w)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize(("programs", "count"), [(1, 1), (1, 3), (7, 6), (7, 7), (7, 8), (7, 15), (132, 133)])
def test_shares_of_the_weight_gradient(monkeypatch, programs, count):
    """Rows that are no multiple of the programs, and programs that get one row more than others."""
    monkeypatch.setattr(_forms, "sm_count", lambda device: programs)
    monkeypatch.setattr(_forms, "_tile", lambda *args, **kwargs: {"K": 1, "R": 1, "C": 32})
    x, w, b = inputs((count,), 24, torch.float32)
    check(layer, (x, w, b), launches=3)


def test_shares_of_wide_rows(monkeypatch):
    monkeypatch.setattr(_forms, "sm_count", lambda device: 2)
    x, w, b = inputs((5,), 9000, torch.float32)
    check(layer, (x, w, b), launches=3)


def test_frozen_parameters_cost_one_launch():
    x, w, b = inputs((6,), 64, torch.float32)
    x.requires_grad_()
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        layer(x, w, b).sum().backward()
    assert _launch.launches - before == {"norm_fwd": 1, "norm_bwd": 1}


def test_trained_parameters_cost_two_launches():
    x, w, b = (t.requires_grad_() for t in inputs((6,), 64, torch.float32))
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        layer(x, w, b).sum().backward()
    assert _launch.launches - before == {"norm_fwd": 1, "norm_bwd": 1, "sum_parts": 1}


def test_only_the_weight_wants_a_gradient():
    x, w, b = inputs((6,), 64, torch.float32)
    grads = []
    for name in ("triton", "reference"):
        leaf = w.clone().requires_grad_()
        with normzoo.backend(name):
            (layer(x, leaf, b) * x).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_large_mean_keeps_its_digits():
    """At mean 1e4 the kernel is at least a hundred times nearer to the truth than torch, gradients too."""
    x = torch.randn(16, 4096, device=DEVICE) + 1e4
    dy = torch.randn_like(x)
    exact = results(TORCH[layer], "reference", (x.double(),), [dy.double()])
    ours = results(layer, "triton", (x,), [dy])
    torchs = results(TORCH[layer], "reference", (x,), [dy])
    for name in exact:
        errors = [(r[name].double() - exact[name]).abs().max() for r in (ours, torchs)]
        assert errors[0] * 100 <= errors[1], f"{name}: {errors[0]:.2e}, torch {errors[1]:.2e}"


UNLIKE = {
    "large mean": lambda x: x + 1e4,
    "first chunk shifted": lambda x: torch.cat((x[:, :4096] + 1e4, x[:, 4096:]), dim=1),
    "rest shifted": lambda x: torch.cat((x[:, :4096], x[:, 4096:] + 1e4), dim=1),
    "first chunk empty": lambda x: torch.cat((torch.zeros_like(x[:, :4096]), x[:, 4096:] + 100), dim=1),
    "a ramp": lambda x: x + torch.linspace(-1e3, 1e3, x.shape[1], device=DEVICE),
}


@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE)
def test_chunks_of_wide_rows_may_differ(make):
    x = make(torch.randn(1, 66_000, device=DEVICE))
    with normzoo.backend("triton"):
        ours = layer(x)
    assert_as_good("output", ours, TORCH[layer](x), TORCH[layer](x.double()))


@pytest.mark.parametrize("value", [0.0, 1e4, 1e-30])
def test_constant_rows(value):
    x = torch.full((3, 100), value, device=DEVICE)
    with normzoo.backend("triton"):
        y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("function", [layer, rms])
def test_half_precision_keeps_its_range(function):
    x = torch.randn(4, 512, device=DEVICE).half() * 8000
    x[:, 0] = 60000
    w, b = torch.ones(2, 512, device=DEVICE, dtype=torch.float16).unbind()
    check(function, (x, w, b), hard=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so in the interpreter
def test_a_bad_row_stays_alone():
    x = torch.randn(5, 64, device=DEVICE)
    x[2, 7] = float("nan")
    x[3, 1] = float("inf")
    with normzoo.backend("triton"):
        y = layer(x)
    assert torch.isfinite(y[[0, 1, 4]]).all()
    assert not torch.isfinite(y[[2, 3]]).any()


def test_statistics_are_saved_in_float32():
    x = torch.randn(4, 64, device=DEVICE, dtype=torch.float16, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with normzoo.backend("triton"), hooks:
        layer(x)
    assert sorted(str(t.dtype) for t in saved) == ["torch.float16", "torch.float32"]


def test_incoming_gradients_are_not_written():
    x, w, b = (t.requires_grad_() for t in inputs((6,), 64, torch.float32))
    dy = torch.randn(6, 64, device=DEVICE)
    before = dy.clone()
    with normzoo.backend("triton"):
        y = layer(x, w, b)
        first = torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)
        second = torch.autograd.grad(y, (x, w, b), dy)
    assert torch.equal(dy, before)
    assert all(torch.equal(a, c) for a, c in zip(first, second, strict=True))


@pytest.mark.parametrize("width", [48, 51])
def test_output_may_be_overwritten(width):
    x = torch.randn(6, width + -width % 4, device=DEVICE)[:, :width].detach().requires_grad_()
    with normzoo.backend("triton"):
        y = layer(x)
        torch.relu_(y)
        y.sum().backward()
    expected = torch.autograd.grad(torch.relu(TORCH[layer](x)).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("function", [layer, rms, crms])
@pytest.mark.parametrize("times", [1, 2])
def test_second_derivatives(function, times):
    """Against float64, with a row of zeros, and with a norm whose input depends on its own weight."""
    x, w, _ = inputs((3,), 16, torch.float32)
    x[1] = 0

    def slopes(backend, dtype, create_graph):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        with normzoo.backend(backend):
            y = leaves[0]
            for _ in range(times):
                y = function(y, leaves[1])
            # Zeros are where the mean square has its kink; the factor keeps eps from making them steep.
            grads = torch.autograd.grad((y * 0.01).sin().sum(), leaves, create_graph=create_graph)
            if not create_graph:
                return grads
            return grads + torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    first = slopes("triton", torch.float32, False)
    found, exact = (slopes(*how, True) for how in (("triton", torch.float32), ("reference", torch.float64)))
    for ours, expected in zip(first + found, exact[:2] + exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_batched_gradients():
    x, w, b = (t.requires_grad_() for t in inputs((3,), 16, torch.float32))
    dys = torch.randn(4, 3, 16, device=DEVICE)
    with normzoo.backend("triton"):
        y = layer(x, w, b)
        found = torch.autograd.grad(y, (x, w), dys, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, (x, w), dy, retain_graph=True) for dy in dys]
    for i in range(2):
        torch.testing.assert_close(found[i], torch.stack([grads[i] for grads in each]))


def test_saved_tensors_may_come_back_in_another_layout():
    x = torch.randn(2, 3, 4, 16, device=DEVICE).permute(2, 0, 1, 3).requires_grad_()
    dy = torch.randn(x.shape, device=DEVICE)
    with normzoo.backend("triton"):
        (expected,) = torch.autograd.grad(layer(x), x, dy)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda t: t):
            y = layer(x)
        (found,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(found, expected)


def test_negated_views():
    x, w, b = inputs((3,), 16, torch.float32)
    with normzoo.backend("triton"):
        torch.testing.assert_close(layer(torch._neg_view(x), w, torch._neg_view(b)), layer(-x, w, -b))


def test_second_derivatives_through_a_residual():
    x, w, b = inputs((3,), 16, torch.float32)
    r = torch.randn_like(x)
    found = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]
        with normzoo.backend(name):
            y, total = add_layer(*leaves)
            grads = torch.autograd.grad((y**3).sum() + (total**2 * y).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_not_copied(make):
    x = make(48)
    order = _layout.order_of(x)
    copied = _layout.rows_in(order, x).data_ptr() != x.data_ptr()
    assert copied == (make in (LAYOUTS["columns first"], LAYOUTS["last token dropped"]))


@pytest.fixture
def broken(monkeypatch):
    """Kernels that do not compile, from the named one on."""

    def install(which):
        def fail(kernel, grid, device, *args, **meta):
            if which in kernel.__name__:
                raise _launch.KernelUnavailable(f"{kernel.__name__}: planted {which}")
            return launch(kernel, grid, device, *args, **meta)

        launch = _launch.launch
        monkeypatch.setattr(rows, "launch", fail)
        chosen = lambda x, *_: normzoo.dispatch._state.names[-1] != "reference"  # noqa: E731
        monkeypatch.setattr("normzoo.layers.layer.use_kernel", chosen)

    return install


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_kernel_that_does_not_compile(broken, which):
    broken(which)
    x, w, b = (t.requires_grad_() for t in inputs((6,), 64, torch.float32))
    with pytest.warns(RuntimeWarning, match=f"planted {which}"):
        y = layer(x, w, b)
        grads = torch.autograd.grad(y.square().sum(), (x, w, b))
    with normzoo.backend("reference"):
        expected = torch.autograd.grad(layer(x, w, b).square().sum(), (x, w, b))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    layer(x, w, b)  # a second warning would be an error here


def test_a_kernel_that_does_not_compile_but_was_asked_for(broken):
    broken("fwd")
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match="planted fwd"):
        layer(torch.randn(2, 8, device=DEVICE))


@pytest.mark.parametrize(
    "error", [kind("planted") for kind in (torch.OutOfMemoryError, ValueError, RuntimeError)]
)
def test_other_errors_are_not_swallowed(monkeypatch, error):
    class Kernel:
        __name__ = "planted"

        def __getitem__(self, grid):
            raise error

    with pytest.raises(type(error), match="planted") as caught:
        _launch.launch(Kernel(), 1, torch.device("cpu"))
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [OSError("cache"), RuntimeError("PassManager::run failed"), RuntimeError("Failed to find C compiler")],
)
def test_compilers_errors_are_told_apart(monkeypatch, error):
    tried = []

    class Kernel:
        __name__ = "planted"

        def __getitem__(self, grid):
            tried.append(grid)
            raise error

    monkeypatch.setattr(_launch, "_broken", {})
    for _ in range(2):
        with pytest.raises(_launch.KernelUnavailable, match=f"planted: {type(error).__name__}"):
            _launch.launch(Kernel(), 1, torch.device("cpu"), torch.ones(1), N=8)
    assert len(tried) == (2 if isinstance(error, OSError) else 1)


def test_what_one_device_lacks_another_may_have(monkeypatch):
    tried = []

    class Kernel:
        __name__ = "planted"

        def __getitem__(self, grid):
            tried.append(grid)
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(_launch, "_broken", {})
    for name in ("cpu", "meta", "cpu", "meta"):
        with pytest.raises(_launch.KernelUnavailable):
            _launch.launch(Kernel(), 1, torch.device(name), torch.ones(1), N=8)
    assert len(tried) == 2


def test_threads_choose_for_themselves():
    x = torch.randn(4, 64, device=DEVICE)
    wrong = []

    def work(name):
        with normzoo.backend(name):
            wrong.extend(name for _ in range(200) if normzoo.dispatch.use_kernel(x) != (name == "triton"))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "reference") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_runs_are_bitwise_equal():
    x, w, b = inputs((37,), 100, torch.float32)
    dy = torch.randn_like(x)
    first, *others = (results(layer, "triton", (x, w, b), [dy]) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
