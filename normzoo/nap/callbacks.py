"""Normalize-and-Project inside of Hugging Face's Trainer and of Lightning, imported only when asked for."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..radial import local, sharded
from .affine import FAR
from .handle import NormalizeAndProject, normalize_and_project

FILE = "normalize_and_project"


def hugging_face_callback(**options: Any) -> Any:
    """A ``transformers.TrainerCallback`` that projects while a Trainer trains.

    The first batch tells which weights are scale invariant. The state is saved in every checkpoint, as
    ``normalize_and_project.pt``, and a run that goes on from one in ``output_dir``, or from the one named in
    ``TrainingArguments(resume_from_checkpoint=...)``, loads it. The attribute ``handle`` has the report.

    Args:
        options: those of :func:`normzoo.normalize_and_project`, but for `insert`: norms must be there before
            the Trainer has its model.

    Raises:
        ValueError: `insert`; at the start of training, the state of a run that goes on is nowhere to be found.
        ImportError: transformers is not installed.

    Use it as ``Trainer(..., callbacks=[normzoo.nap.hugging_face_callback()])``.
    """
    _refuse_insert("hugging_face_callback", options)
    base = importlib.import_module("transformers.trainer_callback").TrainerCallback
    return type("NormalizeAndProjectCallback", (_HuggingFace, base), {})(options)


def lightning_callback(**options: Any) -> Any:
    """A ``lightning.pytorch.Callback``, or one of pytorch_lightning, that projects during ``Trainer.fit``.

    The first call of the LightningModule in training mode tells which weights are scale invariant, or its
    ``example_input_array``, which a module needs whose ``training_step`` does not call ``self(...)``. The state
    is part of the checkpoints. The attribute ``handle`` has the report.

    Args:
        options: those of :func:`normzoo.normalize_and_project`, but for `insert`: norms must be there before
            the Trainer has its model.

    Raises:
        ValueError: `insert`; at the start of training, there are several optimizers or none.
        ImportError: neither lightning nor pytorch_lightning is installed.
    """
    _refuse_insert("lightning_callback", options)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base = importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or " "):
                raise
        else:
            return type("NormalizeAndProjectCallback", (_Lightning, base), {})(options)
    raise ImportError("nap.lightning_callback: neither lightning nor pytorch_lightning is installed")


def _refuse_insert(function: str, options: Mapping[str, Any]) -> None:
    if options.get("insert"):
        raise ValueError(
            f"nap.{function}: insert=True changes the model, which the trainer has by then; put the norms in "
            "before, by normalize_and_project(model, optimizer, insert=True, example=...).remove()"
        )


def _begun(
    model: Any, optimizer: Any, options: Mapping[str, Any], state: Mapping[str, Any] | None
) -> NormalizeAndProject:
    """A handle, which goes on from `state` if there is one."""
    if state is None:
        return normalize_and_project(model, optimizer, **options)
    with warnings.catch_warnings():  # between two projections norms are not where they are put to
        warnings.filterwarnings("ignore", f".*{FAR}", UserWarning)
        handle = normalize_and_project(model, optimizer, **options)
    handle.load_state_dict(state)
    return handle


class _HuggingFace:
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.handle: NormalizeAndProject | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        saved = _saved(args, state.global_step) if state.global_step else None
        self.handle = _begun(model, optimizer, self.options, saved)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is None:
            return
        found = self.handle.state_dict()
        parts = any(map(sharded, found["masters"].values()))
        if parts or state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            found = pytree.tree_map_only(torch.Tensor, local, found)
            torch.save(found, folder / _name(args.process_index if parts else None))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def _name(rank: int | None) -> str:
    return f"{FILE}.pt" if rank is None else f"{FILE}-{rank}.pt"


def _saved(args: Any, step: int) -> dict[str, Any]:
    """The state of the checkpoint that the run goes on from."""
    folders = [Path(args.output_dir, f"checkpoint-{step}")]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        for name in (_name(None), _name(args.process_index)):
            if (folder / name).is_file():
                return torch.load(folder / name, map_location="cpu", weights_only=True)
    raise ValueError(
        f"nap.hugging_face_callback: training goes on from step {step}, but there is no {_name(None)} in "
        f"{' or '.join(map(str, folders))}, so that the norms at the start are not known; name the checkpoint "
        "in TrainingArguments(resume_from_checkpoint=...), or start anew from the weights"
    )


class _Lightning:
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.handle: NormalizeAndProject | None = None
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"nap.lightning_callback: the trainer has {len(trainer.optimizers)} optimizers; call "
                "normzoo.normalize_and_project for each of them in on_train_start"
            )
        options = dict(self.options)
        if options.get("example") is None:
            example = getattr(pl_module, "example_input_array", None)
            options["example"] = _moved(example, pl_module)
        self.handle = _begun(pl_module, trainer.optimizers[0], options, self._loaded)
        self._loaded = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.handle is not None:
            self.handle.remove()

    def state_dict(self) -> dict[str, Any]:
        if self.handle is None:
            return self._loaded or {}
        return self.handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


def _moved(example: Any, module: Any) -> Any:
    device = next(module.parameters()).device
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), example)
