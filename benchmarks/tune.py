"""Measure every way to compute a product with a 4-bit weight, for the dispatch and the tables of `qkernels/tuning/`.

    python -m benchmarks.tune --out benchmarks/results
    python -m benchmarks.tune --op matmul --shape 4096x4096 --m 1 --m 8 --dtype float16 --seconds 60 --out /tmp/trial
    python -m benchmarks.tune --smoke --out /tmp/trial       # small, also on a CPU

A point is a product, a weight's shape, a dtype and the rows M of activations.  Each candidate's result is held against
float64 before it is timed: in a CUDA graph over more weights than the L2 cache holds.  The one that the tables choose
and the fastest of each implementation are then timed once more, and that second time counts: being the fastest of many
by chance is none.  At the end it says what the tables would better hold and what they lose, as
`benchmarks.proposal` and `benchmarks.choice` say of a record.  float16 alone is the default: the tables are the same
for both dtypes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product

import torch
from torch import Tensor

import qkernels
from qkernels.dispatch import Product

from . import choice, proposal
from .candidates import Candidate, call_of, candidates, chosen
from .command import add_rows_flag, add_shape_flag, add_trial_flag, measure_to_csv, parser_of
from .operations import FORMAT, OUTPUT_LAYER, GateError
from .precompile import compile_ahead
from .products import exact_weight
from .report import Row
from .run import ROTATION, shapes_of
from .timing import Timing, graph, wall

OPS = ("matmul", "matmul_dx")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
Packed = tuple[Tensor, qkernels.QuantState]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line a candidate and what follows for the tables, write a CSV; 0, or 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    return measure_to_csv(options, "tune", lambda device: _rows(options, device), _line, _findings)


def _findings(rows: list[Row]) -> str:
    return "\n".join([*proposal.lines(rows), choice.summary(rows)])


def _rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    rows = sorted(options.m or ((1, 16) if options.smoke else ROWS))
    cases = list(product((shape for shape in shapes_of(options) if shape != OUTPUT_LAYER), options.dtype))
    if device == "cuda":
        compile_ahead(lambda: _launch_candidates(options.op, cases, rows))
    begin = time.perf_counter()
    for shape, dtype in cases:
        weights = _weights(shape, dtype, device, ROTATION if device == "cuda" else 1)
        for op in options.op:
            inputs, truth, own = _inputs(op, shape, dtype, device, weights[0], rows[-1])
            for m in rows:
                if options.seconds is not None and time.perf_counter() - begin > options.seconds:
                    print(f"{options.seconds:.0f} s are over: the rest is not measured", flush=True)
                    return
                asked = _asked(op, shape, dtype, m, device)
                base = {"op": op, "rows": shape[0], "columns": shape[1], "dtype": dtype, "m": m}
                for row in _point(asked, inputs[:m], weights, truth[:m], own[:m]):
                    yield {**base, **row}


def _point(asked: Product, x: Tensor, weights: list[Packed], truth: Tensor, own: Tensor) -> Iterator[Row]:
    """A row for each candidate, and one more for each of those that are timed again."""
    taken = chosen(asked)
    found = candidates(asked) if x.is_cuda else [taken]
    times: dict[Candidate, float] = {}
    for candidate in found:
        out = torch.full_like(truth, torch.nan, dtype=x.dtype)
        _hold(candidate, call_of(candidate, asked, x, *weights[0], out)(), truth, own)
        row = _timed(candidate, asked, x, weights, 1, candidate == taken)
        times[candidate] = row["median_us"]
        yield row
    best = [
        min((one for one in found if one.implementation == name), key=lambda one: times[one])
        for name in dict.fromkeys(one.implementation for one in found)
    ]
    for candidate in dict.fromkeys([taken, *best]):
        yield _timed(candidate, asked, x, weights, 2, candidate == taken)


def _timed(candidate: Candidate, asked: Product, x: Tensor, weights: list[Packed], number: int, is_chosen: bool) -> Row:
    calls = [call_of(candidate, asked, x, *weight, None) for weight in weights]
    timing: Timing = graph(calls) if x.is_cuda else wall(calls[0])
    named = {"implementation": candidate.implementation, "configuration": candidate.configuration}
    return {**named, "chosen": is_chosen, "round": number, **asdict(timing)}


def _hold(candidate: Candidate, result: Tensor, truth: Tensor, own: Tensor) -> None:
    """Hold a result against float64: errors at most twice those of torch's product in 16 bits, `own`.

    Raises:
        GateError: it computes something else.
    """
    errors, owns = (result.double() - truth).abs(), (own.double() - truth).abs()
    for what, error, limit in (
        ("maximum", errors.max(), owns.max()),
        ("RMS", errors.square().mean().sqrt(), owns.square().mean().sqrt()),
    ):
        if not error <= 2 * limit:
            named = f"{candidate.implementation} {candidate.configuration}"
            raise GateError(f"{what} error of {named} is {error:.3g}, of torch's product {limit:.3g}")


def _inputs(
    op: str, shape: tuple[int, int], dtype: str, device: str, weight: Packed, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (dy) for the most rows, the product with the first weight in float64, and torch's own in the dtype."""
    backward = op == "matmul_dx"
    x = torch.randn(most, shape[0] if backward else shape[1], device=device, dtype=getattr(torch, dtype))
    exact, decoded = exact_weight(*weight), qkernels.dequantize_4bit(*weight)
    if not backward:
        exact, decoded = exact.t(), decoded.t()
    return x, x.double() @ exact, x @ decoded


def _weights(shape: tuple[int, int], dtype: str, device: str, count: int) -> list[Packed]:
    return [
        qkernels.quantize_4bit(0.02 * torch.randn(shape, device=device, dtype=getattr(torch, dtype)), **FORMAT)
        for _ in range(count)
    ]


def _asked(op: str, shape: tuple[int, int], dtype: str, m: int, device: str) -> Product:
    # On a CPU, for a trial, what is chosen for no GPU: dequantizing.
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Product(m, *shape, getattr(torch, dtype), capability, backward=op == "matmul_dx")


def _launch_candidates(ops: Iterable[str], cases: list[tuple[tuple[int, int], str]], rows: Sequence[int]) -> None:
    for shape, dtype in cases:
        (weight,) = _weights(shape, dtype, "cuda", 1)
        for op, m in product(ops, rows):
            asked = _asked(op, shape, dtype, m, "cuda")
            x = torch.empty(m, shape[0 if asked.backward else 1], device="cuda", dtype=asked.dtype)
            for candidate in candidates(asked):
                call_of(candidate, asked, x, *weight, None)()


def _line(row: Row) -> str:
    what = f"{row['op']:10} {row['rows']}x{row['columns']} {row['dtype']} M={row['m']}"
    mark = {1: "", 2: "again"}[row["round"]] + (" chosen" if row["chosen"] else "")
    return f"{what:45} {row['median_us']:8.1f} us  {mark:13} {row['implementation']} {row['configuration']}"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("tune", __doc__)
    add_trial_flag(parser)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    add_shape_flag(parser)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16"])
    add_rows_flag(parser, "1 to 2048")
    parser.add_argument("--seconds", type=float, help="begin no further point after so long, compiling not counted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
