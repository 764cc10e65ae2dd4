"""What row norms remember of a call: nothing that tells one call from another may be missing in it."""

import itertools

import pytest
import torch

import normzoo
from normzoo import functional

pytest.importorskip("triton")

from normzoo_bench import host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def results(backend, x, residual, weight, bias, eps, wanted):
    leaves = [
        t.detach().requires_grad_(want) for t, want in zip((x, residual, weight, bias), wanted, strict=True)
    ]
    with normzoo.backend(backend):
        y, total = functional.add_layer_norm(leaves[0], leaves[1], x.shape[-1], *leaves[2:], eps)
        needed = [t for t in leaves if t.requires_grad]
        loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)).sum() + total.sum()
        return [y, total, *torch.autograd.grad(loss, needed)]


def test_calls_that_differ_in_one_thing():
    """In turns, so that each comes after one that is almost the same."""
    x, r = torch.randn(2, 3, 4, 12, device=DEVICE)[0], torch.randn(3, 4, 12, device=DEVICE)
    w, b = torch.rand(12, device=DEVICE), torch.randn(12, device=DEVICE)
    padded = torch.randn(3, 4, 16, device=DEVICE)[..., :12]
    all_four = (True,) * 4
    base = (x, r, w, b, 1e-5, all_four)
    changed = {
        0: [x.transpose(0, 1).contiguous().transpose(0, 1), padded, x.bfloat16(), x[:2, :, :]],
        1: [r.double().half(), padded, r.transpose(0, 1).contiguous().transpose(0, 1)],
        2: [w.bfloat16()],
        4: [0.5],
        5: [
            (True, False, True, True),
            (True, True, False, True),
            (True, True, True, False),
            (False, True, False, True),
        ],
    }
    calls = [base]
    for place, others in changed.items():
        for other in others:
            call = (*base[:place], other, *base[place + 1 :])
            calls.append((*call[:1], call[1][: call[0].shape[0]], *call[2:]))
    for _, call in itertools.product(range(2), calls):
        for ours, expected in zip(results("triton", *call), results("reference", *call), strict=True):
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
            loose = torch.finfo(torch.bfloat16).eps * 4 if call[0].dtype != torch.float32 else 1e-4
            loose = max(loose, 4e-3) if call[1].dtype == torch.float16 else loose
            torch.testing.assert_close(ours, expected, rtol=loose, atol=loose)


def test_rows_that_a_hook_brings_back_in_another_order():
    """Without their statistics, which stay in the order in which they were saved."""
    x = torch.randn(4, 3, 16, device=DEVICE).transpose(0, 1)
    grads = []
    for back in (lambda t: t, lambda t: t.contiguous() if t.shape[-1] == 16 else t):
        leaf = x.detach().requires_grad_()
        with normzoo.backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
            y = functional.layer_norm(leaf, 16)
        grads.append(torch.autograd.grad(y.square().sin().sum(), leaf)[0])
    torch.testing.assert_close(*grads)


def test_padding_is_touched_where_the_storage_has_it():
    """Of two calls of one shape and stride the storage of the second ends with the last entry."""
    for spare, width in ((3, 16), (0, 13)):
        x = torch.as_strided(torch.randn(2 * 16 - 3 + spare), (2, 13), (16, 1)).requires_grad_()
        dy = torch.ones(2, 13)
        launched = host.started(lambda x=x, dy=dy: torch.autograd.grad(functional.rms_norm(x, 13), x, dy))
        forward, backward = (one.meta for one in launched)
        assert (forward["WIDTH"], forward["Y_STRIDE"]) == (width, 16)
        assert (backward["X_WIDTH"], backward["DY_WIDTH"], backward["DX_STRIDE"]) == (width, 13, 16)
