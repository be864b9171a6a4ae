"""Tiny language models with random weights, saved as checkpoints, for the tests of the integrations."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 96
# Names of the layers that NF4Config quantizes, a transformer block, and of those that LoRA goes on.
LINEARS = {"llama": 7, "bloom": 4}
TARGETS = {"llama": ["q_proj", "v_proj"], "mistral": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """A two-block model; 48 features, so that a row is no whole number of quantization blocks of 64."""
    torch.manual_seed(3)
    if name == "bloom":
        sizes = {"hidden_size": 48, "n_layer": 2, "n_head": 4}
        return BloomForCausalLM(BloomConfig(**({"vocab_size": VOCABULARY} | sizes | changes))).eval()
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config, kind = (MistralConfig, MistralForCausalLM) if name == "mistral" else (LlamaConfig, LlamaForCausalLM)
    return kind(config(**({"vocab_size": VOCABULARY} | sizes | changes))).eval()


def writing_model(name: str, **changes) -> PreTrainedModel:
    """A tiny model whose next token depends on all before it; with small weights a Bloom repeats the last one."""
    return tiny_model(name, initializer_range=0.5, **changes)


def save_tiny(name: str, folder: Path, **changes) -> Path:
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
