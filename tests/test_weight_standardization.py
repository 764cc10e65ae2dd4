"""Weight standardization: its denominators, the layers and baking."""

import copy
import inspect

import pytest
import torch
import torchvision_ops  # noqa: F401
from tolerance import assert_as_good
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from weight_layers import MADE, made

import normzoo
from normzoo.functional import weight_standardize
from normzoo.layers.weight_standardization import DENOMINATORS
from normzoo.layers.ws_conv import CARRIERS

each = pytest.mark.parametrize("cls", CARRIERS, ids=lambda cls: cls.__name__)


def official(units, variant, eps=None, gamma=1.0):
    """The formulas as their authors write them, over rows (out, n)."""
    n = units.shape[1]
    eps = DENOMINATORS[variant].eps if eps is None else eps
    centred = units - units.mean(1, keepdim=True)
    if variant == "ws":
        return centred / (centred.std(1, keepdim=True) + eps)
    if variant == "var":
        return centred / (centred.var(1, keepdim=True) + eps).sqrt()
    scale = gamma / n**0.5 if variant == "scaled" else 1.0
    return scale * centred / (centred.var(1, unbiased=False, keepdim=True) + eps).sqrt()


def units(weight, layer):
    """The weights of each output as a row, found by asking which weights the output depends on."""
    if not layer.transposed:
        return weight.flatten(1)
    per_group, width = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    blocks = weight.split(per_group, 0)
    return torch.stack([block[:, k].flatten() for block in blocks for k in range(width)])


@pytest.mark.parametrize("variant", DENOMINATORS)
def test_denominators(variant):
    """Everywhere as close to float64 as the official formula; also rows that one sum does not serve."""
    for shape in ((5, 3, 3, 3), (4, 3), (2, 20000)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            exact = torch.randn(shape, dtype=torch.float64).mul(0.02).add(0.01).to(dtype)
            dy = torch.linspace(-1, 1, exact.numel()).view(shape).to(dtype)
            found = {}
            for kind, dtypes, rule in (
                ("ours", dtype, weight_standardize),
                ("theirs", dtype, lambda w, v: official(w.flatten(1).float(), v).view(w.shape)),
                ("exact", torch.float64, lambda w, v: official(w.flatten(1), v).view(w.shape)),
            ):
                w = exact.to(dtypes, copy=True).requires_grad_()
                y = rule(w, variant).to(dtypes)
                y.backward(dy.to(dtypes))
                found[kind] = y.detach(), w.grad
            for name, ours, theirs, true in zip("y dw".split(), *found.values(), strict=True):
                few = shape == (4, 3)  # of their gradient little is left when mean and scale are gone
                assert_as_good(f"{variant} {shape} {dtype} {name}", ours, theirs, true, hard=few)


def test_denominators_differ():
    """By more than any tolerance here, on weights as small as those of a wide layer."""
    w = torch.randn(3, 9, dtype=torch.float64) * 3e-3
    results = [weight_standardize(w, variant) for variant in DENOMINATORS]
    for i, a in enumerate(results):
        assert all((a - b).abs().max() > 1e-3 * a.abs().max() for b in results[:i])
    mean, std = results[0].mean(1), results[0].std(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-15)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-2, atol=0)
    torch.testing.assert_close(
        weight_standardize(w, "scaled", gamma=1.7), 1.7 / 3 * weight_standardize(w, "timm")
    )


def test_derivatives():
    """Also those of all weights equal, where the standard deviation has a corner."""
    w = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(3, dtype=torch.float64, requires_grad=True)
    for variant in DENOMINATORS:
        given = {"gain": gain} if variant == "scaled" else {}
        leaves = (w, *given.values())

        def call(w, gain=None, variant=variant):
            return weight_standardize(w, variant, gain=gain)

        assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
        # Scaling and shifting the weight change nothing but through eps, so the gradient has no such part.
        (slope,) = torch.autograd.grad(call(w, *given.values()).pow(3).sum(), w)
        flat, rows = slope.flatten(1), (w - w.mean((1, 2), keepdim=True)).flatten(1)
        assert flat.sum(1).abs().max() < 1e-12 and (flat * rows).sum(1).abs().max() < 1e-3
        level = torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
        weight_standardize(level, variant).pow(2).add(level).sum().backward()
        assert level.grad.isfinite().all()


@each
@pytest.mark.parametrize("variant", ["ws", "scaled"])
def test_layers(cls, variant):
    """A layer is torch's with the standardized weight: values, gradients, and what it shows and keeps."""
    layer, x = made(cls, variant=variant, dtype=torch.float64)
    plain = layer.torch_class(*MADE[cls.__name__][0], dtype=torch.float64)
    assert isinstance(layer, layer.torch_class) and layer.state_dict().keys() - {"gain"} == {"weight", "bias"}
    plain.load_state_dict({k: t for k, t in layer.state_dict().items() if k != "gain"})
    rows = official(units(layer.weight, layer), variant)
    if variant == "scaled":
        rows = rows * layer.gain.view(-1, 1)
    torch.testing.assert_close(units(layer.standardized(), layer), rows, rtol=1e-13, atol=1e-13)
    found = torch.func.functional_call(plain, {"weight": layer.standardized(), "bias": layer.bias}, (x,))
    assert torch.equal(layer(x), found)
    assert repr(layer).startswith(repr(plain).replace(plain.__class__.__name__, cls.__name__)[:-1])
    assert f"variant={variant!r}, ws_eps={layer.ws_eps}" in repr(layer)
    wanted = torch.autograd.grad(found.pow(2).sum(), list(layer.parameters()))
    found = torch.autograd.grad(layer(x).pow(2).sum(), list(layer.parameters()))
    torch.testing.assert_close(found, wanted)
    baked = layer.bake()
    assert type(baked) is layer.torch_class and torch.equal(baked(x), layer(x))
    assert repr(baked) == repr(plain) and baked.bias is layer.bias and baked.weight.is_leaf
    assert baked.weight is not layer.weight and baked.training
    assert not layer.eval().bake().training


@each
def test_arguments_are_torchs(cls):
    """By position as there, and three more by name."""
    of_torch = inspect.signature(cls.torch_class).parameters
    own = list(inspect.signature(cls).parameters.values())
    assert [(p.name, p.default) for p in own[:-3]] == [(p.name, p.default) for p in of_torch.values()]
    assert [(p.name, p.default) for p in own[-3:]] == [("variant", "ws"), ("ws_eps", None), ("gamma", 1.0)]
    assert all(p.kind is p.KEYWORD_ONLY for p in own[-3:]) and "Raises:" in cls.__doc__
    layer = cls(*MADE[cls.__name__][0], bias=False, device="meta", dtype=torch.bfloat16, variant="scaled")
    assert layer.bias is None and all(p.is_meta and p.dtype is torch.bfloat16 for p in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    again = cls(*MADE[cls.__name__][0], bias=False, dtype=torch.bfloat16, variant="scaled")
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.gain, torch.ones_like(layer.gain))


def test_output_size_of_a_transposed_convolution():
    layer, x = made(normzoo.WSConvTranspose2d)
    assert layer(x, output_size=[9, 13]).shape[2:] == (9, 13) and layer(x, [10, 14]).shape[2:] == (10, 14)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, [20, 20])


def test_dtypes_and_autocast():
    """Float32 weights serve any input; autocast decides for itself, as at a plain convolution."""
    layer, x = made(normzoo.WSConv2d)
    for dtype in (torch.bfloat16, torch.float64):
        weight, bias = (t.to(dtype) for t in (layer.standardized(), layer.bias))
        wanted = torch.func.functional_call(layer.bake(), {"weight": weight, "bias": bias}, (x.to(dtype),))
        assert torch.equal(layer(x.to(dtype)), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.bake()(x)) and layer(x).dtype is torch.bfloat16


def test_memory_formats():
    """Weights with channels last are rows in memory too; their format is kept, values do not depend on it."""
    for shape, last in (((6, 4, 3, 5), torch.channels_last), ((6, 4, 3, 5, 2), torch.channels_last_3d)):
        w = torch.randn(shape).to(memory_format=last).requires_grad_()
        for variant in DENOMINATORS:
            y = weight_standardize(w, variant)
            (slope,) = torch.autograd.grad(y.pow(3).sum(), w)
            assert y.is_contiguous(memory_format=last) and slope.is_contiguous(memory_format=last)
            torch.testing.assert_close(y, weight_standardize(w.detach().contiguous(), variant))
    layer, x = made(normzoo.WSConv2d)
    plain = layer(x)
    torch.testing.assert_close(layer.to(memory_format=torch.channels_last)(x), plain)


def test_compiled():
    layer, x = made(normzoo.WSConv2d)
    dynamic = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(dynamic(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.weight.data.neg_()
        torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_timms_layers_load():
    """State dicts both ways, and the same numbers."""
    layers = pytest.importorskip("timm.layers")
    ScaledStdConv2d, StdConv2d = layers.ScaledStdConv2d, layers.StdConv2d
    for theirs, variant, options in (
        (StdConv2d(4, 6, 3, padding=1), "timm", {"bias": False}),
        (StdConv2d(4, 6, 3, groups=2, padding=0, eps=1e-3), "timm", {"bias": False, "ws_eps": 1e-3}),
        (ScaledStdConv2d(4, 6, 3, padding=0, gamma=1.7), "scaled", {"gamma": 1.7}),
    ):
        ours = normzoo.WSConv2d(
            4, 6, 3, padding=theirs.padding, groups=theirs.groups, variant=variant, **options
        )
        for p in theirs.parameters():
            nn.init.normal_(p)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_parametrization():
    """The same function under torch's key; taking it off bakes it."""
    for transposed, cls in ((False, nn.Conv2d), (True, nn.ConvTranspose2d)):
        layer = cls(4, 6, 3, groups=2)
        raw, x = copy.deepcopy(layer.weight), torch.randn(2, 4, 5, 5)
        groups = {"transposed": True, "groups": 2} if transposed else {}
        how = normzoo.WeightStandardization("scaled", outputs=6, gamma=1.3, **groups)
        nn.init.uniform_(how.gain)
        parametrize.register_parametrization(layer, "weight", how)
        assert torch.equal(layer.parametrizations.weight.original, raw)
        given = {"gain": how.gain, "gamma": 1.3, **groups}
        assert torch.equal(layer.weight, weight_standardize(raw, "scaled", **given))
        before = layer(x)
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(layer(x), before)


REFUSED = {
    "one weight an output": (
        lambda: normzoo.WSConv2d(4, 4, 1, groups=4),
        r"WSConv2d: .*\(4, 1, 1, 1\).* 0 / 0",
    ),
    "one weight, transposed": (lambda: normzoo.WSConvTranspose1d(1, 4, 1), "WSConvTranspose1d: .* 0 / 0"),
    "one column": (lambda: weight_standardize(torch.ones(3, 1)), "weight_standardize: .* 0 / 0"),
    "variant": (
        lambda: normzoo.WSLinear(2, 3, variant="std"),
        "variant is 'std'; .* ws, var, bit, timm, scaled",
    ),
    "eps": (lambda: normzoo.WSLinear(2, 3, ws_eps=0), "WSLinear: ws_eps is 0; it must be a positive"),
    "gamma": (lambda: normzoo.WSLinear(2, 3, gamma=2.0), "gamma is 2.0 but variant is 'ws'"),
    "gain": (lambda: weight_standardize(torch.ones(3, 2), gain=torch.ones(3)), "gain but variant is 'ws'"),
    "size of the gain": (
        lambda: weight_standardize(torch.ones(3, 2), "scaled", gain=torch.ones(2)),
        r"gain has shape \(2,\); for this input it must be \(3,\)",
    ),
    "outputs": (lambda: normzoo.WeightStandardization(outputs=3), "outputs is 3 but variant is 'ws'"),
    "groups": (lambda: weight_standardize(torch.ones(4, 2), groups=2), "groups is 2, but .* not transposed"),
    "groups that do not divide": (
        lambda: weight_standardize(torch.ones(5, 2), groups=2, transposed=True),
        r"groups is 2, which does not divide weight \(5, 2\)",
    ),
    "a vector": (lambda: weight_standardize(torch.ones(4)), r"has shape \(4,\); it must be \(out, in, \*\)"),
}


def test_refusals():
    with pytest.raises(TypeError, match=r"WSConv2d: there is no argument eps; .* ws_eps"):
        normzoo.WSConv2d(3, 4, 3, eps=1e-4)
    for name, (call, words) in REFUSED.items():
        with pytest.raises(ValueError, match=words):
            call()
            pytest.fail(name)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_wrapped_already_is_refused():
    wraps = (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    )
    for wrap in wraps:
        layer = wrap(normzoo.WSConv2d(4, 6, 3))
        with pytest.raises(ValueError, match=r"^WSConv2d: its weight is computed .* put it on torch's Conv2d"):
            layer(torch.randn(1, 4, 5, 5))
    hooked = nn.utils.spectral_norm(normzoo.WSConv2d(4, 6, 3))
    with pytest.raises(ValueError, match=r"^WSConv2d: its weight is computed"):
        hooked.bake()


class Padded(normzoo.WSConv2d):
    def forward(self, input):
        return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))


class Named(normzoo.WSConv2d, nn.Module):
    """With two bases, as of a mixin, and nothing of its own."""


def test_baking_refuses_what_it_would_lose():
    x = torch.randn(1, 4, 5, 5)
    assert type(Named(4, 6, 3).bake()) is nn.Conv2d
    doubled, pruned, computed = (normzoo.WSConv2d(4, 6, 3) for _ in range(3))
    own = doubled.forward
    doubled.forward = lambda x: 2 * own(x)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrize.register_parametrization(computed, "bias", nn.Softplus())
    for layer, words in (
        (Padded(4, 6, 3), "Padded: its forward is not that of WSConv2d"),
        (doubled, "WSConv2d: its forward is not that of WSConv2d"),
        (pruned, "WSConv2d: its weight is computed by a parametrization, pruning"),
        (computed, "WSConv2d: its bias is computed by a parametrization"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.bake()
    assert computed(x).shape == (1, 6, 3, 3)


def test_an_empty_batch_and_no_outputs():
    layer, x = made(normzoo.WSConv2d)
    y = layer(x[:0])
    assert y.shape[0] == 0
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
    assert weight_standardize(torch.empty(0, 3)).shape == (0, 3)
