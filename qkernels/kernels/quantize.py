"""Quantize a tensor to packed 4-bit codes and float32 scales, reading it once.

A program takes ROWS quantization blocks, so that the maximum of a block never leaves it.
Bytes moved: itemsize + 1/2 + 4/blocksize an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import FP4_THRESHOLDS, NF4_THRESHOLDS, ZERO_INDEX, block_count, packed_length
from ..tuning import LaunchConfig
from ._tile import flush_subnormal, reciprocal

_NF4 = tl.constexpr(NF4_THRESHOLDS)
_FP4 = tl.constexpr(FP4_THRESHOLDS)
_NF4_ZERO = tl.constexpr(ZERO_INDEX["nf4"])
_FP4_ZERO = tl.constexpr(ZERO_INDEX["fp4"])


@triton.jit
def nf4_index(x):
    """How many of the fifteen thresholds lie strictly below x, by bisection: four comparisons, NaN gives 0."""
    b3 = x > _NF4[7]
    b2 = x > tl.where(b3, _NF4[11], _NF4[3])
    b1 = x > tl.where(b3, tl.where(b2, _NF4[13], _NF4[9]), tl.where(b2, _NF4[5], _NF4[1]))
    low = tl.where(b2, tl.where(b1, _NF4[6], _NF4[4]), tl.where(b1, _NF4[2], _NF4[0]))
    high = tl.where(b2, tl.where(b1, _NF4[14], _NF4[12]), tl.where(b1, _NF4[10], _NF4[8]))
    b0 = x > tl.where(b3, high, low)
    return b3.to(tl.int32) * 8 + b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)


@triton.jit
def fp4_index(x):
    """Bit pattern of the nearest FP4 value: rank of the magnitude by bisection, then the pattern of that rank."""
    magnitude = tl.abs(x)
    b2 = magnitude > _FP4[3]
    b1 = magnitude > tl.where(b2, _FP4[5], _FP4[1])
    b0 = magnitude > tl.where(b2, tl.where(b1, _FP4[6], _FP4[4]), tl.where(b1, _FP4[2], _FP4[0]))
    rank = b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)
    # Ranks 0..7 are patterns 0 1 6 7 4 5 2 3: where bit 1 is set, bit 2 is flipped.
    return (rank ^ ((rank & 2) * 2)) + (x < 0.0).to(tl.int32) * 8


@triton.jit
def encode(x, inverse, is_zero, NF4: tl.constexpr):
    scaled = x * inverse
    if NF4:
        index = tl.where(is_zero, _NF4_ZERO, nf4_index(scaled))
    else:
        index = tl.where(is_zero, _FP4_ZERO, fp4_index(scaled))
    return index


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    n_bytes,
    NF4: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    HALF: tl.constexpr = QUANT_BLOCK // 2
    # Addresses: a 64-bit start of the tile, and 32-bit offsets within it.
    first_block = tl.program_id(0).to(tl.int64) * ROWS
    remaining = tl.minimum(n - first_block * QUANT_BLOCK, ROWS * QUANT_BLOCK).to(tl.int32)
    # Not computed from `remaining`: as an argument of its own its divisibility by 16 is known, and with it that whole
    # vectors are inside or outside.
    remaining_bytes = tl.minimum(n_bytes - first_block * HALF, ROWS * HALF).to(tl.int32)
    row = tl.arange(0, ROWS)
    offs_x = row[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    # The tail reads zeros, which change no maximum and encode to the zero index.
    x = tl.load(x_ptr + first_block * QUANT_BLOCK + offs_x, mask=offs_x < remaining, other=0.0).to(tl.float32)
    # maximum() without NaN propagation: NaN elements are skipped here and encode to index 0 below.
    absmax = flush_subnormal(tl.max(tl.abs(x), axis=1))
    inverse = reciprocal(absmax, USE_ASM)[:, None]
    is_zero = (absmax == 0.0)[:, None]
    even, odd = tl.split(encode(x, inverse, is_zero, NF4).reshape(ROWS, HALF, 2))
    offs_byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = ((even << 4) | odd).to(tl.uint8)
    tl.store(packed_ptr + first_block * HALF + offs_byte, packed, mask=offs_byte < remaining_bytes)
    tl.store(absmax_ptr + first_block + row, absmax, mask=row * QUANT_BLOCK < remaining)


def quantize_4bit_triton(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, config: LaunchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on A, contiguous, float32/float16/bfloat16, not empty.

    Returns:
        packed [ceil(ceil(n/2) / itemsize), 1] of `quant_storage`, and absmax float32[ceil(n/blocksize)].
    """
    n = A.numel()
    length = packed_length(n, quant_storage)
    packed = torch.empty((length, 1), dtype=quant_storage, device=A.device)
    packed_bytes = packed.view(torch.uint8)
    # Bytes that only fill up the last storage element are not the kernel's: it stores whole bytes of elements.
    packed_bytes.view(-1)[packed_length(n) :].zero_()
    absmax = torch.empty(block_count(n, blocksize), dtype=torch.float32, device=A.device)
    _quantize_4bit_kernel[(triton.cdiv(n, blocksize * config.rows),)](
        A,
        packed_bytes,
        absmax,
        n,
        packed_length(n),
        NF4=quant_type == "nf4",
        QUANT_BLOCK=blocksize,
        ROWS=config.rows,
        USE_ASM=A.is_cuda,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return packed, absmax
