"""Training after to_pre_rms_norm: that of the LayerNorms where weights are centered in every forward."""

import copy
import itertools

import pytest
import torch
from hf_streams import EXACT, PIXELS, of_timm
from stream_models import GPT, IDS, WIDTH, Block, error, run, stirred, wide
from torch import nn
from torch.nn.utils import parametrize

import normzoo
from normzoo.centering import ZeroMean, ZeroMeanOutput

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
# With Adam's own eps the rounding of a gradient that is zero, such as that of a bias of keys, is blown up.
OPTIMIZERS = {
    "momentum": lambda p: SGD(p, 0.05, momentum=0.9),
    "decay": lambda p: SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: ADAM(p, 0.01, eps=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-4, weight_decay=0.1),
}
MODELS = {
    "gpt": (GPT, IDS),
    "tied, dropout": (lambda: GPT(tied=True, dropout=0.1), IDS),
    "gpt2, dropout": (lambda: EXACT["gpt2"][0](), {"input_ids": IDS}),
    "vit": (of_timm("vit_tiny_patch16_224", drop_path_rate=0.2, pos_drop_rate=0.1), PIXELS),
}


def logits(model, sample):
    return model(**sample).logits if isinstance(sample, dict) else model(sample)


def step(model, sample, optimizer, seed):
    """What the model returned, and the gradients."""
    torch.manual_seed(seed)
    y = logits(model, sample)
    optimizer.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).square().mean().backward()
    optimizer.step()
    return y.detach()


def original_names(model):
    """Parameters by the names that they have where nothing is parametrized."""
    found = {}
    for name, p in model.named_parameters():
        head, _, tail = name.partition(".parametrizations.")
        found[name if not tail else f"{head}.{tail.removesuffix('.original')}"] = p
    return {name.removeprefix("parametrizations.").removesuffix(".original"): p for name, p in found.items()}


@pytest.mark.parametrize(("name", "optimizer"), [
    *itertools.product(("gpt",), OPTIMIZERS), ("tied, dropout", "momentum"), ("tied, dropout", "adam"),
    ("gpt2, dropout", "adamw"), ("vit", "decay"), ("vit", "adam"),
])  # fmt: skip
def test_training_is_that_of_the_layer_norms(name, optimizer):
    make, sample = MODELS[name]
    ours = stirred(make()).double().train()
    theirs, sample = copy.deepcopy(ours), wide(sample)
    normzoo.to_pre_rms_norm(ours, sample, zero_mean_writers="parametrize")
    assert not any(isinstance(m, nn.LayerNorm) for m in ours.modules()) and ours.training
    assert ("dropout" in name) is any(
        isinstance(m, nn.Dropout) and isinstance(m, ZeroMeanOutput) and m.p for m in ours.modules()
    ) or name == "vit"
    opts = [OPTIMIZERS[optimizer](m.parameters()) for m in (theirs, ours)]
    for seed in range(10):
        found = [step(model, sample, opt, seed) for model, opt in zip((theirs, ours), opts, strict=True)]
        assert error(found[1], found[0]) < 1e-12, f"step {seed}"
        own, before = original_names(ours), dict(theirs.named_parameters())
        assert own.keys() == before.keys()
        for key, p in before.items():
            assert own[key].grad is not None and p.grad is not None, key
            apart = (own[key].grad - p.grad).abs().max().item()
            assert apart <= 1e-12 * max(1e-3, p.grad.abs().max().item()), f"step {seed}: gradient of {key}"
            assert (own[key] - p).abs().max() < 1e-12 * max(1, p.abs().max().item()), f"step {seed}: {key}"


@pytest.mark.parametrize("optimizer", ["momentum", "decay", "adam"])
def test_baked_weights_train_another_way(optimizer):
    theirs = stirred(GPT()).double().train()
    baked = normzoo.to_pre_rms_norm(theirs, IDS, inplace=False)
    opts = [OPTIMIZERS[optimizer](m.parameters()) for m in (baked, theirs)]
    apart = [
        error(*(step(m, IDS, opt, seed) for m, opt in zip((baked, theirs), opts, strict=True)))
        for seed in range(10)
    ]
    assert apart[0] < 1e-12 and apart[-1] > 1e-3


class Root(GPT):
    """Writes with parameters of its own, one of them a head's of several owners."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks[1].mlp[2].weight = self.blocks[0].mlp[2].weight

    def embed(self, ids):
        x = super().embed(ids)
        return torch.cat((self.first.expand(len(x), -1, -1), x), 1)


@pytest.mark.parametrize("leave", [False, True])
def test_for_inference_after_training(leave):
    model = stirred(Root()).train()
    keys, kind = list(model.state_dict()), type(model)
    normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")
    optimizer = ADAM(model.parameters(), 0.01)
    for seed in range(3):
        step(model, IDS, optimizer, seed)
    model.eval()
    before, exact = run(model, IDS), run(copy.deepcopy(model).double(), IDS)
    assert any(isinstance(m, ZeroMean) for m in model.modules())
    if leave:
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    else:
        assert normzoo.conversion.bake(model) is model
    assert type(model) is kind and not any(isinstance(m, ZeroMean) for m in model.modules())
    assert sorted(model.state_dict()) == sorted(keys)
    assert model.blocks[1].mlp[2].weight is model.blocks[0].mlp[2].weight
    assert model.first.mean().abs() < 1e-7 and model.tokens.weight.mean(1).abs().max() < 1e-7
    assert error(run(model, IDS), exact) <= 2 * error(before, exact) + 2 * torch.finfo(torch.float32).eps


def test_bake_refuses_what_else_is_done_to_a_weight():
    model = stirred(GPT())
    normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")
    before = run(model, IDS)

    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(model.blocks[0].mlp[2], "weight", Halved())
    after = run(model, IDS)
    words = r"bake: 'blocks\.0\.mlp\.2\.weight' has other parametrizations too \(Halved\); remove them first"
    with pytest.raises(ValueError, match=words):
        normzoo.conversion.bake(model)
    assert torch.equal(run(model, IDS), after) and not torch.equal(after, before)
    with pytest.raises(
        ValueError, match=r"no layer that standardizes its weight .*, and none whose mean is taken"
    ):
        normzoo.conversion.bake(GPT())


def test_frozen_and_half_weights_train_too():
    model = stirred(GPT()).bfloat16().train()
    model.places.weight.requires_grad_(False)
    normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")
    frozen = model.places.parametrizations.weight.original
    assert not frozen.requires_grad and model.head.weight.dtype == torch.bfloat16
    kept = frozen.clone()
    step(model, IDS, SGD(model.parameters(), 0.1), 0)
    assert torch.equal(frozen, kept) and model.blocks[0].mlp[2].weight.dtype == torch.bfloat16


class Functional(Block):
    """Drops by a function: no module whose output could be centered."""

    def forward(self, x):
        drop = torch.nn.functional.dropout
        x = x + drop(self.attention(self.norm1(x)), 0.1, self.training)
        return x + drop(self.mlp(self.norm2(x)), 0.1, self.training)


class Auxiliary(GPT):
    """Returns the stream too, in training alone."""

    def forward(self, ids):
        x = self.stream(ids)
        return (self.head(self.norm(x)), x.mean(1)) if self.training else self.head(self.norm(x))


class Pair(nn.Module):
    """Two streams, one of which is read in training."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Auxiliary(layers=1), GPT(layers=2)

    def forward(self, ids):
        return self.one(ids), self.other(ids)


def test_what_training_alone_has_in_the_way():
    for make, why in (
        (
            lambda: GPT(block=Functional, layers=1),
            "dropout, called as a function, makes a mean: set its p to zero, in blocks.0",
        ),
        (Auxiliary, "the model returns|mean reads the stream itself|reads the stream itself"),
    ):
        model = stirred(make()).double()
        with pytest.raises(ValueError, match=f"{why}.*in training mode alone"):
            normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")
        before = run(model, IDS)
        assert error(run(normzoo.to_pre_rms_norm(model, IDS), IDS), before) < 1e-10
    pair = stirred(Pair()).double()
    ours = normzoo.to_pre_rms_norm(pair, IDS, zero_mean_writers="parametrize", inplace=False)
    assert isinstance(ours.one.norm, nn.LayerNorm) and isinstance(ours.other.norm, normzoo.RMSNorm)
    assert not parametrize.is_parametrized(ours.one.tokens) and parametrize.is_parametrized(ours.other.tokens)
    torch.testing.assert_close(ours.train()(IDS), pair.train()(IDS), rtol=1e-12, atol=1e-12)


def test_the_proof_looks_at_training(monkeypatch):
    """With weights of mean zero before dropout other numbers come out, which eval mode does not show."""
    model = stirred(GPT(dropout=0.1)).double()
    rewrite = normzoo.residual.plan_rewrite(model, IDS, zero_mean_writers="parametrize")
    assert rewrite.verify().passed
    found = normzoo.residual.plan_rewrite(model, IDS).edit.found.writers
    rewrite.edit.found.writers |= found
    proof = rewrite._probe.prove(rewrite.edit)
    assert not proof.passed and proof.output > 1e-3 and proof.mean < 1e-9
