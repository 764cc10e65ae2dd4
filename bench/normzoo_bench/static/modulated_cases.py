"""The calls of the modulated row norms that the gate profiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import modulated

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher


@dataclass(frozen=True)
class ModulatedNorm:
    """One call for x (samples, tokens, width) with scale and shift of the samples, or of the tokens."""

    kind: str
    backward: bool
    width: int = 1152  # as DiT-XL's
    tokens: int = 256
    samples: int = 32
    rows: bool = False  # scale and shift of the tokens
    params: str | None = None  # their dtype where it is not that of x
    part: int | None = None

    @property
    def name(self) -> str:
        kind = {"layer": "ln"}.get(self.kind, self.kind)
        size = f"{self.samples}x{self.tokens}x{self.width}"
        parts = ["mod", kind, "bwd" if self.backward else "fwd", size, "token" if self.rows else "sample"]
        parts += [f"{self.params}params"] if self.params else []
        parts += [f"part{self.part}"] if self.part else []
        return "-".join(parts)

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        shape, kind = (samples, self.tokens, self.width), DTYPES[dtype]
        x, dy = (torch.empty(shape, dtype=kind, device="meta") for _ in range(2))
        kind = DTYPES[self.params or dtype]
        if self.rows:
            scale, shift = (torch.empty(shape, dtype=kind, device="meta") for _ in range(2))
        else:  # two of the chunks that one linear layer makes
            chunks = torch.empty((samples, 6 * self.width), dtype=kind, device="meta").chunk(6, dim=1)
            scale, shift = chunks[1], chunks[0]
        part = self.part or self.width
        outputs: list[tuple] = []

        def forward() -> None:
            outputs.append(launcher(modulated.forward)(x, scale, shift, self.kind, 1e-6, 1.0, part, True))

        if not self.backward:
            return forward, x
        fake.chosen(forward, target)  # for the statistics, in whatever form the launcher keeps them
        stats = outputs[0][1]

        def backward() -> None:
            known = (None, self.kind, 1.0, part, [True, True, False])
            if not self.rows:
                known = (shift, self.kind, 1.0, part, [True, True, True])
            launcher(modulated.backward)(dy, x, stats, scale, *known)

        return backward, x

    def bounds(self) -> Iterator[Bound]:
        yield Bound("x_width", least=16)
        # The gradient of a shift of the tokens is dy.
        passes = (5 if self.backward else 4) if self.rows else 3 if self.backward else 2
        if not self.params:
            yield Bound("x_passes", most=passes + 0.01)
        yield Bound("launches", most=2 if self.backward and not self.rows else 1)
        yield Bound("allocations", most=(2 if self.rows else 5) if self.backward else 2)
        yield Bound("arguments", most=12 if self.backward else 10)
        yield Bound("copies", most=0)
        if self.width >= 1024 and self.backward:
            yield Bound("kb_in_flight", least=32, dtypes=("bf16",))
            yield Bound("pipelined", least=1, dtypes=("bf16",))

    def case(self, plan: Plan) -> Case:
        return Case(self.name, self.build, self.samples, tuple(self.bounds()), plan)


def modulated_cases() -> Iterator[Case]:
    for backward in (False, True):
        for rows in (False, True):
            plain = ModulatedNorm("layer", backward, rows=rows)
            yield plain.case(SWEPT)
            yield replace(plain, params="fp32").case(ON_SM90)
            yield replace(plain, kind="rms").case(ON_SM90)
        yield replace(plain, width=8192, samples=8, rows=False).case(ON_SM90)
        yield ModulatedNorm("root", backward, width=1024, part=256).case(EVERYWHERE)
