"""Models named on the command line: made from code or configurations, never downloaded, never unpickled."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conversion.report import a

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
    """Its class, its size, and where its weights come from."""
    unread: str = ""
    """Why the weights that lie beside its configuration were not read."""

    @property
    def has_weights(self) -> bool:
        """Whether its tensors have values: those on the meta device have none."""
        return not any(tensor.is_meta for tensor in (*self.model.parameters(), *self.model.buffers()))


def load(name: str, arguments: Mapping[str, Any]) -> Source:
    """The model called `name` (one of FORMS); `arguments` go to what makes it.

    A factory returns a model, or a model and a sample input. A file or module runs as Python does it, from the
    working directory. Random weights are the same every time, unless the factory sees to it that they are not.

    Raises:
        SourceError: there is no such model, or making it failed.
    """
    kind, _, rest = name.rpartition(":") if not name.startswith(("hf:", "timm:")) else name.partition(":")
    if not kind or not rest:
        raise SourceError(f"MODEL is {name!r}; it must be {FORMS}")
    make = {"hf": _hugging_face, "timm": _timm}.get(kind)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if make is None:
                source = _factory(kind, rest, arguments)
            else:
                with _sealed():
                    source = make(rest, arguments)
    except SourceError:
        raise
    except (Exception, SystemExit) as error:  # of code that is the user's
        hint = _misfit() if make else ""
        raise SourceError(f"MODEL {name!r}: {said(error).rstrip('.')}{hint}") from error
    weights = source.note if source.has_weights else "no weights"
    source.note = ", ".join(filter(None, (type(source.model).__name__, _size(source.model), weights)))
    return source


def said(error: BaseException) -> str:
    """What went wrong in code that is not ours, in a line, and where in the user's."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]}..."
    libraries = (str(Path(__file__).parent), sysconfig.get_paths()["stdlib"], "<")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(libraries) and "-packages" not in f.filename]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def _misfit() -> str:
    """A likely cause, as the end of a sentence: torchvision, which timm and transformers import, from another
    build than torch."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return (
            f"; the torchvision here does not load beside torch {torch.__version__} ({said(error)}): install "
            "the build that belongs to it, or uninstall it"
        )
    return ""


def _size(model: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    for scale, word in ((1e9, "billion "), (1e6, "million ")):
        if count >= scale:
            return f"{count / scale:.1f} {word}parameters"
    return f"{count:,} parameters"


_KEPT_OUT = {
    "socket.connect": "the network",
    "socket.getaddrinfo": "the network",
    "pickle.find_class": "a pickle, which may run code when it is read",
}
_seals = 0


@functools.cache
def _guard() -> None:
    def refuse(event: str, _: tuple) -> None:
        if _seals and event in _KEPT_OUT:
            raise SourceError(f"it asks for {_KEPT_OUT[event]}; nothing is downloaded and nothing unpickled")

    sys.addaudithook(refuse)


@contextlib.contextmanager
def _sealed() -> Iterator[None]:
    """While it lasts, no library opens a connection or reads a pickle, whatever its settings and versions."""
    global _seals
    _guard()  # once: Python has no way to take such a hook back
    _seals += 1
    try:
        yield
    finally:
        _seals -= 1


def _close(name: str, known: Iterable[str]) -> str:
    """Names like `name`, as the end of a sentence."""
    found = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    """What is `given` to `option` as ``KEY=VALUE``; a value is JSON or a constant of Python where it can be,
    else text.

    Raises:
        SourceError: something given is no such pair.
    """
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise SourceError(f"{option} is {pair!r}; it must be KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def _factory(place: str, name: str, arguments: Mapping[str, Any]) -> Source:
    module = _module(place)
    made: Any = getattr(module, name, None)
    if made is None:
        raise SourceError(f"{place!r} has no {name!r}{_close(name, vars(module))}")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise SourceError(
                f"{place}:{name} is of type {type(made).__name__}; it must be a model, or make one"
            )
        made = made(**arguments)
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{place}:{name} returned {a(type(model).__name__)}; it must return a torch.nn.Module"
        )
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
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: its neighbours can be imported
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


def _refuse(arguments: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name in arguments:
            raise SourceError(
                f"--arg {name}: nothing is downloaded or unpickled, and no code of a folder runs; make such a "
                "model in a factory of your own, and name that"
            )


def _hugging_face(name: str, arguments: Mapping[str, Any]) -> Source:
    _refuse(arguments, "trust_remote_code", "local_files_only")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(name)
    if not folder.is_dir():
        return _from_config(transformers, _config(transformers, name, arguments), "random weights")
    if not (folder / "config.json").is_file():
        inside = "".join(f"; hf:{path.parent} has one" for path in sorted(folder.glob("*/config.json"))[:1])
        raise SourceError(f"the folder {name} has no config.json{inside}")
    safe = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **safe, **arguments)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        unread = "the folder has no safetensors file"
        if list(folder.glob("*.bin")):
            unread += ", and a .bin file is a pickle, which may run code when it is read"
        source = _from_config(transformers, config, f"random weights: {unread}")
        source.unread = unread
        return source
    cls = _model_class(transformers, config)
    model, found = cls.from_pretrained(
        folder, config=config, use_safetensors=True, output_loading_info=True, **safe
    )
    note = f"weights from {files[0].name if len(files) == 1 else f'{len(files)} safetensors files'}"
    if lacking := len(found["missing_keys"]):
        note += f", {lacking} random tensors that it lacks"
    return Source(model, _hugging_face_sample(model), note)


def _config(transformers: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    cls = getattr(transformers, name, None) if name.endswith("Config") else None
    if cls is not None:
        return cls(**arguments)
    types = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if name in types:
        return transformers.AutoConfig.for_model(name, **arguments)
    known = [*types, *(other for other in dir(transformers) if other.endswith("Config"))]
    raise SourceError(
        f"hf:{name} is no folder here, and no configuration class or model type of transformers "
        f"{transformers.__version__}; nothing is downloaded{_close(name, known)}"
    )


def _model_class(transformers: Any, config: Any) -> Any:
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    models = (cls for cls in named if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel))
    return next(models, transformers.AutoModel)


def _from_config(transformers: Any, config: Any, note: str) -> Source:
    cls = _model_class(transformers, config)
    make: Callable[[], nn.Module] = (
        (lambda: cls.from_config(config)) if cls is transformers.AutoModel else (lambda: cls(config))
    )
    with torch.device("meta"):
        model = make()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        return Source(model)
    model = make()
    return Source(model, _hugging_face_sample(model), note)


def sample_for(model: nn.Module) -> Any:
    """An input for a model of Hugging Face or timm, random but the same each time; None for others."""
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        return _hugging_face_sample(model)
    size = getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is None:
        return None
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _hugging_face_sample(model: Any) -> dict[str, Tensor] | None:
    """An input of the kind that the model names as its main one; None where that is not enough."""
    config, chance = model.config, torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "")
    if name == "pixel_values":
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=chance)
        return {name: pixels.to(model.dtype)}
    if name != "input_ids" or not hasattr(config, "vocab_size"):
        return None
    tokens = torch.randint(config.vocab_size, (2, 16), generator=chance)
    sample = {name: tokens}
    if getattr(config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = tokens[:, :8]
    return sample


def _timm(name: str, arguments: Mapping[str, Any]) -> Source:
    _refuse(arguments, "pretrained")
    checkpoint = str(arguments.get("checkpoint_path", ""))
    if checkpoint and not checkpoint.endswith(".safetensors"):
        _refuse(arguments, "checkpoint_path")
    timm = _import("timm")
    if name not in timm.list_models():
        raise SourceError(f"timm {timm.__version__} has no model {name!r}{_close(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False, **arguments)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    side = arguments.get("img_size", size[-1])
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    channels = arguments.get("in_chans", size[0])
    sample = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return Source(model, sample, f"weights from {Path(checkpoint).name}" if checkpoint else "random weights")
