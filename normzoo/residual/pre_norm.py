"""``to_pre_rms_norm``: which norms, writers and outputs of a model a rewrite is about."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import checks
from ..conversion import report
from ..conversion.examine import examine
from ..conversion.proof import Sample, fresh
from ..conversion.recognise import Site
from ..conversion.rules import Names, selector
from ..conversion.surgery import refuse_wrapped
from ..conversion.transfer import Choice, Refused, replacement
from ..conversion.trial import short, undisturbed
from ..model_source import sample_for
from ..zoo import find
from .compressing import BASES, CompressedEdit
from .consuming import Unread, check_owner, consumers
from .editing import Edit, untie
from .finding import IDLE, Found, search
from .mapping import ModuleMap, mapped
from .probing import Probe, Unshown
from .recording import Recording, narrowed, record
from .rewriting import Rewrite

logger = logging.getLogger("normzoo")

WRITERS = ("bake", "parametrize")
TARGETS = ("pre_rms_norm", "pre_crms_norm")
TIED = ("activation", "untie")


def to_pre_rms_norm(
    model: nn.Module,
    sample: Any = None,
    *,
    zero_mean_writers: str = "bake",
    tied: str = "activation",
    include: Names = "*",
    exclude: Names = (),
    module_map: ModuleMap | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Turn the LayerNorms of a Pre-LN transformer into RMSNorms without changing its function.

    A LayerNorm that only sees rows of mean zero is an RMSNorm. In a Pre-LN transformer nothing but LayerNorms
    reads the residual stream, so that the mean of its rows does not matter, and what writes it (embeddings, the
    last linear map of every attention and MLP) can be made to write rows of mean zero. The model is run once
    on `sample`, and its streams are followed operator by operator; norms whose stream is read or written by
    anything else stay as they are. Three probes in float64 have to show that the function is the same.

    Args:
        model: is changed in place. In eval mode or not; not wrapped, not on the meta device.
        sample: an input of the model; a tuple is taken as positional, a mapping as keyword arguments. Or a
            function that calls the model it is given. None makes one for models of Hugging Face and timm.
        zero_mean_writers: ``"bake"`` takes the means out of the weights once, which costs nothing and is for
            inference: training goes another way from there. ``"parametrize"`` keeps the weights and takes their
            mean away in every forward: training is that of the Pre-LN model, at a pass over these weights a
            step. Behind dropout in the stream the mean is taken away in every forward, instead.
        tied: where an embedding shares its weight with the head, ``"activation"`` keeps it and takes the mean
            of what the embedding returns away; ``"untie"`` gives the embedding a weight of its own.
        include, exclude: names, globs or ``"re:..."`` of the norms that are meant.
        module_map: what a run does not show, such as the stream through an operator of your own, by names,
            globs or ``"re:..."``: ``norms``; ``writers``, modules or parameters; and ``centered_outputs``,
            modules whose output has its mean taken away. It goes in place of the search; the probes have to
            hold as well.
        inplace: False rewrites a deep copy.

    Returns:
        `model`. The logger ``normzoo`` has the account.

    Raises:
        TypeError, ValueError: an argument does not fit; the model does not run on `sample`, or is wrapped;
            more of the norms that are meant have to stay than can go, with the reasons; a probe failed. The
            model is left as it was.

    Source: arXiv:2305.14858.
    """
    _check_module(model, "to_pre_rms_norm")
    if not inplace:
        model = copy.deepcopy(model)
    rewrite = plan_rewrite(
        model,
        sample,
        zero_mean_writers=zero_mean_writers,
        tied=tied,
        include=include,
        exclude=exclude,
        module_map=module_map,
        caller="to_pre_rms_norm",
    )
    return _carried_out(rewrite, "to_pre_rms_norm")


def to_pre_crms_norm(
    model: nn.Module,
    sample: Any = None,
    *,
    basis: str = "truncate",
    include: Names = "*",
    exclude: Names = (),
    inplace: bool = True,
) -> nn.Module:
    """Turn the LayerNorms of a Pre-LN transformer into CRMSNorms: the residual stream has one entry less.

    As :func:`normzoo.to_pre_rms_norm`, for inference. A row of mean zero is known by all of its entries but
    one, so that everything that writes the stream makes one less, and everything that reads a norm takes one
    less. Weight and bias of the norms go into the weights that read them; a linear map without bias may get
    one. An embedding that shares its weight with the head gets one of its own.

    Rows of an odd number of entries are slow on most hardware; where speed is the aim, take
    :func:`normzoo.to_pre_rms_norm`.

    Args:
        model, sample, include, exclude, inplace: as in :func:`normzoo.to_pre_rms_norm`.
        basis: ``"truncate"``, as in the paper: the last entry is left out, and norms become
            :class:`normzoo.CRMSNorm`. ``"orthonormal"``: rows are turned, lengths stay, norms become
            :class:`normzoo.RMSNorm`, and numbers round less.

    Returns:
        `model`. Its parameters are the same objects with other shapes: make optimizers anew.

    Raises:
        TypeError, ValueError: as in :func:`normzoo.to_pre_rms_norm`; and where something but a linear map reads
            a norm, or the mean of an output would have to be taken away in every forward.

    Source: arXiv:2305.14858.
    """
    _check_module(model, "to_pre_crms_norm")
    if not inplace:
        model = copy.deepcopy(model)
    rewrite = plan_rewrite(
        model,
        sample,
        to="pre_crms_norm",
        tied="untie",
        basis=basis,
        include=include,
        exclude=exclude,
        caller="to_pre_crms_norm",
    )
    return _carried_out(rewrite, "to_pre_crms_norm")


def _carried_out(rewrite: Rewrite, caller: str) -> nn.Module:
    try:
        proof = rewrite.verify()
    except Unshown as reason:
        raise ValueError(f"{caller}: {reason}") from reason
    except Exception as error:  # a model that goes by the number of its features
        raise ValueError(f"{caller}: the rewritten model does not run: {short(error)}") from error
    if not proof.passed:
        raise ValueError(f"{caller}: {proof}; the model is left as it was")
    model = rewrite.apply()
    tell(rewrite, str(proof))
    return model


def tell(rewrite: Rewrite, proof: str) -> None:
    """Tells the log what was done, as a warning where it is not all that a user may take it for."""
    logger.info("%s: %s\n%s", rewrite.target, rewrite.summary(), proof)
    if rewrite.left:
        logger.warning("%s: norms that stay:%s", rewrite.target, reasons(rewrite.left))
    if rewrite.model.training and not rewrite.edit.parametrized:
        logger.warning(
            "%s: the model is in training mode, and its weights were centered once: training goes another way "
            'than that of the LayerNorms; zero_mean_writers="parametrize" keeps it',
            rewrite.target,
        )


def plan_rewrite(
    model: nn.Module,
    sample: Any = None,
    *,
    to: str = "pre_rms_norm",
    zero_mean_writers: str = "bake",
    tied: str = "activation",
    basis: str = "truncate",
    include: Names = "*",
    exclude: Names = (),
    module_map: ModuleMap | None = None,
    caller: str = "plan_rewrite",
) -> Rewrite:
    """What :func:`normzoo.to_pre_rms_norm`, or the other, would do; the model is not touched.

    Args:
        to: ``"pre_rms_norm"`` or ``"pre_crms_norm"``.
        model, sample, zero_mean_writers, tied, basis, include, exclude, module_map: as there.
        caller: begins the errors.

    Raises:
        TypeError, ValueError: as there, but for the probes, which are run by ``verify()`` of the result.
    """
    _check_module(model, caller)
    checks.choice(caller, "zero_mean_writers", zero_mean_writers, WRITERS)
    checks.choice(caller, "tied", tied, TIED)
    checks.choice(caller, "to", to, TARGETS)
    checks.choice(caller, "basis", basis, BASES)
    refuse_wrapped(model, caller, "rewrite")
    baked = zero_mean_writers == "bake"
    sites, refused = _meant(model, include, exclude, caller)
    probe = Probe(model, _sample(model, sample, caller))
    try:
        twin = probe.twin()
    except Exception as error:  # such as a weight that old hooks of torch compute
        raise ValueError(f"{caller}: the model cannot be copied: {short(error)}") from error
    untied: list[str] = []
    recording, found = _search(twin, probe, sites, baked, caller)
    if tied == "untie":
        untied = [name for name in found.centered_outputs if _shares(twin, name)]
        for name in untied:
            untie(twin, name)
        recording, found = _search(twin, probe, sites, baked, caller) if untied else (recording, found)
    probe.narrow = narrowed(recording, found.members)
    if module_map is not None:
        found = mapped(model, module_map, [site.name for site in sites], caller)
        probe.narrow = any(call.narrows for call in recording.calls)
    elif not baked:
        found = _in_both_modes(twin, probe, sites, caller)
    found.left |= refused
    stay = sum(why != IDLE for why in found.left.values())
    if len(found.norms) < stay or not found.norms:
        raise ValueError(
            f"{caller}: {stay} of {len(found.norms) + len(found.left)} LayerNorms that are meant "
            f"cannot go without the mean, and the model is left as it was:{reasons(found.left)}"
            + (f"\n  name the others in include: {', '.join(sorted(found.norms))}" if found.norms else "")
        )
    going = [site for site in sites if site.name in found.norms]
    edit = Edit(going, found, not baked, untied)
    if to == "pre_crms_norm":
        edit = _compressed(model, edit, recording, basis, caller)
    return Rewrite(model, edit, found.left, probe)


def _compressed(model: nn.Module, edit: Edit, recording: Recording, basis: str, caller: str) -> CompressedEdit:
    """The same where the stream has one entry less."""
    if always := [*edit.found.centered_outputs]:
        raise ValueError(
            f"{caller}: the mean of what {always[0]} returns has to be taken away in every forward, so that it "
            "cannot have one entry less; use to_pre_rms_norm"
        )
    try:
        found = consumers(recording, edit.found, edit.sites)
        for consumer in found:
            check_owner(model, consumer)
        return CompressedEdit(edit.sites, edit.found, False, edit.untied, found, basis)
    except Unread as reason:
        raise ValueError(f"{caller}: {reason}; use to_pre_rms_norm, which leaves the readers alone") from reason


def _check_module(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")


def _meant(model: nn.Module, include: Names, exclude: Names, caller: str) -> tuple[list[Site], dict[str, str]]:
    """The norms of rows or channels that take a mean away, and why others of them have to stay."""
    found = examine(model, caller)
    include = (include,) if isinstance(include, str) else tuple(include)
    families = ("layer",) if _has_layer(found) else None
    chosen = selector(include, exclude, families, None, found, caller=caller)
    sites = [
        site
        for site in found
        if site.norm and site.family == "layer" and len(site.norm.shape or ()) == 1 and chosen(site)
    ]
    if sites:
        refused = {site.name: why for site in sites if (why := _refusal(site))}
        return [site for site in sites if site.name not in refused], refused
    rms = sum(site.family in ("rms", "crms") for site in found)
    why = (
        "it has RMSNorms, which do not take the mean away: centering its weights would change what it computes"
        if rms
        else "it has none that is recognised"
    )
    raise ValueError(f"{caller}: the model has no LayerNorm over one dimension to be rewritten; {why}")


def _refusal(site: Site) -> str:
    """Why a norm cannot be replaced; empty where it can."""
    try:
        replacement(site, Choice(find("rms_norm")))
    except Refused as reason:
        return str(reason)
    return f"{site.outside} holds it too, outside of the module tree" if site.outside else ""


def _has_layer(found: list[Site]) -> bool:
    return any(site.family == "layer" for site in found)


def _sample(model: nn.Module, sample: Any, caller: str) -> Sample:
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{caller}: the model is on the meta device, where nothing can be shown; load it first"
        )
    if sample is None:
        sample = sample_for(model)
    if sample is None:
        raise ValueError(
            f"{caller}: sample is None, and no input for {report.a(type(model).__name__)} is known; pass one, "
            "so that the model can be run"
        )
    return Sample(sample)


def _in_both_modes(twin: nn.Module, probe: Probe, sites: list[Site], caller: str) -> Found:
    """What keeps the function of a copy in training as well as in eval mode."""
    left: dict[str, str] = {}
    while True:
        _, trained = _search(twin.train(), probe, sites, False, caller)
        _, found = _search(twin.eval(), probe, sites, False, caller, trained.centered_outputs)
        alone = {name: why for name, why in trained.left.items() if name not in found.left}
        left |= found.left | {name: f"{why}, in training mode alone" for name, why in alone.items()}
        if found.norms == trained.norms:
            break
        # What writes a stream that breaks in one mode stays as it is.
        sites = [site for site in sites if site.name in found.norms & trained.norms]
    found = found.both(trained)
    found.left = left
    return found


def _search(
    twin: nn.Module,
    probe: Probe,
    sites: list[Site],
    baked: bool,
    caller: str,
    ready: Collection[str] = (),
) -> tuple[Recording, Found]:
    """One run of a copy, and what it shows."""
    norms: dict[str, int] = {site.name: site.norm.axis for site in sites if site.norm}
    sample = Sample(pytree.tree_map(fresh, probe.sample.input))
    given = [t for t in pytree.tree_leaves(sample.input) if isinstance(t, Tensor)]
    buffers = [(b, b.clone()) for b in twin.buffers()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with undisturbed():
            recording = record(twin, lambda: sample.run(twin), given, norms)
    except Exception as error:  # it is code that nobody here has seen
        raise ValueError(
            f"{caller}: the model does not run on the sample, in float64 and "
            f"{'training' if twin.training else 'eval'} mode: {short(error)}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for b, value in buffers:
                b.copy_(value)
    return recording, search(twin, recording, norms, baked=baked, ready=ready)


def _shares(model: nn.Module, name: str) -> bool:
    """Whether the weight of a module is that of another, too."""
    weight = model.get_submodule(name)._parameters.get("weight")
    held = [
        module
        for module in model.modules()
        if weight is not None and module._parameters.get("weight") is weight
    ]
    return len(held) > 1


def reasons(left: Mapping[str, str]) -> str:
    """A line a reason, with some of the norms that it holds for; reasons that differ in a number share one."""
    said: dict[str, str] = {}
    return report.reasons((name, said.setdefault(re.sub(r"\d+", "*", why), why)) for name, why in left.items())
