"""Layers before a norm become weight-standardized ones: which they are, what is kept, and what stays."""

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from small_models import stirred
from torch import nn

import normzoo
from normzoo import cli
from normzoo.conversion import Exactness

WS = "weight_standardize"


class Block(nn.Module):
    """A residual block: the convolutions in it have norms of their own, the shortcut too."""

    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(i, o, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(o),
            nn.ReLU(),
        )
        self.conv2, self.gn2 = nn.Conv2d(o, o, 3, padding="same", padding_mode="circular"), nn.GroupNorm(2, o)
        self.short = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(i, o, 1), nn.BatchNorm2d(o))
        self.last = nn.Conv2d(o, o, 1)

    def forward(self, x):
        y = self.gn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.last(self.relu(y)) + self.short(x)


class Net(nn.Module):
    def __init__(self, conv=nn.Conv2d, linear=nn.Linear):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4))
        self.block = Block(4, 8)
        self.fc, self.norm, self.head = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.block(self.stem(x)).mean((2, 3))
        return self.head(self.norm(self.fc(x)).relu())


CHOSEN = ["stem.0", "block.conv1", "block.conv2", "block.short.1", "fc"]


def by_hand(model, names, **how):
    """A copy of `model` with layers of this library in place of those called `names`."""
    made = copy.deepcopy(model)
    for name in names:
        old = made.get_submodule(name)
        cls = {nn.Conv2d: normzoo.WSConv2d, nn.ConvTranspose2d: normzoo.WSConvTranspose2d}.get(type(old))
        if cls is None:
            new = normzoo.WSLinear(old.in_features, old.out_features, old.bias is not None, **how)
        else:
            same = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
            given = {key: getattr(old, key) for key in same} | {"bias": old.bias is not None}
            new = cls(old.in_channels, old.out_channels, **given, **how)
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, new.train(old.training))
    return made


def steps(model, *to, **options):
    made = normzoo.plan(model, *(to or (WS,)), **options)
    return {step.site.name: (step.action, step.reason or step.site.note) for step in made.steps}


@pytest.mark.parametrize("how", [{}, {"variant": "scaled", "gamma": 1.5, "ws_eps": 1e-3}], ids=["ws", "scaled"])
def test_layers_before_a_norm_convert_and_revert(how, caplog):
    model, x = stirred(Net()), torch.randn(4, 3, 12, 12)
    model.block.conv1.weight.requires_grad_(False)
    model.stem[0].to(memory_format=torch.channels_last)
    model.stem[0].eval().remark = "mine"
    before, wanted = copy.deepcopy(model), by_hand(model, CHOSEN, **how)
    held, modules = dict(model.named_parameters()), [*model.modules()]
    wanted.stem[0].to(memory_format=torch.channels_last)
    state, optimizer = torch.get_rng_state(), torch.optim.SGD(model.parameters(), 0.1)
    made = normzoo.plan(model, WS, **how)
    assert [step.site.name for step in made.changes] == CHOSEN
    assert made.exactness is Exactness.APPROXIMATE and all(step.error is None for step in made.steps)
    gain = ("gain",) if how else ()
    for step in made.changes:
        own = tuple(step.site.module._parameters) if step.site.module.bias is not None else ("weight",)
        assert step.tensors == {"kept": own, "converted": (), "new": gain, "lost": ()}
        assert step.parameters_change == bool(how)
    assert "bn1 (BatchNorm2d) follows" in made.changes[1].reason
    stay = {step.site.name: step.reason for step in made.steps if step.action == "keep"}
    assert stay == {
        "block.last": "no norm follows it (a call of add follows it in Block)",
        "head": "no norm follows it (nothing follows it in this model)",
    }
    assert "7 layers: 5 converted, 2 kept" in str(made) and str(made).startswith("layer ")
    assert json.loads(made.to_json())["steps"][0]["norm"]["family"] == "convolution"
    proof = made.verify(x)
    assert proof.passed and not proof.same and proof.error > 1e-2
    assert "the last bit of the converted layers explains" in str(proof)
    made.apply(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p is dict(model.named_parameters())[name] for name, p in held.items())
    assert len(optimizer.param_groups[0]["params"]) == len([*model.parameters()])
    assert type(model.stem[0]) is normzoo.WSConv2d and model.stem[0].remark == "mine"
    assert (
        not model.stem[0].training and model.block.conv1.training and not model.block.conv1.weight.requires_grad
    )
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    for each in (model, wanted):
        each(x).square().sum().backward()
    assert torch.equal(model(x), wanted(x)) and torch.equal(model.eval()(x), wanted.eval()(x))
    for (name, a), b in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert a.requires_grad != name.startswith("block.conv1.") and (
            not a.requires_grad or torch.equal(a.grad, b.grad)
        ), name
    made.revert()
    assert [*model.modules()] == modules and [*held] == [name for name, _ in model.named_parameters()]
    assert len(optimizer.param_groups[0]["params"]) == len(held)
    before.load_state_dict(model.state_dict())
    assert torch.equal(model(x), before.eval()(x))
    normzoo.convert(model, WS, **how)
    assert "5 of 5 converted layers compute another function (approximate)" in caplog.text
    assert "3 of 5 converted layers have norms behind them whose running statistics are those of" in caplog.text


def test_other_models():
    """A generator, a plain net of other ranks, a class alone, and partial variants by name."""
    generator = nn.Sequential(
        *(nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh()),
    ).eval()
    wanted, x = by_hand(generator, ["0"]), torch.randn(2, 4, 3, 3)
    assert (
        torch.equal(normzoo.convert(generator, WS)(x), wanted(x)) and type(generator[3]) is nn.ConvTranspose2d
    )

    net = nn.Sequential(
        *(nn.Conv1d(3, 4, 3), nn.Dropout(0.5), nn.GroupNorm(2, 4), nn.Flatten()),
        *(
            nn.Linear(12, 6),
            nn.Unflatten(1, (6, 1, 1, 1)),
            nn.BatchNorm3d(6),
            nn.Conv3d(6, 2, 1),
            nn.InstanceNorm3d(2),
        ),
    )
    kept = steps(net, "ws_conv3d", include=["4", "7"])
    assert (
        kept["7"][0] == "convert" and kept["4"][1] == "WSConv3d takes the place of other layers than a Linear"
    )
    rules = {
        "[07]": functools.partial(normzoo.WSConv1d, variant="bit"),
        "8": "same",
        "_default": WS,
        "4": None,
    }
    with pytest.raises(
        ValueError, match=r"the rule '\[09\]x' matches no layer; layer classes seen: .*BatchNorm3d"
    ):
        normzoo.plan(net, rules | {"[09]x": WS})
    normzoo.convert(net, rules)
    assert type(net[0]) is normzoo.WSConv1d and net[0].variant == "bit"
    assert type(net[4]) is nn.Linear and type(net[7]) is nn.Conv3d and type(net[8]) is normzoo.InstanceNorm3d
    made = normzoo.plan(net, {"*": WS, "re:.*": "same"})
    found = [(step.site.name, step.target) for step in made.steps if step.action == "convert"]
    assert found == [("2", "group_norm"), ("4", WS), ("6", "batch_norm"), ("7", WS)]
    again = {"0": ("keep", "it is normzoo's weight_standardize already")}
    assert {**steps(net), **again} == steps(net) and type(net[6]) is nn.BatchNorm3d
    normzoo.convert(net, WS, include="0", variant="var")  # eps is that of the new variant
    assert (net[0].variant, net[0].ws_eps) == ("var", 1e-5)

    with torch.device("meta"):
        large = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    normzoo.convert(large, WS, variant="scaled")
    assert type(large[0]) is normzoo.WSLinear and large[0].gain.is_meta
    half = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).bfloat16().requires_grad_(False)
    gain = normzoo.convert(half, WS, variant="scaled")[0].gain
    assert torch.equal(gain, torch.ones(4, 1).bfloat16()) and not gain.requires_grad


class Ways(nn.Module):
    """Layers that a norm follows, or does not, each in its own way."""

    def __init__(self):
        super().__init__()
        for name in ("moved", "peeked", "twice", "func", "entered"):
            setattr(self, name, nn.Linear(8, 8))
        for name in (
            "skip",
            "kept",
            "bent",
            "rest",
            "map",
            "unknown",
            "stats",
            "others",
            "trained",
            "seen_by",
            "side",
        ):
            setattr(self, name, nn.Linear(8, 8))
        self.table = nn.Embedding(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.table.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.single = nn.Conv1d(8, 8, 1, groups=8)
        self.read = nn.Linear(8, 8)
        self.lazy = nn.LazyLinear(8)
        self.own = nn.Linear(8, 8)
        self.own.forward = torch.relu
        self.ln, self.bn, self.frozen = nn.LayerNorm(8), nn.BatchNorm1d(8), normzoo.FrozenBatchNorm(8)
        self.watched, self.both, self.affine = nn.Identity(), Both(), normzoo.EvoNormB0(8, apply_act=False)
        self.watched.register_forward_hook(print)
        self.gaussian, self.adaptive = nn.Linear(8, 8, dtype=torch.complex64), normzoo.AdaptiveLayerNorm(8)
        self.strange, self.inner = Strange(8), nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.ReLU()))

    def forward(self, x, flag=False):
        x = self.ln(self.moved(x).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).contiguous())
        y = self.peeked(x)
        n, c = y.shape
        x = self.bn(y.view(n, c))
        x = self.bn(self.twice(self.ln(self.twice(x))))
        x = self.inner(self.entered(F.layer_norm(self.func(x), (8,))))
        y = self.skip(x)
        x = y + self.ln(y)
        self.seen = self.kept(x)
        x = self.ln(self.seen)
        x = self.ln(self.bent(x).relu())
        x = self.frozen(self.rest(x))
        x = self.strange(self.unknown(x))
        x = F.batch_norm(self.stats(x), None, None, training=True)
        x = self.ln(torch.cat((self.others(x), x), 1)[:, :8])
        y = self.trained(x)
        x = y.relu() if self.training else self.ln(y)
        x = self.ln(self.watched(self.seen_by(x)))
        x = self.affine(self.map(x))
        x = self.adaptive(x, self.side(x))
        x = self.ln(self.gaussian(x)) + self.ln(self.both(x)[0])
        x = self.ln(self.tied(x)) + self.ln(self.normed(x)) + self.ln(self.spectral(x))
        x = self.bn(self.single(x[..., None]).squeeze(-1))
        x = self.ln(self.read(x)) * self.read.weight.sum()
        return self.ln(self.lazy(x)) + self.ln(self.own(x))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x), x


class Strange(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning", "ignore:Lazy modules")
def test_why_layers_stay():
    found = steps(Ways())
    for name in ("moved", "peeked", "twice", "func", "entered"):
        assert found[name][0] == "convert", (name, found[name])
    assert found["twice"][1].endswith("ln (LayerNorm), bn (BatchNorm1d) follow")
    assert found["func"][1].endswith("a call of layer_norm in Ways follows")
    assert found["entered"][1].endswith("0 (LayerNorm) follows")
    words = {
        "skip": ("keep", "no norm follows it (Ways uses its output 2 times)"),
        "kept": ("keep", "no norm follows it (Ways uses its output 2 times)"),
        "bent": ("keep", "no norm follows it (a call of relu follows it in Ways)"),
        "rest": ("keep", "but a FrozenBatchNorm, whose stored statistics do not follow the new weights"),
        "unknown": (
            "refuse",
            "not clear whether a norm follows it (a Strange follows it in Ways, and what that",
        ),
        "stats": ("refuse", "a call of batch_norm follows it in Ways, which may go by stored statistics alone"),
        "others": ("keep", "no norm follows it (a call of cat follows it in Ways)"),
        "trained": ("keep", "no norm follows it (a call of relu follows it in Ways)"),
        "seen_by": ("keep", "no norm follows it (an Identity follows it in Ways)"),
        "map": ("keep", "no norm follows it (but an EvoNormB0 with apply_act=False, which is none)"),
        "side": ("keep", "no norm follows it (an AdaptiveLayerNorm follows it in Ways)"),
        "both.fc": ("keep", "no norm follows it (Both returns its output among others)"),
        "gaussian": ("refuse", "its weight is torch.complex64, and one that is standardized is of a real"),
        "tied": ("refuse", "another module shares its weight, and would go on with the raw one"),
        "normed": ("refuse", "its weight is computed by a parametrization, weight_norm or spectral_norm"),
        "spectral": ("refuse", "its weight is computed by a parametrization, weight_norm or spectral_norm"),
        "single": ("refuse", "has one entry for each output, and the standardized value of a single number"),
        "read": ("refuse", "Ways reads its weight and may compute the layer itself, as it was"),
        "lazy": ("unknown", "it has no shape yet; run the model once"),
        "own": ("unknown", "its forward was replaced on the instance"),
    }
    for name, (action, why) in words.items():
        assert found[name][0] == action and why in found[name][1], (name, found[name])
    assert len(found) == 5 + len(words)
    assert "as a function" not in str(normzoo.plan(Ways(), WS))  # a norm that is called so stays where it is


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.inner, self.fc = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)), nn.Linear(8, 2)

    def forward(self, x):
        x = self.bn(self.conv(x))
        if x.sum() > 0:
            x = x + 1
        return self.fc(self.inner(x).mean((2, 3)))


def test_what_cannot_be_traced_is_left_unless_it_is_named():
    model = Untraceable()
    found = steps(model)
    assert found["inner.0"][0] == "convert" and found["conv"][0] == found["fc"][0] == "refuse"
    assert (
        "(the forward of Untraceable cannot be traced (TraceError)); if one does, say so by" in found["conv"][1]
    )
    for named in ({"include": ["conv", "inner.*"]}, {"to": {"conv": WS, "inner.*": WS}}):
        made = normzoo.plan(model, **{"to": WS} | named)
        assert [step.site.name for step in made.changes] == ["conv", "inner.0"], named
        assert "that a norm follows is taken from you (the forward of" in made.changes[0].reason
    with pytest.raises(
        ValueError, match=r"strict=True, and some layers cannot be converted\n  conv, fc: it is not"
    ):
        normzoo.plan(model, WS, strict=True)
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    normzoo.plan(plain, WS, strict=True)  # the head is not meant
    with pytest.raises(
        ValueError, match=r"strict=True.*\n  2: no norm follows it \(nothing follows it in this"
    ):
        normzoo.plan(plain, WS, strict=True, include=["0", "2"])
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(
        ValueError, match=r"linear2: TransformerEncoderLayer reads its .* may compute the layer its"
    ):
        normzoo.plan(encoder, WS, include="linear2")


def test_nothing_to_convert_and_bad_arguments():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    for given, kind, words in (
        (
            {},
            ValueError,
            r"(?s)nothing can be converted; layer classes seen: 1 torch\S*Conv2d\n  0: no norm follows",
        ),
        ({"include": "2"}, ValueError, "'2' in include matches no layer; layer classes seen: 1 torch"),
        (
            {"types": "lin"},
            ValueError,
            r"'lin' in types is no family \(convolution, linear, .* no class of a layer",
        ),
        ({"stride": 2}, TypeError, "weight_standardize takes no 'stride'; it takes variant, ws_eps, gamma"),
    ):
        with pytest.raises(kind, match=words):
            normzoo.convert(model, WS, **given)
    with pytest.raises(ValueError, match="the model has no convolution and no linear layer"):
        normzoo.convert(nn.LayerNorm(2), WS)
    with pytest.raises(ValueError, match="no rule takes a batch norm to weight_standardize, only to"):
        normzoo.convert(model, lambda site: WS)
    made = normzoo.plan(nn.Sequential(nn.Conv2d(2, 2, 3), model[2]), WS)
    made.model[0].bias = None
    made.model[0].in_channels = 1
    with pytest.raises(
        ValueError, match="the model has changed since the plan was made: '0' computes convolution"
    ):
        made.apply()


def make():
    return stirred(Net()), torch.randn(4, 3, 12, 12)


def test_the_command_line(capsys, tmp_path):
    name = f"{__file__}:make"
    assert cli.main(["convert", name, "--to", WS, "--dry-run", "--option", "variant=bit"]) == 0
    out = capsys.readouterr().out
    assert "block.conv1" in out and "5 converted, 2 kept" in out and "another function" in out
    assert cli.main(["convert", name, "--to", f"fc={WS}", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    assert [step["name"] for step in found if step["action"] == "convert"] == ["fc"]
    assert cli.main(["convert", name, "--to", f"head={WS}", "--dry-run"]) == 2
    assert "head: no norm follows it" in capsys.readouterr().err
    assert cli.main(["inspect", name]) == 0
