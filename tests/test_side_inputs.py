"""normzoo.inputs: side inputs reach layers deep in a model, never those of another batch."""

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import normzoo
from normzoo.side_inputs import side_input

# Importing torch's compiler warns about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Masked(nn.Module):
    side_inputs = ("mask", "t")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, mask=None):
        mask = side_input(self, "mask") if mask is None else mask
        t = side_input(self, "t", required=False)
        return x * self.weight * mask + (0 if t is None else t)


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Masked()), nn.ReLU(), Masked())


def by_hand(model, x, mask):
    for module in (model[0], model[1][0], model[2], model[3]):
        x = module(x, mask) if isinstance(module, Masked) else module(x)
    return x


def test_they_reach_every_layer():
    model, x, mask = net(), torch.randn(3, 4), torch.rand(3, 1)
    with normzoo.inputs(model, mask=mask):
        assert torch.equal(model(x), by_hand(model, x, mask))
    with pytest.raises(
        ValueError, match=r"Masked: there is no mask; .* `with normzoo.inputs\(model, mask=...\)`"
    ):
        model(x)


def test_the_inner_block_holds():
    model, x = net(), torch.randn(3, 4)
    first, second = torch.rand(3, 1), torch.rand(3, 1)
    with normzoo.inputs(model, mask=first):
        with normzoo.inputs(model, mask=second):
            assert torch.equal(model(x), by_hand(model, x, second))
        with normzoo.inputs(model[3], mask=second):  # about a part of the model
            inner = model[:3](x)
            assert torch.equal(model(x), model[3](inner, second))
        wanted = by_hand(model, x, first)
        with normzoo.inputs(model, t=torch.ones(())):
            assert not torch.equal(model(x), wanted)
        assert torch.equal(model(x), by_hand(model, x, first))


def test_an_argument_goes_before_the_block():
    model, x = Masked(), torch.randn(3, 4)
    with normzoo.inputs(model, mask=torch.zeros(3, 1)):
        assert torch.equal(model(x, torch.ones(3, 1)), x)


def test_other_models_get_nothing():
    model, other, x = net(), net(), torch.randn(3, 4)
    with normzoo.inputs(model, mask=torch.ones(3, 1)), pytest.raises(ValueError, match="there is no mask"):
        other(x)


def test_a_block_keeps_its_layers():
    """Which it knows by their ids: that of a layer that is gone is soon another module's."""
    model = net()
    layers = [weakref.ref(module) for module in model.modules() if isinstance(module, Masked)]
    with normzoo.inputs(model, mask=torch.rand(3, 1)):
        del model
        gc.collect()
        assert len(layers) == 2 and all(layer() is not None for layer in layers)
    gc.collect()
    assert not any(layer() for layer in layers)


def test_a_block_ends_with_an_error():
    model = net()
    with pytest.raises(KeyError), normzoo.inputs(model, mask=torch.ones(3, 1)):
        raise KeyError
    with pytest.raises(ValueError, match="there is no mask"):
        model(torch.randn(3, 4))


def test_threads_do_not_see_each_other():
    model, x = net(), torch.randn(3, 4)
    barrier = threading.Barrier(4)
    found = {}

    def work(i):
        mask = torch.full((3, 1), float(i))
        with normzoo.inputs(model, mask=mask):
            barrier.wait()
            found[i] = torch.equal(model(x), by_hand(model, x, mask))
            barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_compiled_without_a_break_and_without_stale_values():
    model, x = net(), torch.randn(3, 4)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        mask = torch.rand(3, 1)
        with normzoo.inputs(model, mask=mask):
            assert torch.equal(compiled(x), by_hand(model, x, mask))
    assert counter.frame_count == 1


class Inside(nn.Module):
    """A forward that enters the block itself."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, mask):
        with normzoo.inputs(self.net, mask=mask, t=mask + 1):
            return self.net(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_block_in_a_compiled_forward(backend):
    model, counter = Inside(), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        x, mask, dy = torch.randn(3, 4, requires_grad=True), torch.rand(3, 1), torch.randn(3, 4)
        leaves = (x, *model.parameters())
        found, wanted = compiled(x, mask), model(x, mask)
        assert torch.equal(found, wanted) and not torch.equal(wanted, model(x, 1 - mask))
        gradients = [torch.autograd.grad(y, leaves, dy) for y in (found, wanted)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="there is no mask"):  # nothing is left of the block
        model.net(torch.randn(3, 4))


def test_a_block_around_a_checkpoint_in_a_compiled_forward():
    model, compared = net(), net()
    compared.load_state_dict(model.state_dict())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, mask):
        with normzoo.inputs(model, mask=mask):
            return checkpoint(model, x, use_reentrant=False)

    for _ in range(2):
        x, mask = torch.randn(3, 4), torch.rand(3, 1)
        run(x, mask).square().sum().backward()
        by_hand(compared, x, mask).square().sum().backward()
    for p, q in zip(model.parameters(), compared.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)


def test_bad_arguments_in_a_compiled_forward():
    model = Inside()
    model.net[1][0].side_inputs = model.net[3].side_inputs = ("t",)

    @torch.compile(backend="eager")
    def run(x, mask):
        return model(x, mask)

    with pytest.raises(ValueError, match=r"inputs: no layer of the model takes mask; it has Masked \(t\)"):
        run(torch.randn(3, 4), torch.rand(3, 1))


def test_recomputation_refuses_the_block_of_another_batch():
    model, x, mask = net(), torch.randn(3, 4), torch.rand(3, 1)
    with normzoo.inputs(model, mask=mask):
        y = checkpoint(model, x, use_reentrant=False)
    with (
        normzoo.inputs(model, mask=torch.rand(3, 1)),
        pytest.raises(RuntimeError, match="recomputes; pass it to"),
    ):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_after_the_block_is_told_as_such(reentrant):
    model, x = net(), torch.randn(3, 4, requires_grad=True)
    with normzoo.inputs(model, mask=torch.rand(3, 1)):
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(
        RuntimeError, match=r"Masked: there is no mask now, .* recomputes; .* inside of the func"
    ):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_a_function_that_enters_the_block_is_right(reentrant):
    model, x, mask = net(), torch.randn(3, 4, requires_grad=True), torch.rand(3, 1)

    def run(x, mask):
        with normzoo.inputs(model, mask=mask):
            return model(x).square()

    found = []
    for y in (run(x, mask), checkpoint(run, x, mask, use_reentrant=reentrant)):
        leaves = (x, *model.parameters())
        for leaf in leaves:
            leaf.grad = None
        with normzoo.inputs(model, mask=torch.rand(3, 1)):
            y.sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_do_without(reentrant):
    model, x = net(), torch.randn(3, 4, requires_grad=True)
    layer, mask = model[1][0], torch.rand(3, 1)
    checkpoint(layer, x, mask, use_reentrant=reentrant).sum().backward()  # it never had a t
    with normzoo.inputs(model, t=torch.rand(3, 1)):
        y = checkpoint(layer, x, mask, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"Masked: there is no t now, .* recomputes; pass it to forward"):
        y.sum().backward()


def test_recomputation_with_its_own_block_is_right():
    model, x, mask = net(), torch.randn(3, 4), torch.rand(3, 1)
    with normzoo.inputs(model, mask=mask):
        model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def contexts():
        return contextlib.nullcontext(), normzoo.inputs(model, mask=mask)

    with normzoo.inputs(model, mask=mask):
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    with normzoo.inputs(model, mask=torch.rand(3, 1)):
        y.square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({}, ValueError, "nothing is given; pass one of mask, pad_mask, task_ids, t"),
        (
            {"task_ids": torch.ones(3)},
            ValueError,
            r"no layer of the model takes task_ids; it has Masked \(mask, t\)",
        ),
        ({"mask": [1, 0]}, TypeError, "mask is a list; it must be a torch.Tensor"),
        ({"mask": np.ones(1)}, TypeError, "mask is a ndarray; .*; torch.from_numpy makes one"),
        ({"model": "net", "mask": torch.ones(1)}, TypeError, "model is a str; it must be a torch.nn.Module"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=f"inputs: {words}"):
        normzoo.inputs(**{"model": net()} | arguments)
    with pytest.raises(ValueError, match="takes mask; it has none that take any"):
        normzoo.inputs(nn.Linear(1, 1), mask=torch.ones(1))


def test_a_block_held_open_elsewhere_takes_no_other_with_it():
    model, x = net(), torch.randn(3, 4)
    outer, inner = torch.rand(3, 1), torch.rand(3, 1)

    def hold():
        with normzoo.inputs(model, mask=outer):
            yield

    held = hold()
    next(held)
    with normzoo.inputs(model, mask=inner):
        held.close()
        assert torch.equal(model(x), by_hand(model, x, inner))
    with pytest.raises(ValueError, match="there is no mask"):
        model(x)


def test_a_block_can_be_entered_again():
    model, x, mask = net(), torch.randn(3, 4), torch.rand(3, 1)
    block = normzoo.inputs(model, mask=mask)
    with block:
        with block:
            pass
        assert torch.equal(model(x), by_hand(model, x, mask))


def test_copies_of_data_parallel_do_not_go_without():
    layer, ids = normzoo.AdaB2N(2, 2), torch.tensor([0, 1])
    copy = layer._replicate_for_data_parallel()
    copy._parameters, copy._buffers = layer._parameters, layer._buffers
    refused = pytest.raises(RuntimeError, match=r"AdaB2N: torch\.nn\.DataParallel has")
    with normzoo.inputs(layer, task_ids=ids), refused:
        copy(torch.randn(2, 2))
    assert torch.isfinite(copy(torch.randn(2, 2), ids)).all()
