"""Layers with state, and training them in full view."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from tolerance import alike
from torch import Tensor, nn

from normzoo import (
    AdaB2N,
    AlphaBatchNorm,
    BatchChannelNorm,
    BatchNorm2d,
    EvoNormB0,
    EvoNormB1,
    GhostBatchNorm,
    InstanceNorm2d,
    PowerNorm,
    UnifiedNorm,
)

LAYERS: dict[str, partial] = {
    "default": partial(BatchNorm2d, 3),
    "average of all": partial(BatchNorm2d, 3, momentum=None),
    "no affine": partial(BatchNorm2d, 3, affine=False),
    "no bias": partial(BatchNorm2d, 3, bias=False),
    "no running": partial(BatchNorm2d, 3, track_running_stats=False),
    "skip": partial(BatchNorm2d, 3, nonfinite="skip"),
    "skip, average": partial(BatchNorm2d, 3, nonfinite="skip", momentum=None),
    "instance": partial(InstanceNorm2d, 3, affine=True, track_running_stats=True),
    "instance, skip": partial(InstanceNorm2d, 3, track_running_stats=True, nonfinite="skip"),
    "ghost": partial(GhostBatchNorm, 3, 2),
    "ghost, skip": partial(GhostBatchNorm, 3, 2, momentum=None, split="interleaved", nonfinite="skip"),
    "ghost, scaled": partial(GhostBatchNorm, 3, 3, split="ceil", stats="scaled"),
    "alpha, skip": partial(AlphaBatchNorm, 3, pseudo_count=2, nonfinite="skip"),
    "adab2n": partial(AdaB2N, 3, 2),
    "adab2n, skip": partial(AdaB2N, 3, 2, kappa=0.4, nonfinite="skip"),
    "bcn": partial(BatchChannelNorm, 3, 1),
    "bcn, estimate, skip": partial(BatchChannelNorm, 3, 3, estimate=True, update_rate=0.2, nonfinite="skip"),
    "evo b0": partial(EvoNormB0, 3),
    "evo b1, skip": partial(EvoNormB1, 3, nonfinite="skip"),
    "power": partial(PowerNorm, 3, warmup_iters=4, channel_dim=1),
    "unified": partial(UnifiedNorm, 3, (4, 3), 5, outlier_filtration=True, channel_dim=1),
}
"""Constructors of layers for `batches`."""


def _only(kind: Callable[[partial], bool]) -> dict[str, partial]:
    return {name: make for name, make in LAYERS.items() if kind(make)}


def _per(layers: dict[str, partial]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", layers.values(), ids=layers)


def by_mean_square(make: partial) -> bool:
    return make.func in (PowerNorm, UnifiedNorm)


def _refuses_checkpoints(make: partial) -> bool:
    return by_mean_square(make) or "estimate" in make.keywords


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IN_BFLOAT16 = ("default", "alpha, skip", "adab2n", "bcn, estimate, skip", "power", "unified")
"""Layers whose compiled form is tried in half precision too: one for each way to keep statistics."""
REFUSING = _only(_refuses_checkpoints)
_KINDS = ("average of all", "skip", "instance, skip", "ghost, skip", "alpha, skip", "adab2n", "bcn", "evo b0")
OF_EACH_KIND = {name: LAYERS[name] for name in _KINDS} | REFUSING
"""Of the layers one for each way to store statistics."""

per_layer = _per(LAYERS)
per_drop_in = _per(_only(lambda make: hasattr(nn, make.func.__name__)))
per_recomputed = _per(_only(lambda make: not _refuses_checkpoints(make)))
per_kept = _per({name: LAYERS[name] for name in _KINDS})
per_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
per_compiled = pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(make, dtype, id=f"{name}-{kind}")
        for name, make in LAYERS.items()
        for kind, dtype in DTYPES.items()
        if kind == "float32" or name in IN_BFLOAT16
    ],
)


def torchs(make: partial) -> nn.Module:
    """torch's layer for one of LAYERS."""
    options = {k: v for k, v in make.keywords.items() if k != "nonfinite"}
    return getattr(nn, make.func.__name__)(*make.args, **options)


def batches(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(4, 3, 2, 2).mul(2).add(i).to(dtype) for i in range(n)]


def compiled(module: nn.Module) -> Callable:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, also of those that no state dict has."""
    found = itertools.chain(module.named_parameters(), module.named_buffers())
    return {k: t.detach().clone() for k, t in found}


def train(module: nn.Module, xs: list[Tensor], call=None, optimizer=None) -> dict[str, Tensor]:
    """A step for each batch; everything that could be seen of them."""
    optimizer = optimizer or torch.optim.SGD([*module.parameters()] or [torch.zeros(1)], lr=0.1)
    found = {}
    for i, x in enumerate(xs):
        x = x.detach().requires_grad_()
        optimizer.zero_grad()
        y = (module if call is None else call)(x)
        (y.float() ** 3).sum().backward()
        found |= {f"{i}: y": y.detach(), f"{i}: dx": x.grad}
        found |= {f"{i}: d{k}": p.grad.clone() for k, p in module.named_parameters()}
        optimizer.step()
        found |= {f"{i}: {k}": t for k, t in tensors(module).items()}
    return found


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To the last bit; NaN is NaN."""
    close(found, expected, rtol=0, atol=0)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], **how) -> None:
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        about = how or alike(t)
        torch.testing.assert_close(found[key], t, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}", **about)


def compiled_is_eager(eager: nn.Module, xs: list[Tensor]) -> None:
    traced = copy.deepcopy(eager)
    close(train(traced, xs, compiled(traced)), train(eager, xs))
