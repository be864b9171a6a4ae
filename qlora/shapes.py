"""What a plan must know of a model: sizes, from its configuration alone.

Room: a model on the meta device in, numbers out; no weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from qkernels.errors import UserError

from .arguments import DEFAULT_MODEL, LoraArguments, lora_targets
from .checkpoint import is_local
from .loading import local_folder
from .optimize import can_optimize
from .targets import likely_target_modules, resolve_target_modules

# The published configuration, so that the default model can be planned without a network.
_KNOWN: dict[str, Callable[[], Any]] = {
    DEFAULT_MODEL: lambda: BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32, dtype="float16")
}

# For an architecture that `optimize_model` does not know: what a layer keeps for the backward pass, as a multiple of
# the inputs and outputs of its linear layers.
_UNKNOWN_FACTOR = 2.0
_AFTER_ATTENTION = ("self_attention.dense", "o_proj")
_SIDE_BY_SIDE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model with its adapters.

    Attributes:
        layers: blocks.
        hidden: features of the residual stream.
        heads: attention heads, for queries.
        vocabulary: rows of the output layer.
        parameters: of the base model.
        quantized: of them, the linear layers', which are kept in 4 bits.
        embeddings: of them, those of the input embedding and the output layer, which may be.
        trainable: parameters of the adapters.
        largest: elements of the largest 4-bit weight.
        saved_width: elements a token that a block's backward pass needs, its input not counted.
        working_width: elements a token that exist besides while its widest product runs, forward or backward.
        transient_width: the same while no weight is decoded (the activation function's backward pass).
        ending: weights of the frozen products at the end of a block, which recomputation need not reach.
        middle: weights of the output projection of a block's attention, which it need not reach with "parts".
        eager: the attention keeps its scores.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    parameters: int
    quantized: int
    embeddings: int
    trainable: int
    largest: int
    saved_width: float
    working_width: float
    transient_width: float
    ending: int
    middle: int
    eager: bool


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


def shapes_of(model: nn.Module, lora: LoraArguments) -> Shapes:
    """The sizes.

    Args:
        model: from `meta_model`.
        lora: which layers get an adapter, and its rank.

    Raises:
        UserError: an unknown target module.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    linears = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    adapted = [name for name in adapted_layers(model, lora) if name in linears]
    config: Any = model.config
    layers = config.num_hidden_layers
    inputs = _adapter_inputs({name: linears[name].in_features for name in adapted}) / layers
    saved, working, transient = _widths(model, linears, layers)
    frozen = {name: linear for name, linear in linears.items() if name not in adapted}

    def weights(*ends: str) -> int:
        return sum(linear.weight.numel() for name, linear in frozen.items() if name.endswith(ends))

    return Shapes(
        layers=layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=head.weight.shape[0],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized=sum(linear.weight.numel() for linear in linears.values()),
        embeddings=sum(weight.numel() for weight in {embedding.weight, head.weight}),
        trainable=sum(lora.lora_r * (linears[name].in_features + linears[name].out_features) for name in adapted),
        largest=max(linear.weight.numel() for linear in linears.values()),
        saved_width=saved + inputs,
        working_width=working,
        transient_width=transient,
        ending=weights("dense_4h_to_h", "down_proj"),
        middle=weights(*_AFTER_ATTENTION),
        eager=config._attn_implementation == "eager" and not can_optimize(model),
    )


def _adapter_inputs(features: dict[str, int]) -> float:
    """Elements a token that the adapters of all blocks keep of their inputs; what dropout leaves is made again."""
    # One for layers side by side, none where attention keeps its output anyway.
    distinct = {}
    for name, width in features.items():
        parent, _, child = name.rpartition(".")
        if not name.endswith(_AFTER_ATTENTION):
            distinct[parent, _SIDE_BY_SIDE.get(child, child)] = width
    return sum(distinct.values())


def _widths(model: nn.Module, linears: dict[str, nn.Linear], layers: int) -> tuple[float, float, float]:
    """Elements a token: saved for the backward pass, working beside a decoded weight, and without one."""
    config: Any = model.config
    hidden = config.hidden_size
    total = sum(linear.in_features + linear.out_features for linear in linears.values()) / layers
    if not can_optimize(model):
        return _UNKNOWN_FACTOR * total, total / 2, total / 2
    inner = max(linear.out_features for name, linear in linears.items() if not name.endswith("query_key_value"))
    if config.model_type == "bloom":
        # Query, key, value, what attention returns, the sum after it, and GELU's input.
        return 3 * hidden + hidden + hidden + inner, inner + 2 * hidden, 2 * inner + hidden
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads = config.num_attention_heads * size
    rest = 2 * config.num_key_value_heads * size
    # Query, key and value, what attention returns, the sum after it, gate and up.
    return 2 * heads + rest + hidden + 2 * inner, 2 * inner + 2 * hidden, 4 * inner + hidden
