"""What conversion of weights keeps: that of other libraries' layers, that behind a batch norm, and baking."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from small_models import stirred
from tolerance import assert_as_good
from torch import nn

import normzoo
from normzoo.conversion import Exactness, bake

WS = "weight_standardize"


class Bit(nn.Conv2d):
    """As in BiT."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) / (var + 1e-10).sqrt(), self.bias)


class Theirs(nn.Linear):
    """As in the authors' snippet, for a linear map."""

    detached, biased = False, False

    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        std = w.std(1, keepdim=True, unbiased=not self.biased) + 1e-5
        return F.linear(x, w / (std.detach() if self.detached else std), self.bias)


class Detached(Theirs):
    detached = True


class Biased(Theirs):
    biased = True


def test_layers_of_others_convert_exactly():
    from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame

    cases = {
        "std": (StdConv2d(3, 8, 3, 2, eps=1e-8), "timm", 1e-8),
        "static": (StdConv2dSame(4, 8, 3, groups=2), "timm", 1e-6),
        "scaled": (ScaledStdConv2d(4, 6, 3, groups=2, gamma=1.7, gain_init=0.3), "scaled", 1e-6),
        "bit": (Bit(3, 8, 3, padding=1, padding_mode="reflect"), "bit", 1e-10),
        "ws": (Theirs(5, 3, bias=False), "ws", 1e-5),
    }
    stay = {
        "same": (
            StdConv2dSame(3, 8, 3, 2),
            "StdConv2dSame pads by the size of its input, as TensorFlow's SAME does",
        ),
        "bent": (
            type("Bent", (nn.Conv2d,), {"forward": lambda s, x: nn.Conv2d.forward(s, x).relu()})(3, 8, 3),
            "none",
        ),
        "detached": (
            Detached(5, 3),
            "Detached has a forward of its own, whose gradients in eval mode are others",
        ),
        "biased": (Biased(5, 3), "; the nearest, "),
        "broken": (Bit(3, 8, 3), "a test run of it failed: KeyError"),
    }
    stay["broken"][0].__class__ = type("Broken", (Bit,), {"forward": lambda s, x: {}["x"]})
    model = nn.ModuleDict({name: case[0] for name, case in (cases | stay).items()})
    made = normzoo.plan(model, WS)
    for step in made.steps:
        name = step.site.name
        if name in stay:
            assert step.action == "unknown" and stay[name][1] in step.site.note, (name, step.site.note)
            continue
        assert step.exactness is Exactness.EXACT and step.error is not None and step.error < 1e-6, name
        assert set(step.tensors["kept"]) == set(dict(model[name].named_parameters())), name
    old, keys = copy.deepcopy(model), [*model.state_dict()]
    made.apply()
    assert [*model.state_dict()] == keys
    for name, (module, variant, eps) in cases.items():
        new = model[name]
        assert (new.variant, new.ws_eps, new.gamma) == (variant, eps, 1.7 if name == "scaled" else 1.0), name
        assert new.weight is module.weight and not vars(new).keys() & {"eps", "scale", "same_pad"}, name
        x = torch.randn(2, module.in_features) if name == "ws" else torch.randn(2, module.in_channels, 7, 6)
        y = new(x)
        assert_as_good(name, y, old[name](x), old[name].double()(x.double()))
    made = normzoo.plan(nn.Sequential(StdConv2d(3, 8, 3)), WS, variant="ws")
    assert made.exactness is Exactness.APPROXIMATE and made.steps[0].make().module.ws_eps == 1e-5


def test_models_of_timm():
    timm = pytest.importorskip("timm")
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    made = normzoo.plan(timm.create_model("test_resnet"), WS)
    left = {step.site.name: step.reason for step in made.steps if step.action != "convert"}
    assert left == {"fc": "no norm follows it (nothing follows it in this model)"} and len(made.changes) == 15

    layers = {"norm_layer": functools.partial(GroupNormAct, num_groups=4)}
    layers["conv_layer"] = functools.partial(StdConv2d, eps=1e-8)
    big_transfer = ResNetV2((1, 1), (8, 16), 4, stem_chs=8, **layers)
    x = torch.randn(2, 3, 32, 32)
    for model in (stirred(big_transfer), stirred(timm.create_model("test_nfnet", width_factor=0.25))):
        made = normzoo.plan(model, WS, types="standardized")
        assert made.exactness is Exactness.EXACT and made.verify(x).same
        keys = [*model.state_dict()]
        assert [*made.apply().state_dict()] == keys
        assert sum(isinstance(module, normzoo.WSConv2d) for module in model.modules()) == len(made.changes) > 5


def test_behind_a_batch_norm_in_training_the_mean_of_the_filters_alone_is_lost():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-12)).double(),
        torch.randn(4, 3, 9, 9).double(),
    )
    with torch.no_grad():
        weight = model[0].weight
        weight.sub_(weight.mean((1, 2, 3), keepdim=True)).mul_(torch.rand(8, 1, 1, 1) + 0.1)
    y = model(x)
    normzoo.convert(model, WS)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-8)
    with torch.no_grad():
        weight.add_(0.1)  # that is gone in the standardized weight, and not in the raw one
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-8)


def test_bake():
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU()
    )
    net = nn.Sequential(*convolutions, nn.ConvTranspose2d(8, 4, 2, 2), nn.GroupNorm(2, 4))
    model = normzoo.convert(stirred(net), WS, variant="scaled")
    shared = normzoo.WSLinear(2, 2, variant="var")
    model = nn.ModuleDict({"net": model, "one": shared, "other": nn.Sequential(shared)})
    model["net"][3].register_forward_hook(lambda module, args, y: y + 1)
    model["net"][3].remark = "mine"
    model["net"][0].eval()
    made, x = bake(copy.deepcopy(model)), torch.randn(4, 3, 12, 12)
    assert not any(type(module).__module__.startswith("normzoo.layers.ws") for module in made.modules())
    assert type(made["one"]) is nn.Linear and made["other"][0] is made["one"]
    assert [*made.state_dict()] == [name for name in model.state_dict() if not name.endswith("gain")]
    assert made["net"][3].remark == "mine" and not made["net"][0].training and made["net"][3].training
    assert vars(made["net"][0]).keys() == vars(nn.Conv2d(3, 8, 3)).keys()
    for mode in (True, False):
        for each in (made, model):
            each.train(mode)
        assert torch.equal(made["net"](x), model["net"](x))
    compiled = nn.Sequential(normzoo.WSLinear(2, 2))
    vars(compiled[0])["_compiled_call_impl"] = print  # as compile() leaves it
    root = bake(normzoo.WSConv1d(2, 2, 3))
    assert type(root) is nn.Conv1d
    wrapped = nn.utils.parametrizations.spectral_norm(normzoo.WSLinear(2, 2))
    both = nn.Sequential(normzoo.WSLinear(2, 2), wrapped)
    for given, kind, words in (
        (root, ValueError, r"bake: the model has no layer that standardizes its weight \(WSConv1d, "),
        ([root], TypeError, r"bake: model is a list; it must be a torch\.nn\.Module"),
        (compiled, ValueError, "bake: '0' is compiled .* bake the model first, then compile it"),
        (both, ValueError, "bake: '1' cannot be baked: WSLinear: its weight is computed by a parametrization"),
    ):
        with pytest.raises(kind, match=words):
            bake(given)
    assert type(both[0]) is normzoo.WSLinear
