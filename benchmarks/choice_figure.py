"""What the dispatch chooses beside what it could, against M; from a record of `benchmarks.tune`."""

from __future__ import annotations

from statistics import geometric_mean

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA

from .choice import TOLERANCE, Point, points
from .plotting import BLACK, BLUE, ORANGE, RED, SKY, panels
from .report import Row

COLORS = {DEQUANTIZE: ORANGE, SKINNY: BLUE, WGMMA: SKY}


def figure_of(rows: list[Row]) -> Figure:
    """Above each implementation's best time over the chosen one's; below by how much each choice is not the fastest."""
    found = points(rows)
    figure, axes = panels(2, 2, 8.4, 5.2, sharex=True, sharey="row", height_ratios=(3, 2))
    for column, backward in enumerate((False, True)):
        those = [point for point in found if point.product.backward == backward]
        above, below = axes[column], axes[2 + column]
        ms = sorted({point.product.M for point in those})
        for name, color in COLORS.items():
            _line(above, name, color, those)
        above.axhline(1, color=BLACK, linewidth=0.8)
        above.set_title("dX = dY W" if backward else "y = x W^T", loc="left")
        above.set_yscale("log")
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        above.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value in (2, 5) else ""))
        losses = [100 * (point.slower - 1) for point in those]
        below.plot([point.product.M for point in those], losses, "o", color=BLACK, markersize=3, alpha=0.5)
        below.axhline(100 * TOLERANCE, color=RED, linewidth=0.8, label=f"allowed: {TOLERANCE:.0%}")
        below.set_xscale("log", base=2)
        below.set_xticks(ms[::2], [str(m) for m in ms[::2]])
        below.set_xlabel("M, rows of activations")
    axes[0].set_ylabel("fastest of its kind: time over\nthe chosen one's (least to most)")
    axes[2].set_ylabel("chosen: % slower than\nthe fastest measured")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(loc="upper left", fontsize=8)
    axes[0].legend(loc="upper right", fontsize=8)
    return figure


def _line(one, name: str, color: str, those: list[Point]) -> None:
    """The geometric mean over the weights against M, and the range."""
    factors: dict[int, list[float]] = {}
    for point in those:
        if (factor := point.over_chosen(name)) is not None:
            factors.setdefault(point.product.M, []).append(factor)
    ms = sorted(factors)
    one.plot(ms, [geometric_mean(factors[m]) for m in ms], "o-", color=color, markersize=3, label=name)
    one.fill_between(ms, [min(factors[m]) for m in ms], [max(factors[m]) for m in ms], color=color, alpha=0.15)
