"""What region norms refuse, and what they say then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from region_oracle import AFFINE, regions

from normzoo import RegionNormB, RegionNormL
from normzoo.functional import region_norm_b, region_norm_l

C = 3
X = torch.ones(2, C, 4, 3)
BAD_MASKS = {
    "a list": ([[0, 1]], TypeError, "mask is a list; it must be a tensor of 0 and 1"),
    "an array": (np.zeros((2, 4, 3)), TypeError, "mask is a ndarray; .* torch.from_numpy makes one"),
    "complex": (torch.zeros(2, 4, 3).cfloat(), TypeError, "mask is torch.complex64; it must be of bool"),
    "soft": (torch.full((2, 4, 3), 0.5), ValueError, r"entries from 0.5 to 0.5; .* take mask > 0.5"),
    "bytes": (torch.tensor([0, 255], dtype=torch.uint8).repeat(12).view(2, 4, 3), ValueError,
              r"entries from 0 to 255; .* mask > 127 for an image of bytes"),
    "negative": (-torch.ones(2, 4, 3), ValueError, "entries from -1.0"),
    "nan": (torch.full((2, 4, 3), float("nan")), ValueError, r"mask has NaN in it; .* take mask.isnan\(\) if"),
    "too few dimensions": (torch.zeros(4, 3), ValueError, r"mask has shape \(4, 3\).* must be \(2, 1, \*\).*"
                           r"; mask\[None\] is one"),
    "too many dimensions": (torch.zeros(2, 1, 1, 4, 3), ValueError, r"shape \(2, 1, 1, 4, 3\)"),
    "channels": (torch.zeros(2, C, 4, 3), ValueError, r"shape \(2, 3, 4, 3\); for an input .* it has "
                 r"3 channels, take one of them, such as mask\[:, :1\]"),
    "channels last": (torch.zeros(2, 4, 3, 1), ValueError, r"shape \(2, 4, 3, 1\); .*; mask.movedim\(-1, 1\)"),
    "transposed": (torch.zeros(2, 3, 4), ValueError,
                   r"shape \(2, 1, 3, 4\) and the input \(2, 3, 4, 3\), the same sizes in another order; "
                   ".*mask.mT"),
    "samples": (torch.zeros(3, 1, 4, 3), ValueError, r"shape \(3, 1, 4, 3\)"),
    "nothing to resize": (torch.zeros(2, 1, 0, 3), ValueError, r"shape \(2, 1, 0, 3\) .* no pixel in the "
                          "mask, give"),
    "elsewhere": (torch.zeros(2, 4, 3, device="meta"), ValueError, "mask is on meta but the input is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "error", "match"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_masks_are_refused(mask, error, match):
    layer = RegionNormB(C, nonfinite="skip")
    for call, name in ((layer, "RegionNormB"), (region_norm_b, "region_norm_b")):
        with pytest.raises(error, match=f"{name}: .*{match}"):
            call(X, mask)
    assert layer.batches_skipped == 0


def test_what_a_refusal_says_makes_a_mask():
    hole = torch.rand(2, 1, 4, 3) < 0.5
    x = torch.randn(2, C, 4, 3)
    wanted, shared = region_norm_b(x, hole), region_norm_b(x, hole[:1].expand(2, 1, 4, 3))
    transposed, last, array = hole.mT, hole.movedim(1, -1), hole.numpy()
    for mask in (transposed.mT, last.movedim(-1, 1), hole.expand(2, 3, 4, 3)[:, :1], torch.from_numpy(array)):
        assert torch.equal(region_norm_b(x, mask), wanted)
    assert torch.equal(region_norm_b(x, hole[0, 0][None]), shared)


@pytest.mark.parametrize("resize", ["nearest", "max"])
def test_volumes_in_another_order_are_refused(resize):
    x, hole = torch.randn(2, C, 4, 3, 2), torch.rand(2, 3, 2, 4) < 0.5
    with pytest.raises(
        ValueError, match="the same sizes in another order; it is not stretched to that: permute"
    ):
        region_norm_b(x, hole, resize=resize)
    assert torch.isfinite(region_norm_b(x, torch.rand(2, 8, 6, 4) < 0.5, resize=resize)).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_sizes_are_compared_when_compiled():
    compiled = torch.compile(region_norm_b, fullgraph=True, dynamic=True, backend="eager")
    for width in (6, 10):
        x, hole = torch.randn(2, C, 4, width), torch.rand(2, 8, 2 * width) < 0.5
        torch.testing.assert_close(compiled(x, hole), region_norm_b(x, hole))
    with pytest.raises(Exception, match="the same sizes in another order"):
        compiled(x, torch.zeros(2, 10, 4))


def test_a_mask_is_not_resized_in_six_dimensions():
    x = torch.randn(2, C, 2, 2, 2, 2)
    hole = torch.rand(2, 2, 2, 2, 2) < 0.5
    torch.testing.assert_close(region_norm_b(x, hole), regions(x, hole))
    with pytest.raises(ValueError, match="3 to 5 dimensions only"):
        region_norm_b(x, torch.zeros(2, 1, 4, 4, 4, 4))


@pytest.mark.parametrize(
    ("shape", "options"), [((1, C), {}), ((1, C, 1, 1), {}), ((4, C, 1, 1), {"per_instance": True})], ids=str
)
def test_a_single_value_per_channel_is_refused(shape, options):
    mask = torch.zeros(shape[0], *shape[2:])
    with pytest.raises(ValueError, match=r"RegionNormB: Expected more than 1 value per channel"):
        RegionNormB(C, **options)(torch.ones(shape), mask)


BAD_INPUTS = {
    "dimensions": (torch.ones(3), ValueError, r"has shape \(3,\); it must be \(N, C, \*\)"),
    "channels": (torch.ones(2, C + 1, 4), ValueError, "num_features is 3"),
    "integers": (torch.ones(2, C, 4).int(), TypeError, "input is torch.int32"),
    "a list": ([1.0], TypeError, "input is a list"),
}


@pytest.mark.parametrize(("x", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused(x, error, match):
    with pytest.raises(error, match=f"RegionNormB: .*{match}"):
        RegionNormB(C)(x, torch.zeros(2, 4))


BAD_OPTIONS = {
    "per_instance": ({"per_instance": 1}, TypeError, "per_instance is 1"),
    "separate_beta": ({"separate_beta": "yes"}, TypeError, "separate_beta is 'yes'"),
    "resize": ({"resize": "area"}, ValueError, "resize is 'area'; it must be one of nearest, max"),
    "eps": ({"eps": 0}, ValueError, "eps is 0"),
    "sync": ({"sync": True, "per_instance": True}, ValueError, "sync=True is without effect"),
    "group": ({"process_group": object()}, ValueError, "it needs sync=True"),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'"),
}


@pytest.mark.parametrize(("options", "error", "match"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=f"RegionNormB: .*{match}"):
        RegionNormB(C, **options)


@pytest.mark.parametrize("name", AFFINE)
def test_bad_parameters_are_refused(name):
    for given, error, match in (
        (torch.zeros(C + 1), ValueError, r"has shape \(4,\); for this input it must be \(3,\)"),
        (torch.zeros(C, dtype=torch.long), TypeError, "is torch.int64"),
        (0.0, TypeError, "is a float"),
    ):
        with pytest.raises(error, match=f"region_norm_b: {name} {match}"):
            region_norm_b(X, torch.zeros(2, 4, 3), **{name: given})


WRONG_CONVOLUTIONS = {
    "of one channel": (
        lambda w: w[:, :1],
        ValueError,
        r"shape \(1, 1, 7, 7\); it must be \(1, 2, k, k\), k odd",
    ),
    "even": (lambda w: w[..., :6, :6], ValueError, r"shape \(1, 2, 6, 6\); it must be"),
    "oblong": (lambda w: w[..., :5], ValueError, r"shape \(1, 2, 7, 5\); it must be"),
    "integers": (lambda w: w.int(), TypeError, "is torch.int32; it must be"),
    "a list": (lambda w: w.tolist(), TypeError, "is a list; it must be"),
    "a device": (lambda w: w.to("meta"), ValueError, "is on meta but the input is on cpu"),
}


@pytest.mark.parametrize(("spoil", "error", "match"), WRONG_CONVOLUTIONS.values(), ids=WRONG_CONVOLUTIONS)
def test_convolutions_that_do_not_fit_are_refused(spoil, error, match):
    layer, x = RegionNormL(16), torch.randn(2, 16, 5, 3)
    weight, plain = layer.sa.conv1.weight.detach(), (torch.ones(1, 1, 7, 7), None)
    with pytest.raises(error, match=f"region_norm_l: importance .*{match}"):
        region_norm_l(x, spoil(weight), plain, plain)
    with pytest.raises(
        TypeError, match=r"region_norm_l: gamma is a Tensor; it must be a tuple, \(weight, bias"
    ):
        region_norm_l(x, weight, plain[0], plain)
    with pytest.raises(
        ValueError, match=r"the bias of beta has shape \(3,\); for this input it must be \(1,\)"
    ):
        region_norm_l(x, weight, plain, (plain[0], torch.ones(3)))
