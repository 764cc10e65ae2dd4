"""Maps of the channel engine that are no affine ones: their formulas, their gradients, and what is refused."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from normzoo import curves, engine, passes
from normzoo.engine import normalize

CURVES = {"bounded": 5, "swish": 3}
both = pytest.mark.parametrize("curve", CURVES)


def positive(*shape):
    return torch.rand(shape, dtype=torch.float64) + 0.5


def wide(p, x):
    return p.reshape(*p.shape, *(1,) * (x.dim() - 2))


def formula(x, curve, *parameters):
    scale, *inner, shift = (wide(p, x) for p in parameters)
    if curve == "swish":
        return scale * x / (1 + torch.exp(-inner[0] * x)) + shift
    bound, slope, level = inner
    line = slope * x + level
    return scale * x / torch.where(line > bound, line, bound) + shift


@both
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (2, 3, 6), (3, 4)], ids=str)
def test_formulas(curve, shape):
    x = torch.randn(shape, dtype=torch.float64)
    parameters = [positive(*shape[:2]) for _ in range(CURVES[curve])]
    torch.testing.assert_close(curves.apply(x, curve, *parameters), formula(x, curve, *parameters))
    half = curves.apply(x.bfloat16(), curve, *(p.float() for p in parameters))
    torch.testing.assert_close(half, formula(x.bfloat16().double(), curve, *parameters).bfloat16())


def whole(shape):
    """x and parameters of a bounded curve whose line meets the bound at many an x."""
    x = torch.randint(-2, 3, shape).double()
    slope, bound, level = (
        torch.randint(-1, 2, shape[:2]),
        torch.ones(shape[:2]),
        torch.randint(-1, 2, shape[:2]),
    )
    return x, [positive(*shape[:2]), *(p.double() for p in (bound, slope, level)), positive(*shape[:2])]


@both
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (9, 8)], ids=str)
def test_passes_are_the_gradients_of_the_map(curve, ties, shape):
    x, parameters = torch.randn(shape).double(), [positive(*shape[:2]) for _ in range(5)]
    if ties:
        x, parameters = whole(shape)
        _, bound, slope, level, _ = (wide(p, x) for p in parameters)
        assert 0.1 < (slope * x + level == bound).double().mean() < 0.9
    parameters, dy = parameters[: CURVES[curve]], torch.randn(shape, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    dx, *expected = torch.autograd.grad(curves.apply(leaves[0], curve, *leaves[1:]), leaves, dy)
    found = curves.sums(dy, x, curve, *parameters[:-1])
    torch.testing.assert_close(found, tuple(expected))
    torch.testing.assert_close(curves.dx(dy, x, curve, tuple(parameters[:-1])), dx)
    pivot, slope, offset = statistics = [torch.randn(shape[:2], dtype=torch.float64) for _ in range(3)]
    through = wide(slope, x) * (x - wide(pivot, x)) + wide(offset, x)
    with_statistics = curves.dx(dy, x, curve, tuple(parameters[:-1]), *statistics)
    torch.testing.assert_close(with_statistics, dx + through)


def test_ties_share_alike():
    """By hand: at x = 2 the line 0.5 · x + 1 meets the bound, 2."""
    x, dy = torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])
    carried = [torch.tensor([[v]]) for v in (4.0, 2.0, 0.5, 1.0)]
    found = curves.sums(dy, x, "bounded", *carried)
    assert [t.item() for t in found] == [1.0, -1.0, -2.0, -1.0, 1.0]  # scale, bound, slope, level, shift
    assert curves.dx(dy, x, "bounded", tuple(carried)).item() == 4 * (1 - 0.5 * 0.5) / 2


@both
def test_far_from_zero_nothing_overflows(curve):
    x = torch.tensor([[[-1e30, -1e25, 1e25, 1e30]]])
    scale, slope, bound, level = [torch.tensor([[v]]) for v in (2.0, 0.5, 3.0, 1.0)]
    carried = (scale, slope) if curve == "swish" else (scale, bound, slope, level)
    y = curves.apply(x, curve, *carried, 0 * scale)
    dx = curves.dx(torch.ones_like(x), x, curve, carried)
    found = curves.sums(torch.ones_like(x), x, curve, *carried)
    if curve == "swish":
        torch.testing.assert_close(y, torch.tensor([[[0.0, 0, 2e25, 2e30]]]))
        torch.testing.assert_close(dx, torch.tensor([[[0.0, 0, 2, 2]]]))
        assert found[1].item() == 0
    else:
        torch.testing.assert_close(y, 2 * x / torch.tensor([3.0, 3.0, 5e24, 5e29]))
        torch.testing.assert_close(dx, torch.tensor([[[2 / 3, 2 / 3, 0, 0]]]))
    assert all(t.isfinite() for t in found)


def test_far_along_the_line_the_derivative_keeps_its_digits():
    x = torch.tensor([[[1e4, 3e5]]])
    carried = tuple(torch.tensor([[v]]) for v in (1.0, 0.1, 3.0, 0.7))
    exact = 0.7 / (3 * x.double() + 0.7).square()
    dx = curves.dx(torch.ones_like(x), x, "bounded", carried)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-6, atol=0)


@both
def test_nan_stays_where_it_is(curve):
    x, parameters = torch.randn(2, 3, 4), [torch.ones(2, 3)] * CURVES[curve]
    x[0, 1, 2] = float("nan")
    assert torch.equal(curves.apply(x, curve, *parameters).isnan(), x.isnan())
    broken = [p.clone() for p in parameters]
    broken[1][1, 2] = float("nan")
    assert curves.apply(x, curve, *broken)[1, 2].isnan().all()


def bounded(v, w, b):
    def combine(m):
        found = m.over_batch().var
        return w, torch.sqrt(found + 0.1), v, torch.sqrt(m.var + 0.1), b, found

    return combine


def swish(v, w, b):
    def combine(m):
        found = m.over_groups(2).var
        return w * torch.rsqrt(found + 0.1), v, b, found

    return combine


COMBINES = {"bounded": bounded, "swish": swish}


def normalized(curve, x, *parameters):
    return normalize(x, COMBINES[curve](*parameters), per_sample=True, curve=curve)


@pytest.fixture(params=["by autograd", "by passes"])
def way(request, monkeypatch):
    """Eager PyTorch leaves a curve to autograd; the passes that kernels follow run here in float64 too."""
    if request.param == "by passes":
        monkeypatch.setattr(engine, "use_kernel", lambda *args, **kwargs: True)
        monkeypatch.setattr(engine._Passes, "_run", lambda body, name, *args: getattr(passes, name)(*args))
        monkeypatch.setattr(engine._Curve, "_map", lambda body, name, *args: getattr(curves, name)(*args))


@both
def test_derivatives(curve, way):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = (x, *(positive(4).requires_grad_() for _ in range(3)))
    assert gradcheck(lambda *t: normalized(curve, *t), leaves)
    assert gradgradcheck(lambda *t: normalized(curve, *t), leaves)


@both
def test_losses_that_use_some_of_it(curve, way):
    """y twice, the statistics alone, x or parameters as constants: as autograd finds it through formulas."""
    tensors = [torch.randn(2, 4, 3, dtype=torch.float64), *(positive(4) for _ in range(3))]
    losses = {
        "y twice": lambda y, var: (y * y.sin()).sum(),
        "statistics alone": lambda y, var: var.square().sum(),
        "both": lambda y, var: y.square().sum() + var.sin().sum(),
    }

    def plainly(x, v, w, b):
        image = x.var(2, correction=0)
        if curve == "bounded":
            found = x.var((0, 2), correction=0)
            parameters = (w, torch.sqrt(found + 0.1), v, torch.sqrt(image + 0.1), b)
        else:
            found = x.reshape(2, 2, 6).var(2, correction=0).repeat_interleave(2, 1)
            parameters = (w * torch.rsqrt(found + 0.1), v, b)
        return formula(x, curve, *(p.expand(2, 4) for p in parameters)), found

    for name, loss in losses.items():
        for wanted in ((0, 1, 2, 3), (0,), (1, 3), (2,)):
            results = []
            for call in (lambda *t: normalized(curve, *t), plainly):
                leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
                value = loss(*call(*leaves))
                if value.requires_grad:
                    of = [leaves[i] for i in wanted]
                    results.append(torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True))
            for ours, theirs in zip(*results or ((), ()), strict=True):
                torch.testing.assert_close(ours, theirs, msg=lambda text, at=(name, wanted): f"{at}: {text}")


def ones(number):
    return lambda m: (torch.ones_like(m.pivot),) * number


REFUSED = {
    "unknown": (
        {"curve": "cubic", "per_sample": True},
        ones(2),
        ValueError,
        "normalize: curve is 'cubic'; it must be one of affine, bounded, swish",
    ),
    "batch": (
        {"curve": "swish"},
        ones(3),
        ValueError,
        r"curve='swish' needs per_sample=True and takes no mask",
    ),
    "mask": (
        {"curve": "bounded", "per_sample": True, "mask": torch.zeros(2, 4, dtype=torch.bool)},
        ones(5),
        ValueError,
        r"curve='bounded' needs per_sample=True and takes no mask",
    ),
    "few": (
        {"curve": "swish", "per_sample": True},
        ones(2),
        TypeError,
        r"combine must return \(scale, slope, shift\) or \(scale, slope, shift, aux\)",
    ),
    "many": (
        {"curve": "bounded", "per_sample": True},
        ones(7),
        TypeError,
        r"combine must return \(scale, bound, slope, level, shift\) or",
    ),
    "a number": (
        {"curve": "swish", "per_sample": True},
        lambda m: (m.var, 1.0, m.var),
        TypeError,
        "combine returned a float for slope; it must be a tensor",
    ),
    "a shape": (
        {"curve": "bounded", "per_sample": True},
        lambda m: (m.var, m.var, m.var, m.var.unsqueeze(-1), m.var),
        ValueError,
        r"combine returned a level of shape \(2, 3, 1\); it must broadcast to the statistics, \(2, 3\)",
    ),
}


@pytest.mark.parametrize(("options", "combine", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refusals(options, combine, error, match):
    with pytest.raises(error, match=match):
        normalize(torch.randn(2, 3, 4), combine, **options)
