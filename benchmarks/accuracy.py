"""The error of the products with a 4-bit weight against float64, beside bitsandbytes' and torch's own.

    python -m benchmarks.accuracy --out benchmarks/results
    python -m benchmarks.accuracy --shapes ragged --out benchmarks/results
    python -m benchmarks.accuracy --smoke --out /tmp/trial       # small, also on a CPU

The truth is x W^T (dx = dy W) in float64 with W = code times scale, of float32 codes and scales, nothing rounded.
torch multiplies by the decoded weight in 16 bits.  Weights have scales of one size, or neighbouring blocks whose scales
are 2^10 apart; and in float16 there are products at the edge of the dtype, of which some overflow.  Inputs are drawn
afresh in every run; of a large product random rows and columns are compared.

It ends with 1 where our error is larger than bitsandbytes' or than twice torch's own, or where an overflow is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from statistics import geometric_mean

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from .command import (
    add_rows_flag,
    add_shape_flags,
    add_trial_flag,
    measure_to_csv,
    parsed,
    parser_of,
    record_name,
    rows_of,
    sizes_of,
)
from .compare import weight_of
from .precompile import compile_ahead
from .products import CLOSE, exact_weight
from .report import Row
from .run import ROWS, launch_products
from .weights import OUTPUT_LAYER, Size, format_of

OPS = ("matmul", "matmul_dx")
OURS, RIVAL, TORCH = "qkernels", "bitsandbytes", "torch"
ALIKE, APART, EDGE = "alike", "2^10 apart", "alike, results at the edge of float16"
# Compared elements of a result: so many rows at most, and as many columns as that makes.
MOST_ROWS, ELEMENTS, FEWEST_COLUMNS = 256, 1 << 17, 512
# The largest float16 is 65504, and what is below 65520 is rounded to it.  So near to it either is right.
LIMIT, NEAR = 65520.0, 64.0
# In the mean over the points there is no chance left to speak of.
MEAN_TOLERANCE = 1.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print a line a product and provider, write a CSV; 0, 1 where an error is too large, 2 without a GPU."""
    options = parsed(_parser(), arguments)
    rows: list[Row] = []

    def kept(device: str) -> Iterator[Row]:
        for row in _rows(options, device):
            rows.append(row)
            yield row

    name = record_name(options, "accuracy")
    status = measure_to_csv(options, name, kept, _line, lambda rows: "\n".join(problems(rows)) or summary(rows))
    return status or (1 if problems(rows) else 0)


def _rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    sizes = [size for size in sizes_of(options) if size.shape != OUTPUT_LAYER]
    ms = rows_of(options, ROWS)
    if device == "cuda":
        compile_ahead(lambda: launch_products(sizes, options.dtype, ms))
    for size in sizes:
        for dtype in options.dtype:
            for scales in (ALIKE, APART, *((EDGE,) if dtype == "float16" else ())):
                weight = _weight(size, scales, device, getattr(torch, dtype))
                packed, state = qkernels.quantize_4bit(weight, **format_of(size.blocksize))
                exact = exact_weight(packed, state)
                base = {**size.columns, "dtype": dtype, "scales": scales}
                for op in OPS:
                    for m in ms:
                        case = {"op": op, **base, "m": m}
                        x = _activations(op, exact, scales, m, weight.dtype)
                        yield from _point(case, x, packed, state, exact)


def _weight(size: Size, scales: str, device: str, dtype: torch.dtype) -> Tensor:
    weight = (0.2 if scales == EDGE else 0.02) * torch.randn(size.shape, device=device)
    if scales == APART:
        block = torch.arange(weight.numel(), device=device).view(size.shape) // size.blocksize
        weight *= torch.exp2(10.0 * block.remainder(2) - 5)
    return weight.to(dtype)


def _activations(op: str, exact: Tensor, scales: str, m: int, dtype: torch.dtype) -> Tensor:
    """x [m, K], or dy [m, N] of the backward product; at the edge, a result of three standard deviations overflows."""
    length = exact.shape[1 if op == "matmul" else 0]
    x = torch.randn(m, length, device=exact.device)
    if scales == EDGE:
        x *= LIMIT / 3 / (exact.square().mean().sqrt() * math.sqrt(length)).item()
    return x.to(dtype)


def _point(case: Row, x: Tensor, packed: Tensor, state: qkernels.QuantState, exact: Tensor) -> Iterator[Row]:
    """A row a provider, ours last with its ratios to the others'."""
    backward = case["op"] == "matmul_dx"
    width = exact.shape[1 if backward else 0]
    rows = torch.randperm(len(x), device=x.device)[:MOST_ROWS]
    count = max(FEWEST_COLUMNS, ELEMENTS // len(rows))
    columns = torch.randperm(width, device=x.device)[:count]
    truth = x[rows].double() @ (exact[:, columns] if backward else exact[columns].t())
    errors: dict[str, Row] = {}
    for provider, result in _results(x, packed, state, backward).items():
        errors[provider] = _error(result[rows][:, columns].double(), truth, x.dtype)
    # bitsandbytes' CPU path reads other scales where rows are not whole blocks: an error that proves nothing.
    elsewhere = not errors[RIVAL]["rms_error"] <= CLOSE * truth.square().mean().sqrt().item()
    for provider in (RIVAL, TORCH, OURS):
        ratios = {
            f"{kind}_to_{other}": errors[OURS][f"{kind}_error"] / errors[other][f"{kind}_error"]
            if provider == OURS and not (other == RIVAL and elsewhere)
            else None
            for other in (RIVAL, TORCH)
            for kind in ("max", "rms")
        }
        yield {**case, "provider": provider, "elements": truth.numel(), **errors[provider], **ratios}


def _results(x: Tensor, packed: Tensor, state: qkernels.QuantState, backward: bool) -> dict[str, Tensor]:
    theirs = bnb.QuantState.from_dict(state.as_dict(), x.device)
    theirs.dtype = x.dtype
    decoded = qkernels.dequantize_4bit(packed, state)
    if backward:
        return {
            OURS: qkernels.matmul_4bit_dx(x, packed, state),
            RIVAL: torch.matmul(x, bnb.dequantize_4bit(packed, theirs).to(x.dtype)),
            TORCH: torch.matmul(x, decoded),
        }
    return {
        OURS: qkernels.matmul_4bit(x, packed, state),
        RIVAL: bitsandbytes.matmul_4bit(x, packed.t(), theirs),
        TORCH: F.linear(x, decoded),
    }


def _error(result: Tensor, truth: Tensor, dtype: torch.dtype) -> Row:
    """Largest and root mean square error of what is finite, and how many are finite, or not, that should not be."""
    limit = LIMIT if dtype == torch.float16 else math.inf
    inside, outside = truth.abs() < limit - NEAR, truth.abs() > limit + NEAR
    wrong = (inside & ~result.isfinite()) | (outside & (result != truth.sign() * math.inf))
    error = torch.where(inside, (result - truth).abs(), 0.0)
    return {
        "max_error": error.max().item(),
        "rms_error": (error.square().sum() / inside.sum()).sqrt().item(),
        "wrong_overflows": int(wrong.sum()),
        "overflows": int(outside.sum()),
    }


def chance(kind: str, elements: int) -> float:
    """By what factor two errors of so many elements differ by chance: four standard errors.

    Of a root mean square the standard error is 1 / sqrt(2 n) of it, of a largest of n about 1.28 / (2 log n).
    """
    relative = 1 / math.sqrt(2 * elements) if kind == "rms" else 1.28 / (2 * math.log(max(elements, 2)))
    return 1 + 4 * math.sqrt(2) * relative


def problems(rows: Iterable[Row]) -> list[str]:
    """What breaks a promise, a line each: of a point, or of all points of an operation and dtype in the mean."""
    found = []
    together: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["provider"] != OURS:
            continue
        for kind in ("max", "rms"):
            to_rival, to_torch = row[f"{kind}_to_{RIVAL}"], row[f"{kind}_to_{TORCH}"]
            if to_rival is not None:
                together.setdefault((row["op"], row["dtype"], kind), []).append(to_rival)
                if not to_rival <= chance(kind, row["elements"]):
                    found.append(f"{_what(row)}: {kind} error {to_rival:.3f} times bitsandbytes'")
            if not to_torch <= 2:
                found.append(f"{_what(row)}: {kind} error {to_torch:.3f} times torch's own")
        if row["wrong_overflows"]:
            found.append(f"{_what(row)}: {row['wrong_overflows']} results overflow wrongly")
    for (op, dtype, kind), ratios in together.items():
        mean = geometric_mean(ratios)
        if not mean <= MEAN_TOLERANCE:
            found.append(f"{op} {dtype}: {kind} error {mean:.3f} times bitsandbytes', geometric mean of all points")
    return found


def summary(rows: Iterable[Row]) -> str:
    """The ratios in the mean and at most."""
    ours = [row for row in rows if row["provider"] == OURS]
    lines = [f"{len(ours)} points, no error too large"]
    for other in (RIVAL, TORCH):
        for kind in ("max", "rms"):
            ratios = [row[f"{kind}_to_{other}"] for row in ours if row[f"{kind}_to_{other}"] is not None]
            shown = f"{geometric_mean(ratios):.3f} in the mean, {max(ratios):.3f} at most" if ratios else "not compared"
            lines.append(f"{kind} error over that of {other}: {shown}")
    return "\n".join(lines)


def _what(row: Row) -> str:
    return f"{row['op']} {weight_of(row)} {row['dtype']} M={row['m']} scales {row['scales']}"


def _line(row: Row) -> str:
    return f"{_what(row):75} {row['provider']:12} max {row['max_error']:.3e}  rms {row['rms_error']:.3e}"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("accuracy", __doc__)
    parser.set_defaults(op=OPS)
    add_trial_flag(parser)
    add_shape_flags(parser)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    add_rows_flag(parser, "1 to 4096")
    return parser


if __name__ == "__main__":
    sys.exit(main())
