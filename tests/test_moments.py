"""The algebra of Moments: every merged set has the statistics of the values it stands for."""

import pytest
import torch
from torch import Tensor

from normzoo import passes
from normzoo.moments import Moments


def moments(x: Tensor, per_sample: bool = True, mask: Tensor | None = None) -> Moments:
    found = passes.moments(x, mask, per_sample)
    return Moments(passes.counts(x, mask, per_sample), *found, regions=mask is not None)


def values(n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n, 8, 5): samples and channels of different means, so that no merge is trivial."""
    x = torch.randn(n, 8, 5, dtype=dtype)
    return x + torch.randn(n, 1, 1, dtype=dtype) + 2 * torch.randn(1, 8, 1, dtype=dtype)


def chunked(x: Tensor, size: int) -> Tensor:
    """(mean, var, count) of each sample's chunk of consecutive samples, by hand."""
    return torch.cat([direct(part, (0, 2))[:, None].expand(-1, len(part), -1) for part in x.split(size)], 1)


def interleaved(x: Tensor, size: int) -> Tensor:
    sets = len(x) // size
    return torch.stack([direct(x[i % sets :: sets], (0, 2)) for i in range(len(x))], 1)


def grouped(x: Tensor, groups: int) -> Tensor:
    found = direct(x.unflatten(1, (groups, -1)), (2, 3))
    return found.repeat_interleave(x.shape[1] // groups, 2)


def groups_of_the_batch(x: Tensor) -> Tensor:
    return grouped(x.transpose(0, 1).reshape(1, 8, -1), 2)[:, 0]


def direct(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean, biased variance and count, stacked."""
    var, mean = torch.var_mean(x, dims, correction=0)
    return torch.stack((mean, var, torch.full_like(mean, x.numel() / mean.numel())))


MERGES = {
    "none": (lambda m: m, lambda x: direct(x, (2,))),
    "batch": (lambda m: m.over_batch(), lambda x: direct(x, (0, 2))),
    "groups": (lambda m: m.over_groups(4), lambda x: grouped(x, 4)),
    "channels": (lambda m: m.over_channels(), lambda x: grouped(x, 1)),
    "groups of groups": (lambda m: m.over_groups(4).over_groups(2), lambda x: grouped(x, 2)),
    "batch, groups": (lambda m: m.over_batch().over_groups(2), groups_of_the_batch),
    "groups, batch": (lambda m: m.over_groups(2).over_batch(), groups_of_the_batch),
    "batch twice": (lambda m: m.over_batch().over_batch(), lambda x: direct(x, (0, 2))),
    "chunks": (lambda m: m.over_chunks(4), lambda x: chunked(x, 4)),
    "chunks, batch": (lambda m: m.over_chunks(4).over_batch(), lambda x: direct(x, (0, 2))),
    "interleaved": (lambda m: m.over_chunks(2, interleaved=True), lambda x: interleaved(x, 2)),
}  # fmt: skip


@pytest.mark.parametrize(("merge", "by_hand"), MERGES.values(), ids=MERGES)
def test_merged_sets_have_the_statistics_of_their_values(merge, by_hand):
    x = values()
    m = merge(moments(x))
    mean, var, count = by_hand(x)
    torch.testing.assert_close(m.mean, mean)
    torch.testing.assert_close(m.var, var)
    torch.testing.assert_close(m.m2, var * count)
    torch.testing.assert_close(torch.as_tensor(m.count).expand_as(count).double(), count)
    torch.testing.assert_close(m.pivot + m.delta, mean.expand(m.pivot.shape))


@pytest.mark.parametrize(("merge", "by_hand"), MERGES.values(), ids=MERGES)
def test_float32_keeps_its_digits_at_a_large_mean(merge, by_hand):
    """The pivots differ by hundreds; the variance must not feel it, nor x − mean the rounding of 1e4."""
    x = (values() + 1e4).float()
    x[:3] += 3
    m = merge(moments(x))
    mean, var, _ = by_hand(x.double())
    assert ((m.var - var) / var).abs().max() < 1e-5
    away = (x - m.pivot.unsqueeze(-1)) - m.delta.unsqueeze(-1)
    exact = x.double() - mean.expand(m.pivot.shape).unsqueeze(-1)
    assert (away - exact).abs().max() < 1e-5  # the spacing of float32 at 1e4 is 1e-3


def test_sets_hold_every_set_once():
    x = values(7)
    m = moments(x)
    assert m.sets.mean.shape == (7, 8)
    assert m.over_batch().sets.mean.shape == (8,)
    assert m.over_groups(2).sets.mean.shape == (7, 2)
    assert m.over_chunks(3).sets.count[:, 0].tolist() == [15, 15, 5]
    torch.testing.assert_close(m.sets.unbiased_var, torch.var(x, 2))


def test_weights_count_samples():
    x, w = values(), torch.rand(6, dtype=torch.float64)
    m = moments(x).over_batch(weights=w)
    mean = (w[:, None] * x.mean(2)).sum(0) / w.sum()
    torch.testing.assert_close(m.mean, mean)
    var = (w[:, None, None] * (x - mean[:, None]).square()).sum((0, 2)) / (w.sum() * 5)
    torch.testing.assert_close(m.var, var)
    torch.testing.assert_close(m.count, (5 * w.sum()).expand(8))


def test_a_weight_of_zero_leaves_a_sample_out():
    x = values()
    m = moments(x).over_batch(weights=torch.tensor([1.0, 0, 1, 0, 0, 0]))
    torch.testing.assert_close(m.var, moments(x[[0, 2]]).over_batch().var)
    nothing = moments(x).over_batch(weights=torch.zeros(6))
    assert torch.equal(nothing.var, torch.zeros(8, dtype=torch.float64))


def test_statistics_are_differentiable_through_every_merge():
    x, w = values(4).requires_grad_(), torch.rand(4, dtype=torch.float64).requires_grad_()

    def all_of_them(x, w):
        m = moments(x)
        z = m.affine(*m.over_batch(w).standardize())
        merged = (
            m.over_groups(2),
            m.over_chunks(3),
            m.over_chunks(2, True),
            m.over_batch(w),
            z.over_channels(),
        )
        return tuple(t for each in merged for t in (each.mean, each.var))

    assert torch.autograd.gradcheck(all_of_them, (x, w))
    assert torch.autograd.gradgradcheck(all_of_them, (x, w))


def test_affine():
    x = values()
    m = moments(x)
    scale, shift = torch.randn(2, 6, 8, dtype=torch.float64).unbind()
    z = (x - m.pivot.unsqueeze(-1)) * scale.unsqueeze(-1) + shift.unsqueeze(-1)
    ours, exact = m.affine(scale, shift), moments(z)
    for merge in (lambda m: m, lambda m: m.over_groups(4), lambda m: m.over_batch()):
        torch.testing.assert_close(merge(ours).mean, merge(exact).mean)
        torch.testing.assert_close(merge(ours).var, merge(exact).var)


@pytest.mark.parametrize("per_sample", [False, True])
def test_regions(per_sample):
    x, mask = values(), (torch.rand(6, 5) > 0.4).to(torch.uint8)
    mask[2] = 0  # a sample without a hole
    m = moments(x, per_sample, mask)
    merged = m.over_batch()
    for region in (0, 1):
        inside = (mask == region)[:, None].expand_as(x)
        for channel in (0, 7):
            chosen = x[:, channel][inside[:, channel]]
            torch.testing.assert_close(merged.mean[region].squeeze(0)[channel], chosen.mean())
            torch.testing.assert_close(merged.var[region].squeeze(0)[channel], chosen.var(correction=0))
    if per_sample:
        assert m.var.shape == merged.delta.shape == (2, 6, 8)
        assert torch.equal(m.delta[1, 2], torch.zeros(8, dtype=torch.float64))
        torch.testing.assert_close(m.mean[0, 2], x[2].mean(1))


def test_nothing_has_statistics_of_zero():
    m = moments(torch.empty(0, 8, 5))
    for merged in (m.over_batch(), m.over_chunks(3).over_batch(), moments(torch.empty(0, 8, 5), False)):
        assert torch.equal(merged.var, torch.zeros(8)) and torch.equal(merged.mean, torch.zeros(8))


def test_one_rank_is_the_identity():
    m = moments(values(), per_sample=False)
    assert m.across_ranks() is m


def test_weights_are_a_tensor():
    with pytest.raises(TypeError, match="over_batch: weights is a list; it must be a tensor"):
        moments(values()).over_batch([1.0] * 6)


def test_a_count_may_be_a_tensor_without_dimensions():
    m = Moments(torch.tensor(5.0), *(torch.ones(6, 8) for _ in range(3)))
    assert m.count == 5 and m.over_batch().count.tolist() == [30] * 8


def test_counts_of_regions_are_exact():
    mask = torch.zeros(1, 2**24 + 3, dtype=torch.uint8)
    mask[0, 0] = 1
    count = passes.counts(torch.empty(1, 1, 2**24 + 3, dtype=torch.float64, device="meta"), mask, False)
    assert count.tolist() == [[2**24 + 2], [1]]


def test_a_parameter_for_each_region():
    x, mask = values(2), (torch.rand(2, 5) > 0.4).to(torch.uint8)
    m, w = moments(x, True, mask), torch.rand(2, 1, 8, dtype=torch.float64)
    scale, _ = m.standardize(w)
    torch.testing.assert_close(scale[1] * (m.var[1] + 1e-5).sqrt(), w[1].expand(2, -1))


REFUSALS = {
    "groups": (lambda m: m.over_groups(3), "groups is 3; it must divide the 8 channels"),
    "chunks": (lambda m: m.over_chunks(4, True), "size is 4; interleaved it must divide the 6 samples"),
    "chunks of one set": (lambda m: m.over_batch().over_chunks(2), "over_chunks: needs statistics of samples"),
    "weights": (lambda m: m.over_batch(torch.ones(5)), r"weights has shape \(5,\); it must be \(N,\) = \(6,\)"),
    "weights twice": (lambda m: m.over_batch().over_batch(torch.ones(6)), "weights need statistics of samples"),
    "ranks": (lambda m: m.across_ranks(), "a sample lives on one rank; merge with over_batch"),
    "no samples a chunk": (lambda m: m.over_chunks(0), "size is 0; it must be a positive int"),
    "groups of groups": (lambda m: m.over_groups(4).over_groups(8), "divide the 4 groups that are left"),
    "weight": (lambda m: m.standardize(torch.ones(3)), r"weight has shape \(3,\); it must be \(8,\), or"),
    "bias": (lambda m: m.standardize(bias=torch.ones(6, 1, 1)), r"bias has shape \(6, 1, 1\)"),
    "affine of samples": (
        lambda m: moments(values(), per_sample=False).affine(m.var, m.var),
        r"affine: scale has shape \(6, 8\); it must be \(8,\)",
    ),
    "affine": (lambda m: m.over_batch().affine(m.var, m.var), "affine: the sets are merged already"),
}


@pytest.mark.parametrize(("merge", "match"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_merged_is_refused(merge, match):
    with pytest.raises(ValueError, match=match):
        merge(moments(values()))
