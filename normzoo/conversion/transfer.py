"""What becomes of a norm: the rules that carry one kind to a layer of this library, and how true each is."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.rms import CRMSNorm
from ..zoo import Entry
from .adapted import adapted
from .luggage import bring_along, hooks, obstacle
from .norm import Norm
from .recognise import DIMENSIONS, Site
from .report import a


class Exactness(str, enum.Enum):
    """What a conversion keeps of the function that the norm computes, up to rounding."""

    EXACT = "exact"
    """The same in training and in eval mode."""
    EVAL_EXACT = "eval-exact"
    """The same outputs in eval mode; training goes another way."""
    APPROXIMATE = "approximate"
    """Weights are kept, the function is another one."""
    CALIBRATE = "needs calibration"
    """Running statistics start unknown; run data through the model before eval mode."""
    REINITIALISED = "re-initialised"
    """Nothing that was learnt is kept."""


UNCHANGED = (Exactness.EXACT, Exactness.EVAL_EXACT)
"""Where the outputs in eval mode stay what they were."""


class Refused(Exception):
    """Why a site cannot be converted."""


class NotMeant(Refused):
    """Why a conversion is not about a site at all."""


@dataclass
class Carried:
    """How the new layer is made from the old norm."""

    arguments: dict[str, Any]
    """For the constructor."""
    kept: dict[str, str] = field(default_factory=dict)
    """Attributes of the new layer that hold the very tensors of the old one, by its names."""
    converted: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Attributes of the new layer that were computed: the name of the old tensor, and the value."""
    dropped: tuple[str, ...] = ()
    """Tensors and attributes of the old norm that mean nothing to the new layer."""
    growing: tuple[str, ...] = ()
    """Of `kept`, what is converted where the options ask for more entries: the old ones come first."""
    begin: Callable[[nn.Module], None] | None = None
    """Changes the start values of the new layer, before it takes over tensors."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What to set on the new layer, which its constructor has no argument for."""
    in_training: tuple[str, ...] = ()
    """Constructor arguments that make no difference in eval mode."""
    any_rank: bool = False
    """The layer takes (N, C, \\*), though the norm takes inputs of some ranks alone."""
    over_channels: bool = False
    """The layer takes rows, and the norm the channels of (N, C, \\*)."""
    exactness: Exactness | None = None
    """Where this norm makes it another than the rule's."""
    note: str = ""
    told: Callable[[Any], str] | None = None
    """Says what else to know, of the new layer."""
    warning: str = ""
    """What `convert` warns of though the function stays; it follows "converted norms"."""
    provided: dict[str, Any] = field(default_factory=dict)
    """Attributes that the new layer must have; otherwise the conversion is approximate."""
    one_of: tuple[str, ...] = ()
    """Constructor arguments that say the same thing: one in the options overrules all that are carried."""

    cls: type[nn.Module] | None = None
    """The class of the layer, where the old one decides it."""
    after: tuple[str, ...] | None = None
    """Children of the norm that the layer applies in its turn, where those are not all that the norm does."""
    beside: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Other modules of the model, and what takes the place of each."""


Carry = Callable[..., Carried]
"""A function of the :class:`Norm` and the module, and of options and site where the rule goes by them."""


@dataclass(frozen=True)
class Transfer:
    """A rule: norms of `family` become the layer called `target`."""

    family: str
    target: str
    exactness: Exactness
    note: str
    carry: Carry
    same: bool
    """Whether the two are the same layer."""
    by_options: bool = False
    """Whether `carry` is told what the caller wants of the new layer."""
    by_site: bool = False
    """Whether it is told the :class:`Site`, too."""


TRANSFERS: dict[tuple[str, str], Transfer] = {}


def transfer(
    family: str,
    target: str,
    exactness: Exactness,
    note: str = "",
    *,
    same: bool = False,
    by_options: bool = False,
    by_site: bool = False,
) -> Callable[[Carry], Carry]:
    """Makes the decorated function the rule from norms of `family` to the ZOO entry called `target`.

    The function may raise :class:`Refused`. It takes a norm and its module; with `by_options` the constructor
    arguments that the caller gave for the layer, too, and with `by_site` the site.
    """

    def add(carry: Carry) -> Carry:
        TRANSFERS[family, target] = Transfer(family, target, exactness, note, carry, same, by_options, by_site)
        return carry

    return add


@dataclass(frozen=True)
class Choice:
    """The layer that a norm is to become."""

    entry: Entry
    options: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments that overrule those of the norm."""
    cls: type[nn.Module] | None = None
    """The class that was asked for, where the entry has several."""


@dataclass(frozen=True)
class Replacement:
    """A new layer and what it owes to the old norm."""

    module: nn.Module
    kept: dict[str, str]
    """Tensors of the new layer that are objects of the old norm, by its names."""
    converted: dict[str, str]
    """Tensors of the new layer that were computed from those of the old norm, by its names."""
    new: tuple[str, ...]
    """Tensors of the new layer that come from nowhere."""
    lost: tuple[str, ...]
    """Tensors of the old norm that have no place in the new layer."""
    exactness: Exactness
    note: str = ""
    warning: str = ""
    beside: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Other modules of the model, and what takes the place of each."""


def replacement(site: Site, choice: Choice | nn.Module) -> Replacement:
    """What takes the place of `site`; the model is not touched.

    Args:
        choice: the layer to make, or a module that takes the place as it is.

    Raises:
        Refused: no rule leads from the norm to the layer, or this one does not fit.
    """
    old, norm = site.module, site.norm
    if reason := obstacle(old):
        raise Refused(reason)
    if isinstance(choice, nn.Module):
        return _ready_made(old, choice)
    if norm is None:
        raise Refused(site.note)
    rule = TRANSFERS.get((norm.family, choice.entry.name))
    if rule is None:
        known = [target for family, target in TRANSFERS if family == norm.family]
        several = f"{', '.join(known[:-1])} and {known[-1]}" if known[1:] else "".join(known)
        only = f", only to {several}" if known else ""
        raise Refused(
            _elsewhere(norm, choice.entry)
            or f"no rule takes {a(norm.family)} norm to {choice.entry.name}{only}"
        )
    told = (choice.options,) if rule.by_options else ()
    carried = rule.carry(norm, old, *told, *((site,) if rule.by_site else ()))
    sources = {**carried.kept, **{name: source for name, (source, _) in carried.converted.items()}}
    for name in sources.values():
        if name not in _all(old):
            raise Refused(f"its {name} is computed, not stored; remove what computes it (weight norm?) first")
        if name in old._non_persistent_buffers_set:
            raise Refused(f"its {name} is not in the state dict, and that of the layer would be")
    new = _construct(old, norm, carried, choice)
    kept: dict[str, str] = {}
    converted: dict[str, str] = {}
    lost: tuple[str, ...] = ()
    exactness, note = carried.exactness or rule.exactness, carried.note or rule.note
    if any(getattr(new, name) != value for name, value in carried.provided.items()):
        exactness, note = Exactness.APPROXIMATE, rule.note
    notes = [note, carried.told(new) if carried.told else ""]
    if carried.begin is not None:
        carried.begin(new)
    for name, value in carried.attributes.items():
        setattr(new, name, value)
    renamed: dict[str, list[str]] = {}
    for name, source in sources.items():
        value, place = _at(old, source), _at(new, name)
        if place is None:  # the options want no weight, or no bias
            lost += (source,)
            continue
        _, computed = carried.converted.get(name, (source, None))
        if value.shape != place.shape:
            if name not in carried.growing:
                raise Refused(
                    f"its {source} has shape {(*value.shape,)}, and {name} of the layer {(*place.shape,)}"
                )
            if len(place) < len(value):
                raise Refused(
                    f"its {source} has {len(value)} entries and that of the layer {len(place)}; there can be "
                    "more, but not fewer"
                )
            computed = torch.cat((value.detach(), place.detach()[len(value) :].to(value)))
        if computed is not None:
            converted[name] = source
            _put(new, name, computed, value.requires_grad)
        else:
            kept[name] = source
            _put(new, name, value, value.requires_grad)
        if name != source and not (computed is not None and source in norm.statistics):
            renamed.setdefault(source, []).append(name)
    notes.append(_renamed(renamed))
    fresh = tuple(name for name in _all(new) if name not in sources)
    lost += tuple(name for name in carried.dropped if name in _own(old) and name not in sources.values())
    lost += bring_along(old, new, leave={*sources.values(), *carried.dropped})
    changed = {k for k, v in choice.options.items() if carried.arguments.get(k, v) != v}
    if exactness in UNCHANGED and changed:
        exactness = Exactness.APPROXIMATE
        if changed <= {*carried.in_training}:
            exactness = Exactness.EVAL_EXACT
            notes.append(f"{_said(choice.options, changed)} from the old norm in training")
    note = "; ".join(filter(None, notes))
    return Replacement(new, kept, converted, fresh, lost, exactness, note, carried.warning, carried.beside)


def _renamed(names: Mapping[str, list[str]]) -> str:
    """A phrase about tensors that have other names in the new layer."""
    pairs = [f"{source} -> {' and '.join(found)}" for source, found in names.items()]
    if sum(map(len, names.values())) > 1:
        return f"renamed, in the state dict too: {', '.join(pairs)}"
    return "".join(
        f"{source} is called {name} from now on, in the state dict too" for source, (name,) in names.items()
    )


def _elsewhere(norm: Norm, entry: Entry) -> str:
    """Why a norm alone cannot become a layer, and what does that instead; or nothing."""
    if entry.cls is CRMSNorm and norm.family in ("layer", "rms"):
        return (
            f"{entry.name} takes rows without their last entry, so that all that writes and reads them has to "
            "change with the norm: call normzoo.to_pre_crms_norm"
        )
    _, *parameters = inspect.signature(entry.cls.forward).parameters.values()
    # What normzoo.inputs gives has a default.
    if needed := [p.name for p in parameters[1:] if p.default is p.empty]:
        return (
            f"{entry.name} takes {' and '.join(needed)} with every call, from the code of the model, and no "
            f"conversion writes that: put the layer there by hand, and call it as "
            f"norm({', '.join(p.name for p in parameters)})"
        )
    return ""


def _said(options: Mapping[str, Any], names: Collection[str]) -> str:
    """That the options called `names` differ; a process group has no value worth reading."""
    said = [name if name == "process_group" else f"{name}={options[name]!r}" for name in sorted(names)]
    return f"{' and '.join(said)} {'differ' if said[1:] else 'differs'}"


_ONLY_WITH = {"process_group": "sync", "update_rate": "estimate", "order": "estimate"}
"""Constructor arguments that are an error where another is False."""


def _construct(old: nn.Module, norm: Norm, carried: Carried, choice: Choice) -> nn.Module:
    cls = _class(norm, carried, choice)
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    place = {} if like is None else {"device": like.device, "dtype": like.dtype}
    arguments = {**carried.arguments, **choice.options}
    overruled = {*carried.one_of} if {*carried.one_of} & {*choice.options} else set()
    overruled |= {name for name, switch in _ONLY_WITH.items() if arguments.get(switch) is False}
    for name in overruled - {*choice.options}:
        arguments.pop(name, None)
    parameters = inspect.signature(cls).parameters.values()
    if needed := [p.name for p in parameters if p.default is p.empty and p.name not in arguments]:
        raise Refused(f"{choice.entry.name} needs {' and '.join(needed)}; pass {needed[0]}=")
    try:
        new = cls(**place | arguments)
    except ValueError as error:
        raise Refused(str(error)) from error
    trained = [p.requires_grad for p in old.parameters()]
    if trained and not any(trained):
        new.requires_grad_(False)
    return new


def _class(norm: Norm, carried: Carried, choice: Choice) -> type[nn.Module]:
    """The class of the layer that takes the inputs of the norm."""
    if carried.cls is not None:
        return carried.cls
    entry, after = choice.entry, norm.after if carried.after is None else carried.after
    if not entry.others:
        return adapted(choice.cls or entry.cls, carried.over_channels, after, False)
    for cls in entry.classes:
        if norm.dims is not None and not carried.any_rank and DIMENSIONS[cls] == norm.dims:
            if choice.cls not in (None, cls):
                raise Refused(
                    f"it takes the inputs of {a(cls.__name__)}, not those of {a(choice.cls.__name__)}"
                )
            return adapted(cls, carried.over_channels, after, False)
    return adapted(choice.cls or entry.cls, carried.over_channels, after, choice.cls is None)


def _ready_made(old: nn.Module, new: nn.Module) -> Replacement:
    """A module made by the caller, which is as exact as it turns out to be."""
    held = {id(t): name for name, t in _own(old).items()}
    tensors = dict((*new.named_parameters(), *new.named_buffers()))
    kept = {name: held[id(t)] for name, t in tensors.items() if id(t) in held}
    fresh = tuple(name for name in tensors if name not in kept)
    lost = tuple(name for name in held.values() if name not in kept.values())
    new.train(old.training)
    left = [] if any(module is old for module in new.modules()) else hooks(old)
    note = f"its {', '.join(left)} stay behind" if left else ""
    return Replacement(new, kept, {}, fresh, lost, Exactness.EVAL_EXACT, note)


def _own(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))


def _all(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return dict((*parameters, *module.named_buffers(remove_duplicate=False)))


def _at(module: nn.Module, name: str) -> Any:
    """The attribute, which may be one of a child (``weight.param0``); None where there is no such child."""
    found: Any = module
    for part in name.split("."):
        found = None if found is None else getattr(found, part)
    return found


def _put(module: nn.Module, name: str, value: Tensor, trained: bool) -> None:
    """Makes `value` the parameter or buffer `name`; one of its kind stays the object it is."""
    child, _, name = name.rpartition(".")
    module = module.get_submodule(child)
    if name in module._buffers:
        module._buffers[name] = value.detach() if isinstance(value, nn.Parameter) else value
    elif isinstance(value, nn.Parameter):
        module._parameters[name] = value
    else:
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=trained)
