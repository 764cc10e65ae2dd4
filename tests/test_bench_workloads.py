"""The shapes that are measured, and the bytes that they have to move."""

import types

import pytest
import torch
from measuring import CPU, case_of, measured, quicken

from normzoo.zoo import find
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
    for name, count in counts.items():
        assert [passes(find(name), "any", d) for d in DIRECTIONS] == count
    by_mode = {
        "batch_norm": ([3, 3, 5, 8], [2, 2, 3, 5]),
        "alpha_batch_norm": ([3, 3, 3, 6], [3, 3, 3, 6]),
        "batch_channel_norm": ([3, 3, 5, 8], [3, 3, 5, 8]),
        "power_norm": ([2, 2, 3, 5], [2, 2, 3, 5]),
        "unified_norm": ([3, 3, 5, 8], [2, 2, 3, 5]),
    }
    for name, counts in by_mode.items():
        for mode, count in zip(("training", "eval"), counts, strict=True):
            assert [passes(find(name), mode, d) for d in DIRECTIONS] == count


def test_a_sweep_has_no_size_twice():
    widths = [w.shape[1] for w in workloads("channels", "cpu", "default", "channels")]
    assert len(widths) > 5 and widths == sorted(set(widths))
    batches = [w.shape[0] for w in workloads("channels", "cpu", "smoke", "rows")]
    assert batches == sorted(set(batches))
