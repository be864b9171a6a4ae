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


# 32 elements a thread: enough loads in flight to cover memory latency, few enough registers (four float32 copies of
# them are alive in the quantizer) not to spill at 65,536 registers a multiprocessor.
_ELEMENTS_PER_THREAD = 32
_NUM_WARPS = 4


def elementwise_config(blocksize: int) -> LaunchConfig:
    """Configuration of the quantize and dequantize kernels, 4-bit and 8-bit.

    Args:
        blocksize: quantization block, 32 to 4096; a program takes whole blocks, so a block of 4096 is the largest tile.
    """
    tile = _ELEMENTS_PER_THREAD * 32 * _NUM_WARPS
    return LaunchConfig(rows=max(1, tile // blocksize), num_warps=_NUM_WARPS)
