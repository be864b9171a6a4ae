"""Quantize a tensor to packed 4-bit codes and float32 scales, reading it once.

A program takes ROWS quantization blocks, so that the maximum of a block never leaves it.
Bytes moved: itemsize + 1/2 + 4/blocksize an element.

The decision is in `_encode.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import block_count, packed_length
from ..tuning import LaunchConfig
from ._encode import bucket_table, encode_pairs
from ._launch import Launcher
from ._tile import flush_subnormal, reciprocal, tile_of_blocks


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
    n,
    n_bytes,
    NF4: tl.constexpr,
    PROPAGATE_NAN: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    HALF: tl.constexpr = QUANT_BLOCK // 2
    first_block, remaining, remaining_bytes = tile_of_blocks(n, n_bytes, QUANT_BLOCK, ROWS)
    row = tl.arange(0, ROWS)
    offs_x = row[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    # The tail reads zeros, which change no maximum and encode to the zero index.
    x = tl.load(x_ptr + first_block * QUANT_BLOCK + offs_x, mask=offs_x < remaining, other=0.0).to(tl.float32)
    if PROPAGATE_NAN:
        # The bits of magnitudes are ordered as the magnitudes are, with NaN above all.
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        absmax = flush_subnormal(bits.to(tl.float32, bitcast=True))
    else:
        # maximum() without NaN propagation: NaN elements are skipped here and encode to index 0 below.
        absmax = flush_subnormal(tl.max(tl.abs(x), axis=1))
    # An all-zero block is multiplied by zero, not by infinity, which would make NaN of it and so index 0, -1 in NF4.
    inverse = tl.where(absmax == 0.0, 0.0, reciprocal(absmax, USE_ASM))[:, None]
    even, odd = tl.split((x * inverse).reshape(ROWS, HALF, 2))
    packed = encode_pairs(even, odd, table_ptr, NF4, USE_ASM)
    offs_byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + first_block * HALF + offs_byte, packed, mask=offs_byte < remaining_bytes)
    tl.store(absmax_ptr + first_block + row, absmax, mask=row * QUANT_BLOCK < remaining)


_launch = Launcher(_quantize_4bit_kernel, views={1: torch.uint8}, enable_fp_fusion=False)


def quantize_4bit_triton(
    A: torch.Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    propagate_nan: bool,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on A, contiguous, float32/float16/bfloat16, not empty.

    Returns:
        packed [ceil(ceil(n/2) / itemsize), 1] of `quant_storage`, and absmax float32[ceil(n/blocksize)].
    """
    n = A.numel()
    length = packed_length(n, quant_storage)
    packed = torch.empty((length, 1), dtype=quant_storage, device=A.device)
    if length * packed.element_size() != packed_length(n):
        # Bytes that only fill up the last storage element are not the kernel's: it stores whole bytes of elements.
        packed.view(torch.uint8).view(-1)[packed_length(n) :].zero_()
    absmax = torch.empty(block_count(n, blocksize), dtype=torch.float32, device=A.device)
    _launch(
        (-(-n // (blocksize * config.rows)), 1, 1),
        (A, packed, absmax, bucket_table(quant_type, A.device)),
        (n, packed_length(n)),
        (quant_type == "nf4", propagate_nan, blocksize, config.rows, A.is_cuda),
        config,
    )
    return packed, absmax
