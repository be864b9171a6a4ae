"""How far off 4-bit weights are, the outputs of a layer, and a whole model; beside the theory and bitsandbytes.

    python -m benchmarks.quant_error --data prompts.csv --out benchmarks/results
    python -m benchmarks.quant_error --level weights --model FOLDER --format nf4 int4 --out /tmp/errors
    python -m benchmarks.quant_error --smoke --data qlora/assets/prompts.csv --out /tmp/trial

Each level leaves a CSV, and together they make a page, `error.html` and `error.md`.  Where a measurement differs from
the theory by more than chance allows, it says so, writes nothing, and ends with 1.  `docs/error.md` says what and how.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qkernels
from qkernels import BLOCKSIZES
from qkernels.errors import UserError
from qlora.checkpoint import check_writable
from qlora.demo import MODEL

from . import data, error_page
from .command import add_data_flag, environment_of, parser_of
from .error import check, model, outputs, records, weights
from .error.distributions import DISTRIBUTIONS
from .error.formats import FORMATS, NESTED_BLOCK, RIVALS
from .error.sources import folder_of, matrices
from .error.statistics import FEWEST_GROUPS
from .precompile import compile_ahead
from .report import Row

# The tutorial trains on the first 50 prompts; the rest is held out.
TRAINED_ON = 50
LONGEST_TEXT = 256
SHOWN_BLOCKSIZE = 64  # that each matrix of a model has rows of its own for
NORMAL_SHAPE = (1024, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line a case, write the records; 0, 1 if the theory is contradicted, 2 on wrong arguments."""
    options = _parser().parse_args(arguments)
    return check.exit_code(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_count(options.count, max(options.blocksize))
    if "model" in options.level and options.model:
        data.read_prompts(options.data)  # before minutes of work
    check_writable(options.out)
    weights.calibrate(options.format, device)
    common = environment_of(options, device)
    for level in options.level:
        rows_of, line = LEVELS[level]
        rows = []
        for row in rows_of(options, device):
            rows.append(row)
            print(line(row), flush=True)
        print(f"written: {records.write(options.out, level, rows, common)}")
    error_page.write(options.out, options.out)


def _check_count(count: int, blocksize: int) -> None:
    fewest = blocksize * NESTED_BLOCK * FEWEST_GROUPS
    if count < fewest or count % blocksize:
        raise UserError(
            "--count",
            expected=f"a multiple of the largest blocksize, at least {fewest} for {blocksize}",
            got=count,
            remedy="An interval needs three blocks of quantized scales: draw more weights, or lower --blocksize.",
        )


def _weight_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    cases = weights.Cases(tuple(options.format), tuple(options.blocksize))
    compared = cases.count() * len(options.weights) * 2  # a rival at most beside each
    for distribution in options.weights:
        yield from weights.synthetic_rows(distribution, options.count, cases, device, compared)
    nested = weights.Cases(cases.formats, cases.blocksizes, nested=(True,))
    shown = weights.Cases(cases.formats, (SHOWN_BLOCKSIZE,), nested=(True,))
    for name in options.model:
        found = matrices(folder_of(name))
        yield from weights.model_rows(name, itertools.islice(found, options.matrices), nested, shown, device)


def _output_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    sources = [("normal", 0.02 * torch.randn(NORMAL_SHAPE, generator=torch.Generator().manual_seed(0)))]
    for name in options.model:
        found = list(itertools.islice(matrices(folder_of(name)), options.matrices))
        tensor, weight = max(found[len(found) // 2 :], key=lambda one: one[1].numel())
        sources.append((f"{name} {tensor}", weight))
    if device == "cuda":
        compile_ahead(lambda: _launch_products(options, [weight for _, weight in sources]))
    total = len(sources) * len(options.dtype) * len(options.m) * 2
    for name, weight in sources:
        for dtype in options.dtype:
            yield from outputs.output_rows(name, weight, getattr(torch, dtype), tuple(options.m), device, total)


def _launch_products(options: argparse.Namespace, weights: list[torch.Tensor]) -> None:
    for weight, dtype, m in itertools.product(weights, options.dtype, options.m):
        packed, state = qkernels.quantize_4bit(weight.to("cuda"), **outputs.FORMAT)
        x = torch.empty(m, weight.shape[1], device="cuda", dtype=getattr(torch, dtype))
        qkernels.matmul_4bit(x, packed, state)


def _model_rows(options: argparse.Namespace, device: str) -> Iterator[Row]:
    prompts = data.read_prompts(options.data)[TRAINED_ON:][: options.texts]
    for name in options.model:
        folder = folder_of(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST_TEXT].to(device) for text in prompts]
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        yield from model.model_error_rows(name, loaded, texts, _replacements(options))


def _replacements(options: argparse.Namespace) -> Iterator[model.Replacement]:
    """Every format at the usual blocksize; the first one also as the rival has it, with exact scales, at others."""
    for name in options.format:
        yield model.Replacement(name, FORMATS[name], SHOWN_BLOCKSIZE, True)
    first = options.format[0]
    if first in RIVALS:
        yield model.Replacement(first, RIVALS[first], SHOWN_BLOCKSIZE, True)
    yield model.Replacement(first, FORMATS[first], SHOWN_BLOCKSIZE, False)
    for blocksize in options.blocksize[::2]:
        if blocksize != SHOWN_BLOCKSIZE:
            yield model.Replacement(first, FORMATS[first], blocksize, True)


LEVELS: dict[str, tuple[Callable[[Any, str], Iterator[Row]], Callable[[Row], str]]] = {
    "weights": (_weight_rows, weights.line),
    "outputs": (_output_rows, outputs.line),
    "model": (_model_rows, model.line),
}


class _Trial(argparse.Action):
    """`--smoke`: small sizes, which flags after it may change again."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.count, namespace.blocksize, namespace.m = 1 << 18, [64, 256], [1, 16]
        namespace.texts, namespace.matrices, namespace.format = 4, 7, ["nf4", "int8"]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("quant_error", __doc__)
    parser.add_argument("--smoke", action=_Trial, nargs=0, help="small sizes: a trial of the script")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument(
        "--weights", nargs="*", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), help="distributions to draw from"
    )
    parser.add_argument("--count", type=int, default=1 << 22, help="weights to draw, a multiple of 4096")
    parser.add_argument(
        "--model",
        nargs="*",
        default=[MODEL],
        help="real weights: a folder, a .safetensors file (for --level weights), a hub's id; default: %(default)s",
    )
    parser.add_argument("--matrices", type=int, help="take the first so many of a model; default: all")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--blocksize", nargs="+", type=int, choices=BLOCKSIZES, default=list(BLOCKSIZES))
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 1024], help="rows of x")
    add_data_flag(parser)
    parser.add_argument("--texts", type=int, default=24, help="held-out prompts for --level model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
