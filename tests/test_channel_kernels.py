"""The kernels of the channel engine against plain formulas: on a GPU where there is one, else interpreted."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

pytest.importorskip("triton")

from normzoo_kernels import _channel_forms, _launch, channels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def wide(parameter, x, mask):
    """A parameter ([2,] C) or ([2,] N, C), spread over x."""

    def spread(t):
        sample = t.shape[0] if t.dim() == 2 else 1
        return t.reshape(sample, t.shape[-1], *[1] * (x.dim() - 2)).to(x.dtype).expand_as(x)

    if mask is None:
        return spread(parameter)
    return torch.where(mask.bool().unsqueeze(1), spread(parameter[1]), spread(parameter[0]))


def reduced(t, mask, per_sample):
    """Sums of t, over positions or also over samples, for each region."""
    t = t.flatten(2) if t.dim() > 2 else t.unsqueeze(2)
    regions = [torch.ones_like(t, dtype=torch.bool)]
    if mask is not None:
        holes = (mask != 0).reshape(t.shape[0], 1, -1)
        regions = [~holes, holes]
    sums = [torch.where(region, t, 0).sum(2 if per_sample else (0, 2)) for region in regions]
    return sums[0] if mask is None else torch.stack(sums)


def formula_moments(x, mask, per_sample):
    """(mean, m2), by subtracting the mean before squaring, and what the mean's rounding left over."""
    count = reduced(torch.ones_like(x), mask, per_sample).clamp(min=1)
    mean = reduced(x, mask, per_sample) / count
    centred = x - wide(mean, x, mask)
    left = reduced(centred, mask, per_sample)
    return mean + left / count, reduced(centred.square(), mask, per_sample) - left * left / count


def formula_apply(x, mask, pivot, scale, shift):
    return (x - wide(pivot, x, mask)) * wide(scale, x, mask) + wide(shift, x, mask)


def formula_sums(dy, x, mask, pivot, per_sample):
    return reduced(dy, mask, per_sample), reduced(dy * (x - wide(pivot, x, mask)), mask, per_sample)


def formula_dx(dy, x, mask, pivot, scale, slope, offset):
    return wide(scale, x, mask) * dy + formula_apply(x, mask, pivot, slope, offset)


def as_good(name, ours, formula, *args):
    """`ours` against float64, beside the formula in float32, rounded once as the kernel does."""
    exact = formula(*(t.double() if is_float(t) else t for t in args))
    plain = formula(*(t.float() if is_float(t) else t for t in args))
    assert_as_good(name, ours, plain.to(ours.dtype), exact)


def check_sums(dy, x, mask, pivot, per_sample):
    """Terms of both signs cancel: what their rounding leaves is of the size of a random walk over them."""
    args = dy, x, mask, pivot, per_sample
    exact = formula_sums(*(t.double() if is_float(t) else t for t in args))
    plain = formula_sums(*(t.float() if is_float(t) else t for t in args))
    terms = dy.double(), dy.double() * (x.double() - wide(pivot.double(), x, mask))
    for ours, p, e, term in zip(channels.sums(*args), plain, exact, terms, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == e.shape
        walk = reduced(term.square(), mask, per_sample).sqrt().max()
        assert (ours - e).abs().max() <= 2 * (p - e).abs().max() + 2 * EPS * (walk + e.abs().max())


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def check_moments(x, mask, per_sample):
    pivot, delta, m2 = found = channels.moments(x, mask, per_sample)
    mean, exact = formula_moments(x.double(), mask, per_sample)
    count = reduced(torch.ones_like(x, dtype=torch.float64), mask, per_sample)
    std = (exact / count.clamp(min=1)).sqrt()
    for t in found:
        assert t.shape == mean.shape and t.dtype == torch.float32
    # pivot and delta together hold the mean to the digits of the spread, not to those of the mean itself.
    error = (pivot.double() + delta.double() - mean).abs()
    assert (error <= 2e-6 * std + 1e-12 * mean.abs() + 1e-30).all(), (error / std).max()
    assert (delta.abs() <= EPS * pivot.abs()).all(), "pivot is not the rounded mean"
    assert ((m2 - exact).abs() <= 2e-6 * exact + count * (1e-12 * mean).square()).all(), (
        (m2 / exact - 1).abs().max()
    )
    return found


def parameters(x, mask, per_sample, number):
    size = (2,) * (mask is not None) + (tuple(x.shape[:2]) if per_sample else (x.shape[1],))
    return [torch.randn(size, device=DEVICE) for _ in range(number)]


def check(x, mask=None, per_sample=False, dy=None, other=None):
    """All four launchers; `other`: the granularity of pivot where it is not that of the rest."""
    before = _launch.launches.total()
    pivot, *_ = check_moments(x, mask, per_sample)
    if other is not None:
        pivot, *_ = check_moments(x, mask, other)
    scale, shift = parameters(x, mask, per_sample, 2)
    slope, offset = parameters(x, mask, pivot.dim() > scale.dim() or (other is None and per_sample), 2)
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    y = channels.apply(x, mask, pivot, scale, shift)
    as_good("y", y, formula_apply, x, mask, pivot, scale, shift)
    check_sums(dy, x, mask, pivot, per_sample)
    dx = channels.dx(dy, x, mask, pivot, scale, slope, offset)
    as_good("dx", dx, formula_dx, dy, x, mask, pivot, scale, slope, offset)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride()
    assert _launch.launches.total() - before >= 4, "no kernel ran"
    return y


def mask_for(x, holes=0.4):
    return (torch.rand(x.shape[0], *x.shape[2:], device=DEVICE) < holes).to(torch.uint8)


def randn(*shape, dtype=torch.float32, last=False):
    """Values of x; `last`: the channels of a position side by side."""
    if last:
        return randn(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    return (torch.randn(shape, device=DEVICE) * 2 + 3).to(dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, last, per_sample, masked):
    x = randn(3, 11, 7, 5, dtype=dtype, last=last)
    check(x, mask_for(x) if masked else None, per_sample)


SHAPES = [
    (1, 1), (1, 9, 1, 1), (4, 1, 3), (1, 1, 6, 6), (7, 13, 1, 1), (2, 3, 2, 5, 3), (2, 70, 16), (3, 2, 64, 32),
    (1, 2, 2049), (2, 3, 4, 1024), (9, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, last):
    """Single samples, channels and positions, and tiles that end before, at and after an edge."""
    x = randn(*shape, last=last)
    check(x)
    check(x, per_sample=True)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 65, 33)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
def test_sizes_with_a_mask(shape, last):
    x = randn(*shape, last=last)
    check(x, mask_for(x))
    check(x, mask_for(x), per_sample=True)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 60, 9)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
def test_pivot_of_another_granularity(shape, per_sample, masked):
    for last in (False, True):
        x = randn(*shape, last=last)
        check(x, mask_for(x) if masked else None, per_sample, other=not per_sample)


LAYOUTS = {
    "channels sliced": lambda: randn(3, 9, 4, 6)[:, 1:],
    "every other channel": lambda: randn(3, 8, 4, 7)[:, ::2],
    "samples sliced": lambda: randn(13, 5, 4, 6)[:-1:2],
    "rows cut": lambda: randn(3, 5, 7, 6)[:, :, :-2],
    "offset by one entry": lambda: randn(3 * 5 * 9 + 1).reshape(-1)[1:].view(3, 5, 9),
    "one channel of many": lambda: randn(3, 5, 4, 6)[:, 2:3],
    "one sample for all": lambda: randn(1, 5, 4, 6).expand(3, 5, 4, 6),
    "one channel for all": lambda: randn(3, 1, 4, 6).expand(3, 5, 4, 6),
    "channels last sliced": lambda: randn(3, 9, 4, 6, last=True)[:, 1:],
    "channels last, rows cut": lambda: randn(3, 8, 7, 6, last=True)[:, :, 1:-1],
    "channels last, samples sliced": lambda: randn(6, 8, 3, 2, last=True)[::2],
    "tokens": lambda: randn(3, 8, 7, last=True),
    "tokens sliced": lambda: randn(3, 8, 7, last=True)[:, :, 1:],
    "strided rows": lambda: randn(6, 12)[:, :5],
    "contiguous strides of one position": lambda: randn(4, 6, 1, 1).as_strided((4, 6, 1, 1), (6, 1, 1, 1)),
    "channels last strides of one position": lambda: randn(4, 6, 1, 1).as_strided((4, 6, 1, 1), (6, 1, 6, 6)),
    "strange strides of one channel": lambda: randn(4, 1, 3, 5).as_strided((4, 1, 3, 5), (15, 1, 5, 1)),
}  # fmt: skip
COPIED = {
    "width cut": lambda: randn(3, 5, 4, 6)[..., :-1],
    "transposed image": lambda: randn(3, 5, 4, 6).transpose(2, 3),
    "columns first": lambda: randn(6, 5).t(),
}


@pytest.mark.parametrize("name", (*LAYOUTS, *COPIED))
def test_layouts(name, monkeypatch):
    x = (LAYOUTS | COPIED)[name]()
    copies = []
    monkeypatch.setattr(torch.Tensor, "contiguous", counting(torch.Tensor.contiguous, copies))
    y = check(x)
    copied = any(t.shape == x.shape for t in copies)
    monkeypatch.undo()
    assert copied == (name in COPIED)
    assert y.stride() == torch.empty_like(x, memory_format=torch.contiguous_format).stride() or (
        y.movedim(1, -1).is_contiguous()
    )
    check(x, mask_for(x), per_sample=True)


def counting(contiguous, copies):
    def count(t, *args, **kwargs):
        if not t.is_contiguous():
            copies.append(t)
        return contiguous(t, *args, **kwargs)

    return count


def test_output_keeps_the_memory_format():
    x = randn(2, 3, 4, 5, last=True)
    assert check(x).is_contiguous(memory_format=torch.channels_last)
    assert check(x.contiguous()).is_contiguous()


GRADIENTS = {
    "one number": lambda x: torch.randn((), device=DEVICE).expand_as(x),
    "one number a plane": lambda x: torch.randn(*x.shape[:2], 1, 1, device=DEVICE).expand_as(x),
    "one number a position": lambda x: torch.randn(x.shape[0], 1, *x.shape[2:], device=DEVICE).expand_as(x),
    "one sample": lambda x: torch.randn(1, *x.shape[1:], device=DEVICE).expand_as(x),
    "channels last": lambda x: randn(*x.shape, last=True),
    "planes": lambda x: randn(*x.shape),
    "wider": lambda x: randn(x.shape[0], x.shape[1] + 1, *x.shape[2:])[:, 1:],
}


@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_layouts_of_the_upstream_gradient(make, last):
    for x, masked in ((randn(3, 5, 5, 3, last=last), False), (randn(3, 5, 4, 6, last=last), True)):
        dy = make(x)
        before = dy.clone()
        check(x, mask_for(x) if masked else None, per_sample=masked, dy=dy)
        assert torch.equal(dy, before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_nothing_to_do(shape, per_sample, masked):
    x = torch.empty(shape, device=DEVICE)
    mask = mask_for(x) if masked else None
    before = _launch.launches.total()
    pivot, *others = channels.moments(x, mask, per_sample)
    sums = channels.sums(x, x, mask, pivot, per_sample)
    for t in (pivot, *others, *sums):
        assert t.shape == pivot.shape and not t.any()
    assert channels.apply(x, mask, pivot, pivot, pivot).shape == shape
    assert channels.dx(x, x, mask, pivot, pivot, pivot, pivot).shape == shape
    assert _launch.launches.total() == before


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


def normalized(x, per_sample=False):
    """What an engine makes of the launchers: the norm of x and, for `dy`, its gradient."""
    pivot, delta, m2 = channels.moments(x, None, per_sample)
    count = x.numel() / pivot.numel()
    rstd = (m2 / count + 1e-5).rsqrt()
    return channels.apply(x, None, pivot, rstd, -delta * rstd), (pivot, delta, rstd, count)


def gradient(dy, x, pivot, delta, rstd, count):
    s1, s2 = channels.sums(dy, x, None, pivot, pivot.dim() == 2)
    slope = -(rstd**3) * (s2 - delta * s1) / count
    return channels.dx(dy, x, None, pivot, rstd, slope, -rstd * s1 / count - slope * delta)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_as_good_as_those_of_torch(dtype, last, per_sample):
    x, dy = (randn(4, 6, 9, 5, dtype=dtype, last=last) for _ in range(2))
    y, saved = normalized(x, per_sample)
    ours = y, gradient(dy, x, *saved)

    def of_torch(x, dy):
        x = x.detach().requires_grad_()
        norm = F.instance_norm(x) if per_sample else F.batch_norm(x, None, None, training=True)
        return norm.detach(), torch.autograd.grad(norm, x, dy)[0]

    theirs, exact = of_torch(x, dy), of_torch(x.double(), dy.double())
    for name, *three in zip(("y", "dx"), ours, theirs, exact, strict=True):
        assert_as_good(name, *three)


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
def test_shares(monkeypatch, programs, last):
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


PROBE = """
import torch
from normzoo_kernels import channels
STEP = 1_200_000_000
def far(shape, strides):
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    view = torch.empty(size, dtype=torch.float16).as_strided(shape, strides)
    return view.copy_(torch.randn(shape))
for shape, strides in (
    ((3, 2, 8), (STEP, 8, 1)), ((2, 3, 7), (7, STEP, 1)), ((3, 4, 2), (STEP, 1, 4)), ((1, 4, 3), (0, 1, STEP)),
):
    x, dy = far(shape, strides), far(shape, strides)
    mask = (torch.rand(shape[0], shape[2]) < 0.5).to(torch.uint8)
    for per_sample, m in ((False, mask), (True, None)):
        found = []
        for a, b in ((x, dy), (x.contiguous(), dy.contiguous())):
            pivot, delta, m2 = channels.moments(a, m, per_sample)
            s1, s2 = channels.sums(b, a, m, 0 * pivot, per_sample)
            y = channels.apply(a, m, 0 * pivot, 0 * pivot + 2, pivot)
            dx = channels.dx(b, a, m, 0 * pivot, 0 * pivot + 2, 0 * pivot + 3, pivot)
            found.append((pivot, m2, s1, s2, y, dx))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
print("reached")
"""


@pytest.mark.skipif(DEVICE == "cuda" or sys.platform != "linux", reason="needs lazily mapped memory")
def test_offsets_beyond_two_to_the_31():
    """A wrapped int32 offset kills the process, hence a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "reached", done.stderr[-2000:] or f"ended by signal {-done.returncode}"
