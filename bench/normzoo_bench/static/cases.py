"""All cases of the gate, and the exceptions that are known."""

from __future__ import annotations

from .case import Case
from .channel_cases import channel_cases
from .choice_cases import choice_cases
from .curve_cases import curve_cases
from .modulated_cases import modulated_cases
from .peer_cases import peer_cases
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
    ("*rms-bwd-16384-fp32@*", "x_passes", _TWICE),
    ("add-rms-bwd-16384-bf16@sm_90", "spills", "a residual more than fits; two sweeps would read L2 again"),
    ("pn-bwd-*x8192-g1-*@*", "spills", "a group of 8192 leaves a few bytes no register beside both sums"),
    ("pn-bwd-*x2048x16x16-g1-*@*", "spills", "with fewer positions a tile would use little of what it reads"),
    ("pn-?wd-*x2048x*-g1~*@*", "spills", "of groups of 2048 in planes: as above"),
    ("pn-bwd-*x442x*-g1~*@*", "spills", "of groups of 512 in planes of odd size: as above"),
    ("pn-bwd-*x2048x*-g4~*@*", "spills", "of groups of 512 in planes of odd size: as above"),
    ("un-fwd-*x20x8191x1~*@*", "spills", "a few bytes; with smaller tiles a gradient loses a digit"),
    ("on-chip-standardize-?wd-groups*~*@*", "spills", "a channel a group, an odd number of positions; off"),
    ("ln-bwd-*-expanded~*@*", "spills", "odd, wider than a program, one gradient for all: rare together"),
    ("rms-bwd-4095-bf16@*", "instructions", "with fewer the gradient of narrow rows loses a digit"),
)

CASES: tuple[Case, ...] = (
    *row_cases(), *modulated_cases(), *channel_cases(), *running_cases(), *curve_cases(), *pooling_cases(),
    *weight_cases(), *standardize_cases(), *sets_cases(), *choice_cases(), *peer_cases(),
)  # fmt: skip
