"""Which norms a conversion takes, and what each of them is to become."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..zoo import ZOO, Entry, find
from . import report
from .norm import FAMILIES, WEIGHT_FAMILIES
from .recognise import Site
from .transfer import TRANSFERS, Choice, Refused
from .weights import WeightSite

Names = str | Iterable[str]
Kinds = str | type[nn.Module] | Iterable[str | type[nn.Module]]
Layer = str | type[nn.Module] | functools.partial | None
Target = Layer | Callable[[Site], Layer | nn.Module] | Mapping[str, Any]
Chooser = Callable[[Site], Choice | nn.Module | None]

NORM, LAYER = Site.kind, WeightSite.kind

SAME = "same"
"""Stands for the layer with the mathematics of each norm."""

_REWRITES = {"prermsnorm": "pre_rms_norm", "precrmsnorm": "pre_crms_norm"}


def chooser(to: Target, options: Mapping[str, Any], found: Sequence[Site]) -> Chooser:
    """A function that says what a site is to become, None where it is to stay; it may raise Refused.

    Raises:
        TypeError, ValueError: `to` or `options` mean nothing; a rule of `to` matches none of the sites `found`.
    """
    if not isinstance(to, Mapping):
        return _one(to, options)
    rules = {key: (_one(target, options), kinds(target)) for key, target in to.items()}
    for key in rules:
        if not isinstance(key, str):
            raise TypeError(f"convert: to has the key {key!r}; keys must be names, globs or 're:' expressions")
        if key != "_default" and not any(matches(key, site.names) for site in found):
            raise ValueError(f"convert: the rule {key!r} matches no {kind_of(found)}; {seen(found)}")

    def choose(site: Site) -> Choice | nn.Module | None:
        for fits in _PRECEDENCE:
            for key, (target, about) in rules.items():
                if fits(key, site.names) and (not about or site.kind in about):
                    return target(site)
        return None

    return choose


def kinds(to: Target) -> set[str]:
    """What `to` is about: norms, layers whose weight can be standardized, or both; nothing where all stay.

    Raises:
        ValueError: a layer has a name or class that there is not.
    """
    if isinstance(to, Mapping):
        return {kind for target in to.values() for kind in kinds(target)}
    to = to.func if isinstance(to, functools.partial) else to
    if to is None:
        return set()
    return {LAYER if isinstance(to, (str, type)) and to != SAME and _entry(to).carriers else NORM}


def kind_of(found: Sequence[Site]) -> str:
    """A word for what all of `found` are."""
    return LAYER if any(site.kind == LAYER for site in found) else NORM


def _is_exact(key: str, names: Sequence[str]) -> bool:
    return key in names


def _is_glob(key: str, names: Sequence[str]) -> bool:
    return not key.startswith("re:") and any(fnmatchcase(name, key) for name in names)


def _is_expression(key: str, names: Sequence[str]) -> bool:
    return key.startswith("re:") and any(re.fullmatch(key[3:], name) for name in names)


def _is_default(key: str, names: Sequence[str]) -> bool:
    return key == "_default"


_PRECEDENCE = (_is_exact, _is_glob, _is_expression, _is_default)


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a name, glob or ``re:`` expression fits one of `names`."""
    return any(fits(pattern, names) for fits in _PRECEDENCE[:3])


def _one(to: Any, options: Mapping[str, Any]) -> Chooser:
    if to is None:
        return lambda site: None
    if isinstance(to, functools.partial):
        if to.args:
            raise TypeError(f"convert: {to} has positional arguments; pass them by name")
        return _one(to.func, {**to.keywords, **options})
    if to == SAME:
        return lambda site: _same(site, options)
    if isinstance(to, (str, type)):
        choice = _choice(to, options)
        return lambda site: choice
    if callable(to) and not isinstance(to, nn.Module):
        return lambda site: _answer(to, site, options)
    raise TypeError(
        f"convert: to is {report.a(type(to).__name__)}; it must be the name or the class of a layer, a "
        "function of a site, or a mapping of names to these"
    )


def _answer(to: Callable[[Site], Any], site: Site, options: Mapping[str, Any]) -> Choice | nn.Module | None:
    """What a function of the user says of a site; it is asked of known norms only."""
    if site.norm is None:
        raise Refused(site.note)
    answer = to(site)
    if answer is site.module:
        return None
    if isinstance(answer, nn.Module):
        return answer
    if answer is None or isinstance(answer, (str, type, functools.partial)):
        return _one(answer, options)(site)
    raise TypeError(
        f"convert: to returned {report.a(type(answer).__name__)} for {site.name!r}; it must return a module, "
        "the name or the class of a layer, or None"
    )


def _same(site: Site, options: Mapping[str, Any]) -> Choice:
    for rule in TRANSFERS.values():
        if rule.same and rule.family == site.family:
            return _choice(rule.target, options)
    raise Refused(f"normzoo has no layer yet that computes {report.a(site.family)} norm")


def _choice(to: str | type[nn.Module], options: Mapping[str, Any]) -> Choice:
    entry = _entry(to)
    named = to if isinstance(to, type) else entry.called(to)
    if entry.carriers:  # what torch's class takes, the old layer says
        parameters = inspect.signature(entry.carriers[0]).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    else:
        known = [name for name in inspect.signature(entry.cls).parameters if name not in ("device", "dtype")]
    for option in options:
        if option not in known:
            called = entry.name if entry.carriers else entry.cls.__name__
            raise TypeError(f"convert: {called} takes no {option!r}; it takes {', '.join(known)}")
    return Choice(entry, options, named if entry.others or named in entry.carriers else None)


def _entry(to: str | type[nn.Module]) -> Entry:
    if isinstance(to, str):
        if rewrite := _REWRITES.get(to.replace("_", "").lower()):
            raise ValueError(
                f"convert: {to!r} is no layer but a rewrite of a whole model, which keeps its function; call "
                f"normzoo.to_{rewrite}(model, sample)"
            )
        return find(to, "convert", f", or {SAME!r}")
    entry = next((entry for entry in ZOO if to in entry.exported), None)
    if entry is not None:
        return entry
    possible = ", ".join(entry.name for entry in ZOO)
    raise ValueError(
        f"convert: {to.__module__}.{to.__qualname__} is not a layer of normzoo; use one of {possible}, or a "
        "function of a site that returns a module"
    )


def selector(
    include: Names,
    exclude: Names,
    types: Kinds | None,
    where: Callable[[str, nn.Module], bool] | None,
    found: Sequence[Site],
    caller: str = "convert",
) -> Callable[[Site], bool]:
    """Whether a site passes all of the filters; errors name `caller`.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: a pattern or the name of a class matches none of the sites `found`.
    """
    what = kind_of(found)
    includes, excludes = (
        patterns(caller, name, value) for name, value in (("include", include), ("exclude", exclude))
    )
    for pattern in (*includes, *excludes):
        if pattern != "*" and not any(matches(pattern, site.names) for site in found):
            argument = "include" if pattern in includes else "exclude"
            raise ValueError(f"{caller}: {pattern!r} in {argument} matches no {what}; {seen(found)}")
    wanted = None if types is None else _several(caller, "types", types, (str, type))
    families = (*(WEIGHT_FAMILIES if what == LAYER else ()), *FAMILIES)
    for kind in wanted or ():
        if isinstance(kind, str) and kind not in families and not any(_is_kind(site, kind) for site in found):
            raise ValueError(
                f"{caller}: {kind!r} in types is no family ({', '.join(families)}) and no class of a {what}; "
                f"{seen(found)}"
            )
    if where is not None and not callable(where):
        raise TypeError(
            f"{caller}: where is {report.a(type(where).__name__)}; it must be a function of name and module"
        )

    def selected(site: Site) -> bool:
        return (
            any(matches(pattern, site.names) for pattern in includes)
            and not any(matches(pattern, site.names) for pattern in excludes)
            and (wanted is None or any(_is_kind(site, kind) for kind in wanted))
            and (where is None or bool(where(site.name, site.module)))
        )

    return selected


def patterns(caller: str, argument: str, value: Any) -> tuple[str, ...]:
    """Names, globs or ``re:`` expressions, given as one or several."""
    return _several(caller, argument, value, (str,))


def _several(caller: str, argument: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    what = "names, globs or 're:' expressions" if kinds == (str,) else "families, class names or classes"
    if not isinstance(value, (*kinds, Iterable)):
        raise TypeError(f"{caller}: {argument} is {value!r}; it must be {what}, one or several")
    values = (value,) if isinstance(value, kinds) else tuple(value)
    for one in values:
        if not isinstance(one, kinds):
            raise TypeError(f"{caller}: {argument} holds {one!r}; it must hold {what}")
    return values


def _is_kind(site: Site, kind: str | type[nn.Module]) -> bool:
    if isinstance(kind, type):
        return isinstance(site.module, kind)
    return kind in (site.family, type(site.module).__name__)


def seen(found: Sequence[Site]) -> str:
    """The classes of what was found in a model in a sentence, with their number."""
    counts = Counter(site.source for site in found)
    listed = ", ".join(f"{count} {source}" for source, count in sorted(counts.items()))
    return f"{kind_of(found)} classes seen: {listed or 'none'}"
