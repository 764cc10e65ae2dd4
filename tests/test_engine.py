"""The channel engine in eager PyTorch and under the compiler: every combine, every way of differentiating."""

import pytest
import torch
from combines import CASES, Case, parameters
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from normzoo.engine import normalize

ALL = [pytest.param(case, id=name) for name, case in CASES.items()]
TRUE = [pytest.param(case, id=name) for name, case in CASES.items() if "detached" not in name]
"""Those whose gradient is the derivative of their output."""


def leaves(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, of samples and channels that differ, and the parameters."""
    x = torch.randn(shape, dtype=dtype) + 2 * torch.randn(*shape[:2], *(1,) * (len(shape) - 2), dtype=dtype)
    return [x.requires_grad_(), *parameters(shape[1], dtype)]


def gradients(call, tensors, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*tensors), tensors, dy, allow_unused=True, materialize_grads=True)


def penalty(call, tensors) -> tuple[Tensor, ...]:
    """Second derivatives: the gradient of the squared gradient."""
    weights = torch.linspace(-1, 1, tensors[0].numel(), dtype=tensors[0].dtype).view_as(tensors[0])
    first = torch.autograd.grad(
        (call(*tensors) * weights).sum(), tensors, create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = torch.stack([g.square().sum() for g in first]).sum()
    return torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (3, 4, 5), (5, 4), (3, 2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_a_combine_is_the_norm_written_out(case: Case, shape):
    tensors = leaves(*shape)
    if len(shape) == 2 and case is CASES["instance"]:
        pytest.skip("a channel of a sample has one value")
    torch.testing.assert_close(case.engine(*tensors), case.exact(*tensors))
    dy = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(gradients(case.engine, tensors, dy), gradients(case.exact, tensors, dy))
    torch.testing.assert_close(penalty(case.engine, tensors), penalty(case.exact, tensors))


@pytest.mark.parametrize("case", TRUE)
def test_derivatives(case: Case):
    tensors = leaves(4, 4, 2)
    assert torch.autograd.gradcheck(case.engine, tensors)
    assert torch.autograd.gradgradcheck(case.engine, tensors)


COMPILED = {**{name: (case, None) for name, case in CASES.items()}, "any size": (CASES["ghost"], True)}


@pytest.mark.parametrize(("case", "dynamic"), COMPILED.values(), ids=COMPILED)
def test_compiled_graphs_compute_the_same(case: Case, dynamic):
    torch._dynamo.reset()
    tensors = leaves(4, 6, 3, 2)
    compiled = torch.compile(case.engine, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(*tensors), case.engine(*tensors))
    dy = torch.randn(4, 6, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(gradients(compiled, tensors, dy), gradients(case.engine, tensors, dy))


def masked(per_sample: bool):
    def call(x: Tensor, mask: Tensor, w: Tensor) -> Tensor:
        def combine(m):
            return m.standardize(w, eps=1e-3)

        return normalize(x, combine, mask, per_sample)[0]

    return call


def masked_by_hand(per_sample: bool):
    """Each region gathered, normalized and put back, sample by sample or together."""

    def call(x: Tensor, mask: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        blocks = [slice(i, i + 1) for i in range(len(x))] if per_sample else [slice(None)]
        for block in blocks:
            for region in (0, 1):
                inside = (mask[block] == region).unsqueeze(1).expand_as(x[block])
                n = inside.sum((0, 2), keepdim=True).clamp(min=1)
                mean = torch.where(inside, x[block], 0).sum((0, 2), keepdim=True) / n
                away = torch.where(inside, x[block] - mean, 0)
                var = away.square().sum((0, 2), keepdim=True) / n
                part = away / torch.sqrt(var + 1e-3) * w[region].view(1, -1, 1)
                y = y + torch.cat([part if b is block else torch.zeros_like(x[b]) for b in blocks])
        return y

    return call


@pytest.mark.parametrize("per_sample", [False, True])
def test_regions(per_sample):
    x = (torch.randn(4, 3, 7, dtype=torch.float64) * 2 + 5).requires_grad_()
    mask = torch.rand(4, 7) > 0.5
    mask[1] = True
    weight = torch.rand(2, 1, 3, dtype=torch.float64)
    weight = (weight if per_sample else weight.squeeze(1)).requires_grad_()
    engine, by_hand = masked(per_sample), masked_by_hand(per_sample)
    torch.testing.assert_close(engine(x, mask, weight), by_hand(x, mask, weight))
    dy = torch.randn_like(x)
    for call in (gradients, lambda f, t, dy: penalty(f, t)):
        found, expected = (call(lambda x, w, f=f: f(x, mask, w), (x, weight), dy) for f in (engine, by_hand))
        torch.testing.assert_close(found, expected)


def test_a_mask_may_have_a_channel_axis_and_any_number_for_true():
    x, mask = torch.randn(2, 3, 8), torch.rand(2, 8) > 0.5
    w = torch.rand(2, 3)
    expected = masked(False)(x, mask, w)
    assert torch.equal(masked(False)(x, mask.unsqueeze(1), w), expected)
    assert torch.equal(masked(False)(x, 255 * mask.to(torch.uint8), w), expected)


def test_regions_of_single_pixels():
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    y, _ = normalize(x, lambda m: m.over_batch().standardize(), mask, per_sample=True)
    torch.testing.assert_close(y[mask], torch.nn.functional.batch_norm(x[mask], None, None, training=True))
    assert torch.equal(y[1], torch.zeros(3))


def test_what_is_in_one_region_does_not_reach_the_other():
    x, mask = torch.randn(2, 3, 8), torch.zeros(2, 8, dtype=torch.uint8)
    mask[:, 5:] = 1
    w = torch.ones(2, 3, requires_grad=True)
    clean = masked(False)(x, mask, w)
    x[..., 6] = float("nan")
    x.requires_grad_()
    y = masked(False)(x, mask, w)
    assert torch.equal(y[..., :5], clean[..., :5])
    (dx,) = torch.autograd.grad(y[..., :5].sum(), x)
    assert torch.isfinite(dx[..., :5]).all()


def batch(m):
    return m.standardize(eps=1e-3)


def test_y_may_be_used_twice_and_the_graph_kept():
    x, w, b, a = leaves(3, 4, 5)
    case = CASES["batch"]
    losses = [(f(x, w, b, a) ** 3 + f(x, w, b, a).sin()).sum() for f in (case.engine, case.exact)]
    for _ in range(2):
        first, second = (torch.autograd.grad(loss, (x, w, b), retain_graph=True) for loss in losses)
        torch.testing.assert_close(first, second)


def test_a_loss_on_the_statistics_alone():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    _, (mean, var) = normalize(x, lambda m: (*batch(m), (m.mean, m.var)))
    (found,) = torch.autograd.grad((mean.sin() + var.square()).sum(), x)
    v, u = torch.var_mean(x, (0, 2), correction=0)
    (expected,) = torch.autograd.grad((u.sin() + v.square()).sum(), x)
    torch.testing.assert_close(found, expected)


def test_statistics_and_output_in_one_loss():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def loss(x):
        y, var = normalize(x, lambda m: (*batch(m), m.var))
        return (y**3).sum() + var.square().sum()

    assert torch.autograd.gradcheck(loss, (x,)) and torch.autograd.gradgradcheck(loss, (x,))


def test_what_needs_no_gradient_gets_none():
    x, w, b, a = leaves(3, 4, 5)
    frozen = CASES["batch"].engine(x, w.detach(), b.detach(), a)
    (dx,) = torch.autograd.grad(frozen.sum(), x)
    assert dx.shape == x.shape
    still = CASES["batch"].engine(x.detach(), w, b, a)
    dw, db = torch.autograd.grad((still * torch.arange(5)).sum(), (w, b))
    expected = CASES["batch"].exact(x.detach(), w, b, a)
    torch.testing.assert_close((dw, db), torch.autograd.grad((expected * torch.arange(5)).sum(), (w, b)))
    with torch.no_grad():
        assert CASES["batch"].engine(x, w, b, a).grad_fn is None


def test_y_may_be_changed_in_place():
    x, w, b, a = leaves(3, 4, 5)
    for case in CASES.values():
        y = case.engine(x, w, b, a)
        assert not y._is_view()
        found = torch.autograd.grad(torch.relu_(y).sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(torch.relu(case.exact(x, w, b, a)).sum(), x))


def test_an_expanded_gradient():
    x, w, b, a = leaves(3, 4, 5)
    for call in (torch.sum, torch.mean):
        found, expected = (
            torch.autograd.grad(call(f(x, w, b, a)), b)[0]
            for f in (CASES["batch"].engine, CASES["batch"].exact)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ALL)
def test_checkpointing(case: Case, reentrant):
    tensors = leaves(3, 4, 5)
    dy = torch.randn_like(tensors[0])
    checkpoint(case.engine, *tensors, use_reentrant=reentrant).backward(dy)
    found = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    torch.testing.assert_close(found, list(gradients(case.engine, tensors, dy)))


def test_hooks_see_the_gradient_of_x_once():
    x, w, b, a = leaves(3, 4, 5)
    seen = []
    x.register_hook(lambda g: seen.append(g) or g)
    CASES["mixed"].engine(x, w, b, a).sin().sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], x.grad)


def test_x_is_what_is_saved():
    """Of x-sized tensors x alone, packed twice, and no output."""
    x, w, b, a = leaves(3, 4, 50)
    saved = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = CASES["batch"].engine(x, w, b, a)
    large = [t for t in saved if t.numel() == x.numel()]
    assert len(large) == 2 and all(t.data_ptr() == x.data_ptr() for t in large)
    assert all(t.data_ptr() != y.data_ptr() for t in saved)


def test_function_transforms():
    x, w, b, a = (t.detach() for t in leaves(3, 4, 5))
    for case in CASES.values():

        def loss(x, case=case):
            return case.engine(x, w, b, a).sin().sum()

        expected = torch.autograd.functional.jacobian(loss, x)
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
        batched = torch.stack((x, 2 * x))
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(batched)[0], expected)
        slope = torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(slope, expected.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_statistics_are_float32_at_least(dtype):
    x = torch.randn(4, 3, 5).to(dtype)
    seen = []
    y, _ = normalize(x, lambda m: seen.append(m.var.dtype) or batch(m))
    assert y.dtype == dtype
    assert seen == [torch.promote_types(dtype, torch.float32)]


def test_autocast_is_off_inside_a_combine():
    def mixing(m):
        assert (m.var @ torch.eye(3)).dtype == torch.float32
        return batch(m)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = normalize(torch.randn(4, 3, 5), mixing)
        assert y.dtype == torch.float32
        assert normalize(torch.randn(4, 3, 5).bfloat16(), mixing)[0].dtype == torch.bfloat16


FORMATS = {
    "contiguous": lambda: torch.randn(4, 3, 5, 2),
    "channels_last": lambda: torch.randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 5, 2, 2).contiguous(memory_format=torch.channels_last_3d),
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_the_memory_format_is_kept(make):
    x = make().requires_grad_()
    y, _ = normalize(x, batch)
    assert y.stride() == x.stride()
    y.square().sum().backward()
    assert x.grad.stride() == x.stride()


def test_tokens():
    x = torch.randn(4, 5, 3)
    y, _ = normalize(x, batch, channel_dim=-1)
    torch.testing.assert_close(y, normalize(x.movedim(-1, 1), batch)[0].movedim(1, -1))
    each, _ = normalize(x.flatten(0, 1), batch)
    torch.testing.assert_close(y.flatten(0, 1), each)


def test_nothing_gives_nothing():
    for shape in ((0, 3, 4), (2, 3, 0), (0, 3)):
        x = torch.empty(shape, requires_grad=True)
        w = torch.ones(3, requires_grad=True)
        y, var = normalize(x, lambda m, w=w: (*m.standardize(w), m.var))
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert torch.equal(w.grad, torch.zeros(3)) and torch.equal(var, torch.zeros(3))


REFUSALS = {
    "list": (lambda x: normalize([1.0], batch), TypeError, "x is a list"),
    "integers": (lambda x: normalize(x.int(), batch), TypeError, "x is torch.int32"),
    "vector": (lambda x: normalize(x[0, 0], batch), ValueError, r"x has shape \(5,\); it must be \(N, C, \*\)"),
    "samples as channels": (lambda x: normalize(x, batch, channel_dim=0), ValueError, "channel_dim is 0"),
    "mask of floats": (lambda x: normalize(x, batch, torch.ones(4, 5)), TypeError, "mask is torch.float32"),
    "mask of channels": (
        lambda x: normalize(x, batch, torch.ones(4, 3, 5, dtype=torch.bool)),
        ValueError,
        r"mask has shape \(4, 3, 5\); for this x it must be \(4, 5\)",
    ),
    "no combine": (lambda x: normalize(x, None), TypeError, "combine is of type NoneType; it must be callable"),
    "complex": (
        lambda x: normalize(x, lambda m: (m.var, m.var.cfloat())),
        TypeError,
        "returned a shift of torch.complex64 on cpu; it must be real",
    ),
    "another device": (
        lambda x: normalize(x, lambda m: (m.var.to("meta"), m.var)),
        TypeError,
        "a scale of torch.float32 on meta; it must be real and on cpu",
    ),
    "one tensor": (lambda x: normalize(x, lambda m: m.var), TypeError, r"must return \(scale, shift\) or"),
    "a number": (lambda x: normalize(x, lambda m: (1.0, m.var)), TypeError, "returned a float for scale"),
    "wrong width": (
        lambda x: normalize(x, lambda m: (m.var, torch.ones(4))),
        ValueError,
        r"a shift of shape \(4,\); it must broadcast to the statistics, \(3,\)",
    ),
    "samples without per_sample": (
        lambda x: normalize(x, lambda m: (m.var, torch.ones(4, 3))),
        ValueError,
        r"a shift of shape \(4, 3\); it must broadcast to the statistics, \(3,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), REFUSALS.values(), ids=REFUSALS)
def test_what_does_not_fit_is_refused(call, error, match):
    with pytest.raises(error, match=f"normalize: .*{match}"):
        call(torch.randn(4, 3, 5))
