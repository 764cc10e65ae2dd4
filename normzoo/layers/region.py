r"""Region normalization for inpainting: the hole and what surrounds it, each by statistics of its own.

Yu, Guo, Jin et al., *Region Normalization for Image Inpainting*, AAAI 2020, arXiv:1911.10375; code
geekyutao/RN. RN-B is given the mask, RN-L finds one. As in the authors' code the statistics are those of the
batch, in eval mode too, and nothing is stored; the paper takes those of each image, ``per_instance=True``.

The code fills everything outside of a region with its mean, takes batch norm of that and scales it back. What
is left of this detour is the eps: in a region of S of the N pixels it counts as eps · N / S.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, ranks
from ..dispatch import transformed
from ..engine import normalize
from ..fused import fused
from ..moments import Moments
from ..sets import fits
from ..side_inputs import side_input
from ..state import Guarded, finite, recomputing
from .two_regions import RegionScaling

RESIZES = ("nearest", "max")

AFFINE = ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta")

_POOLS = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}


def region_norm_b(
    x: Tensor,
    mask: Tensor,
    foreground_gamma: Tensor | None = None,
    foreground_beta: Tensor | None = None,
    background_gamma: Tensor | None = None,
    background_beta: Tensor | None = None,
    eps: float = 1e-5,
    per_instance: bool = False,
    separate_beta: bool = False,
    resize: str = "nearest",
) -> Tensor:
    r"""y = (1 + gamma) · (x − mean) / sqrt(var + eps · N / S) + beta, for the S pixels of the hole and for the
    others, by their own mean, variance and gamma.

    Args:
        x: (N, C, \*), contiguous or channels_last, any real floating dtype.
        mask: (N, 1, \*) or (N, \*), of any size: 1 or True in the hole; one for all samples with a first
            dimension of one. A bool one must stay as it is until the backward pass.
        foreground_gamma, foreground_beta: (C,) or None, of the hole.
        background_gamma, background_beta: (C,) or None, of the rest.
        eps: positive; N counts all pixels that a statistic could see, those of the batch or of the image.
        per_instance, separate_beta, resize: as in :class:`RegionNormB`.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together, or a channel has one value.

    >>> import torch
    >>> region_norm_b(torch.tensor([[[1.0, 3.0, 10.0, 30.0]]]), torch.tensor([[False, False, True, True]]))
    tensor([[[-1.0000,  1.0000, -1.0000,  1.0000]]])
    """
    affine = (foreground_gamma, foreground_beta, background_gamma, background_beta)
    checks.channels("region_norm_b", x, None, **dict(zip(AFFINE, affine, strict=True)))
    how = {"eps": eps, "per_instance": per_instance, "separate_beta": separate_beta, "resize": resize}
    return _given("region_norm_b", x, mask, affine, **how)[0]


def _given(
    layer: str,
    x: Tensor,
    mask: Tensor,
    affine: tuple[Tensor | None, ...],
    *,
    eps: float,
    per_instance: bool,
    separate_beta: bool,
    resize: str,
    sync: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, (mean, var) of the regions); x and `affine` are checked already."""
    checks.eps(layer, eps)
    checks.choice(layer, "resize", resize, RESIZES)
    hole = _mask_of(layer, mask, x, resize)
    gamma1, beta1, gamma0, beta0 = affine
    parameters = (gamma0, beta0, gamma1, beta1)
    return by_region(layer, x, hole, parameters, separate_beta, eps, per_instance, sync, process_group)


def by_region(
    layer: str,
    x: Tensor,
    hole: Tensor,
    parameters: tuple[Tensor | None, ...],
    separate_beta: bool,
    eps: float,
    per_instance: bool,
    sync: bool,
    process_group: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, (mean, var)); parameters: gamma and beta of what is around, then of the hole."""
    sync = sync and ranks.size(process_group) > 1
    if not sync and (x.numel() == x.shape[1] or (per_instance and x.shape[2:].numel() == 1)) and x.numel():
        raise ValueError(
            f"{layer}: Expected more than 1 value per channel, got input size {tuple(x.shape)}; use larger "
            "images"
        )

    def combine(m: Moments):
        m = m.across_ranks(process_group) if sync else m
        scaling = RegionScaling(eps, separate_beta)
        tensors = (m.count, m.pivot, m.delta, m.m2, *parameters)
        kernels = m.kernels and m.unmerged and fits(*parameters)
        scale, shift, *statistics = fused(scaling, *tensors) if kernels else scaling.plain(tensors)
        return scale, shift, tuple(t.detach() for t in statistics)

    return normalize(x, combine, mask=hole, per_sample=per_instance)


def _mask_of(layer: str, mask: Tensor, x: Tensor, resize: str) -> Tensor:
    """The mask as bool (N, \\*), in the size of x."""
    if not isinstance(mask, Tensor):
        how = "; torch.from_numpy makes one" if type(mask).__name__ == "ndarray" else ""
        raise TypeError(
            f"{layer}: mask is a {type(mask).__name__}; it must be a tensor of 0 and 1, 1 in the hole{how}"
        )
    if mask.is_complex():
        raise TypeError(f"{layer}: mask is {mask.dtype}; it must be of bool, or of 0 and 1")
    checks.same_device(layer, "mask", mask, x)
    given = mask
    if mask.dim() == x.dim() - 1:
        mask = mask.unsqueeze(1)
    if mask.dim() != x.dim() or mask.shape[1] != 1 or mask.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{layer}: mask has shape {tuple(given.shape)}; for an input of shape {tuple(x.shape)} it must be "
            f"({x.shape[0]}, 1, *) or ({x.shape[0]}, *), its * of any size{_mended(given, x)}"
        )
    seen = mask.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed())
    if seen and mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            if mask.isnan().any():
                raise ValueError(
                    f"{layer}: mask has NaN in it; it must be of bool, or of 0 and 1: take mask.isnan() if NaN "
                    "marks the hole"
                )
            low, high = mask.min().item(), mask.max().item()
            raise ValueError(
                f"{layer}: mask has entries from {low} to {high}; it must be of bool, or of 0 and 1: take "
                "mask > 0.5, or mask > 127 for an image of bytes"
            )
    mask = mask.detach() > 0.5 if mask.dtype != torch.bool else mask.detach()
    if mask.shape[2:] != x.shape[2:]:
        mask = _resized(layer, mask, x, resize)
    return mask.squeeze(1).expand(x.shape[0], *x.shape[2:])


def _mended(mask: Tensor, x: Tensor) -> str:
    """What makes a mask of it, where that is clear."""
    if mask.dim() == x.dim() - 2:
        return "; mask[None] is one for all samples"
    if mask.dim() == x.dim() and mask.shape[1] != 1:
        if mask.shape[-1] == 1:
            return "; mask.movedim(-1, 1) brings its channel to the front"
        return f"; it has {mask.shape[1]} channels, take one of them, such as mask[:, :1]"
    return ""


def _resized(layer: str, mask: Tensor, x: Tensor, resize: str) -> Tensor:
    both = f"{layer}: mask has shape {tuple(mask.shape)} and the input {tuple(x.shape)}"
    if 0 in mask.shape[2:]:
        raise ValueError(f"{both}; there is no pixel in the mask, give it in the size of the input")
    if x.dim() not in _POOLS:
        raise ValueError(
            f"{both}; it is resized for inputs of 3 to 5 dimensions only, give it in the size of the input"
        )
    if tuple(x.shape[2:]) in permutations(mask.shape[2:]):  # torch.compile cannot sort sizes
        turn = "mask.mT transposes it" if x.dim() == 4 else "permute it"
        raise ValueError(f"{both}, the same sizes in another order; it is not stretched to that: {turn}")
    mask = mask.float()
    if resize == "nearest":
        return F.interpolate(mask, x.shape[2:], mode="nearest") != 0
    return _POOLS[x.dim()](mask, x.shape[2:]) != 0


class Region(Guarded):
    """What the layers share: there is no running state, and no parameter of :class:`Guarded` either."""

    def __init__(
        self,
        num_features: int,
        eps: float,
        per_instance: bool,
        *,
        sync: bool,
        process_group: Any,
        nonfinite: str,
        device,
    ) -> None:
        layer = type(self).__name__
        checks.flag(layer, "per_instance", per_instance)
        if per_instance and sync:
            raise ValueError(
                f"{layer}: sync=True is without effect with per_instance=True: a sample is on one rank"
            )
        options = {"bias": False, "sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, None, False, False, device, None, **options)
        self.per_instance = per_instance

    def _how(self) -> dict[str, Any]:
        own = {"eps": self.eps, "per_instance": self.per_instance}
        return own | {"sync": self.sync, "process_group": self.process_group}

    def _counted(self, statistics: tuple[Tensor, ...]) -> None:
        if not recomputing():
            self._count_skipped(lambda: finite(*statistics))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, per_instance={self.per_instance}"


class RegionNormB(Region):
    r"""Region normalization by a given mask, RN-B: the hole and the rest by statistics and gammas of their own.

    Input x (N, C, \*) and a mask, (N, 1, \*) or (N, \*) of any size, 1 or True in the hole; or x alone
    inside of ``with normzoo.inputs(model, mask=mask)``. The output is like x in shape, dtype and memory format,
    the same in training and eval mode: there are no running statistics. NaN or infinity in the hole stays
    there. Checkpoints of the authors' code load.

    Args:
        num_features: channels, C.
        eps: positive; in a region of S of N pixels it counts as eps · N / S, as in the authors' code.
        per_instance: take the statistics of each image (the paper) and not of the batch (the code).
        separate_beta: add each beta in its own region (the paper). The authors' code, and so False, adds the
            sum of both at every pixel, which its checkpoints rely on.
        resize: how a mask of another size becomes as large as x: ``"nearest"`` (the code), which may lose small
            holes, or ``"max"``, which keeps them.
        sync: take the statistics over all ranks of `process_group`.
        process_group: None means the world.
        nonfinite: with ``"skip"``, ``batches_skipped`` counts the batches with NaN or infinite statistics. The
            output is the same, and there is no state that they could spoil.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit. The entries of a mask that is
            not of bool are looked at on a CPU only, and not by torch.compile; elsewhere what is above a half
            is in the hole.

    >>> import torch
    >>> x, mask = torch.tensor([[[1.0, 3.0, 10.0, 30.0]]]), torch.tensor([[0, 0, 1, 1]])
    >>> RegionNormB(1)(x, mask).detach()
    tensor([[[-1.0000,  1.0000, -1.0000,  1.0000]]])
    """

    side_inputs = ("mask",)
    foreground_gamma: nn.Parameter
    foreground_beta: nn.Parameter
    background_gamma: nn.Parameter
    background_beta: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        per_instance: bool = False,
        separate_beta: bool = False,
        *,
        resize: str = "nearest",
        sync: bool = False,
        process_group: Any = None,
        nonfinite: str = "propagate",
        device=None,
        dtype=None,
    ) -> None:
        checks.flag("RegionNormB", "separate_beta", separate_beta)
        checks.choice("RegionNormB", "resize", resize, RESIZES)
        options = {"sync": sync, "process_group": process_group, "nonfinite": nonfinite}
        super().__init__(num_features, eps, per_instance, **options, device=device)
        self.separate_beta, self.resize = separate_beta, resize
        for name in AFFINE:
            self.register_parameter(name, nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        affine = tuple(getattr(self, name) for name in AFFINE)
        checks.channels("RegionNormB", x, self.num_features, **dict(zip(AFFINE, affine, strict=True)))
        mask = side_input(self, "mask") if mask is None else mask
        how = {"separate_beta": self.separate_beta, "resize": self.resize, **self._how()}
        y, statistics = _given("RegionNormB", x, mask, affine, **how)
        self._counted(statistics)
        return y

    def extra_repr(self) -> str:
        own = f"separate_beta={self.separate_beta}, resize={self.resize!r}"
        return f"{super().extra_repr()}, {own}{self._options()}"
