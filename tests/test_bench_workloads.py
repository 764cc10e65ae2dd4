"""The shapes that are measured, and the bytes that they have to move."""

import types

import pytest
import torch
from measuring import CPU, case_of, measured, quicken

from normzoo.zoo import find
from normzoo_bench import peers
from normzoo_bench.cases import Summed, plan
from normzoo_bench.workloads import DIRECTIONS, Workload, fitted, passes, workloads


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quicken(monkeypatch)


@pytest.mark.parametrize(
    ("dims", "shape"), [(2, (75, 4)), (3, (3, 4, 25)), (4, (3, 4, 5, 5)), (5, (3, 4, 1, 5, 5))]
)
def test_images_for_layers_of_other_dimensions(dims, shape):
    entry = types.SimpleNamespace(
        family="channels",
        arguments=(2, 16),
        measured={"eps": 1e-3},
        sample=lambda: torch.empty(4, 16, *[3] * (dims - 2)),
    )
    assert fitted(entry, Workload("resnet", (3, 4, 5, 5))) == ((2, 4), {"eps": 1e-3}, shape)


def test_running_norms_of_images_and_tokens():
    """Steady, and on images without group scaling, which would be another norm before batch norm's rival."""
    image, tokens = (case_of(find("power_norm"), shape) for shape in ((2, 6, 3, 3), (5, 6)))
    for case in (image, tokens):
        layer = case.layer(CPU)
        assert layer.warmup_iters == 0 and layer.num_features == 6
        assert layer(case.buffers(CPU, 1)[0].x).shape == case.shape
    layer = image.layer(CPU)
    assert layer.channel_dim == 1 and layer.group_num is None and tokens.layer(CPU).group_num == 1
    assert case_of(find("unified_norm"), (2, 6, 3, 3)).layer(CPU).channel_dim == 1
    assert not measured(image, contenders=("normzoo",)).failed


def test_passes_of_each_family():
    counts = {"rms_norm": [2, 2, 3, 5], "group_norm": [3, 3, 5, 8], "frozen_batch_norm": [2, 2, 2, 4]}
    counts |= {
        "adaptive_layer_norm": [2, 2, 3, 5],
        "evo_norm_s0": [3, 3, 5, 8],
        "weight_standardize": [2, 2, 3, 5],
    }
    for name, count in counts.items():
        assert [passes(find(name), "any", d) for d in DIRECTIONS] == count
    by_mode = {
        "batch_norm": ([3, 3, 5, 8], [2, 2, 3, 5]),
        "alpha_batch_norm": ([3, 3, 3, 6], [3, 3, 3, 6]),
        "batch_channel_norm": ([3, 3, 5, 8], [3, 3, 5, 8]),
        "power_norm": ([2, 2, 3, 5], [2, 2, 3, 5]),
        "evo_norm_b0": ([3, 3, 5, 8], [3, 3, 5, 8]),
        "region_norm_b": ([3, 3, 5, 8], [3, 3, 5, 8]),
        "region_norm_l": ([4, 4, 5, 9], [4, 4, 5, 9]),
        "unified_norm": ([3, 3, 5, 8], [2, 2, 3, 5]),
    }
    for name, counts in by_mode.items():
        for mode, count in zip(("training", "eval"), counts, strict=True):
            assert [passes(find(name), mode, d) for d in DIRECTIONS] == count


@pytest.mark.parametrize(
    ("given", "shape"),
    [((8192, 16), (32, 256, 16)), ((64, 16), (2, 32, 16)), ((7, 16), (7, 1, 16)), ((4, 5, 16), (4, 5, 16))],
)
def test_rows_with_a_condition_are_tokens_of_samples(given, shape):
    for name in ("adaptive_rms_norm", "time_dependent_layer_norm"):
        assert fitted(find(name), Workload("llm", given))[2] == shape


def test_what_a_layer_needs_beside_its_input():
    """Comes along, and a condition gets gradients as in training; a side input does not."""
    names = ("adaptive_rms_norm", "time_dependent_rms_norm")
    adaptive, timed = (case_of(find(name), (6, 5, 8)) for name in names)
    layer, x = adaptive.layer(CPU), adaptive.buffers(CPU, 1)[0].x
    assert {name: p.shape for name, p in layer.named_parameters()} == {"scale": (6, 8), "shift": (6, 8)}
    assert torch.equal(layer(x), find("adaptive_rms_norm").function(x, layer.scale, layer.shift))
    assert timed.layer(CPU).t.shape == (6,) and not timed.layer(CPU).t.requires_grad
    assert case_of(find("region_norm_b"), (4, 8, 5, 3)).layer(CPU).mask.dtype == torch.bool
    assert type(case_of(find("rms_norm")).layer(CPU)) is find("rms_norm").cls


def test_weights():
    """In both memory formats, beside the authors' formula."""
    (conv, *_) = cases = plan([find("weight_standardize")], "cpu", "smoke", ("bfloat16",))
    assert conv.shape[1:] == (512, 3, 3) and conv.parameter_dtype == torch.float32
    assert {case.memory_format for case in cases} == {"contiguous", "channels_last"}
    for case in cases[:2]:
        found = measured(case)
        assert not found.failed and {row["contender"] for row in found.rows} == {"normzoo", "torch"}


def test_a_sweep_has_no_size_twice():
    widths = [w.shape[1] for w in workloads("channels", "cpu", "default", "channels")]
    assert len(widths) > 5 and widths == sorted(set(widths))
    batches = [w.shape[0] for w in workloads("channels", "cpu", "smoke", "rows")]
    assert batches == sorted(set(batches))


def test_widths_of_a_gpu():
    """Heads from 64 to 512 wide, and rows to 256K, each of which a program of the static gate can name."""
    widths = {(w.use, w.shape[-1]) for w in workloads("rows", "cuda", "full")}
    assert {width for use, width in widths if use == "qk"} == {64, 128, 256, 512}
    assert {width for use, width in widths if use == "wide"} == {2**k for k in range(14, 19)}


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_sum_and_its_norm(name, monkeypatch):
    """A case as any other, of both outputs and with gradients for the residual too."""
    (case, *_) = plan([find(name)], "cpu", "smoke", ("bfloat16",), ("llm",), added=True)
    size = case.shape[0] * case.shape[1] * 2
    assert [case.bytes(direction) // size for direction in DIRECTIONS] == [4, 4, 4, 8]
    found = measured(case, ("normzoo", "torch", "official"))
    assert not found.failed and {entry["contender"] for entry in found.absent} == {"official"}
    assert {row["contender"] for row in found.rows} == {"normzoo", "torch"}
    for row in found.rows:
        assert row["layer"] == f"add_{name}" and str(case).startswith(f"add_{name} llm-")
        if row["direction"] == "both":
            assert {"y", "sum", "dx", "residual", "norm.weight"} <= set(row["error"])

    for wrong, said in (
        (lambda norm, x, residual: (norm(x), x + 0 * residual), "y is off by"),
        (lambda norm, x, residual: (norm(x + residual), x + 0 * residual), "sum is off by"),
        (lambda norm, x, residual: (norm(x + residual), x + residual.detach()), "residual is off by"),
    ):

        def planted(case, layer, device, wrong=wrong):
            module = Summed(layer.norm, layer.residual.detach(), wrong)
            return module, module

        monkeypatch.setitem(peers._OF_SUM, "liger", planted)
        (failed,) = measured(case, ("liger",)).failed
        assert failed["reason"].startswith(said)
