"""The 4-bit product on Hopper's tensor cores for tens to hundreds of rows, y = x W^T and backward dx = dy W.

The transposed product is computed, out^T[R, M] = W x^T (backward: W^T dy^T), because a wgmma instruction may take its
first operand from registers: a thread decodes W straight into its fragment of the operand, and no decoded weight is
written anywhere.  x comes into shared memory by TMA as the second operand.  The contraction goes in steps of 64, one
quantization block of W's row, so a step has one scale a row.

A wgmma with an operand in registers keeps its warps at the instruction until the operand is read.  So two warp groups
take turns: every step has two barriers, one before decoding and one before multiplying, and the second group runs one
barrier behind the first.  One decodes while the other multiplies.

Tiles of the output that do not fill the GPU's multiprocessors evenly are split along the contraction, in `parts` of
equal length, which a second kernel adds in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..format import NESTED_BLOCKSIZE
from ..tuning import LaunchConfig
from ..tuning.wgmma import WgmmaConfig
from ._adapter import add_adapter, inner_memory, store_inner
from ._launch import Launcher
from ._wgmma import (
    TAKE_TURNS,
    W_STAGES,
    block_barrier,
    code_unit,
    copy_bytes,
    decode_columns,
    decode_rows,
    decoding,
    half_a_turn,
    in_order_of_k,
    lanes_layout,
    load_scales,
    load_tile,
    look_up,
    packed_memory,
    scaling_layout,
    storing_layout,
    sum_parts_kernel,
)

W_AHEAD = gl.constexpr(7)  # steps between asking for W and decoding it: its copies come from DRAM


@gluon.jit
def _store_tile(acc, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS: gl.constexpr, layout: gl.constexpr):
    """Write to out[M, R], with the bias."""
    r = row0 + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    m = column0 + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    value = gl.convert_layout(acc, layout)
    if HAS_BIAS:
        value += gl.load(bias_ptr + r, mask=r < R, other=0.0).to(gl.float32)[:, None]
    at = out_ptr + m.to(gl.int64)[None, :] * R + r[:, None]
    gl.store(at, value.to(out_ptr.dtype.element_ty), mask=(r < R)[:, None] & (m < M)[None, :])


@gluon.jit
def _store_part(acc, parts_ptr, part, layout: gl.constexpr):
    """Write float32[COLUMNS, ROWS] at its place among the parts."""
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))[None, :]
    start = parts_ptr + part.to(gl.int64) * (acc.shape[0] * acc.shape[1])
    gl.store(start + column * acc.shape[0] + row, gl.convert_layout(acc, layout))


@gluon.jit(do_not_specialize=["M", "whole_tiles", "parts", "part_steps", "r"])
def _matmul_wgmma_kernel(
    x_desc,
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    w_ptr,
    inner_ptr,
    M,
    N,
    K,
    whole_tiles,
    parts,
    part_steps,
    r,
    BACKWARD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    QUANT_TYPE: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    RANK: gl.constexpr,
    INNER_PARTS: gl.constexpr,
):
    DTYPE: gl.constexpr = x_desc.dtype
    WARPS: gl.constexpr = ROWS // 16
    GROUPS: gl.constexpr = ROWS // 64
    PER_SCALE: gl.constexpr = QUANT_BLOCK // 64
    blocks = K // 64  # of 64 weights a row of W
    R = K if BACKWARD else N
    all_steps = (N + 63) // 64 if BACKWARD else blocks

    # The unit: a whole tile, or a part of one of the tiles after those.
    unit = gl.program_id(0)
    whole = unit < whole_tiles
    tile = unit
    first = 0
    steps = all_steps
    if not whole:
        unit = unit - whole_tiles
        tile = whole_tiles + unit // parts
        first = unit % parts * part_steps
        steps = gl.minimum(part_steps, all_steps - first)
    turns = gl.maximum((steps + STAGES - 1) // STAGES, 1)
    tiles_of_columns = (M + COLUMNS - 1) // COLUMNS
    row0 = tile // tiles_of_columns * ROWS
    column0 = tile % tiles_of_columns * COLUMNS

    # One allocation a stage, so that Gluon sees which of them an instruction touches and adds no barrier.
    xs = ()
    arrived = ()
    for _ in gl.static_range(STAGES):
        xs += (gl.allocate_shared_memory(DTYPE, [COLUMNS, 64], x_desc.layout),)  # type: ignore[assignment]
        arrived += (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)  # type: ignore[assignment]
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived[s], count=1)
    fence_async_shared()
    block_barrier()
    for s in gl.static_range(STAGES - 2):
        mbarrier.expect(arrived[s], COLUMNS * 128)
        load_tile(x_desc, [column0, (first + s) * 64], arrived[s], xs[s])

    # A thread's place in W's bytes of a step: what it copies, and where its warp reads.
    lanes: gl.constexpr = lanes_layout(ROWS)
    group = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, lanes))))[:, None, None, None]
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, lanes))))[None, :, None, None]
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, lanes))))[None, None, :, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, lanes))))[None, None, None, :]
    lane = g * 4 + t
    row_bytes = blocks * 32
    ws = packed_memory()
    if BACKWARD:
        line = warp * 16 + lane // 2  # of 64 rows n, in which a group has 32 bytes
        chunk = group * 2 + lane % 2
        target = ws + line * (32 * GROUPS) + (chunk ^ (line // 2 & 3)) * 16
        copied = packed_ptr + (first * 64 + line).to(gl.int64) * row_bytes + (row0 // 2 + chunk * 16)
        copies = row0 // 2 + chunk * 16 < row_bytes
        line += first * 64
        read = ws + lane * (32 * GROUPS) + ((group * 2 + warp // 2) ^ (lane // 2 & 3)) * 16
        chosen = gl.where(warp % 2 == 1, 0x7531, 0x6420) + gl.zeros_like(read)
    else:
        line = group * 64 + warp * 16 + lane // 2
        chunk = lane % 2
        target = ws + line * 32 + (chunk ^ (line // 4 & 1)) * 16
        copied = packed_ptr + (row0 + line).to(gl.int64) * row_bytes + (first * 32 + chunk * 16)
        copies = row0 + line < N
        read = ws + (group * 64 + warp * 16 + g) * 32 + (g // 4) * 16
        chosen = 0x40 + 0x11 * t + gl.zeros_like(read)
        read = read + gl.zeros_like(chosen)
    step_bytes = row_bytes.to(gl.int64) * 64 if BACKWARD else 32
    LINES: gl.constexpr = 64 if BACKWARD else 0  # rows of W from step to step
    W_BYTES: gl.constexpr = 32 * ROWS
    for s in gl.static_range(W_AHEAD):
        wanted = copies & (s < steps)
        if BACKWARD:
            wanted = wanted & (line + s * LINES < N)
        copy_bytes(target + s * W_BYTES, copied + s * step_bytes, wanted)

    # Scales of STAGES steps at a time, [rows of n, blocks of k], are loaded, looked up and stored in three stages.
    scaling: gl.constexpr = scaling_layout(ROWS, STAGES, BACKWARD)
    scales = gl.allocate_shared_memory(
        gl.float32,
        [2, STAGES * 64 if BACKWARD else ROWS, GROUPS if BACKWARD else STAGES],
        gl.SwizzledSharedLayout(1, 1, 1, [0, 1]),
    )
    n = gl.arange(0, STAGES * 64 if BACKWARD else ROWS, gl.SliceLayout(1, scaling))[:, None]
    block = gl.arange(0, GROUPS if BACKWARD else STAGES, gl.SliceLayout(0, scaling))[None, :]
    if BACKWARD:
        n += first * 64
        block += row0 // 64
    else:
        n += row0
        block += first
    n_turn: gl.constexpr = STAGES * 64 if BACKWARD else 0
    block_turn: gl.constexpr = 0 if BACKWARD else STAGES
    n_end = gl.minimum(N, (first + steps) * 64) if BACKWARD else N
    block_end = blocks if BACKWARD else first + steps
    offset = 0.0
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
    index, stored = load_scales(
        absmax_ptr,
        absmax_8bit_ptr,
        (n * blocks + block) // PER_SCALE,
        (n < n_end) & (block < block_end),
        NESTED,
        NESTED_BLOCK,
    )
    code = look_up(absmax_code_ptr, index, NESTED)
    asm: gl.constexpr = decoding(QUANT_TYPE, DTYPE, BACKWARD)
    unit_of_code: gl.constexpr = code_unit(QUANT_TYPE)
    scales.index(0).store((code * stored + offset if NESTED else stored) * unit_of_code)
    n += n_turn
    block += block_turn
    index, stored = load_scales(
        absmax_ptr,
        absmax_8bit_ptr,
        (n * blocks + block) // PER_SCALE,
        (n < n_end) & (block < block_end),
        NESTED,
        NESTED_BLOCK,
    )

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
    held = gl.zeros((ROWS, 64), DTYPE, operand)
    if RANK:
        # Stages of x that nothing is loaded into yet have room for an adapter's part.
        inner = inner_memory(xs[STAGES - 1], RANK)
        store_inner(inner_ptr, inner, column0, first, M, INNER_PARTS, WARPS)
    block_barrier()
    if RANK:
        acc = add_adapter(acc, w_ptr, inner, row0, R, r, BACKWARD, operand)
    acc = warpgroup_mma_init(acc)
    if TAKE_TURNS:
        half_a_turn(1)
    for turn in range(turns):
        for s in gl.static_range(STAGES):
            step = turn * STAGES + s
            # W of this step has landed, of which a group's threads copy what they read.
            async_copy.wait_group(W_AHEAD - 1)
            block_barrier()
            later = step + W_AHEAD
            wanted = copies & (later < steps)
            if BACKWARD:
                wanted = wanted & (line + later * LINES < N)
            # Before the barrier: Gluon would put another one between this and asking for x.
            asked = step + STAGES - 2 < turns * STAGES
            mbarrier.expect(arrived[(s + STAGES - 2) % STAGES], COLUMNS * 128, pred=asked)
            copy_bytes(target + later % W_STAGES * W_BYTES, copied + later * step_bytes, wanted)
            at = read + step % W_STAGES * W_BYTES
            if BACKWARD:
                weights = decode_columns(
                    at, chosen, scales.index(turn % 2).slice(s * 64, 64, 0), asm, lanes, operand, DTYPE
                )
            else:
                weights = decode_rows(at, chosen, scales.index(turn % 2).slice(s, 1, 1), asm, lanes, operand, DTYPE)
            # Before the barrier: the loop in it keeps ptxas from decoding behind it.
            mbarrier.wait(arrived[s], turn & 1)
            block_barrier()
            acc = warpgroup_mma(weights, xs[s].permute((1, 0)), acc, is_async=True)
            # Both groups have done with the product of two steps ago, so its stage is free.
            load_tile(
                x_desc,
                [column0, (first + step + STAGES - 2) * 64],
                arrived[(s + STAGES - 2) % STAGES],
                xs[(s + STAGES - 2) % STAGES],
                pred=asked,
            )
            # The operand in flight stays in its registers until its product is done.
            acc, held = warpgroup_mma_wait(1, deps=[acc, held])
            acc = warpgroup_mma_init(acc)
            held = weights
            if s == STAGES // 2 - 1:
                code = look_up(absmax_code_ptr, index, NESTED)
            if s == STAGES - 2:
                # One step before the end, so that it is there for the group that is ahead.
                scales.index((turn + 1) % 2).store((code * stored + offset if NESTED else stored) * unit_of_code)
                n += n_turn
                block += block_turn
                index, stored = load_scales(
                    absmax_ptr,
                    absmax_8bit_ptr,
                    (n * blocks + block) // PER_SCALE,
                    (n < n_end) & (block < block_end),
                    NESTED,
                    NESTED_BLOCK,
                )
    if TAKE_TURNS:
        half_a_turn(0)
    acc, held = warpgroup_mma_wait(0, deps=[acc, held])
    async_copy.wait_group(0)
    acc = in_order_of_k(acc) if BACKWARD else acc
    storing: gl.constexpr = storing_layout(ROWS)
    if whole:
        _store_tile(acc, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS, storing)
    elif SPLIT:
        _store_part(acc, parts_ptr, unit, storing)


_launch = Launcher(_matmul_wgmma_kernel, views={0: torch.uint8}, enable_fp_fusion=False)
_launch_sum = Launcher(sum_parts_kernel)
SUM_CONFIG = LaunchConfig(rows=1, num_warps=4)
X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
_SUM_COLUMNS = 16


def wgmma_constants(
    config: WgmmaConfig,
    blocksize: int,
    quant_type: str,
    nested: bool,
    has_bias: bool,
    split: bool,
    backward: bool,
    inner_shape: tuple[int, int] = (0, 0),
) -> dict[str, object]:
    """The kernel's compile-time arguments, in its order."""
    return {
        "BACKWARD": backward,
        "HAS_BIAS": has_bias,
        "NESTED": nested,
        "NESTED_BLOCK": NESTED_BLOCKSIZE,
        "QUANT_BLOCK": blocksize,
        "QUANT_TYPE": quant_type,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "SPLIT": split,
        "RANK": inner_shape[1],
        "INNER_PARTS": inner_shape[0],
    }


def sum_constants(config: WgmmaConfig, has_bias: bool) -> dict[str, object]:
    """The compile-time arguments of the kernel that adds the parts, in its order."""
    return {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "PARTS": config.parts,
        "PIECE": _SUM_COLUMNS,
        "HAS_BIAS": has_bias,
    }


def matmul_wgmma_triton(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: tuple[int, int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: WgmmaConfig,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
    *,
    backward: bool = False,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Launch x W^T (backward: x W) into `out`.

    Args:
        x: float16 or bfloat16 [M, K] (backward: [M, N], N a multiple of 8), contiguous, aligned to 16 bytes.
        packed: codes of W, contiguous and aligned to 16 bytes, any storage dtype.
        shape: (N, K) of W; K a multiple of 64.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        blocksize: a multiple of 64.
        bias: [N], contiguous, of any dtype, or None; None in the backward product.
        out: [M, N] (backward: [M, K]), contiguous, of x's dtype.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
        adapter: (B [N, r], u) for x W^T + u B^T, backward (A [r, K], v) for x W + v A; u and v as `lora_down_triton`
            gives them, of a rank up to 64.
    """
    (N, K), (M, R) = shape, out.shape
    w, inner, r, inner_shape = None, None, 0, (0, 0)
    if adapter is not None:
        w, inner = adapter
        r, inner_shape = w.shape[0 if backward else 1], (inner.shape[0], inner.shape[2])
    has_bias, nested = bias is not None, absmax_8bit is not None
    tiles_of_columns = -(-M // config.columns)
    split_tiles = tiles_of_columns * -(-R // config.rows) - config.whole_tiles
    parts = None
    if split_tiles:
        size = split_tiles * config.parts * config.rows * config.columns
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
    _launch(
        (config.whole_tiles + split_tiles * config.parts, 1, 1),
        (
            packed,
            absmax,
            absmax_8bit,
            absmax_code,
            absmax_offset,
            bias,
            out,
            parts,
            w,
            inner,
        ),
        (M, N, K, config.whole_tiles, config.parts, config.part_steps, r),
        tuple(
            wgmma_constants(
                config, blocksize, quant_type, nested, has_bias, parts is not None, backward, inner_shape
            ).values()
        ),
        config,
        (TensorDescriptor.from_tensor(x, [config.columns, 64], X_LAYOUT),),
    )
    if parts is not None:
        _launch_sum(
            (split_tiles, config.columns // _SUM_COLUMNS, 1),
            (parts, bias, out),
            (M, R, config.whole_tiles, tiles_of_columns),
            tuple(sum_constants(config, has_bias).values()),
            SUM_CONFIG,
        )
