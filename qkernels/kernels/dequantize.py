"""Decode packed 4-bit codes to float32, float16 or bfloat16 in one launch, 8-bit scales included.

A program takes ROWS quantization blocks: one scale a row, two table look-ups a byte, and the two results of a byte
side by side in the store.  A look-up is a shuffle: each lane of a warp holds a value of the table.  Bytes moved:
1/2 + itemsize + 4/blocksize an element, with double quantization 1/2 + itemsize + 1/blocksize + 4/(256 blocksize).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import NESTED_BLOCKSIZE, code_table, packed_length
from ..tuning import LaunchConfig
from ._launch import Launcher
from ._tile import lane_id, load_absmax, tile_of_blocks


def _assembly() -> str:
    """The values of four bytes: $0 to $3 of the high nibbles, $4 to $7 of the low ones; $8 the bytes, $9 this lane's
    value of the table (given once for each of the four).

    Each lane holds the value of its number modulo 16.  A shuffle reads the five low bits of the lane that it is given:
    a nibble and one bit more, which makes no difference.
    """
    lines = [".reg .b32 place;"]
    for byte in range(4):
        for nibble, output in ((4, byte), (0, byte + 4)):
            lines += [
                f"shr.u32 place, $8, {8 * byte + nibble};",
                f"shfl.sync.idx.b32 ${output}, $9, place, 31, 0xffffffff;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


_ASSEMBLY = tl.constexpr(_assembly())
_CONSTRAINTS = tl.constexpr("=f," * 8 + "r,f,f,f,f")


@triton.jit
def _look_up(packed, code_ptr, USE_ASM: tl.constexpr):
    """Values of the high and of the low nibbles of bytes.  The twin without inline assembly is for the interpreter."""
    if USE_ASM:
        even, odd = tl.inline_asm_elementwise(
            _ASSEMBLY,
            _CONSTRAINTS,
            [packed, tl.load(code_ptr + (lane_id() & 15))],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        index = packed.to(tl.int32)
        even, odd = tl.load(code_ptr + (index >> 4)), tl.load(code_ptr + (index & 15))
    return even, odd


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    code_ptr,
    out_ptr,
    n,
    n_bytes,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    HALF: tl.constexpr = QUANT_BLOCK // 2
    first_block, remaining, remaining_bytes = tile_of_blocks(n, n_bytes, QUANT_BLOCK, ROWS)
    row = tl.arange(0, ROWS)
    absmax = load_absmax(
        absmax_ptr,
        absmax_8bit_ptr,
        absmax_code_ptr,
        absmax_offset_ptr,
        first_block + row,
        row * QUANT_BLOCK < remaining,
        NESTED,
        NESTED_BLOCK,
    )[:, None]
    offs_byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + first_block * HALF + offs_byte, mask=offs_byte < remaining_bytes, other=0)
    even, odd = _look_up(packed, code_ptr, USE_ASM)
    values = tl.join(even * absmax, odd * absmax).reshape(ROWS, QUANT_BLOCK).to(out_ptr.dtype.element_ty)
    offs_out = row[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    # Whatever decodes a weight reads it next: a large part of a small one is still in the L2 cache then.
    out_ptr += first_block * QUANT_BLOCK
    tl.store(out_ptr + offs_out, values, mask=offs_out < remaining, eviction_policy="evict_last")


_launch = Launcher(_dequantize_4bit_kernel, views={0: torch.uint8}, enable_fp_fusion=False)


def dequantize_4bit_triton(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    out: torch.Tensor,
    config: LaunchConfig,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> None:
    """Launch the kernel into `out`, contiguous.

    Args:
        A: packed codes, contiguous, any storage dtype.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
    """
    n = out.numel()
    _launch(
        (-(-n // (blocksize * config.rows)), 1, 1),
        (A, absmax, absmax_8bit, absmax_code, absmax_offset, code_table(quant_type, A.device), out),
        (n, packed_length(n)),
        (absmax_8bit is not None, NESTED_BLOCKSIZE, blocksize, config.rows, A.is_cuda),
        config,
    )
