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
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qkernels.errors import UserError
from qlora.checkpoint import atomic_file, check_writable
from qlora.demo import MODEL, prepare_model

from . import data, plotting
from .command import add_data_flag, environment_of, parser_of
from .learning_curves import figure_of, summary
from .learning_runs import EMBEDDINGS, PLAIN, PREPARED, WEIGHTS, Case, Texts, prepare, read_texts, run
from .report import Row, file_stem, read_csv, write_csv

# Seeds with which the learning rate is chosen.
SEEDS_TO_CHOOSE = 2
# What takes longest to import, loaded once for all processes.  Not bitsandbytes nor what imports it, which starts CUDA:
# no process that begins as a copy of another could use that.
IMPORTED_ONCE = ["transformers.models.llama.modeling_llama", "transformers.generation", "datasets", "qkernels"]

Task = tuple[Callable[[Case, Texts], list[Row]], Case]


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
    """The CSV of all runs; Ctrl-C ends them, and the CSV is of those that are done."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data.read_prompts(options.data)
    check_writable(options.out)
    common = {
        "model": MODEL,
        **{name: getattr(options, name) for name in ("steps", "rank", "decode_once")},
        "trained_on": len(options.train),
        **environment_of(options, device),
    }
    stem = file_stem(options.out, "learning-curves", str(common["gpu"] or "cpu"), str(common["date"]), ".csv")
    folder = str(prepare_model())
    texts = read_texts(options.data, folder, options.train, options.choose)
    case = Case(
        weights=PLAIN,
        seed=options.seeds[0],
        learning_rate=options.learning_rate[0],
        folder=folder,
        prepared=None,
        device=device,
        **{name: getattr(options, name) for name in ("steps", "every", "rank", "decode_once", "threads")},
    )
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="learning-") as work:
        try:
            for found in _measured(case, texts, options, Path(work)):
                rows += found
                rate = _only(options.learning_rate) or best_rate(rows, options.seeds[:SEEDS_TO_CHOOSE])
                path = write_csv(stem, [{**row, "chosen_rate": rate, **common} for row in rows])
                print(f"{time.monotonic() - began:.0f} s: {rows[-1]['weights']}, seed {rows[-1]['seed']}", flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    if not rows:
        raise UserError("learning", expected="one finished run", got="none", remedy="Give it more time.")
    print(f"written: {path}")
    return path


def _measured(case: Case, texts: Texts, options: argparse.Namespace, work: Path) -> Iterator[list[Row]]:
    """The rows of each run as it ends: 16 bits at every learning rate, which chooses one, then all else at that one.

    Where there is only one learning rate, nothing waits for the choice.
    """
    folders = {weights: work / str(number) for number, weights in enumerate(PREPARED)}
    others = [replace(case, weights=kind, prepared=folders.get(kind)) for kind in options.weights if kind != PLAIN]
    rate = _only(options.learning_rate)
    choosing = options.seeds if rate is not None else options.seeds[:SEEDS_TO_CHOOSE]
    tried = [replace(case, learning_rate=each, seed=seed) for seed in choosing for each in options.learning_rate]
    todo: deque[Task] = deque([*((prepare, one) for one in others if one.prepared), *((run, one) for one in tried)])
    ready = [one for one in others if not one.prepared]
    rows: list[Row] = []

    def runs(cases: list[Case], seeds: Sequence[int], rate: float) -> list[Task]:
        return [(run, replace(one, seed=seed, learning_rate=rate)) for seed in seeds for one in cases]

    if rate is not None:
        todo.extend(runs(ready, options.seeds, rate))
    for (function, done), found in _finished(todo, texts, options.processes or _processes_on(case.device)):
        if function is prepare:
            ready.append(done)
            if rate is not None:
                todo.extendleft(reversed(runs([done], options.seeds, rate)))
            continue
        yield found
        rows += found
        if rate is None and len({(row["learning_rate"], row["seed"]) for row in rows}) == len(tried):
            rate = best_rate(rows, choosing)
            print(f"learning rate {rate:g}", flush=True)
            todo.extend(runs([case], options.seeds[SEEDS_TO_CHOOSE:], rate))
            todo.extend(runs(ready, options.seeds, rate))


def _only(rates: Sequence[float]) -> float | None:
    return rates[0] if len(rates) == 1 else None


def _processes_on(device: str) -> int:
    """Steps of a model this small leave a GPU idle for most of the time: several processes share it."""
    return 10 if device == "cuda" else 1


def _finished(todo: deque[Task], texts: Texts, processes: int) -> Iterator[tuple[Task, list[Row]]]:
    """Each task and what it returned, as it ends; `todo` may grow meanwhile.  The first error is raised in the end."""
    running: dict[Future[list[Row]], Task] = {}
    failures = []
    with _executor(processes) as executor:
        while todo or running:
            while todo and len(running) < processes:
                function, case = task = todo.popleft()
                running[executor.submit(function, case, texts)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, failure = running.pop(future), future.exception()
                if failure is None:
                    yield task, future.result()
                else:
                    failures.append(failure)
    if failures:
        raise failures[0]


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(processes: int) -> Iterator[Executor]:
    if processes == 1:
        yield _Here()
        return
    # Ctrl-C goes to every process of a terminal; here it is the parent that ends the others.
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    workers = ProcessPoolExecutor(processes, context, initializer=ignore)
    try:
        yield workers
    finally:
        workers.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def best_rate(rows: Iterable[Row], seeds: Sequence[int]) -> float:
    """The learning rate with which the loss of LoRA on 16 bits ends lowest on the prompts to choose on, mean over these
    seeds."""
    rows = [row for row in rows if (row["weights"], row["part"]) == (PLAIN, "choose") and row["seed"] in seeds]
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
    parser.add_argument("--steps", type=int, default=125, help="of 4 prompts (default: %(default)s)")
    parser.add_argument("--every", type=int, default=15, help="steps between two measurements (default: %(default)s)")
    parser.add_argument("--decode-once", action="store_true", help="keep the decoded weights; the same losses")
    parser.add_argument("--processes", type=int, help="that train at a time (default: 10 on a GPU, else 1)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, each process (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
