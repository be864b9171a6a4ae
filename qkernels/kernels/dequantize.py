"""Decode packed 4-bit codes to float32, float16 or bfloat16 in one launch, 8-bit scales included.

A program takes ROWS quantization blocks: one scale a row, two table look-ups a byte, and the two results of a byte
side by side in the store.  Bytes moved: 1/2 + itemsize + 4/blocksize an element, with double quantization
1/2 + itemsize + 1/blocksize + 4/(256 blocksize).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import NESTED_BLOCKSIZE, code_table
from ..tuning import LaunchConfig
from ._tile import load_absmax


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
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = QUANT_BLOCK // 2
    offs_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_block = offs_block * QUANT_BLOCK < n
    absmax = load_absmax(
        absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, offs_block, mask_block, NESTED, NESTED_BLOCK
    )[:, None]
    offs_byte = offs_block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + offs_byte, mask=offs_byte * 2 < n, other=0).to(tl.int32)
    even = tl.load(code_ptr + (packed >> 4)) * absmax
    odd = tl.load(code_ptr + (packed & 15)) * absmax
    offs_out = offs_byte[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(out_ptr + offs_out, tl.join(even, odd).to(out_ptr.dtype.element_ty), mask=offs_out < n)


def dequantize_4bit_triton(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    out: torch.Tensor,
    absmax_8bit: torch.Tensor | None,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    config: LaunchConfig,
) -> None:
    """Launch the kernel into `out`, contiguous.

    Args:
        A: packed codes, contiguous, any storage dtype.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
    """
    n = out.numel()
    _dequantize_4bit_kernel[(triton.cdiv(n, blocksize * config.rows),)](
        A.view(torch.uint8),
        absmax,
        absmax_8bit,
        absmax_code,
        absmax_offset,
        code_table(quant_type, A.device),
        out,
        n,
        NESTED=absmax_8bit is not None,
        NESTED_BLOCK=NESTED_BLOCKSIZE,
        QUANT_BLOCK=blocksize,
        ROWS=config.rows,
        num_warps=config.num_warps,
        # The nested scale is rounded after its product and again after its sum.
        enable_fp_fusion=False,
    )
