"""What a small real model learns with LoRA on its 4-bit and on its 16-bit weights: held-out loss over the steps.

    python -m benchmarks.learning --out benchmarks/results --figure docs/figures/learning.png
    python -m benchmarks.learning --from benchmarks/results/learning-....csv --out . --figure docs/figures/learning.png

SmolLM2-135M on the prompts of fka/awesome-chatgpt-prompts; the same adapters, texts, batches and learning rates, on the
weights as they are and on NF4 (double quantization): from adapters that begin at zero, from adapters that begin with
QERA's part of the quantization error, and with the embedding, which is the output layer too, in 4 bits as well.  In
float32; a CPU will do, and is faster with `--decode-once`: the 4-bit weights are decoded before the first step and not
at every product, which gives the same losses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from qkernels.errors import UserError
from qlora.arguments import DataArguments
from qlora.checkpoint import atomic_file, check_writable
from qlora.data import TEXT, load_texts
from qlora.demo import MODEL, prepare_model
from qlora.integrations.peft_init import initialize_from_float
from qlora.integrations.transformers import dequantize_model
from qlora.loading import load_pretrained_4bit
from qlora.optimize import optimize_model

from . import data
from .command import add_data_flag, parser_of
from .environment import environment
from .plotting import picture, source_of
from .report import Row, file_stem, read_csv, write_csv

LEARNING_RATE = 1e-3
BATCH = 4
MAX_LENGTH = 256
MEASURED_ON = 40  # of the texts to train on, for QERA
PLAIN, ZERO, QERA, EMBEDDINGS = "16 bits", "4 bits", "4 bits, QERA", "4 bits, embedding too"
COLORS = {PLAIN: "#1f77b4", ZERO: "#d62728", QERA: "#2ca02c", EMBEDDINGS: "#ff7f0e"}


def load(weights: str, folder: str, device: str) -> PreTrainedModel:
    """The base model, frozen: its linear layers in NF4, or all of it as the checkpoint has it; computing in float32."""
    if weights == PLAIN:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return load_pretrained_4bit(folder, dtype=torch.float32, device=device, quantize_embeddings=weights == EMBEDDINGS)


def adapted(model: PreTrainedModel, weights: str, folder: str, texts: list[str], options: Any) -> PeftModel:
    """The model with adapters on all linear layers, which begin at zero but for `QERA`."""
    rank: int = options.rank
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(optimize_model(model), config)
    if weights == QERA:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = [tokenizer(text, return_tensors="pt", max_length=MAX_LENGTH, truncation=True) for text in texts]
        report = initialize_from_float(model, folder, "qera_niter_8", inputs=inputs)
        print(f"error of the layers' outputs: {report.before:.4f} -> {report.after:.4f}", flush=True)
    return dequantize_model(model) if options.decode_once else model


def rows_of(weights: str, folder: str, device: str, options: argparse.Namespace) -> Iterator[Row]:
    """Train, and measure the held-out loss before, every `options.every` steps, and at the end."""
    torch.set_num_threads(options.threads)
    texts, held_out = load_texts(
        DataArguments(dataset_name=str(options.data), max_samples=options.texts, eval_samples=options.held_out),
        data.TEXT_COLUMN,
    )
    set_seed(0)
    model = adapted(load(weights, folder, device), weights, folder, texts[TEXT][:MEASURED_ON], options)
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


def curves(rows: list[Row]) -> Figure:
    """The held-out losses, a curve for each kind of weights."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for weights in held_out(rows):
        color = COLORS[weights]
        steps, losses = held_out(rows)[weights]
        axes.plot(steps, losses, "o-", color=color, label=f"LoRA on {weights}: {losses[0]:.3f} to {losses[-1]:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss on held-out prompts (nats a token)")
    axes.set_title(f"{MODEL}: {rows[0]['held_out']} held-out prompts, {rows[0]['texts']} to train on")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def held_out(rows: list[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and held-out losses of each kind of weights in the record."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["kind"] == "held out":
            steps, losses = found.setdefault(str(row["weights"]), ([], []))
            steps.append(int(row["step"]))
            losses.append(float(row["loss"]))
    return found


def summary(rows: list[Row]) -> str:
    """The held-out losses before, at their least and at the end, and how far each is from that on 16 bits."""
    ends = {weights: (losses[0], min(losses), losses[-1]) for weights, (_, losses) in held_out(rows).items()}
    lines = ["held-out loss          before            least            at the end"]
    for weights, losses in ends.items():
        apart = [loss / plain - 1 for loss, plain in zip(losses, ends.get(PLAIN, losses), strict=True)]
        cells = [f"{loss:.4f} ({share:+.2%})" for loss, share in zip(losses, apart, strict=True)]
        lines.append(f"{weights:22} " + "  ".join(cells))
    return "\n".join(lines)


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
    rows = read_csv(path)
    print(summary(rows))
    if options.figure is not None:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.figure) as partial:
            partial.write_bytes(picture(lambda: curves(rows), source_of(path, rows)))
        print(f"written: {options.figure}")
    return 0


def measure(options: argparse.Namespace) -> Path:
    """The CSV of both runs."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data.read_prompts(options.data)
    check_writable(options.out)
    common: dict[str, Any] = {
        "model": MODEL,
        **{name: getattr(options, name) for name in ("texts", "held_out", "steps", "rank", "decode_once")},
        **environment(device, commit=options.commit),
    }
    stem = file_stem(options.out, "learning", str(common["gpu"] or "cpu"), str(common["date"]), ".csv")
    folder = str(prepare_model())
    rows = []
    for weights in options.weights:
        began = time.monotonic()
        rows += [{**row, **common} for row in rows_of(weights, folder, device, options)]
        path = write_csv(stem, rows)  # after each, so that an interrupted run keeps what it has measured
        print(f"{weights}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"written: {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("learning", __doc__)
    parser.add_argument("--figure", type=Path, help="draw the curves here")
    parser.add_argument("--from", dest="source", type=Path, help="draw from this CSV, and measure nothing")
    add_data_flag(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--weights", nargs="+", choices=COLORS, default=list(COLORS), metavar="WEIGHTS", help="which")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=130, help="prompts to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=24, help="prompts to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of 4 prompts (default: %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements (default: %(default)s)")
    parser.add_argument("--decode-once", action="store_true", help="keep the decoded weights; the same losses")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
