"""One case, measured: what every contender is, whether it computes that, what it keeps, how long it takes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor, nn

import normzoo

from .. import checks
from ..cases import DTYPES
from ..clocks import Rotation
from ..measure import Settings, forget_compiled, timed
from ..peers import unchanged_state
from ..results import Document, Unfit
from .cases import MODELS, Batch, Case
from .conversions import CONTENDERS, Contender, Conversion, converted

SAME = 1e-8
"""Of the largest entry, in float64: rounding stays below through all blocks, another function is far above."""

_TURNED = 0.1
"""What a gradient may be off: where rounding turns a ReLU, those of all layers before it jump, whoever computes
them. A wrong one is off by more."""
_RATE = 1e-5
_COMPILED = 64
"""Forms of one block: of every shape, in every conversion."""

Results = dict[str, dict[str, Tensor]]
"""Output, and in training gradients by parameter and the state afterwards."""


@dataclass(frozen=True)
class Truth:
    """What a converted model has to compute."""

    model: nn.Module
    """In the dtype of the case."""
    results: Results
    """In float64."""
    difference: float
    """From those of the model with torch's norms: the worst, of the largest entry of each."""
    allowed: dict[str, float]
    """Errors by kind of result: ``LARGEST_ERROR``, or twice that of the model with torch's norms, where it is
    the same function, else of the eager reference."""

    @property
    def same(self) -> bool:
        return self.difference <= SAME


def measure_model(case: Case, settings: Settings, document: Document) -> None:
    """Adds the rows of `case` to `document`, of the contenders in `settings` that there are for it.

    They are timed by the clock that counts the host's work.
    """
    forget_compiled()
    in_training = case.direction == "step"
    with (
        torch.set_grad_enabled(in_training),
        torch._dynamo.config.patch(recompile_limit=_COMPILED),
        warnings.catch_warnings(),
    ):
        # Dynamo looks at the gradient of what goes into a block, of which torch says that there is none.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        _Measurement(case, settings, document).run()


class _Measurement:
    def __init__(self, case: Case, settings: Settings, document: Document) -> None:
        self.case, self.settings, self.document = case, settings, document
        self.model, self.batch = case.start(settings.device)
        self.truths: dict[Conversion | None, Truth] = {}

    def run(self) -> None:
        rows, rotations = [], []
        for name in self.case.contenders(self.settings.contenders):
            if self.settings.late:
                self.document.not_run.append(f"{self.case} {name}")
                continue
            try:
                row, call = self.ready(CONTENDERS[name])
            except Exception as failure:
                self.document.add_failed(self.case, name, failure, self.case.direction)
                continue
            rows.append(row)
            rotations.append(Rotation(lambda _, call=call: call(), 1))
        clock, rounds = self.settings.clocks[-1], self.settings.rounds
        self.document.rows += timed(
            self.case, clock, rows, rotations, rounds, self.document, lambda name: CONTENDERS[name].baselines
        )

    def ready(self, contender: Contender) -> tuple[dict, Callable[[], object]]:
        """The row of a contender but for its times, and what is to be timed.

        Raises:
            Unfit: it changes a function that is to stay, or keeps one that is to change; or its results are off
                by more than rounding explains.
        """
        truth = self.truth(contender.conversion)
        model = contender.compiled(copy.deepcopy(truth.model))
        with contender.context(), unchanged_state(model):
            error = errors(results(model, self.batch), truth.results)
        checks.demand(error, truth.allowed)
        call = self.forward(model, contender)
        saved = None
        if self.case.direction == "step":
            saved = checks.saved_bytes(call, apart=tuple(model.parameters()))
            call = self.step(model, call)
        call()  # the state of an optimizer is no part of the memory of a step, but gradients are
        model.zero_grad()
        row = {
            **self.case.key,
            "contender": contender.name,
            "runs": "",
            "direction": self.case.direction,
            "error": error,
            "same": truth.same,
            "difference": truth.difference,
            "saved_bytes": saved,
            "peak_bytes": checks.peak_bytes(call, self.settings.device),
            **{"launches": None, "bytes": None, "cold": True},
        }
        return row, call

    def truth(self, conversion: Conversion | None) -> Truth:
        """What all contenders of a conversion have to compute."""
        if conversion not in self.truths:
            self.truths[conversion] = self._truth(conversion)
        truth = self.truths[conversion]
        if conversion is not None and conversion.keeps != truth.same:
            what = "changes the function" if conversion.keeps else "leaves the function as it was"
            raise Unfit(f"{what}: in float64 results differ by {truth.difference:.1e} of the largest entry")
        return truth

    def _truth(self, conversion: Conversion | None) -> Truth:
        double = copy.deepcopy(self.model).double()
        batch = self.batch.beside(double)
        exact = results(converted(conversion, double, batch.x), batch)
        model = converted(conversion, copy.deepcopy(self.model), self.batch.x)
        difference = 0.0
        if conversion is not None:
            of_torch = self.truth(None)
            difference = worst(errors(exact, of_torch.results).values())
            if difference <= SAME:
                return Truth(model, exact, difference, of_torch.allowed)
        with normzoo.backend("reference"), unchanged_state(model):
            error = errors(results(model, self.batch), exact)
        least = dict.fromkeys(error, checks.LARGEST_ERROR[DTYPES[self.case.dtype][0]]) | {"gradients": _TURNED}
        allowed = {what: max(least[what], 2 * most) for what, most in error.items()}
        return Truth(model, exact, difference, allowed)

    def forward(self, model: nn.Module, contender: Contender) -> Callable[[], Tensor]:
        in_training = self.case.direction == "step"

        def call() -> Tensor:
            with contender.context():
                y = model(self.batch.x)
                return loss(y, self.batch.target) if in_training else y

        return call

    def step(self, model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = MODELS[self.case.model].optimizer(model.parameters(), lr=_RATE)

        def call() -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        return call


def loss(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, -2), target)


def results(model: nn.Module, batch: Batch) -> Results:
    """What a model makes of a batch; with gradients where they are enabled. Its state moves on."""
    y = model(batch.x)
    found = {"y": {"y": y.detach()}}
    if torch.is_grad_enabled():
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss(y, batch.target), parameters)
        found["gradients"] = dict(zip(names, gradients, strict=True))
        if state := {name: t.clone() for name, t in model.named_buffers()}:
            found["state"] = state
    return found


def errors(found: Results, exact: Results) -> dict[str, float]:
    """The worst error of each kind of result, of those that both models have.

    Gradients are compared by their norms, and those that are zero in exact arithmetic, as of a bias of all
    keys, are left out.
    """
    shared = {kind: [name for name in exact[kind] if name in found[kind]] for kind in found if kind in exact}
    if gradients := exact.get("gradients"):
        least = SAME * max(float(t.norm()) for t in gradients.values())
        shared["gradients"] = [name for name in shared["gradients"] if gradients[name].norm() > least]
    measures = {"gradients": _by_norm}
    return {
        kind: worst(
            measures.get(kind, checks.relative_error)(name, found[kind][name], exact[kind][name])
            for name in names
        )
        for kind, names in shared.items()
        if names
    }


def _by_norm(name: str, found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        raise Unfit(
            f"the gradient of {name} has the shape {tuple(found.shape)}, it should be {tuple(exact.shape)}"
        )
    return float((found.double() - exact).norm() / exact.norm())


def worst(numbers: Iterable[float]) -> float:
    """The largest, or NaN where there is one."""
    return max(numbers, key=lambda number: math.inf if math.isnan(number) else number)
