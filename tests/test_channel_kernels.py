"""The channel kernels against plain formulas, in every dtype, size and layout, on a GPU or interpreted."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

pytest.importorskip("triton")

from channel_checks import (
    COPIED,
    DEVICE,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    check,
    gradient,
    mask_for,
    normalized,
    randn,
)

from normzoo_kernels import _launch, channels


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
