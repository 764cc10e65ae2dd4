"""What users did to PowerNorm and UnifiedNorm that once went wrong."""

import gc
import weakref

import pytest
import torch
from torch import nn
from training import same, tensors

import normzoo
from normzoo import BatchNorm1d, PowerNorm, UnifiedNorm, functional

BOTH = pytest.mark.parametrize("kind", [PowerNorm, UnifiedNorm])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@BOTH
def test_a_layer_that_keeps_its_output_is_collected(kind):
    layer = kind(4)
    layer.last = layer(torch.randn(3, 4, requires_grad=True))
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


@BOTH
def test_counters_are_real_after_a_checkpoint_is_assigned(kind):
    with torch.device("meta"):
        layers = [kind(4), BatchNorm1d(4, nonfinite="skip")]
    for layer in layers:
        layer.load_state_dict(type(layer)(4).state_dict(), assign=True)
        layer(torch.full((3, 4), torch.nan))
        assert layer.cpu().batches_skipped == 1
    assert layers[0].gradients_skipped == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_is_as_wide_as_the_layer_and_float32_at_least(kind, dtype):
    layer, wide = kind(4, dtype=dtype), torch.promote_types(dtype, torch.float32)
    assert layer.weight.dtype == dtype and layer.ema_gz.dtype == wide
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {wide}
    layer.type(torch.float32)
    assert layer.iters.dtype == torch.long


def test_wide_state_keeps_its_digits_beside_a_narrow_input():
    layer = PowerNorm(2, warmup_iters=0, group_num=None).double()
    layer.running_phi.fill_(1 + 1e-10)
    y = layer(torch.ones(5, 2))
    assert y.dtype == torch.float32
    torch.testing.assert_close(layer.running_phi - 1, torch.full((2,), 9e-11).double(), rtol=1e-5, atol=0)


@BACKENDS
@pytest.mark.parametrize("lying", [lambda p: p.repeat_interleave(2)[::2], lambda p: p[:1].expand_as(p)])
def test_statistics_lie_in_any_way(lying, backend):
    x, p = torch.randn(7, 6), torch.rand(6) + 0.5
    stored = lying(p)
    for function, options in ((functional.power_norm, {"group_num": 3}), (functional.unified_norm, {})):
        with normzoo.backend(backend):
            found = function(x, stored, lying(p), lying(p), **options)
        with normzoo.backend("reference"):
            torch.testing.assert_close(found, function(x, stored.clone(), *[lying(p).clone()] * 2, **options))


@BACKENDS
@BOTH
def test_a_checkpoint_lies_in_any_way(kind, backend):
    plain, x = kind(6), torch.randn(5, 7, 6)
    for i in range(6):
        plain((i + 1) * x[i % 5]).square().sum().backward()
    plain.iters.fill_(20000)
    saved = {name: t.clone() for name, t in plain.state_dict().items()}
    saved |= {name: t.repeat_interleave(2)[::2] for name, t in saved.items() if t.dim() == 1}
    saved |= {name: t.T.contiguous().T for name, t in saved.items() if t.dim() == 2}
    other = kind(6)
    other.load_state_dict(saved, assign=True)
    with normzoo.backend(backend):
        for layer in (plain, other):
            layer.zero_grad()
            for part in x:
                layer(part).pow(3).sum().backward()
    same(tensors(other), tensors(plain))


@BACKENDS
@BOTH
def test_long_windows_and_wide_images(kind, backend):
    options = {"window_size": 64} if kind is UnifiedNorm else {}
    layer, x = kind(40, warmup_iters=0, channel_dim=1, **options), torch.randn(2, 40, 3, 3)
    other = kind(40, warmup_iters=0, channel_dim=1, **options)
    with normzoo.backend(backend):
        layer(x).pow(3).sum().backward()
    other(x).pow(3).sum().backward()
    for name, t in tensors(other).items():
        torch.testing.assert_close(tensors(layer)[name], t)


def test_windows_that_no_kernel_holds():
    layer, x = UnifiedNorm(2, window_size=(2, 257)), torch.randn(3, 2)
    with normzoo.backend("triton"), pytest.raises(RuntimeError, match=r"windows of up to 256 steps, .* 257"):
        layer(x)
    assert layer.iters == 0


def test_padding_alone_is_not_magnified_by_the_functions():
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(functional.unified_norm(x, pad_mask=mask), x / (1 + 1e-5) ** 0.5)


@BOTH
def test_parameters_are_checked_at_every_call(kind):
    layer, x = kind(4), torch.randn(3, 4)
    layer.bias = nn.Parameter(torch.zeros(1))
    before = tensors(layer)
    with pytest.raises(ValueError, match=f"{kind.__name__}: bias has shape \\(1,\\)"):
        layer(x)
    same(tensors(layer), before)


@BOTH
def test_more_refusals(kind):
    name = kind.__name__
    for option in ("affine", "bias"):
        with pytest.raises(TypeError, match=f"{name}: {option} is 1; it must be True or False"):
            kind(4, **{option: 1})
    ragged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for x in (ragged, torch.randn(3, 4).to_sparse()):
        with pytest.raises(TypeError, match=f"{name}: the input is nested or sparse"):
            kind(4)(x)
    with pytest.raises(ValueError, match=r"pad_mask has shape \(2, 3\) .* pad_mask.T fits"):
        kind(4)(torch.randn(3, 2, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert "bias=False" in repr(kind(4, bias=False)) and "bias" not in repr(kind(4, affine=False))
