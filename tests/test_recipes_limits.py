"""Recipes: what they do not touch, do not make, and do not tie again."""

import copy
import resource

import pytest
import torch
from stream_models import GPT, IDS, error, run, stirred
from torch import nn

import normzoo
from normzoo.conversion.layouts import layout_of
from normzoo.recipes import recipe_of, refitting
from normzoo.residual import plan_rewrite


def pair():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def test_copies_and_refused_recipes_of_parametrized_modules():
    base = GPT()
    for block in base.blocks:
        nn.utils.parametrizations.weight_norm(block.attention.out)
    base = stirred(base)
    before, recipe = run(base, IDS), copy.deepcopy(base)
    recipe = recipe_of(normzoo.to_pre_rms_norm(recipe, IDS, zero_mean_writers="parametrize"))
    fresh = normzoo.apply_recipe(copy.deepcopy(base), recipe)
    assert torch.equal(run(base, IDS), before)
    assert error(run(fresh, IDS), before) < 1e-6
    del recipe["tensors"]["head.weight"]
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"head\.weight"):
        normzoo.apply_recipe(base, recipe)
    assert [type(module) for module in base.modules()] == kinds and torch.equal(run(base, IDS), before)


class Column(nn.Linear):
    """Half of the outputs, as in tensor-parallel models, where `out_features` counts all."""

    def __init__(self):
        super().__init__(8, 4, bias=False)
        self.out_features = 8


class Packed(nn.Linear):
    """Two numbers a byte."""

    def __init__(self):
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def test_layers_that_a_recipe_is_not_about_stay():
    for layer, sizes in ((Column, (8, 8)), (Packed, (4, 4))):

        def make(layer=layer):
            return nn.Sequential(layer(), nn.LayerNorm(4))

        fresh = normzoo.apply_recipe(make(), recipe_of(normzoo.convert(make(), "rms_norm", bias=True)))
        assert type(fresh[1]) is normzoo.RMSNorm
        assert (fresh[0].in_features, fresh[0].out_features) == sizes


class Conv1D(nn.Module):
    """Not that of Hugging Face: its weight has the outputs first."""

    def __init__(self):
        super().__init__()
        self.nf, self.weight = 3, nn.Parameter(torch.zeros(3, 5))


def test_layouts_go_by_the_type():
    found = {
        nn.Linear(2, 3): 0,
        nn.Conv2d(4, 6, 1, groups=2): 0,
        nn.ConvTranspose2d(4, 6, 1, groups=2): 1,
        nn.Embedding(2, 3): 1,
        nn.EmbeddingBag(2, 3): 1,
    }
    for module, out in found.items():
        layout = layout_of(module)
        names = [getattr(module, name) for name in layout.attributes]
        assert layout.out == out, module
        assert (names[0], names[1] // getattr(module, "groups", 1)) == module.weight.shape[:2], module
    assert layout_of(Conv1D()) is None and layout_of(nn.Bilinear(2, 3, 4)) is None
    theirs = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    assert layout_of(theirs()).out == 1 and layout_of(theirs()).attributes == ("nx", "nf")


def test_what_would_be_made_is_counted_first():
    huge = {"normalized_shape": 10**8, "eps": 1e-5, "elementwise_affine": True, "bias": False}
    recipe = recipe_of(normzoo.convert(pair(), "rms_norm", bias=True))
    recipe["layers"][0] |= {"layer": "RMSNorm", "arguments": huge}
    recipe["tensors"] = {name: t for name, t in recipe["tensors"].items() if not name.startswith("1.")}
    frozen = recipe_of(normzoo.freeze_batch_norm(nn.Sequential(nn.BatchNorm1d(4))))
    old = {"layer": "RMSNorm", "arguments": huge, "sources": {"weight": "weight"}}
    frozen["layers"][0]["frozen_from"] = old
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for model, each in ((pair(), recipe), (nn.Sequential(nn.BatchNorm1d(4)), frozen)):
        said = repr(model)
        with pytest.raises(ValueError, match=r"would add 100000000 entries|which no conversion makes"):
            normzoo.apply_recipe(model, each)
        assert repr(model) == said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_layer_has_its_tensors_in_the_recipe():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    recipe = recipe_of(normzoo.convert(make(), "power_norm"))
    del recipe["tensors"]["1.running_phi"]
    with pytest.raises(ValueError, match="'1': a PowerNorm has a running_phi, and the recipe has none for it"):
        normzoo.apply_recipe(make(), recipe)


def test_dimensions_of_centered_outputs():
    for dim, words in ((99, "is 99; it"), (10**30, "is 1000"), (-9, "is -9; it"), (8, "is 8; it")):
        recipe = recipe_of(pair()) | {"centered_outputs": [{"names": ["0"], "dim": dim}]}
        with pytest.raises(ValueError, match=rf"centered_outputs\[0\]\.dim {words}.*must be from -8 to 7"):
            normzoo.apply_recipe(pair(), recipe)


def test_what_a_norm_was_given_comes_along():
    fresh, recipe = pair(), recipe_of(normzoo.convert(pair(), "rms_norm", bias=True))
    fresh[1].tag, fresh[1].name = "x", "y"
    fresh[1].register_buffer("seen", torch.ones(2), persistent=False)
    seen = fresh[1].seen
    normzoo.apply_recipe(fresh, recipe)
    assert (
        (fresh[1].tag, fresh[1].name) == ("x", "y")
        and fresh[1].seen is seen
        and "1.seen" not in fresh.state_dict()
    )
    own = pair()
    own[1].forward = own[1].forward
    with pytest.raises(ValueError, match="'1': it has a forward of its own, which would be lost"):
        normzoo.apply_recipe(own, recipe)


class Config:
    tie_word_embeddings = True


class Loader(GPT):
    """Ties as models of Hugging Face do."""

    def __init__(self):
        super().__init__(tied=True)
        self.config = Config()

    def get_input_embeddings(self):
        return self.tokens

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.head.weight = self.tokens.weight


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Loader()
        self.inner.blocks[1].mlp[0].weight = self.inner.blocks[0].mlp[0].weight

    def forward(self, ids):
        return self.inner(ids)


def test_what_is_untied_is_not_tied_again(monkeypatch):
    model = stirred(Wrapper())
    rewrite = plan_rewrite(model, IDS, tied="untie")
    rewrite.apply()
    assert not model.inner.config.tie_word_embeddings
    recipe = recipe_of(model)
    fresh = normzoo.apply_recipe(Wrapper(), recipe)
    for each in (model, fresh):
        each.inner.tie_weights()
        assert each.inner.head.weight is not each.inner.tokens.weight
    rewrite.revert()
    assert model.inner.config.tie_word_embeddings and model.inner.head.weight is model.inner.tokens.weight

    model = Wrapper()
    with monkeypatch.context() as patch:
        patch.setattr(refitting, "describe", lambda _: model.inner.missing)
        with pytest.raises(AttributeError, match="missing"):
            normzoo.apply_recipe(model, recipe)
    assert model.inner.config.tie_word_embeddings and model.inner.head.weight is model.inner.tokens.weight

    other = recipe_of(Wrapper())  # a tie that the config says nothing of
    other["ties"] = [names for names in other["ties"] if "inner.head.weight" in names]
    fresh = normzoo.apply_recipe(Wrapper(), other)
    assert fresh.inner.config.tie_word_embeddings
    assert fresh.inner.blocks[0].mlp[0].weight is not fresh.inner.blocks[1].mlp[0].weight
