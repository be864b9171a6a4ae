"""The tutorial's recipe on full-size Bloom-7B1 within a T4's limits, on whatever GPU is there; see docs/benchmarks.md.

    python -m benchmarks.t4_recipe --data prompts.csv --out benchmarks/results

torch's allocator ends at 14.0 GiB, the process's own host memory must stay under 10 GiB, the precision is a T4's
(float16 with a loss scale), and what Python chooses by compute capability is chosen for 7.5.  `qlora plan` predicts
the peak first.  What this does not show is a T4's speed: that is predicted only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qkernels.errors import UserError
from qlora.arguments import LoraArguments
from qlora.gpus import GPUS, find_gpu
from qlora.markdown import markdown_table
from qlora.memory import PARTS, Run, plan
from qlora.precision import choose_precision
from qlora.roofline import step_time
from qlora.shapes import meta_model, shapes_of

from . import data, report
from .bloom7b1 import BATCH, EPOCHS, PROMPTS
from .checkpoint import build_checkpoint
from .command import add_model_flags, model_run, parser_of
from .jobs import Case, Job
from .processes import run_job
from .providers import MAX_LENGTH, lora_targets

T4 = GPUS["t4"]
GPU_LIMIT_GIB = 14.0
HOST_LIMIT_GIB = 10.0
PLAN_TOLERANCE = 0.05
LIMIT_S = 240


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe and write the record.

    Returns:
        0 where it finished within its limits, 1 where it did not, 2 on wrong arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        stem, row = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{stem.with_suffix('.md').read_text(encoding='utf-8')}\nwritten: {stem}.md and .jsonl")
    return 0 if row["verdict"] == "passed" else 1


def run(options: argparse.Namespace) -> tuple[Path, report.Row]:
    """See `main`; returns the results' path without suffix, and the row."""
    asked = model_run(options, "t4-recipe-")
    device, size, texts, common, stem = asked.device, asked.size, asked.texts, asked.common, asked.stem
    with tempfile.TemporaryDirectory(prefix="t4-recipe-") as work:
        checkpoint = options.checkpoint or Path(work) / "checkpoint"
        common["checkpoint_bytes"] = build_checkpoint(checkpoint, size, device=device)
        tokenizer = data.train_tokenizer(texts, size.vocab)
        tokenizer.save_pretrained(checkpoint)
        prompts = Path(work) / "prompts.json"
        prompts.write_text(json.dumps(texts[: options.prompts]), encoding="utf-8")
        predicted = prediction(checkpoint, size.family, tokenizer, texts[: options.prompts])
        job = _job(options, device, checkpoint, Path(work), prompts)
        outcome = run_job(job, limit_s=LIMIT_S)
    row = report.rows_of(job, outcome, common | predicted)[-1]
    if outcome.failure is not None:
        print(outcome.log_tail, file=sys.stderr)
    row |= judged(row)
    report.write(stem, [row], markdown)
    return stem, row


def prediction(checkpoint: Path, family: str, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> report.Row:
    """What `qlora plan` says of the recipe, before it runs: the peak for the longest batch, a T4's time for a mean one.

    A batch is as long as its longest text; batches are drawn anew each epoch, so the longest text meets the longest.
    """
    lengths = sorted(min(len(row["input_ids"]), MAX_LENGTH) for row in data.prompt_dataset(tokenizer, texts))
    policy = choose_precision(capability=T4.capability)
    longest = Run(BATCH, lengths[-1], policy.dtype, graphs=False, capability=_capability())  # a T4 has none
    shapes = shapes_of(meta_model(str(checkpoint)), LoraArguments(lora_target_modules=lora_targets(family)))
    peak = plan(shapes, longest)
    mean = replace(longest, length=sum(lengths[BATCH - 1 :: BATCH]) // len(lengths[BATCH - 1 :: BATCH]))
    time = step_time(shapes, mean, T4)
    assert time is not None
    return {
        "longest_tokens": lengths[-1],
        "predicted_allocated_gib": peak.allocated / 2**30,
        "predicted_total_gib": peak.total / 2**30,
        "predicted_parts_gib": {part: getattr(peak, part) / 2**30 for part in PARTS},
        "predicted_t4_step_s": time.total,
        "predicted_t4_recipe_s": time.total * EPOCHS * -(-len(texts) // BATCH),
    }


def judged(row: report.Row) -> report.Row:
    """Whether the recipe finished within its limits, and why not; and how near the plan was."""
    problems = [] if row["status"] == "ok" else [f"it failed in {row['name']}: {row['reason']}"]
    host = max((row[key] for key in ("load_host_peak_gib", "host_peak_gib") if row.get(key)), default=0.0)
    if host > HOST_LIMIT_GIB:
        problems.append(f"host memory reached {host:.2f} GiB, more than {HOST_LIMIT_GIB}")
    reserved = row.get("gpu_peak_reserved_gib")
    if reserved is not None and reserved > GPU_LIMIT_GIB:
        problems.append(f"the allocator took {reserved:.2f} GiB, more than {GPU_LIMIT_GIB}")
    measured = row.get("gpu_peak_allocated_gib")
    error = None if measured is None else row["predicted_allocated_gib"] / measured - 1
    if error is not None and abs(error) > PLAN_TOLERANCE:
        problems.append(f"the plan was {error:+.1%} off, more than {PLAN_TOLERANCE:.0%}")
    finite = all(loss == loss and abs(loss) != float("inf") for loss in row.get("losses", []))
    if not finite:
        problems.append("a loss is not finite")
    return {
        "gpu_limit_gib": GPU_LIMIT_GIB,
        "host_limit_gib": HOST_LIMIT_GIB,
        "host_highest_gib": host,
        "plan_error": error,
        "verdict": "; ".join(problems) or "passed",
    }


_LINES: list[tuple[str, str, str]] = [
    ("verdict", "verdict", "{}"),
    ("commit", "commit", "{}"),
    ("date", "date", "{}"),
    ("GPU that ran it", "gpu", "{}"),
    ("torch", "torch", "{}"),
    ("precision", "precision", "{}"),
    ("steps of batch 4", "steps", "{}"),
    ("all steps, s", "train_s", "{:.1f}"),
    ("loss, first step", "first_loss", "{:.3f}"),
    ("loss, last step", "final_loss", "{:.3f}"),
    ("loading, s", "load_seconds", "{:.1f}"),
    ("GPU peak while loading, GiB", "load_gpu_peak_allocated_gib", "{:.2f}"),
    ("GPU peak in training, allocated, GiB", "gpu_peak_allocated_gib", "{:.2f}"),
    ("  predicted by `qlora plan`", "predicted_allocated_gib", "{:.2f}"),
    ("  off by", "plan_error", "{:+.1%}"),
    ("GPU peak in training, reserved, GiB", "gpu_peak_reserved_gib", "{:.2f}"),
    ("  limit of the allocator", "gpu_limit_gib", "{:.1f}"),
    ("host memory (RssAnon), highest, GiB", "host_highest_gib", "{:.2f}"),
    ("  limit", "host_limit_gib", "{:.1f}"),
    ("predicted for a T4: a step, s", "predicted_t4_step_s", "{:.2f}"),
    ("predicted for a T4: the recipe, s", "predicted_t4_recipe_s", "{:.0f}"),
]


def markdown(rows: list[report.Row], source: str) -> str:
    """The page made from the one row."""
    (row,) = rows
    shown = [(label, form.format(row[key])) for label, key, form in _LINES if row.get(key) is not None]
    table = markdown_table(["", ""], shown)
    return (
        f"# {row['model']}: the tutorial's recipe within a T4's limits\n\n"
        f"Made by `python -m benchmarks.t4_recipe` from `{source}`, which has more. A GPU that is no T4 ran it: memory "
        f"is a T4's, time is not.\n\n{table}\n"
    )


def _job(options: argparse.Namespace, device: str, checkpoint: Path, work: Path, prompts: Path) -> Job:
    steps = EPOCHS * -(-options.prompts // BATCH)
    return Job(
        provider="qlora",
        precision="fp16" if device == "cuda" else "fp32",
        device=device,
        checkpoint=str(checkpoint),
        prompts=str(prompts),
        record=str(work / "run" / "record.jsonl"),
        yardstick=str(work / "yardstick.safetensors"),
        folder=str(work / "run"),
        cases=(Case(report.RECIPE, BATCH, None, steps, warmup_steps=min(5, steps - 1)),),
        gpu_limit_gib=GPU_LIMIT_GIB,
        capability=T4.capability,
    )


def _capability() -> tuple[int, int]:
    """Of the GPU that runs it: cuBLAS' workspaces are its own, whatever Python is told."""
    return find_gpu(None).capability


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("t4_recipe", __doc__)
    add_model_flags(parser)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="rows of the data (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
