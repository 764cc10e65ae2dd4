"""What is made of a model with torch's norms, and the names under which it is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

import normzoo
from normzoo.conversion import Site

from ..quiet import quiet

FORMS = ("eager", "compiled", "opaque")
"""Compiled block by block, where normzoo's row norms are fused with their neighbours; opaque, they are
operators that are not."""

_GROUPS = 32
"""Of channels at the most, as the papers of GroupNorm and BatchChannelNorm have it."""


@dataclass(frozen=True)
class Conversion:
    name: str
    convert: Callable[[nn.Module, Tensor], object]
    """Changes a model in place, given a sample of its input."""
    of: tuple[str, ...] = ("layer_norm",)
    """The norms in whose place something else comes."""
    keeps: bool = False
    """Whether the function of the model is to stay as it is."""
    directions: tuple[str, ...] = ("step", "inference")


def _to(layer: object, calibrate: bool = False, **options: object) -> Callable[[nn.Module, Tensor], object]:
    def convert(model: nn.Module, sample: Tensor) -> None:
        normzoo.convert(model, layer, **options)
        if calibrate:
            normzoo.recalibrate(model, [sample])

    return convert


def _grouped(norm: type[nn.Module]) -> Callable[[Site], partial]:
    return lambda site: partial(norm, num_groups=min(_GROUPS, site.module.num_features))


def _rewritten(rewrite: str, **options: object) -> Callable[[nn.Module, Tensor], object]:
    def convert(model: nn.Module, sample: Tensor) -> None:
        normzoo.convert(model)
        # Not the norms of queries and keys, which read no stream of residuals.
        getattr(normzoo, rewrite)(model, sample, include=("norm", "blocks.*.norm?"), **options)

    return convert


_INFERENCE = ("inference",)
_SAME = Conversion("", lambda model, _: normzoo.convert(model), ("layer_norm", "rms_norm", "batch_norm"), True)
CONVERSIONS = (
    _SAME,
    Conversion("rms_norm", _to("rms_norm")),
    Conversion("power_norm", _to("power_norm", calibrate=True, warmup_iters=0)),
    Conversion("pre-rms", _rewritten("to_pre_rms_norm"), keeps=True, directions=_INFERENCE),
    Conversion("pre-crms", _rewritten("to_pre_crms_norm"), keeps=True, directions=_INFERENCE),
    Conversion(
        "pre-crms-orthonormal",
        _rewritten("to_pre_crms_norm", basis="orthonormal"),
        keeps=True,
        directions=_INFERENCE,
    ),
    Conversion("group_norm", _to(_grouped(normzoo.GroupNorm)), ("batch_norm",)),
    Conversion("batch_channel_norm", _to(_grouped(normzoo.BatchChannelNorm), calibrate=True), ("batch_norm",)),
    Conversion("fold", normzoo.fold, ("batch_norm",), keeps=True, directions=_INFERENCE),
)
"""To normzoo's norms of the same function, to other norms, and rewrites of the whole model."""


def converted(conversion: Conversion | None, model: nn.Module, sample: Tensor) -> nn.Module:
    """`model`, changed in place; None leaves it as it is."""
    if conversion is not None:
        with quiet():
            conversion.convert(model, sample)
    return model


@dataclass(frozen=True)
class Contender:
    name: str
    conversion: Conversion | None
    """None: torch's norms stay."""
    form: str

    @property
    def baselines(self) -> tuple[str, ...]:
        """Whom its time is set against: the model with torch's norms, compiled where it is."""
        return ("torch",) if self.form == "eager" else ("torch.compile", "torch")

    def compiled(self, model: nn.Module) -> nn.Module:
        """`model`, its blocks compiled where this is the form."""
        if self.form != "eager":
            for block in model.get_submodule("blocks").children():
                block.compile(dynamic=False, fullgraph=True)
        return model

    def context(self) -> contextlib.AbstractContextManager:
        """What it has to be called in."""
        return normzoo.backend("triton") if self.form == "opaque" else contextlib.nullcontext()


def _named(conversion: Conversion | None, form: str) -> Contender:
    if conversion is None:
        return Contender("torch" if form == "eager" else "torch.compile", None, form)
    words = ("normzoo", conversion.name, "" if form == "eager" else form)
    return Contender("-".join(filter(None, words)), conversion, form)


CONTENDERS = {
    made.name: made
    for form in FORMS
    for made in map(partial(_named, form=form), (None, *CONVERSIONS))
    if form != "opaque" or made.conversion is _SAME
}


def usual(device: str) -> tuple[str, ...]:
    """The contenders of a run that names none. On a GPU also those that keep the function, compiled; on a CPU
    compiling outlasts the rest."""

    def compiled(made: Contender) -> bool:
        return device == "cuda" and (made.conversion is None or made.conversion.keeps)

    return tuple(name for name, made in CONTENDERS.items() if made.form == "eager" or compiled(made))
