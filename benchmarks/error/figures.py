"""The figures of the error report, from its records."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

from ..plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, panels
from ..report import Row
from . import theory
from .distributions import DISTRIBUTIONS
from .formats import FORMATS
from .tables import TABLES
from .weights import POOLED

COLORS = {"nf4": BLUE, "fp4": ORANGE, "int4": GREEN, "int8": PURPLE}
NAMES = {"nf4": "NF4", "fp4": "FP4", "int4": "INT4", "int8": "INT8"}
PROVIDER_COLORS = {"qkernels": BLUE, "bitsandbytes": ORANGE, "torch": BLACK}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = re.compile(r"\.(\d+)\.(?:\w+\.)*(\w+)\.weight$")


def code_tables() -> Figure:
    """The sixteen codes of each format on the density of what they stand for."""
    figure, axes = panels(3, 1, 7, 4.6, sharex=True)
    u = np.linspace(-1, 1, 801)
    density = theory.scaled_density("normal", 64, u)
    for one, name in zip(axes, ("nf4", "fp4", "int4"), strict=True):
        one.fill_between(u, density, color="0.88", linewidth=0)
        one.vlines(TABLES[name], 0, density.max() * 0.55, color=COLORS[name], linewidth=1.6)
        error = theory.expected("normal", name, 64, False).relative_rms
        one.set_title(f"{NAMES[name]}: {len(TABLES[name])} values, expected error {error:.2%} RMS", loc="left")
        one.set_yticks([])
        one.set_ylim(0, density.max() * 1.05)
        one.grid(False)
        one.spines["left"].set_visible(False)
    axes[-1].set_xlabel("normal weight / absmax of its block of 64 (grey: density), and the codes")
    return figure


def error_by_blocksize(rows: list[Row]) -> Figure:
    """Measured errors with their intervals on the lines that the theory draws."""
    figure, axes = panels(2, 2, 8, 6.4, sharex=True, sharey=True)
    sizes = sorted({row["blocksize"] for row in rows})
    for one, (name, distribution) in zip(axes, DISTRIBUTIONS.items(), strict=True):
        found = [row for row in rows if row["weights"] == name and row["status"] == "ok"]
        for format_name in dict.fromkeys(row["format"] for row in found):
            color = COLORS.get(format_name, RED)
            for nested, line in ((False, "-"), (True, ":")):
                expected = [theory.expected(name, format_name, size, nested).relative_rms for size in sizes]
                one.plot(sizes, expected, line, color=color, label=None if nested else NAMES[format_name], zorder=1)
                _points(one, [row for row in found if (row["format"], row["nested"]) == (format_name, nested)], color)
        bound = [np.sqrt(theory.best_table_mse(name, size) / distribution.second_moment) for size in sizes]
        one.plot(sizes, bound, "--", color="0.5", linewidth=1, label="best table of 16 codes")
        one.set_title(distribution.description, loc="left")
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.set_xticks(sizes, [str(size) for size in sizes])
        _plain_percent(one.yaxis, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
    _blocksize_legend(figure, axes[0])
    for one in axes[2:]:
        one.set_xlabel("blocksize")
    for one in axes[::2]:
        one.set_ylabel("RMS error / RMS weight")
    return figure


def _points(one, rows: list[Row], color: str) -> None:
    for provider, marker in (("qkernels", "o"), ("torch", "o"), ("bitsandbytes", "x")):
        those = [row for row in rows if row["provider"] == provider]
        if not those:
            continue
        value = np.array([row["relative_rms"] for row in those])
        low = np.array([row["relative_rms_low"] for row in those])
        high = np.array([row["relative_rms_high"] for row in those])
        nested = those[0]["nested"]
        one.errorbar(
            [row["blocksize"] for row in those],
            value,
            yerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)],
            fmt=marker,
            color=color if marker == "o" else BLACK,
            markerfacecolor="white" if nested else color,
            markersize=(6 if nested else 3.5) if marker == "o" else 3,
            linewidth=0.8,
            zorder=(2 if nested else 3) if marker == "o" else 4,
        )


def _blocksize_legend(figure: Figure, one) -> None:
    one.plot([], [], "-", color="0.3", label="theory, exact scales")
    one.plot([], [], ":", color="0.3", label="theory, double quantization")
    one.plot([], [], "o", color="0.3", markersize=3.5, label="measured, exact scales")
    one.plot([], [], "o", color="0.3", markerfacecolor="white", markersize=6, label="measured, double quantization")
    one.plot([], [], "x", color=BLACK, markersize=4, label="bitsandbytes")
    figure.legend(*one.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7.5)


def is_of_layer(row: Row) -> bool:
    return row["format"] == "nf4" and row["tensor"] is not None and LAYER.search(row["tensor"]) is not None


def layers(rows: list[Row]) -> Figure:
    """Signal over noise of every matrix of a model under NF4, layer by layer."""
    cells = {}
    for row in rows:
        if is_of_layer(row):
            match = LAYER.search(row["tensor"])
            cells[match[2], int(match[1])] = row["sqnr_db"]
    kinds = [kind for kind in KINDS if any(kind == one for one, _ in cells)]
    kinds += sorted({kind for kind, _ in cells} - set(kinds))
    count = 1 + max(layer for _, layer in cells)
    grid = np.array([[cells.get((kind, layer), np.nan) for layer in range(count)] for kind in kinds])
    figure, (one,) = panels(1, 1, 8, 2.9)
    image = one.imshow(grid, aspect="auto", cmap="viridis")
    one.grid(False)
    one.set_yticks(range(len(kinds)), kinds)
    one.set_xticks(range(0, count, 2))
    one.set_xlabel("layer")
    blocksize = next(row["blocksize"] for row in rows if row["tensor"] and row["tensor"] != POOLED)
    model = next(row["weights"] for row in rows if row["tensor"])
    normal = theory.expected("normal", "nf4", blocksize, True).sqnr_db
    one.set_title(
        f"{model}, NF4 in blocks of {blocksize} with double quantization (normal weights: {normal:.2f} dB)", loc="left"
    )
    figure.colorbar(image, ax=one, label="SQNR, dB", pad=0.01)
    return figure


def cosine() -> Figure:
    """The article's curve: a cosine that went through 8 and through 4 bits."""
    x = np.linspace(0, 2 * np.pi, 512)
    curve = torch.from_numpy(np.cos(x)).float()
    figure, axes = panels(1, 3, 8, 2.7, sharey=True)
    for one, name in zip(axes, ("int8", "int4", "nf4"), strict=True):
        decoded = FORMATS[name].round_trip(curve, 512, False)
        error = (decoded - curve).square().mean().sqrt().item()
        one.plot(x, curve.numpy(), color="0.6", linewidth=1)
        one.plot(x, decoded.numpy(), color=COLORS[name], linewidth=1.2)
        one.set_title(f"{NAMES[name]}: RMS error {error:.4f}", loc="left")
        one.set_xticks([0, np.pi, 2 * np.pi], ["0", "π", "2π"])
    axes[0].set_ylabel("cos x, and after a round trip")
    return figure


def outputs(rows: list[Row]) -> Figure:
    """The output's error and its two parts against the rows of x."""
    names, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("weights", "dtype"))
    figure, axes = panels(len(names), len(dtypes), 8, 0.6 + 2.7 * len(names), sharex=True, sharey=True)
    for one, (name, dtype) in zip(axes, [(n, d) for n in names for d in dtypes], strict=True):
        found = [row for row in rows if (row["weights"], row["dtype"]) == (name, dtype)]
        ms = sorted({row["m"] for row in found})
        one.plot(ms, _by_m(found, "qkernels", "quantization_expected"), "-", color=RED, label="quantization, expected")
        _interval(one, found, "qkernels", "quantization", RED, "o", "quantization, measured")
        for provider, marker, size in (("qkernels", "o", 5), ("bitsandbytes", "x", 5), ("torch", "s", 3)):
            color = PROVIDER_COLORS[provider]
            label = "torch, 16-bit weight" if provider == "torch" else provider
            _interval(one, found, provider, "arithmetic", color, marker, f"arithmetic, {label}", size)
        for provider in ("qkernels", "torch"):
            expected = _by_m(found, provider, "arithmetic_expected")
            label = "arithmetic, expected of rounding" if provider == "torch" else None
            one.plot(ms, expected, "--", color="0.5", linewidth=1, zorder=1, label=label)
        shape = f"{found[0]['rows']} x {found[0]['columns']}"
        one.set_title(f"{name.split('.', 1)[-1].removesuffix('.weight')}, {shape}, {dtype}", loc="left", fontsize=8.5)
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.set_xticks(ms, [str(m) for m in ms])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7.5)
    for one in axes[-len(dtypes) :]:
        one.set_xlabel("M, rows of x")
    for one in axes[:: len(dtypes)]:
        one.set_ylabel("RMS error / RMS output")
    return figure


def _by_m(rows: list[Row], provider: str, key: str) -> list[float]:
    return [row[key] for row in sorted(rows, key=lambda row: row["m"]) if row["provider"] == provider]


def _interval(
    one, rows: list[Row], provider: str, part: str, color: str, marker: str, label: str, size: float = 4
) -> None:
    value, low, high = (np.array(_by_m(rows, provider, f"{part}{end}")) for end in ("", "_low", "_high"))
    ms = _by_m(rows, provider, "m")
    one.errorbar(
        ms, value, [value - low, high - value], fmt=marker, color=color, markersize=size, linewidth=0.8, label=label
    )


def model(rows: list[Row]) -> Figure:
    """What the formats cost a model, the cheapest first."""
    shown = [row for row in rows if row["format"] != "float32" and row["provider"] != "bitsandbytes"]
    shown.sort(key=lambda row: row["kl"], reverse=True)
    drawn: tuple[tuple[str, str, Callable[[float], float]], ...] = (
        ("kl", "KL divergence from float32, nats a token", lambda value: value),
        ("perplexity_ratio", "perplexity more than float32's", lambda value: value - 1),
    )
    figure, axes = panels(1, 2, 8, 0.9 + 0.24 * len(shown), sharey=True)
    for one, (key, label, scaled) in zip(axes, drawn, strict=True):
        for place, row in enumerate(shown):
            value, low, high = (scaled(row[f"{key}{end}"]) for end in ("", "_low", "_high"))
            color = COLORS.get(row["format"], BLACK)
            one.errorbar([value], [place], xerr=[[value - low], [high - value]], fmt="o", color=color, markersize=4)
        one.set_xlabel(label)
    axes[0].set_xscale("log")
    axes[1].axvline(0, color="0.5", linewidth=0.8)
    axes[1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_yticks(range(len(shown)), [_case_name(row) for row in shown])
    return figure


def _case_name(row: Row) -> str:
    if row["blocksize"] is None:
        return f"{row['format']}, not quantized"
    scales = "" if row["nested"] else ", exact scales"
    return f"{NAMES[row['format']]} {row['blocksize']}{scales} ({row['bits_per_weight']:.2f} bits)"


def _plain_percent(axis, ticks: tuple[float, ...]) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axis.set_minor_formatter(NullFormatter())
