"""What a run of a copy does not show by itself: shared memory, closures, other inputs, stale plans."""

import logging

import pytest
import torch
from stream_models import GPT, IDS, WIDTH, error, run, stirred
from torch import nn

import normzoo
from normzoo.residual import plan_rewrite


def refused(model, why, sample=IDS, **options):
    """Checks that a rewrite is refused for a reason, and leaves the model as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=why):
        normzoo.to_pre_rms_norm(model, sample, **options)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_a_copy_does_not_share():
    model = stirred(GPT())
    model.head.weight = nn.Parameter(model.tokens.weight.data)  # one memory, two parameters
    refused(model, "FAILED: another function")

    model = stirred(GPT())
    weight = model.tokens.weight
    model.head.forward = lambda x: x @ weight.T.to(x.dtype)
    refused(model, "FAILED: another function")


def test_a_head_outside_of_the_model():
    whole = nn.Module()
    whole.body, whole.head = stirred(GPT()), nn.Linear(WIDTH, 20, bias=False)
    whole.head.weight = whole.body.tokens.weight
    refused(whole.body, "a module that is no part of the model has 'tokens.weight' too")
    # With weights that stay what they are, both go on.
    before = run(whole.body, IDS)
    normzoo.to_pre_rms_norm(whole.body, IDS, zero_mean_writers="parametrize")
    assert error(run(whole.body, IDS), before) < 1e-5


class Looks(GPT):
    """Goes by the numbers of its stream."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def forward(self, ids):
        x = self.stream(ids)
        return self.head(self.norm(-x if self.look(x) > 0.05 else x))


LOOKS = {
    "numpy": lambda x: float(x.numpy().mean()),
    "tolist": lambda x: x[0, 0].tolist()[0],
    "item": lambda x: x[0, 0, 0].item(),
    "array": lambda x: memoryview(x.mean(-1).__array__())[0, 0],
    "data": lambda x: x.data.mean(),
}


@pytest.mark.parametrize("how", LOOKS)
def test_code_that_goes_by_the_numbers_of_its_stream(how):
    refused(stirred(Looks(LOOKS[how])), "reads the stream itself")


class Scales(GPT):
    """Goes on with what has the memory of the stream, for which no operator ran."""

    def forward(self, ids):
        return self.head(self.norm(self.stream(ids).data))


def test_data_is_what_it_is_of():
    model = stirred(Scales())
    before = run(model, IDS)
    assert error(run(normzoo.to_pre_rms_norm(model, IDS), IDS), before) < 1e-5
    assert isinstance(model.norm, normzoo.RMSNorm)


class Optional(GPT):
    """A token that stands in for masked ones, if there are any."""

    def __init__(self):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(WIDTH))

    def embed(self, ids, masked=None):
        x = super().embed(ids)
        return x if masked is None else torch.where(masked[..., None], self.mask_token, x)

    def forward(self, ids, masked=None):
        x = self.embed(ids, masked)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


MASKED = IDS % 3 == 0


def test_a_sample_that_does_not_reach_all(caplog):
    model = stirred(Optional())
    with caplog.at_level(logging.WARNING, "normzoo"):
        normzoo.to_pre_rms_norm(model, IDS, inplace=False)
    assert "the sample does not reach mask_token: inputs that do may give other outputs" in caplog.text
    assert "mask_token" in plan_rewrite(model, IDS).summary()
    caplog.clear()
    before = run(model, (IDS, MASKED))

    def both(m):
        return m(IDS), m(IDS, MASKED)

    with caplog.at_level(logging.WARNING, "normzoo"):
        normzoo.to_pre_rms_norm(model, both)
    assert not caplog.text and model.mask_token.mean().abs() < 1e-6
    assert error(run(model, (IDS, MASKED)), before) < 1e-5


def test_a_norm_that_no_sample_reaches():
    class Branches(GPT):
        def __init__(self):
            super().__init__()
            self.other = nn.LayerNorm(WIDTH)

        def forward(self, ids, other=False):
            x = self.stream(ids)
            return self.head(self.other(x) if other else self.norm(x))

    writers = ["tokens", "places", "*.out", "*.mlp.2"]
    refused(stirred(Branches()), r"FAILED.*at other", module_map={"norms": "*", "writers": writers})
    with pytest.raises(ValueError, match="no LayerNorm that is meant ran on the sample"):
        normzoo.to_pre_rms_norm(stirred(Branches()), IDS, include="other")
    wrong = stirred(Branches())
    with pytest.raises(ValueError, match="no LayerNorm that is meant ran"):
        normzoo.to_pre_rms_norm(stirred(Branches()), lambda model: wrong(IDS))


def test_a_gate_that_an_idle_module_has_too():
    class Gated(GPT):
        def __init__(self):
            super().__init__()
            self.scale, self.idle = nn.Parameter(torch.randn(WIDTH)), nn.Module()
            self.idle.scale = self.scale

        def embed(self, ids):
            return self.tokens(ids) * self.scale + self.places.weight[: ids.shape[1]]

    refused(stirred(Gated()), "idle has scale too, and did not run on the sample")


def test_one_dropout_in_and_beside_the_stream():
    class Shared(nn.Module):
        def __init__(self, dropout=0.0, width=WIDTH):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)
            self.drop = nn.Dropout(dropout)

        def forward(self, x):
            return x + self.drop(self.down(self.drop(self.up(self.norm(x)))))

    refused(stirred(GPT(Shared, dropout=0.1)), "training mode alone", zero_mean_writers="parametrize")


def test_a_plan_for_a_model_that_has_changed():
    for change in (
        lambda m: setattr(m.norm, "eps", 0.5),
        lambda m: setattr(m.blocks[0].mlp, "2", nn.Linear(24, WIDTH)),
        lambda m: setattr(m, "norm", nn.GroupNorm(1, WIDTH)),
    ):
        model = stirred(GPT())
        rewrite = plan_rewrite(model, IDS)
        change(model)
        for method in (rewrite.apply, rewrite.verify):
            with pytest.raises(ValueError, match="the model has changed since the rewrite was planned"):
                method()


def test_inference_mode():
    model, narrow = stirred(GPT()), stirred(GPT())
    with torch.inference_mode():
        normzoo.to_pre_rms_norm(model, IDS)
        normzoo.to_pre_crms_norm(narrow, IDS)
        other = GPT()
    for made in (model, narrow):
        assert not any(p.is_inference() for p in made.parameters())
    with pytest.raises(ValueError, match=r"tensors of the model were made in torch.inference_mode\(\)"):
        normzoo.to_pre_rms_norm(other, IDS)


def test_outputs_that_show_nothing():
    class Words(GPT):
        def forward(self, ids):
            return super().forward(ids).argmax(-1)

    refused(stirred(Words()), "the model returns no floating-point tensor")


def test_a_tied_head_is_untied_for_crms():
    rewrite = plan_rewrite(stirred(GPT(tied=True)), IDS, to="pre_crms_norm")
    assert rewrite.edit.untied == ["tokens"] and rewrite.verify().passed


def test_options_of_the_other_rewrite():
    for to, option in (
        ("pre_rms_norm", {"basis": "orthonormal"}),
        ("pre_crms_norm", {"zero_mean_writers": "parametrize"}),
        ("pre_crms_norm", {"tied": "untie"}),
        ("pre_crms_norm", {"module_map": {"norms": "*"}}),
    ):
        with pytest.raises(ValueError, match=f"plan_rewrite: {next(iter(option))}=.* does not go with {to}"):
            plan_rewrite(GPT(), IDS, to=to, **option)
    said = plan_rewrite(stirred(GPT()), IDS, to="pre_crms_norm", basis="orthonormal").to_dict()
    assert (said["rewrite"], said["target"], said["basis"]) == ("pre_crms_norm", "rms_norm", "orthonormal")
    assert {"name": "head.weight", "axis": 1, "norm": "norm"} in said["readers"]


def test_bake_says_what_it_cannot_take_up():
    model = normzoo.to_pre_rms_norm(stirred(GPT(tied=True)), IDS)
    with pytest.raises(ValueError, match="bake: what tokens return has its mean taken away in every forward"):
        normzoo.conversion.bake(model)
