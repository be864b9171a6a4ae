"""The public exercise "convert NF4 to Triton": decode the weights of three MLPs, a thousand times over.

    python -m benchmarks.nf4_exercise --out benchmarks/results
    python -m benchmarks.nf4_exercise --smoke --out /tmp/trial        # small, also on a CPU

Puzzle A of https://colab.research.google.com/drive/1JqKqA1XWeLHvnYAc0wzrR4JBCnq43HyH (Unsloth): bitsandbytes layers in
NF4 with double quantization; up, gate and down projection are decoded one after the other, and the GPU is waited for
after each.  So the host's part of a call counts in full.  Before the clock starts, the decoded weights must equal
bitsandbytes' bit for bit, and products and the whole MLP must come out as from its layers.  The exercise also lists
peft's path (`dequantize_module_weight`); it is the same bitsandbytes call behind a type check, and no row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from .command import add_trial_flag, measure_to_csv, parser_of
from .operations import GateError
from .report import Row

YARDSTICK = "bitsandbytes"
# Each provider is timed as often, in turns; the median stands in `seconds`.
ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """Attributes:
    batch, length: of the activations that the gate multiplies.
    hidden, intermediate: features of the MLP.
    """

    batch: int
    length: int
    hidden: int
    intermediate: int
    dtype: torch.dtype


SIZES = (
    Size(2, 3333, 2048, 8192, torch.float16),
    Size(5, 777, 1024, 4096, torch.bfloat16),
    Size(3, 2048, 4096, 14336, torch.bfloat16),
)
TRIAL_SIZES = (Size(2, 3, 64, 128, torch.float16), Size(2, 3, 128, 64, torch.bfloat16))


class Matrix:
    """One projection: bitsandbytes' layer, and its weight as each library holds it (the bytes are shared)."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> None:
        self.layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
        ).to(device)
        self.packed = self.layer.weight.data
        self.theirs = self.layer.weight.quant_state
        self.theirs.dtype = (
            dtype  # decode to the dtype of the products, as the exercise does; it was quantized as float32
        )
        self.ours = qkernels.QuantState.from_dict(self.theirs.as_dict(packed=True), device)


Decode = Callable[[Matrix], Tensor]
PROVIDERS: dict[str, Decode] = {
    "qkernels": lambda matrix: qkernels.dequantize_4bit(matrix.packed, matrix.ours),
    YARDSTICK: lambda matrix: bitsandbytes.functional.dequantize_4bit(matrix.packed, matrix.theirs),
}


class Mlp:
    """The three projections, and both ways through them."""

    def __init__(self, size: Size, device: str) -> None:
        self.up = Matrix(size.hidden, size.intermediate, size.dtype, device)
        self.gate = Matrix(size.hidden, size.intermediate, size.dtype, device)
        self.down = Matrix(size.intermediate, size.hidden, size.dtype, device)

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        return self.up, self.gate, self.down

    def __call__(self, x: Tensor, decode: Decode | None = None) -> Tensor:
        """Through bitsandbytes' layers, or through weights that `decode` gives."""

        def times(matrix: Matrix, y: Tensor) -> Tensor:
            return matrix.layer(y) if decode is None else y @ decode(matrix).t()

        return times(self.down, F.silu(times(self.gate, x)) * times(self.up, x))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write a CSV; 0, or 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    sizes = TRIAL_SIZES if options.smoke else SIZES
    return measure_to_csv(options, "nf4-exercise", lambda device: _rows(sizes, options.trials, device), _line)


def _rows(sizes: Sequence[Size], trials: int, device: str) -> Iterator[Row]:
    """A row for each provider at each size, then one for each provider in total."""
    total = {name: [0.0] * ROUNDS for name in PROVIDERS}
    for number, size in enumerate(sizes):
        torch.manual_seed(number)
        mlp = Mlp(size, device)
        x = torch.randn(size.batch, size.length, size.hidden, device=device, dtype=size.dtype)
        for name, decode in PROVIDERS.items():
            gate(name, decode, mlp, x)
        seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
        for turn in range(ROUNDS):
            for name, decode in PROVIDERS.items():
                seconds[name].append(_seconds(decode, mlp, trials))
                total[name][turn] += seconds[name][-1]
        shape = {"hidden": size.hidden, "intermediate": size.intermediate, "dtype": str(size.dtype).split(".")[1]}
        yield from ({**shape, **result} for result in _results(seconds, trials))
    yield from (
        {"hidden": "all", "intermediate": "all", "dtype": "all", **result} for result in _results(total, trials)
    )


def _results(seconds: dict[str, list[float]], trials: int) -> Iterator[Row]:
    yardstick = statistics.median(seconds[YARDSTICK])
    for name, times in seconds.items():
        median = statistics.median(times)
        yield {
            "provider": name,
            "trials": trials,
            "rounds": len(times),
            "seconds": median,
            "seconds_min": min(times),
            "seconds_max": max(times),
            "times_bitsandbytes": yardstick / median,
        }


def gate(name: str, decode: Decode, mlp: Mlp, x: Tensor) -> None:
    """Raise GateError unless `decode` gives bitsandbytes' bits, and products and the MLP as from its layers."""
    for matrix in mlp.matrices:
        weight, expected = decode(matrix), PROVIDERS[YARDSTICK](matrix)
        if weight.dtype != expected.dtype or weight.shape != expected.shape:
            raise GateError(
                f"{name} decodes to {weight.dtype} {tuple(weight.shape)}, bitsandbytes to {expected.dtype} "
                f"{tuple(expected.shape)}"
            )
        differing = int((weight.view(torch.int16) != expected.view(torch.int16)).sum())
        if differing:
            raise GateError(f"{name}: {differing} of {weight.numel()} decoded weights differ from bitsandbytes'")
        y = x if weight.shape[1] == x.shape[-1] else x.new_ones(1, weight.shape[1])
        if not torch.equal(y @ weight.t(), y @ expected.t()):
            raise GateError(f"{name}: products with its weight differ from products with bitsandbytes' weight")
    with torch.no_grad():
        ours, theirs = mlp(x, decode), mlp(x)
    try:
        torch.testing.assert_close(ours, theirs, check_stride=True)
    except AssertionError as error:
        raise GateError(f"{name}: the MLP differs from that of bitsandbytes' layers: {error}") from error


def _seconds(decode: Decode, mlp: Mlp, trials: int) -> float:
    """Wall time of decoding up, gate and down `trials` times, waiting after each; two rounds go before."""
    wait = torch.cuda.synchronize if mlp.up.packed.is_cuda else _nothing

    def decode_all() -> list[Tensor]:
        weights = []
        for matrix in mlp.matrices:
            weights.append(decode(matrix))
            wait()
        return weights

    for _ in range(2):
        decode_all()
    begin = time.perf_counter()
    for _ in range(trials):
        decode_all()
    return time.perf_counter() - begin


def _nothing() -> None:
    """A CPU is never behind."""


def _line(row: Row) -> str:
    shape = f"{row['hidden']} x {row['intermediate']} {row['dtype']}"
    spread = f"({row['seconds_min']:.4f} to {row['seconds_max']:.4f})"
    return (
        f"{shape:24} {row['provider']:14} {row['seconds']:8.4f} s {spread} for {row['trials']} trials, "
        f"{row['times_bitsandbytes']:.2f}x bitsandbytes"
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("nf4_exercise", __doc__)
    add_trial_flag(parser)
    parser.add_argument("--trials", type=int, default=1000, help="how often each MLP is decoded (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
