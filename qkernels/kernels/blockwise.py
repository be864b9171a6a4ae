"""The 8-bit blockwise pair: any ascending 256-entry map, one float32 scale a block.

It carries the scales of double quantization, a 64th of the data or less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..format import block_count
from ..tuning import LaunchConfig
from ._launch import Launcher
from ._tile import flush_subnormal, lane_id, reciprocal

_LANES = tl.constexpr(32)


def _assembly() -> str:
    """The index of a scaled element: $0 = index, $1 = element, $2 to $9 this lane's midpoints.

    Lane l holds the midpoints of codes 8l..8l+7 with their successors.  Five steps over the lanes' last midpoints find
    the lane, and seven comparisons with the others of that lane the place in it.  Half way goes up from an odd index
    and down from an even one, and the parity of a code is that of its place in its lane.
    """
    lines = [".reg .b32 lane, step, place;", ".reg .f32 middle;", ".reg .pred above;", "mov.b32 lane, 0;"]
    for bit in (16, 8, 4, 2, 1):
        lines += [
            f"add.s32 step, lane, {bit - 1};",
            "shfl.sync.idx.b32 middle, $9, step, 31, 0xffffffff;",
            "setp.ge.f32 above, $1, middle;",
            f"@above add.s32 lane, lane, {bit};",
        ]
    lines.append("shl.b32 place, lane, 3;")
    for number in range(7):
        lines += [
            f"shfl.sync.idx.b32 middle, ${number + 2}, lane, 31, 0xffffffff;",
            f"setp.{'ge' if number % 2 else 'gt'}.f32 above, $1, middle;",
            "@above add.s32 place, place, 1;",
        ]
    lines.append("mov.b32 $0, place;")
    return "{\n" + "\n".join(lines) + "\n}"


_ASSEMBLY = tl.constexpr(_assembly())
_CONSTRAINTS = tl.constexpr("=r" + ",f" * 9)


@triton.jit
def _midpoint(code_ptr, lower):
    return (tl.load(code_ptr + lower) + tl.load(code_ptr + tl.minimum(lower + 1, 255))) * 0.5


@triton.jit
def nearest_index(scaled, code_ptr, USE_ASM: tl.constexpr):
    """Index of the nearest code; half way goes down from an even index and up from an odd one, NaN gives 0.

    By shuffles, with the map spread over the lanes of the warp: twelve, where bisecting it in memory takes sixteen
    loads that mostly conflict.  The twin without inline assembly is for the interpreter.
    """
    if USE_ASM:
        lane = lane_id()
        index = tl.inline_asm_elementwise(
            _ASSEMBLY,
            _CONSTRAINTS,
            [
                scaled,
                _midpoint(code_ptr, lane * 8),
                _midpoint(code_ptr, lane * 8 + 1),
                _midpoint(code_ptr, lane * 8 + 2),
                _midpoint(code_ptr, lane * 8 + 3),
                _midpoint(code_ptr, lane * 8 + 4),
                _midpoint(code_ptr, lane * 8 + 5),
                _midpoint(code_ptr, lane * 8 + 6),
                # Above the last code there is nothing.
                tl.where(lane == _LANES - 1, float("inf"), _midpoint(code_ptr, lane * 8 + 7)),
            ],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        index = tl.zeros_like(scaled).to(tl.int32)
        for bit in tl.static_range(7, -1, -1):
            upper = index + (1 << bit)
            middle = _midpoint(code_ptr, upper - 1)
            # The lower of the two is even in the last step only.
            above = scaled > middle if bit == 0 else scaled >= middle
            index = tl.where(above, upper, index)
    return index


@triton.jit
def _quantize_blockwise_kernel(
    x_ptr,
    code_ptr,
    out_ptr,
    absmax_ptr,
    offset_ptr,
    n,
    SUBTRACT: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    offs_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_x = offs_block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    mask_x = offs_x < n
    x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
    if SUBTRACT:
        # The tail stays zero, so that it changes no maximum.
        x = tl.where(mask_x, x - tl.load(offset_ptr), 0.0)
    absmax = flush_subnormal(tl.max(tl.abs(x), axis=1))
    index = nearest_index(x * reciprocal(absmax, USE_ASM)[:, None], code_ptr, USE_ASM)
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


_launch_quantize = Launcher(_quantize_blockwise_kernel, enable_fp_fusion=False)
_launch_dequantize = Launcher(_dequantize_blockwise_kernel, enable_fp_fusion=False)


def quantize_blockwise_triton(
    A: torch.Tensor, code: torch.Tensor, blocksize: int, offset: torch.Tensor | None, config: LaunchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the quantizer on A, contiguous, float32/float16/bfloat16, not empty; `code` float32[256] ascending.

    `offset`, a float32 scalar tensor or None, is subtracted from A first.

    Returns:
        uint8 indices of A's shape, and absmax float32[ceil(n/blocksize)].
    """
    n = A.numel()
    out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(block_count(n, blocksize), dtype=torch.float32, device=A.device)
    _launch_quantize(
        (-(-n // (blocksize * config.rows)), 1, 1),
        (A, code, out, absmax, offset),
        (n,),
        (offset is not None, blocksize, config.rows, A.is_cuda),
        config,
    )
    return out, absmax


def dequantize_blockwise_triton(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, out: torch.Tensor, config: LaunchConfig
) -> None:
    """Launch the decoder into `out`, contiguous and of A's shape; A uint8 contiguous, `code` float32[256]."""
    n = A.numel()
    _launch_dequantize(
        (-(-n // (blocksize * config.rows)), 1, 1), (A, absmax, code, out), (n,), (blocksize, config.rows), config
    )
