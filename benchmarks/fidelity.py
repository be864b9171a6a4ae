"""Training step by step beside peft on bitsandbytes: the same weights, adapters and batches, so the same losses.

    python -m benchmarks.fidelity --data prompts.csv --out benchmarks/results

Bloom and Llama of a few layers with random weights, on the tutorial's prompts, in float16 with a loss scale and in
bfloat16.  docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qkernels.errors import UserError
from qlora.checkpoint import check_writable
from qlora.integrations.transformers import dequantize_model
from qlora.loading import load_pretrained_4bit, prepare_model_for_training
from qlora.optimize import optimize_model

from . import data, report
from .checkpoint import ModelSize, bloom_config
from .command import add_data_flag, environment_of, parser_of
from .providers import DTYPES, LEARNING_RATE, PROVIDERS

YARDSTICK = "peft + bitsandbytes"
LOSS_TOLERANCE = 1e-3
# The rule of flash-attention's tests: at most twice the rival's own error.
GRADIENT_FACTOR = 2.0
BATCH, MAX_LENGTH = 4, 128
DIFFERS, NOT_FINITE = "differs", "a loss is not finite"


@dataclass(frozen=True)
class Size:
    """Attributes: of the small models."""

    layers: int
    hidden: int
    heads: int


def save_models(folder: Path, size: Size, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """A Bloom and a Llama with random 16-bit weights; returns their folders by name."""
    vocabulary = len(tokenizer)
    llama = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        dtype=torch.float16,
    )
    torch.manual_seed(0)
    models = {
        "bloom": BloomForCausalLM(bloom_config(ModelSize(size.layers, size.hidden, size.heads, vocabulary))),
        "llama": LlamaForCausalLM(llama),
    }
    for name, model in models.items():
        model.half().save_pretrained(folder / name)
    return {name: folder / name for name in models}


def batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int, device: str) -> list[dict[str, Tensor]]:
    """So many batches of the texts in their order, again and again, padded to the longest of a batch."""
    rows = [ids[:MAX_LENGTH] for ids in data.prompt_dataset(tokenizer, texts)["input_ids"]]
    found = []
    for number in range(count):
        chosen = [rows[(number * BATCH + row) % len(rows)] for row in range(BATCH)]
        batch = tokenizer.pad({"input_ids": chosen}, return_tensors="pt").to(device)
        found.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    return found


def _plain(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return load_pretrained_4bit(folder, dtype=dtype, device=device)


def _optimized(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return prepare_model_for_training(optimize_model(_plain(folder, dtype, device)))


def _bitsandbytes(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return PROVIDERS["trl+peft+bitsandbytes"].load(str(folder), dtype, device)


def _truth(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model as it is in `dtype`, quantized weights and the others, computing in float32."""
    return dequantize_model(_plain(folder, dtype, device), torch.float32).float()


Load = Callable[[Path, torch.dtype, str], PreTrainedModel]
STACKS: dict[str, Load] = {YARDSTICK: _bitsandbytes, "qlora": _plain, "qlora, optimized": _optimized}


def adapted(model: PreTrainedModel, state: dict[str, Tensor] | None) -> PeftModel:
    """The model with adapters on all linear layers, A and B random, or as `state` has them."""
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
    )
    tuned = get_peft_model(model, config)
    if state is not None:
        set_peft_model_state_dict(tuned, state)
    return tuned.train()


class Steps:
    """A training loop of the plainest kind: autocast, a loss scale in float16, AdamW.

    Attributes:
        losses: of the steps.
        skipped: steps that the loss scale left out.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype, device: str) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.losses: list[float] = []
        self.skipped = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**batch, use_cache=False).loss

    def __call__(self, batch: dict[str, Tensor]) -> None:
        loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def gradients(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of A and B, without a step."""
        scale = self.scaler.get_scale() if self.dtype == torch.float16 else 1.0
        (self.loss(batch) * scale).backward()
        found = {
            name: parameter.grad.double() / scale
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        self.optimizer.zero_grad()
        return found


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error (of norms) over the layers, for A and for B."""
    worst = {"A": 0.0, "B": 0.0}
    for name, gradient in truth.items():
        part = "A" if "lora_A" in name else "B"
        worst[part] = max(worst[part], ((found[name] - gradient).norm() / gradient.norm()).item())
    return worst


def compare(folder: Path, precision: str, device: str, work: list[dict[str, Tensor]]) -> list[report.Row]:
    """A row a stack: its losses, how far from the yardstick's and from float32's; its gradients' errors at first."""
    dtype = DTYPES[precision]
    exact = Steps(adapted(_truth(folder, dtype, device), None), torch.float32, device)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(exact.model).items()}
    truth = exact.gradients(work[0])
    for batch in work:
        exact(batch)
    rows: list[report.Row] = []
    for stack, load in STACKS.items():
        steps = Steps(adapted(load(folder, dtype, device), state), dtype, device)
        errors = relative_errors(steps.gradients(work[0]), truth)
        for batch in work:
            steps(batch)
        yardstick = rows[0]["losses"] if rows else steps.losses
        row: report.Row = {
            "stack": stack,
            "precision": precision,
            "steps": len(work),
            "first_loss": steps.losses[0],
            "last_loss": steps.losses[-1],
            "largest_loss_difference": _apart(steps.losses, yardstick),
            "relative_difference": max(abs(a / b - 1) for a, b in zip(steps.losses, yardstick, strict=True)),
            "largest_loss_error": _apart(steps.losses, exact.losses),
            **{f"grad_{part}_error": error for part, error in errors.items()},
            "skipped_steps": steps.skipped,
        }
        row["verdict"] = verdict(row, rows[0] if rows else row)
        rows.append({**row, "losses": steps.losses, "float32_losses": exact.losses})
    return rows


def _apart(losses: list[float], others: list[float]) -> float:
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


def verdict(row: report.Row, yardstick: report.Row) -> str:
    """Of a row of `compare`: "same", "differs", or "nearer to float32" than a yardstick not within the tolerance.

    bfloat16 has 8 bits, and a loss of 12 is not known to 1e-3 in it: two right computations may differ by what each is
    wrong by.
    """
    if any(row[key] > GRADIENT_FACTOR * yardstick[key] for key in ("grad_A_error", "grad_B_error")):
        return DIFFERS
    if row["largest_loss_difference"] <= LOSS_TOLERANCE:
        return "same"
    return "nearer to float32" if row["largest_loss_error"] <= yardstick["largest_loss_error"] else DIFFERS


def stability(folder: Path, device: str, work: list[dict[str, Tensor]], count: int) -> report.Row:
    """Many float16 steps (float32 on a CPU): whether every loss is finite, and what the loss scale did."""
    precision = "fp16" if device == "cuda" else "fp32"
    dtype = DTYPES[precision]
    steps = Steps(adapted(_optimized(folder, dtype, device), None), dtype, device)
    for number in range(count):
        steps(work[number % len(work)])
    finite = all(map(math.isfinite, steps.losses))
    return {
        "stack": "qlora, optimized",
        "precision": precision,
        "steps": count,
        "first_loss": steps.losses[0],
        "last_loss": steps.losses[-1],
        "skipped_steps": steps.skipped,
        "last_loss_scale": steps.scaler.get_scale(),
        "verdict": "finite" if finite else NOT_FINITE,
        "losses": steps.losses,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write the record.

    Returns:
        0 where all agree, 1 where not, 2 on wrong arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        rows = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(row["verdict"] in (DIFFERS, NOT_FINITE) for row in rows) else 0


def run(options: argparse.Namespace) -> list[report.Row]:
    """See `main`."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    texts = data.read_prompts(options.data)
    check_writable(options.out)
    size = Size(options.layers, options.hidden, options.heads)
    common: dict[str, Any] = {**environment_of(options, device), **vars(size)}
    stem = report.file_stem(options.out, "fidelity", str(common["gpu"] or "cpu"), str(common["date"]))
    tokenizer = data.train_tokenizer(texts, data.TOKENIZER_VOCABULARY)
    work = batches(tokenizer, texts[: options.prompts], options.steps, device)
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix="fidelity-") as scratch:
        for family, folder in save_models(Path(scratch), size, tokenizer).items():
            for precision in ("fp16", "bf16") if device == "cuda" else ("fp32",):
                rows += [{**common, "family": family, **row} for row in compare(folder, precision, device, work)]
            rows.append({**common, "family": family, **stability(folder, device, work, options.stability)})
    for row in rows:
        print(json.dumps({key: row[key] for key in _SHOWN if key in row}), flush=True)
    report.write(stem, rows, markdown)
    print(f"written: {stem}.md and .jsonl")
    return rows


_SHOWN = (
    *("family", "precision", "stack", "steps", "first_loss", "last_loss"),
    *("largest_loss_difference", "relative_difference", "largest_loss_error", "grad_A_error", "grad_B_error"),
    *("skipped_steps", "last_loss_scale", "verdict"),
)


def markdown(rows: list[report.Row], source: str) -> str:
    """The page made from the rows."""
    first = rows[0]
    return (
        f"# Step by step beside {YARDSTICK} on {first['gpu'] or first['processor']}\n\n"
        f"Made by `python -m benchmarks.fidelity` from `{source}`, which has every loss; commit {first['commit']}, "
        f"{first['date']}, torch {first['torch']}, bitsandbytes {first['bitsandbytes']}, peft {first['peft']}.\n\n"
        f"{report.plain_table(_SHOWN, rows)}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("fidelity", __doc__)
    add_data_flag(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=50, help="rows of the data (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="compared with each other (default: %(default)s)")
    parser.add_argument("--stability", type=int, default=500, help="float16 steps (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
