"""PowerNorm and UnifiedNorm on the kernels of the running engine: on a GPU, else in the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from running_checks import DEVICE, check, prepared, randn, step, train, values

from normzoo import PowerNorm, UnifiedNorm
from normzoo_kernels import _running_forms
from normzoo_kernels._launch import launches

Power, Unified = partial(PowerNorm, warmup_iters=1), partial(UnifiedNorm, window_size=(3, 2), warmup_iters=2)
numpy_warns = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.fixture(autouse=True)
def nan_filled():
    """Outputs and workspaces start as NaN, so that an entry no kernel writes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batches(number: int, shape: tuple[int, ...], channel: int = -1, dtype=torch.float32, lay_out=None, holes=0):
    """(x, dy, mask) of so many steps, each of its own size."""
    found = []
    for i in range(number):
        x = values(*shape, channel=channel).detach() * (1 + i / 3)
        x, dy = x.to(dtype), randn(*shape, dtype=dtype)
        if lay_out is not None:
            x, dy = lay_out(x), lay_out(dy)
        rest = list(shape)
        rest.pop(channel)
        mask = torch.rand(rest[::-1], device=DEVICE).permute(*range(len(rest))[::-1]) < holes if holes else None
        found.append((x.requires_grad_(), dy, mask))
    return [*map(list, zip(*found, strict=True))]


GROUPS = {
    "no groups": (None, 24),
    "one group": (1, 24),
    "groups": (4, 24),
    "groups of 3": (7, 21),
    "one channel a group": (12, 12),
    "wide": (1, 1300),
    "wide groups": (2, 1536),
    "wide, no groups": (None, 1300),
}
SMALL = {name: GROUPS[name] for name in ("no groups", "groups", "groups of 3")}


def per(name: str, table: dict):
    return pytest.mark.parametrize(name, table.values(), ids=table)


@per("groups", GROUPS)
def test_power_norm_of_tokens(groups):
    group_num, width = groups
    steps, tokens = (1, 7) if width > 1000 else (3, 23)
    layer = prepared(partial(Power, width, group_num=group_num, warmup_iters=steps - 1))
    train(layer, *batches(steps, (tokens, 2, width), holes=0.3))
    assert layer.iters == steps and not layer.batches_skipped and not layer.gradients_skipped


@per("groups", SMALL)
def test_the_backward_pass_of_the_paper(groups):
    group_num, width = groups
    train(prepared(partial(Power, width, group_num=group_num, backward="paper")), *batches(2, (23, width)))


@pytest.mark.parametrize("size", [(7, 7), (8, 4), (1, 1), (31, 37)], ids=str)
@per("groups", SMALL)
def test_power_norm_of_images(groups, size):
    group_num, width = groups
    steps = 2 if size == (7, 7) else 1
    layer = prepared(partial(Power, width, warmup_iters=steps - 1, group_num=group_num, channel_dim=1))
    samples = 2 if size == (31, 37) else 5
    train(layer, *batches(steps, (samples, width, *size), channel=1, holes=0.3))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@per("shape", {"tokens": (37, 24), "images": (3, 24, 7, 7)})
@per(
    "make",
    {"no groups": partial(Power, group_num=None), "groups": partial(Power, group_num=8), "unified": Unified},
)
def test_half_precision(make, shape, dtype):
    """Values whose squares are no float16."""
    channel = 1 if len(shape) == 4 else -1
    layer = prepared(partial(make, 24, channel_dim=channel), dtype)
    xs, *rest = batches(1, shape, channel, dtype)
    with torch.no_grad():
        xs[0].mul_(300)
    train(layer, xs, *rest)
    assert not layer.batches_skipped and layer.ema_gz.dtype == torch.float32


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels sliced": lambda t: torch.cat((t, t), 1)[:, 3 : t.shape[1] + 3],
    "turned": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "samples last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels_last, cut": lambda t: torch.cat((t, t), 3).contiguous(memory_format=torch.channels_last)[..., :5],
}


@per("lay_out", LAYOUTS)
@per("make", {"power": partial(Power, 6, warmup_iters=0, group_num=2), "unified": partial(Unified, 6)})
def test_layouts_of_images(make, lay_out):
    batch = batches(1, (4, 6, 3, 5), 1, lay_out=lay_out, holes=0.3)
    for found, x in zip(train(prepared(partial(make, channel_dim=1)), *batch), batch[0], strict=True):
        dense = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
        assert found["y"].stride() == found["dx"].stride() == dense.stride()


TOKENS = {
    "time first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels sliced": lambda t: torch.cat((t, t), 2)[..., 3 : t.shape[2] + 3],
    "every second token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@per("lay_out", TOKENS)
def test_layouts_of_tokens(lay_out):
    train(
        prepared(partial(Power, 12, warmup_iters=0, group_num=4)),
        *batches(1, (5, 4, 12), lay_out=lay_out, holes=0.3),
    )


def _expanded(*shape: int):
    return lambda x: randn(*shape).expand_as(x)


UPSTREAM = {
    "one number": _expanded(),
    "one for a channel": _expanded(6, 1, 1),
    "one for a position": _expanded(3, 5),
    "one for a sample": _expanded(4, 1, 1, 1),
    "one for all samples": _expanded(6, 3, 5),
    "in another layout": lambda x: randn(*x.shape).contiguous(memory_format=torch.channels_last),
    "in every second place": lambda x: randn(*x.shape, 2)[..., 0],
    "with samples last": lambda x: randn(6, 3, 5, 4).permute(3, 0, 1, 2),
}


@per("upstream", UPSTREAM)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
def test_upstream_gradients(upstream, last):
    x = values(4, 6, 3, 5, channel=1).detach()
    make = Unified
    if last:
        make = partial(Power, warmup_iters=0, group_num=2)
        x = x.contiguous(memory_format=torch.channels_last)
    check(prepared(partial(make, 6, channel_dim=1)), x.requires_grad_(), upstream(x))


WITHOUT = {
    "affine": {"affine": False},
    "bias": {"bias": False},
    "x": {},
    "weight": {},
    "all parameters": {},
}


@pytest.mark.parametrize("without", WITHOUT)
@per("make", {"power": partial(Power, 6, nonfinite="propagate"), "unified": partial(Unified, 6)})
def test_what_has_no_gradient(make, without):
    layer = prepared(partial(make, **WITHOUT[without]))
    for name, p in layer.named_parameters():
        p.requires_grad_(without not in ("all parameters", name))
    xs, dys, masks = batches(1, (40, 6))
    if without == "x":
        xs = [x.detach() for x in xs]
    found = train(layer, xs, dys, masks)
    assert ("dx" in found[0], "dweight" in found[0], "dbias" in found[0]) == {
        "affine": (True, False, False),
        "bias": (True, True, False),
        "x": (False, True, True),
        "weight": (True, False, True),
        "all parameters": (True, False, False),
    }[without]


WINDOWS = {
    "unequal": Unified,
    "a long warm-up": partial(Unified, window_size=2, warmup_iters=5),
    "of one": partial(Unified, window_size=1),
}


@per("make", WINDOWS)
def test_unified_norm_past_the_edges(make):
    layer = prepared(partial(make, 6))
    train(layer, *batches(6, (19, 2, 6), holes=0.3))
    assert layer.iters == 6


@pytest.mark.parametrize("outlier", [None, 3, 1200])
def test_wide_windows(outlier):
    """More channels than the rule takes at a time, any of which can be the outlier."""
    layer = prepared(partial(Unified, 1300, outlier_filtration=True))
    scale = torch.linspace(0.5, 2, 1300, device=DEVICE)
    layer.buffer_x2.uniform_(0.9, 1.1).mul_(scale.square())
    layer.buffer_gz.normal_()
    layer.iters.fill_(4)
    xs, *rest = batches(1, (16, 1300))
    with torch.no_grad():
        xs[0].mul_(scale / xs[0].square().mean(0).sqrt())
        if outlier is not None:
            xs[0][:, outlier] *= 40
    train(layer, xs, *rest)
    assert layer.iters == 5 and layer.skip_counter == (outlier is not None)


def test_outliers():
    """Channels differ, so that ordinary steps pass; a factor of 40 does not, from the last step of the
    warm-up on, nor what a dead unit leaves."""
    layer = prepared(partial(Unified, 20, window_size=4, warmup_iters=5, outlier_filtration=True))
    xs, dys, masks = batches(9, (30, 20))
    with torch.no_grad():
        for i, factor in enumerate((1, 1, 1, 1, 40, 1, 1, 0, 1)):
            xs[i].div_(1 + i / 3).mul_(factor)
    train(layer, xs, dys, masks)
    assert layer.iters == 9 and layer.skip_counter == 2


def test_dead_units_are_left_out_of_the_geometric_mean():
    layer = prepared(partial(Unified, 6))
    xs, dys, masks = batches(6, (30, 6))
    with torch.no_grad():
        xs[3][:, 2] = 0
        xs[3][:, 1] *= 1e-4
        for x in xs:
            x[:, 4] = 0
    found = train(layer, xs, dys, masks)
    assert found[4]["y"].abs().max() < 10


@pytest.mark.parametrize("warmup", [0, 1002])
def test_compensation(warmup):
    """From step 1001 and after the warm-up, within a factor of 5."""
    layer = prepared(partial(Unified, 6, window_size=3, warmup_iters=warmup))
    for b in (layer.buffer_x2, layer.buffer_gz):
        b.uniform_(0.5, 2)
    layer.iters.fill_(999)
    for batch in zip(*batches(4, (30, 6), holes=0.2), strict=True):
        layer.running_var[:2] = torch.tensor([1e3, 1e-3])
        check(layer, *batch)
    assert layer.iters == 1003


@numpy_warns
def test_a_window_of_one_number_has_no_spread():
    layer = prepared(partial(UnifiedNorm, 1, 1, 0, outlier_filtration=True))
    xs, dys, masks = batches(2, (30, 1))
    train(layer, [x.detach().abs().requires_grad_() for x in xs], [dy.abs() for dy in dys], masks)
    assert layer.iters == 2 and not layer.skip_counter


SHAPES = {"tokens": (-1, (1100, 20)), "samples": (1, (140, 20, 7)), "planes": (1, (1, 3, 97, 131))}


@pytest.mark.parametrize(("name", "programs"), [*((name, 132) for name in SHAPES), ("planes", 0)])
def test_parts(monkeypatch, name, programs):
    """The last part has fewer tiles than the others."""
    monkeypatch.setattr(_running_forms, "sm_count", lambda device: programs)
    channel, shape = SHAPES[name]
    for groups, warmup in ((None, 1), (1, 0)):
        before = launches["merge_rows"]
        layer = prepared(
            partial(PowerNorm, shape[channel], 1e-3, group_num=groups, warmup_iters=warmup, channel_dim=channel)
        )
        train(layer, *batches(1, shape, channel, holes=0.3))
        assert launches["merge_rows"] - before == 2 * (programs > 0)


@pytest.mark.parametrize("channel", [-1, 1], ids=["tokens", "images"])
@per(
    "make",
    {
        "no groups": partial(Power, 6, group_num=None),
        "groups": partial(Power, 6, group_num=2),
        "unified": partial(Unified, 6),
    },
)
def test_eval_mode(make, channel):
    layer = prepared(partial(make, channel_dim=channel)).eval()
    x = values(*((31, 6) if channel == -1 else (3, 6, 7, 5)), channel=channel)
    with torch.no_grad():
        ours, plain = (step(layer, name, x)["y"] for name in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)
    assert ours.stride() == x.stride()
