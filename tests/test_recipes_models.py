"""Recipes of models of Hugging Face, timm and torchvision: built anew, loaded, equal to the last bit."""

import functools
import json
import logging
import os

import pytest
import torch
import torchvision_ops  # noqa: F401
from torch import nn

import normzoo
from normzoo.conversion import bake
from normzoo.recipes import recipe_of
from normzoo.residual import to_pre_crms_norm, to_pre_rms_norm

os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32, "eos_token_id": 1}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL = {"image_size": 32, "patch_size": 8}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def stirred(model):
    with torch.no_grad():
        for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            if t.is_floating_point():
                t.add_(torch.rand_like(t) / 4)
    return model


def hugging_face(kind, **settings):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**settings))


def gpt2():
    return hugging_face("GPT2LMHeadModel", **GPT, bos_token_id=0)


def vit():
    return hugging_face("ViTForImageClassification", **VIT, **SMALL)


def llama():
    return hugging_face("LlamaForCausalLM", **LLAMA, vocab_size=40, pad_token_id=0, tie_word_embeddings=False)


PRE = {"sample": WORDS}
HUGGING_FACE = {
    "convert": (gpt2, lambda m: normzoo.convert(m, "rms_norm")),
    "in part": (gpt2, lambda m: normzoo.convert(m, {"*.ln_1": "layer_norm", "*.ln_2": "rms_norm"})),
    "power norm": (vit, lambda m: normzoo.convert(m, "unified_norm", types="layer")),
    "pre rms": (gpt2, functools.partial(to_pre_rms_norm, **PRE)),
    "pre crms": (gpt2, functools.partial(to_pre_crms_norm, **PRE)),
    "parametrized": (gpt2, functools.partial(to_pre_rms_norm, **PRE, zero_mean_writers="parametrize")),
    "untied": (gpt2, functools.partial(to_pre_rms_norm, **PRE, tied="untie")),
    "images": (vit, functools.partial(to_pre_crms_norm, sample={"pixel_values": PIXELS})),
    "llama": (llama, normzoo.convert),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_from_pretrained(case, tmp_path, caplog, recwarn):
    make, change = HUGGING_FACE[case]
    try:
        model = stirred(change(stirred(make()).eval()))
    except ValueError as error:
        pytest.skip(f"not converted: {error}")
    model.save_pretrained(tmp_path)
    path = tmp_path / "recipe.json"
    normzoo.save_recipe(model, path)

    class Converted(type(model)):
        def __init__(self, config):
            super().__init__(config)
            normzoo.apply_recipe(self, path)

    caplog.clear()
    caplog.set_level(logging.INFO)
    loaded, told = Converted.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()) and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not recwarn.list
    given = {"pixel_values": PIXELS} if make is vit else WORDS
    for mode in (False, True):
        outputs = []
        for each in (model, loaded):
            torch.manual_seed(2)
            outputs.append(each.train(mode)(**given).logits)
        assert torch.equal(*outputs)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())
    assert recipe_of(loaded)["layers"] == recipe_of(model)["layers"]

    # The plain way, and on the meta device.
    plain = normzoo.apply_recipe(type(model)(model.config), path).eval()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain(**given).logits, model.eval()(**given).logits)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty = normzoo.apply_recipe(empty, path)
    empty.load_state_dict(state, strict=True, assign=True)
    assert not any(t.is_meta for t in empty.state_dict().values()) and repr(empty) == repr(plain)


def test_of_another_model(tmp_path):
    recipe = recipe_of(normzoo.convert(gpt2(), "rms_norm"))
    for settings, words in {
        (
            ("n_layer", 1),
        ): r"has no module 'transformer.h.1.ln_1', which is a RMSNorm in the recipe; make it of",
        (
            ("n_layer", 3),
        ): r"the model has a parameter 'transformer.h.2.ln_1.weight' of shape \(16,\) in float32",
        (
            ("n_positions", 33),
        ): r"of shape \(32, 16\) .* its shape is \(33, 16\), which no conversion makes of it",
        (
            ("n_embd", 32),
        ): r"weight has shape \(16,\) in the recipe, and in the model \(32,\), which no conversion",
        (("vocab_size", 60),): "which no conversion makes of it: make the model with the settings",
    }.items():
        model = hugging_face("GPT2LMHeadModel", **GPT | dict(settings), bos_token_id=0)
        before = repr(model)
        with pytest.raises(ValueError, match=words):
            normzoo.apply_recipe(model, recipe)
        assert repr(model) == before
    with pytest.raises(ValueError, match=r"has no module 'transformer.h.0.ln_1', which is a RMSNorm"):
        normzoo.apply_recipe(vit(), recipe)


def timm_model(name, **settings):
    return pytest.importorskip("timm").create_model(name, num_classes=4, **settings)


def standardizing():
    timm = pytest.importorskip("timm")
    conv = functools.partial(timm.layers.StdConv2d, eps=1e-8)
    norm = functools.partial(timm.layers.GroupNormAct, num_groups=4)
    layers = {"conv_layer": conv, "norm_layer": norm, "stem_type": "fixed"}
    return timm.models.ResNetV2(layers=(1, 1), channels=(16, 32), num_classes=3, preact=True, **layers)


def own_activation():
    evo = pytest.importorskip("timm").layers.EvoNorm2dS1
    return nn.Sequential(nn.Conv2d(3, 8, 3), evo(8, 4, act_layer=functools.partial(nn.ELU, 0.5)))


def resnet():
    return pytest.importorskip("torchvision").models.ResNet(
        pytest.importorskip("torchvision").models.resnet.BasicBlock,
        [1, 1, 1, 1],
        num_classes=3,
        width_per_group=64,
    )


tiny = functools.partial(timm_model, "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def mobile():
    act = functools.partial(pytest.importorskip("timm").layers.BatchNormAct2d, act_layer=nn.Hardswish)
    convs = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, bias=False)
    return nn.Sequential(convs[0], act(8), convs[1], act(8, apply_act=False))


standardized = functools.partial(normzoo.convert, to="weight_standardize")
MODELS = {
    "over channels": (tiny, lambda m: normzoo.convert(m, "rms_norm", types="layer")),
    "norms with an activation": (mobile, lambda m: normzoo.convert(m, "power_norm")),
    "their activation goes": (mobile, lambda m: normzoo.convert(m, "evo_norm_s0", include="1")),
    "frozen with an activation": (mobile, normzoo.freeze_batch_norm),
    "folded": (mobile, lambda m: normzoo.fold(m.eval())),
    "an activation of its own": (own_activation, normzoo.convert),
    "standardized": (standardizing, standardized),
    "standardized and baked": (standardizing, lambda m: bake(standardized(m))),
    "torchvision": (resnet, lambda m: normzoo.convert(m, "ghost_batch_norm", ghost_batch_size=2)),
}


@pytest.mark.parametrize("case", MODELS)
def test_images(case, caplog):
    caplog.set_level(logging.ERROR, "normzoo")
    make, change = MODELS[case]
    model = stirred(change(stirred(make())))
    recipe = json.loads(json.dumps(recipe_of(model)))
    fresh = normzoo.apply_recipe(make(), recipe)
    fresh.load_state_dict(model.state_dict())
    assert recipe_of(fresh) == recipe and repr(fresh) == repr(model)
    with torch.no_grad():
        for mode in (False, True)[: 1 if case == "folded" else 2]:
            outputs = []
            for each in (model, fresh):
                torch.manual_seed(2)
                outputs.append(each.train(mode)(PIXELS))
            assert torch.equal(*outputs), mode
