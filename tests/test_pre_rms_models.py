"""to_pre_rms_norm on the transformers of other libraries: exact, or refused with the reason."""

import copy

import pytest
import torch
from hf_streams import BOTH, ENDS, EXACT, IDS, OF_BOTH, PIXELS, REFUSED, hf
from stream_models import error, means, run, stirred, wide
from torch import nn

import normzoo
from normzoo.residual import plan_rewrite

NOT_IN_TRAINING = {
    "dinov2": "encoder.layer.0.layer_scale1.lambda1 multiplies every entry on its way into the stream, which "
    'only baked weights can take up; pass zero_mean_writers="bake"',
    "dinov2 with registers": "layer_scale1.lambda1 multiplies every entry on its way into the stream",
    "timm with LayerScale and registers": "blocks.0.ls1.gamma multiplies every entry",
    "opt": "dropout, called as a function, makes a mean: set its p to zero, in model.decoder.layers.0",
    "opt with projections": "in training mode alone",
}
DROPS = ("gpt2", "gpt2 without head", "timm dropout", "torch")


def counted(model):
    """How many LayerNorms there are, and RMSNorms of ours."""
    modules = list(model.modules())
    kept = [m for m in modules if isinstance(m, nn.LayerNorm)]
    return len(kept), sum(isinstance(m, normzoo.RMSNorm) for m in modules)


@pytest.mark.parametrize("name", EXACT)
def test_the_function_stays(name):
    make, sample, norms, stay, outputs = EXACT[name]
    model = stirred(make())
    exact = run(copy.deepcopy(model).double(), wide(sample))
    own = error(run(model, sample), exact)
    for how in ("bake", "parametrize"):
        if how == "parametrize" and name in NOT_IN_TRAINING:
            with pytest.raises(ValueError) as refused:
                normzoo.to_pre_rms_norm(model, sample, zero_mean_writers=how)
            assert NOT_IN_TRAINING[name] in str(refused.value)
            continue
        changed = copy.deepcopy(model).double()
        rewrite = plan_rewrite(changed, wide(sample), zero_mean_writers=how)
        always = sorted(rewrite.edit.found.centered_outputs)
        assert (len(rewrite.norms), len(rewrite.left)) == (norms, stay), how
        dropped = [key for key in always if isinstance(changed.get_submodule(key), nn.Dropout)]
        assert dropped if how == "parametrize" and name in DROPS else always == outputs, how
        assert rewrite.verify().passed, how
        rewrite.apply()
        assert counted(changed) == (stay, norms), how
        assert error(run(changed, wide(sample)), exact) < 1e-10, how
        assert max(means(changed, wide(sample), normzoo.RMSNorm).values()) < 1e-9, how
    assert max(means(model, sample, nn.LayerNorm).values()) > 1e-3
    normzoo.to_pre_rms_norm(model, sample)
    assert error(run(model, sample), exact) <= 10 * own


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    make, sample, why = REFUSED[name]
    model = stirred(make())
    said, before = repr(model), {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        normzoo.to_pre_rms_norm(model, sample)
    assert repr(model) == said
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_tied_head_gets_a_weight_of_its_own_or_not():
    for tied in ("activation", "untie"):
        model = stirred(EXACT["gpt2"][0]())
        before = run(model.double(), IDS)
        head = model.lm_head.weight
        rewrite = plan_rewrite(model, IDS, tied=tied)
        assert (rewrite.edit.untied == ["transformer.wte"]) is (tied == "untie")
        assert rewrite.verify().passed
        rewrite.apply()
        assert error(run(model, IDS), before) < 1e-10
        assert model.lm_head.weight is head
        assert (model.transformer.wte.weight is head) is (tied == "activation")
        assert model.config.tie_word_embeddings is (tied == "activation")
        rows = model.transformer.wte.weight.mean(1).abs().max().item()
        assert rows < 1e-15 if tied == "untie" else rows > 1e-3
        rewrite.revert()
        assert model.transformer.wte.weight is head and model.config.tie_word_embeddings
        assert torch.equal(run(model, IDS), before)


def test_a_tied_weight_that_the_sample_does_not_show():
    """Without a head that runs, three modules have the weight, and one of them never runs."""
    sizes = {**OF_BOTH, "max_position_embeddings": 16, "dropout": 0.0, **ENDS}
    model = stirred(hf("PegasusForConditionalGeneration", "PegasusConfig", **sizes)()).double()
    sample = {**IDS, **BOTH}
    before = run(model, sample)
    normzoo.to_pre_rms_norm(model.model, sample)
    assert error(run(model, sample), before) < 1e-10


def test_torch_keeps_off_its_fast_path():
    make, sample, *_ = EXACT["torch"]
    for how in ("bake", "parametrize"):
        model = stirred(make())
        before = run(model, sample)
        with torch.enable_grad():
            slow = model(sample).detach().double().flatten()
        normzoo.to_pre_rms_norm(model, sample, zero_mean_writers=how)
        assert error(run(model, sample), before) < 2e-6 and error(run(model, sample), slow) < 2e-6


def test_part_of_a_model():
    """A swin transformer: its merges concatenate features and norm what enters; the rest can go."""
    import timm

    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5, "window_size": 4}
    model = stirred(timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **sizes)).double()
    sample = torch.cat([PIXELS, PIXELS], 2).repeat(1, 1, 1, 2).double()
    before = run(model, sample)
    rewrite = plan_rewrite(model, sample)
    left = {why.partition(";")[0] for why in rewrite.left.values()}
    assert len(rewrite.norms) == 6 and len(rewrite.left) == 5
    assert any("features are split or joined, in layers.1.downsample" in why for why in left)
    rewrite.apply()
    assert error(run(model, sample), before) < 1e-10


def test_the_sample_is_made_for_known_models():
    rewrite = plan_rewrite(stirred(EXACT["gpt2"][0]()))
    assert len(rewrite.norms) == 5 and rewrite.verify().passed
