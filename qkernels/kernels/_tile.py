"""What the kernels share: a program's blocks, the reciprocal of the scale, and the scale itself, decoded where it is
stored in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ..format import SMALLEST_NORMAL

_SMALLEST_NORMAL = tl.constexpr(SMALLEST_NORMAL)


@triton.jit
def tile_of_blocks(n, n_bytes, QUANT_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What a program has of n elements in n_bytes: its first quantization block, int64, and how many elements and how
    many bytes are left from there, int32, at most ROWS blocks: addresses are a 64-bit start and 32-bit offsets."""
    first_block = tl.program_id(0).to(tl.int64) * ROWS
    remaining = tl.minimum(n - first_block * QUANT_BLOCK, ROWS * QUANT_BLOCK).to(tl.int32)
    # Not computed from `remaining`: as an argument of its own its divisibility by 16 is known, and with it that whole
    # vectors are inside or outside.
    HALF: tl.constexpr = QUANT_BLOCK // 2
    remaining_bytes = tl.minimum(n_bytes - first_block * HALF, ROWS * HALF).to(tl.int32)
    return first_block, remaining, remaining_bytes


@triton.jit
def flush_subnormal(x):
    """Non-negative float32 with subnormals set to zero, as the GPU does in flush-to-zero mode."""
    return tl.where(x < _SMALLEST_NORMAL, 0.0, x)


@triton.jit
def reciprocal(absmax, USE_ASM: tl.constexpr):
    """1 / absmax as bitsandbytes takes it: the approximate instruction, at most one ulp off, flushing to zero.

    The twin without inline assembly is for the interpreter; it is exact, so a float32 weight may change its index about
    three times in ten million per ulp.
    """
    if USE_ASM:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [absmax], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = flush_subnormal(1.0 / absmax)
    return inverse


@triton.jit
def lane_id():
    """This thread's number within its warp, a scalar to Triton though it differs between threads (no interpreter)."""
    return tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_absmax(
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    offs_block,
    mask,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """Float32 scales of the quantization blocks `offs_block`.

    Nested scales decode with two roundings, product then sum, so a kernel that calls this is compiled without
    contraction to FMA (`enable_fp_fusion=False`).
    """
    if NESTED:
        index = tl.load(absmax_8bit_ptr + offs_block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax_ptr + offs_block // NESTED_BLOCK, mask=mask, other=0.0)
        absmax = tl.load(absmax_code_ptr + index) * scale + tl.load(absmax_offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + offs_block, mask=mask, other=0.0)
    return absmax
