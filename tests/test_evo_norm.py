"""EvoNorm held to timm's own layers and to its formulas, and what timm lacks."""

import copy
import math
import sys

import pytest
import torch
import torch.distributed as dist
from distributed_checks import by_kernels, eager, step
from distributed_work import CHECKS, Collectives, check, of_ranks, parts_of_ranks, run
from tolerance import assert_as_good
from torch import nn
from zoo_cases import assert_state, state_of

import normzoo
from normzoo import functional

FORMS = ("B0", "B1", "B2", "S0", "S1", "S2")
every = pytest.mark.parametrize("form", FORMS)
of_batch = pytest.mark.parametrize("form", FORMS[:3])
of_sample = pytest.mark.parametrize("form", FORMS[3:])


def ours(form, *args, **options):
    return getattr(normzoo, f"EvoNorm{form}")(*args, **options)


def timms(form, *args, **options):
    import torchvision_ops  # noqa: F401

    norms = pytest.importorskip("timm.layers.evo_norm")
    return getattr(norms, f"EvoNorm2d{form}")(*args, **options)


def pair(form, *args, dtype=torch.float32, **options):
    """The same arguments and the same state, which goes over strictly."""
    theirs = timms(form, *args, **options).to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) / 2)
    layer = ours(form, *args, **options).to(dtype)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    return layer, theirs


def arguments(form, channels=12):
    return (channels,) if form[0] == "B" else (channels, 4)


def results(layer, x, dy):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def formula(form, x, weight, bias, v, eps, running_var=None, groups=1):
    """The six of the paper, for x (N, C, *), as they are written there."""
    image = tuple(range(2, x.dim()))
    weight, bias, v = (None if p is None else p.view(-1, *(1,) * len(image)) for p in (weight, bias, v))
    if form[0] == "B":
        var = x.var((0, *image), correction=0) if running_var is None else running_var
        batch = (var + eps).sqrt().view(-1, *(1,) * len(image))
        rms = (x.square().mean(image, keepdim=True) + eps).sqrt()
        std = (x.var(image, correction=0, keepdim=True) + eps).sqrt()
        other = {"B0": lambda: v * x + std, "B1": lambda: (x + 1) * rms, "B2": lambda: rms - x}[form]()
        return x / torch.maximum(batch, other) * weight + bias
    group = x.reshape(len(x), groups, -1)
    size = group.var(2, correction=0) if form != "S2" else group.square().mean(2)
    std = (size + eps).sqrt().repeat_interleave(x.shape[1] // groups, 1).view(*x.shape[:2], *(1,) * len(image))
    return x * torch.sigmoid(x if v is None else v * x) / std * weight + bias


def by_formula(form, layer, x, stored=None):
    v, groups = getattr(layer, "v", None), getattr(layer, "groups", 1)
    return formula(form, x, layer.weight, layer.bias, v, layer.eps, stored, groups)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_timms(form, dtype):
    """Outputs, gradients and state over three steps and in eval mode; float64 too is float32 inside timm."""
    layer, theirs = pair(form, *arguments(form), dtype=dtype)
    for mode in (True, True, True, False):
        x = (torch.randn(3, 12, 5, 4) * 2 + torch.randn(12, 1, 1)).to(dtype)
        dy = torch.randn_like(x)
        found, expected = results(layer.train(mode), x, dy), results(theirs.train(mode), x, dy)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(dict(layer.state_dict()), dict(theirs.state_dict()), rtol=1e-6, atol=1e-6)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict(), strict=True)


@every
@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (3, 8, 7), (2, 8, 2, 3, 2)], ids=str)
def test_formulas(form, shape):
    """In float64, exactly, for sequences and volumes too; and in eval mode."""
    layer = ours(form, *arguments(form, 8), dtype=torch.float64)
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    torch.testing.assert_close(layer(x), by_formula(form, layer, x))
    layer.eval()
    stored = layer.running_var if form[0] == "B" else None
    assert stored is None or not torch.equal(stored, torch.ones_like(stored))
    torch.testing.assert_close(layer(x), by_formula(form, layer, x, stored))


OPTIONS = {
    "no activation": ("apply_act", False),
    "eps": ("eps", 0.3),
    "momentum": ("momentum", 0.7),
    "group_size": ("group_size", 2),
    "relu": ("act_layer", nn.ReLU),
    "silu": ("act_layer", nn.SiLU),
}
OF = {"momentum": FORMS[:3], "group_size": FORMS[3:], "relu": FORMS[4:], "silu": FORMS[4:]}
TAKEN = [pytest.param(form, name, id=f"{form}-{name}") for name in OPTIONS for form in OF.get(name, FORMS)]


@pytest.mark.parametrize(("form", "option"), TAKEN)
def test_options_are_timms(form, option):
    layer, theirs = pair(form, *arguments(form), **dict([OPTIONS[option]]))
    x, dy = torch.randn(3, 12, 3, 4) * 2, torch.randn(3, 12, 3, 4)
    torch.testing.assert_close(results(layer, x, dy), results(theirs, x, dy), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(dict(layer.state_dict()), dict(theirs.state_dict()))
    plain, _ = pair(form, *arguments(form))
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(plain(x), layer(x)) == (option in ("momentum", "silu"))
    if option == "no activation":
        assert "v" not in layer.state_dict()
        assert form[0] == "S" or torch.equal(layer.running_var, torch.ones(12))


@every
def test_defaults_are_timms(form):
    layer, theirs = ours(form, 32), timms(form, 32)
    for name in ("eps", "momentum", "groups", "apply_act"):
        assert getattr(layer, name, None) == getattr(theirs, name, None), name
    torch.testing.assert_close(dict(layer.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_the_authors_choices():
    """A biased running variance, by hand: of 1, 2, 3, 6 it is 3.5, where timm stores 14 / 3."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(2, 1, 2, 1)
    for unbiased, expected in ((False, 0.9 + 0.35), (True, 0.9 + 1.4 / 3)):
        layer = normzoo.EvoNormB0(1, eps=1e-5, running_var_unbiased=unbiased)
        layer(x)
        torch.testing.assert_close(layer.running_var, torch.tensor([expected]))
        running_var = torch.ones(1)
        functional.evo_norm_b0(x, running_var, training=True, eps=1e-5, running_var_unbiased=unbiased)
        assert torch.equal(running_var, layer.running_var)
    # Images of a std of 0.5 and 1.5, and sqrt(3.5) of the batch: the lines are 1.5, 2.5, 4.5 and 7.5.
    expected = torch.tensor([1 / math.sqrt(3.5), 2 / 2.5, 3 / 4.5, 6 / 7.5]).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=0)


@of_sample
@pytest.mark.parametrize(("channels", "groups"), [(20, 20), (33, 11), (7, 7), (64, 32), (37, 1), (96, 32)])
def test_automatic_groups(form, channels, groups):
    layer = ours(form, channels, groups="auto")
    assert layer.groups == groups
    x = torch.randn(2, channels, 3, 2)
    torch.testing.assert_close(layer(x), ours(form, channels, groups)(x))


@every
@pytest.mark.parametrize("name", ["affine", "momentun", "drop"])
def test_misspelled_arguments_are_refused(form, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        ours(form, 32, **{name: 1})


REFUSED = {
    "momentum": (
        FORMS[:3],
        {"momentum": None},
        ValueError,
        "momentum is None; it must be a number from 0 to 1",
    ),
    "apply_act": (FORMS, {"apply_act": "yes"}, TypeError, "apply_act is 'yes'; it must be True or False"),
    "unbiased": (
        FORMS[:3],
        {"running_var_unbiased": 1},
        TypeError,
        "running_var_unbiased is 1; it must be True",
    ),
    "groups": (FORMS[3:], {"groups": 5}, ValueError, "groups is 5; it must divide num_features = 32; .*auto"),
    "no groups": (
        FORMS[3:],
        {"groups": None},
        ValueError,
        "groups is None; it must be a positive int or 'auto'",
    ),
    "a word": (
        FORMS[3:],
        {"groups": "all"},
        ValueError,
        "groups is 'all'; it must be a positive int or 'auto'",
    ),
    "group_size": (
        FORMS[3:],
        {"group_size": 5},
        ValueError,
        "group_size is 5; it must divide num_features = 32",
    ),
    "act_layer": (
        FORMS[4:],
        {"act_layer": "relu"},
        TypeError,
        "act_layer is 'relu'; it must be a class such as",
    ),
}


@pytest.mark.parametrize(("forms", "options", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refusals(forms, options, error, match):
    for form in forms:
        with pytest.raises(error, match=f"EvoNorm{form}: {match}"):
            ours(form, 32, **options)


@of_batch
def test_a_single_value_is_no_batch(form):
    """timm divides by 0."""
    layer, x = ours(form, 4), torch.randn(1, 4, 1, 1)
    before = state_of(layer)
    with pytest.raises(ValueError, match=f"EvoNorm{form}: Expected more than 1 value per channel"):
        layer(x)
    assert_state(layer, before)
    assert layer.eval()(x).isfinite().all()
    assert layer.train()(torch.empty(0, 4, 2, 2)).shape == (0, 4, 2, 2)
    assert_state(layer, before)
    function = getattr(functional, f"evo_norm_{form.lower()}")
    with pytest.raises(
        ValueError, match=f"evo_norm_{form.lower()}: without training=True it needs running_var"
    ):
        function(x)


@of_batch
def test_nonfinite_batches(form):
    x = torch.randn(3, 4, 2, 2)
    bad = x.clone()
    bad[0, 1, 0, 0] = math.inf
    layer, careless = ours(form, 4, nonfinite="skip"), ours(form, 4)
    for each in (layer, careless):
        each(x)
    kept = layer.running_var.clone()
    assert torch.equal(kept, careless.running_var) and layer.batches_skipped == 0
    for each in (layer, careless):
        each(bad)
    assert torch.equal(layer.running_var, kept) and layer.batches_skipped == 1
    assert torch.equal(careless.running_var.isfinite(), torch.tensor([True, False, True, True]))
    assert list(layer.state_dict()) == list(careless.state_dict())


@every
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_kernels(form, last):
    """As good as eager PyTorch against float64, the memory format kept, in two passes each way."""
    from normzoo_kernels import _launch

    layer = ours(form, *arguments(form, 8))
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 1.5)
    form_of = {"memory_format": torch.channels_last if last else torch.contiguous_format}
    x = (torch.randn(3, 8, 6, 7) * 2 + torch.randn(8, 1, 1)).to(**form_of)
    dy = torch.randn(3, 8, 6, 7)
    exact = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    plain = results(copy.deepcopy(layer), x, dy)
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        found = results(layer, x, dy)
    ran = _launch.launches - before
    over_x = {name: number for name, number in ran.items() if name.startswith(("channel", "curve"))}
    assert over_x == {"channel_moments": 1, "curve_map": 2, "curve_sums": 1} and ran.total() <= 12
    for name in exact:
        assert_as_good(name, found[name], plain[name], exact[name])
    assert all(found[name].is_contiguous(**form_of) for name in ("y", "dx"))


def test_five_compiled_steps_on_kernels():
    layer = normzoo.EvoNormB2(8)  # B0 and S0 are compiled with all of the zoo
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (layer, other)]
    for _ in range(5):
        x, dy = torch.randn(2, 8, 3, 4) * 2, torch.randn(2, 8, 3, 4)
        with normzoo.backend("triton"):
            found = results(compiled, x, dy)
        torch.testing.assert_close(list(found.values()), list(results(layer, x, dy).values()))
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(state_of(other), state_of(layer))
    torch._dynamo.reset()


@check(2, eager=(eager,), by_kernels=(by_kernels,))
def across_ranks(way):
    """Uneven batches, also an empty one: outputs, gradients and variance are those of one process."""
    for form, sizes in (("B0", (1, 4)), ("B2", (3, 0))):
        layer, whole = ours(form, 4, sync=True), ours(form, 4)
        parts, dys = parts_of_ranks(sizes, 4, 3, 2), [torch.randn(n, 4, 3, 2) for n in sizes]
        rank = dist.get_rank()
        with Collectives(2):
            found = step(way(layer), parts[rank], dys[rank])
        expected = step(whole, torch.cat(parts), torch.cat(dys))
        for of_rank, of_one in zip(zip(*of_ranks(found), strict=True), expected, strict=True):
            torch.testing.assert_close(torch.cat(of_rank), of_one, rtol=1e-4, atol=1e-5)
        for p, theirs in zip(layer.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(sum(of_ranks(p.grad)), theirs.grad, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(var, layer.running_var) for var in of_ranks(layer.running_var))
        torch.testing.assert_close(layer.running_var, whole.running_var)


# The checks above run in processes of their own


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked, which torch survives on Linux only")
@pytest.mark.parametrize("name", CHECKS[__name__])
def test_ranks(name, tmp_path):
    failures = run(__name__, name, tmp_path)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("form", ["S1", "S2"])
def test_another_activation_has_no_kernel(form):
    layer, x = ours(form, 4, 2, act_layer=nn.ReLU), torch.randn(2, 4, 3, 3)
    layer(x)
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match="no other activation than SiLU"):
        layer(x)


@pytest.mark.parametrize("form", ["S1", "S2"])
def test_an_activation_in_place_leaves_the_input(form):
    layer, x = ours(form, 4, 2, act_layer=lambda: nn.ReLU(inplace=True)), torch.randn(2, 4, 3, 3)
    before = x.clone()
    assert torch.equal(layer(x), ours(form, 4, 2, act_layer=nn.ReLU)(x)) and torch.equal(x, before)


def test_what_makes_the_activation_is_a_class():
    with pytest.raises(TypeError, match=r"act_layer is ReLU.*must be a class such as"):
        ours("S1", 4, 2, act_layer=nn.ReLU())


def test_a_momentum_that_was_set_later_is_looked_at():
    layer = ours("B0", 4)
    layer.momentum = None
    with pytest.raises(ValueError, match="EvoNormB0: momentum is None"):
        layer(torch.randn(2, 4, 3, 3))
