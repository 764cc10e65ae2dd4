"""Figures as SVG that stands in a page, in the style of the reports."""

from __future__ import annotations

import io
from contextlib import contextmanager
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
    import matplotlib
    from matplotlib.figure import Figure

    drawn = io.StringIO()

    def svg() -> str:
        text = drawn.getvalue()
        return text[text.index("<svg") :]  # without the prolog of a file

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained", facecolor=background)
        yield made.subplots(ncols=columns, sharey=True), svg
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        made.savefig(drawn, format="svg", metadata=nothing)


@contextmanager
def picture(height: float, width: float, rows: int, columns: int):
    """The same for photos, on white: an array (rows, columns) of axes without ticks, and a function that gives
    the bytes of a PNG of 256 colors."""
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

    drawn = io.BytesIO()

    def png() -> bytes:
        few = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(256, kmeans=4).save(few, format="png", optimize=True)
        return few.getvalue()

    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        panels = made.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
        yield panels, png
        made.savefig(drawn, format="png", dpi=100)
