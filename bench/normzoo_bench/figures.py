"""Figures as SVG that stands in a page, in the style of the reports."""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INK, _FAINT, OURS = "#26323b", "#b9c2c9", "#0b7a75"
_WIDTH = 4.0  # inches; at the width of a phone the letters of 9 points stay legible

_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "normzoo",  # or names inside the file would change from run to run
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6eaed",
    "axes.axisbelow": True,
}


def there() -> bool:
    """Whether charts can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def figure(height: float, width: float = _WIDTH, columns: int = 1, background: str = "none"):
    """Axes to draw on, an array of them where there are columns, which share the vertical axis; and a function
    that gives the SVG element once the block has ended. Sizes are inches."""
    with sheet(height, width, columns=columns, background=background) as (panels, drawn):
        yield panels, lambda: drawn.svg


@dataclass
class Drawn:
    """A figure that is done."""

    figure: Any
    svg: str = ""
    """An element that stands in a page."""

    def png(self, colors: int = 48) -> bytes:
        with rc_context():
            return _png(self.figure, colors)


@contextmanager
def sheet(
    height: float,
    width: float = _WIDTH,
    rows: int = 1,
    columns: int = 1,
    background: str = "none",
    share: str = "y",
):
    """Axes to draw on, an array of them where there are several, which share an axis; and what is drawn once
    the block has ended. Sizes are inches."""
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context():
        made = Figure(figsize=(width, height), layout="constrained", facecolor=background)
        drawn = Drawn(made)
        yield made.subplots(rows, columns, sharex=share == "x", sharey=share == "y"), drawn
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        made.savefig(text, format="svg", metadata=nothing)
    drawn.svg = text.getvalue()[text.getvalue().index("<svg") :]  # without the prolog of a file


def rc_context(**other: Any) -> Any:
    """The style of the figures, for the length of a block."""
    import matplotlib

    return matplotlib.rc_context(_STYLE | other)


def _png(made: Any, colors: int) -> bytes:
    from PIL import Image

    full, few = io.BytesIO(), io.BytesIO()
    made.savefig(full, format="png", dpi=100)
    Image.open(full).convert("RGB").quantize(colors, kmeans=4).save(few, format="png", optimize=True)
    return few.getvalue()


@contextmanager
def picture(height: float, width: float, rows: int, columns: int):
    """The same for photos, on white: an array (rows, columns) of axes without ticks, and a function that gives
    the bytes of a PNG of 256 colors."""
    from matplotlib.figure import Figure

    drawn: list[bytes] = []

    with rc_context(**{"axes.grid": False}):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        panels = made.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
        yield panels, lambda: drawn[0]
        drawn.append(_png(made, 256))
