"""The state of PowerNorm and UnifiedNorm: when it is read and written, and what it may be read from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from mean_square_oracle import Pair, near
from test_state import Fails
from torch import nn
from training import same, tensors

from normzoo import PowerNorm, UnifiedNorm

C = 4
FORMS = {
    "power": (PowerNorm, {"warmup_iters": 3, "group_num": 2}),
    "power, paper": (PowerNorm, {"warmup_iters": 0, "group_num": None, "backward": "paper"}),
    "unified": (UnifiedNorm, {"window_size": (2, 3), "warmup_iters": 0}),
    "unified, filter": (UnifiedNorm, {"window_size": 3, "warmup_iters": 4, "outlier_filtration": True}),
}
per_form = pytest.mark.parametrize(("kind", "options"), FORMS.values(), ids=FORMS)
per_kind = pytest.mark.parametrize("kind", [PowerNorm, UnifiedNorm])


def batch(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape or (5, C)).double() + 0.5


ORDERS = {"first in, first out": (0, 1), "last first": (1, 0), "again": (0, 0, 1, 0), "one alone": (1,)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("steps_before", [0, 3])
@per_form
def test_forward_passes_before_their_backward_passes(kind, options, steps_before, order):
    """The authors' code raises. Each backward pass has the gradient statistics that the one before it left."""
    pair = Pair(kind, C, **options)
    for _ in range(steps_before):
        pair.train(batch())
    steps = [pair.forward(batch()) for _ in range(2)]
    for i in order:
        pair.backward(steps[i], retain_graph=True)
        pair.same_state()
    pair.train(batch())


@per_form
def test_gradients_that_accumulate(kind, options):
    pair = Pair(kind, C, **options)
    for _ in range(2):
        pair.layer.zero_grad()
        total = 0
        for tokens in (5, 1, 3, 2):
            step = pair.forward(batch(tokens, C))
            step.y.backward(step.dy)
            dx, dw, _ = pair.oracle.backward(step.kept, pair.tokens(step.dy))
            near("dx", step.x.grad, dx, beside=1)
            total = total + dw
            near("dweight", pair.layer.weight.grad, total)
            pair.same_state()
        with torch.no_grad():
            pair.layer.weight -= 0.1 * pair.layer.weight.grad
        pair.oracle.weight = pair.layer.weight.detach().numpy().copy()


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
@per_form
def test_a_pass_without_gradients_moves_the_forward_statistics_alone(kind, options, how):
    pair = Pair(kind, C, **options)
    pair.train(batch())
    before = tensors(pair.layer)
    for _ in range(3):
        x = batch()
        with how():
            y = pair.layer(x)
        pair.near("y", y, pair.oracle.forward(pair.tokens(x))[0])
        pair.same_state()
    assert torch.equal(pair.layer.ema_gz, before["ema_gz"])
    pair.train(batch())


@per_form
def test_what_needs_no_gradient(kind, options):
    """The gradient statistics move with any gradient that comes back."""
    pair = Pair(kind, C, **options)
    alone, dy = copy.deepcopy(pair.layer), batch()
    for _ in range(5):
        x = batch()
        y = alone(x)
        y.backward(dy)
        theirs, kept = pair.oracle.forward(x.numpy())
        _, dw, db = pair.oracle.backward(kept, dy.numpy())
        near("y", y, theirs)
        near("dweight", alone.weight.grad, dw)
        near("dbias", alone.bias.grad, db)
        alone.zero_grad()
        step = pair.layer(x.requires_grad_())
        pair.layer.requires_grad_(False)
        step.backward(dy)
        pair.layer.requires_grad_(True)
        same(tensors(alone), tensors(pair.layer))
    frozen = copy.deepcopy(pair.layer).requires_grad_(False)
    x = batch()
    xs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, leaf in zip((frozen, pair.layer), xs, strict=True):
        layer(leaf).backward(dy)
    assert torch.equal(xs[0].grad, xs[1].grad)
    same(tensors(frozen), tensors(pair.layer))


@per_form
def test_a_backward_pass_that_fails_leaves_the_state(kind, options):
    layer, x = kind(C, **options), torch.randn(5, C)
    layer(x).sum().backward()
    y = layer(x.requires_grad_())
    before = tensors(layer)
    for at in range(200):
        mode = Fails(at, RuntimeError)
        try:
            with mode:
                torch.autograd.grad(y.sum(), x, retain_graph=True)
        except RuntimeError as raised:
            assert raised.args == ("injected",)
            same(tensors(layer), before)
        if not mode.failed:
            break
    else:
        raise AssertionError("the backward pass has no end")
    assert mode.wrote and not torch.equal(layer.ema_gz, before["ema_gz"])


@per_form
def test_second_derivatives_in_training_are_refused(kind, options):
    layer, x = kind(C, **options), torch.randn(5, C, requires_grad=True)
    h = nn.Linear(C, C)(x)
    y = layer(h)
    after = tensors(layer)
    # Of a loss linear in y too, whose second derivative would else end at the layer without a word.
    for loss in (y.pow(2).sum(), y.sum()):
        with pytest.raises(
            RuntimeError, match=f"{kind.__name__}: in training .* create_graph=True .* eval mode"
        ):
            torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="batched gradients"):
        torch.autograd.grad(y, h, torch.ones(2, 5, C), is_grads_batched=True)
    same(tensors(layer), after)


# Checkpoints and casts.


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_the_authors_load(assign):
    layer, x = PowerNorm(C), batch().float()
    saved = {
        "weight": torch.randn(C),
        "bias": torch.randn(C),
        "running_phi": torch.rand(1, C, 1, 1).half(),
        "ema_gz": torch.randn(1, C, 1, 1),
        "iters": torch.tensor([7]),
    }
    kept = dict(saved)
    layer.load_state_dict(saved, strict=True, assign=assign)
    assert saved == kept  # the caller's is as it was
    for name, t in layer.state_dict().items():
        assert torch.equal(t, saved[name].reshape(t.shape).to(t.dtype))
    assert layer.running_phi.dtype == torch.float32
    assert layer.iters.shape == () and layer.running_phi.shape == layer.ema_gz.shape == (C,)
    layer(x.requires_grad_()).sum().backward()
    assert layer.iters == 8

    other = UnifiedNorm(C, (2, 1))
    state = {k: torch.rand(v.shape).to(v.dtype) + 3 for k, v in other.state_dict().items()}
    given = state | {"iters": torch.tensor([3]), "skip_counter": torch.tensor([2])}
    nn.ModuleDict({"norm": other}).load_state_dict({f"norm.{k}": t for k, t in given.items()}, assign=assign)
    for name, t in other.state_dict().items():
        assert torch.equal(t, given[name].reshape(t.shape)), name
    assert other.iters == 3 and other.skip_counter == 2


WRONG = {
    "channels": (PowerNorm(C), {"running_phi": torch.ones(1, C + 1, 1, 1)}, r"size mismatch for running_phi"),
    "two of it": (PowerNorm(C), {"running_phi": torch.ones(2, C)}, r"size mismatch for running_phi"),
    "iters": (PowerNorm(C), {"iters": torch.tensor([1, 2])}, r"size mismatch for iters"),
    "window": (
        UnifiedNorm(C, 3),
        UnifiedNorm(C, 2).state_dict(),
        r"size mismatch for buffer_x2(.|\n)*buffer_gz",
    ),
    "other window": (
        UnifiedNorm(C, (3, 2)),
        UnifiedNorm(C, (3, 4)).state_dict(),
        "size mismatch for buffer_gz",
    ),
    "window of one": (UnifiedNorm(C, 1), UnifiedNorm(C, 2).state_dict(), "size mismatch for buffer_x2"),
    "transposed": (UnifiedNorm(C, 2), {"buffer_x2": torch.ones(C, 2)}, "size mismatch for buffer_x2"),
    "name": (PowerNorm(C), {"running_var": torch.ones(C)}, 'Unexpected key.* "running_var"'),
    "no iters": (PowerNorm(C), {"iters": None}, "running_phi|iters"),
}


@pytest.mark.parametrize(("layer", "given", "match"), WRONG.values(), ids=WRONG)
def test_checkpoints_that_do_not_fit(layer, given, match):
    saved = {k: v for k, v in (layer.state_dict() | given).items() if v is not None}
    before = tensors(layer)
    with pytest.raises(RuntimeError, match=match):
        layer.load_state_dict(saved)
    same(tensors(layer), before)


@per_form
def test_resetting(kind, options):
    layer, fresh = kind(C, **options), kind(C, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t += 2
    moved = tensors(layer)
    layer.reset_running_stats()
    kept = {name: moved[name] for name in ("weight", "bias")}
    same(tensors(layer), tensors(fresh) | kept)
    layer.reset_parameters()
    same(tensors(layer), tensors(fresh))


CASTS = {
    "half": (lambda m: m.half(), torch.float32),
    "bfloat16": (lambda m: m.to(torch.bfloat16), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "half and back": (lambda m: m.half().float(), torch.float32),
    "half, then double": (lambda m: m.half().double(), torch.float64),
    "type": (lambda m: m.to(device="cpu", dtype=torch.half, non_blocking=True), torch.float32),
    "from meta": (lambda m: m.to("meta").half().to_empty(device="cpu"), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
@per_form
def test_state_is_never_in_half_precision(kind, options, cast, dtype):
    layer = kind(C, **options)
    for b in layer.buffers():
        b.add_(torch.rand(b.shape) / 3 + 1 if b.is_floating_point() else 5)  # which a half could not hold
    before = tensors(layer)
    cast(layer)
    for name, b in layer.named_buffers():
        assert b.dtype == (dtype if before[name].is_floating_point() else torch.long), name
        assert layer._buffers[name] is b and b.device.type == "cpu"
        if cast is not CASTS["from meta"][0]:
            assert torch.equal(b, before[name].to(b.dtype)), name
    layer.reset_parameters()
    expected = kind(C, **options)
    x = torch.randn(6, C)
    for _ in range(2):
        y = layer(x.to(layer.weight.dtype))
        y.sum().backward()
        expected(x).sum().backward()
        assert y.dtype == layer.weight.dtype == layer.weight.grad.dtype
    for name, b in layer.named_buffers():
        torch.testing.assert_close(b.float(), expected.get_buffer(name).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@per_form
def test_a_loss_scale_that_is_too_large(kind, options, nonfinite):
    """The scaler skips the steps that overflow; with the authors' arithmetic it skips every one after them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(C, 8), kind(8, **options, nonfinite=nonfinite), nn.Tanh(), nn.Linear(8, 1))
    norm: Any = model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / 32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30, growth_interval=100)
    x = torch.randn(32, C)
    target = x.prod(1, keepdim=True).sign() * 3
    losses, overflows, untrained = [], 0, model[3].weight.detach().clone()
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        overflows += scaler.get_scale() < scale
        losses.append(loss.item())
    assert norm.iters == 40
    if nonfinite == "skip":
        assert norm.gradients_skipped == overflows == 1 and losses[-1] < 0.9 * losses[0]
        assert all(t.isfinite().all() for t in norm.state_dict().values())
    else:
        assert norm.gradients_skipped is None and not norm.ema_gz.isfinite().any()
        assert torch.equal(model[3].weight, untrained) and scaler.get_scale() == 0
