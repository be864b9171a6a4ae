"""Launch configurations: pure functions of the operation and its shape, nothing measured at run time.

Room: tables as reviewed Python.  No autotuning on the user's path: it stalls the first call and makes two runs differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class LaunchConfig(NamedTuple):
    """Attributes:
    rows: quantization blocks a program works on, a power of two.
    num_warps: warps a program.
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    rows: int
    num_warps: int
    max_registers: int | None = None


class _Tile(NamedTuple):
    """Elements and warps a program; where blocks are larger both grow to a whole block."""

    elements: int
    num_warps: int
    max_registers: int | None


# Bytes in flight decide, and one tile serves every GPU from Turing on.  By Little's law a T4 (40 multiprocessors, 320
# GB/s, about 0.6 us) needs 190 KB in flight, 4.8 KB a multiprocessor.  The 16-bit quantizer loads 64 bytes a thread and
# has 512 threads resident at 128 registers, 32 KB; the decoder loads 8 bytes a thread and has 1024 resident at 64
# registers, 8 KB, and its stores are four times its loads.
_TILES = {
    # 32 elements a thread.  Left to itself ptxas squeezes some variants into 32 or 64 registers and spills for it.
    "quantize_4bit": _Tile(4096, 4, 128),
    # 16 elements a thread, 8 bytes of codes to load and two 16-byte vectors of 16-bit values to store.
    "dequantize_4bit": _Tile(4096, 8, None),
    # 45 instructions an element, and the map spread over a warp's registers once a program: 16 elements a thread pay
    # for it; small programs, because it mostly runs on a 64th of the data.
    "quantize_blockwise": _Tile(2048, 4, 128),
    "dequantize_blockwise": _Tile(4096, 8, None),
}


# Elements and warps a program: 16 bytes of 16-bit values a thread.  One row is one element.
DROPOUT_CONFIG = LaunchConfig(1024, 4)


@lru_cache
def elementwise_config(op: str, blocksize: int) -> LaunchConfig:
    """Configuration of the quantize and dequantize kernels, 4-bit and 8-bit.

    Args:
        op: the operator's name.
        blocksize: quantization block, 32 to 4096; a program takes whole blocks.
    """
    tile = _TILES[op]
    rows = max(1, tile.elements // blocksize)
    return LaunchConfig(rows, tile.num_warps * (rows * blocksize // tile.elements), tile.max_registers)


@lru_cache
def partial_sums_config(ctas: int) -> LaunchConfig:
    """Configuration of the first half of the mean; rows are slots, one a thread where each CTA has a program.

    Args:
        ctas: in which torch would sum.  One CTA's 512 slots sum up to 64 vectors each, one after the other, so they are
            spread over 16 programs, a component a thread, for more loads in flight.
    """
    return LaunchConfig(512, 16) if ctas > 1 else LaunchConfig(32, 4)


@lru_cache
def norm_config(size: int) -> LaunchConfig:
    """Configuration of the normalization: a program holds a row, 8 elements a thread where 1,024 threads are enough.

    Args:
        size: of a row.
    """
    block = max(128, 1 << (size - 1).bit_length())
    return LaunchConfig(block, max(1, min(32, block // 256)))


@lru_cache
def token_attention_config(size: int, itemsize: int) -> LaunchConfig:
    """Configuration of a token's attention; rows are keys of a block, two of which a thread holds in 128 registers.

    Args:
        size: of a head.
        itemsize: bytes of an element.
    """
    return LaunchConfig(max(16, 32768 // itemsize >> (size - 1).bit_length()), 8)
