"""What every layer promises, over ZOO."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from tolerance import alike
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo_cases import (
    BACKENDS,
    CASES,
    CLASSES,
    ENTRIES,
    ON_BACKENDS,
    assert_state,
    function_of,
    made,
    moves_state,
    sample_for,
    small,
    state_of,
    step,
    torchs,
    trained,
)

import normzoo
from normzoo.zoo import ZOO, find

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AS_TORCH = [
    pytest.param(entry, cls, kwargs, id=f"{cls.__name__}-{'-'.join(map(str, kwargs)) or 'default'}")
    for entry in ZOO
    if entry.torch_class
    for cls in entry.classes
    for kwargs in entry.variants
    if kwargs.keys() <= inspect.signature(entry.torch_class).parameters.keys()
]


@pytest.mark.parametrize(("entry", "cls", "kwargs"), AS_TORCH)
def test_torchs_layer_in_values_and_state(entry, cls, kwargs):
    """Two steps of training and eval mode after them; the state dict fits both ways."""
    ours, theirs = trained(entry, kwargs, cls), torchs(entry, cls)(*entry.arguments, **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert isinstance(ours, torchs(entry, cls))
    for _ in range(2):
        x = 2 * sample_for(entry, cls) + 1
        torch.testing.assert_close(step(ours, x), step(theirs, x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state_of(ours), state_of(theirs), rtol=1e-6, atol=1e-7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = sample_for(entry, cls)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("entry", "cls"), [p for p in CLASSES if p.values[0].torch_class])
def test_torchs_repr_is_kept(entry, cls):
    assert repr(torchs(entry, cls)(*entry.arguments)).rstrip(")") in repr(cls(*entry.arguments))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_repr_names_what_was_asked_for(entry, kwargs):
    text = repr(entry.make(**kwargs))
    assert text.startswith(entry.cls.__name__)
    assert all(f"{name}={value!r}" in text for name, value in kwargs.items()), text
    assert all(re.search(rf"\b{value}\b", text) for value in entry.arguments), text


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same(entry, kwargs, copied):
    layer, x = trained(entry, kwargs), entry.sample()
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    assert_state(other, state_of(layer))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_meta_then_real(entry, kwargs):
    with torch.device("meta"):
        layer = made(entry, **kwargs)
    layer.to_empty(device="cpu")
    torch.manual_seed(1)  # for convolutions
    layer.reset_parameters()
    torch.manual_seed(1)
    fresh, x = made(entry, **kwargs), entry.sample()
    assert_state(layer, state_of(fresh))
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_meta_input(entry, kwargs):
    y = made(entry, **kwargs, device="meta")(entry.sample(device="meta"))
    assert y.is_meta and y.shape == entry.sample().shape


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_device_and_dtype_arguments(entry, kwargs):
    layer = entry.make(**kwargs, device="meta", dtype=torch.bfloat16)
    stored = torch.float32 if entry.family == "running" else torch.bfloat16
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert all(b.is_meta and b.dtype in (stored, torch.long) for b in layer.buffers())


@pytest.mark.parametrize(("entry", "kwargs"), [p for p in CASES if p.values[1].get("apply_act", True)])
def test_the_function_is_the_layer(entry, kwargs):
    layer, x = trained(entry, kwargs).train(not entry.approximate), entry.sample()
    assert torch.equal(function_of(copy.deepcopy(layer), entry)(x), layer(x))
    if "training" in inspect.signature(entry.function).parameters and layer.running_var is not None:
        layer.eval()
        assert torch.equal(function_of(layer, entry)(x), layer(x))


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_derivatives(entry, kwargs):
    """First and second, with respect to the input and every parameter, against finite differences.

    Those do not hold still what is a constant for autograd, so that there the input is left out. What has no
    derivative in training has one in eval mode.
    """
    layer = trained(entry, kwargs, dtype=torch.float64).train(not entry.approximate)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [small(entry), *layer.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    leaves[0].requires_grad_(not entry.constant)
    if not any(leaf.requires_grad for leaf in leaves):
        return
    many = len(leaves) > 4
    assert torch.autograd.gradcheck(call, leaves, fast_mode=many)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=many or entry.family == "channels")


@pytest.mark.parametrize("entry", [p for p in ENTRIES if not p.values[0].constant])
def test_gradient_penalty(entry):
    layer = trained(entry, dtype=torch.float64).train(not entry.approximate)
    x = entry.sample(dtype=torch.float64).requires_grad_()

    def penalty():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    first = penalty()
    if not first.requires_grad:  # an affine map
        return
    (found,) = torch.autograd.grad(first, x)
    direction = torch.randn_like(x)
    x.data += 1e-6 * direction
    up = penalty()
    x.data -= 2e-6 * direction
    down = penalty()
    torch.testing.assert_close((up - down) / 2e-6, (found * direction).sum(), rtol=1e-5, atol=1e-6)


def transformable(entry):
    """As a layer, and where that moves buffers in eval mode and as a function."""
    layer = trained(entry).train(not entry.approximate)
    if not moves_state(layer):
        return [layer]
    return [function_of(layer, entry, running_mean=None, running_var=None), copy.deepcopy(layer).eval()]


@pytest.mark.parametrize(("entry", "backend"), ON_BACKENDS)
def test_function_transforms(entry, backend):
    """torch.func sees through the layer, also where kernels were asked for."""
    xs, tangent = torch.stack([entry.sample() for _ in range(3)]), entry.sample()
    # A region of one pixel has a gradient of terms that cancel.
    rough = {"rtol": 1e-5, "atol": 1e-4} if entry.searches else {}

    def close(found, expected):
        torch.testing.assert_close(found, expected, **(rough or alike(expected)))

    for layer in transformable(entry):

        def loss(x, layer=layer):
            return layer(x).pow(3).sum()

        slopes = torch.stack([torch.autograd.functional.jacobian(loss, x) for x in xs])
        _, slope = torch.autograd.functional.jvp(layer, xs[0], tangent)
        with normzoo.backend(backend):
            close(torch.func.grad(loss)(xs[0]), slopes[0])
            close(torch.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))
            close(torch.vmap(torch.func.grad(loss))(xs), slopes)
            close(torch.func.jvp(layer, (xs[0],), (tangent,))[1], slope)
            with torch.autograd.forward_ad.dual_level():
                dual = layer(torch.autograd.forward_ad.make_dual(xs[0], tangent))
                close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_vmap_over_the_weight_without_grad(entry, backend):
    """Or over the first of what there is in its place."""
    layer, x = trained(entry), entry.sample()
    held = dict(layer.named_parameters()) | entry.beside(x)
    name = next(iter(held), "weight")
    weights = torch.rand(2, *(held[name].shape if held else (16,)))

    def call(weight):
        if name in inspect.signature(entry.function).parameters:
            return function_of(layer, entry, **{name: weight})(x)
        return torch.func.functional_call(layer, {name: weight}, (x,))

    with torch.no_grad():
        stacked = torch.vmap(call)(weights)
    torch.testing.assert_close(stacked, torch.stack([call(w) for w in weights]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_dtypes(entry, kwargs, dtype):
    """Any mixture works, gives the dtype of the input, and stays near float64."""
    for weight in FLOATS:
        mixed(entry, kwargs, dtype, weight)


def mixed(entry, kwargs, dtype, weight):
    layer = trained(entry, kwargs, dtype=weight)
    held = {name: t.dtype for name, t in state_of(layer).items()}
    x = entry.sample(4, dtype=torch.float64).to(dtype)
    dy = entry.sample(4, dtype=torch.float64).to(dtype)
    if entry.searches:  # or the sums that its convolutions get cancel, of what is rounded before a scale
        dy = dy + x
    exact = step(copy.deepcopy(layer).double(), x.double(), dy.double())
    found = step(layer, x, dy)
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert all(p.grad.dtype == weight for p in layer.parameters())
    assert {name: t.dtype for name, t in state_of(layer).items()} == held
    steps = 2 if kwargs.get("cast") == "llama" else 1
    size = exact["y"].abs().max() if entry.searches else exact["y"].abs()
    allowed = steps * torch.finfo(dtype).eps * size + 4e-6
    assert ((found["y"].double() - exact["y"]).abs() <= allowed).all()
    # A region of one pixel has a gradient of terms that cancel.
    eps = (16 if entry.searches else 4) * max(torch.finfo(dtype).eps, torch.finfo(weight).eps)
    for name in exact.keys() - {"y"}:
        largest = exact[name].abs().max().item()
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=eps * largest + 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_keeps_the_dtype_of_the_input(entry, dtype):
    layer, x = trained(entry), entry.sample(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize(("entry", "backend"), ON_BACKENDS)
def test_a_step_of_training(entry, backend):
    """An operation in place behind the layer, an expanded gradient, and less than all gradients."""
    x, layer = entry.sample(4, 3, 1), trained(entry)

    def fresh(*then):  # a step may move the state that the next depends on
        return nn.Sequential(copy.deepcopy(layer), *then)

    expected = step(fresh(nn.ReLU()), x)
    with normzoo.backend(backend):
        torch.testing.assert_close(step(fresh(nn.ReLU(True)), x), expected)
        ones = step(fresh(), x, torch.ones_like(x))
        torch.testing.assert_close(step(fresh(), x, torch.ones(()).expand_as(x)), ones)
        if list(layer.parameters()):
            behind = fresh(nn.ReLU(True))
            y = behind(x.detach())
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            for name, p in behind.named_parameters():
                torch.testing.assert_close(p.grad, expected[f"d{name}"])
        torch.testing.assert_close(step(fresh(nn.ReLU(True)).requires_grad_(False), x)["dx"], expected["dx"])


@pytest.mark.parametrize(("entry", "kwargs"), CASES)
def test_gradients_add_up_alone(entry, kwargs):
    """Each has a memory of its own, so that adding to one or scaling it leaves the others."""
    layer, x = trained(entry, kwargs).train(not entry.approximate), entry.sample()
    y = layer(x)
    if not y.requires_grad:
        return
    y.square().sum().backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    y.square().sum().backward()
    for name, grad in once.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, 2 * grad)


@pytest.mark.parametrize(
    ("entry", "backend", "reentrant"),
    [
        pytest.param(entry, backend, reentrant, id=f"{entry.name}-{backend}{'-reentrant' * reentrant}")
        for entry, backend in (p.values for p in ON_BACKENDS)
        for reentrant in (False, True)
        if not (entry.approximate or (reentrant and backend == "triton"))
    ],
)
def test_checkpointing_counts_a_batch_once(entry, backend, reentrant):
    layer, x = trained(entry), entry.sample()
    other = copy.deepcopy(layer)

    class Recomputed(nn.Module):
        def forward(self, x):
            return checkpoint(other, x, use_reentrant=reentrant)

    recomputed = Recomputed()
    recomputed.other = other
    with normzoo.backend(backend):
        expected = step(layer, x)
        found = {name.replace("dother.", "d"): t for name, t in step(recomputed, x).items()}
    torch.testing.assert_close(found, expected)
    assert_state(other, state_of(layer))


@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_eps_is_refused(entry):
    for eps in (0, -1e-5, float("nan"), float("inf"), "1e-5"):
        with pytest.raises(ValueError, match=f"{entry.cls.__name__}: eps is .*positive finite"):
            entry.make(eps=eps)
        with pytest.raises(ValueError, match=f"{entry.name}: eps is"):
            function_of(entry.make(), entry, eps=eps)(entry.sample())


SPOILT = {
    "dimensions": (lambda x: x.sum(), ValueError, r"(has shape \(\)|got 0D input)"),
    "integers": (lambda x: x.int(), TypeError, "input is torch.int32"),
    "complex": (lambda x: x.cfloat(), TypeError, "input is torch.complex64"),
    "a list": (lambda x: x.tolist(), TypeError, "input is a list; it must be"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("entry", ENTRIES)
def test_bad_inputs_are_refused(entry, spoil, error, match):
    """By the layer in training and eval mode, which stays as it is, and by the function."""
    layer, x = made(entry), spoil(entry.sample())
    before = state_of(layer)
    for backend in BACKENDS:
        with normzoo.backend(backend):
            for mode in (True, False):
                with pytest.raises(error, match=f"({entry.name}|{entry.cls.__name__}): .*{match}"):
                    layer.train(mode)(x)
            with pytest.raises(error, match=f"{entry.name}: .*{match}"):
                function_of(layer.train(), entry)(x)
    assert_state(layer, before)


def test_find():
    assert find("rms_norm") is find("RMSNorm")
    assert find("BatchNorm3d") is find("batch_norm")
    with pytest.raises(ValueError, match="no layer called 'norm'; there are layer_norm"):
        find("norm")
    words = {
        "alpha": "alpha_batch_norm",
        "Frozen": "frozen_batch_norm",
        "bcn": "batch_channel_norm",
        "abn": "alpha_",
    }
    for word, meant in words.items():
        with pytest.raises(ValueError, match=f"; did you mean {meant}.*\\?$"):
            find(word)
    for word in ("", "zzz"):
        with pytest.raises(ValueError, match=r"there are layer_norm, [\w, ]+$"):
            find(word)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_sample_is_what_the_layout_says(entry):
    for lead in ((), (2,), (2, 5, 3)):
        shape = entry.sample(*lead).shape
        assert shape[1 if entry.family in ("channels", "weights") else -1] == 16 and shape[:1] == (
            lead[0] if lead else 4,
        )
