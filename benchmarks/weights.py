"""The weights that are measured: their shapes, their blocks, and what they take in 4 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

# (rows, columns) of the weights of one block, and Llama's output layer.
SHAPES = {
    "bloom-7b1": ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)),
    "llama-2-7b": ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)),
}
OUTPUT_LAYER = SHAPES["llama-2-7b"][-1]  # stays in 16 bits in every 4-bit model: no products with it
BLOCKSIZE = 64


class Size(NamedTuple):
    """Attributes:
    shape: (rows, columns) of a weight.
    blocksize: of its weights, in row-major order, that share a scale.
    """

    shape: tuple[int, int]
    blocksize: int = BLOCKSIZE

    @property
    def columns(self) -> dict[str, int]:
        """Of a record's row."""
        return {"rows": self.shape[0], "columns": self.shape[1], "blocksize": self.blocksize}


# Weights whose rows are not whole blocks of 64: of a vision model's MLP, the way down; and blocks that are smaller.
RAGGED = {
    "siglip-so400m": (Size((1152, 4304)),),
    "qwen2.5-vl": (Size((1280, 3420)),),
    "bloom-7b1": (Size((12288, 4096), 32), Size((4096, 16384), 32)),
}
# What `--shapes` names: model -> weights.
LISTS = {
    "models": {model: tuple(map(Size, shapes)) for model, shapes in SHAPES.items()},
    "ragged": RAGGED,
}


def format_of(blocksize: int) -> dict[str, Any]:
    """Arguments of both libraries' quantizers."""
    return {"quant_type": "nf4", "blocksize": blocksize, "compress_statistics": True}


FORMAT = format_of(BLOCKSIZE)


def stored_bytes(n: int, blocksize: int = BLOCKSIZE) -> float:
    """Codes, 8-bit scales and the scales of the scales of `n` weights."""
    return n * (1 / 2 + 1 / blocksize + 4 / (blocksize * 256))
