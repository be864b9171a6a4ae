"""QLoRA of Bloom-7B1 at full size with random weights: this project beside bitsandbytes, in one command.

    python -m benchmarks.bloom7b1 --data prompts.csv --out benchmarks/results
    python -m benchmarks.bloom7b1 --model llama-2-7b --data prompts.csv --out benchmarks/results
    python -m benchmarks.bloom7b1 --layers 2 --hidden 64 --heads 4 --vocab 512 --device cpu \\
        --data qlora/assets/prompts.csv --out /tmp/trial

`docs/benchmarks.md` says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import data, report
from .checkpoint import build_checkpoint
from .command import add_model_flags, model_run, parser_of, written
from .jobs import Case, Job
from .processes import Workers
from .providers import DTYPES, add_stacks_flag

PROMPTS = 50
BATCH = 4
EPOCHS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the checkpoint, run every stack, write the results.

    Returns:
        0 when every stack was asked, whether it managed or not; 2 on wrong arguments, or where nothing can be written.
    """
    return written(run, _parser().parse_args(arguments), "jsonl")


def run(options: argparse.Namespace) -> Path:
    """See `main`; returns the results' path without suffix."""
    begin = time.monotonic()
    asked = model_run(options)
    device, texts, common, stem = asked.device, asked.texts, asked.common, asked.stem
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="bloom7b1-") as work:
        checkpoint = options.checkpoint or Path(work) / "checkpoint"
        jobs = _jobs(options, device, checkpoint, Path(work))
        with Workers(jobs) as workers:
            common["checkpoint_bytes"] = build_checkpoint(checkpoint, asked.size, device=device)
            data.train_tokenizer(texts, asked.size.vocab).save_pretrained(checkpoint)
            (Path(work) / "prompts.json").write_text(json.dumps(texts[: options.prompts]), encoding="utf-8")
            print(f"checkpoint: {common['checkpoint_bytes'] / 1e9:.2f} GB after {time.monotonic() - begin:.0f} s")
            for job in jobs:
                left = options.limit - (time.monotonic() - begin)
                outcome = workers.run(job, limit_s=max(0.0, min(options.limit_each, left)))
                new = report.rows_of(job, outcome, common)
                rows += new
                report.write(stem, rows, report.markdown)
                for row in new:
                    _print(row, time.monotonic() - begin)
                if outcome.failure is not None:
                    print(outcome.log_tail, file=sys.stderr, flush=True)
    return stem


def _jobs(options: argparse.Namespace, device: str, checkpoint: Path, work: Path) -> list[Job]:
    precisions = options.precisions or _precisions(device)
    return [
        Job(
            provider=provider,
            precision=precision,
            device=device,
            checkpoint=str(checkpoint),
            prompts=str(work / "prompts.json"),
            record=str(work / f"{number}" / "record.jsonl"),
            yardstick=str(work / f"yardstick-{precision}.safetensors"),
            folder=str(work / f"{number}"),
            cases=_cases(options),
            new_tokens=options.new_tokens,
        )
        for number, (precision, provider) in enumerate((p, q) for p in precisions for q in options.stacks)
    ]


def _cases(options: argparse.Namespace) -> tuple[Case, ...]:
    """The recipe first, since its adapters must start at zero; the largest last, since it may run out of memory."""
    steps = options.epochs * -(-options.prompts // BATCH)
    recipe = (Case(report.RECIPE, BATCH, None, steps, warmup_steps=min(5, steps - 1)),) if steps else ()
    lengths = [tuple(map(int, text.split("x"))) for text in options.lengths]
    fixed = (
        Case(f"{batch}x{length}", batch, length, options.steps + options.warmup, options.warmup)
        for batch, length in sorted(lengths, key=lambda pair: pair[0] * pair[1])
    )
    return (*recipe, *fixed)


def _precisions(device: str) -> tuple[str, ...]:
    if device == "cpu":
        return ("fp32",)
    return ("bf16", "fp16") if torch.cuda.get_device_capability() >= (8, 0) else ("fp16",)


def _print(row: report.Row, elapsed_s: float) -> None:
    speed = row.get("tokens_per_s") or row.get("new_tokens_per_s")
    result = row["reason"] if row["status"] == "failed" else f"{speed:,.0f} tokens/s"
    print(f"{elapsed_s:5.0f} s  {row['stack']} {row['precision']} {row['name']}: {result}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("bloom7b1", __doc__)
    add_model_flags(parser)
    add_stacks_flag(parser)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, help="default: bf16 and fp16, fp32 on the CPU")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="rows of the data (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the recipe; 0: no recipe (default: %(default)s)")
    parser.add_argument("--lengths", nargs="*", default=["1x128", "4x512", "8x512"], help="BATCHxLENGTH, synthetic")
    parser.add_argument("--steps", type=int, default=8, help="measured steps at each fixed length")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--new-tokens", type=int, default=64, help="to generate at the end; 0: none")
    parser.add_argument("--limit", type=float, default=510, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--limit-each", type=float, default=140, help="seconds for one stack (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
