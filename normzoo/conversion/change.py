"""A plan: what becomes of every norm of a model, to be looked at, applied, verified and reverted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..side_inputs import MissingInput
from . import bypass, report
from .account import Account
from .proof import Proof, prove, trains_by_itself
from .recognise import Site, recognise
from .samples import Sample, Trained
from .surgery import Exchange, Swap, edit
from .transfer import UNCHANGED, Choice, Exactness, Refused, Replacement, replacement

PARAMETERS_CHANGE = "parameters change: pass optimizer= to keep an optimizer in step, or make a new one"

_KINDS = ("kept", "converted", "new", "lost")
_ENDED = {"convert": "converted", "keep": "kept", "refuse": "refused", "unknown": "unknown"}


@dataclasses.dataclass
class Step:
    """What a plan does with one norm."""

    site: Site
    action: str
    """``convert``, ``keep`` as was asked for, ``refuse`` what was asked for, or leave what is ``unknown``."""
    reason: str = ""
    """Why it stays, or what to know about its conversion."""
    choice: Choice | nn.Module | None = None
    exactness: Exactness | None = None
    error: float | None = None
    """Measured difference of old and new norm on one input, of the largest entry sharing statistics.

    None where there is none, and of re-initialised norms: one input tells little of two unlike functions.
    """
    tensors: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Names of the tensors that are ``kept`` (the same objects), ``converted``, ``new`` and ``lost``."""
    parameters_change: bool = False
    """Whether the parameters are other objects afterwards, so that an optimizer has to follow."""
    activations: tuple[nn.Module, ...] = ()
    """Activations of the model that an identity takes the place of, as the new layer does their work."""
    warning: str = ""
    """What :func:`normzoo.convert` warns of though the function stays."""

    @property
    def target(self) -> str | None:
        """The layer that the norm becomes."""
        if isinstance(self.choice, nn.Module):
            return type(self.choice).__name__
        return self.choice and self.choice.entry.name

    def make(self) -> Replacement:
        """What takes the place of the norm, holding the tensors that it has now."""
        if self.choice is None:
            raise ValueError(f"Step.make: {self.site.name!r} stays as it is ({self.reason})")
        return replacement(self.site, self.choice)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        keys = ("action", "target", "exactness", "error", "tensors")
        plan = {key: getattr(self, key) for key in keys} | {"reason": self.reason or None}
        return self.site.to_dict() | plan


class Plan(Account):
    """What :func:`normzoo.plan` found: one :class:`Step` a norm. Nothing happens before :meth:`apply`.

    ``print(plan)`` shows the table.
    """

    def __init__(self, model: nn.Module, steps: list[Step], functional: Mapping[str, Sequence[str]]) -> None:
        self.model = model
        self.steps = steps
        self.functional = functional
        self._swap: Swap | None = None
        self._made: dict[nn.Module, Replacement] = {}
        self._undo_optimizer: Callable[[], None] | None = None
        self._slowed = {
            parent
            for step in self.changes
            if step.exactness is not Exactness.EXACT
            for parent, child in step.site.parents
            if bypass.fast_path(parent, child)
        }
        """Encoder layers whose fast path would ignore their new norm."""
        for step in steps:
            if any(parent in self._slowed for parent, _ in step.site.parents):
                said = (bypass.COMPUTED, bypass.REPLACED)
                step.site.flags = [bypass.TURNED_OFF if f in said else f for f in step.site.flags]

    @property
    def changes(self) -> list[Step]:
        """The steps that convert."""
        return [step for step in self.steps if step.action == "convert"]

    @property
    def exactness(self) -> Exactness:
        """The least exact of the conversions."""
        return max((step.exactness for step in self.changes if step.exactness), key=list(Exactness).index)

    @property
    def kind(self) -> str:
        """A word for what it is about."""
        return "layer" if any(step.site.kind == "layer" for step in self.steps) else "norm"

    @property
    def applied(self) -> bool:
        return self._swap is not None

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        items = []
        for step in self.steps:
            site = step.site
            becomes = f"{step.target}: {step.exactness.value}" if step.exactness else "stays"
            changed = [
                f"{kind}: {', '.join(step.tensors[kind])}" for kind in _KINDS[1:] if step.tensors.get(kind)
            ]
            notes = "; ".join(filter(None, (step.reason, site.note, *changed, *site.flags)))
            items.append((site.name, (site.cls.__name__, site.describe(), becomes, notes), step.error))
        rows = [(*cells[:4], error, cells[4]) for *cells, error in report.grouped(items)]
        return (self.kind, "class", "computes", "becomes", "error", "notes"), rows

    def summary(self) -> str:
        """What is converted, how exactly, and what becomes of the tensors, in a few lines."""
        totals = {kind: sum(len(step.tensors[kind]) for step in self.changes) for kind in _KINDS}
        actions = report.tally(_ENDED[step.action] for step in self.steps)
        lines = [
            f"{report.count(len(self.steps), self.kind)}: {actions}",
            f"conversions: {report.tally(step.exactness.value for step in self.changes if step.exactness)}",
            f"tensors: {', '.join(f'{number} {kind}' for kind, number in totals.items())}",
        ]
        if any(step.parameters_change for step in self.changes):
            lines.append(PARAMETERS_CHANGE)
        for name, functions in self.functional.items():
            lines.append(f"{name} calls {', '.join(functions)} as a function, out of reach of a conversion")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": [step.to_dict() for step in self.steps], "functional": dict(self.functional)}

    def apply(self, optimizer: Optimizer | None = None) -> nn.Module:
        """Convert the model in place, all of it or nothing.

        Args:
            optimizer: is kept in step where parameters are replaced, added or dropped: the new take the group
                of the old. Parameters that stay need nothing.

        Returns:
            The model, or the new module where the model itself is a norm.

        Raises:
            TypeError: `optimizer` is none.
            ValueError: the plan was applied before, or the model has changed since. It is left as it is.
        """
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Plan.apply: optimizer is {report.a(type(optimizer).__name__)}; it must be a "
                "torch.optim.Optimizer"
            )
        if self.applied:
            raise ValueError("Plan.apply: this plan was applied already; revert() it or make a new one")
        made = self._make()
        swap = self._exchange(made)
        swap.do()
        try:
            if optimizer is not None:
                self._undo_optimizer = edit(optimizer, self._exchanges(made), swap.root)
        except BaseException:
            swap.undo()
            raise
        self._swap, self._made = swap, made
        return swap.root

    def replaced(self) -> list[tuple[nn.Module, nn.Module, dict[str, str]]]:
        """Of an applied plan: the old norms, the new ones, and from which tensors of the old theirs come."""
        return [(old, made.module, made.kept | made.converted) for old, made in self._made.items()]

    def revert(self) -> nn.Module:
        """Put the old norms back, and the optimizer's groups.

        Tensors that the conversion kept are as they are now, trained perhaps; those that it converted are as
        they were then.

        Returns:
            The model as it was.

        Raises:
            ValueError: the plan is not applied, or the model has changed since. It is left as it is.
        """
        if self._swap is None:
            raise ValueError("Plan.revert: this plan is not applied; there is nothing to take back")
        self._swap.undo()
        self._catch_up()
        if self._undo_optimizer is not None:
            self._undo_optimizer()
        self._swap, self._made, self._undo_optimizer = None, {}, None
        return self.model

    def verify(
        self,
        sample: Any,
        *,
        mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Proof:
        """Run the model on `sample` before and after the conversion and compare what it returns.

        All runs are in eval mode, without gradients, and on the same random numbers; afterwards the model is as
        it was, converted or not. A third run tells how much rounding explains: there the output of every
        converted norm is off at random, by a last bit or, where the conversions claim to be exact, by the error
        of that norm if this is more. A fourth tells whether the model repeats itself.

        Where conversions of norms with batch statistics claim to be exact, all of it is done again with these
        norms in training mode and the rest in eval mode, on this rank alone; their running statistics are
        compared too.

        Args:
            sample: the input; a tuple is taken as positional, a mapping as keyword arguments. Or a function
                that calls the model it is given and returns what is to be compared.
            mask, pad_mask, task_ids, t: side inputs, as in :class:`normzoo.inputs`, for the layers that take
                them before or after.

        Raises:
            ValueError: no layer takes what is given, before or after; a layer needs a side input, and it is
                not given;
            ValueError: the model returns no floating-point tensors, or other ones after the conversion, or
                something else each time it runs; or it has changed since the plan was made.
        """
        given = {"mask": mask, "pad_mask": pad_mask, "task_ids": task_ids, "t": t}
        given = {name: value for name, value in given.items() if value is not None}
        with torch.random.fork_rng(devices=[]):  # apply() makes others
            swap = self._swap or self._exchange(self._make())
        takers = (*self.model.modules(), *(new for made in swap.new_of.values() for new in made.modules()))
        for name in given:
            if not any(name in getattr(module, "side_inputs", ()) for module in takers):
                raise ValueError(f"verify: no layer of the model takes {name}, before or after the conversion")
        exact = self.exactness in UNCHANGED
        sites = [(step.site.module, step.error or 0.0 if exact else 0.0) for step in self.changes]
        old, new = self._in_training(swap) if exact else ([], [])
        if self.applied:
            swap.undo()
            self._catch_up()
        try:
            proof = prove(self.model, swap, Sample(sample, given), sites, exact, old, new)
            return dataclasses.replace(proof, kind=self.kind)
        except MissingInput as error:
            taken = {name for module in takers for name in getattr(module, "side_inputs", ())} - given.keys()
            arguments = ", ".join(f"{name}={name}" for name in (*given, *sorted(taken)))
            raise MissingInput(
                f"{error}; prove it in Python: `normzoo.plan(...).verify(x, {arguments})`"
            ) from error
        finally:
            if self.applied:
                swap.do()

    def _in_training(self, swap: Swap) -> tuple[list[Trained], list[Trained]]:
        """The norms to be compared in training mode, before and after."""
        old, new = [], []
        for step in self.changes:
            norm, module = step.site.norm, step.site.module
            if step.exactness is not Exactness.EXACT or norm is None or not trains_by_itself(norm):
                continue
            old.append(Trained(step.site.name, module, norm.statistics))
            new.append(Trained(step.site.name, swap.new_of[module], tuple(norm.stored.values())))
        return old, new

    def _catch_up(self) -> None:
        """Gives the old norms the mode and the tensors that the new ones have by now."""
        for old, made in self._made.items():
            old.training = made.module.training
            tensors = dict((*made.module.named_parameters(), *made.module.named_buffers()))
            for table in (old._parameters, old._buffers):
                table: dict[str, Any]
                # What has another name, or another value, in the new norm is not looked up by its own.
                own = {name: name for name in table.keys() - {*made.lost, *made.converted.values()}}
                for name, source in (own | made.kept).items():
                    now = tensors.get(name)
                    # Not the same ones after load_state_dict(assign=True), or a move to another device.
                    if source in table and type(now) is type(table[source]):
                        table[source] = now

    def _make(self) -> dict[nn.Module, Replacement]:
        for look in {step.site.look for step in self.changes}:
            steps = [step for step in self.changes if step.site.look is look]
            known = recognise((step.site.module for step in steps), look)
            for step, (norm, _, _) in zip(steps, known, strict=True):
                if norm != step.site.norm and step.site.how != "adapter":
                    now = norm.describe() if norm else "unknown"
                    raise ValueError(
                        f"convert: the model has changed since the plan was made: {step.site.name!r} computes "
                        f"{now} and computed {step.site.describe()}; make a new plan"
                    )
        try:
            return {step.site.module: step.make() for step in self.changes}
        except Refused as error:
            raise ValueError(f"convert: the model has changed since the plan was made: {error}") from error

    def _exchange(self, made: Mapping[nn.Module, Replacement]) -> Swap:
        settings = bypass.without_fast_path(self.model, self._slowed)
        new_of = {old: new for each in made.values() for old, new in each.beside.items()}
        return Swap(self.model, new_of | {old: each.module for old, each in made.items()}, settings)

    def _exchanges(self, made: Mapping[nn.Module, Replacement]) -> list[Exchange]:
        found = []
        for step in self.changes:
            old, each = step.site.module, made[step.site.module]
            now = dict(each.module.named_parameters())
            before = {name: p for name, p in old._parameters.items() if p is not None}
            # Of several made from one, the first takes its place.
            heirs = {
                source: name
                for name, source in reversed(each.converted.items())
                if name in now and source not in each.kept.values()
            }
            pairs = [(before[source], now[name]) for source, name in heirs.items() if source in before]
            # A buffer that became a parameter is new to an optimizer, if it trains.
            raised = [
                name
                for name, source in (each.kept | each.converted).items()
                if name in now
                and (source not in before or (name in each.converted and heirs.get(source) != name))
                and now[name].requires_grad
            ]
            new = [name for name in each.new if name in now]
            added = {f"{step.site.name}.{name}".lstrip("."): now[name] for name in (*new, *raised)}
            found.append(Exchange(pairs, added, list(before.values())))
        return found
