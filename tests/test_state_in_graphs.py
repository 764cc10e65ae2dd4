"""Stored state under torch.compile and activation checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import (
    REFUSING,
    batches,
    close,
    compiled,
    compiled_is_eager,
    per_compiled,
    per_drop_in,
    per_kept,
    per_recomputed,
    same,
    tensors,
    torchs,
    train,
)

from normzoo import AdaB2N, BatchNorm2d, GhostBatchNorm, state
from normzoo.layers import native
from normzoo.layers.batch import batch_norm


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Twice(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(self.norm(x).sin() + x)


@per_compiled
def test_compiled_is_eager(make, dtype, monkeypatch):
    """A module that is used twice, whose second use sees what the first has stored; in bfloat16 used once."""
    # Graphs hold the engine, which rounds otherwise than torch's operator; six steps enlarge that.
    monkeypatch.setattr(native, "outruns", lambda *_: False)
    layer, xs = make().to(dtype), batches(6, dtype=dtype)
    compiled_is_eager(Twice(layer) if dtype == torch.float32 else layer, xs)


@pytest.mark.parametrize("make", [lambda: BatchNorm2d(3), lambda: GhostBatchNorm(3, 2)])
def test_a_graph_of_eval_mode_is_told_that_statistics_moved(make):
    layer, x = make(), torch.randn(4, 3, 2, 2, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@per_drop_in
def test_a_module_used_twice_is_torchs(make):
    found, expected = train(Twice(make()), xs := batches(2)), train(Twice(torchs(make)), xs)
    close({k: t for k, t in found.items() if "skipped" not in k}, expected)


def block(norm):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Tanh())


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@per_recomputed
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, make):
    plain = block(make())
    saving = copy.deepcopy(plain)
    xs = batches(3)
    found = train(saving, xs, Checkpointed(saving, reentrant))
    same(found, train(plain, xs))


@per_kept
def test_activation_checkpointing_in_a_graph(make):
    """The layer is in one graph with its recomputation; Dynamo refuses one that keeps a loss."""
    plain = block(make())
    saving = copy.deepcopy(plain)
    traced, xs = compiled(Checkpointed(saving)), batches(3)
    if make.func is AdaB2N:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="activation checkpointing"):
            traced(xs[0])
        torch._dynamo.reset()
        traced = torch.compile(Checkpointed(saving), backend="aot_eager")  # leaves it out of the graph
    close(train(saving, xs, traced), train(plain, xs))


BY_LAYER = "(BatchChannelNorm: with estimate=True|(PowerNorm|UnifiedNorm): it normalizes by running statistics)"
BY_GRAPH = "normzoo: a compiled graph reads stored statistics"
WAYS = {
    "reentrant": (lambda inner: Checkpointed(inner, reentrant=True), BY_LAYER),
    "not reentrant": (Checkpointed, BY_LAYER),
    "in a graph": (lambda inner: compiled(Checkpointed(inner)), BY_GRAPH),
    "in a graph, reentrant": (lambda inner: compiled(Checkpointed(inner, reentrant=True)), BY_GRAPH),
    "around a graph": (lambda inner: Checkpointed(compiled(inner)), BY_GRAPH),
}
ALIKE = ("in a graph, reentrant", "around a graph")
"""What refuses in a graph knows nothing of the layer, so one of them is enough for these ways."""


@pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(make, way, id=f"{name}-{way}")
        for name, make in REFUSING.items()
        for way in WAYS
        if name == "unified" or way not in ALIKE
    ],
)
def test_activation_checkpointing_that_would_be_wrong_is_refused(make, way):
    """By statistics that have moved since the forward pass."""
    wrap, sentence = WAYS[way]
    model = block(make())
    y = wrap(model)(batches(1)[0].requires_grad_())
    after = tensors(model)
    with pytest.raises(RuntimeError, match=f"{sentence}.*; leave .* out of"):
        y.sum().backward()
    same(tensors(model), after)
    assert all(p.grad is None for p in model[:2].parameters())


@pytest.mark.parametrize("kappa", [1.0, 0.4])
def test_a_checkpoint_around_a_graph_does_not_count_a_loss_twice(kappa):
    model = block(AdaB2N(3, 2, kappa=kappa))
    y = Checkpointed(compiled(model))(batches(1)[0].requires_grad_())
    after = tensors(model)
    with pytest.raises(RuntimeError, match=r"or train by them, out of activation checkpointing"):
        (y.sum() + model[1].loss).backward()
    same(tensors(model), after)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_the_function(reentrant):
    def trained(wrap):
        mean, var, grads = torch.zeros(3), torch.ones(3), []
        for x in xs:
            x = x.detach().requires_grad_()
            wrap(lambda x: batch_norm(x, mean, var, training=True), x).pow(3).sum().backward()
            grads.append(x.grad)
        return {"mean": mean, "var": var, "dx": torch.stack(grads)}

    xs = batches(3)
    found = trained(lambda call, x: checkpoint(call, x, use_reentrant=reentrant))
    same(found, trained(lambda call, x: call(x)))


class Follows(nn.Module):
    """Divides by a stored scale that moves with every batch."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.register_buffer("scale", torch.ones(3, 1, 1))
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        scale = self.read(self.scale)
        y = self.weight * x / scale
        power = x.square().mean((0, 2, 3)).view(3, 1, 1)
        state.commit([(self.scale, state.average(scale, power, 0.5))])
        return y


def test_a_snapshot_keeps_the_gradients_of_a_graph_right():
    compiled_is_eager(Follows(state.snapshot), batches(5))
    compiled_is_eager(Twice(Follows(state.snapshot)), batches(5))
    # A clone would not do: in the backward pass the graph reads the buffer again, after the update.
    with pytest.raises(AssertionError, match=r"^0: d(x|weight): "):
        compiled_is_eager(Follows(torch.clone), batches(5))


def test_a_snapshot_is_an_operator():
    x = torch.randn(3)
    torch.library.opcheck(torch.ops.normzoo.snapshot.default, (x,))
    taken = state.snapshot(x.requires_grad_())
    assert torch.equal(taken, x) and taken.data_ptr() != x.data_ptr() and not taken.requires_grad
