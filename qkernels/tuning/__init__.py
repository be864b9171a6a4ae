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
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    rows: int
    num_warps: int
    max_registers: int | None = None


# A tile of 4096 elements is the largest block, so every blocksize has the same tile.  Over 8 warps it is 16 elements a
# thread: two 16-byte loads of 16-bit weights in flight, and a quarter of the registers that would limit occupancy.
_TILE = 4096
_NUM_WARPS = 8


# Left to itself ptxas squeezes some variants of the quantizers into 32 or 64 registers and spills a few bytes for it.
# With limits of 40 and 48 others spill, with 64 none does, and four programs of 8 warps fit a multiprocessor.  The
# 8-bit quantizer bisects, needs up to 88, and runs on a 64th of the data.  `python -m qkernels.aot` shows each variant.
_MAX_REGISTERS = {"quantize_4bit": 64, "quantize_blockwise": 128}


def elementwise_config(op: str, blocksize: int) -> LaunchConfig:
    """Configuration of the quantize and dequantize kernels, 4-bit and 8-bit.

    Args:
        op: the operator's name.
        blocksize: quantization block, 32 to 4096; a program takes whole blocks.
    """
    return LaunchConfig(_TILE // blocksize, _NUM_WARPS, _MAX_REGISTERS.get(op))
