"""The 8-bit blockwise pair: any ascending 256-entry map, one float32 scale a block.

It carries the scales of double quantization, a 64th of the data or less, and finishes their mean (`mean.py`).
"""

from __future__ import annotations

from bisect import bisect_left

import torch
import triton
import triton.language as tl

from ..format import block_count
from ..tuning import LaunchConfig
from ._launch import Launcher
from ._tile import flush_subnormal, lane_id, reciprocal
from .mean import CAPACITIES, finish_mean

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
# $0 to $7 = this lane's eight codes, $8 = the first of the next lane's; $9 = their address.
_LOAD_CODES = tl.constexpr(
    "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$9]; ld.global.nc.v4.f32 {$4, $5, $6, $7}, [$9 + 16];"
    "shfl.sync.down.b32 $8, $0, 1, 31, 0xffffffff;"
)
_CONSTRAINTS = tl.constexpr("=r" + ",f" * 9)


@triton.jit
def _midpoint(code_ptr, lower):
    return (tl.load(code_ptr + lower) + tl.load(code_ptr + tl.minimum(lower + 1, 255))) * 0.5


@triton.jit
def _nearest_by_shuffles(scaled, code_ptr):
    """The map is spread over the lanes of the warp: twelve shuffles, where bisecting it in memory takes sixteen loads
    that mostly conflict."""
    lane = lane_id()
    c0, c1, c2, c3, c4, c5, c6, c7, after = tl.inline_asm_elementwise(
        _LOAD_CODES,
        "=f,=f,=f,=f,=f,=f,=f,=f,=f,l",
        [(code_ptr + lane * 8).to(tl.int64)],
        dtype=(tl.float32,) * 9,
        is_pure=True,
        pack=1,
    )
    return tl.inline_asm_elementwise(
        _ASSEMBLY,
        _CONSTRAINTS,
        [
            scaled,
            (c0 + c1) * 0.5,
            (c1 + c2) * 0.5,
            (c2 + c3) * 0.5,
            (c3 + c4) * 0.5,
            (c4 + c5) * 0.5,
            (c5 + c6) * 0.5,
            (c6 + c7) * 0.5,
            # Above the last code there is nothing.
            tl.where(lane == _LANES - 1, float("inf"), (c7 + after) * 0.5),
        ],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def nearest_index(scaled, code_ptr, USE_ASM: tl.constexpr):
    """Index of the nearest code; half way goes down from an even index and up from an odd one, NaN gives 0.

    The twin without inline assembly is for the interpreter.
    """
    if USE_ASM:
        index = _nearest_by_shuffles(scaled, code_ptr)
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
    sums_ptr,
    mean_ptr,
    n,
    n_sums,
    divisor,
    SUMS: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """SUMS: how many numbers there may be in `sums_ptr`, whose mean is subtracted first; 0 is none."""
    offs_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_x = offs_block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    mask_x = offs_x < n
    x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0).to(tl.float32)
    if SUMS:
        mean = finish_mean(sums_ptr, n_sums, divisor, SUMS, USE_ASM)
        if tl.program_id(0) == 0:
            tl.store(mean_ptr, mean)
        # The tail stays zero, so that it changes no maximum.
        x = tl.where(mask_x, x - mean, 0.0)
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
    A: torch.Tensor, code: torch.Tensor, blocksize: int, config: LaunchConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the quantizer on A, contiguous, float32/float16/bfloat16, not empty.

    Args:
        code: float32[256] ascending, aligned to 16 bytes.

    Returns:
        uint8 indices of A's shape, and absmax float32[ceil(n/blocksize)].
    """
    return _quantize(A, code, blocksize, (None, None), (1, 1), 0, config)


def quantize_scales_triton(
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    sums: torch.Tensor,
    divisor: int,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the quantizer on absmax, float32 and contiguous, less its mean.

    Args:
        sums: float32, at most 1024: the mean is their tree divided by `divisor` (`finish_mean`).

    Returns:
        as `quantize_blockwise_triton`, and the mean, a float32 scalar.
    """
    mean = absmax.new_empty(())
    n_sums = sums.numel()
    capacity = CAPACITIES[bisect_left(CAPACITIES, n_sums)]
    return *_quantize(absmax, code, blocksize, (sums, mean), (n_sums, divisor), capacity, config), mean


def _quantize(
    A: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    sums_and_mean: tuple[torch.Tensor | None, torch.Tensor | None],
    n_sums_and_divisor: tuple[int, int],
    capacity: int,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = A.numel()
    out = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(block_count(n, blocksize), dtype=torch.float32, device=A.device)
    _launch_quantize(
        (-(-n // (blocksize * config.rows)), 1, 1),
        (A, code, out, absmax, *sums_and_mean),
        (n, *n_sums_and_divisor),
        (capacity, blocksize, config.rows, A.is_cuda),
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
