"""Forms that only a measurement can choose between: built, tested and checked without a GPU, and off.

A choice holds for the whole process. It is read where a launcher plans a call, outside of what torch.compile
traces, and neither shapes nor what is saved for a backward pass depend on it: a backward pass runs on what any
forward pass has saved. Two choices may differ in the last bits of a result.

``python -m normzoo_bench.gpu`` measures every choice against its default. What turns out to be faster is
switched on for good by a new `default` here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from ._launch import forget


class Choice(NamedTuple):
    default: int | bool
    others: tuple[int | bool, ...]
    question: str


CHOICES = {
    "on_chip": Choice(
        False,
        (True,),
        "Is a batch, group or instance norm faster where one program holds all of a set, which saves a read of "
        "x, but loads first and stores last?",
    ),
    "reversed_map": Choice(
        False,
        (True,),
        "Does the sweep that writes find more in the L2 cache when it begins where the statistics have ended?",
    ),
    "row_group": Choice(
        4,
        (8, 16),
        "Rows of 16384 16-bit numbers, or as many bytes, that a backward pass takes in a step: do more of them "
        "add to the gradients of parameters so much less often that this makes good what the second sweep then "
        "misses in the L2 cache? With more than 4, RMSNorm sweeps twice where its rows would fit on chip.",
    ),
}

_chosen: dict[str, int | bool] = {name: choice.default for name, choice in CHOICES.items()}


def chosen(name: str) -> int | bool:
    return _chosen[name]


@contextlib.contextmanager
def trying(**values: int | bool) -> Iterator[None]:
    """A block in which these choices hold, for tests, checks and measurements; for one thread at a time.

    Raises:
        ValueError: there is no such choice, or it has no such value.
    """
    for name, value in values.items():
        if name not in CHOICES:
            raise ValueError(f"trying: there is no choice {name!r}, only {', '.join(CHOICES)}")
        allowed = (CHOICES[name].default, *CHOICES[name].others)
        if value not in allowed:
            raise ValueError(f"trying: {name} is {value!r}; it must be one of {allowed}")
    before = dict(_chosen)
    try:
        _chosen.update(values)
        forget()  # plans that were made under other choices
        yield
    finally:
        _chosen.update(before)
        forget()
