"""Recipes as text: read without trust, from JSON or from the header of a safetensors file, and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..conversion.report import a
from ..files import whole

VERSION = 1
KEY = "normzoo.recipe"
"""In the metadata of a safetensors file."""

_LONGEST = 100_000_000
"""Bytes of a recipe, and of a header, which in a safetensors file can have no more either."""
_DIMENSIONS = 16
_RANK = 8
"""The most dimensions of what a module returns: it is known in its forward alone, too late for an error."""
DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class Layer:
    """A layer of this library in a model."""

    names: tuple[str, ...]
    layer: str
    arguments: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict)
    """Its :func:`~normzoo.recipes.rebuilding.manner_of`."""
    children: tuple[str, ...] = ()
    """Children that its constructor does not make: those of the norm that it replaced."""
    attributes: tuple[str, ...] = ()
    """Attributes that it does not set either; it has them of that norm, if that has them."""
    resting: bool = False
    """Whether its track_running_stats was switched off after it was made."""
    frozen_from: dict[str, Any] | None = None
    """Of a frozen norm that can be given back: ``sources`` as luggage.FROZEN_FROM holds them, and, where that
    norm was a layer of this library itself, ``layer``, ``arguments`` and ``how``."""


@dataclass(frozen=True)
class Shape:
    """What is known about a tensor."""

    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False


@dataclass(frozen=True)
class Centered:
    """A module whose output has mean zero, see :func:`normzoo.centering.with_zero_mean`."""

    names: tuple[str, ...]
    dim: int


@dataclass(frozen=True)
class Parametrized:
    """A tensor with parametrizations: (name, arguments), or None for one that is not of this library."""

    names: tuple[str, ...]
    tensor: str
    chain: tuple[tuple[str, dict[str, Any]] | None, ...]


@dataclass(frozen=True)
class Recipe:
    """What a conversion made of a model."""

    layers: tuple[Layer, ...]
    identities: tuple[str, ...]
    """Modules that do nothing, of which some may stand where an activation was."""
    plain: dict[str, tuple[str, ...]]
    """By class, the convolutions and linear maps of torch, of which some may stand where a weight was
    standardized."""
    centered: tuple[Centered, ...]
    parametrized: tuple[Parametrized, ...]
    slow: tuple[str, ...]
    """torch's encoders and encoder layers whose fast path is turned off."""
    tensors: dict[str, Shape]
    """Every parameter and every buffer of the state dict, by all of its names."""
    ties: tuple[tuple[str, ...], ...]
    """Names that are one tensor."""

    def to_dict(self) -> dict[str, Any]:
        from .. import __version__

        return {
            "version": VERSION,
            "normzoo": __version__,
            "layers": [_layer_to_dict(each) for each in self.layers],
            "identities": [*self.identities],
            "plain": {name: [*names] for name, names in self.plain.items()},
            "centered_outputs": [{"names": [*each.names], "dim": each.dim} for each in self.centered],
            "parametrizations": [
                {"names": [*p.names], "tensor": p.tensor, "chain": [each and _link(each) for each in p.chain]}
                for p in self.parametrized
            ],
            "slow": [*self.slow],
            "tensors": {
                name: {"shape": [*t.shape], "dtype": t.dtype} | ({"buffer": True} if t.buffer else {})
                for name, t in self.tensors.items()
            },
            "ties": [[*names] for names in self.ties],
        }


def _link(link: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"layer": link[0], "arguments": link[1]}


def _layer_to_dict(each: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {"names": [*each.names], "layer": each.layer, "arguments": each.arguments}
    rest = {
        "how": each.how,
        "children": [*each.children],
        "attributes": [*each.attributes],
        "resting": each.resting,
        "frozen_from": each.frozen_from,
    }
    return found | {key: value for key, value in rest.items() if value}


def write(recipe: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, all of it or nothing; a file that is there is replaced."""
    with whole(path) as part:
        part.write_text("{\n" + ",\n".join(_lines(recipe)) + "\n}\n", encoding="utf-8")


def text_of(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _lines(recipe: Mapping[str, Any]) -> Iterator[str]:
    """A line for every layer and every tensor."""
    for key, value in recipe.items():
        shown = text_of(value)
        if isinstance(value, list) and value:
            shown = "[\n " + ",\n ".join(map(text_of, value)) + "\n]"
        elif isinstance(value, dict) and value:
            shown = "{\n " + ",\n ".join(f"{text_of(k)}: {text_of(v)}" for k, v in value.items()) + "\n}"
        yield f"{text_of(key)}: {shown}"


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """The recipe in a JSON file, in the header of a ``.safetensors`` file, or in a dict.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no recipe, one of another version, or one that is not in order.
    """
    if isinstance(source, Mapping):
        return parse(source)
    path = Path(source)
    try:
        if path.suffix == ".safetensors":
            return parse(_loads(_from_header(path)))
        if path.stat().st_size > _LONGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, and a recipe at most {_LONGEST}")
        return parse(_loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _from_header(path: Path) -> str:
    """The recipe in the metadata of a safetensors file: 8 bytes that tell the length of a header, and that."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LONGEST, size - 8):
            raise ValueError("it is no safetensors file: its header would be longer than it can be")
        header = _loads(file.read(length))
    found = header.get("__metadata__") if isinstance(header, dict) else None
    text = found.get(KEY) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"there is no recipe in its metadata, under {KEY!r}; `normzoo convert --out` and safetensors' "
            "metadata= put one there"
        )
    return text


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply for a recipe") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is no text, and so no recipe") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON, and so no recipe: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def parse(found: Any) -> Recipe:
    """A recipe, checked for form.

    Raises:
        ValueError: it is of another version, or something in it is missing, unknown, or of a wrong kind.
    """
    if not isinstance(found, Mapping) or "version" not in found:
        raise ValueError("it is no recipe: it must be an object with a version")
    version = found["version"]
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"it is a recipe of version {version!r}, and this release reads version {VERSION}; take the "
            "release of normzoo that wrote it, or a newer one"
        )
    top = _object("recipe", found, _TOP, ())
    tensors = {name: _shape(f"tensors[{name!r}]", each) for name, each in top["tensors"].items()}
    plain = {name: _names(f"plain[{name!r}]", names) for name, names in top["plain"].items()}
    recipe = Recipe(
        tuple(_layer(f"layers[{i}]", each) for i, each in enumerate(top["layers"])),
        _names("identities", top["identities"]),
        plain,
        tuple(_centered(f"centered_outputs[{i}]", each) for i, each in enumerate(top["centered_outputs"])),
        tuple(_parametrized(f"parametrizations[{i}]", each) for i, each in enumerate(top["parametrizations"])),
        _names("slow", top["slow"]),
        tensors,
        tuple(_names(f"ties[{i}]", each) for i, each in enumerate(top["ties"])),
    )
    _refuse_twice("layers", (name for each in recipe.layers for name in each.names))
    _refuse_twice("identities and plain", (*recipe.identities, *(n for names in plain.values() for n in names)))
    _refuse_twice("centered_outputs", (name for each in recipe.centered for name in each.names))
    _refuse_twice(
        "parametrizations", (f"{n}.{each.tensor}" for each in recipe.parametrized for n in each.names)
    )
    _refuse_twice("ties", (name for each in recipe.ties for name in each))
    for i, names in enumerate(recipe.ties):
        if unknown := [name for name in names if name not in tensors]:
            raise ValueError(f"ties[{i}] holds {unknown[0]!r}, which tensors does not")
        if len(names) < 2 or len({tensors[name] for name in names}) > 1:
            raise ValueError(f"ties[{i}] must hold several tensors of one shape, dtype and kind: {names}")
    return recipe


_Check = Callable[[str, Any], Any]


def _of(*kinds: type, what: str) -> _Check:
    def check(where: str, value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"{where} is {_short(value)}; it must be {what}")
        return value

    return check


_text, _list = _of(str, what="text"), _of(list, tuple, what="a list")
_whole, _flag, _dict = _of(int, what="an int"), _of(bool, what="true or false"), _of(dict, what="an object")


def _names(where: str, value: Any) -> tuple[str, ...]:
    found = tuple(_text(f"{where}[{i}]", each) for i, each in enumerate(_list(where, value)))
    _refuse_twice(where, found)
    return found


def _several_names(where: str, value: Any) -> tuple[str, ...]:
    if not (found := _names(where, value)):
        raise ValueError(f"{where} is empty; it must hold a name")
    return found


def _object(where: str, value: Any, checks: Mapping[str, _Check], optional: Iterable[str]) -> dict[str, Any]:
    """An object with these keys, of which some may be absent, and with no others."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {_short(value)}; it must be an object")
    if unknown := [key for key in value if key not in checks]:
        raise ValueError(
            f"{where} holds {_short(unknown[0])}, which is unknown; it may hold {', '.join(checks)}"
        )
    if missing := checks.keys() - value.keys() - {*optional}:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    return {key: checks[key](f"{where}.{key}", each) for key, each in value.items()}


_TOP: dict[str, _Check] = {
    "version": _whole,
    "normzoo": _text,
    **{
        name: _list for name in ("layers", "identities", "centered_outputs", "parametrizations", "slow", "ties")
    },
    "plain": _dict,
    "tensors": _dict,
}
_MADE: dict[str, _Check] = {"layer": _text, "arguments": _dict}


def _how(where: str, value: Any) -> dict[str, Any]:
    checks: dict[str, _Check] = {"over_channels": _flag, "then": _names, "any_rank": _flag}
    found = _object(where, value, checks, ())
    return found | {"then": [*found["then"]]}


def _frozen_from(where: str, value: Any) -> dict[str, Any]:
    found = _object(where, value, {"sources": _dict, **_MADE, "how": _how}, (*_MADE, "how"))
    for name, source in found["sources"].items():
        _text(f"{where}.sources[{name!r}]", source)
    if found.keys() > {"sources"}:
        _object(where, {key: found[key] for key in found if key != "sources"}, {**_MADE, "how": _how}, ["how"])
    return found


_LAYER: dict[str, _Check] = {
    "names": _several_names,
    **_MADE,
    "how": _how,
    "children": _names,
    "attributes": _names,
    "resting": _flag,
    "frozen_from": _frozen_from,
}


def _layer(where: str, value: Any) -> Layer:
    found = _object(where, value, _LAYER, ("how", "children", "attributes", "resting", "frozen_from"))
    return Layer(**found)


def _centered(where: str, value: Any) -> Centered:
    found = _object(where, value, {"names": _several_names, "dim": _whole}, ())
    if not -_RANK <= found["dim"] < _RANK:
        raise ValueError(
            f"{where}.dim is {_short(found['dim'])}; it must be from {-_RANK} to {_RANK - 1}, for no module "
            "returns tensors of more dimensions"
        )
    return Centered(**found)


def _parametrized(where: str, value: Any) -> Parametrized:
    found = _object(where, value, {"names": _several_names, "tensor": _text, "chain": _list}, ())
    chain = tuple(
        None if each is None else tuple(_object(f"{where}.chain[{i}]", each, _MADE, ())[key] for key in _MADE)
        for i, each in enumerate(found["chain"])
    )
    if not any(chain):
        raise ValueError(f"{where}.chain holds no parametrization of this library")
    return Parametrized(found["names"], found["tensor"], chain)


def _shape(where: str, value: Any) -> Shape:
    found = _object(where, value, {"shape": _list, "dtype": _text, "buffer": _flag}, ("buffer",))
    shape, numel = tuple(found["shape"]), 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(
                f"{where}.shape is {_short(found['shape'])}; it must hold ints that are not negative"
            )
        numel *= size
    if len(shape) > _DIMENSIONS or numel >= 2**60:
        raise ValueError(f"{where}.shape is {_short(found['shape'])}, which no tensor can have")
    if found["dtype"] not in DTYPES:
        raise ValueError(f"{where}.dtype is {_short(found['dtype'])}, which is no dtype of torch")
    return Shape(shape, found["dtype"], found.get("buffer", False))


def _refuse_twice(where: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where} holds {_short(name)} twice")
        seen.add(name)


def _short(value: Any) -> str:
    """A value of a file for an error: it may be long."""
    if isinstance(value, (dict, list)) and value:
        return a("list" if isinstance(value, list) else "object")
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
