"""Normalize-and-Project on a model and its optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..conversion import report
from ..conversion.rules import Names
from . import affine, choosing, inserting, saved
from .projecting import Held, Masters, Projector, norms
from .refusals import (
    CALLER,
    DECAY,
    check_arguments,
    check_optimizer,
    check_patterns,
    check_placement,
    fits,
    innermost,
    outside,
    patterns_of,
)
from .rehearsing import arguments, unwrapped, user_hooks
from .reporting import (
    DEAD,
    EXCLUDED,
    INVARIANT,
    JUMPS,
    MOVES,
    PENDING,
    WITH_BIAS,
    WITH_WEIGHT,
    Report,
    Row,
    warnings_of,
)
from .waiting import NOT_CHECKED, FirstCall, refuse_step


def normalize_and_project(
    model: nn.Module,
    optimizer: Optimizer,
    every: int = 1,
    include: Names | None = None,
    exclude: Names | None = None,
    scale_offset: str = "joint",
    insert: bool = False,
    *,
    example: Any = None,
    decay: float = DECAY,
) -> NormalizeAndProject:
    """Keep the norms of scale-invariant weights where they are, after every step of `optimizer`.

    A weight in front of a norm layer has no scale that matters, but it grows, and the longer it is the less a
    step turns it: the effective learning rate decays, unasked. Normalize-and-Project (Lyle et al., 2024,
    arXiv:2407.01800) puts such weights back to the norm that they have at this call. Then the learning rate is
    what its schedule says, and a schedule is needed: a constant rate that is too large never heals.

    Which weights are scale invariant is tried out: on a copy of the model in float64, each weight of two
    dimensions or more is doubled, and the output must not move, the eps of norms aside. Where the weight and
    its bias have to be doubled together, both are projected, to their joint norm, which keeps the function. The
    rest is left alone: the output layer, layers that write to a residual stream, embeddings.

    Args:
        model: has the weights, wrapped (DDP, torch.compile, fully_shard) or not. Of a wrapped one the names are
            those inside.
        optimizer: any torch.optim.Optimizer; weights that it does not have are left alone.
        every: project after so many steps.
        include: names of weights or of their modules, globs or ``re:`` expressions, that are projected though
            they are not scale invariant. That changes what the model can learn.
        exclude: those that are not projected, whatever else is said.
        scale_offset: what becomes of the learned scale s and offset o of norm layers. ``"joint"``: (s, o) is
            put to the norm sqrt(d), d the size of s, which changes nothing where a ReLU and a norm follow;
            ``"free"``: nothing; ``"decay"``: s is drawn to 1 and o to 0, by lr · `decay` at every step;
            ``"off"``: both are frozen as they are.
        insert: put a norm layer in front of every activation module that has none; needs `example`.
        example: inputs to try the model on: a tensor, a tuple of arguments or a dict of keyword arguments. Best
            is a batch as in training: a batch norm makes 1 and -1 of any two values, and what the inputs do not
            reach or tell is not projected. Without it the first call of the model (its forward) in training
            mode, before the first step, does.
        decay: see `scale_offset`; for ``"decay"`` alone.

    Returns:
        The handle, whose :attr:`NormalizeAndProject.report` says what became of each weight, and why.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the optimizer has none of the model's
            parameters; a pattern matches no weight; the optimizer is projected already; the model cannot be
            copied or run on `example`, or is wrapped in FSDP1. Nothing is changed.

    Warns:
        UserWarning: projected weights have weight decay; no weight is projected; the first projection will
            change the scale and offset of a norm.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    >>> handle = normalize_and_project(model, optimizer, example=torch.randn(16, 4))
    >>> before = model[0].weight.norm().item()
    >>> model(torch.randn(2, 4)).sum().backward()
    >>> optimizer.step()
    >>> abs(model[0].weight.norm().item() / before - 1) < 1e-6
    True
    >>> handle.report["3.weight"].projected
    False
    """
    return NormalizeAndProject(
        model, optimizer, every, include, exclude, scale_offset, insert, example=example, decay=decay
    )


class NormalizeAndProject:
    """What :func:`normzoo.normalize_and_project` returns: the projection of one model with one optimizer.

    Its state, beside those of the model and of the optimizer, makes a run go on to the last bit.
    """

    report: Report
    """What became of each weight."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int = 1,
        include: Names | None = None,
        exclude: Names | None = None,
        scale_offset: str = "joint",
        insert: bool = False,
        *,
        example: Any = None,
        decay: float = DECAY,
    ) -> None:
        check_arguments(model, optimizer, every, scale_offset, insert, example, decay)
        self.model, self.ranks = unwrapped(model)
        self.optimizer = innermost(optimizer)
        self.every, self.scale_offset = every, scale_offset
        self.steps = 0
        check_optimizer(self.model, self.optimizer)
        if scale_offset == "off" and self.ranks:
            raise ValueError(
                f"{CALLER}: scale_offset='off' freezes parameters, which DistributedDataParallel waits for; "
                "call it on the model inside, then wrap it"
            )
        self._inserted = insert
        self._include, self._exclude = patterns_of("include", include), patterns_of("exclude", exclude)
        undo = None
        notes: list[str] = []
        if insert:
            affine_too = scale_offset != "off"
            undo, notes = inserting.insert_norms(model, self.optimizer, example, affine_too)
        try:
            self._prepare(decay, notes)
            if example is not None:
                args, kwargs = arguments(example)
                self.settle(args, kwargs)
        except BaseException:
            if undo is not None:
                undo()
            raise
        self._frozen = self._freeze() if scale_offset == "off" else []
        self._handles = [self.optimizer.register_step_post_hook(self._after_step)]
        if self.report.pending:
            self._wait(model)
        if self._far:
            listed = ", ".join(self._far[:3]) + (", ..." if len(self._far) > 3 else "")
            warnings.warn(
                f"{CALLER}: {report.count(len(self._far), 'norm')} ({listed}) {affine.FAR} sqrt(d): the first "
                "projection puts them there, which changes what the model computes; scale_offset='free' leaves "
                "them alone",
                stacklevel=outside(),
            )

    def project(self) -> None:
        """Project now, whatever the number of steps.

        Raises:
            RuntimeError: the handle was removed, or waits for the model to run.
        """
        if not self._handles:
            raise RuntimeError(f"{CALLER}: this handle was removed, and projects no more; make another")
        if self.report.pending:
            raise RuntimeError(f"{CALLER}: {NOT_CHECKED}")
        self._project()

    def remove(self) -> None:
        """Stop projecting, and unfreeze what ``scale_offset="off"`` froze. Inserted norms stay."""
        for handle in (*self._handles, *self._waiting):
            handle.remove()
        for p in self._frozen:
            p.requires_grad_(True)
        self._handles, self._waiting, self._frozen = [], [], []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report.summary()})"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, names and, for weights in low precision, their float32 copies."""
        return {
            **self._options(),
            "steps": self.steps,
            "initial": dict(self._initial),
            "held": [[list(each.names), each.radius, each.shift] for each in self._held],
            "rows": [row.to_dict() for row in self.report.rows],
            "masters": {name: t.clone() for name, t in self._masters.kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the choice of weights, their norms and the count of steps.

        Raises:
            ValueError: the state cannot be read; it is of a call with another `every` or `scale_offset`; the
                optimizer has no parameter of that name and shape; the state does not say which weights to
                project, as it is from before the model ran, and here that is decided. Nothing is changed.
        """
        found = saved.read(state, self._options(), self._parameters, self._initial)
        if found.pending and not self.report.pending:
            raise ValueError(
                f"{CALLER}: the state dict is from before the model ran, so that it does not say which weights "
                "to project, which is decided here already; load it into a handle made without example="
            )
        self.steps, self._initial = found.steps, found.initial
        self.report.rows, self._held = found.rows, found.held
        if not found.pending:
            self._go()
            for name, t in found.masters.items():
                self._masters.load(name, self._parameters[name], t)

    def _options(self) -> dict[str, Any]:
        return {"every": self.every, "scale_offset": self.scale_offset}

    def _prepare(self, decay: float, notes: list[str]) -> None:
        """All that can be known without running the model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        names = {key: name for key, name in names.items() if key in held}
        self._parameters = {n: p for n, p in self.model.named_parameters() if id(p) in names}
        self._called: dict[str, list[str]] = {name: [] for name in self._parameters}
        for alias, p in self.model.named_parameters(remove_duplicate=False):
            if id(p) in names:
                self._called[names[id(p)]].append(alias)
        found, left = affine.affines(self.model, names)
        of_norms = {name for each in found for name in each.names} | left.keys()
        self._masters, self._waiting = Masters(), []
        self._bias_of = choosing.biases(self.model, self._parameters)
        self._candidates = [
            name
            for name, p in self._parameters.items()
            if nn.parameter.is_lazy(p) or (p.dim() > 1 and p.is_floating_point() and name not in of_norms)
        ]
        for argument, patterns in (("include", self._include), ("exclude", self._exclude)):
            check_patterns(argument, patterns, {name: self._called[name] for name in self._candidates})
        for name in self._candidates:
            check_placement(name, self._parameters[name])
        wanted = {*self._candidates, *(b for w, b in self._bias_of.items() if w in self._candidates)}
        wanted = [name for name in self._parameters if name in wanted]
        self._initial = dict(zip(wanted, norms([self._parameters[n] for n in wanted]), strict=True))
        self._affine_held, rows = self._treat(found, decay)
        rows += [
            Row(name, tuple(self._parameters[name].shape), affine.OF_NORM, False, note)
            for name, note in left.items()
        ]
        self._held, self._affines = self._affine_held, found
        self._projector = None
        shapes = {name: tuple(self._parameters[name].shape) for name in self._candidates}
        pending = [Row(name, shape, PENDING) for name, shape in shapes.items()]
        self._affine_rows = rows
        self.report = Report([*pending, *rows], notes)
        if not self._candidates:
            self._adopt({})

    def _treat(self, found: Sequence[affine.Affine], decay: float) -> tuple[list[Held], list[Row]]:
        self._decay: Callable[[], None] | None = None
        self._far: list[str] = []
        if self.scale_offset == "joint":
            held, rows, self._far = affine.joint(found, self._parameters)
            return held, rows
        notes = {"free": "free", "off": "frozen", "decay": f"drawn back by lr · {decay:g}"}
        if self.scale_offset == "decay":
            groups = self.optimizer.param_groups
            self._decay = affine.Decay(found, self._parameters, groups, decay, self._masters)
        return [], affine.others(found, self._parameters, notes[self.scale_offset])

    def settle(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the weights by a run of the model on these arguments."""
        weights = {name: self._bias_of.get(name) for name in self._candidates}
        groups = self.ranks or choosing.groups_of([self._parameters[name] for name in self._candidates])
        if hooks := user_hooks(self.model):
            self.report.notes.append(f"the check left out {report.count(hooks, 'hook')} of the model")
        self._adopt(choosing.check(self.model, weights, self._parameters.keys(), args, kwargs, groups))

    def _adopt(self, findings: Mapping[str, choosing.Finding]) -> None:
        held, rows = [], []
        for name in self._candidates if findings else ():
            found, bias = findings[name], self._bias_of.get(name)
            row = Row(name, tuple(self._parameters[name].shape), found.verdict, note=found.note)
            row.moved = found.moved
            rows.append(row)
            forced = fits(self._include, self._called[name]) and found.verdict in (MOVES, DEAD, JUMPS)
            excluded = fits(self._exclude, self._called[name])
            if not (forced or found.verdict in (INVARIANT, WITH_BIAS)):
                row.note = EXCLUDED if excluded and found.verdict != MOVES else row.note
                continue
            names = (name, bias) if bias and found.verdict == WITH_BIAS else (name,)
            radius = math.hypot(*(self._initial[each] for each in names))
            if excluded:
                row.note = EXCLUDED
            elif not (radius and math.isfinite(radius)):
                row.note = f"its norm was {radius:g} at the start"
            else:
                row.projected = True
                row.note = "; ".join(filter(None, (row.note, "included" if forced else "")))
                held.append(Held(names, radius))
                for each in names[1:]:
                    rows.append(Row(each, tuple(self._parameters[each].shape), WITH_WEIGHT, True))
        for said in warnings_of(rows, self._inserted):
            warnings.warn(f"{CALLER}: {said}", stacklevel=outside())
        self._warn_of_decay([name for each in held for name in each.names])
        self.report.rows[:] = [*rows, *self._affine_rows]
        self._held = [*held, *self._affine_held]
        self._go()

    def _go(self) -> None:
        """Nothing is waited for any more."""
        for handle in self._waiting:
            handle.remove()
        self._waiting = []
        self._projector = Projector(self._parameters, self._held, self._masters)

    def _warn_of_decay(self, projected: Sequence[str]) -> None:
        ids = {id(self._parameters[name]): name for name in projected}
        decayed = [
            ids[id(p)]
            for group in self.optimizer.param_groups
            if float(group.get("weight_decay") or 0) != 0
            for p in group["params"]
            if id(p) in ids
        ]
        if decayed:
            more = ", ..." if len(decayed) > 3 else ""
            warnings.warn(
                f"{CALLER}: {report.count(len(decayed), 'projected parameter')} "
                f"({', '.join(decayed[:3])}{more}) with weight decay: the projection undoes it, but in Adam's "
                "L2 form it changes the direction of steps; put them into a param group with weight_decay=0",
                stacklevel=outside(),
            )

    def _wait(self, outermost: nn.Module) -> None:
        if vars(outermost).get("_compiled_call_impl") is not None:
            self.remove()
            raise ValueError(
                f"{CALLER}: the model is compiled (by its compile()), so that its first call cannot be looked "
                "at; pass example="
            )
        first: Any = FirstCall(self)
        self._waiting = [
            # Ahead of FSDP2's own, which gathers the parameters.
            outermost.register_forward_pre_hook(first, prepend=True, with_kwargs=True),
            self.optimizer.register_step_pre_hook(refuse_step),
        ]

    def _freeze(self) -> list[Tensor]:
        frozen: list[Tensor] = [self._parameters[name] for each in self._affines for name in each.names]
        frozen = [p for p in frozen if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False).grad = None  # which the optimizer would go on to use
        return frozen

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.report.pending:
            raise RuntimeError(f"{CALLER}: after the first step of the optimizer {NOT_CHECKED}")
        self.steps += 1
        if self._decay is not None:
            self._decay()
        if self.steps % self.every == 0:
            self._project()

    def _project(self) -> None:
        if self._projector is not None:
            self._projector()
