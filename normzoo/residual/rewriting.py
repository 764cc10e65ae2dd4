"""A rewrite of Pre-LN transformers, to be looked at, verified, applied and reverted.

Jiang, Gu, Zhu and Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN
Transformers*, 2023, arXiv:2305.14858; code ZixuanJiang/pre-rmsnorm-transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..conversion import report
from ..conversion.account import Account
from ..conversion.recognise import recognise
from .editing import Edit
from .probing import Probe, StreamProof


class Rewrite(Account):
    """What :func:`plan_rewrite` found. Nothing happens before :meth:`apply`; ``print()`` shows it."""

    def __init__(
        self, model: nn.Module, edit: Edit, left: Mapping[str, str], unread: Sequence[str], probe: Probe
    ) -> None:
        self.model = model
        self.edit = edit
        self.left = left
        """Norms that stay, and why."""
        self.unread = unread
        """Parameters that the sample does not reach: inputs that do may give other outputs."""
        self._probe = probe
        self._before = self._held()
        self._undo: Callable[[], None] | None = None

    @property
    def target(self) -> str:
        """The layer that the norms become."""
        return self.edit.target

    @property
    def norms(self) -> list[str]:
        """The norms that go without the mean."""
        return [site.name for site in self.edit.sites]

    @torch.inference_mode(False)
    def verify(self) -> StreamProof:
        """Run the three probes; afterwards the model is as it was.

        Raises:
            ValueError: the rewrite was applied already, or the model has changed since it was planned; the
                model does not run on the sample, or all that it returns is zero.
        """
        self._check("verify")
        return self._probe.prove(self.edit)

    @torch.inference_mode(False)
    def apply(self) -> nn.Module:
        """Rewrite the model in place, all of it or nothing.

        Returns:
            The model.

        Raises:
            ValueError: it was done before, or the model has changed since it was planned.
        """
        self._check("apply")
        self._undo = self.edit.apply(self.model)
        return self.model

    @torch.inference_mode(False)
    def revert(self) -> nn.Module:
        """Take the rewrite back; what has become of the rest of the model in between stays.

        Weights that were centered, and what multiplied them, get the numbers that they had before
        :meth:`apply`, so that training of these in between is lost; so do biases and weights behind norms that
        took up those of the norms. Weights that are centered in every forward keep their training, and so do
        weight and bias of norms, where the new norms have them. A weight that was untied is tied again. Dtype,
        device and mode are those of the model now.

        Raises:
            ValueError: the rewrite is not applied; a module or tensor that it is about is gone or has another
                shape, as after ``bake``. The model is left as it was.
        """
        if self._undo is None:
            raise ValueError("Rewrite.revert: it is not applied; there is nothing to take back")
        try:
            self._undo()
        except ValueError as error:
            raise ValueError(f"Rewrite.revert: {error}; the model has changed too much since") from error
        self._undo = None
        return self.model

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        items = [*self.edit.rows(), *((name, ("norm", "stays", why)) for name, why in self.left.items())]
        rows = [row[:-1] for row in report.grouped([(name, cells, None) for name, cells in items])]
        return ("name", "what", "becomes", "notes"), rows

    def summary(self) -> str:
        """What is rewritten, in a line or two."""
        found = self.edit.found
        lines = [
            f"{report.count(len(self.norms) + len(self.left), 'LayerNorm')}: {len(self.norms)} rewritten, "
            f"{len(self.left)} kept",
        ]
        done = [
            f"{report.count(len(found.writers), 'tensor')} centered" if found.writers else "",
            f"the mean of {report.count(len(found.centered_outputs), 'output')} taken away in every forward"
            if found.centered_outputs
            else "",
        ]
        lines += [", ".join(filter(None, done))]
        if self.unread:
            lines.append(
                f"the sample does not reach {report.some(self.unread)}: inputs that do may give other outputs"
            )
        lines += [self.edit.training] if self.edit.training else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.edit.to_dict() | {"left": dict(self.left), "unread": [*self.unread]}

    def _check(self, method: str) -> None:
        if self._undo is not None:
            raise ValueError(f"Rewrite.{method}: it was applied already; revert() it or make a new one")
        known = recognise(site.module for site in self.edit.sites)
        alike = all(norm == site.norm for (norm, _, _), site in zip(known, self.edit.sites, strict=True))
        now = self._held()
        if not alike or any(now.get(name) is not held for name, held in self._before.items()):
            raise ValueError(
                f"Rewrite.{method}: the model has changed since the rewrite was planned; make a new one"
            )

    def _held(self) -> dict[str, Any]:
        """The modules and tensors that the rewrite is about."""
        model, found = self.model, self.edit.found
        held: dict[str, Any] = dict((*model.named_modules(), *model.named_parameters(), *model.named_buffers()))
        scales = (name for writer in found.writers for name in writer.scale)
        writers = (writer.name for writer in found.writers)
        return {name: held.get(name) for name in (*self.norms, *found.centered_outputs, *writers, *scales)}
