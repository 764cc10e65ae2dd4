"""The calls of the running engine that the gate profiles: PowerNorm in both phases, and Unified Norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from normzoo_kernels import running

from . import fake
from .case import DTYPES, EVERYWHERE, ON_SM90, SWEPT, Bound, Call, Case, Plan, launcher

_WARMUP = 1000


@dataclass(frozen=True)
class RunningNorm:
    """A step of training on x (samples, channels, *size), or on tokens (samples, channels) without a size."""

    backward: bool
    channels: int
    size: tuple[int, ...] = ()
    samples: int = 8192
    layout: str = "planes"  # or last: the channels of a position side by side
    groups: int = 0
    unified: bool = False
    warm: bool = False  # PowerNorm in its warm-up
    padded: bool = False
    window: int = 4
    swept: bool = True  # with the sweeps over x, not only what is between them

    @property
    def name(self) -> str:
        kind = "un" if self.unified else "pn-warm" if self.warm else "pn"
        size = "x".join(map(str, (self.samples, self.channels, *self.size)))
        parts = [kind, "bwd" if self.backward else "fwd", size]
        parts += [self.layout] if self.layout != "planes" else []
        parts += [f"g{self.groups}"] if self.groups else []
        parts += ["padded"] if self.padded else []
        parts += ["rule"] if not self.swept else []
        parts += [f"window{self.window}"] if self.window != 4 else []
        return "-".join(parts)

    def build(self, samples: int, dtype: str, target: fake.Target) -> tuple[Call, torch.Tensor]:
        shape, kind = (samples, self.channels, *self.size), DTYPES[dtype]
        x, dy = (torch.empty(shape, dtype=kind, device="meta") for _ in range(2))
        if self.layout == "last":
            sizes = (samples, *self.size, self.channels)
            x, dy = (torch.empty(sizes, dtype=kind, device="meta").movedim(-1, 1) for _ in range(2))
        pad = torch.empty((samples, *self.size), dtype=torch.bool, device="meta") if self.padded else None
        c = self.channels
        phi, ema, weight, bias = (torch.empty(c, device="meta") for _ in range(4))
        number = torch.empty((), dtype=torch.long, device="meta")
        window = torch.empty((self.window, c), device="meta")
        sums = torch.empty((2, c + 1), device="meta")
        kept = torch.empty((4, c), device="meta"), torch.empty(5, dtype=torch.long, device="meta")
        given = (None, None, 1, *kept, weight, torch.float32)

        def power_forward() -> None:
            y, sums = launcher(running.sweep)(x, pad, phi, weight, bias, number, _WARMUP, self.groups, 1e-5)
            rule = launcher(running.power_forward)(sums, phi, number, 1e-5, 0.9, _WARMUP, False, True)
            state = (phi, None, number, None, number)
            how = (_WARMUP, self.groups, None)
            launcher(running.map_into)(y, x, rule[0], weight, bias, *how, rule[1], *state)

        def power_backward() -> None:
            _, sums = launcher(running.gradient)(dy, x, kept[0], weight, ema, 0.1, self.groups)
            launcher(running.power_backward)(sums, *given, ema, number, 0.1, True)

        def unified_forward() -> None:
            y, found = x, sums
            if self.swept:
                y, found = launcher(running.sweep)(x, pad, None, weight, bias, None, 0, 0, 1e-5)
            how = (1e-5, 0.9, _WARMUP, _WARMUP, True, True)
            rule = launcher(running.unified_forward)(found, phi, window, number, *how)
            state = (phi, window, number, number, number)
            if self.swept:
                launcher(running.map_into)(y, x, rule[0], weight, bias, None, 0, None, rule[1], *state)

        def unified_backward() -> None:
            found = sums
            if self.swept:
                _, found = launcher(running.gradient)(dy, x, None, None, None, 0.0, 0)
            rule = launcher(running.unified_backward)(found, *given, ema, window, 0.9, _WARMUP, True)
            if self.swept:
                launcher(running.late_gradient)(dy, x, rule[0], 0, True, rule[1], ema, window, number)

        power, unified = (power_forward, power_backward), (unified_forward, unified_backward)
        return (unified if self.unified else power)[self.backward], x

    def bounds(self, plan: Plan) -> Iterator[Bound]:
        if not self.swept:
            yield Bound("launches", most=1)
            return
        swept_once = not (self.unified or (self.warm and not self.backward))
        passes = (3 if swept_once else 5) if self.backward else (2 if swept_once else 3)
        yield Bound("x_passes", most=passes + 0.03)
        yield Bound("launches", most=4 if self.unified or not self.backward else 3)
        yield Bound("copies", most=0)
        yield Bound("arguments", most=18)
        if plan != EVERYWHERE:
            group = self.channels // self.groups if self.groups else 8
            narrow = group % 8 or (self.size and group > 1024)  # few positions of so many channels
            yield Bound("x_width", least=8 if narrow else 16)
            yield Bound("variants", most=5)  # one kernel sums and maps, in one part or several
            yield Bound("kb_in_flight", least=32, dtypes=("bf16",))

    def case(self, plan: Plan) -> Case:
        loads = (("iters_ptr", 0 if self.warm else _WARMUP), ("flags_ptr", 1))
        return Case(self.name, self.build, self.samples, tuple(self.bounds(plan)), plan, loads)


def running_cases() -> Iterator[Case]:
    for backward in (False, True):
        tokens = RunningNorm(backward, 1024)
        images = RunningNorm(backward, 256, (56, 56), 32)
        for case in (replace(tokens, groups=1), images):
            yield case.case(SWEPT)
        for case in (tokens, replace(tokens, groups=16), replace(images, layout="last")):
            yield case.case(ON_SM90)
        for wide in (4096, 8192):
            yield replace(tokens, channels=wide, groups=1, samples=2048).case(ON_SM90)
        yield replace(images, groups=4).case(ON_SM90)
        yield replace(images, channels=2048, size=(16, 16), groups=1).case(ON_SM90)
        yield replace(tokens, warm=True).case(ON_SM90)
        yield replace(tokens, unified=True).case(ON_SM90)
        yield replace(images, unified=True).case(ON_SM90)
        yield replace(tokens, unified=True, window=64).case(ON_SM90)
        # Every function for every target.
        small = replace(tokens, samples=1024, channels=128, padded=True)
        yield replace(small, groups=8).case(EVERYWHERE)
        yield replace(small, unified=True, swept=False).case(EVERYWHERE)
        yield replace(tokens, channels=768, groups=64, padded=True).case(ON_SM90)
