"""Row norms whose weight and bias glide with the time of each sample."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good
from torch import nn
from training import compiled_is_eager

import normzoo
from normzoo import TimeDependentLayerNorm, TimeDependentRMSNorm, functional
from normzoo.side_inputs import MissingInput

# Importing torch's compiler warns about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

LAYERS = {
    "layer": lambda dim=4, **how: TimeDependentLayerNorm(dim, **how),
    "rms": lambda dim=4, **how: TimeDependentRMSNorm(dim, **how),
    "rms, bias": lambda dim=4, **how: TimeDependentRMSNorm(dim, bias=True, **how),
    "rms, partial": lambda dim=4, **how: TimeDependentRMSNorm(dim, partial=0.6, bias=True, **how),
}
per_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
PARTS = ("param0", "param1", "nodecay_weight", "nodecay_bias")
"""The names of the authors' code."""


def trained(make, dim=4, **how):
    """A layer none of whose parameters is at its start."""
    layer = make(dim, **how)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 2)
    return layer


def value(state, name, t):
    """(B, d) from the formula of the paper, with the gate of the code."""
    first, second, w, b = (state[f"{name}.{part}"].double() for part in PARTS)
    s = 1 / (1 + torch.exp(-((1 + w) * t.double()[:, None] + b)))
    return s * first + (1 - s) * second


def by_hand(layer, x, t):
    """In float64, from the state dict alone."""
    state, x = layer.state_dict(), x.double()
    between = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    if isinstance(layer, TimeDependentLayerNorm):
        h = F.layer_norm(x, x.shape[-1:], eps=layer.eps)
        return h * value(state, "weight", t).view(between) + value(state, "bias", t).view(between)
    head = x if layer.partial is None else x[..., : int(layer.partial * x.shape[-1])]
    y = x / (head.square().mean(-1, keepdim=True).sqrt() + layer.eps) * value(state, "scale", t).view(between)
    return y + value(state, "offset", t).view(between) if "offset.param0" in state else y


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4)], ids=str)
@per_layer
def test_values(make, shape):
    for eps in (1e-5, 0.3):
        layer = trained(make, eps=eps, dtype=torch.float64)
        x, t = torch.randn(shape, dtype=torch.float64) * 2 + 1, torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(layer(x, t), by_hand(layer, x, t))


@per_layer
def test_fresh_layers_are_the_plain_norm(make):
    layer, x = make(), torch.randn(3, 5, 4)
    expected = by_hand(layer, x, torch.zeros(3)).float()
    torch.testing.assert_close(layer(x, torch.randn(3)), expected)
    if make is LAYERS["layer"]:
        torch.testing.assert_close(expected, F.layer_norm(x, (4,)))


def test_functions():
    x, t = torch.randn(3, 5, 4), torch.randn(3)
    layer = trained(LAYERS["layer"])
    y = functional.time_dependent_layer_norm(x, t, layer.weight, list(layer.bias), layer.eps)
    assert torch.equal(y, layer(x, t))
    y = functional.time_dependent_layer_norm(x, t, layer.weight)
    layer.bias.reset_parameters()
    torch.testing.assert_close(y, layer(x, t))
    layer = trained(LAYERS["rms, partial"])
    y = functional.time_dependent_rms_norm(x, t, tuple(layer.scale), layer.offset, layer.eps, 0.6)
    assert torch.equal(y, layer(x, t))


@pytest.mark.parametrize(("partial", "part"), [(None, 10), (1.0, 10), (1, 10), (0.59, 5), (0.1, 1)])
def test_partial_is_rounded_down(partial, part):
    layer = TimeDependentRMSNorm(10, partial=partial)
    x = torch.randn(2, 3, 10)
    expected = x / (x[..., :part].square().mean(-1, keepdim=True).sqrt() + 1e-8)
    for backend in ("auto", "triton"):
        with normzoo.backend(backend):
            torch.testing.assert_close(layer(x, torch.zeros(2)), expected)


@per_layer
def test_kernels_reach_every_form(make):
    layer, x, t = trained(make), torch.randn(3, 5, 4), torch.randn(3)
    found = []
    for backend in ("triton", "reference"):
        layer.zero_grad()
        leaf, time = x.clone().requires_grad_(), t.clone().requires_grad_()
        with normzoo.backend(backend):
            y = layer(leaf, time)
            y.sin().sum().backward()
        found.append([y, leaf.grad, time.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@per_layer
def test_times_of_any_shape_and_dtype(make):
    layer, x, t = trained(make), torch.randn(3, 2, 5, 4), torch.tensor([-2.0, 0.0, 3.0])
    expected = layer(x, t)
    for other in (t.view(3, 1), t.view(3, 1, 1), t.view(3, 1, 1, 1), t.int(), t.long(), t.half(), t.double()):
        assert torch.equal(layer(x, other), expected)
    torch.testing.assert_close(layer(x.double(), t), expected.double(), rtol=1e-5, atol=1e-5)


@per_layer
def test_derivatives(make):
    """By x, t and every parameter, in a state that training may reach."""
    layer = trained(make, 3, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x, t = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    tensors = [p.detach().clone().requires_grad_() for p in (x, t, *layer.parameters())]

    def call(x, t, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, t))

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(call, tensors)


@per_layer
def test_rows_of_zeros(make):
    """x / eps where there is nothing to divide by, and derivatives of that alone."""
    layer = trained(make, 3, eps=0.5, dtype=torch.float64)
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, dtype=torch.float64)
    y = layer(x, t)
    torch.testing.assert_close(y, by_hand(layer, x, t))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    if isinstance(layer, TimeDependentRMSNorm):
        torch.testing.assert_close(dx, value(layer.state_dict(), "scale", t) / 0.5)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert torch.isfinite(second).all()


@per_layer
def test_gates_learn_after_the_first_step(make):
    layer, x, t = make(), torch.randn(3, 5, 4), torch.randn(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for learns in (False, True):
        optimizer.zero_grad()
        (layer(x, t).sin() * torch.linspace(-1, 1, 5)[:, None]).sum().backward()
        for name, p in layer.named_parameters():
            gate = "nodecay" in name
            assert (p.grad.abs().max() > 1e-6) == (learns or not gate), name
        optimizer.step()


class Timed(nn.Module):
    """A layer that finds the time among its inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.linear(x), x.mean(dim=(1, 2))).tanh()  # or training by its third power diverges


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("make", [LAYERS["layer"], LAYERS["rms, partial"]], ids=["layer", "rms, partial"])
def test_compiled_training(make, backend):
    torch._dynamo.reset()
    with normzoo.backend(backend):
        compiled_is_eager(Timed(trained(make)), [torch.randn(3, 2, 4) for _ in range(5)])


def test_a_block_gives_the_time_to_compiled_models():
    torch._dynamo.reset()
    model, x, t = net(), torch.randn(3, 5, 4), torch.randn(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with normzoo.inputs(model, t=t):
        torch.testing.assert_close(compiled(x), model(x))


def net():
    inner = nn.Sequential(nn.Linear(4, 4), trained(LAYERS["rms, bias"]))
    return nn.Sequential(trained(LAYERS["layer"]), inner, nn.SiLU(), trained(LAYERS["rms, partial"]))


def through(model, x, t):
    for module in (model[0], model[1][0], model[1][1], model[2], model[3]):
        x = module(x, t) if hasattr(module, "side_inputs") else module(x)
    return x


def test_a_block_gives_the_time_to_all_layers():
    model, x, t = net(), torch.randn(3, 5, 4), torch.randn(3)
    with normzoo.inputs(model, t=t):
        y = model(x)
    assert torch.equal(y, through(model, x, t))
    assert not torch.equal(y, through(model, x, t + 1))


@per_layer
def test_an_argument_goes_before_the_block(make):
    layer, x, t = trained(make), torch.randn(3, 5, 4), torch.randn(3)
    with normzoo.inputs(layer, t=t + 1):
        assert torch.equal(layer(x, t), layer(x, t=t))
        assert not torch.equal(layer(x), layer(x, t))
        assert torch.equal(layer(x), layer(x, t + 1))


@per_layer
def test_no_time_is_an_error(make):
    layer, x = make(), torch.randn(3, 5, 4)
    message = f"{type(layer).__name__}: there is no t; pass it to forward, or call the model inside"
    for _ in range(2):  # before a block and after
        with pytest.raises(MissingInput, match=message):
            layer(x)
        with normzoo.inputs(layer, t=torch.zeros(3)):
            layer(x)


def test_steps_with_times_and_batches_of_their_own():
    """Nothing stays in the model: another batch size, a second backward pass, a copy after a forward pass."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in (3, 5, 1, 3):
        x, t = torch.randn(batch, 5, 4), torch.randn(batch, requires_grad=True)
        optimizer.zero_grad()
        with normzoo.inputs(model, t=t):
            model(x).square().sum().backward()
            copied = copy.deepcopy(model)
        optimizer.step()
        assert t.grad.abs().min() > 0
        with pytest.raises(MissingInput):
            copied(x)
    assert not torch.equal(through(copied, x, t), through(model, x, t))  # a copy of before the step


NAMES = {
    "layer": ("weight", "bias"),
    "rms": ("scale",),
    "rms, bias": ("scale", "offset"),
    "rms, partial": ("scale", "offset"),
}


@pytest.mark.parametrize("which", LAYERS)
def test_the_authors_names_load(which):
    state = {f"{name}.{part}": torch.randn(4) for name in NAMES[which] for part in PARTS}
    layer = LAYERS[which]()
    assert [*layer.state_dict()] == [*state]
    assert [name for name, _ in layer.named_parameters()] == [*state]
    layer.load_state_dict(state, strict=True)
    for key, t in layer.state_dict().items():
        assert torch.equal(t, state[key])


@pytest.mark.parametrize("which", LAYERS)
def test_start_and_reset(which):
    layer = LAYERS[which](dtype=torch.float64)
    fresh = {key: t.clone() for key, t in layer.state_dict().items()}
    for key, t in fresh.items():
        one = key.startswith(("weight", "scale")) and "param" in key
        assert t.dtype == torch.float64
        assert torch.equal(t, torch.full_like(t, one)), key
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1)
    layer.reset_parameters()
    for key, t in layer.state_dict().items():
        assert torch.equal(t, fresh[key])


def test_repr():
    assert "TimeDependentLayerNorm(\n  8, eps=0.1" in repr(TimeDependentLayerNorm(8, 0.1))
    text = repr(TimeDependentRMSNorm(8, 0.1, 0.5, True))
    assert "8, eps=0.1, partial=0.5, bias=True" in text
    assert "(scale): TimeDependent(8)" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@per_layer
def test_float32_parameters_with_any_input(make, dtype):
    layer = trained(make, 64)
    x, t = (torch.randn(3, 5, 64) * 2 + 1).to(dtype), torch.randn(3)
    exact = by_hand(layer, x, t)
    y = layer(x, t)
    assert y.dtype == dtype
    assert_as_good("y", y, exact.to(dtype), exact)
    assert torch.equal(y, layer(x.float(), t).to(dtype))  # rounded once, at the end
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, t), y)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_half_precision_parameters_are_computed_in_float32():
    layer = trained(LAYERS["layer"], 64, dtype=torch.bfloat16)
    x, t = torch.randn(3, 5, 64).bfloat16(), torch.randn(3).bfloat16()
    exact = by_hand(layer, x, t)
    assert_as_good("y", layer(x, t), exact.bfloat16(), exact)
    assert torch.equal(layer(x, t), layer.float()(x.float(), t).bfloat16())


X = torch.zeros(3, 5, 4)
TIMES = {
    "no tensor": (0.5, TypeError, "t is a float; it must be a torch.Tensor of shape (3,)"),
    "scalar": (torch.tensor(0.5), ValueError, "t is torch.float32 of shape ()"),
    "another batch": (torch.zeros(2), ValueError, "t is torch.float32 of shape (2,); for an input of shape"),
    "of tokens": (torch.zeros(3, 5), ValueError, "must be real and (3,), the time of every sample"),
    "complex": (torch.zeros(3, dtype=torch.cfloat), ValueError, "t is torch.complex64 of shape (3,)"),
    "elsewhere": (torch.zeros(3, device="meta"), ValueError, "t is on meta but the input is on cpu"),
}


@pytest.mark.parametrize(("t", "error", "message"), TIMES.values(), ids=TIMES)
@per_layer
def test_refused_times(make, t, error, message):
    layer = make()
    with pytest.raises(error, match=re.escape(f"{type(layer).__name__}: ") + ".*" + re.escape(message)):
        layer(X, t)


INPUTS = {
    "no tensor": ([1.0], TypeError, "the input is a list"),
    "one dimension": (torch.zeros(4), ValueError, r"the input has shape \(4,\); it must be \(B, \*, d\)"),
    "another width": (torch.zeros(3, 5), ValueError, r"dim is 4 but the input has shape \(3, 5\)"),
    "integers": (X.int(), TypeError, "the input is torch.int32"),
    "elsewhere": (X.to("meta"), ValueError, "is on cpu but the input is on meta"),
}


@pytest.mark.parametrize(("x", "error", "message"), INPUTS.values(), ids=INPUTS)
@per_layer
def test_refused_inputs(make, x, error, message):
    layer = make()
    with pytest.raises(error, match=f"{type(layer).__name__}: .*{message}"):
        layer(x, torch.zeros(3))


PARAMETERS = {
    "three": ([torch.ones(4)] * 3, ValueError, "has 3 tensors; it must have four tensors: param0, param1"),
    "none": (None, ValueError, "is a NoneType; it must have four tensors"),
    "a number among them": ([torch.ones(4)] * 3 + [1.0], TypeError, "[3] is a float"),
    "a shorter one": ([torch.ones(4), torch.ones(3)] * 2, ValueError, "[1] has shape (3,); for an input of"),
    "integers": ([torch.ones(4).int()] * 4, TypeError, "[0] is torch.int32"),
    "elsewhere": ([torch.ones(4, device="meta")] * 4, ValueError, "[0] is on meta but the input is on cpu"),
}


@pytest.mark.parametrize(("four", "error", "message"), PARAMETERS.values(), ids=PARAMETERS)
def test_refused_parameters(four, error, message):
    fine, t = [torch.ones(4)] * 4, torch.zeros(3)
    separator = " " if message[0] != "[" else ""
    for function, names in (
        (functional.time_dependent_layer_norm, ("weight", "bias")),
        (functional.time_dependent_rms_norm, ("scale", "offset")),
    ):
        for place, name in enumerate(names):
            if four is None and place:
                continue  # a bias may be left out
            match = re.escape(f"{function.__name__}: {name}{separator}{message}")
            with pytest.raises(error, match=match):
                function(X, t, *((four, fine) if place == 0 else (fine, four)))


@pytest.mark.parametrize("cls", [TimeDependentLayerNorm, TimeDependentRMSNorm])
def test_refused_arguments(cls):
    name = cls.__name__
    for dim in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"{name}: dim is {dim}; it must be a positive int"):
            cls(dim)
    for eps in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{name}: eps is {eps}; it must be a positive finite"):
            cls(4, eps)


def test_refused_shares():
    for partial in (-0.1, 1.5, "half", True):
        with pytest.raises(ValueError, match=r"TimeDependentRMSNorm: partial is .*number from 0 to 1"):
            TimeDependentRMSNorm(4, partial=partial)
    with pytest.raises(ValueError, match=r"partial is 0\.2, which of 4 entries is none; it must reach one"):
        TimeDependentRMSNorm(4, partial=0.2)
    with pytest.raises(ValueError, match=r"time_dependent_rms_norm: partial is 0\.2, which of 4"):
        functional.time_dependent_rms_norm(X, torch.zeros(3), [torch.ones(4)] * 4, partial=0.2)
    with pytest.raises(TypeError, match="TimeDependentRMSNorm: bias is 1; it must be True or False"):
        TimeDependentRMSNorm(4, bias=1)
