"""`qlora plan` beside what is measured, on full-size Bloom-7B1: peak memory and step time of several ways to train.

    python -m benchmarks.plan_check --data prompts.csv --out benchmarks/results

The record is what tests/test_memory.py holds the plan to; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora.arguments import LoraArguments
from qlora.gpus import find_gpu
from qlora.loading import load_pretrained_4bit
from qlora.memory import PARTS, Run, plan
from qlora.optimize import optimize_model
from qlora.roofline import step_time
from qlora.shapes import meta_model, shapes_of

from . import data, report
from .checkpoint import build_checkpoint
from .command import add_model_flags, model_run, parser_of, written
from .providers import DTYPES, PROVIDERS, lora_targets, training_arguments
from .steps import StepClock

# BATCHxLENGTH, what is recomputed, blocks that keep everything, CUDA graphs, and what is kept in host memory.
CASES = (
    ("1x128", "block", 0, True, False),
    ("4x128", "block", 0, True, False),
    ("4x512", "block", 0, True, False),
    ("8x512", "block", 0, True, False),
    ("4x512", "parts", 0, True, False),
    ("4x512", "block", 10, True, False),
    ("4x512", "nothing", 0, True, False),
    ("1x128", "block", 0, False, False),
    ("4x512", "block", 0, False, False),
    ("4x512", "nothing", 0, False, False),
    ("4x512", "block", 0, False, True),
)
# With the embedding and the output layer in 4 bits as well.
CASES_WITH_EMBEDDINGS = (
    ("1x128", "block", 0, True, False),
    ("4x512", "block", 0, True, False),
    ("4x512", "block", 0, False, False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each case and write the record.

    Returns:
        0, or 2 on wrong arguments.
    """
    return written(run, _parser().parse_args(arguments), "jsonl")


def run(options: argparse.Namespace) -> Path:
    """See `main`; returns the results' path without suffix."""
    asked = model_run(options, "plan-")
    device, size, common, stem = asked.device, asked.size, asked.common, asked.stem
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="plan-check-") as work:
        checkpoint = options.checkpoint or Path(work) / "checkpoint"
        build_checkpoint(checkpoint, size, device=device)
        data.train_tokenizer(asked.texts, size.vocab).save_pretrained(checkpoint)
        for embeddings, cases in ((False, CASES), (True, CASES_WITH_EMBEDDINGS)):
            for row in _rows(cases, embeddings, checkpoint, device, work, options):
                rows.append({**common, **row})
                report.write(stem, rows, markdown)
                print(json.dumps({key: row[key] for key in _SHOWN if key in row}), flush=True)
    return stem


def _rows(
    cases: Sequence[tuple[str, str, int, bool, bool]],
    embeddings: bool,
    checkpoint: Path,
    device: str,
    work: str,
    options: argparse.Namespace,
) -> Iterator[report.Row]:
    """The cases on one model, whose embedding and output layer are in 4 bits or not."""
    provider = PROVIDERS["qlora"]
    precision = "fp32" if device == "cpu" else options.precision
    dtype = DTYPES[precision]
    base = load_pretrained_4bit(checkpoint, dtype=dtype, device=device, quantize_embeddings=embeddings)
    model = provider.adapt(optimize_model(base))
    shapes = shapes_of(
        meta_model(str(checkpoint)), LoraArguments(lora_target_modules=lora_targets(base.config.model_type))
    )
    for size_name, recompute, kept, graphs, offload in cases:
        batch, length = map(int, size_name.split("x"))
        kept = min(kept, shapes.layers)
        optimize_model(base, recompute=recompute, kept_blocks=kept, graphs=graphs, offload=offload)
        capability = find_gpu(None).capability
        wanted = Run(
            batch,
            length,
            dtype,
            recompute,
            kept,
            graphs,
            quantize_embeddings=embeddings,
            offload=offload,
            capability=capability,
        )
        arguments = training_arguments(precision, device) | {
            "output_dir": work,
            "per_device_train_batch_size": batch,
            "max_steps": options.warmup + options.steps,
        }
        dataset = data.synthetic_dataset(batch * arguments["max_steps"], length, shapes.vocabulary)
        trainer = provider.trainer(model, AutoTokenizer.from_pretrained(checkpoint), dataset, arguments)
        row = {"precision": precision, **_measured(trainer, device, options.warmup)}
        yield row | _compared(row, shapes, wanted)


def _measured(trainer: Any, device: str, warmup: int) -> report.Row:
    gc.collect()  # the case before, its optimizer above all
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock(device)
    trainer.add_callback(clock)
    trainer.train()
    return {"step_s": statistics.median(clock.step_s[warmup:]), **clock.peaks_gib()}


def _compared(row: report.Row, shapes: Any, run: Run) -> report.Row:
    predicted = plan(shapes, run)
    fields = {
        "batch": run.batch_size,
        "length": run.length,
        "recompute": run.recompute,
        "kept_blocks": run.kept_blocks,
        "graphs": run.by_graphs,
        "offload": run.offload,
        "quantize_embeddings": run.quantize_embeddings,
        "predicted_allocated_gib": predicted.allocated / 2**30,
        "predicted_parts_gib": {part: getattr(predicted, part) / 2**30 for part in PARTS},
    }
    if "gpu_peak_allocated_gib" in row:
        fields["memory_error"] = fields["predicted_allocated_gib"] / row["gpu_peak_allocated_gib"] - 1
    time = step_time(shapes, run, find_gpu(None))
    if time is not None:
        fields["predicted_step_s"] = time.total
        fields["predicted_step_parts_s"] = asdict(time)
    return fields


_SHOWN = (
    *("batch", "length", "recompute", "kept_blocks", "graphs", "offload", "quantize_embeddings"),
    *("gpu_peak_allocated_gib", "predicted_allocated_gib", "memory_error", "gpu_peak_reserved_gib"),
    *("step_s", "predicted_step_s"),
)


def markdown(rows: list[report.Row], source: str) -> str:
    """The page made from the rows."""
    first = rows[0]
    return (
        f"# {first['model']}: `qlora plan` beside what was measured on {first['gpu'] or first['processor']}\n\n"
        f"Made by `python -m benchmarks.plan_check` from `{source}`, commit {first['commit']}, {first['date']}, "
        f"torch {first['torch']}, {first['precision']}.\n\n"
        f"{report.plain_table(_SHOWN, rows)}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("plan_check", __doc__)
    add_model_flags(parser)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--steps", type=int, default=4, help="measured steps a case")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them: two, and one that captures graphs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
