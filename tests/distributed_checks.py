"""Ways of calling a layer, and layers across ranks held to torch's on the whole batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from distributed_work import of_ranks, parts_of_ranks
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tolerance import assert_as_good
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import normzoo
from normzoo.layers.batch import BatchNorm1d, BatchNorm2d


def eager(layer):
    return layer


def compiled(layer):
    return torch.compile(layer, fullgraph=True, backend=aot_eager)


def aot_eager(graph, inputs):
    """The backend of that name, which sees one collective in every graph."""

    def run(graph, _):
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        called = [f for f in called if getattr(f, "namespace", "") in ("c10d", "_c10d_functional")]
        assert [f.__name__ for f in called] == ["all_gather_into_tensor.default", "wait_tensor.default"], called
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=run, partition_fn=partition, keep_inference_input_mutations=True)(
        graph, inputs
    )


def by_kernels(layer):
    from normzoo_kernels import _launch

    def call(x, *others):
        before = _launch.launches.total()
        with normzoo.backend("triton"):
            y = layer(x, *others)
        assert _launch.launches.total() > before or not x.numel(), "no kernel ran"
        return y

    return call


def recomputed(layer):
    return lambda x: checkpoint(layer, x, use_reentrant=False)


def reentrant(layer):
    return lambda x: checkpoint(layer, x, use_reentrant=True)


def step(call, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and input gradient."""
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(dy)
    return [y.detach(), x.grad]


def pair(*shape: int, **options):
    """Our layer and torch's for x (N, *shape), with the same parameters."""
    classes = (BatchNorm1d, nn.BatchNorm1d) if len(shape) == 1 else (BatchNorm2d, nn.BatchNorm2d)
    usual = {name: options[name] for name in options if name == "momentum"}
    ours, torchs = classes[0](shape[0], **options), classes[1](shape[0], **usual)
    for p in torchs.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def compare(ours, torchs, rounds, shape, way, group=None):
    """Trains `ours` on the parts of the ranks, `torchs` on the whole batch, and holds one to the other."""
    rank, call, exact = dist.get_rank(group), way(ours), copy.deepcopy(torchs).double()
    for sizes in rounds:
        parts, dys = parts_of_ranks(sizes, *shape), [torch.randn(n, *shape) for n in sizes]
        x, dy = torch.cat(parts), torch.cat(dys)
        found = of_ranks(step(call, parts[rank], dys[rank]), group)
        expected = step(torchs, x, dy), step(exact, x.double(), dy.double())
        for name, ours_, *theirs in zip(("y", "dx"), zip(*found, strict=True), *expected, strict=True):
            assert_as_good(f"{name} of {sizes}", torch.cat(ours_), *theirs)
    grads = of_ranks([p.grad for p in ours.parameters()], group)
    names = dict(torchs.named_parameters())
    for name, found, a, b in zip(
        names, zip(*grads, strict=True), torchs.parameters(), exact.parameters(), strict=True
    ):
        assert_as_good(f"gradient of {name}", torch.stack(found).sum(0), a.grad, b.grad)
    for name, buffer in torchs.named_buffers():
        assert_as_good(name, ours.get_buffer(name), buffer, exact.get_buffer(name)) if buffer.dim() else None
    assert ours.num_batches_tracked == torchs.num_batches_tracked
    assert_same_on_all_ranks(ours, group)


def assert_same_on_all_ranks(layer, group=None):
    for name, buffer in layer.named_buffers():
        assert all(torch.equal(buffer, other) for other in of_ranks(buffer, group)), f"{name} differs"
