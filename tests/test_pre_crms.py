"""Pre-CRMSNorm: the residual stream with one entry less, in two bases; and streams that a map names."""

import copy
import os

import pytest
import torch
import torchvision_ops  # noqa: F401
from torch import nn

import normzoo
from normzoo.conversion.trial import distance
from normzoo.residual import plan_rewrite
from normzoo.residual.compressing import compressed, helmert, reading

os.environ["HF_HUB_OFFLINE"] = "1"

TOKENS = {"input_ids": torch.arange(3, 35).reshape(2, 16) % 50}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
WIDTH = 32


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=51, n_positions=16, **ends))


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=51, max_position_embeddings=16))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))


class Block(nn.Module):
    """Two norms with weights, an MLP with a gate, one without biases, and a scale of its own a channel."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate = (nn.Linear(WIDTH, 24, bias=bias) for bias in (False, True))
        self.down = nn.Linear(24, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(self.up(h) * self.gate(h).sigmoid()) * self.scale


class Net(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.last(self.blocks(self.embed(x))).mean(1))


def stir(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def run(model, sample):
    y = model(**sample) if isinstance(sample, dict) else model(sample)
    return getattr(y, "logits", y).detach()


def double(sample):
    if isinstance(sample, dict):
        return {name: double(t) for name, t in sample.items()}
    return sample.double() if sample.is_floating_point() else sample


X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
MODELS = {"gpt2": (gpt2, TOKENS), "neox": (neox, TOKENS), "vit": (vit, IMAGES), "net": (Net, X)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("basis", ["truncate", "orthonormal"])
def test_same_function_with_one_entry_less(name, basis):
    make, sample = MODELS[name]
    model = stir(make())
    exact = run(copy.deepcopy(model).double(), double(sample))
    own = distance(run(model, sample).double(), exact, ())
    wide = normzoo.to_pre_crms_norm(model.double(), double(sample), basis=basis, inplace=False)
    assert distance(run(wide, double(sample)), exact, ()) < 1e-11
    rewritten = normzoo.to_pre_crms_norm(model.float(), sample, basis=basis)
    assert rewritten is model
    assert distance(run(model, sample).double(), exact, ()) <= 10 * own
    kind = normzoo.CRMSNorm if basis == "truncate" else normzoo.RMSNorm
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    assert norms and all(type(m) is kind and m.normalized_shape == (WIDTH - 1,) for m in norms)
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    widths = {name: p.shape for name, p in model.named_parameters() if WIDTH - 1 in p.shape}
    assert len(widths) > 5


def test_bases():
    q = helmert(6, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.zeros(5, dtype=torch.float64))
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    x -= x.mean(1, keepdim=True)
    weight = torch.randn(7, 6, dtype=torch.float64)
    for basis in ("truncate", "orthonormal"):
        z = compressed(x, 1, basis)
        assert z.shape == (4, 5, 3)
        w = reading(weight, 1, basis)
        torch.testing.assert_close(torch.einsum("oi,bit->bot", w, z), torch.einsum("oi,bit->bot", weight, x))
    torch.testing.assert_close(compressed(x, 1, "orthonormal").square().sum(1), x.square().sum(1))


def test_sizes_follow_and_a_bias_appears_where_a_norm_had_one():
    model = stir(Net())
    normzoo.to_pre_crms_norm(model, X)
    assert (model.embed.out_features, model.head.in_features) == (WIDTH - 1, WIDTH - 1)
    assert model.blocks[0].up.bias is not None and model.blocks[0].down.out_features == WIDTH - 1
    assert torch.equal(model.blocks[0].scale, torch.ones(WIDTH - 1))
    plain = stir(Net())
    with torch.no_grad():
        plain.blocks[0].norm.bias.zero_()
    normzoo.to_pre_crms_norm(plain, X)
    assert plain.blocks[0].up.bias is None


def test_revert_is_exact():
    model = stir(Net())
    said, kept = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    rewrite = plan_rewrite(model, X, to="pre_crms_norm", basis="orthonormal")
    assert "reader" in str(rewrite) and "one entry less, turned" in str(rewrite)
    rewrite.apply()
    assert repr(model) != said
    rewrite.revert()
    assert repr(model) == said and [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_tied_head_is_untied():
    model = stir(gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight
    normzoo.to_pre_crms_norm(model, TOKENS)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not model.config.tie_word_embeddings


class Reads(Net):
    """What its last norm returns goes somewhere that no weight is."""

    def forward(self, x):
        h = self.last(self.blocks(self.embed(x)))
        return self.head(h) * h.square().sum(-1, keepdim=True)


class Shares(Net):
    """One weight behind two norms that differ."""

    def __init__(self):
        super().__init__()
        self.other = nn.LayerNorm(WIDTH)

    def forward(self, x):
        h = self.blocks(self.embed(x))
        return self.head(self.last(h)) + self.head(self.other(h))


class Attends(Net):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        h = self.last(self.embed(x))
        return self.attention(h, h, h)[0]


class Pads(nn.Module):
    """A convolution that pads behind a norm: its bias cannot stand for that of the norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(self.embed(x)).transpose(1, 2))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Reads, r"reads the output of last \(pow\)"),
        (Shares, "head.weight reads both last and other, which differ"),
        (Attends, "in_proj_weight reads last, and a MultiheadAttention cannot take another size"),
        (Pads, "conv reads norm, and pads with zeros"),
    ],
)
def test_refused(make, why):
    model = stir(make())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        normzoo.to_pre_crms_norm(model, X)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    normzoo.to_pre_rms_norm(model, X)


def test_code_that_knows_its_width_is_left_as_it_was():
    class Fixed(Net):
        def forward(self, x):
            return self.head(self.last(self.embed(x).view(2, 7, WIDTH)))

    model = stir(Fixed())
    said = repr(model)
    with pytest.raises(ValueError, match="the rewritten model does not run: RuntimeError"):
        normzoo.to_pre_crms_norm(model, X)
    assert repr(model) == said


def test_only_part_of_the_norms_of_a_stream():
    with pytest.raises(ValueError, match="a norm of last reads the stream and stays"):
        normzoo.to_pre_crms_norm(stir(Net()), X, exclude="last")


MAP = {
    "norms": ["transformer.h.*.ln_*", "transformer.ln_f"],
    "writers": ["transformer.wpe", "*.c_proj"],
    "centered_outputs": "transformer.wte",
}


def test_a_map_in_place_of_the_search():
    model = stir(gpt2())
    found = normzoo.to_pre_rms_norm(model, TOKENS, inplace=False)
    mapped = normzoo.to_pre_rms_norm(model, TOKENS, inplace=False, module_map=MAP)
    assert all(torch.equal(t, mapped.state_dict()[name]) for name, t in found.state_dict().items())
    torch.testing.assert_close(run(mapped, TOKENS), run(found, TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"writers": ["transformer.wpe", "*.mlp.c_proj"]}, r"FAILED.*at transformer\.h"),
        (
            {"centered_outputs": [], "writers": [*MAP["writers"], "transformer.wte"]},
            r"FAILED.*at transformer\.wte\.weight",
        ),
        (
            {"writers": "*.ln_1"},
            "ln_1' in module_map is a LayerNorm, and it is not known along which dimension",
        ),
        ({"writers": "*.nothing"}, "'\\*.nothing' in module_map matches no module and no parameter"),
        ({"norms": "nothing"}, "matches no LayerNorm of the model"),
        ({"readers": "lm_head"}, "module_map has the key 'readers'; it takes norms, writers, centered_outputs"),
    ],
)
def test_a_map_that_is_wrong(change, why):
    model = stir(gpt2())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        normzoo.to_pre_rms_norm(model, TOKENS, module_map=MAP | change)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(model.transformer.ln_f) is nn.LayerNorm
    with pytest.raises(TypeError, match="module_map is a list; it must be a mapping"):
        normzoo.to_pre_rms_norm(model, TOKENS, module_map=["transformer"])
