"""What `benchmarks.learning` trains: a small real model with adapters, on one kind of weights, the texts in one order.

Room: weights, texts and the training loop; a loop of the plainest kind, the same for all weights, so that nothing but
the weights differs.  Nothing waits for the GPU but the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from qlora.calibration import calibrate_from_float
from qlora.integrations.peft_init import initialize_from_float
from qlora.integrations.transformers import dequantize_model
from qlora.loading import load_pretrained_4bit

from . import data
from .report import Row

BATCH, MEASURED_AT_ONCE = 4, 8
MAX_LENGTH = 256
WARMUP_STEPS = 5
PLAIN, RIVAL, ZERO, QERA = "16 bits", "4 bits, bitsandbytes and peft", "4 bits", "4 bits, QERA"
CALIBRATED, BOTH = "4 bits, calibrated", "4 bits, calibrated, QERA"
EMBEDDINGS = "4 bits, embedding too"
PREPARED = (BOTH, CALIBRATED, QERA)
WEIGHTS = (PLAIN, RIVAL, ZERO, QERA, CALIBRATED, BOTH, EMBEDDINGS)
BASE, START = "base", "start.safetensors"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Token ids, a list a prompt.

    Attributes:
        train: what adapters, calibration and QERA's start see.
        choose: where the learning rate is chosen.
        test: which nothing is chosen on.
        padding: the id that fills up a batch.
    """

    train: list[list[int]]
    choose: list[list[int]]
    test: list[list[int]]
    padding: int


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        weights: of `WEIGHTS`.
        seed: of the adapters' start and of the order of the texts.
        learning_rate: of AdamW, after a warmup; it falls to zero in a straight line.
        folder: of the float model.
        prepared: of what `prepare` writes for these weights; None where they need nothing of it.
        device: "cuda" or "cpu".
        steps, every, rank: steps; steps between two measurements; rank and alpha of the adapters.
        decode_once: the 4-bit weights are decoded before the first step.
        threads: of the CPU.
    """

    weights: str
    seed: int
    learning_rate: float
    folder: str
    prepared: Path | None
    device: str
    steps: int
    every: int
    rank: int
    decode_once: bool
    threads: int


def read_texts(path: Path, folder: str, train: range, choose: range) -> Texts:
    """The prompts of the data set: those of two ranges of its rows, and all others to test on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [ids[:MAX_LENGTH] for ids in data.prompt_dataset(tokenizer, data.read_prompts(path))["input_ids"]]
    test = [row for number, row in enumerate(rows) if number not in train and number not in choose]
    return Texts([rows[n] for n in train], [rows[n] for n in choose], test, tokenizer.eos_token_id)


def load(weights: str, folder: str | Path, device: str) -> PreTrainedModel:
    """The base model computing in float32: its linear layers in NF4, or all of it as the checkpoint has it.

    As transformers has it, without `optimize_model`, which bitsandbytes' layers could not share.
    """
    if weights == RIVAL:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.float32, device_map={"": device}
        )
    if weights == PLAIN:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device})
    return load_pretrained_4bit(folder, dtype=torch.float32, device=device, quantize_embeddings=weights == EMBEDDINGS)


def adapted(model: PreTrainedModel, rank: int) -> PeftModel:
    """The model with adapters on all linear layers, which begin at zero."""
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def prepare(case: Case, texts: Texts) -> list[Row]:
    """Write the calibrated base weights, the adapters' start or both into `case.prepared`; no rows."""
    weights, to = case.weights, case.prepared
    assert to is not None
    _begin(case, "highest")
    inputs = [batch_of(rows, texts.padding, case.device) for rows in in_parts(texts.train, MEASURED_AT_ONCE)]
    for batch in inputs:
        del batch["labels"]
    model = load(weights, case.folder, case.device)
    if weights != QERA:
        rank = case.rank if weights == BOTH else 0
        print(f"{weights}: {calibrate_from_float(model, case.folder, inputs, rank=rank)}", flush=True)
        model.save_pretrained(to / BASE)
    if weights != CALIBRATED:
        tuned = adapted(model, case.rank)
        print(f"{weights}: {initialize_from_float(tuned, case.folder, 'qera_niter_4', inputs=inputs)}", flush=True)
        to.mkdir(exist_ok=True)
        state = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        save_file({name: tensor.cpu() for name, tensor in state.items()}, to / START)
    return []


def _begin(case: Case, precision: str) -> None:
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        torch.set_float32_matmul_precision(precision)
    set_seed(case.seed)


def in_parts(rows: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    """At most `size` rows at a time, the short ones first."""
    ordered = sorted(rows, key=len)
    return (ordered[begin : begin + size] for begin in range(0, len(ordered), size))


def started(case: Case) -> PeftModel:
    """The model of a case, ready to train."""
    base = case.folder if case.prepared is None or not (case.prepared / BASE).is_dir() else case.prepared / BASE
    model = load(case.weights, base, case.device)
    set_seed(case.seed)
    tuned = adapted(model, case.rank)
    if case.prepared is not None and (case.prepared / START).is_file():
        set_peft_model_state_dict(tuned, load_file(case.prepared / START, device=case.device))
    return dequantize_model(tuned) if case.decode_once else tuned


def batch_of(rows: Sequence[list[int]], padding: int, device: str) -> Batch:
    """Texts as `input_ids`, `attention_mask` and `labels`, filled up to a multiple of 64 tokens."""
    length = -(-max(map(len, rows)) // 64) * 64
    ids = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    return {
        name: tensor.to(device) for name, tensor in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def training_batches(texts: Texts, case: Case) -> Iterator[Batch]:
    """`BATCH` texts for each step: epoch after epoch in another order, which the seed decides."""
    generator = torch.Generator().manual_seed(case.seed)
    order: list[int] = []
    for _ in range(case.steps):
        while len(order) < BATCH:
            order += torch.randperm(len(texts.train), generator=generator).tolist()
        yield batch_of([texts.train[n] for n in order[:BATCH]], texts.padding, case.device)
        order = order[BATCH:]


@torch.no_grad()
def losses_of(model: PeftModel, rows: Sequence[list[int]], padding: int, device: str) -> list[float]:
    """The loss of each text, in nats, summed over its tokens but the first.

    In training mode: nothing here drops anything, and bitsandbytes' layers on a CPU do not come back from the other.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found = []
    for begin in range(0, len(order), MEASURED_AT_ONCE):
        batch = batch_of([rows[number] for number in order[begin : begin + MEASURED_AT_ONCE]], padding, device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        found.append(F.cross_entropy(logits.mT, labels, reduction="none").sum(1))
    losses = torch.cat(found).tolist()
    return [losses[order.index(number)] for number in range(len(rows))]


def run(case: Case, texts: Texts) -> list[Row]:
    """Train; rows of the losses on the prompts held out before, every `case.every` steps, and at the end."""
    _begin(case, "high")  # TF32, which holds every 16-bit weight
    model = started(case).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, case.steps)
    rows = measured(model, texts, case, 0)
    for step, batch in enumerate(training_batches(texts, case), start=1):
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % case.every == 0 or step == case.steps:
            rows += measured(model, texts, case, step)
    return rows


def measured(model: PeftModel, texts: Texts, case: Case, step: int) -> list[Row]:
    """A row for the prompts to choose on and one for those to test on."""
    rows = []
    for part, held_out in (("choose", texts.choose), ("test", texts.test)):
        losses = losses_of(model, held_out, texts.padding, case.device)
        tokens = [len(row) - 1 for row in held_out]
        rows.append(
            {
                "weights": case.weights,
                "learning_rate": case.learning_rate,
                "seed": case.seed,
                "step": step,
                "part": part,
                "loss": sum(losses) / sum(tokens),
                "losses": " ".join(f"{loss:.4f}" for loss in losses),
                "tokens": " ".join(map(str, tokens)),
            }
        )
    return rows
