"""How much GPU memory a fine-tuning run takes, from the model's configuration alone, and `qlora plan`.

Room: arithmetic over the shapes of a model built on the meta device; no weights are loaded, no GPU is asked to compute.
It is an estimate: what it assumes is in `ASSUMPTIONS` and printed with every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from qkernels.errors import UserError

from .arguments import DEFAULT_MODEL, LoraArguments, ModelArguments, PlanArguments, check_numbers, lora_targets
from .checkpoint import is_local
from .config import Parser, parse
from .loading import local_folder
from .precision import choose_precision
from .targets import likely_target_modules, resolve_target_modules
from .units import GIB

# Memory that torch reports (GiB; below the nominal size) and compute capability.
GPUS: dict[str, tuple[float, tuple[int, int]]] = {
    "t4": (14.56, (7, 5)),
    "v100-16": (15.77, (7, 0)),
    "rtx3090": (23.69, (8, 6)),
    "rtx4090": (23.65, (8, 9)),
    "a10": (22.02, (8, 6)),
    "l4": (22.03, (8, 9)),
    "a100-40": (39.39, (8, 0)),
    "a100-80": (79.15, (8, 0)),
    "h100": (79.19, (9, 0)),
    "h200": (139.81, (9, 0)),
}

# The published configuration, so that the default model can be planned without a network.
_KNOWN = {
    DEFAULT_MODEL: lambda: BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32, dtype="float16")
}

CUDA_CONTEXT_BYTES = int(0.45 * GIB)
# What a layer keeps while it is recomputed and differentiated, as a multiple of the inputs and outputs of its linear
# layers: besides these there are the activations between them, and gradients of some.  Chosen to fit the peaks that
# were measured; test_bloom_is_near_the_measured_peaks holds the plan to them.
LAYER_FACTOR = 3
# Eager attention: scores, probabilities and their gradients, in the compute dtype and in float32 for the softmax.
EAGER_SCORE_FACTOR = 5
# TRL projects onto the vocabulary in tiles of so many words and tokens, in one buffer, and keeps no logits.
LOGIT_TILE = 32_768
LOGIT_TOKENS = 4096

ASSUMPTIONS = (
    "activation checkpointing is on: a layer keeps its input, one layer at a time is recomputed",
    "the loss is fused with the output head, as TRL does it: logits exist for "
    f"{LOGIT_TILE:,} words of the vocabulary at a time",
    "adapter, its gradients and AdamW's two moments are float32",
    "4-bit weights are decoded one layer at a time",
    "every text is as long as --max_length",
    "0.45 GiB for the CUDA context; the allocator's fragmentation is not counted",
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part of one training step at its peak.

    Attributes:
        quantized: packed 4-bit weights and their scales.
        kept: what stays float: embedding, output head, normalizations, biases.
        adapter: LoRA weights and their gradients.
        optimizer: AdamW's two moments.
        activations: checkpointed inputs, and the layer that is being recomputed.
        logits: the tile of logits and its gradient.
        decoded: the largest weight, decoded for its product.
        context: the CUDA context.
        trainable: trainable parameters (a count, not bytes).
        parameters: parameters of the base model (a count).
    """

    quantized: int
    kept: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    decoded: int
    context: int
    trainable: int
    parameters: int

    @property
    def total(self) -> int:
        """All parts, in bytes."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = ("quantized", "kept", "adapter", "optimizer", "activations", "logits", "decoded", "context")
_LABELS = {
    "quantized": "4-bit weights and scales",
    "kept": "embedding and what else stays float",
    "adapter": "LoRA weights and gradients",
    "optimizer": "AdamW moments",
    "activations": "activations",
    "logits": "logits",
    "decoded": "largest weight, decoded",
    "context": "CUDA context",
}


def meta_model(name: str, revision: str = "main") -> nn.Module:
    """The model without weights, on the meta device, from its configuration.

    Raises:
        UserError: no such model, or the hub cannot be reached.
    """
    if is_local(name):
        name = local_folder(name)
    try:
        config = _KNOWN[name]() if name in _KNOWN else AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(
            "--model_name_or_path",
            expected="a causal language model on the hub, or a folder with its config.json",
            got=f"{name!r}: {shorten(str(error), 200)}",
            remedy="Check the name, the folder and the network.",
        ) from error


def adapted_layers(model: nn.Module, lora: LoraArguments) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        UserError: a target that the model does not have; the message has the flag to pass.
    """
    try:
        return resolve_target_modules(model, lora_targets(lora))
    except UserError as error:
        names = " ".join(likely_target_modules(model))
        raise UserError(
            "--lora_target_modules",
            expected=error.expected,
            got=error.got,
            remedy=f"Pass `--lora_target_modules {names}` or some of these, or `--lora_target_modules all-linear`.",
        ) from error


def plan(
    model: nn.Module,
    lora: LoraArguments,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    double_quantization: bool = True,
) -> MemoryPlan:
    """Estimate the peak memory of training.

    Args:
        model: from `meta_model`.
        lora: which layers get an adapter, and its rank.
        batch_size: texts at a time on the GPU.
        length: tokens a text.
        dtype: of activations and float weights.
        double_quantization: 8-bit scales; float32 ones otherwise.

    Raises:
        UserError: an unknown target module.
    """
    linears = _quantized_linears(model)
    quantized = sum(linear.weight.numel() for linear in linears.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    scale_bytes = 1 + 4 / 256 if double_quantization else 4
    targets = [linears[name] for name in adapted_layers(model, lora) if name in linears]
    trainable = sum(lora.lora_r * (linear.in_features + linear.out_features) for linear in targets)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return MemoryPlan(
        quantized=int(quantized * (0.5 + scale_bytes / 64)),
        kept=(parameters - quantized) * dtype.itemsize,
        adapter=trainable * 8,
        optimizer=trainable * 8,
        activations=_activations(model, linears, batch_size, length, dtype),
        logits=min(batch_size * length, LOGIT_TOKENS) * min(vocabulary, LOGIT_TILE) * dtype.itemsize,
        decoded=max(linear.weight.numel() for linear in linears.values()) * dtype.itemsize,
        context=CUDA_CONTEXT_BYTES,
        trainable=trainable,
        parameters=parameters,
    )


def _quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def _activations(
    model: nn.Module, linears: dict[str, nn.Linear], batch_size: int, length: int, dtype: torch.dtype
) -> int:
    config: Any = model.config
    tokens = batch_size * length
    layers = config.num_hidden_layers
    checkpoints = layers * tokens * config.hidden_size * dtype.itemsize
    width = sum(linear.in_features + linear.out_features for linear in linears.values()) / layers
    one_layer = LAYER_FACTOR * width * tokens * dtype.itemsize
    scores = 0.0
    if config._attn_implementation == "eager":
        scores = EAGER_SCORE_FACTOR * batch_size * config.num_attention_heads * length**2 * (dtype.itemsize + 4) / 2
    return int(checkpoints + one_layer + scores)


def report(plans: dict[int, MemoryPlan], available: float) -> list[str]:
    """A table of plans as text: a line for each part, a column for each batch size, GiB.

    Args:
        plans: plan of each batch size.
        available: memory of the GPU, GiB.
    """
    lines = [f"{'GiB at batch size':<40}" + "".join(f"{batch_size:>9}" for batch_size in plans)]
    for part in PARTS:
        lines.append(f"{_LABELS[part]:<40}" + "".join(f"{getattr(p, part) / GIB:>9.2f}" for p in plans.values()))
    lines.append(f"{'total':<40}" + "".join(f"{p.total / GIB:>9.2f}" for p in plans.values()))
    verdicts = ["fits" if p.total <= available * GIB else "too big" for p in plans.values()]
    lines.append(f"{f'in {available:.2f} GiB':<40}" + "".join(f"{verdict:>9}" for verdict in verdicts))
    return lines


def main(argv: Sequence[str]) -> None:
    """`qlora plan`.

    Raises:
        UserError: wrong flags, an unknown model, GPU or target module.
    """
    parser = Parser((ModelArguments, LoraArguments, PlanArguments), prog="qlora plan")
    model_arguments, lora, run = parse(parser, argv, check_numbers)
    name, available, capability = _gpu(run.gpu)
    policy = choose_precision(capability=capability)
    model = meta_model(model_arguments.model_name_or_path, model_arguments.model_revision)
    plans = {
        batch_size: plan(
            model,
            lora,
            batch_size=batch_size,
            length=run.max_length,
            dtype=policy.dtype,
            double_quantization=model_arguments.use_bnb_nested_quant,
        )
        for batch_size in run.batch_size
    }
    first = next(iter(plans.values()))
    print(f"{model_arguments.model_name_or_path}: {first.parameters / 1e9:.2f} billion parameters")
    share = first.trainable / (first.parameters + first.trainable)
    print(f"adapter: {first.trainable:,} parameters to train ({share:.4%} of all)")
    print(f"GPU: {name}, {available:.2f} GiB; precision: {policy.reason}")
    print(f"texts of {run.max_length} tokens\n")
    print("\n".join(report(plans, available)))
    print("\nAn estimate. It assumes:\n" + "\n".join(f"- {text}" for text in ASSUMPTIONS))


def _gpu(asked: str | None) -> tuple[str, float, tuple[int, int]]:
    """Name, memory in GiB and compute capability of the GPU to plan for."""
    if asked is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory / GIB, (properties.major, properties.minor)
    name = (asked or "t4").lower()
    if name in GPUS:
        return name, *GPUS[name]
    try:
        memory = float(name)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise UserError(
            "--gpu", expected=f"one of {', '.join(GPUS)}, or GiB", got=repr(asked), remedy="For example --gpu 24."
        )
    return "a GPU with bfloat16", memory, (8, 0)
