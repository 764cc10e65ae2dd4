"""Rules for layers with a weight, which become layers that standardize it, and where such layers are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from .behind import Behind, NormsBehind
from .norm import Weighted
from .recognise import Look, Site, recognise
from .recognise_weights import BESIDES, LAYERS, base_of, settings, weighted
from .report import a
from .surgery import places
from .transfer import Carried, Exactness, NotMeant, Refused, transfer

_LOST = "every output loses the mean and the scale of its weights"
_OUTDATED = (
    "have norms behind them whose running statistics are those of the old weights: train, or call "
    "normzoo.recalibrate, before eval mode"
)


@dataclass
class WeightSite(Site):
    """A convolution or linear map of a model."""

    kind: ClassVar[str] = "layer"
    look: ClassVar[Look | None] = staticmethod(weighted)
    behind: Callable[[], Behind] = field(default=Behind, repr=False, compare=False)
    """Tells which norms follow it."""
    asked: bool = False
    """Whether the caller asked for it by its full name."""

    def check(self, cls: type[nn.Module] | None) -> None:
        """Raises NotMeant where no norm follows it or `cls` is for others, Refused where that is not sure."""
        if cls not in (None, LAYERS[base_of(self.module)]):
            raise NotMeant(
                f"{cls.__name__ if cls else cls} takes the place of other layers than {a(self.cls.__name__)}"
            )
        if self.family not in ("convolution", "linear"):
            return
        behind = self.behind()
        if not behind.norms and behind.sure:
            raise (Refused if self.asked else NotMeant)(f"no norm follows it ({behind.why_not})")
        if self.module._parameters.get("weight") is None:
            raise Refused(
                "its weight is computed by a parametrization, weight_norm or spectral_norm, which this would "
                "undo; remove that first, for good"
            )
        if not behind.norms and not self.asked:
            raise Refused(
                f"it is not clear whether a norm follows it ({behind.why_not}); if one does, say so by its "
                "full name in include, or as a key of to"
            )


def weight_sites(model: nn.Module, norms: Sequence[Site]) -> list[WeightSite]:
    """The convolutions and linear maps of `model` in the order of its modules; each module once.

    Args:
        norms: the norms of `model`.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, tuple(LAYERS)):
            names.setdefault(module, []).append(name)
    parents, around = places(model), NormsBehind(model, {site.module: site for site in norms})
    return [
        WeightSite(
            tuple(names[module]),
            module,
            *known,
            parents.get(module, []),
            behind=functools.partial(around.behind, module),
        )
        for module, known in zip(names, recognise(names, weighted), strict=True)
    ]


def _layer(module: Any, options: Mapping[str, Any], usual: Mapping[str, Any]) -> Carried:
    """The layer for `module`; `usual`: how it standardizes, but for the options."""
    weight: torch.Tensor = module.weight
    if not weight.is_floating_point():
        raise Refused(
            f"its weight is {weight.dtype}, and one that is standardized is of a real floating-point dtype"
        )
    variant = options.get("variant", usual["variant"])
    how = dict(usual) if variant == usual["variant"] else {"variant": usual["variant"]}
    kept = {"weight": "weight"} | ({} if module.bias is None else {"bias": "bias"})
    with_gain = variant == "scaled" and getattr(module, "gain", None) is not None
    kept |= {"gain": "gain"} if with_gain else {}
    return Carried(
        # The weights that it would draw are not needed.
        settings(module) | how | {"device": "meta"},
        kept,
        dropped=(*BESIDES, *(() if with_gain else ("gain",))),
        begin=functools.partial(_begin, module),
        cls=LAYERS[base_of(module)],
    )


def _begin(old: Any, new: Any) -> None:
    if new.gain is not None:
        new.gain = nn.Parameter(
            torch.ones_like(new.gain, device=old.weight.device), requires_grad=new.gain.requires_grad
        )


def _plain(norm: Weighted, module: nn.Module, options: Mapping[str, Any], site: WeightSite) -> Carried:
    if "weight" in site.shared:
        raise Refused("another module shares its weight, and would go on with the raw one")
    carried, behind = _layer(module, options, {"variant": "ws"}), site.behind()
    if behind.read_by:
        raise Refused(
            f"{behind.read_by} reads its weight and may compute the layer itself, as it was; change that class "
            "first"
        )
    if behind.norms:
        follow = "follows" if len(behind.norms) == 1 else "follow"
        carried.note = f"{_LOST}; {', '.join(behind.norms)} {follow}"
        carried.warning = _OUTDATED if behind.stored else ""
    else:
        carried.note = f"{_LOST}; that a norm follows is taken from you ({behind.why_not})"
    return carried


for _family in ("convolution", "linear"):
    transfer(
        _family,
        "weight_standardize",
        Exactness.APPROXIMATE,
        f"where a norm follows: {_LOST}",
        by_options=True,
        by_site=True,
    )(_plain)


@transfer("standardized", "weight_standardize", Exactness.EXACT, same=True, by_options=True)
def _(norm: Weighted, module: nn.Module, options: Mapping[str, Any]) -> Carried:
    return _layer(module, options, {"variant": norm.variant, "ws_eps": norm.eps, "gamma": norm.gamma})
