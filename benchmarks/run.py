"""Time the kernels beside bitsandbytes, in one process on the same inputs.

    python -m benchmarks.run --op dequantize --op quantize --gpu-record
    python -m benchmarks.run --op matmul --op matmul_dx --op lora --gpu-record
    python -m benchmarks.run --op train_step --op generate --op load --gpu-record
    python -m benchmarks.run --op matmul --op matmul_dx --shapes ragged --dtype float16 bfloat16 --gpu-record
    python -m benchmarks.run --op matmul --all-rivals --shape 4096x4096 --m 1 --m 256 --out /tmp/rivals
    python -m benchmarks.run --op dequantize --smoke --out /tmp/trial        # small, also on a CPU

`docs/benchmarks.md` says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, product

import torch

import qkernels

from .checkpoint import MODELS
from .command import (
    add_rows_flag,
    add_shape_flags,
    add_trial_flag,
    measure_to_csv,
    parser_of,
    positive,
    record_name,
    rows_of,
    sizes_of,
)
from .compare import AGAIN, OURS, RESULTS, noise, weight_of
from .gauges import Clock, peak_mib
from .models import LAYERS, MODEL_OPS, asked_of, model_rows
from .modules import MODULES
from .operations import OPERATIONS, Measured, copy, peak
from .precompile import compile_ahead
from .products import OF_ANY_BLOCKS, PRODUCTS
from .providers import add_stacks_flag
from .report import UNMEASURED, Row
from .rivals import TORCHAO, WITH_RIVALS, with_rivals
from .timing import Call, Timing, flushed, graph, host, wall
from .weights import BLOCKSIZE, OUTPUT_LAYER, Size, format_of

# Weights in a rotation: in 4 bits they together exceed the 50 MB of an H100's L2 cache, of so many elements and more;
# of smaller weights more are in it.
ROTATION, _MOST_ROTATION = 8, 64
_ELEMENTS = 4096 * 4096
# Rows of activations: from one token to a batch of sequences; of a training step; of generating one token.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROWS_OF = {"lora": (32, 128, 512, 2048), **dict.fromkeys(MODULES, (1,))}
_WITH_ROWS = {**PRODUCTS, **MODULES}
# Rows and columns of the product that shows the matrix peak; of a trial's.
PEAK_SIZE, _TRIAL_PEAK_SIZE = 8192, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write a CSV; 0, or 2 on wrong arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.gpu_record and (options.smoke or options.out):
        parser.error("--gpu-record writes a measurement to benchmarks/results: without --smoke and --out")
    if not (options.gpu_record or options.out):
        parser.error("one of --out and --gpu-record is required")
    try:
        asked_of(options)
        sizes = sizes_of(options)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if any(size.blocksize != BLOCKSIZE for size in sizes) and (
        options.all_rivals or not set(options.op) <= set(OF_ANY_BLOCKS)
    ):
        parser.error(f"other blocks than of {BLOCKSIZE} are for {' and '.join(OF_ANY_BLOCKS)}, without --all-rivals")
    options.out = options.out or RESULTS
    # A stack may fail in one of them.
    options.dtype = options.dtype or ["float16", *(["bfloat16"] if set(options.op) <= set(MODEL_OPS) else [])]
    name = "-".join(["rivals", *options.op] if options.all_rivals else options.op)
    return measure_to_csv(options, record_name(options, name), lambda device: _rows(options, device), _line, _noise)


def _rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    """The kernels on each weight, then the whole models; beside each row's rates the run's copy and matrix peak."""
    rates: dict[tuple[str, str, str], float] = {}
    for row in chain(_kernel_rows(options, device), _model_rows(options, device)):
        dtype, method = row["dtype"], row["method"]
        if row["op"] in ("copy", "peak"):
            rates[row["op"], dtype, method] = row["gbps" if row["op"] == "copy" else "tflops"]
        if row["op"] in MODEL_OPS:  # whose clock is none of the copy's and the matrix peak's
            method = "graph" if device == "cuda" else "wall"
        shares = {
            "percent_of_copy": None if row["op"] == "load" else _share(row["gbps"], rates.get(("copy", dtype, method))),
            "percent_of_peak": _share(row["tflops"], rates.get(("peak", dtype, method))),
        }
        yield {**row, **shares}


def _model_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    if set(options.op) & set(MODEL_OPS):
        yield from model_rows(options, device)


def _kernel_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    """Of whole models alone the copy and the matrix peak."""
    sizes = sizes_of(options)
    if set(options.op) <= set(MODEL_OPS):
        sizes = dict(list(sizes.items())[:1])
    elif device == "cuda":
        rows = {m for op in options.op if op in _WITH_ROWS for m in _rows_of(op, options)}
        compile_ahead(lambda: launch_products(sizes, options.dtype, rows))
    with Clock() as clock:
        for number, (size, model) in enumerate(sizes.items()):
            for dtype in options.dtype:
                weights = [
                    0.02 * torch.randn(size.shape, device=device, dtype=getattr(torch, dtype))
                    for _ in range(rotation_of(size, device))
                ]
                base = {"model": model, **size.columns, "dtype": dtype}
                for op, measured in _cases(options, weights[0], size.blocksize, first=number == 0):
                    for row in _measure(op, measured, weights, size.blocksize, twice=number == 0, clock=clock):
                        yield {**base, **row}


def rotation_of(size: Size, device: str) -> int:
    """How many weights of this size are in a rotation."""
    if device == "cpu":
        return ROTATION
    rows, columns = size.shape
    return min(_MOST_ROTATION, ROTATION * max(1, -(-_ELEMENTS // (rows * columns))))


def _share(rate: float | None, highest: float | None) -> float | None:
    return 100 * rate / highest if rate and highest else None


def _rows_of(op: str, options: argparse.Namespace) -> Sequence[int]:
    return rows_of(options, _ROWS_OF.get(op, ROWS))


def launch_products(sizes: Iterable[Size], dtypes: Iterable[str], rows: Iterable[int]) -> None:
    """Every kernel of the products of these weights with so many rows once, for `compile_ahead`."""
    for (shape, blocksize), name in product(sizes, dtypes):
        weight = torch.zeros(shape, device="cuda", dtype=getattr(torch, name))
        packed, state = qkernels.quantize_4bit(weight, **format_of(blocksize))
        qkernels.dequantize_4bit(packed, state)
        for m in rows if shape != OUTPUT_LAYER else ():
            qkernels.matmul_4bit(weight.new_empty(m, shape[1]), packed, state)
            qkernels.matmul_4bit_dx(weight.new_empty(m, shape[0]), packed, state)


def _cases(
    options: argparse.Namespace, weight: torch.Tensor, blocksize: int, first: bool
) -> Iterator[tuple[str, Measured]]:
    """The copy, the matrix peak once a dtype, and what is asked for."""
    yield "copy", copy(weight)
    if first and set(options.op) & {*_WITH_ROWS, *MODEL_OPS}:
        yield "peak", peak(weight, _TRIAL_PEAK_SIZE if options.smoke else PEAK_SIZE)
    for op in (op for op in options.op if op not in MODEL_OPS):
        rivals = options.all_rivals and op in WITH_RIVALS
        if op in OPERATIONS:
            measured = OPERATIONS[op](weight)
            yield op, with_rivals(op, measured, weight) if rivals else measured
        elif tuple(weight.shape) != OUTPUT_LAYER:
            for m in _rows_of(op, options):
                blocks = {"blocksize": blocksize} if op in OF_ANY_BLOCKS else {}
                measured = _WITH_ROWS[op](weight, m, **blocks)
                yield op, with_rivals(op, measured, weight) if rivals else measured


def _measure(
    op: str, measured: Measured, weights: list[torch.Tensor], blocksize: int, twice: bool, clock: Clock
) -> Iterator[Row]:
    sizes = {"bytes": measured.bytes, "flops": measured.flops}
    for provider, reason in measured.missing.items():
        row = {"op": op, "m": measured.m, "provider": provider, "method": None, "status": "not run", "reason": reason}
        yield {**row, **UNMEASURED, **sizes}
    calls = {provider: [make(weight) for weight in weights] for provider, make in measured.providers.items()}
    fixed = {
        provider: {
            "peak_mib": peak_mib(those[0], weights[0].device),
            "implementation": _implementation(op, provider, measured.m, weights[0], blocksize),
        }
        for provider, those in calls.items()
    }
    if twice:  # ours once more: how far the two are apart is the noise of the run
        calls |= {name + AGAIN: calls[name] for name in OURS if name in calls}
    for method in _methods(op, weights[0]):
        reasons = {name: _not_capturable(name, op) if method == "graph" else None for name in calls}
        timings = _time(method, {name: those for name, those in calls.items() if reasons[name] is None})
        for provider, reason in reasons.items():
            row: Row = {"op": op, "m": measured.m, "provider": provider, "method": method}
            if reason is not None:
                yield {**row, "status": "not run", "reason": reason, **UNMEASURED, **sizes}
                continue
            timing = timings[provider]
            rates: Row = {
                "gbps": measured.bytes / timing.median_us / 1e3,
                "tflops": measured.flops / timing.median_us / 1e6,
            }
            rates["sm_mhz"] = clock.mhz()
            rest = fixed[provider.removesuffix(AGAIN)]
            yield {**row, "status": "ok", "reason": None, **asdict(timing), **rates, **rest, **sizes}


def _implementation(op: str, provider: str, m: int | None, weight: torch.Tensor, blocksize: int) -> str | None:
    """Which of our kernels computes a product; None for what is no single product of ours."""
    if op not in ("matmul", "matmul_dx", "linear4bit") or provider not in OURS:
        return None
    assert m is not None
    rows, columns = weight.shape
    how = {"blocksize": blocksize, "backward": op == "matmul_dx"}
    return qkernels.explain(m, rows, columns, weight.dtype, weight.device, **how).implementation


def _methods(op: str, weight: torch.Tensor) -> tuple[str, ...]:
    if not weight.is_cuda:
        return ("wall",)
    if op == "linear4bit_training":  # the kernels are those of the other
        return ("host",)
    return ("flushed", "graph", "host") if op in MODULES else ("flushed", "graph")


def _time(method: str, calls: dict[str, list[Call]]) -> dict[str, Timing]:
    if method == "graph":
        return graph(calls)
    first = {name: those[0] for name, those in calls.items()}
    return {"flushed": flushed, "host": host, "wall": wall}[method](first)


def _not_capturable(provider: str, op: str) -> str | None:
    """Why a provider cannot be in a CUDA graph; None when it can."""
    if op not in ("quantize", "quantize_blockwise"):
        return None
    if provider == "bitsandbytes":
        return "its quantizer launches on the legacy default stream, which a graph cannot capture"
    if "checking" in provider:
        return "the check waits for the device"
    if provider == TORCHAO:
        return "it copies from the host"
    return None


def _noise(rows: list[Row]) -> str:
    return "noise, the same code timed twice: " + ", ".join(f"{how} {value:.1%}" for how, value in noise(rows).items())


def _line(row: Row) -> str:
    shape = f"{weight_of(row)} {row['dtype']}" + (f" M={row['m']}" if row["m"] else "")
    result = row["reason"]
    if row["status"] == "ok":
        result = (
            f"{_times(row)}  {row['gbps']:6.0f} GB/s  "
            + (f"{row['percent_of_copy']:4.0f}% of copy" if row["percent_of_copy"] else "")
            + (f" {row['percent_of_peak']:4.0f}% of peak" if row["percent_of_peak"] else "")
        )
    return f"{row['op']:10} {shape:28} {row['method'] or '':8} {row['provider']:35} {result}"


def _times(row: Row) -> str:
    unit, name = (1, "us") if row["median_us"] < 1e5 else (1e3, "ms")
    median, low, high = (row[key] / unit for key in ("median_us", "p20_us", "p80_us"))
    return f"{median:8.1f} {name} ({low:.1f} to {high:.1f})"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("run", __doc__, out_required=False)
    add_trial_flag(parser)
    parser.add_argument(
        "--gpu-record", action="store_true", help=f"a record to be committed: into {RESULTS}, and on a GPU only"
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=[*OPERATIONS, *_WITH_ROWS, *MODEL_OPS],
        required=True,
        help="repeat it for several",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float16", "bfloat16", "float32"),
        help="default: float16; of whole models alone bfloat16 too",
    )
    add_shape_flags(parser)
    parser.add_argument(
        "--all-rivals",
        action="store_true",
        help=f"for {', '.join(WITH_RIVALS)}: further ones, which must be installed or are slow to set up",
    )
    add_rows_flag(parser, "1 to 4096, lora 32 to 2048, a layer 1, train_step 128 and 2048")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)), help="for a training step and the like")
    parser.add_argument("--layers", type=positive, default=LAYERS, help="of that model (default: %(default)s)")
    add_stacks_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
