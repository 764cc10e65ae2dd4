"""Norms that look like those of the library and are not: no conversion may claim them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import FloatNorm, GammaNorm
from torch import nn

import normzoo
from normzoo.conversion import Norm


class AbsNorm(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class PositiveNorm(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight.clamp(min=0), self.bias, self.eps)


class ClippedNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.clamp(-10, 10))


class RankNorm(nn.LayerNorm):
    """Over the channels of images, over the last dimension of everything else."""

    def forward(self, input):
        return (
            super().forward(input.movedim(1, -1)).movedim(-1, 1) if input.dim() == 4 else super().forward(input)
        )


class GuessingNorm(nn.LayerNorm):
    """Over whichever dimension has the right size."""

    def forward(self, input):
        here = input.shape[1] == self.normalized_shape[0]
        return super().forward(input.movedim(1, -1)).movedim(-1, 1) if here else super().forward(input)


class SecondAxisNorm(nn.Module):
    """Over dimension 2, whatever the number of dimensions."""

    dim = 2

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(self.dim, keepdim=True) + 1e-6)


class DetachedNorm(GammaNorm):
    """Passes no gradient through its statistics."""

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean.detach()) / (variance.detach() + 1e-5).sqrt() * self.gamma + self.beta


class DetachedMeanNorm(GammaNorm):
    """A small difference in a wide row."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True).detach()
        return centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.gamma + self.beta


class UntrainedWeightNorm(nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight.detach(), self.bias, self.eps)


class NoGradNorm(nn.LayerNorm):
    @torch.no_grad()
    def forward(self, input):
        return super().forward(input)


class HalfEpsNorm(nn.LayerNorm):
    """Another eps in low precision."""

    def forward(self, input):
        eps = 1e-5 if input.dtype == torch.float32 else 1e-2
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, eps)


class DropBeforeNorm(nn.LayerNorm):
    def __init__(self, width):
        super().__init__(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, input):
        return super().forward(self.drop(input))


class SpareDropNorm(DropBeforeNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize(
    "norm, why",
    [
        (AbsNorm(8), "agrees with no norm"),
        (PositiveNorm(8), "agrees with no norm"),
        (ClippedNorm(8), r"something else for one of shape \(6, 8\)"),
        (RankNorm(8), r"for an input of shape \(2, 3, 8\) and something else for one of shape \(1, 8, 1, 8\)"),
        (GuessingNorm(8), r"something else for one of shape \(1, 8, 8\)"),
        (SecondAxisNorm(), r"shape \(2, 3, 2\) and something else for one of shape \(1, 2, 1, 2\)"),
        (DetachedNorm(), "but its gradients are not those"),
        (DetachedMeanNorm(4096), "but its gradients are not those"),
        (UntrainedWeightNorm(8), "but its gradients are not those"),
        (NoGradNorm(8), "but its gradients are not those"),
        (HalfEpsNorm(8), r"computes a layer \(8,\), eps=1e-05 in float32 and something else in bfloat16"),
        (DropBeforeNorm(8), r"what it does with its children \(drop\) is unclear"),
        (SpareDropNorm(8), r"what it does with its children \(drop\) is unclear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_that_is_none_of_ours_stays(norm, why):
    with pytest.raises(ValueError, match=f"strict=True, .*\n  0: .*{why}"):
        normzoo.plan(nn.Sequential(norm, nn.LayerNorm(3)), strict=True)


@pytest.mark.parametrize("width", [2, 3, 4, 2048])
def test_narrow_and_wide_norms_by_hand(width):
    class Norm2d(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    for norm, axis in ((GammaNorm(width), -1), (Norm2d(width), 1)):
        (step,) = normzoo.plan(nn.Sequential(norm)).steps
        assert step.site.norm.shape == (width,) and step.site.norm.axis == axis
        assert step.exactness in ("exact", "eval-exact") and step.error <= 1e-6


def test_norms_that_differ_in_a_list_are_not_alike():
    class ListNorm(nn.LayerNorm):
        def __init__(self, factor):
            super().__init__(8)
            self.factors = [factor]

        def forward(self, input):
            return super().forward(input) * (self.factors[0] if self.training else 1.0)

    first, second = normzoo.inspect(nn.Sequential(ListNorm(1.0), ListNorm(2.0))).sites
    assert first.family == "layer" and second.family == "unknown"


def test_numbers_of_other_libraries():
    norm = nn.LayerNorm(np.int64(8), eps=np.float32(1e-5))
    assert json.loads(normzoo.inspect(norm).to_json())["sites"][0]["norm"]["shape"] == [8]
    x = torch.randn(2, 8)
    assert torch.equal(normzoo.convert(norm)(x), norm(x))


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_parameters_that_show_nothing(weight):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), weight))

        def forward(self, x):
            return F.rms_norm(x, (8,), self.weight, 1e-2)

    for eps, exactness in ((1e-2, "exact"), (1e-6, "approximate")):
        handle = normzoo.register_adapter(Scaled, lambda module, eps=eps: Norm("rms", (8,), eps, "weight"))
        try:
            (step,) = normzoo.plan(nn.Sequential(Scaled())).steps
        finally:
            handle.remove()
        assert step.exactness == exactness


@pytest.mark.parametrize(
    "norm, reason",
    [
        (Norm("layer", (8,), 1e-5, offset=1.0), "adds 1 to a weight that it does not have"),
        (Norm("layer", (8,), 1e-5, weight="scale"), "has no tensor called scale"),
        (Norm("layer", (8,), 1e-5), "a test run of it beside the new LayerNorm failed: TypeError: "),
    ],
)
def test_adapters_that_cannot_be_right(norm, reason):
    class Odd(nn.Module):
        def forward(self, x, gate):
            return F.layer_norm(x, (8,)) * gate

    handle = normzoo.register_adapter(Odd, lambda module: norm)
    try:
        step, _ = normzoo.plan(nn.Sequential(Odd(), nn.LayerNorm(8))).steps
    finally:
        handle.remove()
    assert step.action == "refuse" and reason in step.reason


def test_an_adapter_returns_a_norm():
    class Odd(nn.Module):
        pass

    handle = normzoo.register_adapter(Odd, lambda module: "rms")
    try:
        with pytest.raises(
            TypeError, match=r"the adapter of .*Odd returned a str; it must return a normzoo.con"
        ):
            normzoo.inspect(Odd())
    finally:
        handle.remove()


def test_another_dtype_of_the_output():
    class WideNorm(nn.LayerNorm):
        def forward(self, input):
            return F.layer_norm(
                input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
            )

    model = nn.Sequential(WideNorm(8), nn.LayerNorm(8))
    assert normzoo.plan(model).exactness == "exact"
    step, _ = normzoo.plan(model.bfloat16()).steps
    assert step.action == "refuse" and "torch.bfloat16 the old one makes torch.float32" in step.reason


MODEL, SAMPLE = nn.Sequential(nn.LayerNorm(8), GammaNorm(), FloatNorm()), torch.randn(4, 8)


@pytest.fixture(params=["float64", "bfloat16", "meta", "inference", "no grad"])
def surroundings(request):
    """Defaults of a caller that must not matter."""
    if request.param in ("float64", "bfloat16"):
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)
    else:
        modes = {"meta": torch.device("meta"), "inference": torch.inference_mode(), "no grad": torch.no_grad()}
        with modes[request.param]:
            yield


def test_the_surroundings_do_not_matter(surroundings):
    made = normzoo.plan(MODEL)
    assert [step.exactness for step in made.changes] == ["exact", "eval-exact", "exact"]
    assert made.verify(SAMPLE).same
    assert not normzoo.plan(MODEL, "rms_norm").verify(SAMPLE).same


def test_stored_activations_are_no_obstacle():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), GammaNorm())
    for norm in (model[1], model[2]):
        norm.register_forward_hook(lambda module, args, y: setattr(module, "seen", y))
    model(torch.randn(2, 8))
    assert len(normzoo.plan(model).changes) == 2


def test_an_activation_of_eval_mode_alone():
    class ActNorm(nn.LayerNorm):
        def __init__(self, width):
            super().__init__(width)
            self.act = nn.GELU()

        def forward(self, input):
            return super().forward(input) if self.training else self.act(super().forward(input))

    (site,) = normzoo.inspect(ActNorm(8)).sites
    assert site.norm is None and "what it does with its children (act) is unclear" in site.note


def test_the_variance_of_a_sample_is_another():
    class SampleNorm(nn.LayerNorm):
        def forward(self, input):
            centred = input - input.mean(-1, keepdim=True)
            return centred / (input.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias

    (site,) = normzoo.inspect(SampleNorm(4096)).sites
    assert site.norm is None and "agrees with no norm known here; the nearest, layer (4096,)" in site.note


def test_two_numbers_that_eps_may_be():
    class TwoNorm(GammaNorm):
        def __init__(self):
            super().__init__()
            self.eps, self.momentum = 1e-5, 1.0000001e-5

    (site,) = normzoo.inspect(TwoNorm()).sites
    assert site.norm is None and "it fits several norms" in site.note


def test_norms_of_several_widths_are_not_alike():
    sites = normzoo.inspect(nn.Sequential(GammaNorm(8), GammaNorm(16))).sites
    assert [site.norm.shape for site in sites] == [(8,), (16,)]


def test_the_dimensions_that_share_statistics():
    x = torch.empty(2, 3, 4, 5)
    spans = {
        Norm("layer", (5,), 1e-5): (-1,),
        Norm("rms", (3,), 1e-5, axis=1): (1,),
        Norm("group", (3,), 1e-5, axis=1): (1, 2, 3),
        Norm("batch", (3,), 1e-5, axis=1): (0, 2, 3),
    }
    assert all(norm.span(x) == span for norm, span in spans.items())


def test_the_last_adapter_is_asked_first():
    class Odd(nn.Module):
        def forward(self, x):
            return F.rms_norm(x, (8,), eps=1e-6)

    handles = [
        normzoo.register_adapter(Odd, lambda module, eps=eps: Norm("rms", (8,), eps)) for eps in (1e-2, 1e-6)
    ]
    try:
        assert normzoo.plan(nn.Sequential(Odd())).exactness == "exact"
        odd = Odd()
        odd.forward = lambda x: x
        step, _ = normzoo.plan(nn.Sequential(odd, nn.LayerNorm(8))).steps
        assert step.action == "refuse" and "it has a forward of its own, which would be lost" in step.reason
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.01)])
def test_a_module_of_the_caller_that_is_nearly_right(dtype, factor):
    class Nearly(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) * factor

    model = nn.Sequential(nn.LayerNorm(64)).to(dtype).eval()

    def to(site):
        new = Nearly(64)
        new.weight, new.bias = site.module.weight, site.module.bias
        return new

    made = normzoo.plan(model, to)
    assert made.exactness == "approximate" and made.changes[0].reason == "a test run shows another function"
    assert not made.apply()[0].training


class NormPool(nn.Module):
    """Called a norm, and no more than a place where one is."""

    def __init__(self):
        super().__init__()
        self.norm, self.query = nn.BatchNorm2d(4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.norm(x).mean((2, 3)) * self.query


def test_a_module_around_a_norm_is_none_itself():
    (site,) = normzoo.inspect(nn.Sequential(NormPool())).sites
    assert site.name == "0.norm" and site.family == "batch"
