"""What a norm computes, in terms that hold across libraries."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..checks import at_least_float32
from ..dispatch import backend

FAMILIES = (
    "layer",
    "rms",
    "crms",
    "batch",
    "frozen_batch",
    "ghost_batch",
    "group",
    "instance",
    "alpha_batch",
    "adab2n",
    "batch_channel",
    "power",
    "unified",
    "evo_b0",
    "evo_b1",
    "evo_b2",
    "evo_s0",
    "evo_s1",
    "evo_s2",
    "region_b",
    "region_l",
    "adaptive_layer",
    "adaptive_rms",
    "time_layer",
    "time_rms",
)


@dataclass(frozen=True)
class Norm:
    """The mathematics of a norm, and the attributes of the module that hold its tensors.

    >>> Norm("rms", (64,), 1e-6, weight="weight", offset=1.0, cast="gemma").describe()
    'rms (64,), eps=1e-06, 1 + weight, cast=gemma'
    """

    family: str
    """One of ``FAMILIES``; an adapter may bring a name of its own."""
    shape: tuple[int, ...] | None
    """Shape of the normalized dimensions, or the number of channels; None where the module does not say."""
    eps: float | None
    """Inside the root; None means the machine epsilon of the dtype the statistics are taken in."""
    weight: str | None = None
    bias: str | None = None
    statistics: tuple[str, ...] = ()
    """Buffers with stored statistics."""
    offset: float = 0.0
    """What is applied is ``offset + weight``."""
    cast: str | None = "torch"
    """Where low precision rounds, as in :func:`normzoo.functional.rms_norm`; None where it matches no order."""
    axis: int = -1
    """-1: the trailing dimensions. 1: the channels of (N, C, \\*). Others where a layer has a `channel_dim`."""
    groups: int = 1
    """Into how many groups the row or the channels fall, each with statistics of its own. Of a PowerNorm those
    that are scaled at every position; 0 for none."""
    after: tuple[str, ...] = ()
    """Children that forward applies to the normalized values, such as an activation."""
    momentum: float | None = 0.1
    """Weight of a new batch in running statistics; None averages all batches."""
    dims: int | None = None
    """1, 2 or 3 where it takes images of that many dimensions alone, as BatchNorm2d does; None: any."""
    arguments: tuple[str, ...] = ()
    """What forward takes beside the input: a module that takes the input alone cannot stand in its place."""
    apply_act: bool = True
    """Whether an EvoNorm activates; else it is weight · x + bias."""

    @property
    def channels(self) -> int:
        """C, where `axis` is 1; 0 where the module does not say."""
        return self.shape[0] if self.shape else 0

    @property
    def stored(self) -> dict[str, str]:
        """Of a norm of batches: by the names of its `statistics`, those that a layer of this library has."""
        ours = ("running_mean", "running_var", "num_batches_tracked")
        return dict(zip(self.statistics, ours[self.family.startswith("evo") :], strict=False))

    def describe(self) -> str:
        """One line for a table."""
        parts = [self.family if self.shape is None else f"{self.family} {self.shape}"]
        parts.append(f"eps={self.eps}")
        if self.offset:
            parts.append(f"{self.offset:g} + weight")
        if self.cast != "torch":
            parts.append(f"cast={self.cast or 'unknown'}")
        if self.groups != 1:
            parts.append(f"groups={self.groups or None}")
        if self.momentum != 0.1 and self.statistics:
            parts.append(f"momentum={self.momentum}")
        if not self.apply_act:
            parts.append("weight · x + bias alone")
        if self.after:
            parts.append(f"then {', '.join(self.after)}")
        if self.axis != -1 and self.family in ("layer", "rms"):
            parts.append("over channels")
        if self.axis != -1 and self.family in ("power", "unified"):
            parts.append(f"channels in dimension {self.axis}")
        return ", ".join(parts)

    def compute(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """A layer, RMS or group norm of x, (\\*, \\*shape) or (N, C, \\*), by the references."""
        eps = 0.0 if self.eps is None else self.eps
        if self.family == "group":
            h = at_least_float32(x)
            weight, bias = (None if t is None else t.to(h.dtype) for t in (weight, bias))
            return F.group_norm(h.contiguous(), self.groups, weight, bias, eps).to(x.dtype)
        rows = at_least_float32(x if self.axis == -1 else x.movedim(1, -1))
        shape = rows.shape[-1:] if self.shape is None else self.shape
        if self.groups != 1:
            rows = rows.unflatten(-1, (self.groups, -1))
            shape = rows.shape[-1:]
        with backend("reference"):
            if self.family == "layer":
                y = functional.layer_norm(rows, shape, eps=eps)
            else:
                y = functional.rms_norm(rows, shape, eps=self.eps)
        y = y.flatten(-2) if self.groups != 1 else y
        if self.cast == "llama":
            y = y.to(x.dtype)
        if weight is not None:
            y = y * (self._wide(weight) + self.offset if self.offset else weight)
        y = (y if bias is None else y + bias).to(x.dtype)
        return y if self.axis == -1 else y.movedim(-1, 1)

    def span(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x that share statistics."""
        if self.family in ("layer", "rms", "crms"):
            return (self.axis,)
        if self.family in ("power", "unified"):
            along = self.axis % x.dim()
        else:
            along = (
                1 if self.family.endswith(("batch", "adab2n", "evo_b0", "evo_b1", "evo_b2")) else 0
            )  # batch_channel ends on single samples
        return tuple(dim for dim in range(x.dim()) if dim != along)

    def _wide(self, weight: Tensor) -> Tensor:
        # Gemma adds its one in float32, LayerNorm1P in the dtype of the weight.
        return weight if self.family == "layer" else at_least_float32(weight)


WEIGHT_FAMILIES = ("convolution", "linear", "standardized")
"""Of :class:`Weighted`; the last has a standardized weight already, whatever the layer."""


@dataclass(frozen=True)
class Weighted(Norm):
    """A convolution or a linear map, and how it standardizes its weight, if it does."""

    variant: str | None = None
    """One of :data:`normzoo.layers.weight_standardization.DENOMINATORS`; None where it applies the weight as it
    is."""
    gamma: float = 1.0
    example: tuple[int, ...] = ()
    """Shape of a sample that it takes, as small as can be."""

    def describe(self) -> str:
        """One line for a table."""
        kind = "linear" if self.axis == -1 else "convolution"
        if self.variant is None:
            return f"{kind} {self.shape}"
        factor = "" if self.gamma == 1 else f", gamma={self.gamma:g}"
        return f"{kind} {self.shape}, weight standardized: {self.variant}, eps={self.eps}{factor}"

    def span(self, x: Tensor) -> tuple[int, ...]:
        """All dimensions but that of the channels, each of which has a unit of its own."""
        return tuple(dim for dim in range(x.dim()) if dim != self.axis % x.dim())


def tensor(module: nn.Module, name: str | None) -> Tensor | None:
    """The parameter or buffer of `module` called `name`."""
    found = None if name is None else getattr(module, name, None)
    return found if isinstance(found, Tensor) else None
