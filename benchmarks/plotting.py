"""How the figures look, and where each says that it comes from."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .report import Row

# Okabe and Ito's colours, told apart by the colour-blind too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"),
)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}
DPI = 130
SOURCE_KEY = "Source"


def panels(rows: int, columns: int, width: float, height: float, **kwargs: object) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` times `columns` axes, in inches, and the axes in reading order."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.ravel())


def source_of(path: Path, rows: Iterable[Row]) -> str:
    """A record's name and the commit that it was measured at."""
    first = next(iter(rows))
    return f"{path.name}, commit {str(first['commit'])[:9]}" + (" with changes" if first["dirty"] else "")


def picture(make: Callable[[], Figure], source: str) -> bytes:
    """A figure as a PNG of 256 colours, a third of the bytes; `source` stands small below it and in the metadata."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    with rc_context(STYLE):
        figure = make()
        figure.supxlabel(source, fontsize=6, color="0.45", x=0.995, ha="right")
        FigureCanvasAgg(figure)
        figure.savefig(drawn, format="png", dpi=DPI)
    texts = PngInfo()
    texts.add_text(SOURCE_KEY, source)
    Image.open(drawn).convert("RGB").quantize(256).save(buffer, format="png", optimize=True, pnginfo=texts)
    return buffer.getvalue()
