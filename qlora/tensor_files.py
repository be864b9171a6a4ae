"""The weights of a checkpoint one at a time: read by name, written shard by shard.

Room: files and names; no model.  A checkpoint is never whole in memory: safetensors and pickled files are mapped, and a
shard is written as soon as it is full.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from qkernels.errors import UserError

from .load_errors import one_error

_SINGLE = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
_INDICES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)


class TensorReader:
    """Tensors of a checkpoint by name.

    Args:
        name_or_path: folder, or id on the Hugging Face hub.
        revision: on the hub.

    Raises:
        UserError: no such checkpoint, or a file that cannot be read.
    """

    def __init__(self, name_or_path: str | os.PathLike[str], revision: str = "main") -> None:
        self.name = os.fspath(name_or_path)
        with one_error(self.name, {}):
            self._places = dict(self._find(revision))

    def _find(self, revision: str) -> Iterator[tuple[str, Path]]:
        """(name of a tensor, its file), in the order of the files."""
        for file in _checkpoint_files(self.name, revision):
            for name in _open(file):
                yield name, file

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in the dtype it is stored in."""
        file = self._places[name]
        with one_error(self.name, {}):
            return _open(file)[name] if file.suffix != ".safetensors" else _read_safetensors(file, name)

    def find(self, parameter: str, base_prefix: str) -> str | None:
        """The name under which a model's parameter is stored: its own, or without the prefix of the base model (Bloom's
        published checkpoints leave "transformer." out); None if it is not stored."""
        short = parameter.removeprefix(f"{base_prefix}.")
        return next((name for name in (parameter, short) if name in self._places), None)

    def read_float(self, parameter: str, base_prefix: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The float weight that a model's 4-bit one was made from, found as `find` does, on the CPU.

        Raises:
            UserError: it is not stored, not float or of another shape.
        """
        stored = self.find(parameter, base_prefix)
        weight = None if stored is None else self.read(stored)
        if weight is None or not weight.is_floating_point() or weight.shape != shape:
            raise UserError(
                "checkpoint",
                expected=f"the float weight {parameter} of shape {shape}",
                got="none" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}",
                remedy="Give the float model that the base was quantized from.",
            )
        return weight


class ShardWriter:
    """Writes tensors into `model-00001-of-0000N.safetensors` and their index, or one `model.safetensors`.

    Args:
        folder: exists and is empty of weights.
        max_shard_bytes: a shard is written before it would get larger; one tensor may be.

    Attributes:
        total_bytes: of the tensors so far.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 2 * 2**30) -> None:
        self.total_bytes = 0
        self._folder = folder
        self._limit = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write the last shard and give all of them their final names."""
        self._flush()
        if len(self._shards) == 1:
            os.rename(self._partial(0), self._folder / SAFE_WEIGHTS_NAME)
            return
        places = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            os.rename(self._partial(number), self._folder / file)
            places.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": places}
        (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _flush(self) -> None:
        save_file(self._pending, self._partial(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def _checkpoint_files(name: str, revision: str) -> list[Path]:
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for single, index in zip(_SINGLE, _INDICES, strict=True):
        if (file := cached_file(name, single, **options)) is not None:
            return [Path(file)]
        if (file := cached_file(name, index, **options)) is not None:
            files, _ = get_checkpoint_shard_files(name, file, revision=revision)
            return [Path(file) for file in files]
    raise UserError(
        "name_or_path",
        expected=f"a checkpoint ({', '.join((*_SINGLE, *_INDICES))})",
        got=f"{name!r}, which has none of these",
        remedy="Give the folder or hub id of the model's weights; a GGUF file has to be loaded and saved first.",
    )


def _open(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, mapped, or the names alone of a safetensors file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), torch.empty(0))
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _read_safetensors(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
