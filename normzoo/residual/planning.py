"""Planning a rewrite: which norms, writers and outputs of a model it is about."""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import checks
from ..conversion import bypass, report
from ..conversion.examine import examine
from ..conversion.recognise import Site
from ..conversion.rules import Names, seen, selector
from ..conversion.samples import Sample, fresh
from ..conversion.surgery import refuse_wrapped
from ..conversion.transfer import Choice, Refused, replacement
from ..conversion.trial import short, undisturbed
from ..conversion.tying import holders, untie
from ..model_source import sample_for
from ..zoo import find
from .compressing import BASES, CompressedEdit
from .consuming import Unread, check_owner, consumers
from .editing import Edit, refuse_sparse
from .finding import IDLE, Found, search
from .mapping import ModuleMap, mapped
from .probing import Probe
from .recording import Recording, narrowed, record
from .rewriting import Rewrite

WRITERS = ("bake", "parametrize")
TARGETS = ("pre_rms_norm", "pre_crms_norm")
TIED = ("activation", "untie")


def plan_rewrite(
    model: nn.Module,
    sample: Any = None,
    *,
    to: str = "pre_rms_norm",
    zero_mean_writers: str | None = None,
    tied: str | None = None,
    basis: str | None = None,
    include: Names = "*",
    exclude: Names = (),
    module_map: ModuleMap | None = None,
) -> Rewrite:
    """What :func:`normzoo.to_pre_rms_norm`, or the other, would do; the model is not touched.

    Args:
        to: ``"pre_rms_norm"`` or ``"pre_crms_norm"``.
        model, sample, zero_mean_writers, tied, basis, include, exclude, module_map: as there; None is the
            default.

    Raises:
        TypeError, ValueError: as there, but for the probes, which are run by ``verify()`` of the result; and
            an option is given that the other rewrite takes.
    """
    return planned(
        "plan_rewrite",
        model,
        sample,
        to=to,
        zero_mean_writers=zero_mean_writers,
        tied=tied,
        basis=basis,
        include=include,
        exclude=exclude,
        module_map=module_map,
    )


@torch.inference_mode(False)
def planned(
    caller: str,
    model: nn.Module,
    sample: Any,
    *,
    to: str,
    zero_mean_writers: str | None = None,
    tied: str | None = None,
    basis: str | None = None,
    include: Names = "*",
    exclude: Names = (),
    module_map: ModuleMap | None = None,
) -> Rewrite:
    """:func:`plan_rewrite` for a `caller`, which errors name."""
    check_module(model, caller)
    checks.choice(caller, "to", to, TARGETS)
    of_rms = {"zero_mean_writers": zero_mean_writers, "tied": tied, "module_map": module_map}
    for name, value in {"basis": basis}.items() if to == "pre_rms_norm" else of_rms.items():
        if value is not None:
            raise ValueError(f"{caller}: {name}={value!r} does not go with {to}")
    checks.choice(caller, "zero_mean_writers", zero_mean_writers := zero_mean_writers or "bake", WRITERS)
    # The output of an embedding cannot have one entry less, and its weight can.
    checks.choice(caller, "tied", tied := tied or ("activation" if to == "pre_rms_norm" else "untie"), TIED)
    checks.choice(caller, "basis", basis := basis or "truncate", BASES)
    refuse_wrapped(model, caller, "rewrite")
    baked = zero_mean_writers == "bake"
    sites, refused = _meant(model, include, exclude, caller)
    probe = Probe(model, _sample(model, sample, caller))
    try:
        twin = probe.twin()
    except Exception as error:  # such as a weight that old hooks of torch compute
        raise ValueError(f"{caller}: the model cannot be copied: {short(error)}") from error
    untied: list[str] = []
    recording, found = _recorded(twin, probe, sites, baked, caller)
    if tied == "untie":
        untied = [name for name in found.centered_outputs if _shares(twin, name)]
        for name in untied:
            untie(twin, f"{name}.weight")
        recording, found = _recorded(twin, probe, sites, baked, caller) if untied else (recording, found)
    probe.narrow = narrowed(recording, found.members)
    if module_map is not None:
        found = mapped(model, module_map, [site.name for site in sites], caller)
        probe.narrow = any(call.narrows for call in recording.calls)
    elif not baked:
        found = _in_both_modes(twin, probe, sites, caller)
    found.left |= refused
    if found.left and all(why == IDLE for why in found.left.values()) and not found.norms:
        raise ValueError(f"{caller}: no LayerNorm that is meant ran on the sample; pass one that reaches them")
    stay = sum(why != IDLE for why in found.left.values())
    if len(found.norms) < stay or not found.norms:
        raise ValueError(
            f"{caller}: {stay} of {len(found.norms) + len(found.left)} LayerNorms that are meant "
            f"cannot go without the mean, and the model is left as it was:{reasons(found.left)}"
            + (f"\n  name the others in include: {', '.join(sorted(found.norms))}" if found.norms else "")
        )
    if baked:
        _refuse_outside(model, found, caller)
    going = [site for site in sites if site.name in found.norms]
    if not baked:
        refuse_sparse(model, found.writers, caller)
    edit = Edit(going, found, not baked, untied)
    if to == "pre_crms_norm":
        edit = _compressed(model, edit, recording, basis, caller)
    return Rewrite(model, edit, found.left, recording.unread, probe)


def _refuse_outside(model: nn.Module, found: Found, caller: str) -> None:
    """Raises ValueError where a module that is no part of `model` has a tensor that is to be written."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    written = {name: tensors[name] for writer in found.writers for name in (writer.name, *writer.scale)}
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    inside = {id(table) for table in (*tables, tensors, written)}
    if not _held_elsewhere(written, tables):
        return
    for table in gc.get_referrers(*written.values()):
        if not isinstance(table, dict) or id(table) in inside:
            continue
        if any(isinstance(r, dict) and r.get("_parameters") is table for r in gc.get_referrers(table)):
            name = next(name for name, t in written.items() if any(t is held for held in table.values()))
            raise ValueError(
                f"{caller}: a module that is no part of the model has {name!r} too, and would go on with other "
                "numbers (a head whose weight is tied?); pass the whole model"
            )


def _held_elsewhere(written: Mapping[str, Tensor], tables: Iterable[Mapping[str, Tensor | None]]) -> bool:
    """Whether something beside `tables`, `written` and one mapping more holds a tensor.

    A look at all objects that there are, which would find it, takes a second.
    """
    held = Counter(id(t) for table in tables for t in table.values())
    local = object()
    alone = sys.getrefcount(local)
    for name in written:
        t = written[name]
        if sys.getrefcount(t) - alone > held[id(t)] + 2:
            return True
    return False


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
            check_owner(model, consumer, edit.untied)
        return CompressedEdit(edit.sites, edit.found, False, edit.untied, found, basis)
    except Unread as reason:
        raise ValueError(f"{caller}: {reason}; use to_pre_rms_norm, which leaves the readers alone") from reason


def check_module(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module")


def _meant(model: nn.Module, include: Names, exclude: Names, caller: str) -> tuple[list[Site], dict[str, str]]:
    """The norms of rows or channels that take a mean away, and why others of them have to stay."""
    found = examine(model, caller)
    families = ("layer",) if any(site.family == "layer" for site in found) else None
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
        else f"it has none that is recognised; {seen(found)}"
    )
    functional = bypass.functional_norms(model, [site.module for site in found])
    why += "".join(f"; {name} calls {', '.join(calls)} as a function" for name, calls in functional.items())
    raise ValueError(f"{caller}: the model has no LayerNorm over one dimension to be rewritten; {why}")


def _refusal(site: Site) -> str:
    """Why a norm cannot be replaced; empty where it can."""
    try:
        replacement(site, Choice(find("rms_norm")))
    except Refused as reason:
        return str(reason)
    return f"{site.outside} holds it too, outside of the module tree" if site.outside else ""


def _sample(model: nn.Module, sample: Any, caller: str) -> Sample:
    tensors = (*model.parameters(), *model.buffers())
    if any(t.is_meta for t in tensors):
        raise ValueError(
            f"{caller}: the model is on the meta device, where nothing can be shown; load it first"
        )
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            f"{caller}: tensors of the model were made in torch.inference_mode() and cannot be written; load "
            "it outside of that"
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
        _, trained = _recorded(twin.train(), probe, sites, False, caller)
        _, found = _recorded(twin.eval(), probe, sites, False, caller, trained.centered_outputs)
        alone = {name: why for name, why in trained.left.items() if name not in found.left}
        left |= found.left | {name: f"{why}, in training mode alone" for name, why in alone.items()}
        if found.norms == trained.norms:
            break
        # What writes a stream that breaks in one mode stays as it is.
        sites = [site for site in sites if site.name in found.norms & trained.norms]
    found = found.both(trained)
    found.left = left
    return found


def _recorded(
    twin: nn.Module,
    probe: Probe,
    sites: list[Site],
    baked: bool,
    caller: str,
    centered: Collection[str] = (),
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
    return recording, search(twin, recording, norms, baked=baked, centered=centered)


def _shares(model: nn.Module, name: str) -> bool:
    """Whether the weight of a module is that of another, too."""
    weight = model.get_submodule(name)._parameters.get("weight")
    return weight is not None and [leaf for _, leaf in holders(model, weight)].count("weight") > 1


def reasons(left: Mapping[str, str]) -> str:
    """A line a reason, with some of the norms that it holds for; reasons that differ in a number share one."""
    said: dict[str, str] = {}
    return report.reasons((name, said.setdefault(re.sub(r"\d+", "*", why), why)) for name, why in left.items())
