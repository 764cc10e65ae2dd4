"""Tiny models of Hugging Face, timm and torchvision with a residual stream, and a sample each."""

import functools
import os

import torch
import torchvision_ops  # noqa: F401
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"

IDS = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES = {"pixel_values": PIXELS}
BOTH = {"decoder_input_ids": torch.arange(3, 9).reshape(2, 3)}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
OF_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 51, "n_positions": 16, "n_inner": 48, **ENDS}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
INNER = {**LAYERS, "intermediate_size": 48}
OF_TEXT = {**INNER, "vocab_size": 51, "max_position_embeddings": 16, "pad_token_id": 0, **ENDS}
OF_OPT = {**LAYERS, "ffn_dim": 48, "vocab_size": 51, "max_position_embeddings": 16, "pad_token_id": 0, **ENDS}
OF_IMAGES = {**INNER, "image_size": 16, "patch_size": 8}
NOISE = {"noise": torch.rand(2, 4, generator=torch.Generator().manual_seed(0))}
OF_BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 51}
OF_BOTH = {
    **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{"d_model": 32, "vocab_size": 51, "pad_token_id": 0, "decoder_start_token_id": 1, **ENDS},
}
OF_WHISPER = {**OF_BOTH, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 8}
SOUND = {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0)), **BOTH}


def of_hugging_face(model, config, **options):
    def make():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def of_timm(name, **options):
    def make():
        import timm

        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
        return timm.create_model(name, pretrained=False, **{**sizes, **options})

    return make


def convnext():
    import timm

    sizes = {"dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_classes": 5}
    return timm.create_model("convnext_atto", pretrained=False, **sizes)


def of_torchvision():
    import torchvision

    return torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5)


class Encoder(nn.Module):
    """torch's own, which takes a fast path in eval mode."""

    def __init__(self, norm_first=True):
        super().__init__()
        self.embed = nn.Linear(7, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, norm_first=norm_first, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.embed(x))


hf = of_hugging_face
VIT = functools.partial(of_timm, "vit_tiny_patch16_224")
ROWS = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))

# Model, sample, norms rewritten, norms that stay, outputs whose mean is taken away in every forward.
EXACT = {
    "gpt2": (hf("GPT2LMHeadModel", "GPT2Config", **OF_GPT), IDS, 5, 0, ["transformer.wte"]),
    "gpt2 without head": (hf("GPT2Model", "GPT2Config", **OF_GPT), IDS, 5, 0, []),
    "vit": (hf("ViTForImageClassification", "ViTConfig", **OF_IMAGES), IMAGES, 5, 0, []),
    "dinov2": (hf("Dinov2Model", "Dinov2Config", **OF_IMAGES), IMAGES, 5, 0, []),
    "dinov2 with registers": (
        hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=2, **OF_IMAGES),
        IMAGES,
        5,
        0,
        [],
    ),
    "neox": (hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **OF_TEXT), IDS, 5, 0, []),
    "neox not parallel": (
        hf("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=False, **OF_TEXT),
        IDS,
        5,
        0,
        [],
    ),
    "phi": (hf("PhiForCausalLM", "PhiConfig", **OF_TEXT), IDS, 3, 0, []),
    "opt": (
        hf("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=32, **OF_OPT),
        IDS,
        5,
        0,
        ["model.decoder.embed_tokens"],
    ),
    "opt with projections": (
        hf("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=16, **OF_OPT),
        IDS,
        5,
        0,
        [],
    ),
    "bloom": (
        hf("BloomForCausalLM", "BloomConfig", **OF_BLOOM),
        IDS,
        5,
        1,
        ["transformer.word_embeddings_layernorm"],
    ),
    "mae": (hf("ViTMAEModel", "ViTMAEConfig", **OF_IMAGES), IMAGES | NOISE, 5, 0, []),
    "gptj": (hf("GPTJForCausalLM", "GPTJConfig", rotary_dim=4, **OF_GPT), IDS, 3, 0, []),
    "whisper": (
        hf("WhisperForConditionalGeneration", "WhisperConfig", **OF_WHISPER),
        SOUND,
        7,
        5,
        ["model.decoder.embed_tokens"],
    ),
    "pegasus": (
        hf(
            "PegasusForConditionalGeneration",
            "PegasusConfig",
            max_position_embeddings=16,
            dropout=0.0,
            **OF_BOTH,
        ),
        {**IDS, **BOTH},
        12,
        0,
        ["model.decoder.embed_tokens", "model.encoder.embed_tokens"],
    ),
    "timm": (VIT(), PIXELS, 5, 0, []),
    "timm with LayerScale and registers": (VIT(init_values=0.1, reg_tokens=2), PIXELS, 5, 0, []),
    "timm deit": (of_timm("deit_tiny_distilled_patch16_224"), PIXELS, 5, 0, []),
    "timm mean": (VIT(class_token=False, global_pool="avg"), PIXELS, 5, 0, []),
    "timm with norms of q and k": (VIT(qk_norm=True), PIXELS, 5, 4, []),
    "timm clip": (VIT(pre_norm=True), PIXELS, 6, 0, ["norm_pre"]),
    "timm dropout": (VIT(drop_path_rate=0.2, pos_drop_rate=0.1, proj_drop_rate=0.1), PIXELS, 5, 0, []),
    "torchvision": (of_torchvision, PIXELS, 5, 0, []),
    "torch": (Encoder, ROWS, 5, 0, []),
}

POST = "the stream holds the output of a norm, as in a post-LN model, whose mean depends on the data"
REFUSED = {
    "bert": (hf("BertModel", "BertConfig", **OF_TEXT), IDS, POST),
    "llama": (
        hf("LlamaForCausalLM", "LlamaConfig", **OF_TEXT),
        IDS,
        "no LayerNorm over one dimension to be rewritten; it has RMSNorms, which do not take the mean away: "
        "centering its weights would change what it computes",
    ),
    "opt post": (
        hf("OPTForCausalLM", "OPTConfig", do_layer_norm_before=False, word_embed_proj_dim=32, **OF_OPT),
        IDS,
        POST,
    ),
    "bloom post": (
        hf("BloomForCausalLM", "BloomConfig", apply_residual_connection_post_layernorm=True, **OF_BLOOM),
        IDS,
        POST,
    ),
    "clip": (
        hf("CLIPVisionModel", "CLIPVisionConfig", **OF_IMAGES),
        IMAGES,
        "the model returns the stream itself",
    ),
    "modernbert": (
        hf("ModernBertForMaskedLM", "ModernBertConfig", **OF_TEXT, cls_token_id=1, sep_token_id=2),
        IDS,
        POST,
    ),
    "whisper encoder": (
        lambda: hf("WhisperModel", "WhisperConfig", **OF_WHISPER)().encoder,
        {"input_features": SOUND["input_features"]},
        "gelu does not keep the mean of a row",
    ),
    "hidden states": (
        hf("GPT2Model", "GPT2Config", output_hidden_states=True, **OF_GPT),
        IDS,
        "the model returns the stream itself",
    ),
    "embeddings as input": (
        hf("GPT2Model", "GPT2Config", **OF_GPT),
        {"inputs_embeds": ROWS.new_ones(2, 3, 32)},
        "an input of the model.* goes into the stream",
    ),
    "convnext": (
        convnext,
        PIXELS.repeat(1, 1, 2, 2),
        "stages.0.blocks.0.norm.*: a convolution mixes it, in stages.0.blocks.0.conv_dw",
    ),
    "torch post": (lambda: Encoder(norm_first=False), ROWS, POST),
}
