"""Plans: what is chosen, what each step claims, and how it is told."""

import copy
import functools
import json
import logging

import pytest
import torch
from small_models import Chain, Net, OnePlusNorm
from torch import nn

import normzoo
from normzoo.conversion import TRANSFERS, Exactness, Norm, trial
from normzoo.zoo import find


def converted(model, to="same", **filters):
    """The names that a plan converts, with what they become."""
    return {step.site.name: step.target for step in normzoo.plan(model, to, **filters).changes}


LN = [f"blocks.{i}.ln_{j}" for i in range(3) for j in (1, 2)]


@pytest.mark.parametrize(
    "filters, names",
    [
        ({}, [*LN, "rms"]),
        ({"include": "blocks.0.*"}, LN[:2]),
        ({"include": ["rms", "re:blocks.[12].ln_1"]}, [LN[2], LN[4], "rms"]),
        ({"exclude": "*.ln_2"}, [*LN[::2], "rms"]),
        ({"types": "layer"}, LN),
        ({"types": nn.RMSNorm}, ["rms"]),
        ({"types": ("RMSNorm", "batch")}, ["rms"]),
        ({"where": lambda name, module: module.eps is None}, ["rms"]),
        ({"include": "blocks.*", "exclude": ["re:blocks.[02].*", "*.ln_2"], "types": nn.LayerNorm}, LN[2:3]),
    ],
)
def test_filters(filters, names):
    assert list(converted(Net(), **filters)) == names


def test_precedence_of_rules():
    to = {
        "_default": "layer_norm",
        "re:.*ln_2": None,
        "blocks.1.*": "rms_norm",
        "blocks.1.ln_1": normzoo.LayerNorm,
    }
    found = converted(Net(), to)
    assert found == {
        "blocks.0.ln_1": "layer_norm",
        "blocks.1.ln_1": "layer_norm",  # exact name before glob
        "blocks.1.ln_2": "rms_norm",  # glob before expression
        "blocks.2.ln_1": "layer_norm",
        "rms": "layer_norm",
    }
    assert converted(Net(), {"blocks.0.ln_1": "same"}) == {"blocks.0.ln_1": "layer_norm"}
    assert converted(Net(), dict(reversed(to.items()))) == found


def test_rules_of_one_kind_go_in_order():
    assert converted(Net(), {"*.ln_1": "rms_norm", "blocks.*": "layer_norm"})["blocks.0.ln_1"] == "rms_norm"
    assert converted(Net(), {"blocks.*": "layer_norm", "*.ln_1": "rms_norm"})["blocks.0.ln_1"] == "layer_norm"


def test_a_function_of_the_site():
    def to(site):
        if site.name == "rms":
            return nn.Identity()
        if site.name == "blocks.0.ln_1":
            return functools.partial(normzoo.RMSNorm, cast="llama")
        return "layer_norm" if site.family == "layer" and site.name.endswith("1") else None

    model = Net()
    made = normzoo.plan(model, to)
    assert [step.target for step in made.changes] == ["rms_norm", "layer_norm", "layer_norm", "Identity"]
    assert made.changes[-1].exactness is Exactness.APPROXIMATE and made.changes[-1].error > 0.1
    made.apply()
    assert type(model.rms) is nn.Identity and model.blocks[0].ln_1.cast == "llama"
    assert type(model.blocks[0].ln_2) is nn.LayerNorm
    with pytest.raises(TypeError, match=r"to returned an int for 'blocks.0.ln_1'; it must return a module"):
        normzoo.plan(Net(), lambda site: 3)


def test_a_module_of_the_caller_is_as_exact_as_it_is():
    def like(site):
        new = nn.LayerNorm(8)
        new.weight, new.bias = site.module.weight, site.module.bias
        return new

    model = Net()
    made = normzoo.plan(model, like, types="layer")
    assert {step.exactness for step in made.changes} == {Exactness.EVAL_EXACT}
    assert made.changes[0].tensors["kept"] == ("weight", "bias")
    assert made.verify(torch.randn(3, 8)).same
    with pytest.raises(
        ValueError, match="a test run of it beside the new Linear failed: RuntimeError: mat1 and mat2"
    ):
        normzoo.plan(model, lambda site: nn.Linear(3, 3), strict=True)


def test_options_overrule_the_norm():
    (step,) = normzoo.plan(Net(), "rms_norm", types="rms", eps=0.1).changes
    assert step.exactness is Exactness.APPROXIMATE and step.make().module.eps == 0.1 and step.error > 0.1
    model = normzoo.convert(Net(), functools.partial(normzoo.RMSNorm, cast="llama"), types="rms", eps=0.2)
    assert model.rms.cast == "llama" and model.rms.eps == 0.2
    again = normzoo.plan(Net(), "layer_norm", eps=1e-5, types="layer")
    assert again.exactness is Exactness.EXACT


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (
            {"to": {"blocks.9.*": None}},
            ValueError,
            r"the rule 'blocks.9.\*' matches no norm; norm classes seen: 6 t",
        ),
        (
            {"include": "layers.*"},
            ValueError,
            r"'layers.\*' in include matches no norm; norm classes seen: 6 torch",
        ),
        ({"exclude": ("rms", "blocks.0.ln_3")}, ValueError, "'blocks.0.ln_3' in exclude matches no norm"),
        ({"types": "batch"}, ValueError, r"(?s)nothing can be converted.* and 4 more: filtered out"),
        ({"to": None}, ValueError, "nothing can be converted.*\n.*: as asked"),
        ({"to": {0: "rms_norm"}}, TypeError, "to has the key 0; keys must be names"),
        ({"include": 3}, TypeError, "convert: include is 3; it must be names, globs"),
        ({"exclude": [nn.RMSNorm]}, TypeError, "exclude holds <class .*; it must hold names, globs or 're:'"),
        (
            {"types": ["rms", "lyer"]},
            ValueError,
            r"'lyer' in types is no family \(layer, .*norm classes seen: 6 torch",
        ),
        ({"types": [3]}, TypeError, "types holds 3; it must hold families, class names or classes"),
        ({"where": "rms"}, TypeError, "where is a str; it must be a function of name and module"),
        ({"to": functools.partial(normzoo.RMSNorm, 8)}, TypeError, "positional arguments; pass them by name"),
        (
            {"to": "rms_norm", "momentum": 0.1},
            TypeError,
            "RMSNorm takes no 'momentum'; it takes normalized_shape",
        ),
        ({"to": "same", "cast": "llama"}, TypeError, "LayerNorm takes no 'cast'"),
    ],
)
def test_bad_arguments_leave_the_model(arguments, error, words):
    model = Net()
    before = list(model.modules())
    with pytest.raises(error, match=words):
        normzoo.convert(model, **arguments)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_strict():
    model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4))
    with pytest.raises(
        ValueError, match=r"strict=True, .*\n  1: no rule takes a batch norm to layer_norm, only to batch_norm"
    ):
        normzoo.convert(model, "layer_norm", strict=True)
    assert type(model[0]) is nn.LayerNorm
    normzoo.convert(model, "layer_norm", strict=True, exclude="1")
    assert type(model[0]) is normzoo.LayerNorm


def test_a_plan_touches_nothing():
    model = Net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules, random = list(model.modules()), torch.get_rng_state()
    made = normzoo.plan(model, "rms_norm")
    made.verify(torch.randn(3, 8))
    assert str(made) and made.to_json()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.set_rng_state(random)


def test_json_says_all():
    model = nn.Sequential(OnePlusNorm(8), nn.RMSNorm(8), nn.BatchNorm1d(8))
    made = normzoo.plan(model, "layer_norm")
    first, second, third = json.loads(made.to_json())["steps"]
    assert (
        first["action"] == "convert" and first["target"] == "layer_norm" and first["exactness"] == "eval-exact"
    )
    assert first["tensors"] == {"kept": ["bias"], "converted": ["weight"], "new": [], "lost": []}
    assert first["error"] <= 1e-6 and second["exactness"] == "approximate" and second["error"] > 0.1
    assert (
        third["action"] == "refuse"
        and third["target"] is None
        and "no rule takes a batch norm" in third["reason"]
    )


def test_the_table():
    made = normzoo.plan(Net(), "rms_norm", exclude="blocks.0.ln_1")
    lines = str(made).splitlines()
    assert lines[0].split() == ["norm", "class", "computes", "becomes", "error", "notes"]
    # A star where the numbers differ; the norm that stays has a row of its own.
    assert [line.split()[0] for line in lines[2:5]] == ["blocks.0.ln_1", "blocks.*.ln_*", "rms"]
    assert "filtered out" in lines[2] and "x5" in lines[3] and "rms_norm: approximate" in lines[3]
    assert lines[-3:] == [
        "7 norms: 1 kept, 6 converted",
        "conversions: 5 approximate, 1 exact",
        "tensors: 11 kept, 0 converted, 0 new, 0 lost",
    ]


def test_a_family_that_is_none_of_ours():
    handle = normzoo.register_adapter(nn.RMSNorm, lambda module: Norm("odd", (8,), 1e-5))
    try:
        step, _ = normzoo.plan(nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8))).steps
    finally:
        handle.remove()
    assert step.action == "refuse" and step.reason == "normzoo has no layer yet that computes an odd norm"


def test_meta_models_are_planned_with_stand_ins():
    with torch.device("meta"):
        model = Net()
    made = normzoo.plan(model, "rms_norm")
    exact, changed = made.changes[-1], made.changes[0]
    assert exact.exactness is Exactness.EXACT and exact.error <= 1e-6
    assert changed.exactness is Exactness.APPROXIMATE and changed.error > 0.1
    made.apply()
    assert model.rms.weight.is_meta and type(model.rms) is normzoo.RMSNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_claims_hold_in_every_dtype(dtype):
    model = nn.Sequential(OnePlusNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)).to(dtype)
    made = normzoo.plan(model)
    assert [step.exactness for step in made.changes] == ["eval-exact", "exact", "exact"]
    assert made.verify(torch.randn(4, 8, dtype=dtype)).same
    made.apply()
    assert all(parameter.dtype == dtype for parameter in model.parameters())


SOURCES = {
    "layer": [nn.LayerNorm(12), nn.LayerNorm(12, bias=False), nn.LayerNorm((3, 4)), OnePlusNorm(12)],
    "rms": [nn.RMSNorm(12), nn.RMSNorm((3, 4), eps=1e-3), nn.RMSNorm(12, elementwise_affine=False)],
    "crms": [normzoo.CRMSNorm(12), normzoo.CRMSNorm((3, 4), 1e-2, elementwise_affine=True)],
    "batch": [nn.BatchNorm2d(12), nn.BatchNorm1d(12, eps=1e-2, momentum=None), nn.SyncBatchNorm(12)],
    "frozen_batch": [normzoo.FrozenBatchNorm(12), normzoo.FrozenBatchNorm(12, eps=1e-2)],
    "ghost_batch": [normzoo.GhostBatchNorm(12, 2), normzoo.GhostBatchNorm(12, 2, affine=False)],
    "group": [nn.GroupNorm(12, 12), nn.GroupNorm(12, 12, eps=1e-2, affine=False)],
    "instance": [nn.InstanceNorm2d(12), nn.InstanceNorm1d(12, affine=True)],
    "alpha_batch": [normzoo.AlphaBatchNorm(12), normzoo.AlphaBatchNorm(12, pseudo_count=16, affine=False)],
    "adab2n": [normzoo.AdaB2N(12, 3), normzoo.AdaB2N(12, 3, kappa=0.4, affine=False, absent="official")],
    "batch_channel": [
        normzoo.BatchChannelNorm(12, 4, channel_affine="channel", eps=1e-2),
        normzoo.BatchChannelNorm(12, 4, estimate=True, update_rate=0.1, order="mean_first"),
    ],
    "power": [
        normzoo.PowerNorm(12, group_num=None, channel_dim=1, eps=1e-2),
        normzoo.PowerNorm(12, group_num=None, channel_dim=1, affine=False, warmup_iters=0),
    ],
    "unified": [normzoo.UnifiedNorm(12, channel_dim=1), normzoo.UnifiedNorm(12, 1, channel_dim=1, bias=False)],
    "evo_b0": [normzoo.EvoNormB0(12, momentum=0.2), normzoo.EvoNormB0(12, apply_act=False)],
    "evo_b1": [normzoo.EvoNormB1(12, running_var_unbiased=False)],
    "evo_b2": [normzoo.EvoNormB2(12, eps=1e-3)],
    "evo_s0": [normzoo.EvoNormS0(12, 3), normzoo.EvoNormS0(12, 4, apply_act=False)],
    "evo_s1": [normzoo.EvoNormS1(12, 3), normzoo.EvoNormS1(12, 3, act_layer=nn.GELU)],
    "evo_s2": [normzoo.EvoNormS2(12, group_size=2)],
    "region_b": [normzoo.RegionNormB(12), normzoo.RegionNormB(12, per_instance=True, resize="max")],
    "region_l": [normzoo.RegionNormL(12, 0.5)],
    "adaptive_layer": [normzoo.AdaptiveLayerNorm(3)],
    "adaptive_rms": [normzoo.AdaptiveRMSNorm(3, eps=1e-2)],
    "time_layer": [normzoo.TimeDependentLayerNorm(3)],
    "time_rms": [normzoo.TimeDependentRMSNorm(3, partial=0.7, bias=True)],
}


class Modulated(nn.Sequential):
    """Gives scale and shift to the norm that it holds."""

    def forward(self, x):
        return self[0](x, x[:, 0, 0], x.flip(0))


OPTIONS = {
    "ghost_batch_norm": {"ghost_batch_size": 2},
    "group_norm": {"num_groups": 12},
    "adab2n": {"num_tasks": 3, "momentum": 0.2},
    "batch_channel_norm": {"num_groups": 4},
    **{f"evo_norm_b{n}": {"momentum": 0.2} for n in range(3)},
}


def runs(rule, source):
    """Whether the layer takes what the norm of the rule does."""
    wide = len(getattr(source, "normalized_shape", (12,))) > 1
    narrow = ("power_norm", "unified_norm", "time_dependent_layer_norm", "time_dependent_rms_norm")
    return not ((wide and rule.target in narrow) or ("1d" in str(source) and rule.target == "region_norm_l"))


RULES = [rule for rule in TRANSFERS.values() if rule.target != "weight_standardize"]  # which is about no norm


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.family} to {rule.target}")
def test_every_rule_keeps_its_claim(rule):
    options = {} if rule.same or rule.family == "group" else OPTIONS.get(rule.target, {})
    for source in copy.deepcopy(SOURCES[rule.family]):
        if not runs(rule, source):
            continue
        if rule.same and type(source).__module__.startswith("normzoo"):
            source.__class__ = type("Marked", (type(source),), {})  # the very class would stay
        for tensor in (*source.parameters(), *source.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        kind = Modulated if rule.family.startswith("adaptive") else nn.Sequential
        pair = rule.target.startswith("evo") and not rule.same
        made = normzoo.plan(kind(source, nn.ReLU()) if pair else kind(source), rule.target, **options)
        assert made.exactness in (rule.exactness, Exactness.EVAL_EXACT)
        shape = getattr(source, "normalized_shape", (12, 4) if "1d" in str(source) else (12, 2, 3))
        x = torch.randn(5, *shape) * (1e-2 if rule.target == "time_dependent_rms_norm" else 1)  # eps shows
        taken = getattr(made.steps[0].make().module, "side_inputs", ())
        beside = {name: value for name, value in find(rule.target).beside(x).items() if name in taken}
        proof = made.verify(x, **beside)
        assert proof.same == (made.exactness in ("exact", "eval-exact")), source
        of_batch = ("batch", "ghost_batch", "adab2n", "batch_channel", "evo_b0", "evo_b1", "evo_b2")
        assert proof.trained == (rule.family in of_batch and rule.exactness == "exact")


def test_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="normzoo"):
        normzoo.convert(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), "layer_norm")
    info, warning = caplog.records
    assert info.levelname == "INFO" and "2 norms: 1 converted, 1 refused" in info.getMessage()
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("convert: 1 norm left as they are:\n  1: no rule takes a batch norm")


def test_a_norm_that_needs_a_side_input_is_not_measured(monkeypatch):
    class Masked(normzoo.RMSNorm):
        side_inputs = ("mask",)

        def forward(self, x):
            return super().forward(x) * normzoo.side_inputs.side_input(self, "mask")

    entry = normzoo.zoo.find("rms_norm")
    monkeypatch.setattr(
        normzoo.conversion.transfer, "adapted", lambda cls, *_: Masked if cls is entry.cls else cls
    )
    model = nn.Sequential(nn.RMSNorm(8))
    made = normzoo.plan(model)
    (step,) = made.changes
    assert step.error is None and step.reason == "not measured, as it takes mask from normzoo.inputs"
    made.apply()
    with pytest.raises(ValueError, match="there is no mask"):
        model(torch.randn(2, 8))


def test_norms_that_fit_no_rule():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 8))

    reasons = {}
    for norm in (
        Norm("rms", None, 1e-5),
        Norm("rms", (8,), 1e-5, "weight"),
        Norm("rms", (2, 8), 1e-5, "weight", groups=2),
        Norm("rms", (2, 8), 1e-5, "weight", arguments=("gate",)),
        Norm("rms", (2, 8), 1e-5, bias="weight"),
    ):
        handle = normzoo.register_adapter(Wide, lambda module, norm=norm: norm)
        try:
            (step,) = [
                s for s in normzoo.plan(nn.Sequential(Wide(), nn.RMSNorm(8))).steps if s.action == "refuse"
            ]
            reasons[step.reason] = norm
        finally:
            handle.remove()
    for words in (
        "does not say how wide",
        r"normalises (8,) with a weight of shape (2, 8)",
        "normalises 2 groups",
        "its callers may pass gate",
        "has a bias and no weight",
    ):
        assert any(words in reason for reason in reasons), words


def test_the_error_is_that_of_the_parameters_of_today():
    norm = nn.LayerNorm(8)
    nn.init.constant_(norm.bias, 100.0)  # beside which the rest is small
    (step,) = normzoo.plan(nn.Sequential(norm), "rms_norm").changes
    x = trial.inputs_for(step.site.norm, torch.device("cpu"))
    with torch.no_grad():
        old, new = norm(x), step.make().module(x)
    assert step.error == pytest.approx(trial.distance(new, old, (-1,)), rel=1e-5)


def test_none_keeps_what_is_unknown():
    class OddNorm(nn.Module):
        def forward(self, x):
            return x.sin()

    model = nn.ModuleDict({"a": nn.LayerNorm(8), "b": OddNorm()})
    normzoo.convert(model, {"b": None, "_default": "same"}, strict=True)
    asked = []
    with pytest.raises(ValueError, match="strict=True"):
        normzoo.convert(model, lambda site: asked.append(site.norm.eps) or "rms_norm", strict=True)
    assert asked == [1e-5]


def test_modules_of_the_caller_on_meta_are_not_measured():
    with torch.device("meta"):
        model = Chain()
        (step, _) = normzoo.plan(model, lambda site: nn.LayerNorm(8)).steps
    assert step.exactness is Exactness.APPROXIMATE and step.error is None
    assert step.reason == "not measured, as it is on meta"


def test_a_second_conversion_over_channels_says_so():
    class Norm2d(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    model = normzoo.convert(nn.Sequential(Norm2d(6)))
    with pytest.raises(ValueError, match="it is normzoo's layer_norm already"):
        normzoo.convert(model)


def test_options_that_show_nothing_yet():
    model = nn.Sequential(nn.RMSNorm(8)).bfloat16().requires_grad_(False)
    made = normzoo.plan(model, bias=True)
    assert made.exactness == "approximate" and made.steps[0].tensors["new"] == ("bias",)
    made.apply()
    assert model[0].bias.dtype == torch.bfloat16 and not model[0].bias.requires_grad
    (step,) = normzoo.plan(nn.RMSNorm(8), functools.partial(normzoo.RMSNorm, eps=0.1), eps=0.2).steps
    assert step.make().module.eps == 0.2


def test_rules_by_expression_match_in_full():
    with pytest.raises(ValueError, match="the rule 're:no' matches no norm"):
        normzoo.plan(Chain(), {"re:no": "rms_norm"})


def test_a_row_of_the_table_has_the_largest_error():
    made = normzoo.plan(nn.Sequential(nn.RMSNorm(8), nn.RMSNorm(8)), "layer_norm")
    for step, error in zip(made.steps, (0.25, 0.125), strict=True):
        step.error = error
    assert "x2" in str(made) and "2.5e-01" in str(made)
