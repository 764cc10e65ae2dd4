"""What looks harmless to a conversion of weights, or to a change of the optimizer, and is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import normzoo
from normzoo.conversion import bake

WS = "weight_standardize"


class Calls(nn.Module):
    """Calls that put what a layer makes in the place of the input, or in another."""

    def __init__(self):
        super().__init__()
        for name in ("first", "scale", "both", "named", "stored", "fresh", "raw", "shaped", "boxed"):
            setattr(self, name, nn.Linear(8, 8))
        self.ada, self.ln, self.inner = (
            normzoo.AdaptiveLayerNorm(8),
            nn.LayerNorm(8),
            nn.Sequential(nn.Linear(8, 8)),
        )
        self.box = nn.Sequential(nn.LayerNorm(8))

    def forward(self, x):
        x = self.ada(shift=x, x=self.first(x), scale=x)
        x = self.ada(scale=self.scale(x), x=x)
        y = self.both(x)
        x = self.ada(scale=y, shift=None, x=y)
        x = self.box(input=self.boxed(x))
        x = F.layer_norm(weight=None, input=self.named(x), normalized_shape=(8,))
        x = F.instance_norm(self.stored(x).view(1, 4, 8), x[:, 0], x[:, 0].exp(), use_input_stats=False)[0]
        x = F.instance_norm(self.fresh(x).view(1, 4, 8))[0]
        x = self.ln(self.raw(x)) + F.linear(x.to(self.shaped.weight.dtype), (self.raw,)[0].weight)
        x = self.ln(self.shaped(x))
        return F.linear(self.box(self.inner(x)), self.inner[0].weight)


def check(model, cases):
    """Holds what becomes of the layers of `model`, and why, against `cases`."""
    made = normzoo.plan(nn.Sequential(model, nn.Linear(8, 8), nn.LayerNorm(8)).train(model.training), WS)
    found = {step.site.name.removeprefix("0."): (step.action, step.reason) for step in made.steps}
    for name, (action, words) in cases.items():
        assert found[name][0] == action and words in found[name][1], (name, found[name])


def test_what_is_not_behind_a_layer():
    model = Calls().eval()
    with torch.no_grad():
        model(torch.randn(4, 8))  # the calls are valid
    raw = ("refuse", "Calls reads its weight and may compute the layer itself, as it was; change that class")
    check(
        model,
        {
            "first": ("convert", "ada (AdaptiveLayerNorm) follows"),
            "scale": ("keep", "an AdaptiveLayerNorm follows it in Calls"),
            "both": ("keep", "an AdaptiveLayerNorm follows it in Calls"),
            "named": ("convert", "a call of layer_norm in Calls follows"),
            "stored": (
                "refuse",
                "a call of instance_norm follows it in Calls, which may go by stored statistics",
            ),
            "fresh": ("convert", "a call of instance_norm in Calls follows"),
            "raw": raw,
            "inner.0": raw,
            "boxed": ("convert", "0 (LayerNorm) follows"),
            "shaped": ("convert", "ln (LayerNorm) follows"),
        },
    )


def relu_before(module, args):
    return (args[0].relu(),)


def relu_after(module, args, output):
    return output.relu()


def test_hooks_make_it_unclear():
    def layers():
        return nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.GroupNorm(2, 8))

    for name, kind in (
        ("0", "forward_hook"),
        ("0.0", "forward_hook"),
        ("0.0", "forward_pre_hook"),
        ("1", "forward_hook"),
        ("1", "forward_pre_hook"),
    ):
        model = layers()
        module, hook = model.get_submodule(name), relu_before if "pre" in kind else relu_after
        getattr(module, f"register_{kind}")(hook)
        words = f"the {type(module).__name__} has {kind}s, and what those do is not clear"
        check(model, {"0.0": ("refuse", words)})
    model = layers()
    model[1].register_full_backward_hook(lambda *_: None)
    prune.l1_unstructured(model[1], "bias", 2)
    check(model, {"0.0": ("convert", "1 (GroupNorm) follows")})


class Frozen(nn.Sequential):
    """Keeps its norms in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        for module in self:
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def test_a_norm_held_in_eval_mode_is_at_rest():
    norms = nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False)
    stays = (
        "keep",
        "but a BatchNorm1d held in eval mode, whose stored statistics do not follow the new weights",
    )
    goes = ("convert", "1 (BatchNorm1d) follows")
    check(Frozen(nn.Linear(8, 8), norms[0]), {"0": stays})
    check(Frozen(nn.Linear(8, 8), norms[0]).eval(), {"0": goes})
    check(nn.Sequential(nn.Linear(8, 8), norms[0].train()), {"0": goes})
    check(Frozen(nn.Linear(8, 8), norms[1]), {"0": goes})


def test_parents_that_read_the_raw_weight():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.out_proj = normzoo.WSLinear(8, 8)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder.linear1 = normzoo.WSLinear(8, 16)
    for model, name in ((attention, "out_proj"), (nn.Sequential(encoder), "0.linear1")):
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        found = normzoo.inspect(model)
        assert found.to_dict()["raw_weights"] == {name: parent}
        assert f"{name} standardizes its weight, but {parent} reads the raw one" in str(found)
        before = copy.deepcopy(model.state_dict())
        words = f"bake: '{name}' standardizes its weight, but {parent} reads .*; put torch's Linear there"
        with pytest.raises(ValueError, match=words):
            bake(model)
        assert isinstance(model.get_submodule(name), normzoo.WSLinear)
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    encoder.self_attn.batch_first = False  # no fast path
    assert not normzoo.inspect(encoder).raw_weights
    assert type(bake(encoder).linear1) is nn.Linear


def test_momentum_of_torchs_sgd_goes_on():
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.randn(3, 2).to(dtype))
        options = {"lr": 0.1, "momentum": 0.9}
        old = torch.optim.SGD([p], **options)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            old.step()
        other = nn.Parameter(p.detach().clone())
        state = copy.deepcopy(old.state_dict())
        new = normzoo.SGDP([other], **options, delta=0)
        new.load_state_dict(state)
        buffer = old.state[p]["momentum_buffer"]
        assert set(new.state[other]) == {"momentum"} and "momentum_buffer" in state["state"][0], dtype
        assert torch.equal(new.state[other]["momentum"], buffer.float()), dtype
        if dtype == torch.float32:  # torch's class rounds its momentum to bfloat16
            other.grad = p.grad = torch.randn_like(p)
            for each in (old, new):
                each.step()
            torch.testing.assert_close(other, p)
        # Without momentum torch's class has saved a None, once.
        new.load_state_dict(state | {"state": {0: {"momentum_buffer": None}}})
        assert not new.state[other]
        new.step()
