"""Every rule of conversion on whole models, in float64: it keeps what its class says, and no more."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from transfer_models import CASES, apart, evaluated, last_bit, of, samples, trained

import normzoo
from normzoo.conversion import TRANSFERS, Exactness
from normzoo.sweeps import GROUP_EPS
from normzoo.zoo import ZOO

EPS = torch.finfo(torch.float64).eps

WRITTEN_BY_HAND = {
    "crms_norm": r"all that writes and reads them has to change with the norm: call normzoo\.to_pre_crms_norm",
    "adaptive_layer_norm": r"put the layer there by hand, and call it as norm\(x, scale, shift\)",
    "adaptive_rms_norm": r"put the layer there by hand, and call it as norm\(x, scale, shift\)",
}
"""Layers that no norm of torch becomes by itself, and what the error says to do."""

SAME_IN_TRAINING = {("frozen_batch", "alpha_batch_norm")}
"""Rules that claim eval mode alone, since weights may train afterwards, which do not yet."""


def converted(case):
    """The model of a rule before, with its norms; after; and what the plan says of each norm."""
    model = case.model()
    before = copy.deepcopy(model)
    made = case.plan(model)
    norms = [before.get_submodule(step.site.name) for step in made.changes]
    return before, norms, made.apply(), made.changes


def assert_rounding(case, found, expected, rounding):
    """No group is off by more than four times what a last bit of the norms makes, as in a proof."""
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        error, allowed = apart(found[group], tensors), 4 * (rounding[group] + EPS)
        assert error <= allowed, f"{case}: {group} off by {error:.1e}, rounding explains {allowed:.1e}"


def off(found, expected):
    """The largest difference in a group, of what both have; infinite where one has what the other has not."""
    worst = 0.0
    for group, tensors in expected.items():
        common = tensors.keys() & found[group].keys()
        worst = max(worst, apart({n: found[group][n] for n in common}, {n: tensors[n] for n in common}))
        if group == "gradients" and tensors.keys() != found[group].keys():
            return math.inf
    return worst


def test_every_layer_is_reached():
    plain = ("layer", "rms", "batch", "group", "instance", "convolution", "linear")
    reached = {target for family, target in TRANSFERS if family in plain}
    assert {entry.name for entry in ZOO} - reached == WRITTEN_BY_HAND.keys(), (
        "a layer has no rule, or has one now"
    )
    again = {rule.target for rule in TRANSFERS.values() if rule.same}
    assert {entry.name for entry in ZOO} == again, "a layer has no rule from itself"
    assert callable(normzoo.to_pre_crms_norm)
    for target, words in WRITTEN_BY_HAND.items():
        for norm in (nn.LayerNorm(8), nn.RMSNorm(8)):
            model = nn.Sequential(nn.Linear(8, 8), norm)
            with pytest.raises(ValueError, match=words):
                normzoo.convert(model, target)
            assert model[1] is norm
    with pytest.raises(ValueError, match="no rule takes a batch norm to crms_norm, only to batch_norm, "):
        normzoo.convert(nn.BatchNorm1d(8), "crms_norm")


def test_every_rule_is_tried():
    assert {(case.family, case.target) for case in CASES} == TRANSFERS.keys()
    assert all(of(claim) for claim in Exactness)


def test_exact_rules():
    """In eval mode and in three steps of training: outputs, gradients by name, and all tensors afterwards."""
    for case in of(Exactness.EXACT):
        before, norms, model, steps = converted(case)
        lost = {name for step in steps for name in step.tensors["lost"] if not name.endswith("skipped")}
        assert not lost and not any(step.parameters_change for step in steps), f"{case}: other tensors"
        batches = samples(model)
        again = all(type(norm).__name__ == "Our" for norm in norms)  # the very code of before
        for look in (evaluated, trained):
            look = partial(look, batches=batches)
            rounding = dict.fromkeys(("outputs", "gradients", "state"), -EPS)
            rounding = rounding if again else last_bit(before, norms, look)
            assert_rounding(case, look(copy.deepcopy(model)), look(copy.deepcopy(before)), rounding)


def test_eval_exact_rules():
    for case in of(Exactness.EVAL_EXACT):
        before, norms, model, _ = converted(case)
        batches = samples(model)
        look = partial(evaluated, batches=batches)
        rounding = last_bit(before, norms, look)
        assert_rounding(case, look(copy.deepcopy(model)), look(copy.deepcopy(before)), rounding)
        error = off(trained(model, batches), trained(before, batches))
        if (case.family, case.target) in SAME_IN_TRAINING:
            assert error == 0, f"{case}: training differs by {error:.1e}"
        else:
            assert error > 1e-6, (
                f"{case}: training differs by {error:.1e} alone, so that it may claim to be exact"
            )


def test_approximate_rules():
    """The function is another one, and the weights are those of before."""
    for case in of(Exactness.APPROXIMATE):
        before, _, model, steps = converted(case)
        batches = samples(model)
        drift = off(evaluated(model, batches), evaluated(before, batches))
        assert 1e-6 < drift < math.inf, f"{case}: drift {drift:.1e}"
        assert not {"weight", "bias"} & {name for step in steps for name in step.tensors["lost"]}, case
        anew = {name for step in steps for name in step.tensors["new"] if name.startswith("running")}
        # What begins as a scaling of rows needs no statistics.
        assert not anew or case.target == "power_norm", f"{case}: {anew} start anew, which needs calibration"


def test_re_initialised_rules():
    """Nothing that was learnt is left: what is not drawn at random is as a new layer has it."""
    for case in of(Exactness.REINITIALISED):
        before, _, model, steps = converted(case)
        batches = samples(model)
        drift = off(evaluated(model, batches), evaluated(before, batches))
        assert 1e-3 < drift < math.inf, f"{case}: drift {drift:.1e}"
        for step in steps:
            assert {"weight", "bias"} <= {*step.tensors["lost"], *step.tensors["new"]}, case
            layer = model.get_submodule(step.site.name)
            made, new = state(layer), []
            for _ in range(2):
                layer.reset_parameters()
                new.append(state(layer))
            drawn = {name for name in made if not torch.equal(new[0][name], new[1][name])}  # at random
            for name in made.keys() - drawn:
                assert torch.equal(made[name], new[0][name]), f"{case}: {name} is not that of a new layer"


def state(layer):
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


class WrittenOut(nn.Module):
    """A norm by stored statistics, which it collects first: the plain average over batches.

    Args:
        layer: has eps, weight and bias.
        axis: that of the channels.
        centred: whether a mean is taken away; else statistics are mean squares.
        groups: of channels, scaled to a mean square of one at every position first; 0 for none.
    """

    def __init__(self, layer, axis, centred, groups):
        super().__init__()
        self.layer, self.axis, self.centred, self.groups = layer, axis, centred, groups
        self.seen = []

    def forward(self, x):
        x = x.movedim(self.axis, -1)
        if self.groups:
            parts = x.unflatten(-1, (self.groups, -1))
            x = (parts / (parts.square().mean(-1, keepdim=True) + GROUP_EPS).sqrt()).flatten(-2)
        if self.training:
            rows = x.flatten(0, -2)
            mean = rows.mean(0) * self.centred
            square = (rows - mean).square().mean(0)
            self.seen.append((mean, square * len(rows) / (len(rows) - self.centred)))
        else:
            mean, square = (torch.stack(each).mean(0) for each in zip(*self.seen, strict=True))
        y = (x - mean) / (square + self.layer.eps).sqrt() * self.layer.weight
        return (y if self.layer.bias is None else y + self.layer.bias).movedim(-1, self.axis)


def test_rules_that_need_calibration():
    """After `recalibrate` the model is that of layers with the statistics of the data; before, it is not."""
    for case in of(Exactness.CALIBRATE):
        before, _, model, steps = converted(case)
        batches, expected, written = samples(model), copy.deepcopy(before), []
        for step in steps:
            layer = model.get_submodule(step.site.name)
            groups = getattr(layer, "group_num", None) or 0
            written.append(
                WrittenOut(layer, getattr(layer, "channel_dim", 1), case.target == "batch_norm", groups)
            )
            parent, _, name = step.site.name.rpartition(".")
            setattr(expected.get_submodule(parent), name, written[-1])
        with torch.no_grad():
            for x in batches:
                expected.train()(x)
        look = partial(evaluated, batches=batches)
        wanted, held = look(expected), [p.detach().clone() for p in model.parameters()]
        assert off(look(model), wanted) > 0.01, f"{case}: it needs no calibration"
        normzoo.recalibrate(model, batches)
        assert_rounding(case, look(model), wanted, last_bit(expected, written, look))
        assert all(map(torch.equal, held, model.parameters())), case
