"""Whole models, measured before and after conversions."""

import json
import logging

import pytest
import torch
from measuring import CPU, FakeClock, quicken, raises
from torch import nn

import normzoo
import normzoo_kernels.rows
from normzoo_bench import measure, models, results
from normzoo_bench.models import __main__ as command
from normzoo_bench.models import architectures, conversions, measuring

EAGER = models.usual("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


def case_of(model, direction="step", layer=None, dtype="float32", place=0):
    found = models.cases([model], "cpu", "smoke", (dtype,), (direction,), (layer,) if layer else ())
    return found[place]


def measured(case, contenders=EAGER):
    document = results.Document({}, {}, {"median": 1e9})
    clock = FakeClock(*(1e-3 * (1 + i) for i in range(len(contenders))))
    models.measure_model(case, measure.Settings(CPU, contenders, (), (FakeClock(9.9), clock), 2, 1), document)
    return document


def names_of(document):
    return [row["contender"] for row in document.rows]


def kinds_of(contender, case):
    model, batch = case.start(CPU)
    with torch.set_grad_enabled(case.direction == "step"):
        made = conversions.converted(models.CONTENDERS[contender].conversion, model, batch.x)
    return [type(m) for m in made.modules()]


@pytest.mark.parametrize(
    ("model", "direction", "others", "same"),
    [
        ("gpt", "step", ["rms_norm", "power_norm"], []),
        ("gpt", "inference", ["rms_norm", "power_norm"], ["pre-rms", "pre-crms", "pre-crms-orthonormal"]),
        ("resnet50", "step", ["group_norm", "batch_channel_norm"], []),
        ("resnet50", "inference", ["group_norm", "batch_channel_norm"], ["fold"]),
    ],
)
def test_rows_say_all(model, direction, others, same):
    document = measured(case_of(model, direction))
    keeping = {"torch", "normzoo", *(f"normzoo-{name}" for name in same)}
    assert not document.failed and {*names_of(document)} == keeping | {f"normzoo-{name}" for name in others}
    in_training = direction == "step"
    for row in document.rows:
        assert {*results.KEY} <= {*row} and row["direction"] == direction and row["clock"] == "wall"
        assert row["same"] == (row["contender"] in keeping) == (row["difference"] < 1e-10)
        assert row["same"] or row["difference"] > 0.1
        assert {*row["error"]} - {"state"} == ({"y", "gradients"} if in_training else {"y"})
        assert row["error"]["y"] < 1e-3 and row["peak_bytes"] > 0 and row["baseline"] == "torch"
        assert row["saved_bytes"] > 0 if in_training else row["saved_bytes"] is None
    state = [row["contender"] for row in document.rows if "state" in row["error"]]
    of_batches = (
        {"torch", "normzoo", "normzoo-batch_channel_norm"} if model == "resnet50" else {"normzoo-power_norm"}
    )
    assert {*state} == (of_batches if in_training else set())
    assert [row["speedup"]["median"] for row in document.rows[:3]] == [1, 0.5, pytest.approx(1 / 3)]


def test_what_models_are_made_of():
    counts = {"gpt": 5, "vit": 3, "resnet50": 1 + 3 * 4 + 4}
    for name, count in counts.items():
        case = case_of(name, "inference")
        cls = {"layer_norm": normzoo.LayerNorm, "batch_norm": normzoo.BatchNorm2d}[case.layer]
        assert kinds_of("normzoo", case).count(cls) == count
        assert kinds_of("torch", case).count(cls) == 0
    pre = kinds_of("normzoo-pre-rms", case_of("gpt", "inference"))
    assert pre.count(normzoo.RMSNorm) == 3 and pre.count(normzoo.LayerNorm) == 2  # of queries and keys
    assert kinds_of("normzoo-pre-crms", case_of("vit", "inference")).count(normzoo.CRMSNorm) == 3
    assert (
        kinds_of("normzoo-fold", case_of("resnet50", "inference")).count(normzoo.folding.Folded)
        == counts["resnet50"]
    )
    of_rms = case_of("gpt", layer="rms_norm")
    assert of_rms.contenders(EAGER) == ["torch", "normzoo"]
    assert kinds_of("normzoo", of_rms).count(normzoo.RMSNorm) == 5 and nn.RMSNorm not in kinds_of(
        "normzoo", of_rms
    )


def test_the_full_models():
    """As many blocks and parameters as the models of the papers have."""
    with torch.device("meta"):
        resnet = architectures.ResNet50(nn.BatchNorm2d)
        vit = architectures.ViT(nn.LayerNorm, 12, 768, 224)
    assert sum(isinstance(m, nn.Conv2d) for m in resnet.modules()) == 53 and len(resnet.blocks) == 16
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    assert sum(p.numel() for p in vit.parameters()) == 86_567_656 - 12 * 3 * 768  # less the biases of qkv
    assert resnet(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_the_start():
    """Nothing of it is as a fresh norm has it, and it is the same every time."""
    case = case_of("resnet50", dtype="bfloat16", place=1)
    assert case.memory_format == "channels_last"
    (model, batch), (again, _) = case.start(CPU), case.start(CPU)
    assert batch.x.dtype == torch.bfloat16 and batch.x.is_contiguous(memory_format=torch.channels_last)
    assert (
        model.training
        and model.stem.weight.dtype == torch.bfloat16
        and model.norm.weight.dtype == torch.float32
    )
    assert model.norm.weight.std() > 0.01 < model.norm.bias.std() and model.norm.running_mean.abs().max() > 0
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not case_of("gpt", "inference").start(CPU)[0].training


@pytest.mark.parametrize("model", models.MODELS)
def test_a_step_moves_the_weights_and_only_its_own(model):
    case = case_of(model)
    measurement = measuring._Measurement(case, measure.Settings(CPU, (), (), (), 2, 1), None)
    before = [p.clone() for p in measurement.model.parameters()]
    _, step = measurement.ready(models.CONTENDERS["torch"])
    step()
    assert all(map(torch.equal, measurement.model.parameters(), before))
    own = measurement.model
    step = measurement.step(own, measurement.forward(own, models.CONTENDERS["torch"]))
    step()
    moved = [not torch.equal(p, was) for p, was in zip(own.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_the_memory_of_a_step():
    """What is saved are activations and no weights; gradients are among what a step makes."""
    case = case_of("vit")
    model, batch = case.start(CPU)
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = measuring.loss(model(batch.x), batch.target)
    (row,) = measured(case, ("torch",)).rows
    assert row["saved_bytes"] == sum(size for place, size in kept.items() if place not in weights) > 0
    assert value.isfinite() and sum(weights.values()) < row["peak_bytes"] < 5 * sum(weights.values())


# What must not pass


def test_a_conversion_that_changes_the_function(monkeypatch):
    def convert(model, *_, **__):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-2
        return model

    monkeypatch.setattr(normzoo, "convert", convert)
    monkeypatch.setattr(normzoo, "to_pre_rms_norm", lambda model, *_, **__: model)
    document = measured(case_of("vit", "inference"), ("torch", "normzoo"))
    assert names_of(document) == ["torch"] and document.ours_failed
    assert document.failed[0]["reason"].startswith("changes the function: in float64 results differ by ")


def test_a_conversion_that_changes_gradients_or_state_alone(monkeypatch):
    def detached(model, *_, **__):
        bias = model.blocks[0].norm1.bias
        model.blocks[0].norm1.bias = nn.Parameter(bias.detach().clone())
        model.blocks[0].norm1.register_forward_hook(lambda m, _, y: y + (m.weight - m.weight.detach()))

    def forgetful(model, *_, **__):
        model.norm.momentum = 0.2

    for plant, model in ((detached, "gpt"), (forgetful, "resnet50")):
        monkeypatch.setattr(normzoo, "convert", plant)
        document = measured(case_of(model), ("torch", "normzoo"))
        assert names_of(document) == ["torch"], model
        assert "changes the function" in document.failed[0]["reason"]


def test_a_conversion_that_converts_nothing(monkeypatch):
    monkeypatch.setattr(normzoo, "convert", lambda model, *_, **__: model)
    document = measured(case_of("gpt", "inference"), ("torch", "normzoo", "normzoo-rms_norm"))
    assert names_of(document) == ["torch", "normzoo"]
    assert document.failed[0]["reason"].startswith("leaves the function as it was")


class Scaled(torch.autograd.Function):
    """Right, but for its gradient in float32, as a kernel may be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy if dy.dtype == torch.float64 else 1.2 * dy


@pytest.mark.parametrize("model", ["gpt", "resnet50"])
def test_a_wrong_gradient_has_no_time(monkeypatch, model):
    def convert(own, *_, **__):
        norm = own.blocks[-1].norm2
        norm.register_forward_hook(lambda _, __, y: Scaled.apply(y))

    monkeypatch.setattr(normzoo, "convert", convert)
    document = measured(case_of(model), ("torch", "normzoo"))
    assert names_of(document) == ["torch"]
    assert document.failed[0]["reason"].startswith("gradients is off by ") and document.ours_failed


def test_a_wrong_output_has_no_time(monkeypatch):
    def convert(own, *_, **__):
        own.norm.register_forward_hook(lambda _, __, y: y if y.dtype == torch.float64 else y + 0.1)

    monkeypatch.setattr(normzoo, "convert", convert)
    document = measured(case_of("gpt", "inference"), ("torch", "normzoo"))
    assert names_of(document) == ["torch"] and document.failed[0]["reason"].startswith("y is off by ")
    monkeypatch.setattr(normzoo, "convert", raises)
    assert measured(case_of("gpt"), ("torch", "normzoo")).failed[0]["reason"] == "RuntimeError: out of luck"


def test_not_a_number_is_no_small_error():
    assert measuring.worst([1.0, float("nan"), 2.0]) != measuring.worst([1.0, 2.0]) == 2.0


# Compiled


def test_compiled(monkeypatch):
    """Through dynamo and autograd, without the compiler at the end; the kernels in the interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is on")
    asked = []
    compiler = torch.compile

    def quick(call, **options):
        asked.append(options)
        return compiler(call, backend="aot_eager", **options)

    launched = []
    launch = normzoo_kernels.rows.launch
    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr(normzoo_kernels.rows, "launch", lambda *a, **k: launched.append(1) or launch(*a, **k))
    names = ("torch", "torch.compile", "normzoo-compiled")
    document = measured(case_of("gpt", layer="rms_norm"), names)
    assert not document.failed and names_of(document) == [*names] and not launched
    assert [row["baseline"] for row in document.rows] == ["torch", "torch.compile", "torch.compile"]
    document = measured(case_of("gpt", layer="rms_norm"), ("torch", "normzoo-opaque"))
    assert not document.failed and launched and document.rows[1]["baseline"] == "torch"
    assert asked == [{"dynamic": False, "fullgraph": True}] * 3


def test_who_is_measured():
    on_gpu = models.usual("cuda")
    assert {*EAGER} < {*on_gpu} < {*models.CONTENDERS} and EAGER[0] == "torch"
    assert {"torch.compile", "normzoo-compiled", "normzoo-opaque", "normzoo-pre-rms-compiled"} <= {*on_gpu} - {
        *EAGER
    }
    assert "normzoo-rms_norm-compiled" in {*models.CONTENDERS} - {*on_gpu}
    assert all(
        results.is_ours(name) == (made.conversion is not None) for name, made in models.CONTENDERS.items()
    )
    assert {made.form for made in models.CONTENDERS.values()} == {*conversions.FORMS}


# The command


def test_the_command(tmp_path, capsys):
    path = tmp_path / "models.json"
    options = ["--size", "smoke", "--model", "gpt", "vit", "--rounds", "2", "--device", "cpu"]
    assert command.main([*options, "--direction", "inference", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "gpt-1x2x8x32 with layer_norm, float32, inference in eval: wall time in" in out
    assert "torch.compile is left out on a CPU" in out and "saved MB" not in out
    document = results.load(path)
    assert document["settings"]["command"] == "python -m normzoo_bench.models" and len(document["rows"]) == 14
    assert document["settings"]["arguments"]["model"] == ["gpt", "vit"]
    assert logging.getLogger("normzoo").level == logging.NOTSET  # which later warnings go by
    chosen = ["--contender", "torch", "normzoo", "--direction", "step", "--json"]
    assert command.main([*options, *chosen]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["contender"] for row in rows] == ["torch", "normzoo"] * 2
    assert command.main([*options, "--seconds", "1e-9"]) == 0
    assert "No time was left for 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "1"], "--rounds is 1; it must be at least 2"),
        (["--seconds", "0"], "--seconds is 0.0; it must be more than 0"),
        (["--output", "nowhere/x.json"], "but there is no folder nowhere"),
        (["--contender", "normzoo-fold", "--model", "gpt"], "no model of --model has any of these"),
    ],
)
def test_wrong_usage(capsys, options, message):
    assert command.main(["--device", "cpu", *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("python -m normzoo_bench.models: ") and err.count("\n") == 1
