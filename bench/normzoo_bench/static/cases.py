"""All cases of the gate, the exceptions that are known, and what peers reach."""

from __future__ import annotations

import csv
from importlib import resources

from .case import Case
from .channel_cases import channel_cases
from .curve_cases import curve_cases
from .modulated_cases import modulated_cases
from .pooling_cases import pooling_cases
from .row_cases import row_cases
from .running_cases import running_cases
from .sets_cases import sets_cases
from .standardize_cases import standardize_cases
from .weight_cases import weight_cases

# (glob over case-dtype@target, measure, reason): shown in the table, never silent.
_TWICE = "the gradients of its parameters leave no registers for the row: it is read again, from L2"
EXCEPTIONS: tuple[tuple[str, str, str], ...] = (
    ("ln-bwd-16384-*@*", "x_passes", _TWICE),
    ("rms-bwd-16384-fp32@*", "x_passes", _TWICE),
    ("pn-bwd-*x8192-g1-*@*", "spills", "a group of 8192 leaves a few bytes no register beside both sums"),
    ("pn-bwd-*x2048x16x16-g1-*@*", "spills", "with fewer positions a tile would use little of what it reads"),
    ("rms-bwd-4095-bf16@*", "instructions", "with fewer the gradient of narrow rows loses a digit"),
)

CASES: tuple[Case, ...] = (
    *row_cases(), *modulated_cases(), *channel_cases(), *running_cases(), *curve_cases(), *pooling_cases(),
    *weight_cases(), *standardize_cases(), *sets_cases(),
)  # fmt: skip


def peers() -> dict[str, dict[str, str]]:
    """Best figures of Liger-Kernel, flash-attention, fla and torch.compile, by case and dtype.

    The peers compiled the same way for sm_90: Triton 3.7.1, their own launchers, no GPU.
    """
    text = resources.files(__package__).joinpath("peers.csv").read_text()
    return {row["case"]: row for row in csv.DictReader(text.splitlines())}
