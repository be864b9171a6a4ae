"""What a small real model learns with LoRA on its 4-bit and on its 16-bit weights: held-out loss over the steps.

    python -m benchmarks.learning --out benchmarks/results --figure docs/figures/learning.png
    python -m benchmarks.learning --from benchmarks/results/learning-curves-....csv --out . --figure learning.png

SmolLM2-135M on the prompts of fka/awesome-chatgpt-prompts, several seeds; the same adapters, texts, batches and
learning rate on every kind of weights, in float32.  The learning rate is the one with which LoRA on 16 bits ends best
on some of the prompts held out; what is reported is the loss on the others, on which nothing was chosen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qkernels.errors import UserError
from qlora.checkpoint import atomic_file, check_writable
from qlora.demo import MODEL, prepare_model

from . import data, plotting
from .command import add_data_flag, parser_of
from .environment import environment
from .learning_curves import figure_of, summary
from .learning_runs import EMBEDDINGS, PLAIN, WEIGHTS, Case, Texts, prepare, read_texts, run
from .report import Row, file_stem, read_csv, write_csv

PROCESSES_ON_GPU = 6


def main(arguments: list[str] | None = None) -> int:
    """Train all, write the CSV, draw; or draw from a CSV.

    Returns:
        0, or 2 on wrong arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        path = options.source or measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = read_csv(path)
    print(summary(rows))
    if options.figure is not None:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.figure) as partial_file:
            partial_file.write_bytes(plotting.picture(lambda: figure_of(rows), plotting.source_of(path, rows)))
        print(f"written: {options.figure}")
    return 0


def measure(options: argparse.Namespace) -> Path:
    """The CSV of all runs."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data.read_prompts(options.data)
    check_writable(options.out)
    common = {
        "model": MODEL,
        **{name: getattr(options, name) for name in ("steps", "rank", "decode_once")},
        "trained_on": len(options.train),
        **environment(device, commit=options.commit),
    }
    stem = file_stem(options.out, "learning-curves", str(common["gpu"] or "cpu"), str(common["date"]), ".csv")
    folder = str(prepare_model())
    texts = read_texts(options.data, folder, options.train, options.choose)
    case = Case(
        weights=PLAIN,
        seed=0,
        learning_rate=options.learning_rate[0],
        folder=folder,
        prepared=None,
        device=device,
        **{name: getattr(options, name) for name in ("steps", "every", "rank", "decode_once", "threads")},
    )
    with tempfile.TemporaryDirectory(prefix="learning-") as work:
        rows = _all_rows(case, texts, options, Path(work))
    path = write_csv(stem, [{**row, **common} for row in rows])
    print(f"written: {path}")
    return path


def _all_rows(case: Case, texts: Texts, options: argparse.Namespace, work: Path) -> list[Row]:
    """First 16 bits at every learning rate, which chooses one; then the other kinds of weights at that one."""
    began = time.monotonic()
    # Steps of a model this small leave a GPU idle for most of the time; several processes share it.
    processes = options.processes or (PROCESSES_ON_GPU if case.device == "cuda" else 1)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context) if processes > 1 else nullcontext()
    with pool as workers:
        each = map if workers is None else workers.map
        plain = [replace(case, learning_rate=rate, seed=s) for rate in options.learning_rate for s in options.seeds]
        running = each(partial(run, texts=texts), plain)
        others = [weights for weights in options.weights if weights != PLAIN]
        prepared = {weights: prepare(weights, work / str(number), texts, case) for number, weights in enumerate(others)}
        print(f"prepared: {time.monotonic() - began:.0f} s", flush=True)
        rows = [row for found in running for row in found]
        rate = best_rate(rows)
        print(f"{PLAIN}: {time.monotonic() - began:.0f} s; learning rate {rate:g}", flush=True)
        cases = [
            replace(case, weights=weights, seed=seed, learning_rate=rate, prepared=prepared[weights])
            for weights in others
            for seed in options.seeds
        ]
        rows += [row for found in each(partial(run, texts=texts), cases) for row in found]
        print(f"all: {time.monotonic() - began:.0f} s", flush=True)
    return [{**row, "chosen_rate": rate} for row in rows]


def best_rate(rows: Iterable[Row]) -> float:
    """The learning rate with which the loss on the prompts to choose on ends lowest, mean over the seeds."""
    rows = [row for row in rows if row["part"] == "choose"]
    last = max(row["step"] for row in rows)
    ends: dict[float, list[float]] = {}
    for row in rows:
        if row["step"] == last:
            ends.setdefault(row["learning_rate"], []).append(row["loss"])
    return min(ends, key=lambda rate: sum(ends[rate]) / len(ends[rate]))


def _range(text: str) -> range:
    begin, _, end = text.partition(":")
    return range(int(begin), int(end))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("learning", __doc__)
    parser.add_argument("--figure", type=Path, help="draw the curves here")
    parser.add_argument("--from", dest="source", type=Path, help="draw from this CSV, and measure nothing")
    add_data_flag(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    kinds = [weights for weights in WEIGHTS if weights != EMBEDDINGS]
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=kinds, metavar="WEIGHTS", help="beside 16 bits"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: %(default)s")
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="to choose from")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--train", type=_range, default=range(100), help="rows to train on, first:end (default: 0:100)")
    # Earlier records held these out, and their results led to choices: they are not to be tested on again.
    parser.add_argument("--choose", type=_range, default=range(130, 154), help="rows to choose on (default: 130:154)")
    parser.add_argument("--steps", type=int, default=150, help="of 4 prompts (default: %(default)s)")
    parser.add_argument("--every", type=int, default=15, help="steps between two measurements (default: %(default)s)")
    parser.add_argument("--decode-once", action="store_true", help="keep the decoded weights; the same losses")
    parser.add_argument(
        "--processes", type=int, help=f"that train at a time (default: {PROCESSES_ON_GPU} on a GPU, or 1)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, each process (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
