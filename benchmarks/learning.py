"""What a small real model learns with LoRA on its 4-bit and on its 16-bit weights: held-out loss over the steps.

    python -m benchmarks.learning --out benchmarks/results --figure docs/figures/learning.png
    python -m benchmarks.learning --from benchmarks/results/learning-....csv --figure docs/figures/learning.png

SmolLM2-135M on the prompts of fka/awesome-chatgpt-prompts; the same adapters, texts, batches and learning rates, once on
NF4 (double quantization) and once on the weights as they are.  Runs on a CPU, in float32.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from qkernels.errors import UserError
from qlora.arguments import DataArguments
from qlora.checkpoint import atomic_file, check_writable
from qlora.data import TEXT, load_texts
from qlora.demo import MODEL, prepare_model
from qlora.loading import load_pretrained_4bit
from qlora.optimize import optimize_model

from . import data
from .command import add_data_flag, parser_of
from .environment import environment
from .report import Row, file_stem, write_csv

LEARNING_RATE = 1e-3
BATCH = 4
MAX_LENGTH = 256
COLORS = {"4 bits": "#d62728", "16 bits": "#1f77b4"}


def load(weights: str, folder: str, device: str) -> PreTrainedModel:
    """The base model, frozen: its linear layers in NF4, or all of it as the checkpoint has it; computing in float32."""
    if weights == "4 bits":
        return load_pretrained_4bit(folder, dtype=torch.float32, device=device)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def rows_of(weights: str, folder: str, device: str, options: argparse.Namespace) -> Iterator[Row]:
    """Train, and measure the held-out loss before, every `options.every` steps, and at the end."""
    torch.set_num_threads(options.threads)
    texts, held_out = load_texts(
        DataArguments(dataset_name=str(options.data), max_samples=options.texts, eval_samples=options.held_out),
        data.TEXT_COLUMN,
    )
    set_seed(0)
    model = get_peft_model(
        optimize_model(load(weights, folder, device)),
        LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with tempfile.TemporaryDirectory(prefix="learning-") as work:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=work,
                max_steps=options.steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                warmup_steps=5,
                max_length=MAX_LENGTH,
                eval_strategy="steps",
                eval_steps=options.every,
                eval_on_start=True,
                logging_steps=1,
                save_strategy="no",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=device == "cpu",
                dataset_text_field=TEXT,
                report_to=[],
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=texts,
            eval_dataset=held_out,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        for kind, key in (("held out", "eval_loss"), ("training batch", "loss")):
            if key in entry:
                yield {"weights": weights, "step": entry["step"], "kind": kind, "loss": entry[key]}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """The held-out losses, a curve for each kind of weights."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for weights, color in COLORS.items():
        curve = [row for row in rows if row["weights"] == weights and row["kind"] == "held out"]
        steps, losses = [int(row["step"]) for row in curve], [float(row["loss"]) for row in curve]
        axes.plot(steps, losses, "o-", color=color, label=f"LoRA on {weights}: {losses[0]:.3f} to {losses[-1]:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss on held-out prompts (nats a token)")
    axes.set_title(f"{MODEL}: {rows[0]['held_out']} held-out prompts, {rows[0]['texts']} to train on")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120)


def summary(rows: list[dict[str, str]]) -> str:
    """The held-out losses before and after, and how far they are apart."""
    ends: dict[str, tuple[float, float]] = {}
    for weights in COLORS:
        losses = [float(row["loss"]) for row in rows if row["weights"] == weights and row["kind"] == "held out"]
        ends[weights] = losses[0], losses[-1]
    (before, after), (before16, after16) = ends["4 bits"], ends["16 bits"]
    return (
        f"held-out loss: 4 bits {before:.4f} -> {after:.4f}, 16 bits {before16:.4f} -> {after16:.4f}; "
        f"at the end 4 bits is {after / after16 - 1:+.2%}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Train both, write the CSV, draw; or draw from a CSV.

    Returns:
        0, or 2 on wrong arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        path = options.source or measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    print(summary(rows))
    if options.figure is not None:
        draw(rows, options.figure)
        print(f"written: {options.figure}")
    return 0


def measure(options: argparse.Namespace) -> Path:
    """The CSV of both runs."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data.read_prompts(options.data)
    check_writable(options.out)
    common: dict[str, Any] = {
        "model": MODEL,
        **{name: getattr(options, name) for name in ("texts", "held_out", "steps")},
        **environment(device, commit=options.commit),
    }
    stem = file_stem(options.out, "learning", str(common["gpu"] or "cpu"), str(common["date"]), ".csv")
    folder = str(prepare_model())
    rows = []
    for weights in COLORS:
        began = time.monotonic()
        rows += [{**row, **common} for row in rows_of(weights, folder, device, options)]
        print(f"{weights}: {time.monotonic() - began:.0f} s", flush=True)
    path = write_csv(stem, rows)
    print(f"written: {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("learning", __doc__)
    parser.add_argument("--figure", type=Path, help="draw the curves here")
    parser.add_argument("--from", dest="source", type=Path, help="draw from this CSV, and measure nothing")
    add_data_flag(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--texts", type=int, default=120, help="prompts to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=24, help="prompts to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of 4 prompts (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
