"""Models named on the command line: made from code or configurations, never downloaded, never unpickled."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMS = "module:factory, path.py:factory, hf:FOLDER, hf:CONFIG-CLASS, hf:MODEL-TYPE or timm:NAME"

LARGEST = 200_000_000
"""Parameters above which a model without weights is made on the meta device."""


class SourceError(ValueError):
    """A model cannot be made from what the user named, and why."""


@dataclass
class Source:
    model: nn.Module
    sample: Any = None
    """An input to run it on, or None."""
    note: str = ""
    """What to know about its weights."""


def load(name: str, arguments: Mapping[str, Any]) -> Source:
    """The model called `name` (one of FORMS); `arguments` go to what makes it.

    A factory returns a model, or a model and a sample input. A file or module runs as Python does it, from the
    working directory.

    Raises:
        SourceError: there is no such model, or making it failed.
    """
    kind, _, rest = name.rpartition(":") if not name.startswith(("hf:", "timm:")) else name.partition(":")
    if not kind or not rest:
        raise SourceError(f"MODEL is {name!r}; it must be {FORMS}")
    make = {"hf": _hugging_face, "timm": _timm}.get(kind)
    try:
        return make(rest, arguments) if make else _factory(kind, rest, arguments)
    except SourceError:
        raise
    except Exception as error:  # of code that is the user's
        raise SourceError(f"MODEL {name!r}: {type(error).__name__}: {error}") from error


def pairs(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` arguments; a value is JSON where it can be, else text.

    Raises:
        SourceError: an argument is none.
    """
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise SourceError(f"{pair!r} is no KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _factory(place: str, name: str, arguments: Mapping[str, Any]) -> Source:
    made: Any = getattr(_module(place), name, None)
    if made is None:
        raise SourceError(f"{place!r} has no {name!r}")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise SourceError(f"{place}:{name} is a {type(made).__name__}; it must be a model, or make one")
        made = made(**arguments)
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{place}:{name} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return Source(model, sample)


def _module(place: str) -> Any:
    sys.path.insert(0, os.getcwd())
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and place.split(".")[0] != error.name.split(".")[0]:
                raise  # something that the module imports
            raise SourceError(f"there is no module {place!r} here; MODEL must be {FORMS}") from error
    path = Path(place)
    if not path.is_file():
        raise SourceError(f"there is no file {place!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[path.stem] = module  # dataclasses and pickle look their classes up there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise SourceError(f"{name} is not installed; pip install {name}") from error
        raise


def _hugging_face(name: str, arguments: Mapping[str, Any]) -> Source:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    if not Path(name).is_dir():
        config = _config(transformers, name, arguments)
        return _from_config(transformers, config, "random weights")
    folder = Path(name)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **arguments)
    if not list(folder.glob("*.safetensors")):
        why = "random weights: the folder has no safetensors file"
        if list(folder.glob("*.bin")):
            why += ", and a .bin file is a pickle, which may run code when it is read"
        return _from_config(transformers, config, why)
    cls = _model_class(transformers, config)
    model = cls.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True)
    return Source(model, _hugging_face_sample(model), f"weights of {folder.name}")


def _config(transformers: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    cls = getattr(transformers, name, None) if name.endswith("Config") else None
    if cls is not None:
        return cls(**arguments)
    if name in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(name, **arguments)
    raise SourceError(
        f"hf:{name} is no folder here, and no configuration class or model type of transformers "
        f"{transformers.__version__}; nothing is downloaded"
    )


def _model_class(transformers: Any, config: Any) -> Any:
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    return next(filter(None, named), transformers.AutoModel)


def _from_config(transformers: Any, config: Any, note: str) -> Source:
    cls = _model_class(transformers, config)
    make: Callable[[], nn.Module] = (
        (lambda: cls.from_config(config)) if cls is transformers.AutoModel else (lambda: cls(config))
    )
    with torch.device("meta"):
        model = make()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        return Source(model, note=f"no weights: {size / 1e9:.1f} billion parameters on the meta device")
    model = make()
    return Source(model, _hugging_face_sample(model), note)


def _hugging_face_sample(model: Any) -> dict[str, Tensor] | None:
    """An input of the kind that the model names as its main one; None where that is not enough."""
    config, chance = model.config, torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "")
    if name == "pixel_values":
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return {name: torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=chance)}
    if name != "input_ids" or not hasattr(config, "vocab_size"):
        return None
    tokens = torch.randint(config.vocab_size, (2, 16), generator=chance)
    sample = {name: tokens}
    if getattr(config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = tokens[:, :8]
    return sample


def _timm(name: str, arguments: Mapping[str, Any]) -> Source:
    timm = _import("timm")
    if name not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise SourceError(
            f"timm {timm.__version__} has no model {name!r}" + (f"; it has {close}" if close else "")
        )
    model = timm.create_model(name, pretrained=False, **arguments)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    side = arguments.get("img_size", size[-1])
    sample = torch.randn(2, size[0], side, side, generator=torch.Generator().manual_seed(0))
    return Source(model, sample, "random weights")
