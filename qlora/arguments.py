"""What the commands may be told: dataclasses in TRL's convention, their defaults, and what is wrong with their values.

Room: names, defaults and checks; no model, no data.  `config.py` reads them from flags and a YAML file.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from qkernels.errors import UserError

from .optimize import RECOMPUTE
from .precision import PrecisionPolicy, choose_precision

DEFAULT_MODEL = "bigscience/bloom-7b1"
BUNDLED = "bundled"


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is a flag with this help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """The base model and the form it is loaded in; the names are those of `trl.ModelConfig`."""

    _argument_group_name: ClassVar[str] = "base model"

    model_name_or_path: str = option(DEFAULT_MODEL, "Model on the Hugging Face hub, or a folder.", aliases=["--model"])
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    bnb_4bit_quant_type: str = option(
        "nf4", "4-bit format. Named as in TRL; bitsandbytes is not needed.", choices=["nf4", "fp4"]
    )
    use_bnb_nested_quant: bool = option(True, "Double quantization: 8-bit scales instead of float32 ones.")
    quantize_embeddings: bool = option(False, "Keep the input embedding and the output layer in 4 bits too.")
    attn_implementation: str | None = option(
        None, "Attention of transformers ('eager', 'sdpa', ...), without qlora.optimize_model; None: with it."
    )


@dataclass
class LoraArguments:
    """The adapter; the names are those of `trl.ModelConfig`.  No bias is trained."""

    _argument_group_name: ClassVar[str] = "LoRA adapter"

    lora_r: int = option(16, "Rank.")
    lora_alpha: int = option(16, "The update is scaled by alpha / r.")
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "Names of the linear layers that get an adapter, or 'all-linear'."},
    )
    lora_init: str = option(
        "zero",
        "What the adapter adds at first: nothing; or of its rank the best part of what quantization took from the "
        "weights (loftq), or from the layers' outputs on the texts to train on (qera). Both read a float checkpoint.",
        choices=["zero", "loftq", "qera"],
    )
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead.")
    use_dora: bool = option(False, "DoRA: train the magnitude of each output apart from its direction.")


@dataclass
class DataArguments:
    """What to train on, what to hold out and what to write samples for."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str = option(
        "fka/awesome-chatgpt-prompts",
        "Data set on the hub, a .csv, .jsonl or .txt file (one text a line), or 'bundled': the 60 prompts that come "
        "with qlora.",
    )
    dataset_config: str | None = option(None, "Configuration of the data set on the hub.")
    dataset_train_split: str = option("train", "Split of the data set on the hub.")
    max_samples: int | None = option(50, "Train on the first so many rows; 'none' is all of them.")
    eval_samples: int = option(0, "Hold out the next so many rows and measure the loss on them before and after.")
    sample_prompts: list[str] = field(
        default_factory=lambda: ["I want you to act as a motivational coach.", "I want you to act as a gardener."],
        metadata={"help": "Prompts that the report shows continued by the model before and after."},
    )
    sample_tokens: int = option(60, "Tokens to generate for each of them; 0 generates nothing.")
    resume: bool = option(False, "Go on from the last checkpoint in --output_dir.")


@dataclass
class TrainingArguments(SFTConfig):
    """`trl.SFTConfig` with the defaults of this project; the other flags of TRL's `trl sft` work too."""

    _argument_group_name: ClassVar[str] = "training (trl.SFTConfig and transformers.TrainingArguments)"

    output_dir: str | None = option("runs/qlora", "The run folder: checkpoints, adapter, metrics and report.")
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.")
    num_train_epochs: float = option(5.0, "Passes over the data.")
    auto_find_batch_size: bool = option(True, "Halve the batch size until it fits the memory.")
    dataset_text_field: str = option("prompt", "Column of the data that holds the text.")
    max_length: int | None = option(512, "Cut texts to so many tokens.")
    logging_steps: float = option(1, "Steps between two entries of metrics.jsonl.")
    logging_nan_inf_filter: bool = option(
        False,
        "Leave losses that are not finite out of the logged mean; the host then waits for the GPU each step.",
    )
    save_strategy: str = option("epoch", "When to write a checkpoint.", choices=["no", "steps", "epoch", "best"])
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    recompute: str = option(
        "block", "What the backward pass computes again (see qlora.optimize_model).", choices=list(RECOMPUTE)
    )
    kept_blocks: int = option(0, "So many of the last blocks keep everything instead: `qlora plan` proposes how many.")
    offload: bool = option(False, "Keep what is kept for recomputation in pinned host memory.")
    report_to: str = option("none", "Trackers to report to besides the run folder ('wandb', 'tensorboard', ...).")

    def __post_init__(self) -> None:
        # TRL would choose bf16 wherever it is not forbidden, on a T4 and on the CPU too.
        policy = precision_of(self)
        self.fp16, self.bf16 = policy.fp16, policy.bf16
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        if self.accelerator_config is None and self.dataloader_pin_memory:
            # Or the host would wait for the GPU before it goes on from the copy of a batch.
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()


@dataclass
class GenerationArguments:
    """How `qlora generate` and `qlora compare` continue prompts."""

    _argument_group_name: ClassVar[str] = "generation"

    prompt: list[str] = field(
        default_factory=lambda: ["I want you to act as a motivational coach."], metadata={"help": "Texts to continue."}
    )
    max_new_tokens: int = option(60, "Tokens to generate for each prompt.")
    temperature: float = option(0.0, "0 takes the most likely token each time; more is more varied.")
    repetition_penalty: float = option(1.2, "More than 1 makes tokens that have been used less likely.")
    seed: int = option(42, "Seed of the sampling.")
    use_cpu: bool = option(False, "Run on the CPU even if there is a GPU.")


@dataclass
class AdapterArguments(ModelArguments):
    """A base model and an adapter for it."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(  # type: ignore[assignment]
        None, "Base model; None: the one that the adapter was trained on.", aliases=["--model"]
    )
    adapter_path: str | None = option(None, "Run folder of `qlora train`, or a folder with a PEFT adapter.")


@dataclass
class MergeArguments:
    """Where `qlora merge` writes, onto what base, and in what precision."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = option(None, "New folder for the merged model.")
    onto: str = option(
        "dequantized",
        "Base to add the adapter to: the 4-bit one decoded, as in training; the float one; the first, 4-bit again.",
        choices=["dequantized", "16bit", "4bit"],
    )
    dtype: str = option("float16", "Precision of the merged weights.", choices=["float16", "bfloat16", "float32"])


@dataclass
class QuantizeArguments:
    """What `qlora quantize` writes, and the texts that it rounds the weights for."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = option(None, "New folder for the 4-bit model.")
    calibrate: bool = option(True, "Round for the texts; false: each number to its nearest.")
    dataset_name: str = option(DataArguments.dataset_name, "The texts, as of `qlora train`.")
    dataset_text_field: str = option("prompt", "Column of the data that holds the text.")
    max_samples: int | None = option(128, "The first so many of them; 'none' is all.")
    max_length: int = option(512, "Cut texts to so many tokens.")
    bitsandbytes: bool = option(False, "In the form that bitsandbytes writes, for programs that know only that (vLLM).")
    use_cpu: bool = option(False, "Run on the CPU even if there is a GPU.")


@dataclass
class PlanArguments:
    """The run that `qlora plan` estimates."""

    _argument_group_name: ClassVar[str] = "run"

    gpu: str | None = option(
        None, "t4, l4, a10, a100-40, h100, ... or memory in GiB; None: this machine's GPU, or a t4 if it has none."
    )
    batch_size: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Texts at a time on the GPU; several are compared."}
    )
    memory_gib: float | None = option(None, "Plan for so much memory, of --gpu or of some GPU with bfloat16.")
    max_length: int = option(512, "Tokens a text.")
    recompute: str = option(
        "block", "What the backward pass computes again (see qlora.optimize_model).", choices=list(RECOMPUTE)
    )
    kept_blocks: int = option(0, "So many of the last blocks keep everything instead.")
    offload: bool = option(False, "Keep what is kept for recomputation in pinned host memory.")


def precision_of(training: Any) -> PrecisionPolicy:
    """The precision of a run: the policy's, unless --fp16 or --bf16 ask for something else that the device can do.

    Args:
        training: `TrainingArguments`, or a namespace with `use_cpu`, `fp16` and `bf16`.

    Raises:
        UserError: the device cannot do what is asked for.
    """
    policy = choose_precision("cpu" if training.use_cpu else None)
    asked = "fp16" if training.fp16 else "bf16" if training.bf16 else None
    if asked is None or getattr(policy, asked):
        return policy
    if asked == "bf16" or not policy.bf16:
        raise UserError(
            f"--{asked}",
            expected="a precision that this device computes in natively",
            got="true",
            remedy=f"Leave it out; the choice is {policy.reason}.",
        )
    return PrecisionPolicy(torch.float16, "float16 with loss scaling, because --fp16 asks for it", True, False)


# Checks of values.

_POSITIVE = (
    "lora_r",
    "lora_alpha",
    "max_samples",
    "learning_rate",
    "num_train_epochs",
    "logging_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "max_new_tokens",
    "batch_size",
    "memory_gib",
    "repetition_penalty",
)
_NOT_NEGATIVE = (
    "eval_samples",
    "sample_tokens",
    "kept_blocks",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "adam_epsilon",
    "neftune_noise_alpha",
    "dataloader_num_workers",
    "temperature",
)


def check_numbers(values: argparse.Namespace) -> list[str]:
    """What is out of range or empty, one sentence each.  Settings that a command does not have are passed over."""
    problems = []
    for names, holds, range_ in (
        (_POSITIVE, lambda value: value > 0, "more than 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        # A token is learned from those before it: texts of one token teach nothing, and their loss is 0.
        (("max_length",), lambda value: value > 1, "more than 1"),
        (("lora_dropout", "adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "at least 0 and less than 1"),
        (("seed", "data_seed"), lambda value: 0 <= value < 2**32, "at least 0 and less than 2^32"),
    ):
        for name in names:
            value = getattr(values, name, None)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not holds(number):  # nan fails every comparison
                    problems.append(f"{name} has to be {range_}, not {number}")
    for name in ("prompt", "sample_prompts"):
        if any(not text.strip() for text in getattr(values, name, [])):
            problems.append(f"{name} holds an empty text, which a model cannot continue")
    return problems


def check_training(values: argparse.Namespace) -> list[str]:
    """What is wrong with the settings of `qlora train`, one sentence each."""
    problems = check_numbers(values)
    try:
        precision_of(values)
    except UserError as error:
        problems.append(str(error))
    if not values.output_dir or not values.output_dir.strip():
        problems.append("output_dir has to name a folder")
    problems += _check_evaluation(values)
    trackers = ("none", "all", *get_available_reporting_integrations())
    if values.report_to not in trackers:
        known = ", ".join(trackers)
        problems.append(f"report_to: {values.report_to!r} is none of the trackers installed here ({known})")
    if values.deepspeed or values.fsdp:
        problems.append("deepspeed and fsdp are not supported: this command trains in one process")
    if values.push_to_hub:
        problems.append("push_to_hub is not supported: upload the run's adapter folder by `hf upload` when it is done")
    if values.padding_free or values.packing:
        if values.attn_implementation:
            problems.append("packing and padding_free need the attention of qlora: leave attn_implementation out")
        if values.packing_strategy == "wrapped":
            problems.append("packing_strategy wrapped is not supported: it lets texts read across each other")
    if values.attn_implementation and (values.recompute != "block" or values.kept_blocks or values.offload):
        problems.append("recompute, kept_blocks and offload need the attention of qlora: leave attn_implementation out")
    if "lm_head" in values.lora_target_modules:
        problems.append("lora_target_modules: lm_head cannot have an adapter (TRL fuses it with the loss)")
    return problems


def _check_evaluation(values: argparse.Namespace) -> list[str]:
    problems = []
    if values.eval_strategy != "no" and not values.eval_samples:
        problems.append(f"eval_strategy {values.eval_strategy} needs held-out texts: set eval_samples")
    if values.save_strategy == "best":
        if values.eval_strategy == "no":
            problems.append("save_strategy best needs measurements to choose by: set eval_strategy and eval_samples")
        if values.metric_for_best_model is None and not values.load_best_model_at_end:
            problems.append("save_strategy best needs metric_for_best_model, for example eval_loss")
    return problems


def lora_targets(lora: LoraArguments) -> str | list[str]:
    """`target_modules` as peft wants it: "all-linear" is a word of its own, not a name."""
    return "all-linear" if lora.lora_target_modules == ["all-linear"] else lora.lora_target_modules
