"""The kernels of curves against eager PyTorch, in every dtype, size and layout, on a GPU or interpreted."""

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor

pytest.importorskip("triton")

from channel_checks import COPIED, DEVICE, DTYPES, EPS, GRADIENTS, LAYOUTS, randn

import normzoo
from normzoo import curves as eager
from normzoo.engine import normalize
from normzoo_kernels import _channel_forms, _curve_forms, _launch, curves

both = pytest.mark.parametrize("curve", ["bounded", "swish"])
layouts = pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def parameters_of(curve: str, shape) -> list[Tensor]:
    """One a channel of each sample, one a channel, one for all, and more of them; the divisor is not near 0."""
    n, c = shape[:2]
    each = [(0.5 + torch.rand(size, device=DEVICE)).expand(n, c) for size in ((n, c), (c,), (), (n, 1))]
    each.append((0.5 + torch.rand(c, n, device=DEVICE)).t())
    return [each[i] for i in torch.randperm(5)[: len(eager.PARAMETERS[curve])]]


def check_sums(dy: Tensor, x: Tensor, curve: str, carried) -> None:
    """Beside twice eager's error, what the rounding of terms of both signs leaves: a random walk over them."""
    exact, plain = (
        eager.sums(dy.to(kind), x.to(kind), curve, *(p.to(kind) for p in carried))
        for kind in (torch.float64, torch.float32)
    )
    every = [t.double().flatten(2).flatten(1) if t.dim() > 2 else t.double() for t in (dy, x)]
    places = x[0, 0].numel()
    alone = eager.sums(*every, curve, *(p.double().repeat_interleave(places, 1) for p in carried))
    found = curves.sums(dy, x, curve, *carried)
    for name, ours, p, e, terms in zip(eager.PARAMETERS[curve], found, plain, exact, alone, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == e.shape
        walk = terms.view(*e.shape, places).square().sum(-1).sqrt().max()
        error = (ours - e).abs().max()
        bound = 2 * (p - e).abs().max() + 2 * EPS * (walk + e.abs().max())
        assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e}"


def as_good(name: str, call: str, *args) -> Tensor:
    """A launcher against float64, beside eager PyTorch, whose parameters are in float32."""
    ours, plain = getattr(curves, call)(*args), getattr(eager, call)(*args)
    wide = [tuple(map(doubled, a)) if isinstance(a, tuple) else doubled(a) for a in args]
    assert_as_good(name, ours, plain, getattr(eager, call)(*wide))
    return ours


def doubled(t):
    return t.double() if isinstance(t, Tensor) else t


def check(curve: str, x: Tensor, dy: Tensor | None = None) -> Tensor:
    """All launchers, and that each of them ran one kernel, and one that merges where there are parts."""
    *carried, shift = parameters_of(curve, x.shape)
    shape, one, number = x.shape[:2], torch.randn(x.shape[1]), torch.randn(())
    statistics = [t.to(DEVICE).expand(shape) for t in (torch.randn(shape), one, number)]
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    before = _launch.launches.copy()
    y = as_good("y", "apply", x, curve, *carried, shift)
    check_sums(dy, x, curve, carried)
    dx = as_good("dx", "dx", dy, x, curve, tuple(carried), *statistics)
    without = as_good("dx of a map alone", "dx", dy, x, curve, tuple(carried))
    ran = _launch.launches - before
    assert ran["curve_sums"] == 1 and ran["curve_map"] + ran["curve_map_flat"] == 3, ran
    assert ran.total() == 4 + ran["merge_rows"] and ran["merge_rows"] <= 1
    assert y.dtype == x.dtype and y.stride() == dx.stride() == without.stride()
    return y


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, curve):
    """Tiles of positions, of channels, and of whatever comes."""
    check(curve, randn(3, 5, 7, 6, dtype=dtype))
    check(curve, randn(3, 11, 7, 5, dtype=dtype, last=True))
    check(curve, randn(1, 30, 7, 7, dtype=dtype))


SHAPES = [
    (1, 1), (1, 9, 1, 1), (4, 1, 3), (7, 13, 1, 1), (2, 3, 2, 5, 3), (2, 70, 16), (1, 2, 2049), (1, 3, 4, 512),
]  # fmt: skip


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, last):
    """Single samples, channels and positions, and tiles that end before, at and after an edge."""
    check("swish" if last else "bounded", randn(*shape, last=last))


# The others address x as one of these does.
@pytest.mark.parametrize("name", (*[name for name in LAYOUTS if "sliced" in name or "one" in name], *COPIED))
def test_layouts(name):
    x = (LAYOUTS | COPIED)[name]()
    before = x.clone()
    y = check("bounded", x)
    assert torch.equal(x, before)
    assert y.is_contiguous() or y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_layouts_of_the_upstream_gradient(make):
    for curve, x in (("bounded", randn(3, 5, 5, 3, last=True)), ("swish", randn(2, 22, 7, 7))):
        dy = make(x)
        before = dy.clone()
        check(curve, x, dy=dy)
        assert torch.equal(dy, before)


def test_planes_that_start_anywhere_go_to_the_flat_kernel():
    before = _launch.launches.copy()
    for x in (randn(2 * 22 * 49 + 1).view(-1)[1:].view(2, 22, 7, 7), randn(2, 24, 7, 7)[:, 1:-1]):
        check("bounded", x)
    assert (_launch.launches - before)["curve_map_flat"] == 6


@pytest.mark.parametrize(
    ("programs", "curve", "last"), [(1, "swish", True), (3, "bounded", False), (132, "bounded", True)]
)
def test_parts(monkeypatch, programs, curve, last):
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: programs)
    monkeypatch.setattr(_channel_forms, "_LEAST", 1)  # tiles of a part
    before = _launch.launches["merge_rows"]
    check(curve, randn(1, 2, 45, 97, last=last, dtype=torch.bfloat16))
    assert _launch.launches["merge_rows"] - before == 1


def test_forms_depend_on_the_shape_the_layout_and_the_device_alone(monkeypatch):
    x = torch.empty(4, 3, 190, 177, device=DEVICE)
    problem = _channel_forms.Problem(4, 3, 190 * 177, 4, False, True, False, x.device)
    forms = []
    for programs in (1, 132, 132):
        monkeypatch.setattr(_channel_forms, "sm_count", lambda device, n=programs: n)
        _launch.forget()
        forms.append(
            (_curve_forms.curve_sums_form(problem, False), _curve_forms.curve_map_form(problem, True, True))
        )
    assert forms[0] != forms[1] == forms[2]


@both
@layouts
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0, 4)], ids=str)
def test_nothing_to_do(shape, last, curve):
    x = randn(*shape, last=last)
    ones = [torch.ones(shape[:2], device=DEVICE)] * len(eager.PARAMETERS[curve])
    before = _launch.launches.total()
    found = curves.sums(x, x, curve, *ones[:-1])
    assert len(found) == len(ones) and all(t.shape == shape[:2] and not t.any() for t in found)
    assert curves.apply(x, curve, *ones).shape == shape
    assert curves.dx(x, x, curve, tuple(ones[:-1]), *ones[:3]).shape == shape
    assert _launch.launches.total() == before


@layouts
def test_ties_share_alike(last):
    """Whole numbers, so that every bound that a line meets is met exactly, and every sum is exact."""
    x, dy = (torch.randint(-2, 3, (3, 6, 5, 4), device=DEVICE).float() for _ in range(2))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    slope, level = (torch.randint(-1, 2, (3, 6), device=DEVICE).float() for _ in range(2))
    carried = (torch.full((3, 6), 2.0, device=DEVICE), torch.ones(3, 6, device=DEVICE), slope, level)
    line = slope[..., None, None] * x + level[..., None, None]
    assert 0.1 < (line == 1).float().mean() < 0.9 and line.max() <= 3
    for ours, exact in zip(
        curves.sums(dy, x, "bounded", *carried), eager.sums(dy, x, "bounded", *carried), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-5)
    dx = curves.dx(dy, x, "bounded", carried)
    torch.testing.assert_close(dx, eager.dx(dy, x, "bounded", carried), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so in the interpreter
@both
@pytest.mark.parametrize("shape", [(2, 22, 7, 7), (2, 5, 8, 8)], ids=str)
def test_nan_stays_where_it_is(shape, curve):
    """And leaves every sum of its channel that eager PyTorch leaves; a parameter takes its channel along."""
    x, dy = randn(*shape), randn(*shape)
    *carried, shift = [0.5 + torch.rand(shape[:2], device=DEVICE) for _ in eager.PARAMETERS[curve]]
    x[0, 1, 2, 3] = float("nan")
    statistics = [shift] * 3
    for number in range(len(carried)):
        carried[number][1, number] = float("nan")
    apply, gradient = (x, curve, *carried, shift), (dy, x, curve, tuple(carried), *statistics)
    for call, args in {"apply": apply, "dx": gradient, "sums": (dy, x, curve, *carried)}.items():
        found, expected = getattr(curves, call)(*args), getattr(eager, call)(*args)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()), call
        assert found[0].isnan().any() and not found[0].isnan().all()


@layouts
def test_gates_far_from_zero(last):
    """Limits, not overflow: x · sigmoid is 0 or x there, and its derivatives are 0 or those of x."""
    x = torch.tensor([-1e30, -1e4, -80.0, -0.0, 80.0, 1e4, 1e30], device=DEVICE).view(1, 1, 7)
    x = x.expand(2, 8, 7).clone() if not last else x.expand(2, 8, 7).movedim(1, 2).clone().movedim(2, 1)
    scale, slope = torch.ones(2, 8, device=DEVICE), torch.full((2, 8), 3.0, device=DEVICE)
    y = curves.apply(x, "swish", scale, slope, 0 * scale)
    torch.testing.assert_close(y, x.clamp(min=0))
    dx = curves.dx(torch.ones_like(x), x, "swish", (scale, slope))
    torch.testing.assert_close(dx, torch.where(x == 0, 0.5, (x > 0).float()))
    _, of_slope, _ = curves.sums(torch.ones_like(x), x, "swish", scale, slope)
    assert torch.equal(of_slope, 0 * scale)


def test_far_along_the_line_the_derivative_keeps_its_digits():
    x = torch.tensor([[[1e4, 3e5]]], device=DEVICE)
    carried = tuple(torch.tensor([[v]], device=DEVICE) for v in (1.0, 0.1, 3.0, 0.7))
    exact = 0.7 / (3 * x.double() + 0.7).square()
    dx = curves.dx(torch.ones_like(x), x, "bounded", carried)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-6, atol=0)


def test_a_divisor_of_zero_beyond_the_edge_does_no_harm():
    """Where bound and level are 0, a column that is no entry has the divisor 0."""
    x = torch.rand(2, 3, 5, device=DEVICE) + 0.5
    one = torch.ones(2, 3, device=DEVICE)
    found = curves.sums(x, x, "bounded", one, 0 * one, one, 0 * one)
    expected = eager.sums(x, x, "bounded", one, 0 * one, one, 0 * one)
    torch.testing.assert_close(found, expected)


def test_runs_are_bitwise_equal(monkeypatch):
    monkeypatch.setattr(_channel_forms, "_LEAST", 1)  # several parts
    x, dy = randn(1, 1, 6001), randn(1, 1, 6001)
    *carried, shift = parameters_of("bounded", x.shape)
    runs = []
    for _ in range(2):
        y, sums = curves.apply(x, "bounded", *carried, shift), curves.sums(dy, x, "bounded", *carried)
        runs.append((y, *sums, curves.dx(dy, x, "bounded", tuple(carried), *[shift] * 3)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_are_well_formed():
    def opcheck(name, *args):
        operator = getattr(torch.ops.normzoo, f"curve_{name}").default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))

    last, copied = randn(2, 3, 4, 5, last=True), randn(2, 3, 4, 5).transpose(2, 3)
    for curve, x in (("bounded", last), ("swish", copied)):
        *carried, shift = parameters_of(curve, x.shape)
        opcheck("apply", x, curve, [*carried, shift])
        opcheck("sums", x.clone(), x, curve, carried)
        statistics = [torch.ones_like(shift) for _ in range(3)]
        opcheck("dx", x.clone(), x, curve, carried, statistics if curve == "swish" else [])


def engine(curve: str):
    """A norm of x with weights v, w and b, by statistics of the batch, of groups and of each sample."""

    def call(x: Tensor, v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        def combine(m):
            if curve == "swish":
                return w * torch.rsqrt(m.over_groups(2).var + 0.1), v, b
            return w, torch.sqrt(m.over_batch().var + 0.1), v, torch.sqrt(m.var + 0.1), b

        return normalize(x, combine, per_sample=True, curve=curve)[0]

    return call


def results(call, backend: str, tensors, dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    with normzoo.backend(backend):
        y = call(*leaves)
    return {"y": y.detach()} | {
        f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(y, leaves, dy.to(y.dtype)))
    }


def weights(channels: int) -> list[Tensor]:
    return [(torch.rand(channels) + 0.5).to(DEVICE) for _ in range(3)]


@both
@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_the_engine_on_kernels(dtype, last, curve):
    """Two passes forward and two backward; y, dx and the gradients of all parameters."""
    x, dy = (randn(3, 4, 7, 5, dtype=dtype, last=last) for _ in range(2))
    tensors = [x, *weights(4)]
    before = _launch.launches.copy()
    ours = results(engine(curve), "triton", tensors, dy)
    ran = _launch.launches - before
    over_x = {name: number for name, number in ran.items() if name.startswith(("channel", "curve"))}
    assert over_x == {"channel_moments": 1, "curve_map": 2, "curve_sums": 1}, ran
    plain = results(engine(curve), "reference", tensors, dy)
    exact = results(engine(curve), "reference", [t.double() for t in tensors], dy.double())
    for name in ours:
        assert_as_good(name, ours[name], plain[name], exact[name])


@both
def test_a_second_derivative_leaves_the_kernels(curve):
    tensors = [torch.randn(3, 16, 5, 2, device=DEVICE), *weights(16)]

    def penalty(backend, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with normzoo.backend(backend):
            y = engine(curve)(*leaves)
        (slope,) = torch.autograd.grad(y.sin().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaves, allow_unused=True, materialize_grads=True)

    found = (penalty(*how) for how in (("triton", torch.float32), ("reference", torch.float32)))
    for i, three in enumerate(zip(*found, penalty("reference", torch.float64), strict=True)):
        assert_as_good(f"gradient {i}", *three)


def test_several_rows_of_gradients_at_once():
    x, others = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True), weights(4)
    with normzoo.backend("triton"):
        y = engine("bounded")(x, *others)
    dys = torch.randn(2, *y.shape, device=DEVICE)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for found, dy in zip(together, dys, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, dy, retain_graph=True)[0])


@pytest.mark.parametrize("name", ["apply", "sums", "dx"])
def test_a_kernel_that_does_not_compile(monkeypatch, name):
    """Is an error where kernels were asked for, and replaced with one warning where they were not."""

    def unavailable(*args):
        raise _launch.KernelUnavailable(f"curve of {name}: no compiler")

    monkeypatch.setattr(curves, name, unavailable)
    tensors, dy = [torch.randn(3, 4, 5, device=DEVICE), *weights(4)], torch.randn(3, 4, 5, device=DEVICE)
    with pytest.raises(_launch.KernelUnavailable, match="no compiler"):
        results(engine("swish"), "triton", tensors, dy)
    expected = results(engine("swish"), "reference", tensors, dy)
    monkeypatch.setattr(normzoo.engine, "use_kernel", lambda *args, **kwargs: True)
    _launch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"did not compile .*no compiler"):
        found = results(engine("swish"), "auto", tensors, dy)
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
