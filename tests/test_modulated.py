"""Row norms with a scale and a shift that come with the input, in eager PyTorch."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good
from torch import nn
from training import compiled_is_eager

import normzoo
from normzoo import AdaptiveLayerNorm, AdaptiveRMSNorm, functional

# Importing torch's compiler warns about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

LAYERS = {
    AdaptiveLayerNorm: (functional.adaptive_layer_norm, lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps)),
    AdaptiveRMSNorm: (functional.adaptive_rms_norm, lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps)),
}
per_layer = pytest.mark.parametrize("cls", LAYERS)
OWNERS = ("ss", "tt", "st", "ts", "s-", "t-")


def beside(x, owners):
    sizes = {"s": (x.shape[0], x.shape[-1]), "t": x.shape}
    return [None if owner == "-" else torch.randn(sizes[owner], dtype=x.dtype) for owner in owners]


def by_hand(cls, x, scale, shift=None, eps=1e-5):
    """torch's norm, then (1 + scale) and shift of each sample or token."""
    between = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    scale, shift = (p if p is None or p.shape == x.shape else p.view(between) for p in (scale, shift))
    y = LAYERS[cls][1](x, eps) * (1 + scale)
    return y if shift is None else y + shift


@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 8), (2, 3, 4, 8), (3, 1, 8)], ids=str)
@pytest.mark.parametrize("owners", OWNERS)
@per_layer
def test_values_of_torchs_norm(cls, owners, shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    scale, shift = beside(x, owners)
    for eps in (1e-5, 0.3):
        expected = by_hand(cls, x, scale, shift, eps)
        torch.testing.assert_close(cls(8, eps)(x, scale, shift), expected)
        torch.testing.assert_close(LAYERS[cls][0](x, scale, shift, eps), expected)


@per_layer
def test_parameters_of_samples_may_have_ones_between(cls):
    x = torch.randn(2, 3, 4, 8)
    scale, shift = beside(x, "ss")
    for backend in ("auto", "triton"):
        with normzoo.backend(backend):
            expected = cls(8)(x, scale, shift)
            assert torch.equal(cls(8)(x, scale.view(2, 1, 1, 8), shift.view(2, 1, 1, 8)), expected)
            assert torch.equal(cls(8)(x, scale.view(2, 1, 1, 8), shift), expected)


@per_layer
def test_samples_know_nothing_of_each_other(cls):
    x = torch.randn(3, 4, 8)
    scale, shift = beside(x, "ss")
    y = cls(8)(x, scale, shift)
    for i in range(3):
        torch.testing.assert_close(cls(8)(x[i : i + 1], scale[i : i + 1], shift[i : i + 1]), y[i : i + 1])


@pytest.mark.parametrize("owners", OWNERS)
@per_layer
def test_derivatives(cls, owners):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, *beside(x, owners)) if t is not None]
    assert torch.autograd.gradcheck(cls(4), tensors)
    assert torch.autograd.gradgradcheck(cls(4), tensors)


class Block(nn.Module):
    """Half of the entries of x are the condition: scale and shift of samples, then of tokens."""

    def __init__(self, cls):
        super().__init__()
        self.norm = cls(6)
        self.condition = nn.Linear(6, 12)

    def forward(self, x):
        x, condition = x.chunk(2, dim=-1)
        shift, scale = self.condition(F.silu(condition.mean(1))).chunk(2, dim=-1)
        x = x + self.norm(x, scale, shift)
        shift, scale = self.condition(F.silu(condition)).chunk(2, dim=-1)
        return self.norm(x, scale, shift).tanh()  # or training by its third power diverges


@pytest.mark.parametrize(
    ("cls", "backend"), [(normzoo.AdaptiveLayerNorm, "auto"), (normzoo.AdaptiveRMSNorm, "triton")]
)
def test_compiled_training(cls, backend):
    torch._dynamo.reset()
    xs = [torch.randn(3, 2, 12) for _ in range(5)]
    with normzoo.backend(backend):
        compiled_is_eager(Block(cls), xs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("of_parameters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@per_layer
def test_parameters_of_another_dtype(cls, dtype, of_parameters):
    """One rounding, at the end."""
    x = (torch.randn(3, 4, 64) * 2 + 1).to(dtype)
    scale, shift = (p.to(of_parameters) for p in beside(x.float(), "st"))
    y = cls(64)(x, scale, shift)
    exact = by_hand(cls, x.double(), scale.double(), shift.double())
    assert y.dtype == dtype
    assert_as_good("y", y, exact.to(dtype), exact)
    if of_parameters != torch.float64:
        assert torch.equal(y, cls(64)(x.float(), scale.float(), shift.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@per_layer
def test_autocast(cls, dtype):
    x = torch.randn(3, 4, 8).to(dtype)
    scale, shift = beside(x.float(), "ss")
    expected = cls(8)(x, scale, shift)
    for backend in ("auto", "triton"):
        with torch.autocast("cpu", torch.bfloat16), normzoo.backend(backend):
            found = cls(8)(x, scale, shift)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)], ids=str)
@per_layer
def test_no_rows(cls, shape):
    x = torch.empty(shape, requires_grad=True)
    scale, shift = (p.requires_grad_() for p in beside(x, "ss"))
    y = cls(8)(x, scale, shift)
    y.sum().backward()
    assert y.shape == shape
    for leaf in (x, scale, shift):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@per_layer
def test_nothing_is_kept(cls):
    layer = cls(8, 0.1)
    assert not list(layer.parameters()) + list(layer.buffers())
    assert not layer.state_dict()
    assert repr(layer) == f"{cls.__name__}(8, eps=0.1)"
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = layer(x, *beside(x, "ss"))
    copied = copy.deepcopy(layer)
    assert (copied.dim, copied.eps) == (8, 0.1)
    assert y.requires_grad


def spoiled(name, value):
    x = torch.randn(3, 4, 8)
    return {"x": x, "scale": torch.zeros(3, 8), "shift": torch.zeros(3, 8)} | {name: value}


REFUSED = {
    "no tensor": ("x", [1.0], TypeError, "the input is a list; it must be a torch.Tensor"),
    "one dimension": ("x", torch.ones(8), ValueError, "the input has shape (8,); it must be (B, *, d)"),
    "integers": ("x", torch.ones(3, 4, 8, dtype=torch.int64), TypeError, "the input is torch.int64"),
    "scale no tensor": ("scale", 1.0, TypeError, "scale is a float; it must be a torch.Tensor"),
    "shift no tensor": ("shift", 1.0, TypeError, "shift is a float; it must be a torch.Tensor"),
    "scale of one sample": (
        "scale", torch.ones(1, 8), ValueError,
        "scale has shape (1, 8); for an input of shape (3, 4, 8) it must be (3, 8), one a sample, or (3, 4, 8)"
        ", one a token; (3, 1, 8) will do too; else expand it",
    ),
    "shift that broadcasts": ("shift", torch.ones(3, 4, 1), ValueError, "shift has shape (3, 4, 1)"),
    "scale of the layer": ("scale", torch.ones(8), ValueError, "scale has shape (8,)"),
    "integer scale": ("scale", torch.ones(3, 8, dtype=torch.int32), TypeError, "scale is torch.int32"),
    "complex shift": ("shift", torch.ones(3, 8, dtype=torch.cfloat), TypeError, "shift is torch.complex64"),
    "scale elsewhere": (
        "scale", torch.ones(3, 8, device="meta"), ValueError, "scale is on meta but the input is on cpu",
    ),
    "shift elsewhere": ("shift", torch.ones(3, 8, device="meta"), ValueError, "shift is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED.values(), ids=REFUSED)
@per_layer
def test_refused_calls(cls, backend, name, value, error, message):
    for called, says in ((cls(8), cls.__name__), (LAYERS[cls][0], LAYERS[cls][0].__name__)):
        with normzoo.backend(backend), pytest.raises(error, match=re.escape(f"{says}: {message}")):
            called(**spoiled(name, value))


@per_layer
def test_another_width_is_refused(cls):
    x = torch.randn(3, 4, 6)
    message = "dim is 8 but the input has shape (3, 4, 6); its last dimension must match"
    with pytest.raises(ValueError, match=re.escape(f"{cls.__name__}: {message}")):
        cls(8)(x, *beside(x, "ss"))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((3, 8), "(3, 8), one a sample; else expand it"),
        ((3, 1, 8), "(3, 8), one a sample, or (3, 1, 8), one a token; else expand it"),
        (
            (3, 4, 2, 8),
            "(3, 8), one a sample, or (3, 4, 2, 8), one a token; (3, 1, 1, 8) will do too; else expand it",
        ),
    ],
    ids=str,
)
@per_layer
def test_a_refusal_says_what_will_do(cls, shape, wanted):
    x, said = torch.randn(shape), re.escape(f"for an input of shape {shape} it must be {wanted}") + "$"
    with pytest.raises(ValueError, match=said):
        cls(8)(x, torch.zeros(3, 4, 1, 8))


@pytest.mark.parametrize("dim", [0, -1, 2.0, "8", True], ids=repr)
@per_layer
def test_refused_widths(cls, dim):
    with pytest.raises(ValueError, match=f"{cls.__name__}: dim is .*positive int"):
        cls(dim)


@pytest.mark.parametrize("eps", [0, -1e-5, float("inf"), float("nan"), "1"], ids=repr)
@per_layer
def test_refused_eps(cls, eps):
    with pytest.raises(ValueError, match=f"{cls.__name__}: eps is .*positive finite"):
        cls(8, eps)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=f"{LAYERS[cls][0].__name__}: eps is .*positive finite"):
        LAYERS[cls][0](x, x, x, eps)


@per_layer
def test_a_narrow_scale_keeps_the_digits_of_a_wide_input(cls):
    x, scale = torch.randn(3, 4, 8).double(), torch.randn(3, 8)
    torch.testing.assert_close(cls(8)(x, scale), cls(8)(x, scale.double()), rtol=0, atol=0)
