"""Small models with norms to be folded, and what the tests of folding share."""

import copy

import pytest
import torch
from small_models import stirred
from torch import nn

import normzoo
from normzoo.folding import Folded, plan_fold

IMAGES = torch.randn(2, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ROWS = TOKENS.flatten(0, 1)
BEFORE, AFTER = ("fold", "before"), ("fold", "after")


class Of(nn.Module):
    """A forward, and the modules that it takes."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def conv(**how):
    return nn.Conv2d(6, 6, **{"kernel_size": 1, **how})


def ready(model):
    return stirred(model).double().eval()


def steps(plan):
    return {step.site.name: (step.action, step.where, step.into) for step in plan.steps}


def assert_folds(case, model, x, wanted, sample=None):
    """`wanted`: what becomes of each norm; the outputs stay, and nothing happens before apply."""
    model = ready(model)
    y, old = model(x), copy.deepcopy(model.state_dict())
    plan = plan_fold(model, sample)
    assert steps(plan) == wanted, case
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items()), case
    made = plan.apply()
    torch.testing.assert_close(
        made(x), y, rtol=0, atol=1e-13 * y.abs().max().item(), msg=lambda m: f"{case}: {m}"
    )
    gone = [made.get_submodule(name) for name, (action, *_) in wanted.items() if action == "fold"]
    assert all(type(module) is Folded for module in gone), case
    assert not any(module.state_dict() for module in gone if not module.then), case
    return made


def refusal(model, sample=None, evaluate=True):
    model = stirred(model)
    state = copy.deepcopy(model.eval() if evaluate else model).state_dict()
    with pytest.raises(ValueError, match=r"^fold: nothing can be folded; \w+ classes seen: ") as caught:
        normzoo.fold(model, sample)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def pair(function):
    """A model whose forward has a convolution c and a batch norm n."""
    return Of(function, c=conv(), n=nn.BatchNorm2d(6))


def with_norm(norm):
    return nn.Sequential(conv(), norm)


class Flagged(nn.Module):
    """A forward with a flag, under which something else is returned."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(6)

    def forward(self, x, raw=False):
        h = self.c(x)
        return h if raw else self.n(h)


class Masked(nn.Module):
    """A mask that may be there or not, for the norm, and one for what it makes if `late`."""

    def __init__(self, late):
        super().__init__()
        self.n, self.c, self.late = normzoo.PowerNorm(6, group_num=None), nn.Linear(6, 6), late

    def forward(self, x, mask=None):
        h = self.n(x, pad_mask=mask)
        if self.late and mask is not None:
            h = h.masked_fill(mask[..., None], 0)
        return self.c(h)


class Staged(nn.Module):
    """A forward that stops early, which a trace cannot follow."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(6)

    def forward(self, x, stop=0):
        h = self.c(x)
        return h if stop > 0 else self.n(h)
