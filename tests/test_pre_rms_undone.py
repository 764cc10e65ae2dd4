"""Rewrites taken back, or refused: copies, and models that have changed in between."""

import copy

import pytest
import torch
from stream_models import GPT, IDS, WIDTH, Placed, error, run, stirred
from torch import nn

import normzoo
from normzoo.conversion import bake
from normzoo.residual import plan_rewrite


def parametrized(model):
    return normzoo.to_pre_rms_norm(model, IDS, zero_mean_writers="parametrize")


def test_copies_stay_when_a_parametrization_goes():
    """Copies of a parametrized module share its class, from which torch deletes the weight."""
    model = stirred(GPT())
    before = run(parametrized(model), IDS)
    baked = bake(copy.deepcopy(model))
    assert error(run(baked, IDS), before) < 1e-6 and torch.equal(run(model, IDS), before)

    model = stirred(GPT())
    nn.utils.parametrizations.weight_norm(model.blocks[0].attention.out)
    start, twin = run(model, IDS), copy.deepcopy(model)
    kinds = [type(module) for module in model.modules()]
    rewrite = plan_rewrite(model, IDS, zero_mean_writers="parametrize")
    rewrite.apply()
    other, after = copy.deepcopy(model), run(model, IDS)
    rewrite.revert()
    assert [type(module) for module in model.modules()] == kinds
    for each, wanted in ((other, after), (twin, start), (model, start), (copy.deepcopy(model), start)):
        assert torch.equal(run(each, IDS), wanted)


def test_a_module_that_is_parametrized_and_centered():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    layer.__class__ = normzoo.centering.with_zero_mean(type(layer), -1)
    twin, x = copy.deepcopy(layer), torch.randn(2, 4)
    before = layer(x)
    normzoo.centering.parametrize_alone(layer, "bias", normzoo.centering.ZeroMean(0))
    torch.testing.assert_close(layer(x), before)
    assert abs(layer.bias.mean()) < 1e-7
    for name in ("bias", "weight"):
        normzoo.centering.unparametrize_alone(layer, name, leave_parametrized=True)
    assert type(layer) is normzoo.centering.with_zero_mean(nn.Linear, -1)
    assert torch.equal(twin(x), before)
    torch.testing.assert_close(layer(x), before)


def halves(model):
    model.load_state_dict({k: t / 2 for k, t in model.state_dict().items()}, assign=True)


def changed(model, how, **options):
    """A model rewritten, changed and reverted; and itself before, changed in the same way."""
    plain = copy.deepcopy(model)
    rewrite = plan_rewrite(model, IDS, **options)
    rewrite.apply()
    how(model)
    rewrite.revert()
    how(plain)
    return model, plain


def test_what_comes_back_after_other_changes():
    for options in ({}, {"zero_mean_writers": "parametrize"}, {"to": "pre_crms_norm"}):
        ours, theirs = changed(stirred(Placed(True)), lambda m: m.double().train(), **options)
        assert all(torch.equal(t, ours.state_dict()[k]) for k, t in theirs.state_dict().items()), options
        assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
        assert all(m.training for m in ours.modules()), options
        assert torch.equal(ours(IDS), theirs(IDS)) and ours(IDS).dtype == torch.float64, options


def test_numbers_that_were_loaded_in_between():
    for tied in (False, True):
        model = stirred(GPT(tied=tied))
        kept = {name: t.clone() for name, t in model.state_dict().items()}
        rewrite = plan_rewrite(model, IDS, tied="untie")
        rewrite.apply()
        halves(model)
        rewrite.revert()
        now = model.state_dict()
        for writer in rewrite.edit.found.writers:
            if not tied or writer.name != "tokens.weight":
                assert torch.equal(now[writer.name], kept[writer.name]), writer.name
        for name in ("norm.weight", "head.weight", "blocks.0.mlp.0.weight"):
            assert torch.equal(now[name], kept[name] / 2), name
        assert (model.tokens.weight is model.head.weight) is tied

    model = stirred(GPT())
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    rewrite = plan_rewrite(model, IDS, zero_mean_writers="parametrize")
    rewrite.apply()
    halves(model)
    rewrite.revert()
    assert all(torch.equal(t, kept[name] / 2) for name, t in model.state_dict().items())


def removed(model):
    del model.blocks[1].mlp[2]


def test_what_cannot_be_taken_back_is_left():
    for how, options, words in (
        (bake, {"zero_mean_writers": "parametrize"}, "is not centered in every forward any more"),
        (removed, {}, r"no tensor 'blocks\.1\.mlp\.2\.bias' any more"),
        (
            lambda m: setattr(m.places, "weight", nn.Parameter(torch.zeros(3, WIDTH))),
            {},
            r"has shape \(3, 16\)",
        ),
        (lambda m: setattr(m, "norm", nn.Identity()), {}, r"1 of the new norms \(RMSNorm\) are no longer in"),
        (lambda m: setattr(m, "tokens", nn.Embedding(20, WIDTH)), {}, "class of 'tokens' is another by now"),
    ):
        model = stirred(GPT(tied=True) if "tokens" in words else GPT())
        rewrite = plan_rewrite(model, IDS, **options)
        rewrite.apply()
        how(model)
        said, kept = repr(model), copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"Rewrite.revert: .*{words}"):
            rewrite.revert()
        assert repr(model) == said, words
        assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items()), words


def test_sparse_gradients_are_refused():
    model = stirred(GPT())
    model.tokens.sparse = True
    with pytest.raises(ValueError, match="to_pre_rms_norm: 'tokens' makes sparse gradients"):
        parametrized(model)
    normzoo.to_pre_rms_norm(model, IDS)
    model(IDS).sum().backward()
    assert model.tokens.weight.grad.is_sparse


def test_gradients_of_another_shape_go():
    model = stirred(GPT())
    model(IDS).square().sum().backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    rewrite = plan_rewrite(model, IDS, to="pre_crms_norm")
    rewrite.apply()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.1).step()
    rewrite.revert()
    assert all(torch.equal(p.grad, kept[name]) for name, p in model.named_parameters())


class Idle(GPT):
    """Has a module that shares `what` of a reader, and did not run."""

    def __init__(self, what):
        super().__init__()
        self.other = nn.Linear(WIDTH, 24)
        setattr(self.other, what, getattr(self.blocks[0].mlp[0], what))


def test_readers_that_others_share_are_refused():
    for what in ("weight", "bias"):
        words = rf"blocks\.0\.mlp\.0 reads blocks\.0\.norm2, and its {what} belongs to .*other"
        with pytest.raises(ValueError, match=words):
            normzoo.to_pre_crms_norm(stirred(Idle(what)), IDS)
