"""The calls of the row engine that the gate profiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import rows as row_kernels

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher

ROWS = {
    64: 262144, 128: 262144, 1000: 8192, 1024: 8192, 4095: 8192, 4096: 8192, 8192: 8192,
    16384: 4096, 32768: 2048, 65536: 1024, 131072: 512,
}  # fmt: skip

PARAMETERS = {"ln": "wb", "rms": "w", "crms": ""}

# Compiled to nearly the same code as its neighbour, so one dtype will do.
ALIKE = (131072,)


def _empty(*shape: int, dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


@dataclass(frozen=True)
class RowNorm:
    """One call of the row engine."""

    kind: str
    backward: bool
    width: int
    rows: int | None = None
    layout: str = "contiguous"  # or padded (rows start on 16 bytes), strided (a slice), expanded dy
    add: bool = False
    llama: bool = False
    params: str | None = None  # their dtype where it is not that of x; crms has none
    frozen: bool = False
    without: str = ""  # parameters it could have: b for the bias, wb for both

    @property
    def affine(self) -> str:
        """Which parameters there are."""
        return "".join(p for p in PARAMETERS[self.kind] if p not in self.without)

    @property
    def name(self) -> str:
        parts = [self.kind, "bwd" if self.backward else "fwd", str(self.width)]
        parts = ["add", *parts] if self.add else parts
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += ["llama"] if self.llama else []
        parts += [f"{self.params}params"] if self.params else []
        parts += ["frozen"] if self.frozen else []
        parts += [f"no{self.without}"] if self.without else []
        parts += [f"rows{self.rows}"] if self.rows else []
        return "-".join(parts)

    def matrix(self, rows: int, dtype: str) -> torch.Tensor:
        vector = 16 // DTYPES[dtype].itemsize
        padded = -(-self.width // vector) * vector
        stride = {"padded": padded, "strided": 2 * self.width}.get(self.layout, self.width)
        return _empty(rows, stride, dtype=dtype)[:, : self.width]

    def build(self, rows: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        kind = "layer" if self.kind == "ln" else self.kind
        x, *others = (self.matrix(rows, dtype) for _ in range(4))
        parameters = [_empty(self.width, dtype=self.params or dtype) for _ in range(2)]
        weight = parameters[0] if "w" in self.affine else None
        bias = parameters[1] if "b" in self.affine else None
        residual, dy, dtotal = others
        outputs: list[tuple] = []

        def forward() -> None:
            outputs.append(
                launcher(row_kernels.forward)(
                    x, residual if self.add else None, weight, bias, kind, 1e-6, 0.0, self.llama
                )
            )

        if not self.backward:
            return forward, x
        fake.chosen(forward, target)  # for the statistics, in whatever form the launcher keeps them
        _, total, stats = outputs[0]
        if self.layout == "expanded":
            dy = _empty(dtype=dtype).expand(rows, self.width)
        needs = (True, *(p is not None and not self.frozen for p in (weight, bias)))

        def backward() -> None:
            launcher(row_kernels.backward)(
                dy, dtotal if self.add else None, total if self.add else x, stats, weight, bias,
                kind, 0.0, self.llama, needs,
            )  # fmt: skip

        return backward, x

    def bounds(self) -> Iterator[Bound]:
        """What the row engine must reach in this call."""
        ln, width = self.kind == "ln", self.width
        gradients = 0 if self.frozen else len(self.affine)
        bf16 = ("bf16",)
        if self.layout == "padded" or (width % 8 == 0 and self.layout != "expanded"):
            yield Bound("x_width", least=16)
        # A row too wide for registers is read once more, from L2.
        again = (2 if self.backward else 1) * (width > 16384)
        passes = 4 if self.add else 3 if self.backward else 2
        yield Bound("x_passes", most=passes + again + 0.01)
        yield Bound("launches", most=2 if self.backward and gradients else 1)
        made = 1 + gradients + bool(gradients) if self.backward else 2 + self.add
        yield Bound("allocations", most=made)
        yield Bound("arguments", most=10 + self.add if self.backward else 7 + 3 * self.add)
        yield Bound("copies", most=0)
        if self != RowNorm(self.kind, self.backward, width):
            return
        yield Bound("variants", most=1)
        if width == 4096:
            l2 = (3.25 if ln else 3.15) if self.backward else (2.3 if ln else 2.2)
            instructions = (20 if ln else 14) if self.backward else (12 if ln else 8)
            yield Bound("l2_passes", most=l2, dtypes=bf16)
            yield Bound("instructions", most=instructions, dtypes=bf16)
            yield Bound("double_scalars", most=2, dtypes=bf16)
        if width == 4095 and not ln:
            yield Bound("instructions", most=17.1 if self.backward else 10.9, dtypes=bf16)
        if self.backward:
            in_flight = {64: 32, 128: 32, 1024: 32, 4096: 48, 8192: 64}
            if width in in_flight:
                yield Bound("kb_in_flight", least=in_flight[width], dtypes=bf16)
            if width in (4096, 8192):
                yield Bound("pipelined", least=1, dtypes=bf16)
            if ln and width in (1024, 4096, 8192):
                yield Bound("barriers", most=3)

    def case(self, plan: Plan) -> Case:
        rows = self.rows or ROWS.get(self.width, 8192)
        return Case(self.name, self.build, rows, tuple(self.bounds()), plan)


def row_cases() -> Iterator[Case]:
    for backward in (False, True):
        for kind in ("ln", "rms"):
            plain = RowNorm(kind, backward, 4096)
            for width in ROWS:
                plan = SWEPT if width not in ALIKE else ON_SM90
                if kind == "ln" and width in (4096, 32768):
                    plan = EVERYWHERE
                yield replace(plain, width=width).case(plan)
            special = [  # odd few rows, for no workspace may have as many elements as x
                replace(plain, rows=7), replace(plain, rows=101), replace(plain, rows=2048),
                replace(plain, layout="strided"), replace(plain, add=True),
                replace(plain, params="fp32"),
            ]  # fmt: skip
            if backward:
                special += [replace(plain, layout="expanded"), replace(plain, frozen=True)]
            if kind == "rms":
                special.append(replace(plain, llama=True))
            for row_norm in special:
                yield row_norm.case(ON_SM90)
        for kind in ("rms", "crms"):
            for width in (1023, 4095):
                yield RowNorm(kind, backward, width, layout="padded").case(SWEPT)
