"""Layers with state: what moves it, what does not, and that training goes on from a file to the last bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading

import pytest
import safetensors.torch
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import (
    OF_EACH_KIND,
    batches,
    by_mean_square,
    close,
    compiled,
    per_drop_in,
    per_dtype,
    per_layer,
    same,
    tensors,
    torchs,
    train,
)

import normzoo
from normzoo import AlphaBatchNorm, BatchNorm2d, InstanceNorm2d, dispatch, state


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


REFUSED = {
    "dimensions": (torch.randn(4), ValueError, r"expected |\(4,\)"),
    "channels": (torch.randn(4, 5, 2, 2), ValueError, "num_features is 3"),
    "integers": (torch.ones(4, 3, 2, 2, dtype=torch.long), TypeError, "real floating-point"),
    "complex": (torch.randn(4, 3, 2, 2, dtype=torch.cfloat), TypeError, "real floating-point"),
    "one value": (torch.randn(1, 3, 1, 1), ValueError, "more than 1 |a multiple of"),
}


@per_layer
@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_leaves_the_state(refused, make):
    x, error, sentence = refused
    layer = make()
    layer(*batches(1))
    before = tensors(layer)
    if by_mean_square(make) and x is REFUSED["one value"][0]:  # which has a mean square
        layer(x)
        return
    with pytest.raises(error, match=sentence):
        layer(x)
    same(tensors(layer), before)


def test_another_device_is_refused():
    layer = BatchNorm2d(3)
    before = tensors(layer)
    with pytest.raises(ValueError, match="is on cpu but the input is on meta"):
        layer(torch.empty(4, 3, 2, 2, device="meta"))
    same(tensors(layer), before)


class Fails(TorchDispatchMode):
    """Operator number `at` raises, unless a buffer was written before."""

    def __init__(self, at: int, error: type[BaseException]):
        super().__init__()
        self.at, self.error, self.wrote, self.failed = at, error, False, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.wrote = self.wrote or func is torch.ops.aten.copy_.default
        self.at -= 1
        if self.at < 0 and not self.wrote:
            self.failed = True
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


@per_layer
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_operator_that_fails_leaves_the_state(error, make):
    layer, (first, x) = make(), batches(2)
    layer(first)
    before = tensors(layer)
    for at in range(300):
        mode = Fails(at, error)
        try:
            with mode:
                layer(x)
        except error as raised:
            assert raised.args == ("injected",)
            same(tensors(layer), before)
        if not mode.failed:  # every operator had its turn
            break
    else:
        raise AssertionError("the forward pass has no end")
    if layer.running_mean is not None and make.func is not AlphaBatchNorm:  # which stores nothing
        assert mode.wrote and not torch.equal(layer.running_mean, before["running_mean"])
    if by_mean_square(make):
        assert mode.wrote and layer.iters == before["iters"] + 1


def test_a_normalization_that_fails_leaves_the_state(monkeypatch):
    layer, x = BatchNorm2d(3), *batches(1)
    before = tensors(layer)

    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="injected"):
        patch.setattr(torch.nn.functional, "batch_norm", broken)
        layer(x)
    same(tensors(layer), before)
    layer(x)
    assert layer.num_batches_tracked == 1


def through_torch(saved: dict) -> dict:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(saved: dict) -> dict:
    return {**through_torch(saved), "model": safetensors.torch.load(safetensors.torch.save(saved["model"]))}


@per_dtype
@per_layer
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
def test_resuming_is_exact(through, make, dtype):
    def fresh(module=None):
        torch.manual_seed(1)
        module = module or nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.Conv2d(3, 2, 1)).to(dtype)
        return module, torch.optim.AdamW(module.parameters(), lr=0.05)

    xs = batches(6, dtype=dtype)
    whole, optimizer = fresh()
    train(whole, xs[:3], optimizer=optimizer)
    saved = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
    others = []
    for module in (None, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        read = through(saved)
        resumed, its = fresh(module)
        resumed.load_state_dict(read["model"], strict=True)
        its.load_state_dict(read["optimizer"])
        others.append((resumed, its))

    expected = train(whole, xs[3:], optimizer=optimizer)
    for resumed, its in others:
        same(train(resumed, xs[3:], optimizer=its), expected)
        assert torch.equal(resumed.eval()(xs[0]), whole.eval()(xs[0]))
        whole.train()


@per_layer
def test_only_tensors_change(make):
    layer = make()
    changing = ("_parameters", "_buffers", "_pulled", "_differentiable")  # the loss is of the last pass alone

    def attributes():
        held = {k: id(t) for k, t in itertools.chain(layer.named_parameters(), layer.named_buffers())}
        return held, {k: repr(v) for k, v in vars(layer).items() if k not in changing}

    before = attributes()
    train(layer, batches(3))
    with torch.no_grad():
        layer(*batches(1))
    with torch.inference_mode():
        layer(*batches(1))
    train(layer, batches(1))
    assert attributes() == before
    if make.func is BatchNorm2d and layer.num_batches_tracked is not None:
        assert layer.num_batches_tracked == 6
    kept = tensors(layer.eval())
    layer(*batches(1))
    same(tensors(layer), kept)


class NoWaiting(TorchDispatchMode):
    """Refuses to bring a number to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "this waits for the device"
        return func(*args, **(kwargs or {}))


@per_layer
def test_nothing_waits_for_the_device(make):
    layer, x = make(), batches(1)[0].requires_grad_()
    with NoWaiting():
        layer(x).sum().backward()


BAD = {"nan": float("nan"), "infinity": float("inf"), "too large to square": 3e38}


@per_dtype
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("way", "value"),
    [pytest.param(lambda m: m, value, id=name) for name, value in BAD.items()]
    + [pytest.param(compiled, BAD["nan"], id="nan, compiled")],
)
def test_a_bad_batch(value, way, momentum, dtype):
    skipping, spreading = (
        BatchNorm2d(3, momentum=momentum, nonfinite=kind).to(dtype) for kind in ("skip", "propagate")
    )
    plain, never_saw = nn.BatchNorm2d(3, momentum=momentum).to(dtype), copy.deepcopy(skipping)
    calls = way(skipping), way(spreading), plain
    first, bad, *later = batches(4, dtype=dtype)
    bad[1, 2, 0, 0] = value
    for call in (*calls, never_saw):
        call(first)
    before = tensors(skipping)
    before["batches_skipped"] += 1
    ys = [call(bad) for call in calls]
    torch.testing.assert_close(ys[0], ys[2], equal_nan=True)
    torch.testing.assert_close(ys[1], ys[2], equal_nan=True)
    same(tensors(skipping), before)

    for x in later:
        for call in (*calls, never_saw):
            call(x)
    close(skipping.state_dict(), never_saw.state_dict())
    close(spreading.state_dict(), plain.state_dict())
    assert not torch.isfinite(spreading.running_var[2])
    assert skipping.batches_skipped == 1 and "batches_skipped" not in skipping.state_dict()
    assert skipping.eval()(first).isfinite().all()
    skipping(bad)  # in eval mode it is no batch
    assert skipping.batches_skipped == 1
    skipping.reset_running_stats()
    assert skipping.batches_skipped == skipping.num_batches_tracked == 0


def test_statistics_that_do_not_fit_their_buffer_are_skipped():
    layer = BatchNorm2d(3, nonfinite="skip").half()
    before = tensors(layer)
    before["batches_skipped"] += 1
    layer((1000 * torch.randn(4, 3, 2, 2)).half())  # a variance of 1e6
    same(tensors(layer), before)


def test_running_statistics_without_a_counter():
    ours, theirs, (x,) = BatchNorm2d(3), nn.BatchNorm2d(3), batches(1)
    for layer in (ours, theirs):
        layer.num_batches_tracked = None
        layer(x)
    close(ours.state_dict(), theirs.state_dict())


def test_commit_writes_all_or_nothing():
    a, b = torch.ones(2), torch.ones((), dtype=torch.long)
    updates = [(a, torch.full((2,), float("nan"), requires_grad=True)), (b, b + 1)]
    state.commit(updates, torch.tensor(False))
    assert a.tolist() == [1, 1] and b == 1
    state.commit(updates, torch.tensor(True))
    assert a.isnan().all() and b == 2 and not a.requires_grad
    assert state.finite(b.float(), torch.ones(2)) and not state.finite(b.float(), a)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_averages_round_once(momentum):
    layer, x = BatchNorm2d(500, momentum=momentum).bfloat16(), torch.randn(4, 500, 1, 3).bfloat16()
    layer.running_mean.normal_()
    layer.num_batches_tracked += 9
    mean = x.double().mean((0, 2, 3))
    expected = 0.9 * layer.running_mean.double() + 0.1 * mean
    layer(x)
    # All but those that float32 has a hair's breadth on the other side of the middle.
    assert (layer.running_mean == expected.bfloat16()).sum() >= 498


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (4, 3, 0, 2), (0, 3, 0, 0)])
@per_layer
def test_an_empty_batch(shape, make):
    layer = make()
    layer(*batches(1))
    before = tensors(layer)
    graphs = shape == (0, 3, 2, 2) and make in OF_EACH_KIND.values()
    calls = [layer, compiled(layer)] if graphs else [layer]
    for call in calls:
        x = torch.empty(shape, requires_grad=True)
        y = call(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        for p in layer.parameters():
            assert torch.equal(p.grad, torch.zeros_like(p))
    after = tensors(layer)
    if "num_batches_tracked" in after:
        counted = before.pop("num_batches_tracked"), after.pop("num_batches_tracked")
        if type(layer) is BatchNorm2d:
            assert counted[1] == counted[0] + len(calls)  # as in torch
    same(after, before)


def test_an_empty_batch_is_no_bad_batch():
    layer = InstanceNorm2d(3, track_running_stats=True, nonfinite="skip")
    before = tensors(layer)
    layer(torch.empty(0, 3, 2, 2))  # the mean over its samples is NaN
    same(tensors(layer), before)


@per_drop_in
def test_batches_of_many_sizes(make):
    xs = [torch.randn(n, 3, h, w) for n, h, w in ((2, 1, 2), (1, 1, 2), (5, 3, 1), (1, 7, 5), (13, 2, 2))]
    layer = make()
    found, expected = train(layer, xs), train(torchs(make), xs)
    close({k: t for k, t in found.items() if "skipped" not in k}, expected)


@per_dtype
@per_layer
def test_deterministic_algorithms(make, dtype):
    xs, layer = batches(2, dtype=dtype), make().to(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [train(copy.deepcopy(layer), xs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in (*runs[1:], train(layer, xs)):
        same(run, runs[0])


def test_threads_do_not_disturb_each_other():
    names = ["reference", "auto"] * 4
    layers, xs = [BatchNorm2d(3) for _ in names], batches(30)
    expected = train(BatchNorm2d(3), xs)
    found, errors, ready = [{} for _ in names], [], threading.Barrier(len(names))

    def work(i):
        try:
            ready.wait(60)
            with normzoo.backend("triton"):
                for step, x in enumerate(xs):
                    with normzoo.backend(names[i]):
                        assert dispatch._state.names == ["auto", "triton", names[i]]
                        found[i] |= {f"{step}{k[1:]}": t for k, t in train(layers[i], [x]).items()}
                    assert dispatch.insisted()
            assert dispatch._state.names == ["auto"]
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not errors
    for each in found:
        same(each, expected)
