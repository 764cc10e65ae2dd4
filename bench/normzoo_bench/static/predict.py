"""How long a call should take on a named GPU, from what the gate counts: bytes, instructions, launches.

A launch takes as long as the slowest of three: its bytes from and to memory at the bandwidth of a copy, all
bytes that it asks L2 for at the bandwidth of L2, its instructions at the rate at which they issue. Launches
follow one another at a gap, as in a CUDA graph. Memory is cold before the call; what the call itself has
touched is found in L2 as long as all of it fits there. Nothing else is in it: no latency, no last programs that
run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    name: str
    copy: float
    """Bytes a second, read and written, of a copy."""
    source: str
    """Where that number comes from."""
    sm_count: int = 132
    l2: float = 5.5e12
    """Bytes a second; an assumption."""
    l2_useful: int = 30 << 20
    """Bytes that are still there for a second read: of 50 to 60 MB in two halves."""
    clock: float = 1.7e9
    """An assumption, below the boost clock of 1.98 GHz."""
    gap: float = 1e-6
    """Seconds from one launch to the next; an assumption."""

    @property
    def issue(self) -> float:
        """Instructions of single threads a second: four warps a cycle."""
        return self.sm_count * 4 * 32 * self.clock

    def copying(self, bandwidth: float) -> Gpu:
        return replace(self, copy=bandwidth, source="measured in the same process")


GPUS = {
    "H100": Gpu("H100", 2.89e12, "assumed: a stream of plain loads, as published for quack"),
    "H200": Gpu("H200", 4.3e12, "assumed: the copy that the goals are set against"),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds; the three are sums over the launches."""

    seconds: float
    memory: float
    l2: float
    instructions: float
    bytes: float
    """From and to memory."""

    @property
    def bound(self) -> str:
        of = {"memory": self.memory, "L2": self.l2, "instructions": self.instructions}
        slowest = max(of, key=of.__getitem__)
        return slowest if of[slowest] > self.seconds / 2 else "launches"

    def share_of_copy(self, gpu: Gpu) -> float:
        return self.bytes / gpu.copy / self.seconds


def predict(rows: Sequence[Row], gpu: Gpu) -> Prediction:
    """For the launches of one call, in their order."""
    touched: dict[int, float] = {}
    for row in rows:
        for place, (_, size) in row["traffic"].items():
            touched[place] = max(touched.get(place, 0.0), size)
    stays = sum(touched.values()) <= gpu.l2_useful
    seen: set[int] = set()
    total = memory = l2 = instructions = moved = 0.0
    for row in rows:
        cold = sum(size for place, (_, size) in row["traffic"].items() if not (stays and place in seen))
        asked = sum(asked for asked, _ in row["traffic"].values())
        seen |= row["traffic"].keys()
        issued = row.get("instructions", 0.0) * row["elements"] if row["tile"] else 0.0
        spent = cold / gpu.copy, asked / gpu.l2, issued / gpu.issue
        total += max(spent) + gpu.gap
        memory, l2, instructions = (t + own for t, own in zip((memory, l2, instructions), spent, strict=True))
        moved += cold
    # Copies that torch makes of tensors as large as x.
    copied = rows[0]["call"]["copies"] * rows[0]["x_bytes"]
    extra = copied / gpu.copy
    return Prediction(total + extra, memory + extra, l2, instructions, moved + copied)
