"""Calls of PowerNorm and UnifiedNorm: what is refused, padding, dtypes, derivatives in eval, and graphs."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
import torch._dynamo
from mean_square_oracle import Pair
from test_mean_square_state import FORMS, C, batch, per_form, per_kind
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import compiled, compiled_is_eager, same, tensors

import normzoo
from normzoo import PowerNorm, UnifiedNorm

# Calls that are refused, and padding.

FLAT, WIDE = (5, C), (2, C, 3)
REFUSED = {
    "uint8": (FLAT, torch.zeros(5).byte(), -1, TypeError, r"pad_mask is torch.uint8; .*pad_mask.bool\(\)"),
    "floats": (FLAT, torch.zeros(5), -1, TypeError, "pad_mask is torch.float32; it must be a tensor of bool"),
    "a list": (FLAT, [False] * 5, -1, TypeError, "pad_mask is a list; it must be a tensor of bool"),
    "transposed": ((2, 3, C), torch.zeros(3, 2).bool(), -1, ValueError, r"\(3, 2\) but the input .* \(2, 3\),"),
    "with channels": (FLAT, torch.zeros(5, C).bool(), -1, ValueError, r"it must be \(5,\), the input without"),
    "broadcasting": (FLAT, torch.zeros(1).bool(), -1, ValueError, r"pad_mask has shape \(1,\)"),
    "of the first": (WIDE, torch.zeros(2, C).bool(), 1, ValueError, r"it must be \(2, 3\), the input without"),
    "another device": (FLAT, torch.zeros(5, device="meta").bool(), -1, ValueError, "pad_mask is on meta but"),
    "channels": ((5, C + 1), None, -1, ValueError, r"num_features is 4 but .* \(5, 5\); its dimension -1 must"),
    "another dimension": (
        WIDE,
        None,
        -1,
        ValueError,
        r"num_features is 4 but .* \(2, 4, 3\); .* or channel_dim",
    ),
    "and another": (
        (2, 3, C),
        None,
        1,
        ValueError,
        r"num_features is 4 but .* \(2, 3, 4\); its dimension 1 must",
    ),
    "no samples": ((C,), None, -1, ValueError, r"shape \(4,\) and channel_dim is -1; it must have two"),
    "too few": ((5, C), None, 2, ValueError, r"shape \(5, 4\) and channel_dim is 2; it must have two"),
    "the first": ((C, 5), None, -2, ValueError, r"channel_dim is -2; it must have .* not be the first"),
}


@pytest.mark.parametrize(("shape", "mask", "channel_dim", "error", "match"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("training", [True, False])
@per_kind
def test_calls_that_are_refused(kind, training, shape, mask, channel_dim, error, match):
    layer = kind(C, channel_dim=channel_dim).train(training)
    before = tensors(layer)
    with pytest.raises(error, match=f"^{kind.__name__}: .*{match}"):
        layer(torch.randn(shape), mask)
    same(tensors(layer), before)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(5, C).long(), "the input is torch.int64; it must be of a real floating-point dtype"),
        (torch.ones(5, C).cfloat(), "the input is torch.complex64; it must be of a real"),
        (torch.ones(5, C).bool(), "the input is torch.bool; it must be of a real"),
        ([[1.0] * C], "the input is a list; it must be a torch.Tensor"),
    ],
)
@per_kind
def test_inputs_that_are_refused(kind, x, match):
    layer = kind(C)
    before = tensors(layer)
    with pytest.raises(TypeError, match=f"^{kind.__name__}: {match}"):
        layer(x)
    same(tensors(layer), before)


@per_form
def test_padding_for_layers_deep_in_a_model(kind, options):
    pad = torch.tensor([[False, True, True], [False, False, True]])
    plain = nn.Sequential(nn.Linear(C, C), kind(C, **options), nn.Tanh()).double()
    given, other = copy.deepcopy(plain), copy.deepcopy(plain)
    for _ in range(3):
        x = batch(2, 3, C)
        expected = plain[2](plain[1](plain[0](x), pad))
        with normzoo.inputs(given, pad_mask=pad):
            y = given(x)
        assert torch.equal(y, expected)
        with normzoo.inputs(other, pad_mask=~pad):  # an argument comes first
            y = other[2](other[1](other[0](x), pad))
        assert torch.equal(y, expected)
        for model in (plain, given, other):
            model[1](x)  # and after the block there is none
    same(tensors(given), tensors(plain))
    same(tensors(other), tensors(plain))
    x = batch(2, 3, C)
    with normzoo.inputs(given, pad_mask=pad):
        assert torch.equal(given.eval()(x), plain.eval()(x))
    with (
        normzoo.inputs(given.train(), pad_mask=pad.byte()),
        pytest.raises(TypeError, match=r"pad_mask is torch.uint8"),
    ):
        given(x)
    same(tensors(given), tensors(plain))


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize(("of_x", "of_layer"), [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]])
@per_kind
def test_any_dtype_of_the_layer_goes_with_any_of_the_input(kind, of_x, of_layer):
    layer, exact = kind(C).to(of_layer), kind(C).double()
    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6, torch.float64: 2e-6}
    how = {"rtol": 0, "atol": 4 * max(rounding[of_x], rounding[of_layer])}
    for _ in range(2):
        x = torch.randn(5, C).to(of_x).requires_grad_()
        theirs = x.detach().double().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if of_x == torch.float32 else contextlib.nullcontext():
            y = layer(x)
        y.sum().backward()
        expected = exact(theirs)
        expected.sum().backward()
        assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (of_x, of_x, of_layer)
        torch.testing.assert_close(y.double(), expected, **how)
        torch.testing.assert_close(x.grad.double(), theirs.grad, **how)
    x = torch.randn(5, C).to(of_x)
    y, expected = layer.eval()(x), exact.eval()(x.double())
    assert y.dtype == of_x
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=10 * how["atol"])


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "functional_call": lambda f, x: torch.func.vmap(lambda b: torch.func.functional_call(f, {"bias": b}, (x,)))(
        torch.ones(2, C).double()
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@per_kind
def test_transforms_are_for_eval(kind, transform):
    layer, x = Pair(kind, C).layer, batch()
    before = tensors(layer)
    with pytest.raises(
        RuntimeError, match=f"^{kind.__name__}: in training its backward pass is no derivative.*ev"
    ):
        transform(layer, x)
    same(tensors(layer), before)
    layer.eval()
    found = transform(layer, x)
    scale = layer.weight / (1 + layer.eps) ** 0.5
    if transform is TRANSFORMS["vmap"]:
        torch.testing.assert_close(found, layer(x).unsqueeze(0))
    elif transform is TRANSFORMS["functional_call"]:
        torch.testing.assert_close(found, (layer(x) - layer.bias + 1).expand(2, 5, C))
    elif kind is UnifiedNorm:
        torch.testing.assert_close(found, scale.expand_as(x))
    else:
        grad = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), x)
        along = grad.sum(0) if transform is TRANSFORMS["grad"] else grad.sum((1, 2)).view(x.shape)
        torch.testing.assert_close(found, along)


@per_form
def test_eval_has_its_true_derivatives(kind, options):
    pair = Pair(kind, C, **options)
    pair.train(batch())
    layer, x = pair.layer.eval(), batch(2, 3, C).requires_grad_()
    before = tensors(layer)
    call = lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))  # noqa: E731
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()  # no state moves, so that this is right
    same(tensors(layer), before)


# Under torch.compile.


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Padded(nn.Module):
    """Padding is where the first channel is large: at times all of it, at times none."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x, x[:, 0] > 1)


def test_compiled_is_eager_with_padding(fresh_graphs):
    layer = UnifiedNorm(C, channel_dim=1, **FORMS["unified, filter"][1])
    layer.iters += 997  # so that the compensation begins
    layer.buffer_x2 += torch.rand(C)
    xs = [torch.randn(3, C, 4) for _ in range(8)]
    xs[3][:, 0], xs[5][:, 0] = 2, 0
    compiled_is_eager(Padded(layer), xs)
    assert layer.iters == 997 + 7


def test_graphs_read_the_gradient_statistics_in_the_backward_pass(fresh_graphs):
    """Where one pass follows another before either backward pass, those have moved in between."""
    traced = UnifiedNorm(C, **FORMS["unified"][1])
    eager, call = copy.deepcopy(traced), compiled(traced)
    for _ in range(2):
        xs = torch.randn(2, 5, C)
        found = []
        for way in (call, eager):
            leaves = [x.clone().requires_grad_() for x in xs]
            for y in [way(x) for x in leaves]:
                y.pow(3).sum().backward()
            found.append([x.grad for x in leaves])
        torch.testing.assert_close(*found)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())


def test_a_graph_finds_padding(fresh_graphs):
    model = nn.Sequential(nn.Linear(C, C), PowerNorm(C, warmup_iters=1))
    eager, call = copy.deepcopy(model), compiled(model)
    for _ in range(2):
        x, pad = torch.randn(2, 3, C), torch.rand(2, 3) < 0.5
        with normzoo.inputs(model, pad_mask=pad):
            y = call(x)
        torch.testing.assert_close(y, eager[1](eager[0](x), pad))
    torch.testing.assert_close(model.state_dict(), eager.state_dict())
