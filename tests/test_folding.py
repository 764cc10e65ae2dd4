"""Folding a norm into the layer before or after it: the same function, or a refusal."""

import copy

import pytest
import torch
from small_models import stirred, without_bias
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize

import normzoo
from normzoo import folding

LAST = {
    "power": lambda: normzoo.PowerNorm(6, group_num=None, eps=1e-2),
    "unified": lambda: normzoo.UnifiedNorm(6, bias=False),
    "plain": lambda: normzoo.UnifiedNorm(6, affine=False),
}
CHANNELS = {
    "batch": lambda: nn.BatchNorm2d(6, eps=1e-2),
    "bare": lambda: nn.BatchNorm2d(6, affine=False),
    "weight": lambda: without_bias(nn.BatchNorm2d(6)),
    "ghost": lambda: normzoo.GhostBatchNorm(6, 2),
    "adab2n": lambda: normzoo.AdaB2N(6, 3),
    "instance": lambda: nn.InstanceNorm2d(6, track_running_stats=True, affine=True),
    "power": lambda: normzoo.PowerNorm(6, group_num=None, channel_dim=1),
    "unified": lambda: normzoo.UnifiedNorm(6, channel_dim=1),
    "frozen": lambda: normzoo.FrozenBatchNorm(6).train(),
    "alpha": lambda: normzoo.AlphaBatchNorm(6, source_weight=1).train(),
}
IN_ANY_MODE = ("frozen", "alpha")
CONVS = {
    "plain": lambda n, m: nn.Conv2d(n, m, 3),
    "groups": lambda n, m: nn.Conv2d(n, m, (2, 3), stride=2, dilation=(2, 1), groups=3, bias=False),
    "depthwise": lambda n, m: nn.Conv2d(n, m, 3, groups=6),
    "reflected": lambda n, m: nn.Conv2d(n, m, 3, padding=1, padding_mode="reflect"),
    "valid": lambda n, m: nn.Conv2d(n, m, 3, padding="valid"),
    "same": lambda n, m: nn.Conv2d(n, m, 1, padding="same"),
    "transposed": lambda n, m: nn.ConvTranspose2d(n, m, 1, padding=1),
    "transposed groups": lambda n, m: nn.ConvTranspose2d(n, m, 1, groups=3, bias=False),
}
UNEVEN = {
    "padded": lambda n, m: nn.Conv2d(n, m, 3, padding=(0, 1), groups=2, bias=False),
    "same": lambda n, m: nn.Conv2d(n, m, 3, padding="same"),
    "padded transposed": lambda n, m: nn.ConvTranspose2d(
        n, m, (2, 3), stride=2, padding=1, output_padding=1, groups=3, dilation=2
    ),
    "strided transposed": lambda n, m: nn.ConvTranspose2d(n, m, 1, stride=(1, 2), bias=False),
}


def made(norm, dtype=torch.float64):
    """A norm with statistics and weights of its own, in eval mode unless that makes no difference."""
    mode = norm.training and type(norm).__name__ in ("FrozenBatchNorm", "AlphaBatchNorm")
    return stirred(norm).to(dtype).train(mode)


def unshifted(norm):
    norm.bias.data.zero_()
    return norm


def state(module):
    return {name: (t, t.clone()) for name, t in module.state_dict(keep_vars=True).items()}


def assert_folded(new, old, before, x, wanted):
    """It computes what was `wanted`, and `old` is untouched."""
    assert type(new) is type(old) and new is not old
    close = {"rtol": 0, "atol": 2e-14 * wanted.abs().max().item()} if x.dtype == torch.float64 else {}
    torch.testing.assert_close(new(x), wanted, **close)
    for name, (t, value) in before.items():
        assert old.get_parameter(name) is t and torch.equal(t, value)
        assert new.get_parameter(name) is not t and new.get_parameter(name).requires_grad == t.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", LAST)
def test_linear(norm, dtype):
    norm = made(LAST[norm](), dtype)
    x = torch.randn(3, 4, 6, dtype=dtype)
    for bias in (True, False):
        after, before = (nn.Linear(*sizes, bias=bias, dtype=dtype) for sizes in ((6, 5), (6, 6)))
        kept = state(after)
        new = folding.into_next(norm, after)
        assert_folded(new, after, kept, x, after(norm(x)))
        assert (new.bias is None) == (not bias and norm.bias is None)
        kept = state(before)
        new = folding.into_previous(before, norm)
        assert_folded(new, before, kept, x, norm(before(x)))
        assert (new.bias is None) == (not bias and norm.bias is None)


@pytest.mark.parametrize("norm", CHANNELS)
@pytest.mark.parametrize("conv", CONVS)
def test_next_convolution(conv, norm):
    norm, conv = made(CHANNELS[norm]()), CONVS[conv](6, 12).double()
    x, before = torch.randn(2, 6, 7, 8, dtype=torch.float64), state(conv)
    with torch.no_grad():
        new = folding.into_next(norm, conv)
        assert_folded(new, conv, before, x, conv(norm(x)))
    assert new.bias is not None


@pytest.mark.parametrize("norm", ["batch", "power", "bare"])
@pytest.mark.parametrize("conv", [*CONVS, *UNEVEN])
def test_previous_convolution(conv, norm):
    norm, conv = made(CHANNELS[norm]()), (CONVS | UNEVEN)[conv](12, 6).double()
    x, before = torch.randn(2, 12, 7, 8, dtype=torch.float64), state(conv)
    assert_folded(folding.into_previous(conv, norm), conv, before, x, norm(conv(x)))


@pytest.mark.parametrize("kind", UNEVEN)
def test_a_shift_beside_zeros(kind):
    conv = UNEVEN[kind](6, 12).double()
    why = (
        "outputs of ConvTranspose2d see one input or several"
        if "transposed" in kind
        else "Conv2d pads with zeros"
    )
    norm = made(CHANNELS["unified"]())
    with pytest.raises(
        folding.Unfoldable, match=f"into_next: {why}.* shifts; fold it into the layer before it"
    ):
        folding.into_next(norm, conv)
    x, before = torch.randn(2, 6, 7, 8, dtype=torch.float64), state(conv)
    new = folding.into_next(unshifted(norm), conv)
    assert_folded(new, conv, before, x, conv(norm(x)))
    assert (new.bias is None) == (conv.bias is None)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    norm = made(normzoo.PowerNorm(6, group_num=None, channel_dim=1))
    x = torch.randn(2, 6, *(5,) * dims, dtype=torch.float64)
    for name in (f"Conv{dims}d", f"ConvTranspose{dims}d"):
        conv = getattr(nn, name)(6, 6, 1, groups=2).double()
        assert_folded(folding.into_next(norm, conv), conv, state(conv), x, conv(norm(x)))
        conv = getattr(nn, name)(6, 6, 3, groups=2).double()
        assert_folded(folding.into_previous(conv, norm), conv, state(conv), x, norm(conv(x)))


def test_batch_norm_of_features():
    norm, linear = made(nn.BatchNorm1d(6)), nn.Linear(6, 6).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_folded(folding.into_next(norm, linear), linear, state(linear), x, linear(norm(x)))
    assert_folded(folding.into_previous(linear, norm), linear, state(linear), x, norm(linear(x)))


def test_embedding():
    norm = made(LAST["power"]())
    table, head = nn.Embedding(9, 6, padding_idx=2).double(), nn.Linear(6, 9, bias=False).double()
    head.weight = table.weight  # tied
    ids, before = torch.arange(9), state(table)
    new = folding.into_previous(table, norm)
    torch.testing.assert_close(new(ids), norm(table(ids)), rtol=0, atol=1e-14)
    assert torch.equal(table.weight, before["weight"][1]) and head.weight is table.weight
    read = folding.into_next(norm, head)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(read(x), head(norm(x)), rtol=0, atol=1e-13)
    assert table.weight is head.weight is not read.weight


def test_the_map():
    norm = made(nn.BatchNorm1d(3, eps=0.5))
    scale, shift = folding.affine_map(norm)
    wanted = norm.weight / (norm.running_var + 0.5).sqrt()
    torch.testing.assert_close(scale, wanted)
    torch.testing.assert_close(shift, norm.bias - wanted * norm.running_mean)
    norm = made(normzoo.PowerNorm(3, group_num=None, eps=0.5, dtype=torch.bfloat16), torch.bfloat16)
    scale, shift = folding.affine_map(norm)
    assert scale.dtype == shift.dtype == torch.float64
    torch.testing.assert_close(scale, norm.weight.double() / (norm.running_phi.double() + 0.5).sqrt())
    assert torch.equal(shift, norm.bias.double())


def test_torch_agrees_on_the_layer_before():
    norm, conv, linear = made(nn.BatchNorm2d(6)), nn.Conv2d(4, 6, 3).double(), nn.Linear(4, 6).double()
    theirs = fusion.fuse_conv_bn_eval(conv.eval(), norm)
    ours = folding.into_previous(conv, norm)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    norm = made(nn.BatchNorm1d(6))
    theirs = fusion.fuse_linear_bn_eval(linear.eval(), norm)
    torch.testing.assert_close(folding.into_previous(linear, norm).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype):
    norm = made(LAST["power"](), dtype)
    linear = nn.Linear(6, 5, dtype=dtype)
    new = folding.into_next(norm, linear)
    exact = folding.into_next(copy.deepcopy(norm).double(), copy.deepcopy(linear).double())
    assert new.weight.dtype == new.bias.dtype == dtype
    assert torch.equal(new.weight, exact.weight.to(dtype)) and torch.equal(new.bias, exact.bias.to(dtype))


def test_what_is_no_number_of_the_dtype():
    norm = made(LAST["power"](), torch.float32)
    norm.weight.data.fill_(1e7)
    with pytest.raises(
        folding.Unfoldable, match=r"into_next: the new weight goes up to .*, too large for torch.float16"
    ):
        folding.into_next(norm, nn.Linear(6, 5, dtype=torch.float16))


def test_hooks_and_frozen_weights_come_along():
    norm, linear = made(LAST["power"](), torch.float32), nn.Linear(6, 5).requires_grad_(False)
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    new = folding.into_next(norm, linear)
    new(torch.randn(2, 6))
    assert calls and not new.weight.requires_grad and not new.bias.requires_grad
    handle.remove()
    new(torch.randn(2, 6))
    assert len(calls) == 1


def test_hooks_between_the_two_are_refused():
    norm, linear = made(LAST["power"](), torch.float32), nn.Linear(6, 6)

    def seen(*_):
        return None

    for module, register, order in (
        (norm, norm.register_forward_hook, "both"),
        (norm, norm.register_forward_pre_hook, "both"),
        (norm, norm.register_full_backward_hook, "both"),
        (linear, linear.register_forward_pre_hook, "next"),
        (linear, linear.register_forward_hook, "previous"),
    ):
        handle = register(seen)
        sentence = f"{type(module).__name__} has hooks that would be lost"
        if order != "previous":
            with pytest.raises(folding.Unfoldable, match=sentence):
                folding.into_next(norm, linear)
        if order != "next":
            with pytest.raises(folding.Unfoldable, match=sentence):
                folding.into_previous(linear, norm)
        handle.remove()
    folding.into_next(norm, linear)
    folding.into_previous(linear, norm)


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Activated(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(6)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def parametrized_bias():
    linear = nn.Linear(6, 6)
    parametrize.register_parametrization(linear, "bias", nn.Tanh())
    return linear


def own_forward():
    linear = nn.Linear(6, 5)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    "norm, words",
    [
        (
            normzoo.PowerNorm(6).eval(),
            "PowerNorm scales every position .* with group_num=1; only with group_num=None",
        ),
        (
            normzoo.PowerNorm(6, group_num=None),
            "PowerNorm is in training mode, where it goes by the batch; call eval",
        ),
        (normzoo.UnifiedNorm(6), "UnifiedNorm is in training mode"),
        (nn.BatchNorm1d(6), "BatchNorm1d is in training mode"),
        (nn.BatchNorm1d(6, track_running_stats=False).eval(), "BatchNorm1d has no running statistics"),
        (
            nn.InstanceNorm1d(6).eval(),
            "InstanceNorm1d has no running statistics and goes by those of its input",
        ),
        (
            normzoo.AlphaBatchNorm(6).eval(),
            "AlphaBatchNorm takes statistics of its input .* unless source_weight is 1",
        ),
        (nn.LayerNorm(6).eval(), "a layer norm takes statistics of its input in eval mode too"),
        (normzoo.BatchChannelNorm(6, 2).eval(), "a batch_channel norm takes statistics of its input"),
        (nn.BatchNorm1d(6, device="meta").eval(), "BatchNorm1d is on the meta device"),
        (Activated().eval(), "Activated goes on with act, which would be lost"),
        (nn.LazyBatchNorm1d().eval(), "it is not known what LazyBatchNorm1d computes: it has no shape yet"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_norms_that_are_no_such_map(norm, words):
    linear = nn.Linear(6, 6)
    for caller, call in (
        ("affine_map", lambda: folding.affine_map(norm)),
        ("into_next", lambda: folding.into_next(norm, linear)),
        ("into_previous", lambda: folding.into_previous(linear, norm)),
    ):
        with pytest.raises(folding.Unfoldable, match=f"{caller}: {words}"):
            call()


@pytest.mark.parametrize(
    "layer, words",
    [
        (
            parametrizations.weight_norm(nn.Linear(6, 6)),
            "a weight or bias of Linear is computed, not stored; remove the",
        ),
        (nn.utils.spectral_norm(nn.Linear(6, 6)), "a weight or bias of Linear is computed, not stored"),
        (parametrized_bias(), "a weight or bias of Linear is computed, not stored"),
        (nn.LazyLinear(6), "the weight of LazyLinear has no numbers yet"),
        (nn.Linear(6, 6, device="meta"), "the weight of Linear has no numbers yet"),
        (Doubling(6, 6), "Doubling has a forward of its own, which may do anything"),
        (own_forward(), "Linear has a forward of its own"),
        (nn.Bilinear(6, 6, 6), "the layer is a Bilinear; it must be one of Linear, Embedding, Conv1d"),
        (nn.Linear(5, 5), "the norm has 6 channels and Linear 5 where they meet"),
        (
            nn.Conv1d(6, 6, 1),
            "channels of the norm are in dimension -1 of its input, and those of Conv1d in dimension 1",
        ),
    ],
    ids=str,
)
def test_layers_that_cannot_take_it_up(layer, words):
    norm = made(LAST["power"](), torch.float32)
    with pytest.raises(folding.Unfoldable, match=f"into_next: .*{words}"):
        folding.into_next(norm, layer)
    with pytest.raises(folding.Unfoldable, match=f"into_previous: .*{words}"):
        folding.into_previous(layer, norm)


def test_swapped_arguments():
    norm, linear = made(LAST["power"](), torch.float32), nn.Linear(6, 6)
    came = r"and Linear came for the norm, PowerNorm for the layer; swap them"
    with pytest.raises(folding.Unfoldable, match=rf"into_previous: the arguments are \(layer, norm\), {came}"):
        folding.into_previous(norm, linear)
    with pytest.raises(folding.Unfoldable, match=rf"into_next: the arguments are \(norm, layer\), {came}"):
        folding.into_next(linear, norm)


def test_other_refusals():
    norm, images = made(LAST["power"](), torch.float32), made(nn.BatchNorm2d(6), torch.float32)
    with pytest.raises(folding.Unfoldable, match="into_next: an Embedding takes indices, which no norm scales"):
        folding.into_next(norm, nn.Embedding(6, 6))
    with pytest.raises(
        folding.Unfoldable, match=r"with max_norm=1\.0 the Embedding changes rows that it reads"
    ):
        folding.into_previous(nn.Embedding(6, 6, max_norm=1.0), norm)
    with pytest.raises(
        folding.Unfoldable, match="in dimension 1 of its input, and those of Linear in the last"
    ):
        folding.into_next(images, nn.Linear(6, 6))
    with pytest.raises(folding.Unfoldable, match="Standardized has a _conv_forward of its own"):
        folding.into_next(images, Standardized(6, 6, 1))
    with pytest.raises(folding.Unfoldable, match="the norm has 6 channels and Conv2d 4 where they meet"):
        folding.into_previous(nn.Conv2d(6, 4, 1), images)
