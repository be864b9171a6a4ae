"""Time and share of the roofline of the products against the rows of activations, from a record of `benchmarks.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from .compare import AGAIN
from .plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, panels
from .report import Row

COLORS = {
    "qkernels": BLUE,
    "qkernels, dequantize + cuBLAS": SKY,
    "bitsandbytes": ORANGE,
    "bitsandbytes + peft": ORANGE,
    "torch": BLACK,
    "torch + peft, 16 bits": BLACK,
    "read only": GREEN,
}
OTHERS = (RED, PURPLE)
LABELS = {"torch": "torch, 16-bit weight", "read only": "reading the packed weight, no more"}
# Shapes side by side: more, and the text of a figure as wide as a page is too small.
BESIDE = 3
# The clock that leaves launches out where there is one.
METHODS = ("graph", "flushed", "wall")
# Whose products by torch show the rate that a product can have.
_RATED = ("matmul", "matmul_dx", "peak")


def is_of(op: str, dtype: str) -> Callable[[Row], bool]:
    """Whether a row is one of the figure's."""
    return lambda row: (row["op"], row["dtype"], row["status"]) == (op, dtype, "ok")


def against_rows(op: str, dtype: str, rows: list[Row]) -> Figure:
    """For each shape the time of an operation against M and, below, its share of the roofline, one line a provider."""
    shown = is_of(op, dtype)
    method = next(one for one in METHODS if any(row["method"] == one for row in rows if shown(row)))
    found = [row for row in rows if row["method"] == method and row["dtype"] == dtype]
    products = [row for row in found if shown(row)]
    shapes = sorted({_shape(row) for row in products})
    columns = min(BESIDE, len(shapes))
    bands = -(-len(shapes) // columns)
    figure, axes = panels(2 * bands, columns, max(4, 2.9 * columns), 5 * bands, sharex=True, sharey="row")
    for axis in axes:
        axis.set_visible(False)
    for number, shape in enumerate(shapes):
        those = [row for row in products if _shape(row) == shape]
        band, column = divmod(number, columns)
        above, below = axes[2 * band * columns + column], axes[(2 * band + 1) * columns + column]
        above.set_visible(True), below.set_visible(True)
        providers = dict.fromkeys(row["provider"] for row in those if not row["provider"].endswith(AGAIN))
        for other, provider in enumerate(providers):
            line = sorted((row for row in those if row["provider"] == provider), key=lambda row: row["m"])
            color = COLORS.get(provider, OTHERS[other % len(OTHERS)])
            _line(above, line, [row["median_us"] for row in line], color)
            _line(below, line, [100 * roofline_us(row, found) / row["median_us"] for row in line], color)
        above.set_title(f"{shape[0]} x {shape[1]}", loc="left")
        above.set_yscale("log")
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        above.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        above.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.set_xscale("log", base=4)
        ms = sorted({row["m"] for row in products})
        below.set_xticks(ms[:: -(-len(ms) // 4)], minor=False)
        below.set_xticks([], minor=True)
        below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.tick_params(labelbottom=True)
        below.set_ylim(0, 105)
        if number + columns >= len(shapes):
            below.set_xlabel("M, rows of activations")
        if column == 0:
            above.set_ylabel(f"{op}, {dtype}: µs a call\n(20th to 80th percentile)")
            below.set_ylabel("% of the 4-bit\nproduct's roofline")
    handles = {label: handle for handle, label in zip(*_legend(axes), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, fontsize=8)
    return figure


def roofline_us(row: Row, rows: Iterable[Row]) -> float:
    """The least time of a product: its bytes at the copy's bandwidth or its FLOPs at the best rate of torch's product.

    Both rates are of the same run, dtype and clock; the copy is that of the same shape.
    """
    peers = [one for one in rows if one["status"] == "ok"]
    copies = [one["gbps"] for one in peers if one["op"] == "copy" and _shape(one) == _shape(row)]
    rates = [one["flops"] / one["median_us"] for one in peers if one["op"] in _RATED and one["provider"] == "torch"]
    return max(row["bytes"] / max(copies) / 1e3, row["flops"] / max(rates))


def _shape(row: Row) -> tuple[int, int]:
    return row["rows"], row["columns"]


def _line(one, rows: list[Row], values: list[float], color: str) -> None:
    ms = [row["m"] for row in rows]
    scale = [value / row["median_us"] for value, row in zip(values, rows, strict=True)]
    low = [s * (row["median_us"] - row["p20_us"]) for s, row in zip(scale, rows, strict=True)]
    high = [s * (row["p80_us"] - row["median_us"]) for s, row in zip(scale, rows, strict=True)]
    label = LABELS.get(rows[0]["provider"], rows[0]["provider"])
    one.errorbar(ms, values, [low, high], fmt="o-", color=color, markersize=3, linewidth=1.2, label=label)


def _legend(axes) -> tuple[list, list]:
    pairs = [axis.get_legend_handles_labels() for axis in axes]
    return [handle for handles, _ in pairs for handle in handles], [label for _, labels in pairs for label in labels]
