"""Quantize a tensor to packed 4-bit codes and float32 scales, reading it once.

A program takes ROWS quantization blocks, so that the maximum of a block never leaves it.
Bytes moved: itemsize + 1/2 + 4/blocksize an element.

The decision is a table look-up and one comparison, and exact: [-1, 1] is cut into 33 buckets of 1/16, narrower than the
least distance of two thresholds, so that a bucket holds one at most.  The table gives that threshold, and how many lie
below the bucket.  A tree of comparisons takes twice the instructions, and these are what limits the kernel.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from ..format import FP4_THRESHOLDS, NF4_THRESHOLDS, block_count, packed_length
from ..tuning import LaunchConfig
from ._tile import flush_subnormal, reciprocal

_BUCKETS = tl.constexpr(16.0)  # in a unit interval
# Adding it rounds to the nearest integer, which then stands in the low bits of the mantissa: 1.5 * 2^23, and 16 more to
# make the number of the bucket of -1 zero.
_ROUND = tl.constexpr(12582912.0 + 16.0)
_TABLE_SIZE = 64  # the low six bits; NaN has them all set, or none, and both ends of the table say index 0
_TABLES: dict[tuple[str, torch.device], torch.Tensor] = {}


def bucket_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """int64[64] on `device`: a bucket's threshold (float32 bits, infinity if none) above, the rank below it beneath."""
    table = _TABLES.get((quant_type, device))
    if table is None:
        thresholds = torch.tensor(
            NF4_THRESHOLDS if quant_type == "nf4" else FP4_THRESHOLDS, dtype=torch.float32
        ).tolist()
        buckets = [round(16 * threshold) + 16 for threshold in thresholds]
        assert len(set(buckets)) == len(buckets)
        entries = []
        for bucket in range(_TABLE_SIZE):
            inside = thresholds[buckets.index(bucket)] if bucket in buckets else torch.inf
            below = sum(other < bucket for other in buckets) if bucket <= 32 else 0
            entries.append(struct.unpack("<i", struct.pack("<f", inside))[0] << 32 | below)
        table = torch.tensor(entries, dtype=torch.int64, device=device)
        _TABLES[quant_type, device] = table
    return table


@triton.jit
def rank(x, table_ptr):
    """How many thresholds lie strictly below x, for |x| <= 1; NaN gives 0."""
    bucket = tl.fma(x, _BUCKETS, _ROUND).to(tl.int32, bitcast=True) & 63
    entry = tl.load(table_ptr + bucket)
    threshold = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return entry.to(tl.int32) + (x > threshold).to(tl.int32)


@triton.jit
def encode(scaled, table_ptr, NF4: tl.constexpr):
    """The 4-bit index of a scaled element."""
    if NF4:
        index = rank(scaled, table_ptr)
    else:
        magnitude_rank = rank(tl.abs(scaled), table_ptr)
        # Ranks 0..7 are patterns 0 1 6 7 4 5 2 3: where bit 1 is set, bit 2 is flipped.
        index = (magnitude_rank ^ ((magnitude_rank & 2) * 2)) + (scaled < 0.0).to(tl.int32) * 8
    return index


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    table_ptr,
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
    # An all-zero block is multiplied by zero, not by infinity, which would make NaN of it and so index 0, -1 in NF4.
    inverse = tl.where(absmax == 0.0, 0.0, reciprocal(absmax, USE_ASM))[:, None]
    even, odd = tl.split(encode(x * inverse, table_ptr, NF4).reshape(ROWS, HALF, 2))
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
        bucket_table(quant_type, A.device),
        n,
        packed_length(n),
        NF4=quant_type == "nf4",
        QUANT_BLOCK=blocksize,
        ROWS=config.rows,
        USE_ASM=A.is_cuda,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        enable_fp_fusion=False,
    )
    return packed, absmax
