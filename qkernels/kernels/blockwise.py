"""The 8-bit blockwise pair: any ascending 256-entry map, one float32 scale a block.

It carries the scales of double quantization, a 64th of the data or less.  The quantizer bisects the map in global
memory (1 KiB, so in the first-level cache): eight steps of two loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import block_count
from ..tuning import LaunchConfig
from ._tile import flush_subnormal, reciprocal


@triton.jit
def nearest_index(scaled, code_ptr):
    """Index of the nearest code; half way goes down from an even index and up from an odd one, NaN gives 0."""
    index = tl.zeros_like(scaled).to(tl.int32)
    for bit in tl.static_range(7, -1, -1):
        upper = index + (1 << bit)
        lower = upper - 1
        middle = (tl.load(code_ptr + lower) + tl.load(code_ptr + upper)) * 0.5
        above = (scaled > middle) | ((scaled == middle) & (lower % 2 == 1))
        index = tl.where(above, upper, index)
    return index


@triton.jit
def _quantize_blockwise_kernel(
    x_ptr,
    code_ptr,
    out_ptr,
    absmax_ptr,
    n,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    offs_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_x = offs_block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    mask_x = offs_x < n
    x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
    absmax = flush_subnormal(tl.max(tl.abs(x), axis=1))
    index = nearest_index(x * reciprocal(absmax, USE_ASM)[:, None], code_ptr)
    tl.store(out_ptr + offs_x, index.to(tl.uint8), mask=mask_x)
    tl.store(absmax_ptr + offs_block, absmax, mask=offs_block * QUANT_BLOCK < n)


@triton.jit
def _dequantize_blockwise_kernel(
    x_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    n,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    offs_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_x = offs_block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    mask_x = offs_x < n
    absmax = tl.load(absmax_ptr + offs_block, mask=offs_block * QUANT_BLOCK < n, other=0.0)
    index = tl.load(x_ptr + offs_x, mask=mask_x, other=0).to(tl.int32)
    value = tl.load(code_ptr + index) * absmax[:, None]
    tl.store(out_ptr + offs_x, value.to(out_ptr.dtype.element_ty), mask=mask_x)


def quantize_blockwise_triton(
    A: torch.Tensor, code: torch.Tensor, blocksize: int, config: LaunchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the quantizer on A, contiguous, float32/float16/bfloat16, not empty; `code` float32[256] ascending.

    Returns:
        uint8 indices of A's shape, and absmax float32[ceil(n/blocksize)].
    """
    n = A.numel()
    out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(block_count(n, blocksize), dtype=torch.float32, device=A.device)
    _quantize_blockwise_kernel[(triton.cdiv(n, blocksize * config.rows),)](
        A,
        code,
        out,
        absmax,
        n,
        QUANT_BLOCK=blocksize,
        ROWS=config.rows,
        USE_ASM=A.is_cuda,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        enable_fp_fusion=False,
    )
    return out, absmax


def dequantize_blockwise_triton(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, out: torch.Tensor, config: LaunchConfig
) -> None:
    """Launch the decoder into `out`, contiguous and of A's shape; A uint8 contiguous, `code` float32[256]."""
    n = A.numel()
    _dequantize_blockwise_kernel[(triton.cdiv(n, blocksize * config.rows),)](
        A,
        absmax,
        code,
        out,
        n,
        QUANT_BLOCK=blocksize,
        ROWS=config.rows,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        enable_fp_fusion=False,
    )
