"""What only the row norms have, and what chooses between reference and kernels."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn
from zoo_cases import ROWS, assert_state, made, named, state_of, trained

import normzoo
from normzoo import functional
from normzoo.zoo import ZOO, find


def sizes(entry):
    """The argument that says what is normalized."""
    return next(iter(inspect.signature(entry.cls).parameters))


SHAPED = [p for p in ROWS if sizes(p.values[0]) == "normalized_shape"]


@pytest.mark.parametrize("entry", SHAPED)
def test_several_normalized_dimensions(entry):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    layer = entry.cls((4, 5), dtype=torch.float64)
    flat = entry.cls(20, dtype=torch.float64)
    expected = flat(x.flatten(1)).view_as(x)
    torch.testing.assert_close(layer(x), expected)
    with normzoo.backend("triton"):
        torch.testing.assert_close(layer.float()(x.float()), expected.float())


@pytest.mark.parametrize("entry", ROWS)
def test_long_rows_keep_their_digits(entry):
    x, layer = torch.randn(2, 100_000), made(replace(entry, arguments=(100_000,)), eps=1e-5)
    error = layer(x).double() - layer.double()(x.double())
    assert error.abs().max() < (4e-6 if entry.beside(x) else 2e-6)  # their scale reaches 2


ADDED = named(entry for entry in ZOO if entry.added)


@pytest.mark.parametrize("entry", ADDED)
def test_the_sum_comes_along(entry):
    x, r = entry.sample(dtype=torch.float64), entry.sample(dtype=torch.float64)
    y, total = entry.added(x, r, 16, eps=1e-5)
    assert torch.equal(total, x + r)
    torch.testing.assert_close(y, entry.function(x + r, 16, eps=1e-5))


BAD_SHAPES = [0, -3, (), (4, 0), 2.5, "16", True]


@pytest.mark.parametrize("shape", BAD_SHAPES, ids=repr)
@pytest.mark.parametrize("entry", ROWS)
def test_bad_shapes_are_refused(entry, shape):
    with pytest.raises(ValueError, match=f"{entry.cls.__name__}: {sizes(entry)} is .*positive int"):
        entry.cls(shape)


BAD_INPUTS = {
    "width": (
        lambda x: x[..., :7],
        ValueError,
        r"(normalized_shape is \(16,\)|dim is 16) but the input has shape \(4, 3, 7\)",
    ),
    "device": (lambda x: x.to("meta"), ValueError, "is on cpu but the input is on meta"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("entry", ROWS)
def test_bad_inputs_are_refused(entry, backend, spoil, error, match):
    layer = entry.cls(16, **({"elementwise_affine": True} if sizes(entry) == "normalized_shape" else {}))
    before, x = state_of(layer), entry.sample()
    with (
        normzoo.backend(backend),
        pytest.raises(error, match=f"({entry.name}|{entry.cls.__name__}): .*{match}"),
    ):
        layer(spoil(x), **entry.beside(x))
    assert_state(layer, before)


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


@pytest.mark.parametrize("x", [torch.full((2, 4), 1e-3), torch.full((64, 4096), 1e-3)])
def test_eps_counts(x):
    """Beside squares that are smaller, in rows of any number."""
    y = functional.rms_norm(x, x.shape[-1], eps=1e-5)
    torch.testing.assert_close(y, x / (1e-6 + 1e-5) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "norm", [lambda x, b: functional.layer_norm(x, 6, bias=b), lambda x, b: functional.group_norm(x, 2, bias=b)]
)
def test_a_bias_alone_may_be_wider(norm, dtype):
    """torch's operators on a CPU have no gradient for a float32 bias beside half precision without a weight."""
    x, b = torch.randn(2, 6, 6).to(dtype), torch.randn(6, requires_grad=True)
    y = norm(x, b)
    torch.testing.assert_close(y, norm(x.float(), b).to(dtype))
    (db,) = torch.autograd.grad(y.float().sum(), b)
    torch.testing.assert_close(db, torch.full((6,), 12.0))
