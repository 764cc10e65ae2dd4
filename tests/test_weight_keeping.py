"""The standardized weight that a layer keeps in eval mode is that of its weight, whatever changes it."""

import copy
import pickle

import torch
from torch import nn
from weight_layers import made

import normzoo


def rewrites(layer):
    """All the ways in which a weight changes, by name."""

    def sgd():
        layer.weight.grad = torch.ones_like(layer.weight).cumsum(0)
        torch.optim.SGD([layer.weight], 0.1).step()

    def inside():
        with torch.inference_mode():
            layer.weight.mul_(-1)

    state = {name: 2 - t for name, t in layer.state_dict().items()}
    return {
        "optimizer": sgd,
        "in place": lambda: nn.init.normal_(layer.weight),
        "load_state_dict": lambda: layer.load_state_dict(state),
        "another parameter": lambda: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
        ".data =": lambda: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        "in .data": lambda: layer.weight.data.mul_(-1),
        "target network": lambda: layer.weight.data.copy_(0.99 * layer.weight.data + 0.01),
        "memory shared with numpy": lambda: layer.weight.detach().numpy().__imul__(-2),
        "inference mode": inside,
        "gain": lambda: layer.gain.data.mul_(3),
        "double": layer.double,
        "variant": lambda: setattr(layer, "variant", "timm") or setattr(layer, "gain", None),
        "eps": lambda: setattr(layer, "ws_eps", 0.5),
    }


def test_the_kept_weight_is_never_stale():
    layer, x = made(normzoo.WSConv2d, variant="scaled")
    names = list(rewrites(layer))
    for name in names:
        layer, x = made(normzoo.WSConv2d, variant="scaled")
        layer.eval()
        with torch.no_grad():
            before = layer(x)
            assert layer._kept[2] is layer._current(), "nothing is kept"
        with torch.enable_grad():
            rewrites(layer)[name]()
        x = x.to(layer.weight.dtype)
        with torch.no_grad():
            after = layer(x)
        fresh = copy.deepcopy(layer).train()
        assert torch.equal(after, fresh(x).detach()), name
        assert not torch.equal(after, before.to(after.dtype)) or name == "double", name


def test_a_change_that_keeps_the_sum():
    layer, x = made(normzoo.WSConv2d)
    with torch.no_grad():
        layer.weight.mul_(8).round_()
        before = layer.eval()(x)
        layer.weight.data.copy_(layer.weight.flip(0))
        assert torch.equal(layer(x), layer.bake()(x)) and not torch.equal(layer(x), before)
        layer.standardized().zero_()  # is the caller's
        assert torch.equal(layer(x), layer.bake()(x))


def test_where_nothing_is_kept():
    layer, x = made(normzoo.WSConv2d)
    with torch.no_grad():
        assert layer._current() is not layer._current()  # training
    layer.eval()
    assert layer._current() is not layer._current()  # a graph
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        kept = layer._current()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._kept is None and torch.equal(other(x), layer(x))
        assert layer.train().eval()._current() is not kept
        assert layer._current() is layer._kept[2] and layer.float()._kept is None
        assert torch.func.functional_call(layer, {"weight": -layer.weight}, (x,)).sum() != layer(x).sum()

        def call(weight):
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

        stacked = torch.vmap(call)(torch.stack([layer.weight, -layer.weight]))
        torch.testing.assert_close(stacked[0], layer(x))
    layer.train().eval().requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()  # what inference mode made cannot be saved for this
    assert x.grad is not None
    layer.weight.fill_(float("nan"))
    assert layer._current() is not layer._current()
