"""The one tolerance rule (docs/numerics.md): no worse than twice the error of torch's own operator."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, *, hard: bool = False) -> None:
    """error(ours) <= 2 error(torch) + 2 eps of the largest entry, errors against float64; 3 for hard ranges."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype}, torch gives {torchs.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.detach().double().cpu()
    error, allowed = (_error(t, exact) for t in (ours, torchs))
    bound = (3 if hard else 2) * allowed + 2 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e}, torch's is {allowed:.3e}, allowed {bound:.3e}"


def alike(expected: Tensor) -> dict[str, float]:
    """For torch.testing.assert_close of two float32 bodies, each within 2 eps of the largest entry; what torch
    takes otherwise asks more of entries that are differences of larger ones."""
    if expected.dtype != torch.float32 or not expected.numel():
        return {}
    largest = expected.detach().abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    return {"rtol": 1.3e-6, "atol": max(1e-5, 4 * torch.finfo(torch.float32).eps * largest)}


def _error(t: Tensor, exact: Tensor) -> float:
    # Comparing with NaN is False, so a hole in the output fails too.
    return (t.detach().double().cpu() - exact).abs().max().item()
