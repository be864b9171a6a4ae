"""The 4-bit product on Hopper's tensor cores for tens to hundreds of rows, y = x W^T and backward dx = dy W.

The transposed product is computed, out^T[R, M] = W x^T (backward: W^T dy^T), because a wgmma instruction may take its
first operand from registers: a thread decodes W straight into its fragment of the operand, and no decoded weight is
written anywhere.  x comes into shared memory by TMA as the second operand.  The contraction goes in steps of 64, one
quantization block of W's row, so a step has one scale a row; of blocks of 32 it has two.

A wgmma with an operand in registers keeps its warps at the instruction until the operand is read.  So two warp groups
take turns of two steps: each has two barriers, one before decoding and one before multiplying, and the second group
runs one barrier behind the first.  One decodes while the other multiplies.

Programs share the steps of all tiles evenly, so a tile of the output may lie with several.  The one that has the tile's
beginning takes the sums of the others, each of which has that as its first work, and adds them in their order: two runs
give the same bits.
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

from ..format import byte_table
from ..tuning.wgmma import WgmmaConfig, begins_early, turns
from ._adapter import add_adapter, inner_memory, store_inner
from ._early import let_next_begin, wait_for_previous
from ._flags import cleared_flags
from ._launch import early_and_late
from ._wgmma import TAKE_TURNS, block_barrier, finish_tile, first_turn, half_a_turn, load_tile, next_place, place
from ._wgmma_codes import decoding, fill_table
from ._wgmma_scales import load_scales, look_up, scale_unit, scaling_layout, store_scales, stored_scales
from ._wgmma_weights import copy_step, decode_columns, decode_rows, lanes_layout, packed_memory, places


@gluon.jit(do_not_specialize=["M", "all_turns", "tile_turns", "across", "r"])
def _matmul_wgmma_kernel(
    x_desc,
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    flags_ptr,
    w_ptr,
    inner_ptr,
    M,
    N,
    K,
    all_turns,
    tile_turns,
    across,
    r,
    BACKWARD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NESTED: gl.constexpr,
    SPLIT: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    QUANT_TYPE: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    TABLED: gl.constexpr,
    RANK: gl.constexpr,
    INNER_PARTS: gl.constexpr,
    EARLY: gl.constexpr,
):
    DTYPE: gl.constexpr = x_desc.dtype
    WARPS: gl.constexpr = ROWS // 16
    AHEAD: gl.constexpr = STAGES - 2
    R = K if BACKWARD else N
    UNIT: gl.constexpr = scale_unit(QUANT_BLOCK)
    PER_STEP: gl.constexpr = 64 // UNIT
    blocks = K // UNIT
    # Who takes a part comes after who gives it, so that no order of programs can hold them up.
    begin = first_turn(gl.program_id(0) + 1, all_turns)
    end = first_turn(gl.program_id(0), all_turns)
    row0, column0, step0 = place(begin, tile_turns, across, ROWS, COLUMNS, STAGES)

    # One allocation a stage, so that Gluon sees which of them an instruction touches and adds no barrier.
    xs = ()
    arrived = ()
    for _ in gl.static_range(STAGES):
        xs += (gl.allocate_shared_memory(DTYPE, [COLUMNS, 64], x_desc.layout),)  # type: ignore[assignment]
        arrived += (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)  # type: ignore[assignment]
    if RANK:
        inner = inner_memory(xs[STAGES - 1], RANK, BACKWARD)  # a tile that is asked for in a tile's first turn only
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived[s], count=1)
    fence_async_shared()
    block_barrier()
    if EARLY:
        wait_for_previous(0)
        let_next_begin(0)
    mbarrier.expect(arrived[0], COLUMNS * 128)
    mbarrier.expect(arrived[1], COLUMNS * 128)
    load_tile(x_desc, [column0, step0 * 64], arrived[0], xs[0])

    lanes: gl.constexpr = lanes_layout(ROWS)
    line, chunk, target, read, chosen, spot = places(packed_memory(), BACKWARD, ROWS, lanes)
    for s in gl.static_range(2):
        copy_step(target + s * 32 * ROWS, packed_ptr, line, chunk, row0, step0 + s, True, N, blocks, UNIT, BACKWARD)

    # Scales of STAGES steps at a time are loaded, looked up and stored in three stages.
    ACROSS: gl.constexpr = (ROWS // 64 if BACKWARD else STAGES) * PER_STEP
    scaling: gl.constexpr = scaling_layout(ROWS, ACROSS, BACKWARD)
    # Two are used.  The launch asks for more than 48 KiB in all only if this part, without W's bytes, is more.
    SCALES: gl.constexpr = 2 if COLUMNS > 64 else 8
    scales = gl.allocate_shared_memory(
        gl.float32,
        [SCALES, STAGES * 64 if BACKWARD else ROWS, ACROSS],
        gl.SwizzledSharedLayout(1, 1, 1, [0, 1]),
    )
    stored_as: gl.constexpr = stored_scales(BACKWARD, NESTED, QUANT_BLOCK, scales.shape[1], ACROSS, scaling)
    stores = (absmax_ptr, absmax_8bit_ptr)
    spots = (chosen, spot, fill_table(table_ptr, WARPS, QUANT_TYPE))
    offset = 0.0
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
    index, stored = load_scales(stores, row0, step0, True, N, blocks, stored_as)
    next_row0, next_column0, next_step = place(begin + 1, tile_turns, across, ROWS, COLUMNS, STAGES)
    later_row0, later_column0, later_step = place(begin + 2, tile_turns, across, ROWS, COLUMNS, STAGES)
    next_index, next_stored = load_scales(stores, next_row0, next_step, begin + 1 < end, N, blocks, stored_as)
    store_scales(scales.index(0), look_up(absmax_code_ptr, index, NESTED), stored, offset, NESTED, QUANT_TYPE)
    code = look_up(absmax_code_ptr, next_index, NESTED)
    stored = next_stored

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    how: gl.constexpr = decoding(QUANT_TYPE, DTYPE, TABLED, lanes, operand)
    block_barrier()
    turn = begin
    while turn < end:
        stop = gl.minimum((turn // tile_turns + 1) * tile_turns, end)
        row0, column0, step0 = place(turn, tile_turns, across, ROWS, COLUMNS, STAGES)
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        if RANK:  # noqa: SIM102 (what is not compiled, and what is not run)
            if step0 == 0:  # once a tile
                store_inner(inner_ptr, inner, column0, M, INNER_PARTS, WARPS)
                block_barrier()
                acc = add_adapter(acc, w_ptr, inner, row0, R, r, BACKWARD, operand)
        held = gl.zeros((ROWS, 64), DTYPE, operand)
        acc = warpgroup_mma_init(acc)
        if TAKE_TURNS:
            half_a_turn(1)
        for now in range(turn, stop):
            parity = (now - begin) & 1
            more = now + 1 < end
            step = step0 + (now - turn) * STAGES
            for half in gl.static_range(2):
                # W of these two steps has landed, of which a group's threads copy what they read.
                async_copy.wait_group(0)
                block_barrier()
                acc, held = warpgroup_mma_wait(0, deps=[acc, held])
                # Both groups have done with all products but the last two, so the second one's stage is free.
                load_tile(x_desc, [column0, (step + 2 * half + 1) * 64], arrived[2 * half + 1], xs[2 * half + 1])
                w_row0, w_step, w_asked = row0, step + 2, True
                if half == 1:
                    # Scales are loaded, looked up and stored one after the other, when what came before has come.
                    index, stored = load_scales(stores, later_row0, later_step, now + 2 < end, N, blocks, stored_as)
                    w_row0, w_step, w_asked = next_row0, next_step, more
                for s in gl.static_range(2):
                    at = target + (2 - 2 * half + s) * (32 * ROWS)
                    copy_step(at, packed_ptr, line, chunk, w_row0, w_step + s, w_asked, N, blocks, UNIT, BACKWARD)
                decoded = ()
                for s in gl.static_range(2):
                    address = read + (2 * half + s) * (32 * ROWS)
                    if BACKWARD:
                        scale = scales.index(parity).slice((2 * half + s) * 64, 64, 0)
                        decoded += (decode_columns(address, spots, scale, how),)
                    else:
                        scale = scales.index(parity).slice((2 * half + s) * PER_STEP, PER_STEP, 1)
                        decoded += (decode_rows(address, spots, scale, how),)
                first, second = decoded
                # Before the next barrier: Gluon would put another one between this and asking for x.
                asked = (half == 0) | more
                mbarrier.expect(arrived[2 - 2 * half], COLUMNS * 128, pred=asked)
                mbarrier.expect(arrived[3 - 2 * half], COLUMNS * 128, pred=asked)
                # Before the barrier: the loop in it keeps ptxas from decoding behind it.
                mbarrier.wait(arrived[2 * half], parity)
                block_barrier()
                acc = warpgroup_mma_init(acc)
                acc = warpgroup_mma(first, xs[2 * half].permute((1, 0)), acc, is_async=True)
                mbarrier.wait(arrived[2 * half + 1], parity)
                acc = warpgroup_mma(second, xs[2 * half + 1].permute((1, 0)), acc, is_async=True)
                x_at = [column0, (step + 2) * 64]
                if half == 1:
                    x_at = [next_column0, next_step * 64]
                load_tile(x_desc, x_at, arrived[2 - 2 * half], xs[2 - 2 * half], pred=asked)
                # An operand in flight stays in its registers until its product is done.
                acc, first, held = warpgroup_mma_wait(1, deps=[acc, first, second])
                acc = warpgroup_mma_init(acc)
                if half == 0:
                    store_scales(scales.index(1 - parity), code, stored, offset, NESTED, QUANT_TYPE)
                else:
                    code = look_up(absmax_code_ptr, index, NESTED)
            next_row0, next_column0, next_step = later_row0, later_column0, later_step
            later_row0, later_column0, later_step = next_place(
                later_row0, later_column0, later_step, tile_turns, across, ROWS, COLUMNS, STAGES
            )
        if TAKE_TURNS:
            half_a_turn(0)
        done, _held = warpgroup_mma_wait(0, deps=[acc, held])
        # The last two tiles of x are asked for in the next turn only.
        memory = (xs[AHEAD], xs[AHEAD + 1])
        pointers = (bias_ptr, out_ptr, parts_ptr, flags_ptr)
        sizes = (M, R, all_turns, tile_turns, across)
        finish_tile(done, memory, pointers, sizes, turn, stop, HAS_BIAS, BACKWARD, SPLIT, STAGES)
        turn = stop
    async_copy.wait_group(0)


_LAUNCHERS = early_and_late(_matmul_wgmma_kernel, views={0: torch.uint8}, enable_fp_fusion=False)
X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)


def wgmma_constants(
    config: WgmmaConfig,
    blocksize: int,
    quant_type: str,
    nested: bool,
    has_bias: bool,
    backward: bool,
    inner_shape: tuple[int, int] = (0, 0),
) -> dict[str, object]:
    """The kernel's compile-time arguments, in its order."""
    return {
        "BACKWARD": backward,
        "HAS_BIAS": has_bias,
        "NESTED": nested,
        "SPLIT": config.split,
        "QUANT_BLOCK": blocksize,
        "QUANT_TYPE": quant_type,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        # With an adapter's part more look-ups would take a register more than there are.
        "TABLED": min(config.tabled, 1) if inner_shape[1] and config.columns == 256 else config.tabled,
        "RANK": inner_shape[1],
        "INNER_PARTS": inner_shape[0],
        "EARLY": begins_early(config, backward),
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
        shape: (N, K) of W; K a multiple of 64, or of the block.
        absmax: float32 scales, one a block; with double quantization the scales of `absmax_8bit`, one for 256.
        blocksize: 32 or a multiple of 64.
        bias: [N], contiguous, of any dtype, or None; None in the backward product.
        out: [M, N] (backward: [M, K]), contiguous, of x's dtype.
        absmax_8bit, absmax_code, absmax_offset: all None, or uint8[blocks], float32[256] and a float32 scalar tensor.
        adapter: (B [N, r], u) for x W^T + u B^T, backward (A [r, K], v) for x W + v A; u and v as `lora_down_triton`
            gives them, of a rank up to 64.
    """
    (N, K), M = shape, out.shape[0]
    w, inner, r, inner_shape = None, None, 0, (0, 0)
    if adapter is not None:
        w, inner = adapter
        r, inner_shape = w.shape[0 if backward else 1], (inner.shape[0], inner.shape[2])
    parts = flags = None
    if config.split:
        parts = torch.empty(config.programs * config.rows * config.columns, dtype=torch.float32, device=x.device)
        flags = cleared_flags(x.device)
    has_bias, nested = bias is not None, absmax_8bit is not None
    constants = wgmma_constants(config, blocksize, quant_type, nested, has_bias, backward, inner_shape)
    table = byte_table(quant_type, x.device)
    _LAUNCHERS[constants["EARLY"]](
        (config.programs, 1, 1),
        (packed, absmax, absmax_8bit, absmax_code, absmax_offset, table, bias, out, parts, flags, w, inner),
        (M, N, K, *turns(M, *((K, N) if backward else (N, K)), config.columns), r),
        tuple(constants.values()),
        config,
        (TensorDescriptor.from_tensor(x, [config.columns, 64], X_LAYOUT),),
    )
