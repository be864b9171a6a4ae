"""Where a training step's time goes, by torch's profiler: bitsandbytes' stack, and this project's before and after.

    python -m benchmarks.step_profile --data prompts.csv --out benchmarks/results

The same model, batch and trainer settings as `benchmarks.bloom7b1`; each way trains a few steps, of which the last are
profiled.  A row is what one kind of kernel took on the GPU in one step; the kinds are told apart by the kernels' names
(`KINDS`), and the names of each kind's longest ones are in the record.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback

from qlora.checkpoint import atomic_file
from qlora.loading import load_pretrained_4bit
from qlora.markdown import markdown_table
from qlora.optimize import optimize_model

from . import data, report
from .checkpoint import build_checkpoint
from .command import add_model_flags, model_run, parser_of, written
from .providers import DTYPES, PROVIDERS, Provider, training_arguments

# The first pattern that a kernel's name matches decides.
KINDS = (
    ("attention", r"fmha|flash|attention|sdpa|softmax"),
    ("adapters, where apart", r"_lora_"),
    ("decoding", r"dequant"),
    ("products", r"gemm|nvjet|cutlass|xmma|matmul|wgmma|skinny|sum_parts|splitk|\bmm\b|addmm"),
    ("loss", r"_forward_kernel|_backward_kernel|nll_loss|cross_entropy"),
    ("normalization", r"layer_?norm|rms_?norm|GammaBeta"),
    ("activation", r"gelu|silu|tanh"),
    ("dropout", r"dropout"),
    ("optimizer and clipping", r"multi_tensor|adam|foreach"),
    ("copies and casts", r"memcpy|memset|copy"),
    ("elementwise and the rest", r""),
)
MOST_NAMES = 3


def _as_loaded(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load_pretrained_4bit(checkpoint, dtype=dtype, device=device)


def _launched(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return optimize_model(_as_loaded(checkpoint, dtype, device), graphs=False)


def _captured(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return optimize_model(_as_loaded(checkpoint, dtype, device), graphs=True)


RIVAL = "trl+peft+bitsandbytes"
# Ways to train: the stack whose trainer and adapters are used, and how the model is loaded.
WAYS: dict[str, tuple[str, Callable[[str, torch.dtype, str], PreTrainedModel]]] = {
    RIVAL: (RIVAL, PROVIDERS[RIVAL].load),
    "qlora, without optimize_model": ("qlora", _as_loaded),
    "qlora, launch by launch": ("qlora", _launched),
    "qlora": ("qlora", _captured),
}


class Profiled(TrainerCallback):
    """Profiles the steps after the first `skip`.

    Attributes:
        events: what the profiler found, by name.
        seconds: wall time of the profiled steps.
    """

    def __init__(self, skip: int, device: str) -> None:
        self.skip, self.device = skip, device
        self.events: list[Any] = []
        self.seconds = 0.0
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.skip:
            self._wait()
            self._profile.start()
            self.seconds = -time.perf_counter()
        if state.global_step == args.max_steps:
            self._wait()
            self.seconds += time.perf_counter()
            self._profile.stop()
            self.events = list(self._profile.key_averages())

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def kind_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def rows_of(events: Sequence[Any], device: str, steps: int, seconds: float) -> list[report.Row]:
    """Milliseconds and launches of each kind of kernel in one step, the step's wall time first.

    Args:
        events: of the profiler, with `key`, `count`, and the time that each took itself, in microseconds.
        steps: that were profiled.
        seconds: that they took.
    """
    took = {
        event.key: (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total, event.count)
        for event in events
    }
    took = {name: (time_us, count) for name, (time_us, count) in took.items() if time_us > 0}
    rows: list[report.Row] = [
        {
            "kind": "wall",
            "ms": 1e3 * seconds / steps,
            "launches": sum(count for _, count in took.values()) / steps,
            "longest": "",
        }
    ]
    for kind, _ in KINDS:
        those = {name: values for name, values in took.items() if kind_of(name) == kind}
        longest = sorted(those, key=lambda name: -those[name][0])[:MOST_NAMES]
        rows.append(
            {
                "kind": kind,
                "ms": sum(time_us for time_us, _ in those.values()) / 1e3 / steps,
                "launches": sum(count for _, count in those.values()) / steps,
                "longest": "; ".join(name[:80] for name in longest),
            }
        )
    return rows


def measured(way: str, checkpoint: Path, device: str, options: argparse.Namespace) -> Iterator[report.Row]:
    """The rows of one way to train."""
    stack, load = WAYS[way]
    provider: Provider = PROVIDERS[stack]
    precision = "fp32" if device == "cpu" else options.precision
    model = provider.adapt(load(str(checkpoint), DTYPES[precision], "cuda:0" if device == "cuda" else device))
    batch, length = map(int, options.length.split("x"))
    steps = options.warmup + options.steps
    with tempfile.TemporaryDirectory(prefix="step-profile-") as work:
        arguments = training_arguments(precision, device) | {
            "output_dir": work,
            "per_device_train_batch_size": batch,
            "max_steps": steps,
        }
        dataset = data.synthetic_dataset(batch * steps, length, model.config.vocab_size)
        trainer = provider.trainer(model, AutoTokenizer.from_pretrained(checkpoint), dataset, arguments)
        profiled = Profiled(options.warmup, device)
        trainer.add_callback(profiled)
        trainer.train()
    for row in rows_of(profiled.events, device, options.steps, profiled.seconds):
        yield {"way": way, "precision": precision, "batch": batch, "length": length, **row}


def markdown(rows: list[report.Row], source: str) -> str:
    """A table: a line a kind of kernel, a column a way to train."""
    first = rows[0]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cells = {(row["way"], row["kind"]): row for row in rows}
    kinds = [kind for kind, _ in KINDS]

    busy = [sum(cells[way, kind]["ms"] for kind in kinds) for way in ways]
    body = [
        *([kind, *(f"{cells[way, kind]['ms']:.1f}" for way in ways)] for kind in kinds),
        ["all kernels", *(f"{value:.1f}" for value in busy)],
        ["wall", *(f"{cells[way, 'wall']['ms']:.1f}" for way in ways)],
        ["kernels, number", *(f"{cells[way, 'wall']['launches']:.0f}" for way in ways)],
    ]
    return (
        f"# {first['model']}: a training step's time on {first['gpu'] or first['processor']}\n\n"
        f"Made by `python -m benchmarks.step_profile` from `{source}`, commit {first['commit']}, {first['date']}, "
        f"torch {first['torch']}, {first['precision']}, {first['batch']} x {first['length']} tokens. "
        f"Milliseconds a step, while it is profiled.\n\n{markdown_table(['', *ways], body)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile each way and write the record.

    Returns:
        0, or 2 on wrong arguments.
    """
    return written(run, _parser().parse_args(arguments), "csv")


def run(options: argparse.Namespace) -> Path:
    """See `main`; returns the results' path without suffix."""
    asked = model_run(options, "profile-")
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="step-profile-") as work:
        checkpoint = options.checkpoint or Path(work) / "checkpoint"
        build_checkpoint(checkpoint, asked.size, device=asked.device)
        data.train_tokenizer(asked.texts, asked.size.vocab).save_pretrained(checkpoint)
        for way in options.ways:
            rows += [{**row, **asked.common} for row in measured(way, checkpoint, asked.device, options)]
            source = report.write_csv(asked.stem, rows)
            with atomic_file(asked.stem.with_suffix(".md")) as file:
                file.write_text(markdown(rows, source.name), encoding="utf-8")
            gc.collect()
            if asked.device == "cuda":
                torch.cuda.empty_cache()
    return asked.stem


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("step_profile", __doc__)
    add_model_flags(parser)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="default: all")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--length", default="4x512", help="BATCHxLENGTH (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="profiled steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
