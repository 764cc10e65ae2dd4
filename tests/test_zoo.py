"""What every layer promises, over ZOO."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normzoo
from normzoo import functional
from normzoo.zoo import ZOO, find

CASES = [
    pytest.param(entry, kwargs, id=f"{entry.name}-{'-'.join(map(str, kwargs)) or 'default'}")
    for entry in ZOO
    for kwargs in entry.variants
]
ENTRIES = [pytest.param(entry, id=entry.name) for entry in ZOO]
WITH_TORCH = [pytest.param(entry, id=entry.name) for entry in ZOO if entry.torch_class]


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


def trained(entry, kwargs, **where):
    """A layer whose parameters are not at their initial values."""
    layer = entry.make(**kwargs, **where)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return layer


@pytest.mark.parametrize("entry", WITH_TORCH)
def test_state_dict_goes_both_ways(entry):
    ours, theirs = trained(entry, {}), entry.torch_class(*entry.arguments)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    again = entry.make()
    again.load_state_dict(theirs.state_dict(), strict=True)
    x = entry.sample()
    assert torch.equal(ours(x), again(x))
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, entry.torch_class)


@pytest.mark.parametrize("entry", WITH_TORCH)
def test_torchs_repr_is_kept(entry):
    assert repr(entry.torch_class(*entry.arguments)).rstrip(")") in repr(entry.make())


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_repr_names_what_was_asked_for(entry, kwargs):
    text = repr(entry.make(**kwargs))
    assert text.startswith(entry.cls.__name__)
    assert all(f"{name}={value!r}" in text for name, value in kwargs.items()), text


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same(entry, kwargs, copied):
    layer, x = trained(entry, kwargs), entry.sample()
    assert torch.equal(copied(layer)(x), layer(x))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_meta_then_real(entry, kwargs):
    with torch.device("meta"):
        layer = entry.make(**kwargs)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    fresh, x = entry.make(**kwargs), entry.sample()
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_meta_input(entry, kwargs):
    y = entry.make(**kwargs, device="meta")(entry.sample(device="meta"))
    assert y.is_meta and y.shape == entry.sample().shape


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_device_and_dtype_arguments(entry, kwargs):
    layer = entry.make(**kwargs, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_derivatives(entry, kwargs):
    """First and second, with respect to the input and every parameter, against finite differences."""
    layer = trained(entry, kwargs, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [entry.sample(3, dtype=torch.float64), *layer.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("entry", ENTRIES)
def test_gradient_penalty(entry):
    layer, x = trained(entry, {}, dtype=torch.float64), entry.sample(3, dtype=torch.float64).requires_grad_()

    def penalty():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    (found,) = torch.autograd.grad(penalty(), x)
    direction = torch.randn_like(x)
    x.data += 1e-6 * direction
    up = penalty()
    x.data -= 2e-6 * direction
    down = penalty()
    torch.testing.assert_close((up - down) / 2e-6, (found * direction).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_function_transforms(entry, backend):
    """torch.func sees through the layer, also where kernels were asked for."""
    layer, x = trained(entry, {}), entry.sample(4, 3)
    tangent = torch.randn_like(x)
    _, slope = torch.autograd.functional.jvp(layer, x, tangent)

    def loss(x):
        return layer(x).square().sum()

    expected = torch.autograd.functional.jacobian(loss, x)
    with normzoo.backend(backend):
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), expected)
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], slope)
        with torch.autograd.forward_ad.dual_level():
            dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("entry", ENTRIES)
def test_vmap_over_the_weight_without_grad(entry):
    x, weights = entry.sample(3), torch.rand(2, 16)

    def call(weight):
        return entry.function(x, 16, weight)

    with torch.no_grad():
        stacked = torch.vmap(call)(weights)
    torch.testing.assert_close(stacked, torch.stack([call(w) for w in weights]))


@pytest.mark.parametrize("weight", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_dtypes(entry, kwargs, dtype, weight):
    """Any mixture works, gives the dtype of the input, and stays near float64."""
    layer = trained(entry, kwargs, dtype=weight)
    x = entry.sample(5, dtype=torch.float64).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == weight for p in layer.parameters())
    exact = copy.deepcopy(layer).double()(x.detach().double())
    steps = 2 if kwargs.get("cast") == "llama" else 1
    allowed = steps * torch.finfo(dtype).eps * exact.abs() + 4e-6
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_keeps_the_dtype_of_the_input(entry, dtype):
    layer, x = trained(entry, {}), entry.sample(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("entry", ENTRIES)
def test_several_normalized_dimensions(entry):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    layer = entry.cls((4, 5), dtype=torch.float64)
    flat = entry.cls(20, dtype=torch.float64)
    expected = flat(x.flatten(1)).view_as(x)
    torch.testing.assert_close(layer(x), expected)
    with normzoo.backend("triton"):
        torch.testing.assert_close(layer.float()(x.float()), expected.float())


@pytest.mark.parametrize("entry", ENTRIES)
def test_long_rows_keep_their_digits(entry):
    x = torch.randn(2, 100_000)
    ours, exact = (entry.function(t, 100_000, eps=1e-5) for t in (x, x.double()))
    assert (ours.double() - exact).abs().max() < 2e-6


ADDED = [pytest.param(entry, id=entry.name) for entry in ZOO if entry.added]


@pytest.mark.parametrize("entry", ADDED)
def test_the_sum_comes_along(entry):
    x, r = entry.sample(dtype=torch.float64), entry.sample(dtype=torch.float64)
    y, total = entry.added(x, r, 16, eps=1e-5)
    assert torch.equal(total, x + r)
    torch.testing.assert_close(y, entry.function(x + r, 16, eps=1e-5))


BAD_SHAPES = [0, -3, (), (4, 0), 2.5, "16", True]


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=repr)
@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_shapes_are_refused(entry, shape):
    with pytest.raises(ValueError, match=f"{entry.cls.__name__}: normalized_shape is .*positive int"):
        entry.cls(shape)


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan"), float("inf"), "1e-5"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_eps_is_refused(entry, eps):
    with pytest.raises(ValueError, match=f"{entry.cls.__name__}: eps is .*positive finite"):
        entry.cls(16, eps)
    with pytest.raises(ValueError, match=f"{entry.name}: eps is"):
        entry.function(entry.sample(), 16, eps=eps)


BAD_INPUTS = {
    "width": (
        lambda x: x[..., :7],
        ValueError,
        r"normalized_shape is \(16,\) but the input has shape \(4, 3, 7\)",
    ),
    "dimensions": (lambda x: x.sum(), ValueError, r"has shape \(\)"),
    "integers": (lambda x: x.int(), TypeError, "input is torch.int32"),
    "complex": (lambda x: x.cfloat(), TypeError, "input is torch.complex64"),
    "device": (lambda x: x.to("meta"), ValueError, "weight is on cpu but the input is on meta"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_inputs_are_refused(entry, backend, spoil, error, match):
    layer = entry.cls(16, elementwise_affine=True)
    before = copy.deepcopy(layer.state_dict())
    with normzoo.backend(backend), pytest.raises(error, match=f"{entry.name}: .*{match}"):
        layer(spoil(entry.sample()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


def test_bad_parameters_are_refused():
    x = torch.randn(2, 16)
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \(4,\); .*\(16,\)"):
        functional.layer_norm(x, 16, bias=torch.ones(4))
    with pytest.raises(TypeError, match=r"rms_norm: weight is torch.int64"):
        functional.rms_norm(x, 16, torch.ones(16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \(16,\)"):
        functional.add_rms_norm(x, x[0], 16)
    with pytest.raises(ValueError, match="cast is 'lama'; it must be one of torch, llama, gemma"):
        normzoo.RMSNorm(16, cast="lama")
    with pytest.raises(ValueError, match=r"offset is 1\.0 but there is no weight"):
        functional.rms_norm(x, 16, offset=1.0)
    with pytest.raises(ValueError, match=r"offset=1\.0 need elementwise_affine=True"):
        normzoo.RMSNorm(16, elementwise_affine=False, offset=1.0)
    with pytest.raises(TypeError, match="layer_norm: the input is a list; it must be"):
        functional.layer_norm([1.0, 2.0], 2)
    with pytest.raises(TypeError, match="rms_norm: weight is a list"):
        functional.rms_norm(x, 16, [1.0] * 16)
    with pytest.raises(TypeError, match="unexpected keyword"):
        normzoo.CRMSNorm(16, bias=True)


def test_casts_round_where_the_models_do():
    """Bit for bit the formulas of Llama and Gemma in bfloat16."""
    x, w = torch.randn(64, 48).bfloat16(), (torch.randn(48) / 8).bfloat16()
    h = x.float()
    unit = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    llama = functional.rms_norm(x, 48, w, 1e-6, cast="llama")
    gemma = functional.rms_norm(x, 48, w, 1e-6, offset=1.0, cast="gemma")
    assert (llama == w * unit.bfloat16()).float().mean() > 0.999
    assert (gemma == (unit * (1 + w.float())).bfloat16()).float().mean() > 0.999
    assert not torch.equal(llama, functional.rms_norm(x, 48, w, 1e-6))


def test_an_offset_starts_at_the_identity():
    x = torch.randn(5, 16)
    torch.testing.assert_close(normzoo.RMSNorm(16, offset=1.0)(x), normzoo.RMSNorm(16)(x))


def test_machine_eps_is_torchs():
    x = torch.full((1, 4), 1e-3).bfloat16()
    torch.testing.assert_close(normzoo.RMSNorm(4)(x), nn.RMSNorm(4, dtype=torch.bfloat16)(x))


def test_find():
    assert find("rms_norm") is find("RMSNorm")
    with pytest.raises(ValueError, match="no layer called 'norm'; there are layer_norm"):
        find("norm")


def test_backend_names_are_checked():
    with pytest.raises(ValueError, match="name is 'cuda'; it must be one of auto, reference, triton"):
        normzoo.backend("cuda")


def test_the_kernels_say_what_they_cannot_take():
    x = torch.ones(2, 4, dtype=torch.float64)
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match=r"input is torch\.float64; convert"):
        normzoo.LayerNorm(4)(x)


def test_the_kernels_say_where_they_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with (
        normzoo.backend("triton"),
        pytest.raises(RuntimeError, match="on cpu; move it to a GPU, or"),
    ):
        normzoo.LayerNorm(4)(torch.ones(2, 4))


def test_one_backend_may_be_entered_twice():
    again = normzoo.backend("reference")
    with again, again:
        pass
    with normzoo.backend("triton"):
        assert normzoo.dispatch.use_kernel(torch.ones(2))
    assert not normzoo.dispatch.use_kernel(torch.ones(2))
    assert normzoo.dispatch._state.names == ["auto"]


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cast", ["torch", "llama"])
def test_grad_mode_does_not_change_the_output(cast, weight):
    layer = trained(find("rms_norm"), {"cast": cast, "bias": True}, dtype=weight)
    x = torch.randn(64, 16).bfloat16()
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(layer(x), without)


def test_backends_nest():
    with normzoo.backend("triton"):
        with normzoo.backend("reference"):
            assert not normzoo.dispatch.use_kernel(torch.ones(2))
        assert normzoo.dispatch.use_kernel(torch.ones(2))
    assert not normzoo.dispatch.use_kernel(torch.ones(2))
