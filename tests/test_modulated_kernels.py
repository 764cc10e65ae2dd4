"""The kernels of row norms with a scale and a shift of samples or tokens, against the reference."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from modulated_checks import (
    DEVICE,
    DTYPES,
    KINDS,
    LAYOUTS,
    OWNERS,
    beside,
    beside_once,
    check,
    norm,
    results,
    rows,
)

import normzoo
from normzoo_kernels import _forms, _launch
from normzoo_kernels import modulated as kernels
from normzoo_kernels._modulated_forms import _share, forward_runs


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients(name, owners):
    for dtype in DTYPES if owners in ("ss", "tt") else DTYPES[:1]:
        x = rows(2, 3, 33, dtype=dtype)
        check(name, x, *beside(x, owners))


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.5])
def test_offset_of_the_scale(offset):
    x = rows(2, 3, 40)
    for owners in ("ss", "tt"):
        check("rms", x, *beside(x, owners), offset=offset)


@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 2, 128, 257, 1025, 8192])
def test_block_edges(name, width):
    x = rows(2, 1 if width > 8000 else 2, width, dtype=torch.float16)
    # In the narrowest rows the gradient is the difference of two equal numbers.
    check(name, x, *beside(x, "ss" if width > 1000 else "st"), hard=width < 3)


@pytest.mark.parametrize(
    ("dtype", "of_scale", "of_shift"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("owners", ["st", "ts"])
def test_parameters_of_another_dtype(owners, dtype, of_scale, of_shift):
    x = rows(2, 3, 51, dtype=dtype)
    scale, shift = beside(x, owners, torch.float32)
    check("layer", x, scale.to(of_scale), shift.to(of_shift))


per_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@per_layout
def test_layouts(make):
    """Of all that has one, each beside others that lie in another way."""
    x = make(51)
    # Chunks of what one linear layer makes.
    shift, scale, *_ = rows(x.shape[0], 6 * 51).chunk(6, dim=1)
    check("layer", x, scale, shift)
    x = rows(*x.shape)
    check("layer", x, make(51), shift, dy=rows(*x.shape[:-1], 60)[..., :51])
    check("root", x, rows(*x.shape[:-1], 60)[..., 9:], make(51), dy=make(51))


@pytest.mark.parametrize("owners", ["ss", "tt"])
@pytest.mark.parametrize(
    "layout", ["tokens before samples", "first token dropped", "padded rows", "samples inside"]
)
def test_fakes_know_the_layout(layout, owners):
    x = LAYOUTS[layout](51)
    scale, shift = beside(x, owners)
    ops = torch.ops.normzoo
    args = (x, scale, shift, "layer", 1e-5, 1.0, 51, True)
    torch.library.opcheck(ops.modulated_norm_fwd.default, args, test_utils="test_faketensor")
    _, stats = kernels.forward(*args)
    shift = shift if shift.dim() < x.dim() else None
    args = (torch.randn_like(x), x, stats, scale, shift, "layer", 1.0, 51, [True, True, shift is not None])
    torch.library.opcheck(ops.modulated_norm_bwd.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("owners", ["ss", "tt", "ts"])
def test_padding_is_not_read_as_data(owners):
    def padded():
        wide = torch.full((3, 4, 52), float("nan"), device=DEVICE)
        return wide[..., :51].copy_(torch.randn(3, 4, 51))

    x = padded()
    found = [padded() if owner == "t" else beside(x, owner)[0] for owner in owners]
    check("layer", x, *found, dy=padded())
    with normzoo.backend("triton"):
        assert norm("layer", x, *found).stride() == x.stride()


@pytest.mark.parametrize("owners", ["ss", "tt"])
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_expanded_upstream_gradient(reduce, owners):
    x = rows(3, 4, 20)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *beside_once(x, owners))]
        with normzoo.backend(backend):
            reduce(norm("layer", *leaves)).backward()
        found.append([t.grad for t in leaves])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


SHARED = [
    # programs, samples, tokens, rows of a tile
    (1, 1, 1, 1),
    (7, 1, 5, 1),
    (8, 3, 5, 2),
    (5, 6, 2, 1),
    (4, 2, 31, 4),
    (16, 2, 7, 1),
    (2, 1, 37, 2),
]


@pytest.mark.parametrize(("programs", "samples", "tokens", "at_once"), SHARED)
def test_runs_share_the_tokens_of_a_sample(monkeypatch, programs, samples, tokens, at_once):
    """Runs of unlike length, samples that are more or fewer than the programs, tiles that end in the midst."""
    monkeypatch.setattr(_forms, "sm_count", lambda device: programs)
    monkeypatch.setattr(_forms, "_tile", lambda *args, **kwargs: {"K": 1, "R": at_once, "C": 32})
    x = rows(samples, tokens, 24)
    cut = _share(programs, samples, -(-tokens // at_once)) > 1
    assert check("layer", x, *beside(x, "ss"))["sum_runs"] == cut
    if tokens == 7:
        assert check("layer", x, *beside(x, "st"))["sum_runs"] == 1
        assert check("layer", x, *beside(x, "ts"))["sum_runs"] == 1
        assert check("layer", x, *beside(x, "tt"))["sum_runs"] == 0


def test_tiles_of_short_samples():
    """A tile has no more rows than a sample, rounded up to a power of two."""
    for tokens, most in ((1, 1), (3, 4), (5, 8), (1000, 64)):
        assert forward_runs(64, 2, False, 40, tokens, torch.device("cpu")).constants["R"] == most


def test_how_many_runs():
    assert _share(132, 32, 64) == 4  # DiT-XL/2: all at a time
    assert _share(132, 1, 1024) == 132
    assert _share(132, 1, 3) == 3
    assert _share(132, 5000, 64) == 1
    for samples, tiles in itertools.product((1, 2, 31, 67, 131, 133, 200, 1000), (1, 2, 7, 64, 1000)):
        each = _share(132, samples, tiles)
        waves = -(-samples * each // 132)
        assert 1 <= each <= tiles
        assert waves <= max(8, -(-samples // 132))
        even = samples * tiles / 132
        assert waves * -(-tiles // each) <= (1.25 if tiles > 7 else 2) * even + 1


@pytest.mark.parametrize("shape", [(20, 2, 24), (2, 700, 24), (900, 24), (20, 1, 24)])
def test_many_rows(shape):
    x = rows(*shape)
    scale, shift = torch.randn(2, shape[0], 24, device=DEVICE).unbind()
    check("rms", x, scale, shift)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)])
@pytest.mark.parametrize("owners", ["ss", "tt", "st"])
def test_no_rows(shape, owners):
    x = torch.empty(shape, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, *beside(x, owners))]
    with normzoo.backend("triton"):
        y = norm("layer", *leaves)
        y.sum().backward()
    assert y.shape == shape
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("owners", ["ss", "tt", "st", "ts"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_wanted(owners, wanted):
    x = rows(3, 4, 40)
    tensors, dy = (x, *beside(x, owners)), torch.randn_like(x)
    expected = results("layer", "reference", tensors, dy)
    leaves = [t.clone().requires_grad_(place in wanted) for place, t in enumerate(tensors)]
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        norm("layer", *leaves).backward(dy)
    for place, key in enumerate(("dx", "dscale", "dshift")):
        if place in wanted:
            torch.testing.assert_close(leaves[place].grad, expected[key])
        else:
            assert leaves[place].grad is None
    # The gradient of a shift of the tokens is dy.
    assert (_launch.launches - before)["modulated_bwd"] == (wanted != (2,) or owners[1] == "s")


def test_without_gradients_nothing_is_kept():
    x = rows(3, 4, 40)
    scale, shift = beside(x, "ss")
    before = _launch.launches.copy()
    with normzoo.backend("triton"):
        y = norm("layer", x, scale, shift)
        with torch.no_grad():
            norm("layer", x.clone().requires_grad_(), scale, shift)
    assert not y.requires_grad
    assert _launch.launches - before == {"modulated_fwd": 2}
