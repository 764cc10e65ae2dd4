"""Passes in blocks on a CPU: the same as over whole tensors, whatever the layout, size and offset."""

import pytest
import torch
from tolerance import assert_as_good
from torch import nn

import normzoo
from normzoo import blocks, passes, regions, row_blocks
from normzoo.engine import normalize
from normzoo.functional import adaptive_layer_norm, crms_norm, rms_norm, time_dependent_rms_norm

SHAPES = [(3, 5, 7, 9), (2, 3, 40, 41), (300, 33), (1, 6, 2100), (5, 8, 4, 4)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks so small that there are many of every kind."""
    monkeypatch.setattr(blocks, "_GRAIN", 1 << 5)
    monkeypatch.setattr(regions, "_LEAST", 1)
    monkeypatch.setattr(row_blocks, "_SMALL", 0)
    monkeypatch.setattr(row_blocks, "_LARGE_SAMPLE", 1 << 11)


def whole(monkeypatch, call):
    """What a call gives where nothing is cut."""
    with monkeypatch.context() as m:
        m.setattr(passes, "unrecorded", lambda *_: False)
        m.setattr(regions, "unrecorded", lambda *_: False)
        m.setattr(row_blocks, "fits", lambda *_: False)
        return call()


def laid(shape, dtype, last, offset=0.0):
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_passes(monkeypatch, shape, last, masked, offset, dtype):
    """Each as good as over whole tensors, in the memory format of x, for any layout of dy."""
    if (last and len(shape) != 4) or (masked and len(shape) < 3):
        pytest.skip("there is no such input")
    x, dy = laid(shape, dtype, last, offset), torch.randn(shape).to(dtype).mT.contiguous().mT
    mask = (torch.rand(shape[0], *shape[2:]) > 0.6).to(torch.uint8) if masked else None
    for per_sample in (False, True):
        found = passes.moments(x, mask, per_sample)
        pivot, scale, shift, slope = found[0], *(torch.randn_like(found[0]) for _ in range(3))
        calls = {
            "apply": lambda t, g, *s: passes.apply(t, mask, *s[:3]),
            "sums": lambda t, g, *s: torch.stack(passes.sums(g, t, mask, s[0], per_sample)),  # noqa: B023
            "dx": lambda t, g, *s: passes.dx(g, t, mask, *s),
            "moments": lambda t, g, *s: torch.stack(
                [(m := passes.moments(t, mask, per_sample))[0] + m[1], m[2]]  # noqa: B023
            ),
        }
        given = (x, dy, pivot, scale, shift, slope)
        for name, call in calls.items():
            ours = call(*given)
            plain, exact = (
                whole(monkeypatch, lambda call=call, args=args: call(*args))
                for args in (given, [t.double() for t in given])
            )
            assert_as_good(f"{name} {per_sample}", ours, plain, exact)
            if name in ("apply", "dx"):
                assert ours.stride() == x.stride()


def test_pivots_near_zero():
    """Zero where no mean is further away than a deviation, and the means else, for all channels alike."""
    x = torch.randn(4, 3, 20, 20)
    assert not passes.moments(x + 0.5, None, False)[0].any()
    far = x + torch.tensor([0.0, 0.0, 50.0]).view(1, 3, 1, 1)
    pivot, delta, _ = passes.moments(far, None, False)
    assert (pivot[2] - 50).abs() < 1 and pivot.all() and delta.abs().max() < 1e-4
    mask = (torch.rand(4, 20, 20) > 0.5).to(torch.uint8)
    assert not passes.moments(x, mask, False)[0].any() and passes.moments(far, mask, True)[0].all()


def test_another_region_stays_out():
    """What is NaN in the hole does not reach the rest: statistics, output or gradient."""
    x, mask = torch.randn(2, 4, 6, 6), torch.zeros(2, 6, 6, dtype=torch.uint8)
    mask[:, :2] = 1
    x[:, :, 0, 0] = torch.nan
    x.requires_grad_()
    y, _ = normalize(x, lambda m: m.standardize(), mask)
    (dx,) = torch.autograd.grad(y[:, :, 2:].square().sum() + y[:, :, :2].sum(), x)
    assert y[:, :, 2:].isfinite().all() and dx[:, :, 2:].isfinite().all() and y[:, :, :2].isnan().all()


ROWS = {
    "rms": lambda x, w, b: rms_norm(x, x.shape[-1], w, 1e-6, bias=b, offset=0.5),
    "rms of two dimensions": lambda x, w, b: rms_norm(x, x.shape[-2:]),
    "crms": lambda x, w, b: crms_norm(x, x.shape[-1], w),
    "samples": lambda x, w, b: adaptive_layer_norm(x, w.expand(len(x), -1), b.expand(len(x), -1)),
    "part": lambda x, w, b: time_dependent_rms_norm(x, x.new_ones(len(x)), (w, b, b, w), partial=0.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 2, 33), (2, 40, 64), (1, 2, 700)])
@pytest.mark.parametrize("name", ROWS)
def test_rows(monkeypatch, name, shape, dtype):
    """Output and gradients as good as by autograd, a row of zeros among them."""
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x[0, 0] = 0
    w, b = (torch.randn(shape[-1]).to(dtype) for _ in range(2))

    def results(*given):
        x, w, b, dy = given
        x, w, b = (t.detach().clone().requires_grad_() for t in (x, w, b))
        y = ROWS[name](x, w, b)
        grads = torch.autograd.grad(y, (x, w, b), dy, allow_unused=True, materialize_grads=True)
        return [y, *grads, ROWS[name](x.detach(), w.detach(), b.detach())]

    ours = results(x, w, b, dy)
    plain, exact = (
        whole(monkeypatch, lambda args=args: results(*args))
        for args in ((x, w, b, dy), [t.double() for t in (x, w, b, dy)])
    )
    for what, *three in zip(("y", "dx", "dw", "db", "alone"), ours, plain, exact, strict=True):
        assert_as_good(f"{name} {what}", *three)


@pytest.mark.parametrize("layer", [normzoo.RMSNorm(8), normzoo.GhostBatchNorm(8, 2), normzoo.EvoNormS0(8, 4)])
def test_what_is_returned_may_be_changed(layer):
    """In place, and in a graph: it is no view."""
    x = torch.randn((4, 8) if isinstance(layer, normzoo.RMSNorm) else (4, 8, 3, 3), requires_grad=True)
    y = layer(x)
    assert not y._is_view()
    nn.functional.relu_(y).sum().backward()


def test_memory_is_used_again_and_fits_every_mode():
    """What inference made serves training, and large rooms go."""
    x = torch.randn(2, 3, 50, 50, requires_grad=True)
    blocks._free.of[torch.float32].clear()
    with torch.inference_mode():
        passes.moments(x.detach().clone(), None, False)
    assert blocks._free.of[torch.float32]
    y, _ = normalize(x, lambda m: m.standardize())
    y.sum().backward()
    assert len(blocks._free.of[torch.float32]) <= blocks._KEPT


def test_another_default_device():
    layer, x = normzoo.RegionNormB(8), torch.randn(2, 8, 64, 64)
    mask = (torch.rand(2, 1, 64, 64) > 0.5).float()
    expected = layer(x, mask)
    torch.set_default_device("meta")
    try:
        found = layer(x, mask)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", [normzoo.EvoNormS0(8, groups=2), normzoo.RMSNorm(40).bfloat16()])
def test_tracing_meets_no_branch_on_what_tensors_hold(layer):
    """Nor memory that later calls use again."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(2, 8, 40, 40).to(next(layer.parameters()).dtype)
    with torch.no_grad():
        expected = layer(x + 3)
        graph = make_fx(layer)(x)
        assert not list(graph.buffers())
        torch.testing.assert_close(graph(x + 3), expected)


def test_squares_too_large_for_their_dtype():
    """Around the mean they are finite, where around zero they are not."""
    x = 1e17 * torch.randn(2, 3, 40, 40) + 1e19
    mask = torch.zeros(2, 40, 40, dtype=torch.uint8)
    mask[:, :20] = 1
    for given in (None, mask):
        _, _, m2 = passes.moments(x, given, False)
        *_, expected = passes.moments(x.double(), given, False)
        torch.testing.assert_close(m2, expected.float(), rtol=1e-4, atol=0.0)


NORMS = {
    "batch": lambda x, w, b: normzoo.functional.batch_norm(x, None, None, w, b, training=True),
    "group": lambda x, w, b: normzoo.functional.group_norm(x, 2, w, b),
    "instance": lambda x, w, b: normzoo.functional.instance_norm(x, None, None, w, b),
}
TORCHS = {
    "batch": lambda x, w, b: nn.functional.batch_norm(x, None, None, w, b, training=True),
    "group": lambda x, w, b: nn.functional.group_norm(x.contiguous(), 2, w, b),
    "instance": lambda x, w, b: nn.functional.instance_norm(x.contiguous(), None, None, w, b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_torchs_norms(monkeypatch, name, last, offset, dtype):
    """Large ones go in blocks where that is faster; all are as good as torch's of contiguous tensors."""
    monkeypatch.setattr(blocks, "_WORTH", 0)
    x, dy = laid((3, 4, 9, 7), dtype, last, offset), laid((3, 4, 9, 7), dtype, last)
    w, b = torch.randn(4), torch.randn(4)

    def results(norm, *given):
        x, w, b, dy = given
        x, w, b = (t.detach().clone().requires_grad_() for t in (x, w, b))
        y = norm(x, w, b)
        return [y, *torch.autograd.grad(y, (x, w, b), dy)]

    ours = results(NORMS[name], x, w, b, dy)
    exact = results(TORCHS[name], *(t.double() for t in (x, w, b, dy)))
    if dtype == torch.bfloat16:  # statistics of torch's are float32 there as well
        plain = results(lambda *g: TORCHS[name](*(t.float() for t in g)).to(dtype), x, w, b, dy)
    else:
        plain = results(TORCHS[name], x, w, b, dy)
    for what, *three in zip(("y", "dx", "dw", "db"), ours, plain, exact, strict=True):
        assert_as_good(f"{name} {what}", *three)
    assert ours[0].stride() == x.stride()


def test_which_of_torchs_norms_go_in_blocks(monkeypatch):
    """Those for which torch's operator is slower, and no small ones."""
    taken = []
    original = blocks.pays
    monkeypatch.setattr(blocks, "pays", lambda *given: taken.append(original(*given)) or taken[-1])
    x = torch.randn(2, 8, 32, 32)
    last = x.contiguous(memory_format=torch.channels_last)
    NORMS["instance"](last, None, None)
    assert taken == [False]
    monkeypatch.setattr(blocks, "_WORTH", x.numel())
    asked = {}
    for name in ("group", "instance"):
        for given in (x, last, x.bfloat16(), last.bfloat16(), last + 50):
            taken.clear()
            NORMS[name](given, None, None)
            asked.setdefault(name, []).append(any(taken))
    assert asked == {
        "group": [False, False, False, False, True],
        "instance": [False, True, False, True, True],
    }


def test_autocast_rounds_no_gradient():
    """Nor does a lower precision of matrix products."""
    x, w = torch.randn(6, 700, requires_grad=True), torch.randn(700, requires_grad=True)
    dy = torch.randn(6, 700)

    def gradients():
        return torch.autograd.grad(crms_norm(x, 700, w), (x, w), dy)

    expected = gradients()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients()
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_scale_and_shift_are_added_up_in_float32(dtype):
    """Where torch's operator takes half precision otherwise."""
    x, dy = (torch.randn(2, 900, 33).to(dtype) for _ in range(2))
    own = [torch.randn(2, 33) for _ in range(2)]

    def grads(x, dy, *own):
        own = [t.detach().requires_grad_() for t in own]
        return torch.autograd.grad(adaptive_layer_norm(x, *own), own, dy)

    exact = grads(x.double(), dy.double(), *(t.double() for t in own))
    for found, wanted in zip(grads(x, dy, *own), exact, strict=True):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
