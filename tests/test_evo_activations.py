"""Which modules are activations, and which of them go with a norm that becomes an EvoNorm."""

import collections

import pytest
import torch
from small_models import stirred
from torch import nn

import normzoo
from normzoo.conversion.following import is_activation


@pytest.mark.parametrize(
    "module, is_one",
    [
        *((cls(), True) for cls in (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Tanh, nn.LeakyReLU)),
        *((made, False) for made in (nn.Identity(), nn.Dropout(), nn.PReLU(), nn.Softmax(1), nn.RReLU())),
        *((made, False) for made in (nn.Flatten(), nn.AvgPool2d(1), nn.GLU(1))),
        (nn.Sequential(nn.ReLU()), False),
        (nn.InstanceNorm2d(6), False),
    ],
    ids=str,
)
def test_activations(module, is_one):
    state = torch.get_rng_state()
    assert is_activation(module) == is_one
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "activation, why",
    [
        *((made, "is bounded above, unlike") for made in (nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh())),
        *((made, "is bounded above, unlike") for made in (nn.Softsign(), nn.LogSigmoid(), nn.Hardtanh())),
        *((made, "is unlike the ReLU that") for made in (nn.Hardshrink(), nn.Tanhshrink(), nn.Softshrink())),
        *((cls(), "") for cls in (nn.ReLU, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.Hardswish, nn.Mish)),
        *((cls(), "") for cls in (nn.LeakyReLU, nn.Softplus, nn.CELU, nn.ReLU6)),
    ],
    ids=str,
)
def test_an_activation_that_evo_norm_does_not_stand_for_stays(activation, why):
    model = stirred(nn.Sequential(nn.BatchNorm2d(8), activation))
    if not why:
        assert type(normzoo.convert(model, "evo_norm_b0")[1]) is nn.Identity
        return
    words = rf"could go \(an? {type(activation).__name__}, which {why} .* follows it in Sequential\)"
    with pytest.raises(ValueError, match=words):
        normzoo.convert(model, "evo_norm_b0")
    model = normzoo.convert(model, "evo_norm_b0", apply_act=True)
    assert type(model[0]) is normzoo.EvoNormB0 and model[1] is activation


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x, pre=False):
        y = self.bn(x)
        return y if pre else self.act(y)


class Root(nn.Module):
    def __init__(self, block=None):
        super().__init__()
        self.block = block or Block()

    def forward(self, x):
        return self.block(x)


class Late(Root):
    def forward(self, x):
        return self.block.act(self.block(x) + x)


class Direct(Root):
    def forward(self, x):
        return self.block(x) + self.block.bn(x)


class Foreign(Root):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.block(self.block.act(self.bn(x)))


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.bn = nn.Sequential(self.bn)


class Keyword(Root):
    def forward(self, x):
        return self.block(x, pre=True)


class Positional(Root):
    def forward(self, x):
        return self.block(x, True)


class Wrong(Root):
    def forward(self, x):
        return self.block(x, True, x)


class Deep(Root):
    def forward(self, x):
        return self.block.block(x, pre=True) + self.block(x)


class Keeping(Block):
    def forward(self, x, pre=False):
        self.last = self.bn(x)
        return self.act(self.last)


class KeepingInside(Block):
    def __init__(self):
        super().__init__()
        self.seen, self.queue = {"all": []}, collections.deque()


class KeepingNested(KeepingInside):
    def forward(self, x, pre=False):
        y = self.bn(x)
        self.seen["one"] = [(y,)]
        return self.act(y)


class KeepingQueue(KeepingInside):
    def forward(self, x, pre=False):
        y = self.bn(x)
        self.queue.append(y)
        return self.act(y)


class Looking(Root):
    def forward(self, x):
        return self.block.act(self.block(x) + x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model, words",
    [
        (Late(), r"act \(ReLU\) follows it, and Late calls that elsewhere too\); give every call"),
        (nn.Sequential(Late()), r"act \(ReLU\) follows it, and Late calls that elsewhere too"),
        (Foreign(), r"act \(ReLU\) follows it, and Block calls that elsewhere too"),
        (Direct(), r"Direct calls it too, past the forward of Block\); give every call"),
        (Direct(Nested()), r"Direct calls it too, past the forward of Nested\); give every call"),
        (Keyword(), "Keyword calls the Block with its pre, and what that does is not clear"),
        (Positional(), "Positional calls the Block with its pre, and what"),
        (Wrong(), "Wrong calls the Block with other arguments than it takes"),
        (Deep(Root()), "Deep calls the Block with its pre, and what"),
        (Keeping(), "Keeping uses its output 2 times"),
        (KeepingNested(), "KeepingNested uses its output 2 times"),
        (KeepingQueue(), "KeepingQueue uses its output 2 times"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_or_an_activation_that_more_code_uses_stays(model, words):
    plan = normzoo.plan(model, "evo_norm_b0", apply_act=True)  # it names the reason, and takes no activation
    assert not any(step.activations for step in plan.steps)
    with pytest.raises(ValueError, match=words):
        normzoo.convert(model, "evo_norm_b0", strict=True)
    assert not vars(model).get("queue")


@pytest.mark.parametrize("model", [Root(), nn.Sequential(Root()), nn.Sequential(Block()), Looking()], ids=str)
def test_code_further_up_that_shows_no_other_use_is_no_obstacle(model):
    normzoo.convert(model, "evo_norm_b0")
    assert [type(m) for m in model.modules() if not m._modules] == [normzoo.EvoNormB0, nn.Identity]


@pytest.mark.parametrize("to", ["evo_norm_b0", "evo_norm_s1"])
@pytest.mark.parametrize("how", [{}, {"apply_act": True}])
def test_norms_that_share_a_weight_stay(to, how):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), *Block().children())
    model[2].weight = model[0].weight
    steps = normzoo.plan(model, to, **how).steps
    assert [step.action for step in steps] == ["refuse", "refuse", "convert"]
    assert steps[0].reason == "another module shares its parameters, and new ones would untie them"
