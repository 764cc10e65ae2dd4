"""Losses without labels: entropy, and the reconstruction of pairwise class correlation."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from normzoo import adapt
from normzoo.adapt import core_loss, entropy_loss


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]])
    wanted = (1.5 * math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.05)) / 2
    torch.testing.assert_close(entropy_loss(p.log() + 7), torch.tensor(wanted))
    pixels = p.log()[:, :, None, None].expand(2, 3, 4, 5)
    torch.testing.assert_close(entropy_loss(pixels), torch.tensor(wanted))


def core_by_hand(logits):
    p = logits.movedim(1, -1).flatten(0, -2).softmax(1)
    m = p.T @ p
    m = m / m.sum(1, keepdim=True)
    return (m.sum() - m.trace()) / len(m)


def test_core_by_hand():
    # P = [[.8, .2], [.4, .6]], M = [[.8, .4], [.4, .4]], rows over sums 1.2 and .8.
    logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
    torch.testing.assert_close(core_loss(logits), torch.tensor((0.4 / 1.2 + 0.4 / 0.8) / 2))
    for shape in ((7, 5), (2, 4, 3), (2, 3, 4, 5)):
        logits = torch.randn(shape, dtype=torch.double) * 3
        torch.testing.assert_close(core_loss(logits), core_by_hand(logits))


@pytest.mark.parametrize("loss, top", [(entropy_loss, math.log(5)), (core_loss, 0.8)])
def test_bounds_of_the_losses(loss, top):
    for scale in (0.1, 1, 10, 1000):
        value = loss(torch.randn(16, 5) * scale)
        assert -1e-6 <= value <= top + 1e-6
    torch.testing.assert_close(loss(torch.zeros(4, 5)), torch.tensor(top))
    assert loss(torch.eye(5) * 1e4) == 0
    one_class = torch.zeros(8, 5).index_fill(1, torch.tensor([2]), 1e3)
    # The entropy rewards a collapse into one class, the correlation does not.
    torch.testing.assert_close(loss(one_class), torch.tensor(0.0 if loss is entropy_loss else 0.8))


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_gradients_of_the_losses(loss):
    for shape in ((6, 4), (2, 3, 2, 2)):
        assert gradcheck(loss, torch.randn(shape, dtype=torch.double, requires_grad=True))
    for scale in (1e3, 1e30):
        logits = (torch.randn(8, 5) * scale).requires_grad_()
        loss(logits).backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_a_class_that_is_ruled_out(loss):
    logits = torch.randn(6, 4, dtype=torch.double)
    with_none = torch.cat([logits, torch.full((6, 1), -math.inf)], 1).requires_grad_()
    logits.requires_grad_()
    value = loss(with_none)
    # The mean over classes has one more, which is confused with all others.
    wanted = loss(logits) if loss is entropy_loss else (4 * loss(logits) + 1) / 5
    torch.testing.assert_close(value, wanted)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(with_none.grad[:, :4], logits.grad)
    assert torch.equal(with_none.grad[:, 4], torch.zeros(6))


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_low_precision_of_the_losses(loss):
    logits = torch.randn(16, 5).bfloat16()
    wanted = loss(logits.float())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits)
    assert value.dtype == torch.float32 and torch.equal(value, wanted)


def test_core_of_one_sample_tells_nothing():
    logits = torch.randn(1, 4, requires_grad=True)
    value = core_loss(logits)
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(0.75))
    torch.testing.assert_close(logits.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0), (0, 4, 3, 3)])
def test_an_empty_batch_has_no_loss(loss, shape):
    logits = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    value = loss(logits)
    value.backward()
    assert value.isnan() and value.shape == () and value.dtype == torch.float32
    assert logits.grad.shape == shape


@pytest.mark.parametrize("name", ["entropy_loss", "core_loss"])
def test_what_is_no_logits(name):
    loss = getattr(adapt, name)
    for bad in (torch.zeros(3), torch.zeros(3, 1)):
        with pytest.raises(
            ValueError, match=rf"adapt.{name}: logits has shape \(3.*must be \(N, classes, \*\)"
        ):
            loss(bad)
    with pytest.raises(TypeError, match=rf"adapt.{name}: logits is torch.int64; it must be a floating-point"):
        loss(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(TypeError, match=rf"adapt.{name}: logits is of type list"):
        loss([[0.0, 1.0]])
