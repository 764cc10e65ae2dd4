"""RegionNormB against the two regions written out, and what it does with masks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from region_oracle import AFFINE, called, gradients, oracle_of, randomized
from tolerance import assert_as_good
from torch import Tensor, nn
from training import close, compiled, train

import normzoo
from normzoo import RegionNormB
from normzoo.functional import region_norm_b
from normzoo.side_inputs import MissingInput

C = 3
SHAPES = {
    "tokens": (7, C),
    "sequences": (4, C, 6),
    "images": (3, C, 5, 4),
    "one image": (1, C, 5, 4),
    "volumes": (2, C, 2, 3, 4),
}
FORMS = {
    "batch": {},
    "per instance": {"per_instance": True},
    "separate": {"separate_beta": True},
    "per instance, separate": {"per_instance": True, "separate_beta": True, "eps": 0.1},
}
per_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
per_backend = pytest.mark.parametrize("backend", ["auto", "triton"])


def layer_of(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    return randomized(RegionNormB(C, **options, dtype=dtype))


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)


def hole_for(x: Tensor) -> Tensor:
    return torch.rand(x.shape[0], *x.shape[2:]) < 0.4


def held(layer: nn.Module, x: Tensor, hole: Tensor, dy: Tensor | None = None, mask: Tensor | None = None):
    """Values and all gradients of a layer in float64 are those of the oracle, which sees the `hole`."""
    dy, leaves = sample(*x.shape) if dy is None else dy, [x, *layer.parameters()]
    found = gradients(called(layer, hole if mask is None else mask), leaves, dy)
    torch.testing.assert_close(found, gradients(lambda x, *p: oracle_of(layer)(x, hole, *p), leaves, dy))
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@per_form
def test_values_and_gradients(form, shape):
    if len(shape) == 2 and form.get("per_instance"):
        return  # one value a channel
    x = sample(*shape)
    held(layer_of(**form), x, hole_for(x))


def as_good(layer: nn.Module, x: Tensor, hole: Tensor, *, hard: bool = False) -> dict[str, Tensor]:
    """The kernels against float64, beside the eager engine."""
    dy, leaves, call = torch.randn(x.shape).to(x.dtype), [x, *layer.parameters()], called(layer, hole)
    found = []
    for backend in ("triton", "reference"):
        with normzoo.backend(backend):
            found.append(gradients(call, leaves, dy))
    doubles = [t.detach().double() for t in leaves]
    exact = gradients(lambda x, *p: oracle_of(layer)(x, hole, *p), doubles, dy.double())
    for name in exact:
        assert_as_good(name, found[0][name], found[1][name], exact[name], hard=hard)
    return found[0]


@per_form
def test_kernels(form):
    from normzoo_kernels import _launch

    for dtype, last in ((torch.float32, False), (torch.bfloat16, True)):
        x = sample(3, C, 5, 4, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        before = _launch.launches.total()
        found = as_good(layer_of(torch.float32, **form), x, hole_for(x))
        assert _launch.launches.total() - before >= 4, "no kernel ran"
        for t in (found["y"], found["gradient 0"]):
            assert t.dtype == dtype and t.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_dtypes_and_memory_formats(dtype, last):
    x, layer = sample(3, C, 5, 4, dtype=dtype), layer_of(torch.float32)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    hole, double = hole_for(x), copy.deepcopy(layer).double()
    y = layer(x.requires_grad_(), hole)
    (dx,) = torch.autograd.grad(y, x, torch.ones(x.shape, dtype=dtype))
    for t in (y, dx):
        assert t.dtype == dtype and t.stride() == x.stride()
    exact = double(x.double(), hole)
    assert (y - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() + 4e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x, hole), y)


# Masks


KINDS = {
    "bool": lambda hole: hole,
    "float": lambda hole: hole.float(),
    "bfloat16": lambda hole: hole.bfloat16(),
    "uint8": lambda hole: hole.to(torch.uint8),
    "int64": lambda hole: hole.long(),
    "without a channel": lambda hole: hole.squeeze(1),
    "transposed": lambda hole: hole.transpose(2, 3).contiguous().transpose(2, 3),
    "with a gradient": lambda hole: hole.double().requires_grad_(),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_of_masks(kind):
    x, layer = sample(3, C, 5, 4), layer_of()
    hole = hole_for(x).unsqueeze(1)
    mask = kind(hole)
    held(layer, x, hole.squeeze(1), mask=mask)
    layer(x, mask).sum().backward()
    assert mask.grad is None


@pytest.mark.parametrize("dims", [3, 4], ids=["(1, *)", "(1, 1, *)"])
@per_form
def test_one_mask_for_all_samples(dims, form):
    """It counts once for every sample."""
    x, layer = sample(3, C, 5, 4), layer_of(**form)
    one = hole_for(x[:1]) if dims == 3 else hole_for(x[:1]).unsqueeze(1)
    held(layer, x, one.reshape(1, 5, 4).expand(3, 5, 4), mask=one)


SIZES = {
    "halved": ((10, 8), (5, 4)),
    "odd": ((13, 7), (5, 4)),
    "wider": ((3, 2), (7, 5)),
    "sequences": ((11,), (4,)),
    "volumes": ((4, 6, 3), (2, 3, 2)),
}


@pytest.mark.parametrize(("size", "wanted"), SIZES.values(), ids=SIZES)
def test_nearest_is_that_of_the_official_code(size, wanted):
    x, layer = sample(3, C, *wanted), layer_of()
    mask = (torch.rand(3, 1, *size) < 0.4).float()
    hole = F.interpolate(mask, wanted, mode="nearest").squeeze(1) == 1
    assert 0 < hole.sum() < hole.numel()
    held(layer, x, hole, mask=mask)
    assert torch.equal(layer(x, mask), layer(x, mask.squeeze(1).bool()))


@pytest.mark.parametrize(("size", "wanted"), SIZES.values(), ids=SIZES)
def test_max_keeps_every_hole(size, wanted):
    """A pixel is in the hole where anything that it covers is."""
    x, layer = sample(3, C, *wanted), layer_of(resize="max")
    mask = torch.rand(3, 1, *size) < 0.1
    hole = mask.squeeze(1)
    for axis, (n, m) in enumerate(zip(size, wanted, strict=True), 1):
        ends = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        hole = torch.stack([hole.narrow(axis, a, b - a).any(axis) for a, b in ends], axis)
    assert 0 < hole.sum() < hole.numel()
    held(layer, x, hole, mask=mask)


def test_a_small_hole_between_the_pixels():
    x, mask = sample(1, C, 4, 4), torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, 5] = 1
    lost, kept = layer_of(), layer_of(resize="max")
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    held(lost, x, nothing, mask=mask)
    nothing[0, 1, 2] = True
    held(kept, x, nothing, mask=mask)


# Regions without spread, and what must not leave them


REGIONS = {
    "empty": lambda hole: hole.zero_(),
    "full": lambda hole: hole.fill_(True),
    "one pixel": lambda hole: hole.zero_()[0, 1, 2].fill_(True),
    "all but one": lambda hole: hole.fill_(True)[0, 1, 2].fill_(False),
    "one sample": lambda hole: hole.zero_()[1].fill_(True),
}


@pytest.mark.parametrize("make", REGIONS.values(), ids=REGIONS)
@per_form
def test_regions_without_spread(make, form):
    x = sample(2, C, 4, 3)
    hole = torch.zeros(2, 4, 3, dtype=torch.bool)
    make(hole)
    found = held(layer_of(**form), x, hole)
    assert all(t.isfinite().all() for t in found.values())


@per_backend
@pytest.mark.parametrize("per_instance", [False, True])
def test_rounding_in_a_region_of_one_pixel(per_instance, backend):
    """No digit of a large mean comes back times 1 / sqrt(eps): y is beta, and the gradients are small."""
    x = sample(2, C, 4, 3, dtype=torch.float32) + 1e4
    hole = torch.zeros(2, 4, 3, dtype=torch.bool)
    hole[:, 1, 2] = True
    x[:, :, 1, 2] = torch.tensor([7e3, 1.23456, 3e-3])
    layer = layer_of(torch.float32, per_instance=per_instance)
    with normzoo.backend(backend):
        found = gradients(called(layer, hole), [x, *layer.parameters()], torch.ones(x.shape))
    beta = layer.foreground_beta + layer.background_beta
    assert torch.equal(found["y"][:, :, 1, 2], beta.expand(2, C))
    assert all(t.isfinite().all() for t in found.values())
    assert found["gradient 0"].abs().max() < 1e-3  # of a sum that is a constant
    assert not found[f"gradient {1 + AFFINE.index('foreground_gamma')}"].any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # numpy, in the interpreter
@per_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("per_instance", [False, True])
def test_what_is_in_the_hole_stays_there(value, per_instance, backend):
    """To the last bit, valid pixels, their gradients and those of their gamma are what they are without it."""
    x, dy = sample(3, C, 5, 4, dtype=torch.float32), torch.randn(3, C, 5, 4)
    hole, layer = hole_for(x), layer_of(torch.float32, per_instance=per_instance)
    hole[0, 2, 1] = hole[2, 0, 0] = True
    spoilt = x.clone()
    spoilt[0, :, 2, 1], spoilt[2, :, 0, 0] = value, -value
    with normzoo.backend(backend):
        clean, found = (gradients(called(layer, hole), [t, *layer.parameters()], dy) for t in (x, spoilt))
    outside = ~hole.unsqueeze(1).expand(x.shape)
    for name in ("y", "gradient 0"):
        assert torch.equal(found[name][outside], clean[name][outside]), name
        assert clean[name].isfinite().all()
    if value != 1e38:
        assert not found["y"][0, :, 2, 1].isfinite().any()
    for name in set(AFFINE) - {"foreground_gamma"}:
        at = f"gradient {1 + AFFINE.index(name)}"
        assert torch.equal(found[at], clean[at]), name


def test_a_hole_filled_with_a_constant():
    """As in the first layer of an inpainting network: what is valid is normalized as if there were no hole."""
    x, hole = sample(2, C, 6, 6), torch.zeros(2, 6, 6, dtype=torch.bool)
    hole[:, :3] = True
    x[:, :, :3] = 1.0
    y = RegionNormB(C, dtype=torch.float64)(x, hole)
    valid = y[:, :, 3:]
    assert not y[:, :, :3].any()
    torch.testing.assert_close(valid.mean((0, 2, 3)), torch.zeros(C, dtype=torch.float64))
    torch.testing.assert_close(valid.var((0, 2, 3), unbiased=False), torch.ones(C).double(), rtol=1e-4, atol=0)


# How it is called


def test_vmap():
    """Over samples of any memory format."""
    layer, xs = layer_of(), sample(2, 3, C, 4, 2)
    hole = hole_for(xs[0])
    for apart in (xs, xs.movedim(0, 2).contiguous().movedim(2, 0), xs.movedim(2, 4).contiguous().movedim(4, 2)):
        found = torch.vmap(lambda x: layer(x, hole))(apart)
        torch.testing.assert_close(found, torch.stack([layer(x, hole) for x in xs]))


@per_form
def test_derivatives(form):
    x, layer = sample(2, C, 3, 2), layer_of(**form)
    leaves = [t.detach().requires_grad_() for t in (x, *layer.parameters())]
    hole = torch.tensor([[[1, 0], [0, 1], [1, 0]], [[0, 0], [1, 0], [0, 1]]])
    assert torch.autograd.gradcheck(called(layer, hole), leaves)
    assert torch.autograd.gradgradcheck(called(layer, hole), leaves, fast_mode=True)


def test_the_function_is_the_layer():
    x = sample(3, C, 5, 4)
    hole = hole_for(x)
    for form in FORMS.values():
        layer = layer_of(**form)
        parameters = [getattr(layer, name) for name in AFFINE]
        assert torch.equal(region_norm_b(x, hole, *parameters, **form), layer(x, hole))
        half = [parameters[0], None, None, parameters[3]]
        zeros = [p if p is not None else torch.zeros(C).double() for p in half]
        assert torch.equal(region_norm_b(x, hole, *half, **form), region_norm_b(x, hole, *zeros, **form))
    assert torch.equal(region_norm_b(x, hole), RegionNormB(C, dtype=torch.float64)(x, hole))


def test_it_is_the_same_in_eval_mode_and_copied():
    layer, x = layer_of(), sample(3, C, 5, 4)
    hole = hole_for(x)
    y = layer(x, hole)
    assert torch.equal(layer.eval()(x, hole), y)
    assert torch.equal(copy.deepcopy(layer)(x, hole), y)


def test_official_names_and_zero_initialization():
    layer = RegionNormB(C)
    assert set(layer.state_dict()) == set(AFFINE)
    assert not any(p.any() for p in layer.parameters())
    official = {name: torch.full((C,), float(i + 1)) for i, name in enumerate(AFFINE)}
    layer.load_state_dict(official, strict=True)
    y = layer(torch.tensor([[[1.0, 3.0, 10.0, 30.0]]]).expand(1, C, 4), torch.tensor([[0, 0, 1, 1]]))
    torch.testing.assert_close(y[0, 0], torch.tensor([2.0, 10.0, 4.0, 8.0]), rtol=1e-4, atol=0)
    layer.reset_parameters()
    assert not any(p.any() for p in layer.parameters())


class Masked(nn.Module):
    """Called with x alone."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, self.mask)


def test_compiled_training():
    xs = [sample(4, C, 3, 2, dtype=torch.float32) for _ in range(5)]
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).expand(4, 1, 3, 4)
    layer = layer_of(torch.float32, **FORMS["per instance, separate"], nonfinite="skip")
    eager = Masked(layer, mask)
    traced = copy.deepcopy(eager)
    runs = ((traced, compiled(traced)), (eager, eager))
    with normzoo.backend("triton"):
        close(*(train(m, xs, call, torch.optim.SGD(m.parameters(), 1e-3)) for m, call in runs))


def test_one_mask_for_layers_of_several_resolutions():
    torch.manual_seed(1)
    first, second = layer_of(torch.float32), layer_of(torch.float32, resize="max")
    down = nn.Conv2d(C, C, 3, 2, 1)
    model = nn.Sequential(first, down, nn.Sequential(nn.ReLU(), second))
    x, mask = torch.randn(2, C, 8, 8), (torch.rand(2, 1, 16, 16) < 0.2).float()
    with normzoo.inputs(model, mask=mask):
        found = model(x)
        other = first(x, 1 - mask)  # what a call is given goes before
    assert torch.equal(found, second(F.relu(down(first(x, mask))), mask))
    assert torch.equal(other, first(x, 1 - mask)) and not torch.equal(other, first(x, mask))
    with pytest.raises(MissingInput, match=r"RegionNormB: there is no mask; pass it to forward"):
        model(x)


def test_batches_that_are_not_finite_are_counted():
    layer, x = RegionNormB(C, nonfinite="skip"), sample(2, C, 4, 3, dtype=torch.float32)
    hole = hole_for(x)
    layer(x, hole)
    assert layer.batches_skipped == 0
    for number, value in enumerate((float("nan"), float("inf"), 1e30), 1):  # the last has a mean
        spoilt = x.clone()
        spoilt[0, 0, 0, 0] = value
        y = layer(spoilt, hole)
        assert layer.batches_skipped == number and (number == 3 or not y.isfinite().all())
    assert torch.equal(layer(x, hole), RegionNormB(C)(x, hole)) and layer.batches_skipped == 3


def test_nothing_to_do():
    for shape in ((0, C, 4, 4), (2, C, 0, 4)):
        x = torch.empty(shape, requires_grad=True)
        y = RegionNormB(C)(x, torch.zeros(shape[0], *shape[2:], dtype=torch.bool))
        y.sum().backward()
        assert y.shape == shape and x.grad is not None and x.grad.shape == shape


def test_repr_says_what_is_not_usual():
    assert repr(RegionNormB(C)) == (
        "RegionNormB(3, eps=1e-05, per_instance=False, separate_beta=False, resize='nearest')"
    )
    text = repr(RegionNormB(C, resize="max", sync=True, nonfinite="skip"))
    assert "resize='max', sync=True, nonfinite='skip'" in text
