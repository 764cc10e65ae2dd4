"""What became of norms that were folded into the layers beside them, and plans to fold those of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ..conversion import report
from ..conversion.account import Account
from ..conversion.luggage import bring_along
from ..conversion.proof import Proof, prove
from ..conversion.recognise import Site
from ..conversion.samples import Sample
from ..conversion.surgery import Swap
from .layers import Unfoldable, into_next, into_previous

BEFORE, AFTER = "before", "after"
"""Where the layers are that a norm is folded into."""


class Folded(nn.Identity):
    """What is left of a norm that is part of the layers beside it now: its activation, if it had one.

    What the norm took beside its input, such as a mask, it takes too; in eval mode that had no effect.

    Args:
        into: the names of the layers that it went into.
        dims: the number of dimensions of its input, where it could be folded for these alone; None: any.
        then: names of children to be applied.

    Raises:
        ValueError: in a call, the input has another number of dimensions.
    """

    def __init__(self, into: Sequence[str], dims: int | None = None, then: Sequence[str] = ()) -> None:
        super().__init__()
        self.into = tuple(into)
        self.dims = dims
        self.then = tuple(then)

    def forward(self, input: Tensor, *beside: Any, **named: Any) -> Tensor:
        if self.dims is not None:
            input = check_dims(input, self.dims, self.into)
        for name in self.then:
            input = getattr(self, name)(input)
        return input

    def extra_repr(self) -> str:
        return f"into {', '.join(self.into)}"


def check_dims(input: Tensor, dims: int, into: tuple[str, ...]) -> Tensor:
    """`input`; raises ValueError where its channels are elsewhere than those that a norm was folded for."""
    if input.dim() != dims:
        raise ValueError(
            f"Folded: the input has shape {tuple(input.shape)}, and the norm that was here was folded into "
            f"{', '.join(into)} for inputs of {dims} dimensions, whose channels are in the same place; "
            "fold with a sample of the inputs that there will be"
        )
    return input


fx.wrap("check_dims")  # or a model with such modules could not be traced any more


def folded(norm: nn.Module, into: Sequence[str], dims: int | None, then: Sequence[str]) -> Folded:
    """What takes the place of `norm`: with its children `then`, mode, hooks of its state dict, and settings."""
    made = Folded(into, dims, then)
    gone = {*norm._parameters, *norm._buffers, *(norm._modules.keys() - set(then)), "process_group"}
    bring_along(norm, made, gone)
    if beside := getattr(norm, "side_inputs", ()):
        made.side_inputs = beside
    return made


def dims_for(layer: nn.Module, axis: int) -> int | None:
    """Of how many dimensions inputs are whose channels, along `axis`, are those of `layer`; None: of any."""
    if isinstance(layer, _ConvNd):
        return len(layer.kernel_size) + 2
    return 2 if axis == 1 else None


@dataclass
class Fold:
    """What becomes of one norm, or of one layer that standardizes its weight."""

    site: Site
    action: str
    """``fold``; ``bake`` a standardized weight; ``keep`` what is not meant, or no fixed map; ``refuse`` what
    is meant; or leave what is ``unknown``."""
    reason: str = ""
    """Why it stays."""
    where: str = ""
    """Whether it goes into layers ``before`` or ``after`` it."""
    layers: tuple[nn.Module, ...] = ()
    into: tuple[str, ...] = ()
    """Their names."""
    dims: int | None = None
    """For inputs of how many dimensions alone; None: any."""
    error: float | None = None
    """Measured difference of layer and norm before and after on random inputs, of the largest entry."""
    note: str = ""
    bake: Callable[[], nn.Module] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan = {key: getattr(self, key) for key in ("action", "where", "into", "dims", "error")}
        said = {"reason": self.reason or None, "plan_note": self.note or None}
        return self.site.to_dict() | plan | said


def take_up(fold: Fold, layer: nn.Module) -> nn.Module:
    """`layer` with the norm of `fold` in it."""
    if fold.where == BEFORE:
        return into_previous(layer, fold.site.module, activated=True)
    return into_next(fold.site.module, layer)


def replacements(folds: Sequence[Fold]) -> dict[nn.Module, nn.Module]:
    """What takes the place of each module, with the numbers of now; a later fold goes on from earlier ones."""
    now: dict[nn.Module, nn.Module] = {}
    for fold in folds:
        module, norm = fold.site.module, fold.site.norm
        if fold.bake is not None:
            now[module] = fold.bake()
            continue
        for layer in fold.layers:
            now[layer] = take_up(fold, now.get(layer, layer))
        now[module] = folded(module, fold.into, fold.dims, norm.after if norm else ())
    return now


_ENDED = {"fold": "folded", "bake": "baked", "keep": "kept", "refuse": "refused", "unknown": "unknown"}


class FoldPlan(Account):
    """What :func:`normzoo.folding.plan_fold` found: one :class:`Fold` a norm. Nothing happens before
    :meth:`apply`, and nothing takes that back.

    ``print(plan)`` shows the table.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: list[Fold],
        order: list[Fold],
        functional: Mapping[str, Sequence[str]],
    ) -> None:
        self.model = model
        self.steps = steps
        self.functional = functional
        self.applied = False
        self._order = order

    @property
    def changes(self) -> list[Fold]:
        """The steps that fold or bake."""
        return [step for step in self.steps if step.action in ("fold", "bake")]

    @property
    def left(self) -> list[Fold]:
        """The steps about what stays although it is meant."""
        return [step for step in self.steps if step.action in ("refuse", "unknown")]

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows of the table."""
        items = []
        for step in self.steps:
            site = step.site
            becomes = {"bake": "baked", "fold": f"part of {_near(site.name, step.into)}"}.get(
                step.action, "stays"
            )
            notes = "; ".join(filter(None, (step.reason or site.note, step.note)))
            items.append((site.name, (site.cls.__name__, site.describe(), becomes, notes), step.error))
        rows = [(*cells[:4], error, cells[4]) for *cells, error in report.grouped(items)]
        return ("norm", "class", "computes", "becomes", "error", "notes"), rows

    def summary(self) -> str:
        """How many are folded, and what becomes of the state dict, in a few lines."""
        norms = [step for step in self.steps if step.site.kind == "norm"]
        weights = [step for step in self.steps if step.site.kind != "norm"]
        lines = []
        if norms:
            actions = report.tally(_ENDED[step.action] for step in norms)
            lines.append(f"{report.count(len(norms), 'norm')}: {actions}")
        if weights:
            actions = report.tally(_ENDED[step.action] for step in weights)
            lines.append(f"{report.count(len(weights), 'layer')} with a standardized weight: {actions}")
        sides = report.tally(f"into what comes {step.where} it" for step in norms if step.action == "fold")
        lines += [f"folded: {sides}"] if sides else []
        for name, functions in self.functional.items():
            lines.append(f"{name} calls {', '.join(functions)} as a function, which stays")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": [step.to_dict() for step in self.steps], "functional": dict(self.functional)}

    def apply(self) -> nn.Module:
        """Fold, in place, all of it or nothing. It cannot be taken back: the norms are gone.

        Returns:
            The model, or the new module where the model itself is a layer that was baked.

        Raises:
            ValueError: the plan was applied before, or the model has changed since. It is left as it is.
        """
        swap = self._exchange("apply")
        swap.do()
        self.applied = True
        return swap.root

    def verify(self, sample: Any) -> Proof:
        """Run the model on `sample` with and without the plan and compare what it returns, as
        :meth:`normzoo.conversion.Plan.verify` does; afterwards the model is as it was.

        Raises:
            ValueError: the plan was applied; the model has changed since it was made, or returns nothing that
                can be compared.
        """
        swap = self._exchange("verify")
        sites = [(step.site.module, step.error or 0.0) for step in self.changes]
        return prove(self.model, swap, Sample(sample), sites, True, (), ())

    def _exchange(self, method: str) -> Swap:
        if self.applied:
            raise ValueError(
                f"FoldPlan.{method}: this plan was applied already, and the norms are gone; to keep them, fold "
                "a copy of the model"
            )
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                return Swap(self.model, replacements(self._order))
        except Unfoldable as error:
            raise ValueError(f"fold: the model has changed since the plan was made: {error}") from error


def _near(name: str, into: Sequence[str]) -> str:
    """`into` without what it has in common with `name`, so that rows can be alike."""
    parent = name.rpartition(".")[0]
    return ", ".join(other.removeprefix(f"{parent}.") if parent else other for other in into)
