"""Real weights: the matrices of a model that would be quantized, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from qkernels.errors import UserError
from qlora.checkpoint import is_local
from qlora.demo import MODEL, prepare_model

# What stays in 16 bits when a model is loaded in 4: embeddings, and the output layer, which often is one.
KEPT = ("embed", "lm_head", "wte", "wpe")


def folder_of(name: str) -> Path:
    """Where the weights of `name` lie: the demo's model, a folder, a .safetensors file, or a hub's model (downloaded).

    Raises:
        UserError: nothing of that name here.
    """
    if name == MODEL:
        return prepare_model()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if is_local(name):
        raise UserError(
            "--model",
            expected=f"{MODEL}, a folder, a .safetensors file, or a hub's id",
            got=f"{name}, which is not there",
            remedy="Check the path.",
        )
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))


def is_quantized(name: str, tensor_shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that name would be held in 4 bits."""
    return len(tensor_shape) == 2 and name.endswith("weight") and not any(kept in name for kept in KEPT)


def matrices(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 values of every matrix that would be quantized, in the order of files and names.

    Raises:
        UserError: there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = False
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys(), key=_by_number):
                shape = tuple(weights.get_slice(name).get_shape())
                if is_quantized(name, shape):
                    found = True
                    yield name, weights.get_tensor(name).float()
    if not found:
        raise UserError(
            "--model",
            expected="a .safetensors file with matrices named *.weight",
            got=f"none in {path}",
            remedy="Convert the checkpoint to safetensors with transformers' save_pretrained.",
        )


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
