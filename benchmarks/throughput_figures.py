"""Time and share of the roofline of the products against the rows of activations, from a record of `benchmarks.run`."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .compare import AGAIN
from .plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, panels
from .report import Row

COLORS = {
    "qkernels": BLUE,
    "qkernels, dequantize + cuBLAS": SKY,
    "bitsandbytes": ORANGE,
    "torch": BLACK,
    "read only": GREEN,
}
OTHERS = (RED, PURPLE)
# The clock that leaves launches out where there is one.
METHODS = ("graph", "flushed", "wall")


def is_product(row: Row) -> bool:
    return row["op"] == "matmul" and row["status"] == "ok"


def matmul(rows: list[Row]) -> Figure:
    """For each shape of the first model the time and, below, the share of the roofline, one line a provider."""
    method = next(one for one in METHODS if any(row["method"] == one for row in rows))
    dtype = rows[0]["dtype"]
    found = [row for row in rows if row["method"] == method and row["dtype"] == dtype]
    products = [row for row in found if is_product(row)]
    products = [row for row in products if row["model"] == products[0]["model"]]
    shapes = sorted({(row["rows"], row["columns"]) for row in products})
    figure, axes = panels(2, len(shapes), max(4, 2.6 * len(shapes)), 5.6, sharex=True, sharey="row")
    for column, shape in enumerate(shapes):
        those = [row for row in products if (row["rows"], row["columns"]) == shape]
        for number, provider in enumerate(dict.fromkeys(row["provider"] for row in those if row["provider"] != AGAIN)):
            line = sorted((row for row in those if row["provider"] == provider), key=lambda row: row["m"])
            color = COLORS.get(provider, OTHERS[number % len(OTHERS)])
            _line(axes[column], line, [row["median_us"] for row in line], color)
            share = [100 * roofline_us(row, found) / row["median_us"] for row in line]
            _line(axes[len(shapes) + column], line, share, color)
        axes[column].set_title(f"{shape[0]} x {shape[1]}, {dtype}", loc="left")
        axes[column].set_yscale("log")
        axes[column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[len(shapes) + column].set_xscale("log", base=4)
        axes[len(shapes) + column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[len(shapes) + column].set_xlabel("M, rows of activations")
    axes[0].set_ylabel("µs a call (20th to 80th percentile)")
    axes[len(shapes)].set_ylabel("% of the 4-bit product's roofline")
    axes[len(shapes)].set_ylim(0, 105)
    handles = {label: handle for handle, label in zip(*_legend(axes[: len(shapes)]), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, 2 * len(shapes)), fontsize=8
    )
    return figure


def roofline_us(row: Row, rows: Iterable[Row]) -> float:
    """The least time of a product: its bytes at the copy's bandwidth or its FLOPs at the best rate of torch's products.

    Both rates are of the same run, dtype and clock; the copy is that of the same shape.
    """
    peers = [one for one in rows if one["status"] == "ok"]
    copies = [one["gbps"] for one in peers if one["op"] == "copy" and _shape(one) == _shape(row)]
    by_torch = [one for one in peers if one["op"] in ("matmul", "peak") and one["provider"] == "torch"]
    rates = [one["flops"] / one["median_us"] for one in by_torch]
    return max(row["bytes"] / max(copies) / 1e3, row["flops"] / max(rates))


def _shape(row: Row) -> tuple[int, int]:
    return row["rows"], row["columns"]


def _line(one, rows: list[Row], values: list[float], color: str) -> None:
    ms = [row["m"] for row in rows]
    scale = [value / row["median_us"] for value, row in zip(values, rows, strict=True)]
    low = [s * (row["median_us"] - row["p20_us"]) for s, row in zip(scale, rows, strict=True)]
    high = [s * (row["p80_us"] - row["median_us"]) for s, row in zip(scale, rows, strict=True)]
    label = rows[0]["provider"]
    one.errorbar(ms, values, [low, high], fmt="o-", color=color, markersize=3, linewidth=1.2, label=label)


def _legend(axes) -> tuple[list, list]:
    pairs = [axis.get_legend_handles_labels() for axis in axes]
    return [handle for handles, _ in pairs for handle in handles], [label for _, labels in pairs for label in labels]
