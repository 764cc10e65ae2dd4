"""fold: which norms stay as they are, and why."""

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from fold_models import Flagged, Masked, Of, Staged, conv, pair, refusal, with_norm
from small_models import stirred
from torch import nn

import normzoo
from normzoo.folding import Unfoldable, plan_fold
from normzoo.folding import trial as fold_trial
from normzoo.folding.steps import take_up
from normzoo.folding.trial import fold_error


class Untraced(nn.Module):
    """Calls past the forward of its child, in a forward that looks at values."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv(), nn.BatchNorm2d(6))

    def forward(self, x):
        return self.net[0](x) if x.sum() > 0 else self.net(x)


class Reading(nn.Module):
    """Whose code that cannot be traced takes numbers of its norm."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.n(self.c(x))

    def penalty(self):
        return self.n.running_var.sum()


def hooked(model, module, register="register_forward_hook"):
    getattr(module(model), register)(lambda *_: None)
    return model


def held(name):
    model = pair(lambda s, x: s.n(s.c(x)))
    model.also = [getattr(model, name)]
    return model


def quantized():
    model = with_norm(nn.BatchNorm2d(6))

    class Packed(torch.Tensor):
        pass

    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Packed))
    return model


def test_what_stays_and_why():
    bn = nn.BatchNorm2d
    act = nn.ReLU()
    cases = {
        "skip": (pair(lambda s, x: s.n(s.c(x)) + s.c(x)), "c: a call of add takes it in Of"),
        "norm skip": (pair(lambda s, x: (lambda h: s.c(h) + h)(s.n(x))), "a call of add takes it"),
        "returned": (pair(lambda s, x: (lambda h: (s.n(h), h))(s.c(x))), "Of returns it among others"),
        "function": (pair(lambda s, x: s.n(F.relu(s.c(x)))), "it takes what a call of relu returns"),
        "inplace": (pair(lambda s, x: s.n(s.c(x).add_(1))), "takes what a call of add_ returns in Of"),
        "between": (
            nn.Sequential(conv(), act, bn(6), act),
            "before it (a ReLU is there, and no layer with a weight)",
        ),
        "first": (nn.Sequential(bn(6), nn.ReLU()), "it takes an input of the model"),
        "padded": (
            nn.Sequential(bn(6), conv(kernel_size=3, padding=1)),
            "Conv2d pads with zeros, which are not shifted",
        ),
        "two norms": (
            Of(lambda s, x: s.n(h := s.c(x)) * s.m(h), c=conv(), n=bn(6), m=bn(6)),
            "c goes into a BatchNorm2d too",
        ),
        "two sources": (pair(lambda s, x: s.c(s.n(x)) + s.c(x)), "nor after it (c: it takes an input"),
        "flag": (Flagged(), "c: the model returns it"),
        "flag inside": (nn.Sequential(Flagged(), nn.ReLU()), "0.c goes into a ReLU too"),
        "mask": (Masked(late=True), "a call of masked_fill takes it in Masked"),
        "past the forward": (
            Of(lambda s, x: s.b(x) + s.b[0](x), b=with_norm(bn(6))),
            "b.0: a call of add takes it in Of",
        ),
        "untraced": (Untraced(), "Untraced, which cannot be traced, may call it past the forwards between"),
        "weight read": (
            pair(lambda s, x: s.n(s.c(x)) * s.c.weight.mean()),
            "c: Of reads its weight itself",
        ),
        "norm read": (pair(lambda s, x: s.n(s.c(x)) * s.n.bias.mean()), "n: Of reads its tensors"),
        "norm read elsewhere": (Reading(), "n: Reading reads its tensors itself"),
        "held": (held("n"), "n: also holds it too, outside the module tree"),
        "layer held": (held("c"), "c: also holds it too, outside the module tree"),
        "hook": (hooked(with_norm(bn(6)), lambda m: m[1]), "BatchNorm2d has hooks that would be lost"),
        "layer's hook": (hooked(with_norm(bn(6)), lambda m: m[0]), "Conv2d has hooks that would be lost"),
        "parent's hook": (
            hooked(nn.Sequential(nn.Sequential(conv()), bn(6)), lambda m: m[0]),
            "the Sequential around it has forward_hooks, and what those do is not clear",
        ),
        "weight norm": (
            nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), bn(6)),
            "is computed, not stored",
        ),
        "quantized": (quantized(), "the weight of Conv2d is a Packed, not a plain tensor"),
        "lazy": (nn.Sequential(nn.LazyConv2d(6, 1), bn(6)), "has no numbers yet"),
        "meta": (with_norm(bn(6)).to("meta"), "BatchNorm2d is on the meta device"),
        "groups": (nn.Sequential(nn.Linear(6, 6), normzoo.PowerNorm(6)), "only with group_num=None"),
        "alpha": (with_norm(normzoo.AlphaBatchNorm(6)), "unless source_weight is 1"),
        "no statistics": (with_norm(bn(6, track_running_stats=False)), "has no running statistics"),
        "rows": (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), "a layer norm takes statistics of its input"),
        "channels": (
            nn.Sequential(conv(), normzoo.UnifiedNorm(5)),
            "in dimension -1 of its input, and those of Conv2d",
        ),
        "dropout": (pair(lambda s, x: s.n(F.dropout(s.c(x), 0.5))), "it takes what a call of dropout returns"),
        "stages": (Staged(), "what Staged does depends on its stop, which callers may set"),
        "stages set": (Of(lambda s, x: s.f(x, 1), f=Staged()), "depends on its stop, which Of sets"),
        "pre-hook": (
            hooked(nn.Sequential(conv(), nn.Sequential(bn(6))), lambda m: m[1], "register_forward_pre_hook"),
            "the Sequential around it has forward_pre_hooks",
        ),
        "Monte Carlo": (
            nn.Sequential(conv(), nn.Dropout(), bn(6)),
            "a Dropout is there, and no layer with a weight",
        ),
    }
    for name, (model, words) in cases.items():
        model.eval()
        if name == "Monte Carlo":
            model[1].train()
            said = refusal(model, evaluate=False)
        elif name in ("lazy", "meta", "quantized"):
            with pytest.raises(ValueError, match="nothing can be folded") as caught:
                plan_fold(model)
            said = str(caught.value)
        else:
            said = refusal(model)
        assert words in said, f"{name}: {said}"


def test_test_runs_that_fail(monkeypatch):
    model = stirred(with_norm(nn.BatchNorm2d(6))).eval()
    (step,) = plan_fold(model).steps
    new = take_up(step, model[0])
    assert fold_error(step, model[0], new) == step.error < 1e-6
    new.weight.data *= 1 + 1e-5
    with pytest.raises(Unfoldable, match=r"in torch.float32 the error would be .* fold in a wider dtype"):
        fold_error(step, model[0], new)
    with monkeypatch.context() as patch:
        patch.setattr(fold_trial, "take_up", lambda fold, layer: layer)
        assert "a test run shows another function" in refusal(model)
    model[1].running_var[2] = torch.nan
    with pytest.raises(ValueError, match="a test run of it gives numbers that are not finite"):
        plan_fold(model)
    ops = pytest.importorskip("torchvision").ops
    mixed = with_norm(ops.FrozenBatchNorm2d(6)).eval()
    mixed[0].bfloat16()
    assert "it returns torch.float32, and the layer alone torch.bfloat16" in refusal(mixed)
