"""Putting norms into a model and taking them out: all of it, or nothing, and nobody left behind."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from small_models import Chain, GammaNorm, Net
from torch import nn
from torch.nn.utils import parametrize, prune

import normzoo


def test_revert_is_bitwise():
    model = Net().eval()
    model.blocks[1].train()
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    made = normzoo.plan(model, "rms_norm")
    assert made.apply() is model and made.applied and list(model.modules()) != modules
    assert made.revert() is model and not made.applied
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.blocks[1].modules()] == [True] * 4 and not model.rms.training
    made.apply()
    with pytest.raises(ValueError, match="this plan was applied already"):
        made.apply()
    made.revert()
    with pytest.raises(ValueError, match="this plan is not applied"):
        made.revert()


def test_the_root_comes_and_goes():
    norm = nn.LayerNorm(4)
    made = normzoo.plan(norm)
    new = made.apply()
    assert type(new) is normzoo.LayerNorm and new.weight is norm.weight
    assert made.verify(torch.randn(2, 4)).same
    assert made.revert() is norm


def test_a_plan_for_a_model_that_changed_does_nothing():
    model = Net()
    made = normzoo.plan(model)
    model.blocks[2].ln_2 = nn.Identity()
    with pytest.raises(ValueError, match=r"has changed since the plan was made: 1 module\(s\).*\(LayerNorm\)"):
        made.apply()
    assert type(model.rms) is nn.RMSNorm and type(model.blocks[0].ln_1) is nn.LayerNorm and not made.applied
    made = normzoo.plan(model)
    made.apply()
    model.rms = nn.Identity()
    with pytest.raises(ValueError, match="has changed since the plan was made"):
        made.revert()
    assert type(model.blocks[0].ln_1) is normzoo.LayerNorm


def test_an_apply_that_fails_half_way_leaves_the_model(monkeypatch):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    modules, groups = list(model.modules()), [list(group["params"]) for group in optimizer.param_groups]
    made = normzoo.plan(model)
    monkeypatch.setattr(normzoo.conversion.surgery, "_home", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.apply(optimizer)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True)) and not made.applied
    assert groups == [list(group["params"]) for group in optimizer.param_groups]


def test_references_beside_the_tree_are_found():
    model = Net()
    model.remembered = [model.rms]
    object.__setattr__(model, "call", model.blocks[0].ln_1.forward)
    made = normzoo.plan(model)
    refused = {step.site.name: step.reason for step in made.steps if step.action == "refuse"}
    assert refused.keys() == {"rms", "blocks.0.ln_1"}
    assert refused["rms"].startswith("remembered holds it too, outside the module tree")
    assert refused["blocks.0.ln_1"].startswith("call holds it too")


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=not norm_first).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_call_a_changed_norm(norm_first, masked):
    model = encoder(norm_first)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if masked else None
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=mask)
    flags = {site.name: site.flags for site in normzoo.inspect(model).sites}
    assert (
        flags["layers.1.norm2"] == ["its encoder layer computes it itself in eval mode"] and not flags["norm"]
    )
    made = normzoo.plan(model, "rms_norm", exclude="layers.1.norm2")
    turned = "its encoder layer would compute it itself in eval mode: its fast path is turned off"
    assert [step.site.flags for step in made.steps] == [[turned]] * 4 + [[]]
    made.apply()
    assert not any(site.flags for site in normzoo.inspect(model).sites)  # they are called from now on
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask).detach()  # with gradients no fast path is taken
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[valid], slow[valid], rtol=0, atol=1e-5)
    assert (fast - wanted)[valid].abs().max() > 1e-2
    made.revert()
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), wanted)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


@pytest.mark.parametrize("norm", [normzoo.PowerNorm(16), normzoo.UnifiedNorm(16), nn.RMSNorm(16)], ids=str)
def test_a_norm_put_by_hand_into_an_encoder_layer(norm, monkeypatch):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    layer.norm2 = norm
    if isinstance(norm, nn.RMSNorm):
        norm.eps, norm.bias = layer.norm1.eps, nn.Parameter(torch.zeros(16))
    layer.eval()
    x = 3 * torch.randn(2, 5, 16)
    wanted = layer(x)
    with torch.no_grad():
        assert (layer(x) - wanted).abs().max() > 1e-2  # of torch's LayerNorm
    flags = {site.name: site.flags for site in normzoo.inspect(layer).sites}
    (said,) = flags["norm2"]
    assert "computes a LayerNorm in its place" in said and "WRONG" in said
    assert flags["norm1"] == ["its encoder layer computes it itself in eval mode"]
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
    assert not any(site.flags for site in normzoo.inspect(layer).sites)


def test_encoder_layers_keep_the_fast_path_of_the_same_norm():
    model = encoder()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        wanted = model(x)
        normzoo.convert(model)
        assert torch.equal(model(x), wanted)
    assert type(model.layers[0].norm1) is normzoo.LayerNorm and model.layers[0].activation_relu_or_gelu == 1


class Mixer(nn.Module):
    """Hands the weight of its norm to a fused function."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.other = nn.LayerNorm(width)

    def forward(self, x):
        x = x.to(self.other.weight.dtype)
        return self.other(F.rms_norm(x, (8,), self.norm.weight, self.norm.eps))


def test_parents_that_read_the_weight():
    model = nn.Sequential(Mixer())
    norm, other = normzoo.inspect(model).sites
    assert norm.flags == ["Mixer reads its eps, weight itself"] and other.flags == []
    same = normzoo.plan(model)
    assert [step.action for step in same.steps] == ["convert", "convert"]
    x = torch.randn(3, 8)
    assert same.verify(x).same
    changed = normzoo.plan(model, "layer_norm")
    assert [step.action for step in changed.steps] == ["refuse", "convert"]
    assert "Mixer reads its eps and may compute the norm itself, as it was" in changed.steps[0].reason


def test_pruned_and_parametrized_norms_stay():
    class Scaled(nn.Module):
        def forward(self, x):
            return 2 * x

    pruned, parametrized = nn.LayerNorm(8), GammaNorm()
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
        model = Chain()
        model.hidden = hide(model.rms)
        steps = {step.site.name: step for step in normzoo.plan(model).steps}
        assert steps["rms"].reason.startswith("hidden holds it too") and steps["norm"].action == "convert"


@pytest.mark.parametrize("shared", [True, False])
def test_a_module_has_one_place(shared):
    model, new = Chain(), nn.Identity()
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
    model, x = Chain(), torch.randn(4, 8)
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


def test_a_norm_that_changed_since_the_plan():
    model = Chain()
    made = normzoo.plan(model)
    model.norm.eps = 0.5
    with pytest.raises(
        ValueError,
        match=r"since the plan was made: 'norm' computes layer \(8,\), eps=0.5 and computed layer",
    ):
        made.apply()
    assert type(model.rms) is nn.RMSNorm


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
