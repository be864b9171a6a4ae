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
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product

import torch
from torch import Tensor

import qkernels
from qkernels.dispatch import Product

from . import choice, proposal
from .candidates import Candidate, call_of, candidates, chosen
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
from .operations import GateError
from .precompile import compile_ahead
from .products import exact_weight
from .report import Row
from .run import ROWS, rotation_of
from .timing import Look, clock, in_turns, percentiles, rotation
from .weights import OUTPUT_LAYER, Size, format_of

OPS = ("matmul", "matmul_dx")
# Replays in the short look at every candidate; microseconds of the long one, where these are not a few replays only.
SHORT, LOOK_US = 5, 25_000
# Up to so much slower in the short look, a candidate is looked at again: several times what two short looks differ by.
NEAR, MOST_NEAR = 1.06, 6
Packed = tuple[Tensor, qkernels.QuantState]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line a candidate and what follows for the tables, write a CSV; 0, or 2 on wrong arguments."""
    options = parsed(_parser(), arguments)
    return measure_to_csv(
        options, record_name(options, "tune"), lambda device: _rows(options, device), _line, _findings
    )


def _findings(rows: list[Row]) -> str:
    return "\n".join([*proposal.lines(rows), choice.summary(rows)])


def _rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    rows = sorted(rows_of(options, ROWS))
    cases = list(product((size for size in sizes_of(options) if size.shape != OUTPUT_LAYER), options.dtype))
    if device == "cuda":
        compile_ahead(lambda: _launch_candidates(options.op, cases, rows))
    begin = time.perf_counter()
    for size, dtype in cases:
        weights = _weights(size, dtype, device, rotation_of(size, device) if device == "cuda" else 1)
        for op in options.op:
            inputs, truth, own = _inputs(op, size.shape, dtype, device, weights[0], rows[-1])
            for m in rows:
                if options.seconds is not None and time.perf_counter() - begin > options.seconds:
                    print(f"{options.seconds:.0f} s are over: the rest is not measured", flush=True)
                    return
                asked = _asked(op, size, dtype, m, device)
                base = {"op": op, **size.columns, "dtype": dtype, "m": m}
                point = list(_point(asked, inputs[:m], weights, truth[:m], own[:m]))  # whole, or not in the record
                yield from ({**base, **row} for row in point)


def _point(asked: Product, x: Tensor, weights: list[Packed], truth: Tensor, own: Tensor) -> Iterator[Row]:
    """A row for each candidate after a short look, and one more for each of those that may be the fastest."""
    taken = chosen(asked)
    looks: dict[Candidate, Look] = {}
    first: dict[Candidate, float] = {}
    limits = _errors(own, truth)
    for candidate in candidates(asked) if x.is_cuda else [taken]:
        out = torch.full_like(truth, torch.nan, dtype=x.dtype)
        _hold(candidate, call_of(candidate, asked, x, *weights[0], out)(), truth, limits)
        calls = [call_of(candidate, asked, x, *weight, None) for weight in weights]
        looks[candidate] = rotation(calls) if x.is_cuda else partial(clock, calls[0])
        times = looks[candidate](SHORT)
        first[candidate] = statistics.median(times)
        yield _row(candidate, taken, 1, times)
    finalists = _finalists(first, taken)
    again = in_turns(
        {candidate: looks[candidate] for candidate in finalists},
        {candidate: _repeats(first[candidate] * len(weights)) for candidate in finalists},
    )
    fastest = min(map(statistics.median, again.values()))
    for candidate, times in again.items():
        row = _row(candidate, taken, 2, times)
        yield {**row, "times_fastest": row["median_us"] / fastest}


def _finalists(first: dict[Candidate, float], taken: Candidate) -> list[Candidate]:
    """What is chosen, the fastest of each implementation, and all that are nearly as fast as the fastest."""
    best = [
        min((one for one in first if one.implementation == name), key=lambda one: first[one])
        for name in dict.fromkeys(one.implementation for one in first)
    ]
    limit = NEAR * min(first.values())
    near = sorted((one for one in first if first[one] <= limit), key=lambda one: first[one])[:MOST_NEAR]
    return list(dict.fromkeys([taken, *best, *near]))


def _repeats(us: float) -> int:
    """Of what takes so long: enough for a median, but no more than a share of a second."""
    return max(15, min(40, round(LOOK_US / us)))


def _row(candidate: Candidate, taken: Candidate, number: int, times: list[float]) -> Row:
    named = {"implementation": candidate.implementation, "configuration": candidate.configuration}
    seen = {"chosen": candidate == taken, "round": number, **asdict(percentiles(times)), "times_fastest": None}
    return {**named, **seen}


def _errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error, and in root mean square."""
    error = (result.double() - truth).abs_()
    largest, rms = torch.stack([error.max(), error.square_().mean().sqrt()]).tolist()
    return largest, rms


def _hold(candidate: Candidate, result: Tensor, truth: Tensor, limits: tuple[float, float]) -> None:
    """Hold a result against float64: errors at most twice `limits`, those of torch's product in 16 bits.

    Raises:
        GateError: it computes something else.
    """
    for what, error, limit in zip(("maximum", "RMS"), _errors(result, truth), limits, strict=True):
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


def _weights(size: Size, dtype: str, device: str, count: int) -> list[Packed]:
    drawn = (torch.randn(size.shape, device=device, dtype=getattr(torch, dtype)) for _ in range(count))
    return [qkernels.quantize_4bit(0.02 * weight, **format_of(size.blocksize)) for weight in drawn]


def _asked(op: str, size: Size, dtype: str, m: int, device: str) -> Product:
    # On a CPU, for a trial, what is chosen for no GPU: dequantizing.
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Product(m, *size.shape, getattr(torch, dtype), capability, size.blocksize, backward=op == "matmul_dx")


def _launch_candidates(ops: Iterable[str], cases: list[tuple[Size, str]], rows: Sequence[int]) -> None:
    for size, dtype in cases:
        (weight,) = _weights(size, dtype, "cuda", 1)
        for op, m in product(ops, rows):
            asked = _asked(op, size, dtype, m, "cuda")
            x = torch.empty(m, size.shape[0 if asked.backward else 1], device="cuda", dtype=asked.dtype)
            for candidate in candidates(asked):
                call_of(candidate, asked, x, *weight, None)()


def _line(row: Row) -> str:
    what = f"{row['op']:10} {weight_of(row)} {row['dtype']} M={row['m']}"
    mark = {1: "", 2: "again"}[row["round"]] + (" chosen" if row["chosen"] else "")
    return f"{what:45} {row['median_us']:8.1f} us  {mark:13} {row['implementation']} {row['configuration']}"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("tune", __doc__)
    add_trial_flag(parser)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    add_shape_flags(parser)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16"])
    add_rows_flag(parser, "1 to 4096")
    parser.add_argument("--seconds", type=float, help="begin no further point after so long, compiling not counted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
