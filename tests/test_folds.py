"""fold: which norms go into which layers of small models."""

import copy
import json
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from fold_models import (
    AFTER,
    BEFORE,
    IMAGES,
    ROWS,
    TOKENS,
    Masked,
    Of,
    Staged,
    assert_folds,
    conv,
    ready,
    refusal,
    steps,
    with_norm,
)
from small_models import stirred
from torch import fx, nn
from torch.nn.utils import parametrize

import normzoo
from normzoo.folding import Folded, plan_fold

STAYS = ("refuse", "", ())


def test_every_norm_that_is_a_fixed_map():
    of_images = {
        "batch": lambda: nn.BatchNorm2d(6),
        "sync": lambda: nn.SyncBatchNorm(6),
        "ours": lambda: normzoo.BatchNorm2d(6),
        "frozen": lambda: normzoo.FrozenBatchNorm(6),
        "alpha": lambda: normzoo.AlphaBatchNorm(6, source_weight=1),
        "ghost": lambda: normzoo.GhostBatchNorm(6, 2),
        "adab2n": lambda: normzoo.AdaB2N(6, 3),
        "instance": lambda: nn.InstanceNorm2d(6, track_running_stats=True, affine=True),
        "power": lambda: normzoo.PowerNorm(6, group_num=None, channel_dim=1),
        "unified": lambda: normzoo.UnifiedNorm(6, channel_dim=1, outlier_filtration=True),
    }
    for name, norm in of_images.items():
        for layer in (conv(kernel_size=3, groups=2, bias=False), nn.ConvTranspose2d(6, 6, 3, stride=2)):
            model = nn.Sequential(layer, norm(), nn.ReLU())
            assert_folds(name, model, IMAGES, {"1": (*BEFORE, ("0",))})
        assert_folds(name, nn.Sequential(norm(), conv()), IMAGES, {"0": (*AFTER, ("1",))})
    for name, norm in {
        "power": lambda: normzoo.PowerNorm(6, group_num=None),
        "unified": lambda: normzoo.UnifiedNorm(6),
    }.items():
        made = assert_folds(name, nn.Sequential(nn.Linear(6, 6), norm()), TOKENS, {"1": (*BEFORE, ("0",))})
        assert made[1].dims is None
        assert_folds(name, nn.Sequential(norm(), nn.Linear(6, 4, bias=False)), TOKENS, {"0": (*AFTER, ("1",))})
        tied = nn.Embedding(9, 6)
        model = assert_folds(name, nn.Sequential(tied, norm()), torch.arange(9), {"1": (*BEFORE, ("0",))})
        assert model[0] is not tied


def test_around_corners():
    """Through parents, twice, in a chain, to several layers, and through what does nothing in eval mode."""
    bn = nn.BatchNorm2d
    inner = nn.Sequential(conv(), nn.Dropout())
    model = nn.Sequential(inner, nn.Identity(), nn.Sequential(bn(6), nn.ReLU()))
    assert_folds("parents", model, IMAGES, {"2.0": (*BEFORE, ("0.0",))})
    model = Of(lambda s, x: s.n(F.dropout(s.c(x), 0.5, s.training).contiguous()), c=conv(), n=bn(6))
    assert_folds("functions", model, IMAGES, {"n": (*BEFORE, ("c",))})
    model = nn.Sequential(conv(), bn(6), bn(6), nn.Dropout(), normzoo.FrozenBatchNorm(6))
    assert_folds("chain", model, IMAGES, dict.fromkeys(("1", "2", "4"), (*BEFORE, ("0",))))
    model = nn.Sequential(bn(6), bn(6), conv(), bn(6))
    both = {"0": (*AFTER, ("2",)), "1": (*AFTER, ("2",)), "3": (*BEFORE, ("2",))}
    assert_folds("both sides", model, IMAGES, both)
    norm, layer = bn(6), conv()
    model = nn.Sequential(conv(), norm, conv(), norm)
    made = assert_folds("one norm, two layers", model, IMAGES, {"1": (*BEFORE, ("0", "2"))})
    assert made[1] is made[3] and made[1].into == ("0", "2")
    made = assert_folds(
        "one pair", nn.Sequential(layer, norm, nn.ReLU(), layer, norm), IMAGES, {"1": (*BEFORE, ("0",))}
    )
    assert made[0] is made[3] is not layer
    model = Of(
        lambda s, x: (lambda h: x + s.q(h) * s.k(h))(s.n(x)),
        n=normzoo.PowerNorm(6, group_num=None),
        q=nn.Linear(6, 6),
        k=nn.Linear(6, 6, bias=False),
    )
    made = assert_folds("two readers", model, TOKENS, {"n": (*AFTER, ("q", "k"))})
    assert made.k.bias is not None
    model = Of(lambda s, x: s.b[1](s.b[2](s.b[0](x))), b=nn.Sequential(conv(), nn.ReLU(), bn(6)))
    assert_folds("a forward that never runs", model, IMAGES, {"b.2": (*BEFORE, ("b.0",))})
    model = nn.Sequential(nn.BatchNorm2d(6, affine=False), conv(kernel_size=3, padding=1))
    model[0].running_mean.zero_()
    y = model.eval()(IMAGES.float())
    assert steps(plan_fold(model)) == {"0": (*AFTER, ("1",))}  # there is nothing to shift beside the zeros
    torch.testing.assert_close(normzoo.fold(model)(IMAGES.float()), y)


def test_activations_of_the_norm_stay():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        conv(), layers.BatchNormAct2d(6, act_layer="silu"), conv(), layers.FrozenBatchNormAct2d(6)
    )
    made = assert_folds("act", model, IMAGES, {"1": (*BEFORE, ("0",)), "3": (*BEFORE, ("2",))})
    assert type(made[1].act).__name__ == "SiLU" and made[1].then == ("act",)
    said = refusal(nn.Sequential(layers.BatchNormAct2d(6), conv()))
    assert "nor after it (its act stands between)" in said


def test_only_what_is_in_eval_mode():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), conv(), normzoo.FrozenBatchNorm(6))
    plan = plan_fold(model)
    assert steps(plan) == {"1": STAYS, "3": (*BEFORE, ("2",))}
    assert (
        "BatchNorm2d is in training mode, where it goes by the batch; call eval() first" in plan.steps[0].reason
    )
    assert "call eval() first" in refusal(with_norm(nn.BatchNorm2d(6)), evaluate=False)


def test_arguments_of_forwards():
    model = ready(Masked(late=False))
    mask = torch.tensor([[False, True, True], [False, False, True]])
    y = model(TOKENS, mask)
    normzoo.fold(model)
    torch.testing.assert_close(model(TOKENS, mask), y)
    torch.testing.assert_close(model(TOKENS), y)
    stops = Of(lambda s, x: s.f(x), f=Staged())  # a flag that cannot be traced, and that nobody sets
    assert_folds("flag", stops, IMAGES, {"f.n": (*BEFORE, ("f.c",))})
    with normzoo.inputs(model, pad_mask=mask):  # there is still something that takes it
        torch.testing.assert_close(model(TOKENS), y)


def test_where_the_channels_are():
    """A norm over dimension 1 behind a Linear is folded for (N, C), and says so of anything else."""
    model = ready(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    square = torch.randn(2, 4, 6, dtype=torch.float64)
    y = model(ROWS)
    assert steps(plan_fold(model, ROWS)) == {"1": (*BEFORE, ("0",))}
    with pytest.raises(
        ValueError, match="its input has 3 dimensions, its channels in another one than those of Linear"
    ):
        plan_fold(model, square)
    made = normzoo.fold(model, inplace=False)
    torch.testing.assert_close(made(ROWS), y)
    with pytest.raises(
        ValueError, match=r"Folded: the input has shape \(2, 4, 4\), .* into 0 for inputs of 2 dimensions"
    ):
        made(square)
    images = normzoo.fold(ready(nn.Sequential(conv(), normzoo.FrozenBatchNorm(6))))
    with pytest.raises(ValueError, match="for inputs of 4 dimensions"):
        images(torch.randn(6, 6, 6, dtype=torch.float64))


def test_tied_weights_elsewhere_stay():
    table, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = table.weight
    model = ready(nn.Sequential(table, normzoo.UnifiedNorm(6), nn.ReLU(), head))
    y, weight = model(torch.arange(9)), table.weight
    plan = plan_fold(model)
    assert plan.steps[0].note == "0 no longer shares its weight"
    torch.testing.assert_close(plan.apply()(torch.arange(9)), y)
    assert model[3].weight is weight is not model[0].weight


def standardized():
    layers = pytest.importorskip("timm.layers")
    by_hand = conv(kernel_size=3)
    parametrize.register_parametrization(by_hand, "weight", normzoo.WeightStandardization())
    return {
        "ours": normzoo.WSConv2d(6, 6, 3, variant="scaled"),
        "timm": layers.ScaledStdConv2d(6, 6, 3),
        "by hand": by_hand,
    }


def test_standardized_weights_become_plain_first():
    for name, layer in standardized().items():
        layer.requires_grad_(False)
        model = ready(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6)))
        wanted = {"0": ("bake", "", ()), "1": (*BEFORE, ("0",)), "3": ("keep", "", ())}
        made = assert_folds(name, model, IMAGES, wanted)
        assert type(made[0]) is nn.Conv2d and [*made[0].state_dict()] == ["weight", "bias"], name
        assert not made[0].weight.requires_grad, name
    alone = ready(normzoo.WSLinear(6, 4))
    y = alone(ROWS)
    root = normzoo.fold(alone, ROWS)
    assert type(root) is nn.Linear and torch.equal(root(ROWS), y)
    model = ready(nn.Sequential(normzoo.WSConv2d(6, 6, 3), nn.BatchNorm2d(6)))
    assert steps(plan_fold(model, exclude="1"))["1"] == ("keep", "", ())
    with pytest.raises(ValueError, match="WSConv2d has a forward of its own"):
        plan_fold(model, exclude="0")


def test_the_plan():
    model = stirred(
        nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), conv(), nn.GroupNorm(2, 6))
    )
    model.eval()
    x = IMAGES.float()
    with pytest.raises(ValueError, match="fold: strict=True, and some norms cannot be folded\n  3: not into"):
        plan_fold(model[:4], strict=True)
    plan = plan_fold(model)
    assert plan.rows()[1][0] == (
        "1",
        "BatchNorm2d",
        "batch (6,), eps=1e-05",
        "part of 0",
        plan.rows()[1][0][4],
        "",
    )
    assert plan.summary().splitlines() == [
        "3 norms: 2 folded, 1 kept",
        "folded: 1 into what comes before it, 1 into what comes after it",
    ]
    assert json.loads(plan.to_json())["steps"][0]["into"] == ["0"] and plan.table() == str(plan)
    proof = plan.verify(x)
    assert proof.same and 0 < proof.error <= 4 * proof.rounding and proof.idle == 0
    assert type(model[1]) is nn.BatchNorm2d  # as it was
    model[0].weight.data *= 2  # what is there at the end is folded
    y = model(x)
    torch.testing.assert_close(plan.apply()(x), y)
    for call in (plan.apply, lambda: plan.verify(x)):
        with pytest.raises(ValueError, match="this plan was applied already, and the norms are gone"):
            call()
    other = nn.Sequential(conv(), nn.BatchNorm2d(6)).eval()
    late = plan_fold(other)
    other[1].train()
    with pytest.raises(
        ValueError, match=r"fold: the model has changed since the plan was made: .* training mode"
    ):
        late.apply()
    assert type(other[1]) is nn.BatchNorm2d


def test_what_is_said(caplog):
    model = ready(
        nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU(), nn.LayerNorm(5))
    )
    with caplog.at_level(logging.INFO, "normzoo"):
        normzoo.fold(model, IMAGES)
    account, warning = caplog.records
    assert (
        account.levelno == logging.INFO
        and "proof: the model computes the same function" in account.getMessage()
    )
    assert warning.levelno == logging.WARNING
    assert "fold: 1 norm left as they are:\n  3: not into what comes before it (a ReLU" in warning.getMessage()
    with pytest.raises(ValueError, match="fold: 'nothing' in include matches no norm"):
        normzoo.fold(model, include="nothing")
    with pytest.raises(TypeError, match="fold: model is a str; it must be"):
        normzoo.fold("model")
    with pytest.raises(ValueError, match=r"fold: '0' is wrapped \(OptimizedModule\)"):
        normzoo.fold(nn.Sequential(torch.compile(model, backend="eager")))


class Odd(nn.Module):
    """Returns something else where its norm is gone."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.n(self.c(x)) * (1.0 if isinstance(self.n, nn.BatchNorm2d) else 1.01)


def test_a_failed_proof_leaves_the_model():
    model = ready(Odd())
    y, state = model(IMAGES), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"fold: FAILED: the model computes another function.*left as it was"):
        normzoo.fold(model, IMAGES)
    assert torch.equal(model(IMAGES), y) and model.state_dict().keys() == state.keys()


def test_half_precision():
    """Weights are rounded once, and what would lose more than that is refused."""
    for dtype in (torch.bfloat16, torch.float16):
        model = stirred(nn.Sequential(conv(), nn.BatchNorm2d(6))).to(dtype).eval()
        exact = copy.deepcopy(model).double()(IMAGES.to(dtype).double())
        old, new = model(IMAGES.to(dtype)), normzoo.fold(model)(IMAGES.to(dtype))
        worst = [(each.double() - exact).abs().max() for each in (new, old)]
        assert worst[0] <= 2 * worst[1] + 2 * torch.finfo(dtype).eps * exact.abs().max()
    norm = normzoo.UnifiedNorm(6, affine=False).eval()
    norm.running_var.fill_(1e-9)
    norm.eps = 1e-12
    layer = nn.Linear(6, 6).half()
    layer.weight.data.fill_(100)
    with pytest.raises(ValueError, match="too large for"):
        plan_fold(nn.Sequential(layer, norm))


def test_what_is_made_works_elsewhere():
    model = stirred(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())).eval()
    x = ROWS.float()
    y = model(x)
    normzoo.fold(model)
    assert repr(model[1]) == "Folded(into 0)" and model[1].num_features == 6
    made = fx.symbolic_trace(model)
    made.graph.eliminate_dead_code()
    made.recompile()
    forms = {
        "pickle": pickle.loads(pickle.dumps(model)),
        "fx": made,
        "compile": torch.compile(model, backend="eager", fullgraph=True),
        "export": torch.export.export(model, (x,)).module(),
        "again": copy.deepcopy(model),
    }
    for name, form in forms.items():
        torch.testing.assert_close(form(x), y, msg=name)
    with pytest.raises(ValueError, match="for inputs of 2 dimensions"):
        made(x[None])
    model.append(nn.BatchNorm1d(6).eval())
    with pytest.raises(ValueError, match="a ReLU is there"):
        plan_fold(model)
    after = ready(nn.Sequential(nn.Linear(6, 6), Folded(("0",)), nn.BatchNorm1d(6)))
    assert steps(plan_fold(after)) == {"2": (*BEFORE, ("0",))}
