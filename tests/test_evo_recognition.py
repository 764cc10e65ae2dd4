"""EvoNorms as sources: those of timm, those that only look so, and our own; their running variances."""

import copy

import pytest
import torch
import torchvision_ops  # noqa: F401
from small_models import stirred
from torch import nn

import normzoo
from normzoo.conversion import Exactness
from normzoo.zoo import find

FORMS = ["b0", "b1", "b2", "s0", "s1", "s2"]


def images(channels=8, *, n=6, size=(3, 4)):
    return torch.randn(n, channels, *size) * 2 + 1


TIMM = [f"EvoNorm2d{form.upper()}{a}" for form in FORMS for a in ("", "a") if not (a and form[0] == "b")]


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("apply_act", [True, False])
def test_evo_norms_of_timm(name, apply_act):
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    form = name[9:11].lower()
    own = {"momentum": 0.3} if form[0] == "b" else {"group_size": 4}
    norm = stirred(getattr(evo_norm, name)(24, apply_act=apply_act, **own))
    model, x = nn.Sequential(norm), images(24)
    (site,) = normzoo.inspect(model).sites
    if name.endswith("a") and not apply_act:
        assert site.norm is None and site.note.startswith("without an activation it still divides by the stat")
        with pytest.raises(ValueError, match="and an EvoNorm with apply_act=False is weight"):
            normzoo.convert(model)
        return
    assert site.family == f"evo_{form}" and site.how == "probe" and site.norm.apply_act == apply_act
    made = normzoo.plan(model)
    (step,) = made.steps
    assert step.exactness is Exactness.EXACT and step.tensors["new"] == step.tensors["lost"] == ()
    proof = made.verify(x)
    assert proof.same and proof.trained == (form[0] == "b")
    before, keys = copy.deepcopy(model), model.state_dict().keys()
    made.apply()
    new = model[0]
    assert type(new) is find(f"evo_norm_{form}").cls and model.state_dict().keys() == keys
    assert all(
        t is dict((*norm.named_parameters(), *norm.named_buffers()))[n] for n, t in new.named_parameters()
    )
    assert new.eps == norm.eps and (new.momentum == 0.3 if form[0] == "b" else new.groups == 6)
    outputs = []
    for each in (before, model):
        leaf = x.clone().requires_grad_()
        y = each.train()(leaf)
        grads = torch.autograd.grad(y, (leaf, *each.parameters()), torch.sin(y.detach()), allow_unused=True)
        outputs.append((y, *(g for g in grads if g is not None), *each.buffers()))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_evo_norms_of_timm_with_another_activation():
    evo_norm = pytest.importorskip("timm.layers.evo_norm")
    model = stirred(nn.Sequential(evo_norm.EvoNorm2dS1(24, 6, act_layer=nn.GELU)))
    activation, x = model[0].act, images(24)
    made = normzoo.plan(model)
    assert made.exactness is Exactness.EXACT and made.verify(x).same
    assert made.apply()[0].act is activation
    (step,) = normzoo.plan(model, act_layer=nn.ReLU).steps
    assert step.exactness is Exactness.APPROXIMATE and type(step.make().module.act) is nn.ReLU


@pytest.mark.parametrize("name", ["LayerNorm2d", "LayerNorm2dFp32", "RmsNorm2d", "RmsNorm2dFp32"])
def test_row_norms_of_timm_over_channels(name):
    layers = pytest.importorskip("timm.layers")
    model, x = stirred(nn.Sequential(getattr(layers, name)(8, eps=1e-3))), images()
    before = copy.deepcopy(model)
    made = normzoo.plan(model)
    assert made.exactness is Exactness.EXACT and made.verify(x).same
    made.apply()
    assert (
        isinstance(model[0], normzoo.LayerNorm if name[0] == "L" else normzoo.RMSNorm)
        and model[0].over_channels
    )
    assert model.state_dict().keys() == before.state_dict().keys()
    for ours, theirs in zip(*(gradients(each, x) for each in (model, before)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def gradients(model, x):
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    return y, *torch.autograd.grad(y, (leaf, *model.parameters()), torch.sin(y.detach()))


def test_lookalikes_of_evo_norms_are_unknown():
    evo_norm = pytest.importorskip("timm.layers.evo_norm")

    class Biased(evo_norm.EvoNorm2dB0):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                n = x.numel() / x.shape[1]
                self.running_var.mul_((n - 1) / n)
            return y

    class Detached(evo_norm.EvoNorm2dS0):
        def forward(self, x):
            std = evo_norm.group_std(x, self.groups, self.eps).detach()
            y = x * (x * self.v.view(1, -1, 1, 1)).sigmoid() / std
            return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    class InTraining(evo_norm.EvoNorm2dS2):
        def forward(self, x):
            return super().forward(x) * (1.001 if self.training else 1)

    class BySize(evo_norm.EvoNorm2dS0):
        def forward(self, x):
            return super().forward(x) * (1.001 if x.shape[-1] == 24 else 1)

    class Wide(evo_norm.EvoNorm2dS0):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = nn.Parameter(torch.ones(24))

    class Sum(evo_norm.EvoNorm2dB1):
        def forward(self, x):
            return super().forward(x) + 0.001 * x

    for norm, words in (
        (Biased(24), "but its running_var moves in another way"),
        (Detached(24, 6), "but its gradients in eval mode are not those"),
        (InTraining(24, 6), "it computes another function than evo_s2 .* in training"),
        (BySize(24, 6), "it computes another function than evo_s0 .* in eval mode"),
        (Wide(24, 6), "it holds weight, bias, v, gain, and an EvoNorm weight and bias, and v or running_var"),
        (Sum(24), "it agrees with no norm known here; the nearest, evo_b1"),
    ):
        (site,) = normzoo.inspect(norm).sites
        assert site.norm is None, norm
        with pytest.raises(ValueError, match=words):
            normzoo.convert(norm)


@pytest.mark.parametrize("form", FORMS)
def test_evo_norm_again(form):
    entry = find(f"evo_norm_{form}")
    model = stirred(nn.Sequential(entry.cls(24) if form[0] == "b" else entry.cls(24, groups=6)))
    old, x = model[0], images(24)
    (site,) = normzoo.inspect(model).sites
    assert site.family == f"evo_{form}" and site.how == "class" and not site.flags
    with pytest.raises(ValueError, match=f"it is normzoo's evo_norm_{form} already"):
        normzoo.convert(model)
    (step,) = normzoo.plan(model, eps=0.5).steps
    new = step.make().module
    assert step.exactness is Exactness.APPROXIMATE and new.eps == 0.5 and new.weight is old.weight
    if form[0] == "b":
        (step,) = normzoo.plan(model, sync=True, momentum=0.5).steps
        assert step.exactness is Exactness.EVAL_EXACT and step.make().module.running_var is old.running_var
    else:
        (step,) = normzoo.plan(model, group_size=2).steps
        assert step.exactness is Exactness.APPROXIMATE and step.make().module.groups == 12
    made = normzoo.plan(model, apply_act=False)
    assert made.exactness is Exactness.APPROXIMATE and made.steps[0].tensors["lost"] == ("v",) * (
        form[1] == "0"
    )
    (site,) = normzoo.inspect(made.apply()).sites
    assert "weight · x + bias alone" in site.describe()
    torch.testing.assert_close(model(x), x * old.weight.view(-1, 1, 1) + old.bias.view(-1, 1, 1))


@pytest.mark.parametrize("library", ["normzoo", "timm"])
def test_running_variances_are_calibrated(library):
    """Though an EvoNorm counts no batches; one without an activation has none in use."""
    if library == "timm":
        cls = pytest.importorskip("timm.layers.evo_norm").EvoNorm2dB0
    else:
        cls = normzoo.EvoNormB0
    model = nn.Sequential(cls(8, apply_act=True), nn.Identity(), cls(8, apply_act=False))
    model[2].running_var.fill_(3)
    batches = [images(), 3 * images()]
    normzoo.recalibrate(model, batches)
    wanted = sum(x.var((0, 2, 3)) for x in batches) / 2
    torch.testing.assert_close(model[0].running_var, wanted)
    assert (model[2].running_var == 3).all() and model[0].momentum == 0.1
    with pytest.raises(ValueError, match="the model has no layer with running statistics"):
        normzoo.recalibrate(model[2], batches)
