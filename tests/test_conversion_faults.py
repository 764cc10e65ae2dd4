"""Norms and models made to deceive: no conversion may claim, lose or prove what it does not."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import normzoo
from normzoo.conversion import Exactness, Norm
from normzoo.conversion.proof import compare


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)

    def forward(self, x):
        return self.rms(self.norm(self.linear(x)))


class OnePlusNorm(nn.Module):
    """LayerNorm with 1 + w and names of its own."""

    def __init__(self, width=8):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))
        self.beta = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma + 1, self.beta, 1e-5)


class FloatNorm(nn.Module):
    """RMSNorm in float32 whatever the input, rounded before the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


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


class DetachedNorm(OnePlusNorm):
    """Passes no gradient through its statistics."""

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean.detach()) / (variance.detach() + 1e-5).sqrt() * self.gamma + self.beta


class DetachedMeanNorm(OnePlusNorm):
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

    for norm, axis in ((OnePlusNorm(width), -1), (Norm2d(width), 1)):
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


def test_tensors_by_other_names():
    model = nn.Sequential(OnePlusNorm())
    model[0].gamma.requires_grad_(False)
    x = torch.randn(3, 8)
    gamma, beta, wanted = model[0].gamma, model[0].beta, model(x)
    optimizer = torch.optim.Adam(model.parameters())
    made = normzoo.plan(model)
    assert "beta is called bias from now on, in the state dict too" in str(made)
    made.apply(optimizer)
    assert [*model.state_dict()] == ["0.weight", "0.bias"] and model[0].bias is beta
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert torch.equal(model(x), wanted)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    made.revert()
    assert model[0].gamma is gamma and model[0].beta is not beta and torch.equal(model[0].beta, beta + 1)


def test_a_weight_in_a_buffer():
    class Norm1(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.register_buffer("weight", torch.full((8,), 2.0), persistent)

        def forward(self, x):
            return F.rms_norm(x, (8,), self.weight, 1e-6)

    model = nn.Sequential(Norm1(True), Norm1(False))
    keys = [*model.state_dict()]
    made = normzoo.plan(model)
    assert made.steps[1].reason == "its weight is not in the state dict, and that of the layer would be"
    made.apply()
    assert not any(p.requires_grad for p in model.parameters()) and [*model.state_dict()] == keys


def test_what_the_options_leave_out_is_lost():
    model = nn.Sequential(nn.LayerNorm(8))
    nn.init.normal_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = normzoo.plan(model, "rms_norm", bias=False)
    assert made.steps[0].tensors["kept"] == ("weight",) and made.steps[0].tensors["lost"] == ("bias",)
    assert "parameters change" in made.summary()
    made.apply(optimizer)
    assert [*model.state_dict()] == ["0.weight"] and len(optimizer.param_groups[0]["params"]) == 1
    made = normzoo.plan(nn.LayerNorm(8), elementwise_affine=False)
    assert made.exactness == "approximate" and not made.apply().state_dict()


def test_new_parameters_go_to_no_stranger():
    model = nn.ModuleDict({"norm": nn.RMSNorm(8), "linear": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model["linear"].parameters(), lr=0.1)
    normzoo.convert(model, "rms_norm", bias=True, optimizer=optimizer)
    assert model["norm"].bias is not None and len(optimizer.param_groups[0]["params"]) == 2


def test_attributes_that_are_none_come_along():
    class Spare(nn.LayerNorm):
        def __init__(self):
            super().__init__(8)
            self.register_parameter("spare", None)
            self.register_buffer("cache", None)

    new = normzoo.convert(Spare())
    assert new.spare is None and new.cache is None and new.state_dict().keys() == {"weight", "bias"}


def test_a_state_dict_of_its_own_stays():
    class Versioned(nn.LayerNorm):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            pass

    step, _ = normzoo.plan(nn.Sequential(Versioned(8), nn.LayerNorm(8))).steps
    assert step.action == "refuse" and "a get_extra_state and a set_extra_state of its own" in step.reason


def test_pruned_and_parametrized_norms_stay():
    class Scaled(nn.Module):
        def forward(self, x):
            return 2 * x

    pruned, parametrized = nn.LayerNorm(8), OnePlusNorm()
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrize.register_parametrization(parametrized, "gamma", Scaled())
    first, second, _ = normzoo.plan(nn.Sequential(pruned, parametrized, nn.LayerNorm(8))).steps
    assert "its weight is computed, not stored" in first.reason
    assert second.action == "unknown" and "it is parametrized" in second.site.note


def test_references_in_containers_and_functions_are_found():
    for hide in (
        lambda norm: [[norm]],
        lambda norm: {"a": (norm,)},
        functools.partial,
        lambda norm: lambda x: norm(x),
    ):
        model = Net()
        model.hidden = hide(model.rms)
        steps = {step.site.name: step for step in normzoo.plan(model).steps}
        assert steps["rms"].reason.startswith("hidden holds it too") and steps["norm"].action == "convert"


def test_none_keeps_what_is_unknown():
    class OddNorm(nn.Module):
        def forward(self, x):
            return x.sin()

    model = nn.ModuleDict({"a": nn.LayerNorm(8), "b": OddNorm()})
    normzoo.convert(model, {"b": None, "_default": "same"}, strict=True)
    asked = []
    with pytest.raises(ValueError, match="strict=True"):
        normzoo.convert(model, lambda site: asked.append(site.norm.eps) or "rms_norm", strict=True)
    assert asked == [1e-5]


@pytest.mark.parametrize("shared", [True, False])
def test_a_module_has_one_place(shared):
    model, new = Net(), nn.Identity()
    before = list(model.modules())

    def to(site):
        return new if shared else model.rms if site.name == "norm" else None

    with pytest.raises(
        ValueError, match="in the model already, or that it returned for another norm; return a"
    ):
        normzoo.plan(model, to)
    assert list(model.modules()) == before


class Wrapped(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.shift = norm, nn.Linear(8, 8)

    def forward(self, x):
        return self.shift(self.norm(x))


def test_a_module_around_the_norm():
    model, x = Net(), torch.randn(4, 8)
    model.norm.register_forward_hook(lambda *_: None)
    old, parameters = model.norm, list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    made = normzoo.plan(model, lambda site: Wrapped(site.module), types="layer")
    assert "stay behind" not in str(made) and not made.verify(x).same
    made.apply(optimizer)
    known = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert known == {id(p) for p in model.parameters()} and len(known) == len(parameters) + 2
    made.revert()
    assert model.norm is old and optimizer.param_groups[0]["params"] == parameters
    other = normzoo.plan(model, lambda site: nn.LayerNorm(8), types="layer")
    assert other.steps[0].reason == "its forward_hooks stay behind"


def test_modules_of_the_caller_on_meta_are_not_measured():
    with torch.device("meta"):
        model = Net()
        (step, _) = normzoo.plan(model, lambda site: nn.LayerNorm(8)).steps
    assert step.exactness is Exactness.APPROXIMATE and step.error is None
    assert step.reason == "not measured, as it is on meta"


def test_a_second_conversion_over_channels_says_so():
    class Norm2d(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    model = normzoo.convert(nn.Sequential(Norm2d(6)))
    with pytest.raises(ValueError, match="it is normzoo's layer_norm already"):
        normzoo.convert(model)


def test_a_norm_that_changed_since_the_plan():
    model = Net()
    made = normzoo.plan(model)
    model.norm.eps = 0.5
    with pytest.raises(
        ValueError,
        match=r"since the plan was made: 'norm' computes layer \(8,\), eps=0.5 and computed layer",
    ):
        made.apply()
    assert type(model.rms) is nn.RMSNorm


def test_tensors_that_came_after_the_conversion():
    model, x = Net(), torch.randn(4, 8)
    model.norm.register_buffer("seen", torch.zeros(1))
    made = normzoo.plan(model)
    made.apply()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    assert made.verify(x).same
    model.double()
    made.revert()
    assert model.norm.seen.dtype == torch.float64 and model.norm.seen == 1
    assert model(x.double()).isfinite().all()


def test_an_optimizer_edited_half_way_is_put_back(monkeypatch):
    model = nn.Sequential(OnePlusNorm(), OnePlusNorm())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    before, state = list(model.parameters()), copy.deepcopy(optimizer.state_dict())
    home, calls = normzoo.conversion.surgery._home, []

    def fail_second(*args):
        calls.append(args)
        return home(*args) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(normzoo.conversion.surgery, "_home", fail_second)
    with pytest.raises(ZeroDivisionError):
        normzoo.convert(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"] == before == list(model.parameters())
    assert optimizer.state.keys() == set(before)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]


def test_an_optimizer_is_one():
    model = Net()
    with pytest.raises(TypeError, match=r"optimizer is a str; it must be a torch\.optim\.Optimizer"):
        normzoo.convert(model, optimizer="adam")
    assert type(model.norm) is nn.LayerNorm


class Noisy(Net):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape)


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


class Overwriting(Net):
    def forward(self, x):
        return super().forward(x.add_(1))


@pytest.mark.parametrize("cls", [Noisy, Counting, Overwriting])
def test_a_proof_compares_like_with_like(cls):
    model, x = cls(), torch.randn(4, 8)
    random, state, given = torch.get_rng_state(), copy.deepcopy(model.state_dict()), x.clone()
    for made in (normzoo.plan(model), normzoo.plan(model, "rms_norm", types="layer")):
        proof = made.verify(x)
        assert proof.same == (made.exactness == "exact") and proof.passed
        assert proof.rounding <= 1e-5
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, given)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_never_repeats_itself_proves_nothing():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model, x = Counting(), torch.randn(4, 8)
    with pytest.raises(ValueError, match="the model returns another output each time it runs on this sample"):
        normzoo.convert(model, verify=x)
    grown = []
    with pytest.raises(ValueError, match="another output each time"):  # a cache, as it were
        normzoo.plan(Net()).verify(lambda model: grown.append(model(x)) or torch.cat(grown))
    assert type(model.norm) is nn.LayerNorm


def test_entries_that_are_not_finite():
    class Masked(Net):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat((torch.full((1, 8), -torch.inf), torch.full((1, 8), torch.nan), y[2:]))

    class Lost(Net):
        def forward(self, x):
            return super().forward(x) * torch.nan

    x = torch.randn(4, 8)
    proof = normzoo.plan(Masked()).verify(x)
    assert proof.same and proof.error <= 1e-5 and proof.cosine > 0.9999
    assert not normzoo.plan(Masked(), "rms_norm", types="layer").verify(x).same
    with pytest.raises(ValueError, match="every output is zero on this sample, or not finite"):
        normzoo.plan(Lost()).verify(x)


def test_a_norm_that_turns_nan_fails(monkeypatch):
    class Masked(Net):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(8) == 0, torch.nan)

    model, x = Masked(), torch.randn(4, 8)
    made = normzoo.plan(model)
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * torch.nan)
    proof = made.verify(x)
    assert not proof.passed and proof.error == torch.inf


def test_norms_that_do_not_run_are_counted():
    class Branch(Net):
        def forward(self, x):
            return self.rms(self.linear(x))

    proof = normzoo.plan(Branch()).verify(torch.randn(4, 8))
    assert proof.idle == 1 and str(proof).endswith("; 1 converted norm did not run on this sample")
    assert normzoo.plan(Net()).verify(torch.randn(4, 8)).idle == 0


def test_dataclasses_are_looked_into():
    @dataclasses.dataclass
    class Output:
        hidden: torch.Tensor
        rest: tuple

    class Structured(Net):
        def forward(self, x):
            return x, Output(super().forward(x), (None, 3))

    proof = normzoo.plan(Structured(), "rms_norm", types="layer").verify(torch.randn(4, 8))
    assert len(proof.outputs) == 2 and not proof.same


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_proof_of_nested_tensors():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    sample = {"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}
    assert normzoo.plan(model).verify(sample).same
    assert not normzoo.plan(model, "rms_norm").verify(sample).same


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_layer_over_channels_goes_everywhere():
    class Norm2d(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    model = normzoo.convert(nn.Sequential(Norm2d(6)))
    x = torch.randn(2, 6, 4, 4)
    wanted = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (x,)).module()
    for run in (compiled, exported, copy.copy(model), nn.DataParallel(model)):
        torch.testing.assert_close(run(x), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], wanted, rtol=0, atol=1e-6)


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


MODEL, SAMPLE = nn.Sequential(nn.LayerNorm(8), OnePlusNorm(), FloatNorm()), torch.randn(4, 8)


def test_the_surroundings_do_not_matter(surroundings):
    made = normzoo.plan(MODEL)
    assert [step.exactness for step in made.changes] == ["exact", "eval-exact", "exact"]
    assert made.verify(SAMPLE).same
    assert not normzoo.plan(MODEL, "rms_norm").verify(SAMPLE).same


def test_stored_activations_are_no_obstacle():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), OnePlusNorm())
    for norm in (model[1], model[2]):
        norm.register_forward_hook(lambda module, args, y: setattr(module, "seen", y))
    model(torch.randn(2, 8))
    assert len(normzoo.plan(model).changes) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_outputs_of_every_kind():
    class Transformed(Net):
        def forward(self, x):
            y = super().forward(x)
            return torch.fft.fft(y), y.to_sparse(), torch.nested.as_nested_tensor([y[:1], y])

    proof = normzoo.plan(Transformed(), "rms_norm", types="layer").verify(torch.randn(4, 8))
    assert len(proof.outputs) == 3 and all(each.error > 1e-3 for each in proof.outputs)
    lazy = nn.Sequential(nn.LayerNorm(8), nn.LazyBatchNorm1d())
    assert normzoo.plan(lazy).verify(torch.randn(4, 8)).same
    with pytest.raises(ValueError, match="verify: the model is on the meta device"):
        normzoo.plan(Net().to("meta")).verify(torch.empty(4, 8, device="meta"))


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
    class TwoNorm(OnePlusNorm):
        def __init__(self):
            super().__init__()
            self.eps, self.momentum = 1e-5, 1.0000001e-5

    (site,) = normzoo.inspect(TwoNorm()).sites
    assert site.norm is None and "it fits several norms" in site.note


def test_norms_of_several_widths_are_not_alike():
    sites = normzoo.inspect(nn.Sequential(OnePlusNorm(8), OnePlusNorm(16))).sites
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


def test_options_that_show_nothing_yet():
    model = nn.Sequential(nn.RMSNorm(8)).bfloat16().requires_grad_(False)
    made = normzoo.plan(model, bias=True)
    assert made.exactness == "approximate" and made.steps[0].tensors["new"] == ("bias",)
    made.apply()
    assert model[0].bias.dtype == torch.bfloat16 and not model[0].bias.requires_grad
    (step,) = normzoo.plan(nn.RMSNorm(8), functools.partial(normzoo.RMSNorm, eps=0.1), eps=0.2).steps
    assert step.make().module.eps == 0.2


def test_named_parameters_leave_with_their_names():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    normzoo.convert(model, "rms_norm", bias=False, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["0.weight", "1.weight", "1.bias"] and len(group["params"]) == 3


def test_shared_frozen_parameters_are_not_untied():
    model = nn.Sequential(OnePlusNorm(), nn.LayerNorm(8), nn.Linear(8, 8))
    model[2].bias = model[0].gamma
    step, _ = normzoo.plan(model.requires_grad_(False)).steps
    assert "another module shares its parameters" in step.reason


def test_rules_by_expression_match_in_full():
    with pytest.raises(ValueError, match="the rule 're:no' matches no norm"):
        normzoo.plan(Net(), {"re:no": "rms_norm"})


def test_the_eps_of_float64():
    (step,) = normzoo.plan(nn.RMSNorm(8, dtype=torch.float64), "layer_norm").steps
    assert step.make().module.eps == torch.finfo(torch.float64).eps


def test_a_row_of_the_table_has_the_largest_error():
    made = normzoo.plan(nn.Sequential(nn.RMSNorm(8), nn.RMSNorm(8)), "layer_norm")
    for step, error in zip(made.steps, (0.25, 0.125), strict=True):
        step.error = error
    assert "x2" in str(made) and "2.5e-01" in str(made)


def test_a_proof_allows_for_what_rounding_becomes():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = FloatNorm()

        def forward(self, x):
            return (1e4 * self.norm(x)).sin()

    proof = normzoo.plan(Steep()).verify(torch.randn(64, 8))
    assert proof.same and proof.error > 1e-4 and proof.rounding > 1e-4
    double = nn.Sequential(FloatNorm()).double()
    assert normzoo.plan(double).verify(torch.randn(64, 8, dtype=torch.float64)).same
    low = nn.Sequential(FloatNorm()).bfloat16()
    assert normzoo.convert(low, verify=torch.randn(64, 8, dtype=torch.bfloat16))[0].cast == "llama"


def test_rounding_without_bound_proves_nothing():
    y = torch.ones(2)
    wild = torch.tensor([1.0, torch.inf])
    before, rounded, after = ({"output": t} for t in (y, wild, 2 * y))
    assert not compare(before, rounded, before, after, exact=True, idle=0).same
    assert compare(before, rounded, before, before, exact=True, idle=0).same


def test_a_conversion_that_claims_no_more_passes():
    model = normzoo.convert(Net(), "rms_norm", verify=torch.randn(4, 8))
    assert type(model.norm) is normzoo.RMSNorm
