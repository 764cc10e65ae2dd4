"""Recipes: every layer made again, every conversion of a small model, and what stays the very same object."""

import copy
import functools
import json
import logging

import pytest
import torch
from small_models import Net
from torch import nn
from torch.nn.utils import parametrize
from zoo_cases import sample_for, trained

import normzoo
from normzoo.centering import ZeroMean, with_zero_mean
from normzoo.conversion import TRANSFERS, bake
from normzoo.recipes import recipe_of, refitting
from normzoo.zoo import ZOO

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
    )


def stirred(model):
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.add_(torch.rand_like(t) / 4)
    return model


def through_text(model):
    return json.loads(json.dumps(recipe_of(model)))


def again(make, change, call, case=""):
    """A fresh model after recipe and weights of a converted one, which it must equal to the last bit."""
    torch.manual_seed(1)
    fresh = make()
    model = stirred(change(make()))
    recipe = through_text(model)
    chance = torch.get_rng_state()
    fresh = normzoo.apply_recipe(fresh, recipe)
    assert torch.equal(torch.get_rng_state(), chance), case
    fresh.load_state_dict(model.state_dict())
    assert recipe_of(fresh) == recipe and repr(fresh) == repr(model), case
    for mode in (True, False):
        outputs = []
        for each in (model, fresh):
            torch.manual_seed(2)
            outputs.append(call(each.train(mode)))
        assert torch.equal(*outputs), case
    assert recipe_of(normzoo.apply_recipe(fresh, recipe)) == recipe, case
    return fresh, model


def test_every_layer_from_its_arguments():
    for entry in ZOO:
        if entry.family == "weights":
            continue
        for kwargs in entry.variants:
            for cls in entry.classes:
                layer, x = trained(entry, kwargs, cls), sample_for(entry, cls)
                new = normzoo.apply_recipe(nn.Identity(), through_text(layer))
                case = f"{cls.__name__} {kwargs}"
                assert type(new) is cls and new.extra_repr() == layer.extra_repr(), case
                new.load_state_dict(layer.state_dict())
                buffers = [dict(each.named_buffers()) for each in (layer, new)]
                assert buffers[0].keys() == buffers[1].keys(), case
                beside = entry.beside(x)
                assert torch.equal(new.eval()(x, **beside), layer.eval()(x, **beside)), case


def test_every_carrier_of_a_weight():
    for entry in ZOO:
        for cls in entry.carriers:
            how = {} if cls is normzoo.WSLinear else {"kernel_size": 3, "stride": 2, "padding": 1}
            for more in ({}, {"bias": False, "variant": "scaled", "gamma": 1.5}, {"variant": "bit"}):
                layer = cls(4, 6, **how, **more)
                new = normzoo.apply_recipe(layer.torch_class(4, 6, **how), through_text(layer))
                assert type(new) is cls and new.extra_repr() == layer.extra_repr(), (cls, more)
                new.load_state_dict(layer.state_dict())
                assert torch.equal(new.standardized(), layer.standardized())


def run(to, model):
    """The layer called `to` in a model that takes images or rows."""
    x = IMAGES if any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()) else ROWS
    given = {"region_norm_b": {"mask": IMAGES[:, :1] > 0}}
    given |= {f"time_dependent_{kind}_norm": {"t": torch.rand(3)} for kind in ("layer", "rms")}
    if to not in given:
        return model(x)
    with normzoo.inputs(model, **given[to]):
        return model(x)


NEEDED = {
    "ghost_batch_norm": {"ghost_batch_size": 2},
    "adab2n": {"num_tasks": 3},
    "batch_channel_norm": {"num_groups": 2},
    "group_norm": {"num_groups": 2},
}
STARTS = {"batch": cnn, "layer": Net, "rms": Net}


@pytest.mark.parametrize("family", STARTS)
def test_every_conversion(family, caplog):
    caplog.set_level(logging.ERROR, "normzoo")
    targets = [to for start, to in TRANSFERS if start == family]
    for to in targets:
        types = {"batch": None, "layer": "layer", "rms": "rms"}[family]
        change = functools.partial(normzoo.convert, to=to, types=types, **NEEDED.get(to, {}))
        again(STARTS[family], change, functools.partial(run, to), to)
    assert len(targets) > (15 if family == "batch" else 2)


def both(*changes):
    return lambda model: functools.reduce(lambda m, change: change(m), changes, model)


class ChannelNorm(nn.LayerNorm):
    """Over dimension 1, as ConvNeXt has it."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def parametrized(model):
    for i in (0, 3):
        how = normzoo.WeightStandardization("scaled", outputs=8, gamma=1.5)
        parametrize.register_parametrization(model[i], "weight", how)
    return model


def rested(model):
    model[1].track_running_stats = False
    return normzoo.convert(model)


standardized = functools.partial(normzoo.convert, to="weight_standardize")
ghosts = functools.partial(normzoo.convert, to="ghost_batch_norm", ghost_batch_size=2)
CONVERSIONS = {
    "standardized, then baked": (cnn, both(standardized, bake)),
    "baked alone": (both(lambda _: cnn(), standardized), bake),
    "parametrized": (cnn, parametrized),
    "both": (cnn, both(parametrized, ghosts)),
    "a conversion in a conversion": (cnn, both(ghosts, lambda m: normzoo.convert(m, "alpha_batch_norm"))),
    "over channels": (
        lambda: nn.Sequential(ChannelNorm(3)),
        lambda m: normzoo.convert(m, "rms_norm", bias=True),
    ),
    "switched off statistics": (cnn, rested),
    "nonfinite": (cnn, lambda m: normzoo.convert(m, nonfinite="skip")),
    "any rank": (lambda: nn.Sequential(normzoo.FrozenBatchNorm(3)), lambda m: normzoo.convert(m, "batch_norm")),
    "one of two": (cnn, lambda m: normzoo.convert(m, "group_norm", include="4", num_groups=4)),
}


def test_other_conversions(caplog):
    caplog.set_level(logging.ERROR, "normzoo")
    for case, (make, change) in CONVERSIONS.items():
        again(
            functools.partial(make, None) if case == "baked alone" else make, change, lambda m: m(IMAGES), case
        )


def test_frozen_norms_can_be_given_back():
    for change, cls in ((lambda m: m, nn.BatchNorm2d), (ghosts, normzoo.GhostBatchNorm)):
        fresh, model = again(cnn, both(change, normzoo.freeze_batch_norm), lambda m: m(IMAGES))
        assert fresh[4].weight is None and not fresh[4].state_dict().keys() & {"weight", "bias"}
        for each in (fresh, model):
            normzoo.unfreeze_batch_norm(each)
            assert type(each[1]) is cls and type(each[4]) is cls
        assert fresh[1].extra_repr() == model[1].extra_repr()
        assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))
        fresh.train()(IMAGES).sum().backward()
        assert fresh[1].weight.grad is not None


def test_folded_norms():
    class Act(nn.BatchNorm2d):
        """Its own activation behind a norm."""

        def __init__(self, *args):
            super().__init__(*args)
            self.act = nn.Hardswish()

        def forward(self, x):
            return self.act(super().forward(x))

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), Act(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        ).eval()

    fresh, _ = again(make, lambda m: normzoo.fold(stirred(m)), lambda m: m(IMAGES))
    assert fresh[0].bias.shape == (8,) and type(fresh[1].act) is nn.Hardswish and fresh[1].then == ("act",)


class Shared(nn.Module):
    """One norm under several names and parents, and another that shares a parameter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(8, 8), self.norm)
        self.twice = nn.ModuleList([self.block, self.block])
        self.other = nn.LayerNorm(8)
        self.other.weight = self.norm.weight

    def forward(self, x):
        for block in self.twice:
            x = block(x)
        return self.other(x)


def test_shared_modules_and_a_model_that_is_a_norm():
    fresh, _ = again(Shared, lambda m: normzoo.convert(m, "layer_norm"), lambda m: m(ROWS))
    assert fresh.norm is fresh.block[1] is fresh.twice[1][1] and type(fresh.norm) is normzoo.LayerNorm
    assert fresh.other.weight is fresh.norm.weight and fresh.other.bias is not fresh.norm.bias
    root, _ = again(
        lambda: nn.LayerNorm(8), lambda m: normzoo.convert(m, "rms_norm", bias=True), lambda m: m(ROWS)
    )
    assert type(root) is normzoo.RMSNorm


def test_activations_of_evonorm():
    def change(model):
        return normzoo.convert(model, "evo_norm_s1", act_layer=nn.ELU, groups=2, eps=1e-2)

    fresh, _ = again(cnn, change, lambda m: m(IMAGES))
    assert type(fresh[1].act) is nn.ELU and type(fresh[2]) is nn.Identity
    recipe = recipe_of(fresh)
    gated = nn.Sequential(*[*cnn()][:2], nn.Dropout(0.1), *[*cnn()][3:])
    assert type(normzoo.apply_recipe(gated, recipe)[2]) is nn.Dropout  # is no activation, but the model's own
    own = normzoo.convert(cnn(), "evo_norm_s1", act_layer=lambda: nn.ELU(0.5), groups=2)
    with pytest.raises(
        ValueError, match=r"'1': it has a child act of the norm .* a BatchNorm2d without one stands"
    ):
        normzoo.apply_recipe(cnn(), recipe_of(own))


def test_encoder_layers_without_their_fast_path():
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    fresh, _ = again(make, lambda m: normzoo.convert(m, "rms_norm"), lambda m: m(ROWS))
    assert fresh.layers[1].activation_relu_or_gelu == 0 and not fresh.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(fresh(ROWS), fresh.requires_grad_(False)(ROWS))


def test_tensors_stay_the_objects_that_they_are():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8))
    recipe = recipe_of(
        normzoo.convert(copy.deepcopy(model), {"1": "rms_norm", "2": "time_dependent_layer_norm"})
    )
    model[1].note, held, seen = "mine", dict(model.named_parameters()), []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    model.eval()[2].requires_grad_(False)
    normzoo.apply_recipe(model, recipe)
    now = dict(model.named_parameters())
    assert all(now[name] is held[name] for name in ("0.weight", "0.bias", "1.weight"))
    assert not model[1].training and model[1].note == "mine"
    assert model[:2](ROWS).shape == ROWS.shape and seen == [1]
    handle.remove()
    assert model[:2](ROWS).shape == ROWS.shape and seen == [1]
    assert not any(p.requires_grad for p in model[2].parameters())


def test_dtypes_are_those_of_the_model_unless_a_conversion_chose_them():
    def make(dtype=torch.bfloat16):
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)).to(dtype)

    model = normzoo.convert(make(), {"1": "time_dependent_layer_norm", "2": "rms_norm"})
    model[1].float()
    recipe = through_text(model)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert {name: t.dtype for name, t in normzoo.apply_recipe(make(), recipe).state_dict().items()} == dtypes
    wide = normzoo.apply_recipe(make(torch.float64), recipe)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float64}
    power = normzoo.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "power_norm")
    half = normzoo.apply_recipe(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).half(), recipe_of(power))
    assert (half[1].weight.dtype, half[1].running_phi.dtype) == (torch.float16, torch.float32)


def test_on_the_meta_device():
    for to in ("power_norm", "weight_standardize", "evo_norm_b0", "same"):
        how = {"nonfinite": "skip"} if to == "same" else {}
        model = stirred(normzoo.convert(cnn(), to, **how)).eval()
        with torch.device("meta"):
            fresh = cnn().eval()
        fresh = normzoo.apply_recipe(fresh, recipe_of(model))
        assert all(t.is_meta for t in (*fresh.parameters(), *fresh.buffers())), to
        fresh.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(fresh(IMAGES), model(IMAGES)), to


class Tied(nn.Module):
    """Writers and readers of a stream, and a head that shares the weight of the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embedding = nn.Embedding(9, 8)
        self.mix = nn.Conv1d(8, 8, 1, bias=False)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.embedding(x) + self.token
        h = h + self.mix(h.mT).mT
        h = h + self.outer(self.inner(self.norm(h)).relu())
        return h @ self.head.weight.mT


def compressed(model):
    """By hand what leaves all kinds of marks: other shapes, a new bias, an embedding untied."""
    model.token = nn.Parameter(torch.randn(1, 1, 7))
    for name, shape in {"embedding": (9, 7), "mix": (7, 7, 1), "inner": (16, 7), "outer": (7, 16)}.items():
        getattr(model, name).weight = nn.Parameter(torch.randn(shape))
    model.outer.bias = nn.Parameter(torch.randn(7))
    model.embedding.embedding_dim, model.inner.in_features, model.outer.out_features = 7, 7, 7
    model.mix.in_channels = model.mix.out_channels = 7
    model.norm = normzoo.CRMSNorm(7, eps=1e-3)
    model.head = nn.Linear(7, 9, bias=False)
    return model


def centered(model):
    model.embedding.__class__ = with_zero_mean(nn.Embedding, -1)
    model.norm = normzoo.RMSNorm(8)
    for module, name, dim in ((model.outer, "weight", 0), (model.mix, "weight", 0), (model, "token", -1)):
        parametrize.register_parametrization(module, name, ZeroMean(dim))
    return model


def test_other_shapes_biases_ties_and_means():
    words = torch.randint(9, (2, 5))
    fresh, _ = again(Tied, compressed, lambda m: m(words))
    assert fresh.outer.bias.requires_grad and "in_features=7" in repr(fresh.inner)
    assert fresh.head.weight is not fresh.embedding.weight
    fresh, _ = again(Tied, centered, lambda m: m(words))
    assert fresh.head.weight is fresh.embedding.weight and type(fresh.embedding).__name__ == "ZeroMeanEmbedding"
    fresh, _ = again(functools.partial(Tied, False), lambda _: centered(Tied()), lambda m: m(words))
    assert fresh.head.weight is fresh.embedding.weight
    fresh, _ = again(Tied, lambda m: normzoo.convert(Tied(False), "layer_norm"), lambda m: m(words))
    assert fresh.head.weight is not fresh.embedding.weight


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, recipe = Tied(), recipe_of(centered(Tied()))
    before = {m: (type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()}
    for step in ("tie", "reshape", "differences", "describe"):
        with monkeypatch.context() as patch:
            patch.setattr(refitting, step, lambda *_: (_ for _ in ()).throw(RuntimeError("luck")))
            with pytest.raises(RuntimeError, match="luck"):
                normzoo.apply_recipe(model, recipe)
        now = {m: (type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()}
        assert now == before, step
