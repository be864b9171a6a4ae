"""Launch configurations: pure functions of the operation and its shape, nothing measured at run time.

Room: tables as reviewed Python.  No autotuning on the user's path: it stalls the first call and makes two runs differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Attributes:
    rows: quantization blocks a program works on, a power of two.
    num_warps: warps a program.
    """

    rows: int
    num_warps: int


# A tile of 4096 elements is the largest block, so every blocksize has the same tile.  Over 8 warps it is 16 elements a
# thread: two 16-byte loads of 16-bit weights in flight, and a quarter of the registers that would limit occupancy.
_TILE = 4096
_NUM_WARPS = 8


def elementwise_config(blocksize: int) -> LaunchConfig:
    """Configuration of the quantize and dequantize kernels, 4-bit and 8-bit.

    Args:
        blocksize: quantization block, 32 to 4096; a program takes whole blocks.
    """
    return LaunchConfig(rows=_TILE // blocksize, num_warps=_NUM_WARPS)
