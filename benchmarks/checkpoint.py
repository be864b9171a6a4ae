"""Bloom or Llama with random weights, written to disk the way the published checkpoint lies on a hub.

The published weights need a hub; speed and memory do not depend on their values.  Names, shapes, dtype (float16), tied
embedding and configuration values are those of `bigscience/bloom-7b1` and `meta-llama/Llama-2-7b-hf`; the sizes can be
shrunk for a trial on a CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedConfig

from qlora.checkpoint import writing

INDEX_NAME = "model.safetensors.index.json"
LAYERS_PER_SHARD = 5


@dataclass(frozen=True)
class ModelSize:
    """Attributes: the sizes of a model, by default Bloom-7B1's; `intermediate` is Llama's only."""

    layers: int = 30
    hidden: int = 4096
    heads: int = 32
    vocab: int = 250_880
    family: str = "bloom"
    intermediate: int | None = None

    @property
    def name(self) -> str:
        published = [name for name, size in MODELS.items() if size == self]
        return published[0] if published else f"{self.family}-{self.layers}x{self.hidden}x{self.vocab}"


MODELS = {"bloom-7b1": ModelSize(), "llama-2-7b": ModelSize(32, 4096, 32, 32_000, "llama", 11_008)}


def config_of(size: ModelSize) -> PreTrainedConfig:
    """The published configuration of the family, with `size`."""
    return llama_config(size) if size.family == "llama" else bloom_config(size)


def llama_config(size: ModelSize) -> LlamaConfig:
    """`meta-llama/Llama-2-7b-hf`'s published configuration, with `size`."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=False,
        dtype=torch.float16,
    )


def bloom_config(size: ModelSize) -> BloomConfig:
    """`bigscience/bloom-7b1`'s published configuration, with `size`."""
    return BloomConfig(
        architectures=["BloomForCausalLM"],
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        apply_residual_connection_post_layernorm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pretraining_tp=1,
        slow_but_exact=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
        dtype=torch.float16,
    )


def build_checkpoint(folder: Path, size: ModelSize, *, device: str, seed: int = 0) -> int:
    """Write the checkpoint: `config.json`, safetensors shards, their index.  One there already is kept.

    Weights and the embedding are normal with the configuration's `initializer_range`, biases zero, norms one and zero,
    as a fresh model has them.

    Args:
        folder: made if missing.
        size: the model's sizes.
        device: where the numbers are drawn; CPU and CUDA draw different ones from the same seed.
        seed: of the first shard; each shard has its own generator.

    Returns:
        Bytes of all shards.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    identity = {**asdict(size), "seed": seed, "device": device}
    marker = folder / "benchmark.json"
    if not (marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == identity):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, config_of(size), device, seed)
            marker.write_text(json.dumps(identity), encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write(folder: Path, config: PreTrainedConfig, device: str, seed: int) -> None:
    config.save_pretrained(folder)
    shards = list(_shards(config))
    weight_map, total_bytes = {}, 0
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator(device).manual_seed(seed + number)
        tensors = {name: _draw(name, shape, config, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if device == "cuda":
        torch.cuda.empty_cache()  # the providers' processes need the room


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes by shard: everything outside the blocks first, then LAYERS_PER_SHARD blocks each."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if config.model_type == "bloom":
        model = model.transformer  # published names have no "transformer." before them
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    blocks = {name: int(found[1]) for name in shapes if (found := re.search(r"\b(?:h|layers)\.(\d+)\.", name))}
    yield {name: shape for name, shape in shapes.items() if name not in blocks}
    for first in range(0, config.num_hidden_layers, LAYERS_PER_SHARD):
        layers = range(first, first + LAYERS_PER_SHARD)
        yield {name: shapes[name] for name, layer in blocks.items() if layer in layers}


def _draw(name: str, shape: torch.Size, config: PreTrainedConfig, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.float16, device=generator.device)
    if tensor.ndim == 2:
        return tensor.normal_(0.0, config.initializer_range, generator=generator)
    is_norm_weight = name.endswith(("norm.weight", "ln_f.weight"))
    return tensor.fill_(1.0 if is_norm_weight else 0.0)
