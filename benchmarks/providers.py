"""The training stacks that are compared, one entry each; a new rival is one entry in `PROVIDERS`.

Each stack is used as its own documentation says.  The recipe (LoRA, batch, learning rate, AdamW, steps, tokens) is the
same for all.  A stack that cannot do a case fails it: nothing is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from qlora import train as qlora_train
from qlora.loading import load_pretrained_4bit, prepare_model_for_training
from qlora.optimize import optimize_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEARNING_RATE = 2e-4
MAX_LENGTH = 512


@dataclass(frozen=True)
class Provider:
    """Attributes:
    is_yardstick: runs bitsandbytes, so others are held against it.
    load: (checkpoint folder, dtype, "cpu" or "cuda:0") -> the model in 4 bits on the device.
    adapt: model -> the model with adapters.
    trainer: (model, tokenizer, dataset, common training arguments) -> a trainer ready for `train()`.
    is_quantized: the linear layers are in 4 bits; without, the stack shows what quantization costs, and no gate holds.
    generation: what `generate` is called with besides, as the stack's documentation would have it.
    """

    is_yardstick: bool
    load: Callable[[str, torch.dtype, str], PreTrainedModel]
    adapt: Callable[[PreTrainedModel], PeftModel]
    trainer: Callable[[PeftModel, PreTrainedTokenizerBase, Dataset, dict[str, Any]], Trainer]
    is_quantized: bool = True
    generation: dict[str, Any] = field(default_factory=dict)


def lora_targets(family: str) -> list[str]:
    """The layers with adapters: the tutorial's for Bloom; for Llama every linear layer, as in the QLoRA paper."""
    if family == "bloom":
        return ["query_key_value"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(model: PreTrainedModel) -> LoraConfig:
    """The tutorial's adapters, on `lora_targets`."""
    return LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=lora_targets(model.config.model_type),
        bias="none",
        task_type="CAUSAL_LM",
    )


def training_arguments(precision: str, device: str) -> dict[str, Any]:
    """What all stacks give their `TrainingArguments`; batch, steps and output folder come from the case."""
    return {
        "learning_rate": LEARNING_RATE,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def _load_qlora(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return optimize_model(load_pretrained_4bit(checkpoint, dtype=dtype, device=device))


def _adapt_qlora(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(prepare_model_for_training(model), lora_config(model))


def _load_bitsandbytes(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )


def _load_16bit(checkpoint: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map={"": device})


def _adapt_16bit(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(prepare_model_for_training(model), lora_config(model))  # frozen, and checkpointing on


def _adapt(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, lora_config(model))


def _adapt_for_kbit_training(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(prepare_model_for_kbit_training(model), lora_config(model))


def _plain_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: dict[str, Any]
) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def _qlora_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: dict[str, Any]
) -> Trainer:
    """The trainer and settings of `qlora train`; but a batch that does not fit fails instead of being halved."""
    settings = qlora_train.TrainingArguments(**arguments, max_length=MAX_LENGTH, auto_find_batch_size=False)
    return qlora_train.Trainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)


def _sft_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, arguments: dict[str, Any]
) -> Trainer:
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=MAX_LENGTH, gradient_checkpointing=True),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


# In the order in which they run: first one to hold the others against, and what matters most before time runs out.
PROVIDERS = {
    "trl+peft+bitsandbytes": Provider(True, _load_bitsandbytes, _adapt, _sft_trainer),
    "qlora": Provider(False, _load_qlora, _adapt_qlora, _qlora_trainer, generation={"cache_implementation": "static"}),
    "transformers+peft, not quantized": Provider(False, _load_16bit, _adapt_16bit, _plain_trainer, is_quantized=False),
    "transformers+peft+bitsandbytes": Provider(True, _load_bitsandbytes, _adapt_for_kbit_training, _plain_trainer),
}


def add_stacks_flag(parser: argparse.ArgumentParser) -> None:
    """Which of them run; in the order of `PROVIDERS` all the same, so that there is one to hold the others against."""

    class InOrder(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
            namespace.stacks = [stack for stack in PROVIDERS if stack in values]

    parser.add_argument(
        "--stacks",
        nargs="+",
        choices=PROVIDERS,
        default=list(PROVIDERS),
        metavar="STACK",
        action=InOrder,
        help="default: all; bitsandbytes runs first, to hold the others against",
    )
