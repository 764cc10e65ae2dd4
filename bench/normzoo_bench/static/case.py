"""What a case of the gate is: a call, what it must reach, and what it is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from types import MethodType
from typing import Any

import torch

from . import fake

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROW_COUNTS = (1, 7, 16, 100, 128, 1000, 1024, 4096, 8190, 8192, 8200, 16384)

Call = Callable[[], object]
Build = Callable[[int, str, fake.Target], tuple[Call, torch.Tensor]]
Plan = tuple[tuple[str, tuple[str, ...]], ...]  # (target, dtypes)


@dataclass(frozen=True)
class Bound:
    """How large or small one measure of a case may be; `dtypes` where that holds for some only."""

    measure: str
    most: float = inf
    least: float = -inf
    dtypes: tuple[str, ...] = tuple(DTYPES)


@dataclass(frozen=True)
class Case:
    """`build(rows, dtype, target)` gives the launcher call and the x its passes are counted in."""

    name: str
    build: Build
    rows: int
    bounds: tuple[Bound, ...]
    plan: Plan  # what the default run compiles it for
    loads: tuple[tuple[str, int], ...] = ()  # what a kernel finds in memory that decides what it does

    @property
    def source(self) -> Any:
        """What builds it: a call described by the fields of a dataclass."""
        assert isinstance(self.build, MethodType)
        return self.build.__self__

    def needs(self, measure: str, dtype: str) -> bool:
        return any(b.measure == measure and dtype in b.dtypes for b in self.bounds)


ON_SM90: Plan = (("sm_90", ("bf16",)),)
SWEPT: Plan = (("sm_90", ("bf16", "fp32")),)
# float16 becomes the code of bfloat16 but for the conversions, and sm_100 has the registers and the shared
# memory of sm_90: each of the two shows the other.
EVERYWHERE: Plan = (
    *((target, ("bf16", "fp32")) for target in fake.TARGETS if target != "sm_100"),
    ("sm_100", ("fp16",)),
)


def launcher(operator: Any) -> Any:
    """The launcher under an operator, which would show only its fake here."""
    return operator.__wrapped__
