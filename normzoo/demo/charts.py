"""The charts of the report."""

from __future__ import annotations

from collections.abc import Sequence

from normzoo_bench.figures import INK, OURS, figure

_HUES = ("#c24e00", "#0067a5", "#97478a", "#7a5f00", "#7d8890")
_DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-")  # or lines would be told apart by colour alone


def loss_curve(curve: Sequence[tuple[int, float]], held_out: float, by_frequency: float) -> str:
    """Bits a character against steps, between what frequencies alone give and what held-out text needs."""
    with figure(2.9) as (axes, svg):
        axes.axhline(by_frequency, color=INK, linewidth=1, linestyle=":", label="by frequencies of characters")
        axes.axhline(held_out, color=INK, linewidth=1, linestyle="--", label="held-out text, after training")
        axes.plot(*zip(*curve, strict=True), color=OURS, linewidth=1.5, label="training text")
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, curve[-1][0])
        axes.set_xlabel("steps")
        axes.set_ylabel("bits per character")
        axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=3)
    return svg()


def speed_bars(timings: Sequence[dict]) -> str:
    """How many times as fast as torch, one bar a measurement, with the spread as a line."""
    names = [f"{row['layer']}  {row['dtype']}  {row['pass']}" for row in timings]
    medians = [row["speedup"]["median"] for row in timings]
    around = [
        [row["speedup"]["median"] - row["speedup"]["p20"] for row in timings],
        [row["speedup"]["p80"] - row["speedup"]["median"] for row in timings],
    ]
    with figure(0.5 + 0.27 * len(timings)) as (axes, svg):
        bars = axes.barh(names, medians, xerr=around, color=OURS, height=0.62, ecolor=INK)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1.18 * max(row["speedup"]["p80"] for row in timings))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("times the speed of torch")
    return svg()


def accuracy_curves(found: dict) -> str:
    """Per cent right against the source weight, a line a corruption and one for their mean."""
    weights = found["source_weights"]
    best = found["shown"][1]
    with figure(3.2) as (axes, svg):
        axes.plot(weights, found["means"], color=OURS, linewidth=2.5, label="mean of corrupted", zorder=3)
        axes.plot(weights[best], found["means"][best], "o", color=OURS, markersize=6, zorder=4)
        for (name, right), color, dashes in zip(found["right"].items(), _HUES, _DASHES, strict=True):
            axes.plot(weights, right, color=color, linestyle=dashes, linewidth=1.2, label=name)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 102)
        axes.set_xlabel("source weight")
        axes.set_ylabel("per cent right")
        axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, handlelength=3)
    return svg()
