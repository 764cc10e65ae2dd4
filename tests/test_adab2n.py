"""AdaB2N against its formula written out, its loss, and numbers far out."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from balance_cases import ABSENT, IDS, TASKS, C, by_hand, make, per_absent, per_ids, regulariser, sample
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from training import close, same, tensors

from normzoo import AdaB2N
from normzoo.functional import adab2n


@per_ids
@per_absent
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_the_formula(shape, absent, ids):
    layer, x = make(absent=absent, eps=1e-2), torch.randn(6, C, *shape).double().requires_grad_()
    old, dy = tensors(layer), torch.randn(x.shape).double()
    leaves = (x, layer.task_weight, layer.weight, layer.bias)
    ended = {"official": 1, "renormalize": -1}[absent]
    y, mean, var = by_hand(x, ids, layer.task_weight, layer.weight, layer.bias, ended, 1e-2)
    loss = regulariser(mean, var, old["running_mean"], old["running_var"], 0.1)
    expected = torch.autograd.grad((y * dy).sum() + 3 * loss, leaves)
    found = layer(x, ids)
    grads = torch.autograd.grad((found * dy).sum() + 3 * layer.loss, leaves)
    torch.testing.assert_close([found, layer.loss, *grads], [y, loss, *expected])
    torch.testing.assert_close(layer.running_mean, 0.9 * old["running_mean"] + 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 * old["running_var"] + 0.1 * var)  # biased
    assert layer.num_batches_tracked == old["num_batches_tracked"] + 1
    tasks = None if absent == "renormalize" else torch.tensor(1)
    given = (layer.task_weight, layer.weight, layer.bias, 1e-2, absent, tasks)
    torch.testing.assert_close(adab2n(x, ids, *given), found)


@per_absent
def test_one_image_is_its_task(absent):
    layer, x, ids = make(absent=absent), sample()[:1], torch.tensor([1])
    y, mean, _ = by_hand(x, ids, layer.task_weight, layer.weight, layer.bias, 1 if absent == "official" else -1)
    old = layer.running_mean.clone()
    torch.testing.assert_close(layer(x, ids), y)
    torch.testing.assert_close(layer.running_mean, 0.9 * old + 0.1 * mean)
    if absent == "renormalize":
        torch.testing.assert_close(y, layer(x))


def test_a_task_that_is_absent():
    """The authors' code loses its weight, which leaves the batch off its centre."""
    x, ids = sample(), torch.tensor(IDS["one absent"])
    means = {}
    for absent in ABSENT:
        layer = AdaB2N(C, TASKS, affine=False, absent=absent, momentum=1.0, init_weight=1.0).double()
        layer.end_task(), layer.end_task()
        layer(x, ids)
        means[absent] = layer.running_mean
    lost = torch.e / (3 * torch.e + 6)
    torch.testing.assert_close(means["official"], (1 - lost) * means["renormalize"])
    # Before the first task is over the layer has seen none that could be absent; by default all but the last.
    layer = AdaB2N(C, TASKS, affine=False, absent="official").double()
    psi = torch.zeros(TASKS).double()
    renormalized = adab2n(x, ids, psi)
    torch.testing.assert_close(adab2n(x, ids, psi, absent="official", cur_tasks=0), renormalized)
    torch.testing.assert_close(layer(x, ids), renormalized)
    official = by_hand(x, ids, psi, torch.ones(C).double(), torch.zeros(C).double(), 2)[0]
    torch.testing.assert_close(adab2n(x, ids, psi, absent="official"), official)
    torch.testing.assert_close(adab2n(x, ids, psi, absent="official", cur_tasks=2), official)


@per_absent
def test_without_ids_samples_count_alike(absent):
    layer, x = make(absent=absent), sample()
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True))
    (y.sum() + layer.loss).backward()
    assert torch.equal(layer.task_weight.grad, torch.zeros(TASKS).double())
    running = layer.running_mean.clone()
    layer.eval()(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.equal(layer.running_mean, running)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.4, 1.0])
def test_the_rate_is_the_recurrence(kappa, momentum):
    """Also where training resumes in the middle: the counter says where the schedule is."""
    layer, rate, expected = AdaB2N(C, TASKS, momentum=momentum, kappa=kappa).double(), None, torch.zeros(C)
    kept = (1 - momentum) ** kappa
    for step in range(40):
        rate = momentum**kappa if rate is None else rate / (rate + kept)
        torch.testing.assert_close(float(layer._rate()), rate, rtol=2e-6, atol=0)
        x = sample()
        layer(x)
        expected = (1 - rate) * expected + rate * x.mean((0, 2, 3))
        torch.testing.assert_close(layer.running_mean, expected, rtol=1e-5, atol=1e-6)
        if step == 20:
            resumed = AdaB2N(C, TASKS, momentum=momentum, kappa=kappa).double()
            resumed.load_state_dict(layer.state_dict(), strict=True)
            layer = resumed
    assert rate == pytest.approx({0.0: 1 / 40, 1.0: momentum}.get(kappa, 1 - kept), abs=0.02)


@per_absent
def test_derivatives(absent):
    """The loss holds the running statistics fixed once they have moved: finite differences see that where they
    hardly move."""
    layer, ids = make(absent=absent, momentum=1e-12), torch.tensor(IDS["one absent"])
    names = ("task_weight", "weight", "bias")

    def call(x, *parameters):
        fresh = copy.deepcopy(layer)
        y = torch.func.functional_call(fresh, dict(zip(names, parameters, strict=True)), (x, ids))
        return y, fresh.loss

    leaves = [sample(2), *(getattr(layer, name).detach() for name in names)]
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


# The loss


def test_two_passes_before_one_backward():
    layer, xs, ids = make(), [sample(), sample()], [torch.tensor(IDS[k]) for k in ("all there", "one absent")]
    old = tensors(layer)
    leaves, total = list(layer.parameters()), 0.0
    for x, k in zip(xs, ids, strict=True):
        total = total + layer(x, k).pow(3).sum() + layer.loss
    found = torch.autograd.grad(total, leaves)
    mean_, var_, total = old["running_mean"], old["running_var"], 0.0
    for x, k in zip(xs, ids, strict=True):
        y, mean, var = by_hand(x, k, layer.task_weight, layer.weight, layer.bias, -1)
        total = total + y.pow(3).sum() + regulariser(mean, var, mean_, var_, 0.1)
        mean_, var_ = (0.9 * a + 0.1 * b.detach() for a, b in ((mean_, mean), (var_, var)))
    torch.testing.assert_close(found, torch.autograd.grad(total, leaves))
    torch.testing.assert_close((layer.running_mean, layer.running_var), (mean_, var_))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_after_a_pass(copied):
    layer, x, ids = make(kappa=0.4), sample(), torch.tensor(IDS["all there"])
    layer(x, ids)
    other = copied(layer)
    assert other.loss is None and layer.loss is not None
    same(tensors(other), tensors(layer))
    assert torch.equal(other(x, ids), layer(x, ids)) and torch.equal(other.loss, layer.loss)
    same(tensors(other), tensors(layer))


def test_the_loss_holds_no_batch_after_the_backward_pass():
    layer, x = make(), sample()
    seen = weakref.ref(x)
    (layer(x, torch.tensor(IDS["all there"])).sum() + layer.loss).backward()
    del x
    gc.collect()
    assert seen() is None and layer.loss is not None


def test_a_loss_without_gradients_is_refused():
    layer, x = make(), sample()
    assert layer.loss is None
    with torch.no_grad():
        layer(x)
        assert layer.loss > 0
    with pytest.raises(RuntimeError, match=r"AdaB2N: its last forward pass .* use_reentrant=False, or read it"):
        layer.loss  # noqa: B018
    y = checkpoint(layer, x.requires_grad_(), use_reentrant=True)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="AdaB2N: its last forward pass in training ran without gradients"
        ):
            layer.loss  # noqa: B018
        y.sum().backward() if x.grad is None else None
    kept = layer(x), layer.loss
    layer.eval()(x)
    assert torch.equal(layer.loss, kept[1])


@per_absent
@pytest.mark.parametrize("between", [False, True], ids=["at once", "another pass between"])
@pytest.mark.parametrize("kappa", [1.0, 0.4])
def test_checkpointing_gives_the_same_gradients(kappa, between, absent):
    first, second = sample(), sample()
    ids = torch.tensor(IDS["one absent"])
    results = []
    plain = make(kappa=kappa, absent=absent)
    for way in (
        lambda layer, x: layer(x, ids),
        lambda layer, x: checkpoint(layer, x, ids, use_reentrant=False),
    ):
        layer, x = copy.deepcopy(plain), first.clone().requires_grad_()
        with set_checkpoint_early_stop(False):  # a recomputation goes on past the last tensor that is saved
            y = way(layer, x)
        loss = layer.loss
        if between:
            layer(second)
        last = layer.loss
        (y.pow(3).sum() + loss).backward()
        assert torch.equal(layer.loss, last)
        results.append({"y": y, "loss": loss, "dx": x.grad, **tensors(layer)})
        results[-1] |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
    same(*results)
    assert results[0]["num_batches_tracked"] == plain.num_batches_tracked + 1 + between


# Numbers


@per_absent
@pytest.mark.parametrize(
    "psi", [(100.0, -100.0, 0.0), (-100.0,) * 3, (100.0,) * 3, (-100.0, 100.0, 90.0)], ids=str
)
def test_weights_far_out(psi, absent):
    """Where exp(task_weight) is no float32."""
    layer, ids, exact = make(torch.float32, absent=absent), torch.tensor(IDS["all there"]), make(absent=absent)
    with torch.no_grad():
        layer.task_weight.copy_(torch.tensor(psi))
    exact.load_state_dict(layer.state_dict())
    x = sample(dtype=torch.float32)
    results = []
    for each in (layer, exact):
        each(x.to(each.weight), ids).pow(3).sum().backward()
        results.append({"loss": each.loss.detach(), **tensors(each)})
        results[-1] |= {f"d{name}": p.grad for name, p in each.named_parameters()}
    close({k: t.to(results[1][k]) for k, t in results[0].items()}, results[1], rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in results[0].values())


@per_absent
def test_an_empty_batch_has_no_weights(absent):
    layer = make(absent=absent)
    before, x = tensors(layer), torch.empty(0, C, 2, 2).double().requires_grad_()
    y = layer(x, torch.zeros(0, dtype=torch.long))
    (y.sum() + layer.loss).backward()
    assert y.shape == x.shape and all(not p.grad.any() for p in (layer.weight, layer.bias))
    assert layer.loss == 0
    assert layer.task_weight.grad.isfinite().all()
    after = tensors(layer)
    assert all(torch.equal(after[name], before[name]) for name in ("running_mean", "running_var"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_float32_under_autocast(held, dtype):
    """In bfloat16 they would be off by a share of 0.004, and the running mean with them."""
    layer, ids = make(held, momentum=1.0), torch.tensor(IDS["all there"])
    exact, x = copy.deepcopy(layer).double(), sample(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, ids)
        loss = layer.loss
    wanted = exact(x.double(), ids)
    assert y.dtype == dtype and loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert ((y - wanted).abs() <= eps * wanted.abs() + 1e-5).all()
    rounding = torch.finfo(held).eps if held != torch.float32 else 1e-6
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-4, atol=1e-4)
    (y.sum() + loss).backward()
    assert layer.task_weight.grad.dtype == held
