"""What the channel kernels could trip over: bad values, long sums, far extents; and how they are launched."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from channel_checks import (
    DEVICE,
    as_good,
    check,
    check_moments,
    formula_apply,
    gradient,
    mask_for,
    normalized,
    parameters,
    randn,
)

from normzoo_kernels import _channel_calls, _channel_forms, _channel_layout, _launch, channels


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # numpy, in the interpreter
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
def test_what_lies_in_holes_does_not_matter(per_sample, last):
    x = randn(3, 5, 6, 7, last=last)
    mask = mask_for(x)
    mask[1] = 0  # a sample without a hole
    mask[2] = 1  # and one that is nothing else
    clean = channels.moments(x, mask, per_sample)
    for value in (float("nan"), float("inf"), 1e30):
        bad = torch.where(mask.bool().unsqueeze(1), value, x)
        dirty = channels.moments(bad, mask, per_sample)
        sums = channels.sums(bad, bad, mask, clean[0], per_sample)
        kept = channels.sums(x, x, mask, clean[0], per_sample)
        for ours, expected in zip((*dirty, *sums), (*clean, *kept), strict=True):
            assert torch.equal(ours[0], expected[0])
    empty = channels.moments(x, torch.zeros_like(mask), per_sample)
    assert all(not t[1].any() for t in empty)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_a_region_may_begin_late_and_small(last):
    """Its first entry, met in a tile full of another region, is far from all others."""
    x = randn(2, 3, 40, 128, last=last) + 1e4
    mask = torch.zeros(2, 40, 128, dtype=torch.uint8, device=DEVICE)
    mask[0, 30:] = mask[1, :, 64:] = mask[0, 17, 3] = 1
    x[0, :, 17, 3] = -3e5
    check_moments(x, mask, False)
    check_moments(x, mask, True)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so in the interpreter
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (3, 5, 8, 8), (3, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_a_bad_channel_stays_alone(shape, last):
    x = randn(*shape, last=last)
    x[1, 2] = float("nan")
    for per_sample in (False, True):
        found = channels.moments(x, None, per_sample)
        found += channels.sums(x, x, None, torch.zeros(shape[1], device=DEVICE), per_sample)
        bad = torch.zeros(shape[:2] if per_sample else shape[1:2], dtype=torch.bool, device=DEVICE)
        bad[(1, 2) if per_sample else 2] = True
        for t in found:
            assert torch.equal(t.isnan(), bad)


UNLIKE = {
    "large mean": lambda x: x + 1e4,
    "an outlier first": lambda x: x.index_fill_(0, torch.tensor(0), 1e6) if x.dim() == 1 else x,
    "first part shifted": lambda x: torch.cat((x[:5000] + 1e4, x[5000:])),
    "rest shifted": lambda x: torch.cat((x[:5000], x[5000:] + 1e4)),
    "a ramp": lambda x: x + torch.linspace(-1e3, 1e3, len(x), device=DEVICE),
    "constant": lambda x: torch.full_like(x, 1e4 / 3),
}


@pytest.mark.parametrize("make", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("samples", [1, 8], ids=str)
def test_parts_may_differ(make, samples):
    x = make(torch.randn(16000, device=DEVICE)).view(samples, 1, -1)
    check_moments(x, None, False)
    x = torch.cat((x, x.flip(2)), dim=1)
    check_moments(x.movedim(1, -1).contiguous().movedim(-1, 1), None, False)


@pytest.mark.parametrize("shape", [(16, 2, 32, 32), (16, 2, 31, 31), (4096, 8)], ids=str)
def test_large_mean_keeps_its_digits(shape):
    x = torch.randn(shape, device=DEVICE) + 1e4
    y, _ = normalized(x)
    exact = F.batch_norm(x.double(), None, None, training=True)
    assert (y - exact).abs().max() < 2e-6


def test_long_reductions_in_bfloat16():
    check(randn(2, 1, 33_001, dtype=torch.bfloat16))
    check(randn(66_001, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_parts(monkeypatch, programs, last):
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: programs)
    x = randn(2, 2, 190, 77, last=last)
    check(x)
    check(x, mask_for(x), per_sample=True)


@pytest.mark.parametrize("shape", [(70_000, 1, 2), (1, 70_000, 2)], ids=str)
def test_many_samples_and_channels(shape):
    x = randn(*shape)
    pivot, *_ = check_moments(x, None, False)
    as_good("y", channels.apply(x, None, pivot, pivot, pivot), formula_apply, x, None, pivot, pivot, pivot)


def test_launches_are_few(monkeypatch):
    monkeypatch.setattr(_channel_forms, "sm_count", lambda device: 132)

    def launched(call, *args):
        before = _launch.launches.copy()
        call(*args)
        return dict(_launch.launches - before)

    x, large = randn(8, 40, 7, 7), randn(4, 2, 128, 128)
    pivot, scale = torch.zeros(2, 40, device=DEVICE)
    assert launched(channels.moments, x, None, False) == {"channel_moments": 1}
    assert launched(channels.sums, x, x, None, pivot, False) == {"channel_sums": 1}
    assert launched(channels.apply, x, None, pivot, scale, scale) == {"channel_map_flat": 1}
    assert launched(channels.dx, x, x, None, pivot, scale, scale, scale) == {"channel_map_flat": 1}
    assert launched(channels.moments, large, None, False) == {"channel_moments": 1, "merge_moments": 1}
    assert launched(channels.sums, large, large, None, pivot[:2], False) == {"channel_sums": 1, "merge_sums": 1}
    mask = mask_for(large)
    assert launched(channels.moments, large, mask, False) == {"channel_moments_masked": 1, "merge_moments": 1}


def test_runs_are_bitwise_equal():
    for last in (False, True):
        x, dy = (randn(5, 7, 33, 31, last=last) for _ in range(2))
        runs = []
        for _ in range(2):
            y, saved = normalized(x)
            runs.append((y, *saved[:3], gradient(dy, x, *saved)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_negated_views():
    x = randn(3, 5, 4)
    for ours, expected in zip(
        channels.moments(torch._neg_view(x), None, False), channels.moments(-x, None, False), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("per_sample", "masked"), [(False, False), (True, True)])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_operators_are_well_formed(last, per_sample, masked):
    for x in (randn(2, 3, 4, 5, last=last), randn(2, 3, 4, 5).transpose(2, 3), randn(4, 3), randn(2, 3, 1, 1)):
        mask = mask_for(x) if masked else None
        pivot, scale, shift = parameters(x, mask, per_sample, 3)
        calls = {
            "moments": (x, mask, per_sample),
            "apply": (x, mask, pivot, scale, shift),
            "sums": (x.clone(), x, mask, pivot, per_sample),
            "dx": (x.clone(), x, mask, pivot, scale, shift, shift.clone()),
        }
        for name, args in calls.items():
            operator = getattr(torch.ops.normzoo, f"channel_{name}").default
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("extent", "unit"), [((1 << 31) - 8, 8), (1 << 31, 1)])
@pytest.mark.parametrize("tokens", [False, True], ids=["planes", "tokens"])
def test_extents_beyond_two_to_the_31_come_as_int64(tokens, extent, unit):
    """Counted in units they would fit in an int32, in which the kernels multiply them by the unit."""
    x = torch.empty((1, extent) if tokens else (1, 1, extent), dtype=torch.bfloat16, device="meta")
    problem, (view,) = _channel_calls.problem_of(x, None, True, False, _channel_layout.view_of(x))
    numbers, constants = _channel_calls.lies(problem, view)
    assert problem.tokens == tokens and constants["UNIT"] == unit
    assert numbers[1 if tokens else 2] == extent // unit
