"""torch.compile, torch.export and ONNX, over ZOO."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from zoo_cases import DISTINCT, modes, moves_state, named, state_of, step, trained

import normzoo
from normzoo.zoo import ZOO

BACKENDS = ["auto", pytest.param("triton", id="opaque")]


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """aot_eager, counting graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class OfAnyBatch(nn.Module):
    """Spares the graph of one size that would come first; a size that the layer looks at is still one more."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, x):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.graph(x)


COMPOSED = ("region_norm_l", "evo_norm_s0", "adaptive_layer_norm")
"""Without kernels they are compositions of what the graphs of others have."""


@pytest.mark.parametrize(
    ("entry", "backend"),
    [
        pytest.param(entry, backend, id=f"{entry.name}-{form}")
        for (entry,) in (p.values for p in DISTINCT)
        for backend, form in (("auto", "auto"), ("triton", "opaque"))
        if backend == "triton" or entry.name not in COMPOSED
    ],
)
def test_one_graph_serves_all_batches(entry, backend):
    """Training on batches of many sizes: outputs, gradients and buffers are those of the eager reference."""
    layer, count = trained(entry), Counted()
    other = copy.deepcopy(layer)
    # Around a layer whose hook adds what it needs beside x, which else is a graph of its own.
    compiled = OfAnyBatch(torch.compile(nn.Sequential(other), fullgraph=True, backend=count))
    # A tail of another size is a graph of its own.
    batches = (4, 6, 12, 8, 10) if entry.name == "ghost_batch_norm" else (4, 2, 7, 3, 12)
    for batch in batches[: 5 if backend == "auto" else 3]:  # the interpreter is slow
        x = entry.sample(batch, 3, 1)
        with normzoo.backend(backend):
            found = step(compiled, x)
        found = {name.replace("dgraph._orig_mod.0.", "d"): t for name, t in found.items()}
        torch.testing.assert_close(found, step(layer, x))
        torch.testing.assert_close(state_of(other), state_of(layer))
    assert count.graphs == 1


LAYOUTS = {
    "padded": lambda: torch.randn(4, 3, 16)[..., :15],
    "permuted": lambda: torch.randn(3, 4, 15).transpose(0, 1),
    "cut": lambda: torch.randn(4, 5, 15)[:, 1:4],
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_operators_keep_the_layout(make):
    layer, x = normzoo.LayerNorm(15), make()
    with normzoo.backend("triton"):
        compiled, eager = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert compiled.stride() == eager.stride()
    torch.testing.assert_close(compiled, eager)


def test_tracing_sees_operators():
    x = torch.randn(3, 16)
    with normzoo.backend("triton"):
        graph = torch.fx.experimental.proxy_tensor.make_fx(normzoo.LayerNorm(16))(x)
    assert torch.equal(graph(x), normzoo.LayerNorm(16)(x)) or "row_norm_fwd" in graph.code


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", named(entry for entry in ZOO if entry.added))
def test_the_residual_form_compiles(entry, backend):
    def call(x, r, w):
        y, total = entry.added(x, r, 16, w, eps=1e-5)
        return y.sin() + total

    leaves = [t.requires_grad_() for t in (entry.sample(), entry.sample(), torch.rand(16))]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with normzoo.backend(backend):
        torch.testing.assert_close(compiled(*leaves), call(*leaves))
        found, expected = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, call))
    torch.testing.assert_close(found, expected)


def test_the_backend_is_chosen_inside_a_graph():
    layer = normzoo.LayerNorm(16)

    def call(x):
        with normzoo.backend("reference"):
            return layer(x)

    x = torch.randn(3, 16)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), layer(x))


def operators():
    pytest.importorskip("triton")
    from normzoo_kernels import rows

    x, w = torch.randn(4, 6, 16)[:, :, :13], torch.rand(13)
    options = ("layer", 1e-5, 0.0, False)
    y, total, stats = rows.forward(x, x, w, w, *options, True)
    forward = (x, x, w, w, *options, True)
    backward = (y, total, total, stats, w, w, "layer", 0.0, False, [True, True, True])
    plain = (x.transpose(0, 1), None, None, None, "rms", 1e-5, 0.0, True, False)
    return [("row_norm_fwd", forward), ("row_norm_fwd", plain), ("row_norm_bwd", backward)]


@pytest.mark.parametrize("which", range(3))
def test_operators_keep_torchs_rules(which):
    name, args = operators()[which]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.normzoo, name).default, args, test_utils=tests)


DISPATCHED = ("layer_norm", "batch_norm", "power_norm", "region_norm_l", "evo_norm_b0", "adaptive_layer_norm")
"""One layer for each way to choose between kernels and eager PyTorch, which Dynamo has to follow."""


@pytest.mark.parametrize(
    ("entry", "training", "backend", "strict"),
    [
        pytest.param(entry, training, backend, strict, id=f"{entry.name}-{training}-{backend}-{strict}")
        for (entry,) in (p.values for p in DISTINCT)
        for training in modes(entry.make())
        for backend, strict in (("auto", False), ("triton", False), ("triton", True))
        if not strict or entry.name in DISPATCHED
    ],
)
def test_export_leaves_torchs_operators_only(entry, training, backend, strict):
    layer = trained(entry).train(training)
    if training and entry.approximate:
        with normzoo.backend(backend), pytest.raises(Exception, match=r"torch\.export .* use eval mode"):
            torch.export.export(layer, (entry.sample(4),), strict=strict)
        return
    batch, model = torch.export.Dim("batch", min=2), nn.Sequential(layer)
    # The number of ghost batches is a number of the graph.
    dynamic = None if training and entry.name == "ghost_batch_norm" else ({0: batch},)
    with normzoo.backend(backend):
        program = torch.export.export(model, (entry.sample(4),), dynamic_shapes=dynamic, strict=strict)
    assert not any("normzoo" in str(node.target) for node in program.graph.nodes)
    x = entry.sample(4 if dynamic is None else 5)
    module = program.module()
    torch.testing.assert_close(module(x), layer(x))
    if moves_state(layer):
        moved, held = (
            {name: t for name, t in state_of(m).items() if "running" in name or "tracked" in name}
            for m in (module, model)
        )
        torch.testing.assert_close(moved, held)
        assert len(moved) == (1 if entry.activates else 3)


# PyTorch's exporter calls what newer onnxscript and torch deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["rows", "channels", "running"])
def test_onnx(family):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    entries = [entry for (entry,) in (p.values for p in DISTINCT) if entry.family == family]
    model = nn.Sequential(*map(trained, entries)).eval()
    x = entries[0].sample(2)
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert exported is not None
    proto = exported.model_proto
    (y,) = reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
