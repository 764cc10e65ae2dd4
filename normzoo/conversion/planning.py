"""Planning a conversion, and converting in one call."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..side_inputs import MissingInput
from . import bypass, report
from .change import Plan, Step
from .examine import examine, look_around
from .norm import Norm
from .proof import Beside, site_error, trained_error, trains_by_itself
from .recognise import DIMENSIONS, Site
from .rules import (
    LAYER,
    NORM,
    SAME,
    Chooser,
    Kinds,
    Names,
    Target,
    chooser,
    kind_of,
    kinds,
    patterns,
    seen,
    selector,
)
from .surgery import refuse_wrapped
from .transfer import UNCHANGED, Choice, Exactness, NotMeant, Refused, Replacement, replacement
from .trial import bare, short, stand_in
from .weights import weight_sites

logger = logging.getLogger("normzoo")


def plan(
    model: nn.Module,
    to: Target = SAME,
    *,
    include: Names = "*",
    exclude: Names = (),
    types: Kinds | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    **options: Any,
) -> Plan:
    """What a conversion would do to every norm of `model`, and how exactly; the model is not touched.

    Where `to` is ``"weight_standardize"`` or a class such as :class:`normzoo.WSConv2d`, it is about the
    convolutions and linear maps that a norm follows, in place of norms.

    Args:
        model: any module, itself a norm perhaps.
        to: what the norms become. The name or the class of a layer of this library; ``"same"``, the layer
            with the mathematics of each; a ``functools.partial`` of a class; a function of a
            :class:`~normzoo.conversion.Site` that returns one of these, a module, or None; or a mapping of
            names to these, where an exact name goes before a glob, a glob before a regular expression
            (``"re:..."``, matched in full), and that before ``"_default"``. None keeps the norm.
        include, exclude: names, globs or ``"re:..."``, one or several; a norm must match one of `include` and
            none of `exclude`. A layer under its full name in `include`, or as a key of `to`, is taken to have a
            norm behind it where the code of the model does not tell.
        types: families (``"layer"``, ``"rms"``, ...), class names or classes, one or several.
        where: a function of name and module that says whether a norm is meant.
        strict: a norm that is meant and cannot be converted is an error, rather than left alone.
        options: constructor arguments of the new layers, which overrule those of the old norms.

    Raises:
        TypeError: an argument is of the wrong kind; `options` holds what the layer does not take.
        ValueError: a name or rule means nothing here; nothing can be converted; the model is wrapped (DDP,
            FSDP, torch.compile, TorchScript); with `strict`, something that is meant cannot be converted.

    >>> made = plan(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), "layer_norm")
    >>> [(step.site.name, step.action) for step in made.steps]
    [('0', 'convert'), ('1', 'refuse')]
    """
    norms = examine(model, "convert")
    refuse_wrapped(model)
    include = patterns("convert", "include", include)
    found = _found(model, kinds(to), norms, {*include, *(to if isinstance(to, Mapping) else ())})
    selected = selector(include, exclude, types, where, found)
    choose = chooser(to, options, found)
    with torch.random.fork_rng(devices=[]):  # a layer that starts anew draws its weights when it is made
        steps = [
            _step(site, choose) if selected(site) else Step(site, "keep", "filtered out") for site in found
        ]
    _refuse_reuse(model, steps)
    _refuse_torn(steps)
    if not any(step.action == "convert" for step in steps):
        raise ValueError(f"convert: nothing can be converted; {seen(found)}{_reasons(steps)}")
    if strict and (left := [step for step in steps if step.action in ("refuse", "unknown")]):
        raise ValueError(
            f"convert: strict=True, and some {kind_of(found)}s cannot be converted{_reasons(left)}"
        )
    functional = bypass.functional_norms(model, [site.module for site in norms])
    return Plan(model, steps, functional if NORM in {site.kind for site in found} else {})


def _found(model: nn.Module, about: Collection[str], norms: list[Site], asked: Collection[str]) -> list[Site]:
    """The sites that a conversion is about, in the order of the modules of `model`."""
    if LAYER not in about:
        return norms
    layers = look_around(model, weight_sites(model, norms))
    if not layers and NORM not in about:
        raise ValueError("convert: nothing can be converted; the model has no convolution and no linear layer")
    for site in layers:
        site.asked = any(name in asked for name in site.names)
    place = {module: i for i, module in enumerate(model.modules())}
    return sorted((*layers, *(norms if NORM in about else ())), key=lambda site: place[site.module])


def convert(
    model: nn.Module,
    to: Target = SAME,
    *,
    include: Names = "*",
    exclude: Names = (),
    types: Kinds | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    optimizer: Optimizer | None = None,
    inplace: bool = True,
    verify: Any = None,
    **options: Any,
) -> nn.Module:
    """Replace the norms of a model by layers of this library: :func:`normzoo.plan`, applied.

    Or, with ``"weight_standardize"``, the convolutions and linear maps before its norms.

    Tensors that keep their meaning stay the very same objects, so optimizers, tied weights, ``requires_grad``,
    dtype and device stay as they are, on the meta device too. Hooks, ``training``, and buffers and attributes
    set by the user come along. A norm registered under several names or parents stays one shared module.
    Norms that are unknown, or have no counterpart, are left alone.

    Where new layers compute another function, are no norms any more, or norms that are meant are left alone,
    the logger ``normzoo`` says so in a warning; the whole account is at level INFO.

    :class:`torch.nn.TransformerEncoderLayer` in eval mode without grad computes its norms itself, from their
    weight, bias and eps. After an exact conversion that gives the same; else its fast path is turned off.

    Args:
        model, to, include, exclude, types, where, strict, options: as in :func:`normzoo.plan`.
        optimizer: is kept in step where parameters are replaced or added.
        inplace: False converts a deep copy.
        verify: a sample input of the model, see :meth:`normzoo.conversion.Plan.verify`; where an exact
            conversion changes the outputs on it by more than rounding, the model is left as it was.

    Returns:
        `model`, or the new module where `model` itself is a norm.

    Raises:
        TypeError, ValueError: as in :func:`normzoo.plan`; `verify` failed. The model is left as it was.

    >>> convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "layer_norm")[1]
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    if optimizer is not None and not inplace:
        raise ValueError(
            "convert: optimizer holds the parameters of model, and inplace=False converts a copy; drop one"
        )
    if not inplace:
        model = copy.deepcopy(model)
    made = plan(model, to, include=include, exclude=exclude, types=types, where=where, strict=strict, **options)
    if verify is not None and not (proof := made.verify(verify)).passed:
        raise ValueError(f"convert: {proof}; the model is left as it was")
    root = made.apply(optimizer)
    tell(made)
    return root


def tell(made: Plan) -> None:
    """Tells the log what came of a plan, as a warning where it is not all that a user may take it for."""
    changed = [step for step in made.changes if step.exactness not in UNCHANGED]
    left = [step for step in made.steps if step.action in ("refuse", "unknown")]
    logger.info("convert: %s", made.summary())
    if changed:
        errors = [step.error for step in changed if step.error is not None]
        by = f", by up to {max(errors):.1e} of the largest entry on a test input" if errors else ""
        logger.warning(
            "convert: %d of %d converted %ss compute another function (%s%s); "
            "normzoo.plan(...).verify(sample) tells what that does to the model",
            len(changed),
            len(made.changes),
            made.kind,
            made.exactness.value,
            by,
        )
    for warning, number in Counter(step.warning for step in made.changes if step.warning).items():
        logger.warning("convert: %d of %d converted %ss %s", number, len(made.changes), made.kind, warning)
    if left:
        logger.warning("convert: %s left as they are:%s", report.count(len(left), made.kind), _reasons(left))


def _reasons(steps: Sequence[Step]) -> str:
    return report.reasons((step.site.name, step.reason or step.site.note) for step in steps)


def _step(site: Site, choose: Chooser) -> Step:
    try:
        choice = choose(site)
        if choice is None:
            return Step(site, "keep", "as asked")
        if site.norm is None:
            return Step(site, "unknown")
        if isinstance(choice, Choice):
            site.check(choice.cls)
        made = replacement(site, choice)
        if type(made.module) is type(site.module) and isinstance(choice, Choice) and not choice.options:
            return Step(site, "keep", f"it is normzoo's {choice.entry.name} already")
        _refuse(site, made)
        return _measured(site, site.norm, choice, made)
    except NotMeant as reason:
        return Step(site, "keep", str(reason))
    except Refused as reason:
        return Step(site, "refuse", str(reason)) if site.norm else Step(site, "unknown")


def _refuse_reuse(model: nn.Module, steps: Sequence[Step]) -> None:
    """Raises ValueError where a function of the caller gave one module to two places."""
    taken = set(model.modules())
    for step in steps:
        if isinstance(step.choice, nn.Module):
            if step.choice in taken:
                raise ValueError(
                    f"convert: to returned for {step.site.name!r} {report.a(type(step.choice).__name__)} "
                    "that is in the model already, or that it returned for another norm; return a new one for "
                    "every site"
                )
            taken.add(step.choice)


def _refuse_torn(steps: Sequence[Step]) -> None:
    """Leaves the norms whose activation cannot go, because a norm that shares it stays."""
    while True:
        going = {step.site.module for step in steps if step.activations}
        torn = [step for step in steps if step.activations and step.site.following().sources - going]
        if not torn:
            return
        for step in torn:
            shared = ", ".join(type(module).__name__ for module in step.activations)
            step.action, step.exactness, step.error, step.tensors = "refuse", None, None, {}
            step.parameters_change, step.activations = False, ()
            step.reason = f"another norm shares the {shared} that follows it, and stays"


def _refuse(site: Site, made: Replacement) -> None:
    """Raises Refused where the model would no longer hang together."""
    if site.outside:
        raise Refused(f"{site.outside} holds it too, outside the module tree, and would go on with the old one")
    if set(site.shared) - set(made.kept.values()):
        anew = "new ones" if made.exactness is Exactness.REINITIALISED else ""
        if new := f"a new {', '.join(made.converted)}" if made.converted else anew:
            raise Refused(f"another module shares its parameters, and {new} would untie them")
    for parent, child in site.parents:
        if bypass.fast_path(parent, child):
            continue
        for name in bypass.reads(parent, child):
            before, after = getattr(site.module, name, None), getattr(made.module, name, None)
            unlike = before is not after and (isinstance(before, Tensor) or before != after)
            if unlike or made.exactness is not Exactness.EXACT:
                raise Refused(
                    f"{type(parent).__name__} reads its {name} and may compute the {site.kind} itself, as it "
                    "was; change that class first"
                )


def _measured(site: Site, norm: Norm, choice: Choice | nn.Module, made: Replacement) -> Step:
    """The step that converts, with what test runs of both norms show."""
    error, close, notes = None, True, [made.note]
    trained: list[tuple[float, bool]] = []
    if isinstance(choice, Choice) and choice.cls is not None:  # it takes inputs of one rank, the norm any
        norm = dataclasses.replace(norm, dims=DIMENSIONS.get(choice.cls, norm.dims))
    beside = choice.entry.beside if isinstance(choice, Choice) else _nothing
    # What a layer loses, the norm behind it makes up for in part: alone it shows little.
    alone = site.kind == LAYER and made.exactness is Exactness.APPROXIMATE
    try:
        pairs = [] if alone else _pairs(site, choice, made.module)
        errors = [_error(old, new, norm, made.exactness, beside) for old, new in pairs]
        if made.exactness is Exactness.EXACT and trains_by_itself(norm):
            trained = [trained_error(old, new, norm) for old, new in pairs]
    except Exception as failure:  # both may be code of the caller
        called = type(made.module).__name__
        needed = getattr(made.module, "side_inputs", ())
        if not needed or not isinstance(failure, MissingInput):
            raise Refused(f"a test run of it beside the new {called} failed: {short(failure)}") from failure
        notes.append(f"not measured, as it takes {', '.join(needed)} from normzoo.inputs")
    else:
        close = bool(errors) and all(agrees for _, agrees in errors)
        # That of today's parameters, unless they hide what others show.
        error = next((error for error, agrees in errors if agrees is close), None)
        if error is not None and trained:
            error = max(error, trained[0][0])
        if made.exactness is Exactness.REINITIALISED:  # one input may show one branch of two alone
            error = None
    exactness = made.exactness
    if exactness in UNCHANGED and not close:
        exactness = Exactness.APPROXIMATE
        notes.append("a test run shows another function" if error else "not measured, as it is on meta")
    elif not all(agrees for _, agrees in trained):
        exactness = Exactness.EVAL_EXACT
        notes.append("a test run in training mode shows another function")
    tensors = {
        "kept": tuple(made.kept),
        "converted": tuple(made.converted),
        "new": made.new,
        "lost": made.lost,
    }
    reason = "; ".join(filter(None, notes))
    parameters = [{id(p) for p in module.parameters()} for module in (site.module, made.module)]
    change = parameters[0] != parameters[1]
    return Step(
        site, "convert", reason, choice, exactness, error, tensors, change, tuple(made.beside), made.warning
    )


def _nothing(x: Tensor) -> dict[str, Tensor]:
    return {}


def _error(
    old: nn.Module, new: nn.Module, norm: Norm, claimed: Exactness, beside: Beside
) -> tuple[float, bool]:
    """As :func:`site_error`; of what claims to be the same, float64 decides where float32 does not show it.

    In a channel where shift and mean cancel, float32 leaves little of the output of either.
    """
    error, agrees = site_error(old, new, norm, beside)
    if agrees or claimed not in UNCHANGED or any(t.dtype != torch.float32 for t in old.parameters()):
        return error, agrees
    old, new = (copy.deepcopy(bare(module)).double() for module in (old, new))
    return error, site_error(old, new, norm, beside)[1]


def _pairs(site: Site, choice: Choice | nn.Module, new: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Old and new norms whose outputs are to agree."""
    old = site.module
    tensors = [t for module in (old, new) for t in (*module.parameters(), *module.buffers())]
    meta = any(t.is_meta for t in tensors)
    if isinstance(choice, nn.Module):
        if meta:
            return []
        pairs = [(old, new)]
        if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors):  # in which little shows
            pairs.append((copy.deepcopy(bare(old)).float(), copy.deepcopy(bare(new)).float()))
        return pairs
    # Random parameters show more than those of today, which may be zero, rounded, NaN or, on meta, not there.
    twin = stand_in(old)
    drawn = (twin, replacement(dataclasses.replace(site, module=twin), choice).module)
    return [drawn] if meta else [(old, new), drawn]
