"""The forms that only a measurement can choose: none changes what is computed, and none stays chosen."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_good

pytest.importorskip("triton")

from channel_checks import DEVICE, GRADIENTS, mask_for, randn

import normzoo
from normzoo_kernels import _channel_forms, _channel_layout, _choices, _forms, _launch, channels, rows


@pytest.fixture
def started(monkeypatch):
    """What is launched: (kernel, constants)."""
    found = []
    start = _launch.launch

    def noting(kernel, *args, **meta):
        found.append((kernel.__name__, meta))
        return start(kernel, *args, **meta)

    for module in (channels, rows):
        monkeypatch.setattr(module, "launch", noting)
    return found


def test_a_choice_ends_with_its_block():
    before = {name: _choices.chosen(name) for name in _choices.CHOICES}
    assert before == {name: choice.default for name, choice in _choices.CHOICES.items()}
    with _choices.trying(on_chip=True, row_group=8), _choices.trying(row_group=16):
        assert _choices.chosen("on_chip") is True and _choices.chosen("row_group") == 16
    with pytest.raises(KeyError), _choices.trying(reversed_map=True):
        raise KeyError
    assert before == {name: _choices.chosen(name) for name in _choices.CHOICES}


def test_what_is_no_choice_is_refused():
    with pytest.raises(ValueError, match="no choice 'on_ship', only on_chip, "), _choices.trying(on_ship=True):
        pass
    with pytest.raises(ValueError, match="row_group is 5; it must be one of"), _choices.trying(row_group=5):
        pass


def test_plans_are_made_anew(started):
    """What is remembered of a call was planned under a choice."""
    x = randn(4, 6, 8, 8)
    parameters = torch.randn(3, 6, device=DEVICE)

    def reversed_map():
        channels.apply(x, None, *parameters)
        return started[-1][1].get("REVERSED", False)

    assert not reversed_map()
    with _choices.trying(reversed_map=True):
        assert reversed_map()
    assert not reversed_map()


SHAPES = {
    "planes": lambda: randn(5, 6, 8, 20),
    "channels last": lambda: randn(5, 24, 8, 20, last=True),
    "chunks": lambda: randn(2, 3, 6000),
    "flat": lambda: randn(7, 160, 7, 7),
    "half": lambda: randn(5, 24, 7, 5, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "samples"])
@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_a_reversed_map_writes_the_same(make, per_sample, masked, started, monkeypatch):
    """Bit by bit, with several parts and tiles in a program."""
    monkeypatch.setattr(_channel_forms, "_READERS", 1)
    x = make()
    dy, mask = torch.randn_like(x), mask_for(x) if masked else None
    size = (2,) * masked + (x.shape[:2] if per_sample else x.shape[1:2])
    pivot, scale, slope, offset = torch.randn(4, *size, device=DEVICE)
    found = []
    for back in (False, True):
        with _choices.trying(reversed_map=back):
            y = channels.apply(x, mask, pivot, scale, offset)
            found.append((y, channels.dx(dy, x, mask, pivot, scale, slope, offset)))
        assert all(meta.get("REVERSED", False) == back for _, meta in started[-2:])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS)
def test_a_reversed_map_of_other_gradients(make):
    x = randn(3, 5, 5, 3)
    dy = make(x)
    pivot, scale, slope, offset = torch.randn(4, 5, device=DEVICE)
    expected = channels.dx(dy, x, None, pivot, scale, slope, offset)
    with _choices.trying(reversed_map=True):
        assert torch.equal(channels.dx(dy, x, None, pivot, scale, slope, offset), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="programs run one after another only where they are interpreted")
@pytest.mark.parametrize("size", [(8, 512), (160, 7, 7)], ids=["planes", "flat"])
def test_a_reversed_map_begins_at_the_end(size, monkeypatch):
    """Begun there, it may write over what it has read, in each of several tiles of a program."""
    monkeypatch.setattr(_channel_forms, "_READERS", 1)
    samples = 6
    entries = samples * torch.Size(size).numel()
    shift = entries // samples  # one sample
    parameters = torch.randn(3, size[0])
    right = []
    for back in (False, True):
        memory = torch.randn(entries + shift)
        x, out = memory[:entries].view(samples, *size), memory[shift:].view(samples, *size)
        expected = channels.apply(x.clone(), None, *parameters)
        view = _channel_layout.view_of(x)
        with _choices.trying(reversed_map=back):
            pivot, scale, offset = parameters
            channels.write_map(out, x, view, None, view, None, pivot, None, scale, offset)
        right.append(torch.equal(out, expected))
    assert right == [False, True]


def gradients(norm, x, dy, parameters):
    inputs = [t.detach().requires_grad_() for t in (x, *parameters)]
    return torch.autograd.grad(norm(*inputs), inputs, dy)


NORMS = {
    "layer": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    "rms": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "group"),
    [("layer", torch.float32, 16), ("layer", torch.bfloat16, 16), ("rms", torch.bfloat16, 8)],
    ids=str,
)
def test_rows_in_larger_groups(kind, dtype, group, started, monkeypatch):
    """Rows of which a program holds none; a program has more than one group, and the last one is not full."""
    monkeypatch.setattr(_forms, "sm_count", lambda device: 1)
    width = 8200
    x, dy = (torch.randn(group + 3, width, device=DEVICE).to(dtype) for _ in range(2))
    parameters = torch.randn(2 if kind == "layer" else 1, width, device=DEVICE).to(dtype)
    function = {"layer": normzoo.functional.layer_norm, "rms": normzoo.functional.rms_norm}[kind]

    def by_kernel(x, *parameters):
        with normzoo.backend("triton"):
            return function(x, (width,), *parameters, eps=1e-5)

    with _choices.trying(row_group=group):
        ours = gradients(by_kernel, x, dy, parameters)
    kernels = [(name, meta) for name, meta in started if name.startswith("norm_bwd")]
    rows_of_a_step = group if dtype.itemsize == 2 else 4
    assert all(name == "norm_bwd_wide" and meta["R"] == rows_of_a_step for name, meta in kernels) and kernels
    plain, exact = (
        gradients(NORMS[kind], *(t.to(kind_of) for t in (x, dy, parameters)))
        for kind_of in (torch.float32, torch.float64)
    )
    for name, found, p, e in zip(("dx", "dw", "db"), ours, plain, exact, strict=False):
        assert_as_good(name, found, p.to(found.dtype), e, hard=True)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kind", NORMS)
def test_how_many_rows_a_group_has(kind, itemsize):
    """By default as many as ever, and never fewer bytes than that."""
    device = torch.device("cpu")
    for width, standing in ((16384, 4), (32768, 2), (65536, 1), (131072, 1)):
        found = []
        for group in (4, 8, 16):
            with _choices.trying(row_group=group):
                form = _forms.backward_form(kind, width, itemsize, False, device, 2, 1)
            found.append(form.rows)
        usual = max(1, standing * 2 // itemsize)
        if width == 16384 and itemsize == 2 and kind == "rms":
            assert found[0] == 1  # which stays on chip
        else:
            assert found[0] == usual
        most = 16 if itemsize == 2 else 8
        assert found[1:] == [max(1, min(group, most) * 32768 // (width * itemsize)) for group in (8, 16)]
