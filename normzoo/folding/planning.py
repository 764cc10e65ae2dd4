"""Which norms of a model can be folded into the layers beside them, and folding in one call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion import bypass, report
from ..conversion.baking import baker
from ..conversion.examine import examine, look_around
from ..conversion.following import Unclear
from ..conversion.recognise import Site
from ..conversion.report import a
from ..conversion.rules import Names, seen, selector
from ..conversion.samples import Sample, outputs
from ..conversion.surgery import references, refuse_wrapped
from ..conversion.weights import weight_sites
from .adjacent import Neighbours
from .layers import LAYERS, STORED, Unfoldable, foldable
from .steps import AFTER, BEFORE, Fold, FoldPlan, dims_for, take_up
from .trial import bake_error, fold_error

logger = logging.getLogger("normzoo")


def plan_fold(
    model: nn.Module,
    sample: Any = None,
    *,
    include: Names = "*",
    exclude: Names = (),
    strict: bool = False,
) -> FoldPlan:
    """What :func:`normzoo.fold` would do to every norm of `model`, and why some stay; the model is not touched.

    Args:
        model, include, exclude, strict: as there.
        sample: as there; the model runs on it once, to see how many dimensions the inputs of its norms have.
            Whether outputs stay the same, :meth:`FoldPlan.verify` tells.

    Raises:
        TypeError, ValueError: as there.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)).eval()
    >>> [(step.site.name, step.action, step.into) for step in plan_fold(model).steps]
    [('1', 'fold', ('0',)), ('2', 'keep', ())]
    """
    norms = examine(model, "fold")
    refuse_wrapped(model, "fold", "fold")
    layers = look_around(model, [site for site in weight_sites(model, norms) if baker(site)])
    place = {module: i for i, module in enumerate(model.modules())}
    found = sorted((*norms, *layers), key=lambda site: place[site.module])
    selected = selector(include, exclude, None, None, found, "fold")
    plan = _Planner(model, norms, _dimensions(model, norms, sample))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        steps = plan.all([(site, selected(site)) for site in found])
    if not plan.order:
        raise ValueError(f"fold: nothing can be folded; {seen(found)}{_reasons(steps)}")
    functional = bypass.functional_norms(model, [site.module for site in found])
    made = FoldPlan(model, steps, plan.order, functional)
    if strict and made.left:
        raise ValueError(f"fold: strict=True, and some norms cannot be folded{_reasons(made.left)}")
    return made


def fold(
    model: nn.Module,
    sample: Any = None,
    *,
    include: Names = "*",
    exclude: Names = (),
    strict: bool = False,
    inplace: bool = True,
) -> nn.Module:
    r"""Fold norms that are fixed maps of each channel in eval mode into the layers beside them, for inference.

    These are batch norms (torch's, SyncBatchNorm, frozen ones, GhostBatchNorm, AdaB2N, timm's with an
    activation, which stays), AlphaBatchNorm with source_weight=1, InstanceNorm that tracks statistics,
    PowerNorm with group_num=None and UnifiedNorm. Layers that standardize their weight become plain ones first.

    A norm goes into the layers before it (Linear, Conv, ConvTranspose, Embedding) where it alone takes their
    whole output and nothing else goes into it, as the code of their parents tells, traced by torch.fx in eval
    mode. Else it goes into the layers after it in the same way; not into a convolution that pads with zeros,
    if it shifts. A :class:`normzoo.folding.Folded`, an identity, stays in its place. What cannot be
    folded stays, and the logger ``normzoo`` warns with the reasons; the whole account is at level INFO.

    Every layer is tried out on random inputs with and without the norm in it, in float64 and in its own dtype.
    Layers are replaced by copies with other weights, so that tied weights elsewhere stay what they are.

    Folding cannot be taken back, and a folded model trains otherwise: fold a copy where training is to go on.
    Norms have to be in eval mode.

    Args:
        model: any module that holds norms.
        sample: an input of the model. A tuple is taken as positional, a mapping as keyword arguments; or a
            function that calls the model it is given. The whole model is compared on it before and after.
            It also tells of what rank inputs are. Without it, a batch norm behind a Linear is taken to get
            (N, C), and convolutions to get batches; the Folded raises ValueError on others.
        include, exclude: names, globs or ``"re:..."`` of norms and of layers that standardize their weight, one
            or several; one of `include` must match, and none of `exclude`.
        strict: a norm that is meant and cannot be folded is an error, rather than left alone.
        inplace: False folds a deep copy.

    Returns:
        `model`, or the new module where `model` itself is a layer that standardized its weight.

    Raises:
        TypeError: `model` is no module, or a pattern no string.
        ValueError: nothing can be folded; a pattern matches nothing; the model is wrapped (DDP, FSDP,
            torch.compile); with `strict`, some norm stays; outputs on `sample` change by more than rounding.
            The model is left as it was.

    >>> fold(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval())
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Folded(into 0)
      (2): ReLU()
    )
    """
    if not inplace:
        model = copy.deepcopy(model)
    made = plan_fold(model, sample, include=include, exclude=exclude, strict=strict)
    proof = None if sample is None else made.verify(sample)
    if proof is not None and not proof.passed:
        raise ValueError(f"fold: {proof}; the model is left as it was")
    root = made.apply()
    logger.info("fold: %s%s", made.summary(), f"\nproof: {proof}" if proof else "")
    if made.left:
        left = report.count(len(made.left), "norm")
        logger.warning("fold: %s left as they are:%s", left, _reasons(made.left))
    return root


def _reasons(steps: Sequence[Fold]) -> str:
    return report.reasons((step.site.name, step.reason or step.site.note) for step in steps)


def _dimensions(model: nn.Module, norms: Sequence[Site], sample: Any) -> dict[nn.Module, set[int]]:
    """How many dimensions the inputs of each norm have on the sample."""
    found: dict[nn.Module, set[int]] = {}
    if sample is None:
        return found

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            found.setdefault(module, set()).add(args[0].dim())

    handles = [site.module.register_forward_pre_hook(hook) for site in norms]
    try:
        outputs(model, Sample(sample))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Planner:
    """Finds what can be folded, one norm after the other, each on top of those before."""

    def __init__(
        self, model: nn.Module, norms: Sequence[Site], dimensions: Mapping[nn.Module, Collection[int]]
    ) -> None:
        self.order: list[Fold] = []
        self._model = model
        self._around = Neighbours(model, {site.module for site in norms})
        self._dimensions = dimensions
        self._made: dict[nn.Module, nn.Module] = {}
        names: dict[nn.Module, str] = {}
        for name, module in model.named_modules():
            names[module] = name
        self._names = names
        layers = [module for module in names if isinstance(module, LAYERS)]
        self._outside = references(model, layers)

    def all(self, found: Sequence[tuple[Site, bool]]) -> list[Fold]:
        """The steps for these sites; of each, whether it is meant."""
        steps = [_unmeant(site) if meant else Fold(site, "keep", "filtered out") for site, meant in found]
        for step in steps:
            if step.action == "bake":
                self._try(step, self._bake)
        waiting = [step for step in steps if step.action == "fold"]
        while True:  # a norm that is gone brings others together
            left = [step for step in waiting if not self._try(step, self._fold)]
            if len(left) == len(waiting):
                break
            waiting = left
        for step in left:
            step.action = "refuse"
        return steps

    def _try(self, step: Fold, do: Callable[[Fold], None]) -> bool:
        try:
            do(step)
        except (Unfoldable, Unclear) as reason:
            step.reason = _bare(reason)
            if step.action == "bake":
                step.action = "refuse"
            return False
        step.reason = ""
        self.order.append(step)
        return True

    def _bake(self, step: Fold) -> None:
        layer, make = step.site.module, baker(step.site)
        self._check_held(layer, "")
        if reader := bypass.raw_weights(self._model).get(step.site.name):
            raise Unfoldable(f"{reader} reads its raw weight itself")
        if make is None:
            return
        step.bake = make
        try:
            made = make()
            step.error = bake_error(layer, made)
        except ValueError as error:
            raise Unfoldable(str(error)) from error
        self._made[layer] = made

    def _fold(self, step: Fold) -> None:
        site = step.site
        norm = foldable(site.module, "fold")
        if site.outside:
            raise Unfoldable(f"{site.outside} holds it too, outside the module tree, and would go on with it")
        if reader := self._around.read_by(site.module):
            raise Unfoldable(f"{reader} reads its tensors itself")
        try:
            self._into(step, BEFORE, self._around.sources, self._around.readers)
        except (Unfoldable, Unclear) as before:
            try:
                if norm.after:
                    raise Unfoldable(f"its {', '.join(norm.after)} stands between")
                self._into(step, AFTER, self._around.readers, self._around.sources)
            except (Unfoldable, Unclear) as after:
                raise Unfoldable(
                    f"not into what comes before it ({_bare(before)}), nor after it ({_bare(after)})"
                ) from after
        if not norm.after:
            self._around.gone.add(site.module)

    def _into(self, step: Fold, where: str, neighbours: Any, theirs: Any) -> None:
        """Folds a norm into its `neighbours` on one side, which have no others than it on that side."""
        norm, layers = step.site.module, tuple(neighbours(step.site.module))
        kinds = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, LAYERS)})
        if not layers or kinds:
            raise Unclear(
                f"{'and '.join(a(kind) for kind in kinds) or 'nothing'} is there, and no layer with a weight"
            )
        for layer in layers:
            self._check_held(layer, f"{self._names[layer]}: ")
            try:
                others = [other for other in theirs(layer) if other is not norm]
            except Unclear as reason:
                raise Unclear(f"{self._names[layer]}: {reason}") from reason
            if others:
                does = "goes into" if where == BEFORE else "takes"
                of = "" if where == BEFORE else "the output of "
                raise Unclear(f"{self._names[layer]} {does} {of}{a(type(others[0]).__name__)} too")
        axis = step.site.norm.axis if step.site.norm else -1
        dims = {dims_for(layer, axis) for layer in layers}
        seen = self._dimensions.get(norm, ())
        if len(dims) > 1 or (None not in dims and set(seen) - dims):
            raise Unfoldable(
                f"its input has {' and '.join(map(str, sorted(seen)))} dimensions, its channels in another one "
                f"than those of {type(layers[0]).__name__}"
            )
        step.where, step.layers, step.dims = where, layers, dims.pop()
        step.into = tuple(self._names[layer] for layer in layers)
        before = {layer: self._made.get(layer) or layer for layer in layers}
        made = {layer: take_up(step, before[layer]) for layer in layers}
        step.error = max(fold_error(step, before[layer], new) for layer, new in made.items())
        step.note = self._untied(layers)
        self._made |= made

    def _check_held(self, layer: nn.Module, name: str) -> None:
        if layer in self._outside:
            raise Unfoldable(f"{name}{self._outside[layer]} holds it too, outside the module tree")
        if name and (reader := self._around.read_by(layer)):
            raise Unfoldable(f"{name}{reader} reads its weight itself")

    def _untied(self, layers: Sequence[nn.Module]) -> str:
        """A note on weights that others share."""
        others = [p for module in self._names if module not in layers for p in module._parameters.values()]
        ids = {id(p) for p in others if p is not None}
        shared = [self._names[layer] for layer in layers if id(layer._parameters.get("weight")) in ids]
        return f"{', '.join(shared)} no longer shares its weight" if shared else ""


def _unmeant(site: Site) -> Fold:
    """The step of a site before its surroundings are known."""
    if site.kind != "norm":
        return Fold(site, "bake")
    if site.norm is None:
        return Fold(site, "unknown")
    if site.family not in STORED:
        return Fold(site, "keep", f"{a(site.family)} norm takes statistics of its input in eval mode too")
    return Fold(site, "fold")


def _bare(reason: Exception) -> str:
    """What an error says, without who says it."""
    text = str(reason)
    for caller in ("fold", "into_previous", "into_next"):
        text = text.removeprefix(f"{caller}: ")
    return text
