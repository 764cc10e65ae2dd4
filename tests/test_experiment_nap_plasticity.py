"""The parts of the experiment on Normalize-and-Project: networks, pixels, and a stream of random labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normzoo import LayerNorm
from normzoo_bench.experiments import nap_plasticity
from normzoo_bench.experiments.nap_plasticity import Net, Run

NETS = (Net("none"), Net("LN"), Net("NaP"), Net("LN", False), Net("NaP", False))


def network(net: Net, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nap_plasticity._network(net, width)


def test_networks_differ_in_nothing_but_the_norm():
    plain = network(NETS[0])
    x = torch.randn(3, 64)
    for net in NETS:
        model = network(net)
        linears, those = ([layer for layer in of if isinstance(layer, nn.Linear)] for of in (model, plain))
        assert len(linears) == 4 and sum(isinstance(layer, nn.ReLU) for layer in model) == 3, net
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(linears, those, strict=True)), net
        assert torch.equal(linears[-1].bias, those[-1].bias) and model(x).shape == (3, 10), net
        norms = [layer for layer in model if isinstance(layer, LayerNorm)]
        normed = net.norm != "none"
        assert len(norms) == 3 * normed and {norm.elementwise_affine for norm in norms} <= {net.affine}, net
        assert {layer.bias is None for layer in linears[:-1]} == {normed}, net
        assert nap_plasticity._hidden(model) == [layer.weight for layer in linears[:-1]], net


def test_pixels():
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, 0] = 0.25
    raw, centered, standardized = (
        nap_plasticity._pixels(images, how) for how in ("0 to 1", "centered", "standardized")
    )
    assert torch.equal(raw, images.flatten(1))
    torch.testing.assert_close(centered, raw - raw.mean(0))
    assert not standardized[:, 0].any() and standardized.isfinite().all()
    torch.testing.assert_close(standardized[:, 1:].std(0), torch.ones(63))
    torch.testing.assert_close(standardized[:, 1:] * raw[:, 1:].std(0), centered[:, 1:])


def test_parts():
    right = [float(task) for task in range(1, 13)]
    assert nap_plasticity._parts(right, 3) == {
        "first": 2, "middle": 6, "last": 11, "from 1": 2, "from 4": 5, "from 7": 8, "from 10": 11
    }  # fmt: skip


@pytest.mark.parametrize("net", NETS[:3], ids=lambda net: net.norm)
def test_stream_of_tasks(net, monkeypatch):
    """Against a loop that is written out, with one Adam for all tasks and the accuracy before each step."""
    images, run = torch.randn(12, 64).double(), Run("0 to 1", 3, 5, 0.01, 1)
    drawn, seen = [], []

    def recorded(*args, **kwargs):
        drawn.append(randint(*args, **kwargs))
        return drawn[-1]

    randint = torch.randint
    monkeypatch.setattr(torch, "randint", recorded)
    model, twin = network(net).double(), network(net).double()
    model.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    before = [weight.norm().item() for weight in nap_plasticity._hidden(model)]
    right = nap_plasticity._learned(model, images, run, net, 4, seed=1)

    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1])
    batches = [[int((images == row).all(1).nonzero()) for row in x] for x in seen]
    assert len(batches) == 15
    for epoch in (batches[:3], batches[5:8]):
        assert sorted(i for batch in epoch for i in batch) == list(range(12))
    optimizer = torch.optim.Adam(twin.parameters(), 0.01)
    expected = [0.0] * 3
    for i, batch in enumerate(batches):
        labels = drawn[i // 5][batch]
        logits = twin(images[batch])
        expected[i // 5] += (logits.argmax(1) == labels).sum().item() / 20 * 100
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        if net.norm == "NaP":
            with torch.no_grad():
                for weight, norm in zip(nap_plasticity._hidden(twin), before, strict=True):
                    weight *= norm / weight.norm()
                for layer in (layer for layer in twin if isinstance(layer, LayerNorm)):
                    size = (layer.weight.square().sum() + layer.bias.square().sum()).sqrt()
                    layer.weight *= 4 / size
                    layer.bias *= 4 / size
    assert right == pytest.approx(expected)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    after = [weight.norm().item() for weight in nap_plasticity._hidden(model)]
    assert (after == pytest.approx(before, rel=1e-12)) == (net.norm == "NaP")


def test_norms_without_scale_and_offset_are_projected_too():
    net = NETS[-1]
    model, images = network(net), torch.randn(12, 64)
    before = nap_plasticity._size(model)
    nap_plasticity._learned(model, images, Run("0 to 1", 1, 4, 0.01, 1), net, 6, seed=0)
    assert nap_plasticity._size(model) == pytest.approx(before, rel=1e-6)
