"""The 4-bit product on Hopper's tensor cores for tens of rows and more, y = x W^T and backward dx = dy W.

The transposed product is computed, out^T[R, M] = W x^T (backward: W^T dy^T), in steps of 64 of the contraction, one
quantization block of W's row.  Warps are of two kinds.  Those that produce ask for x by TMA and decode W into shared
memory; those that consume only multiply what is there, so tensor cores never wait for decoding, which takes less time
than a product of 128 columns or more.  Barriers in shared memory say what is full and what is empty.

Programs are as many as multiprocessors, and share all steps of all tiles evenly: each takes the steps from where the
one before it ends, in turns of STAGES, so a tile may lie with several.  The program that has a tile's beginning adds
the others' parts, in order: two runs give the same bits.  It waits for programs with higher numbers only, and they
compute what it waits for first; so as long as programs are started in order, none waits for one that cannot start.
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

from ..tuning.wgmma import WgmmaConfig
from ._adapter import INNER_LAYOUT, add_adapter, store_inner
from ._launch import Launcher
from ._wgmma import (
    STEP,
    block_barrier,
    copy_words,
    decode,
    first_turn,
    give_part,
    load_scales,
    load_tile,
    look_up,
    place,
    scaling_layout,
    share,
    store_pairs,
    store_scales,
    store_tile,
    take_part,
    words_layout,
)


@gluon.jit
def _produce(
    x_desc,
    packed_ptr,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    M,
    N,
    K,
    xs,
    weights,
    words,
    scales,
    x_full,
    w_full,
    empty,
    BACKWARD: gl.constexpr,
    NESTED: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    NF4: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    DECODED: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Fill shared memory: x, and W decoded, for every step of the program."""
    LINES: gl.constexpr = words[0].shape[0]
    BLOCKS: gl.constexpr = words[0].shape[1]
    PER_SCALE: gl.constexpr = QUANT_BLOCK // STEP
    SCALES: gl.constexpr = (STAGES, LINES, BLOCKS)
    reading: gl.constexpr = words_layout(BACKWARD, WARPS)
    scaling: gl.constexpr = scaling_layout(BACKWARD, WARPS)
    scaled: gl.constexpr = gl.SliceLayout(2, reading)
    blocks = K // STEP
    all_turns, tile_turns, across = share(M, N, K, BACKWARD, ROWS, COLUMNS, STAGES)
    begin = first_turn(gl.program_id(0), all_turns)
    end = first_turn(gl.program_id(0) + 1, all_turns)

    row0, column0, step0 = place(begin, tile_turns, across, ROWS, COLUMNS, STAGES)
    index, stored = load_scales(
        absmax_ptr, absmax_8bit_ptr, row0, step0, True, N, blocks, BACKWARD, NESTED, PER_SCALE, SCALES, scaling
    )
    for s in gl.static_range(STAGES - DECODED):
        mbarrier.expect(x_full.index(s), COLUMNS * STEP * 2)
        load_tile(x_desc, [column0, (step0 + s) * STEP], x_full.index(s), xs.index(s))
    for s in gl.static_range(STAGES):
        copy_words(words[s], packed_ptr, row0, step0 + s, True, N, blocks, BACKWARD, reading)
    offset = 0.0
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
    store_scales(scales.index(0), look_up(absmax_code_ptr, index, NESTED), stored, offset, NESTED)
    next_row0, next_column0, next_step0 = place(begin + 1, tile_turns, across, ROWS, COLUMNS, STAGES)
    async_copy.wait_group(STAGES - 1)
    block_barrier()
    word = words[0].load(reading)
    scale = scales.index(0).slice(0, LINES, 0).load(scaled)
    for turn in range(begin, end):
        parity = (turn - begin) & 1
        more = turn + 1 < end
        index, stored = load_scales(
            absmax_ptr,
            absmax_8bit_ptr,
            next_row0,
            next_step0,
            more,
            N,
            blocks,
            BACKWARD,
            NESTED,
            PER_SCALE,
            SCALES,
            scaling,
        )
        for s in gl.static_range(STAGES):
            pairs = decode(word, scale, x_desc.dtype, NF4)
            # The product of DECODED steps ago is done: its weights may be overwritten, and its x, by a later step's.
            if s < DECODED:
                mbarrier.wait(empty.index((s - DECODED) % STAGES), parity ^ 1, pred=turn > begin)
            else:
                mbarrier.wait(empty.index(s - DECODED), parity)
            asked = (s < DECODED) | more
            mbarrier.expect(x_full.index((s - DECODED) % STAGES), COLUMNS * STEP * 2, pred=asked)
            store_pairs(weights.index(s % DECODED), pairs)
            async_copy.wait_group(STAGES - 2)
            block_barrier()
            mbarrier.arrive(w_full.index(s), count=1)
            x_at = [column0, (step0 + STAGES - DECODED + s) * STEP]
            if s >= DECODED:
                x_at = [next_column0, (next_step0 + s - DECODED) * STEP]
            load_tile(x_desc, x_at, x_full.index((s - DECODED) % STAGES), xs.index((s - DECODED) % STAGES), pred=asked)
            copy_words(words[s], packed_ptr, next_row0, next_step0 + s, more, N, blocks, BACKWARD, reading)
            # For the next step: what a thread reads of W it has copied itself.
            word = words[(s + 1) % STAGES].load(reading)
            if s < STAGES - 1:
                scale = scales.index(parity).slice((s + 1) * LINES, LINES, 0).load(scaled)
            else:
                scale = scales.index(1 - parity).slice(0, LINES, 0).load(scaled)
            # What a load gave is used some steps later, when it has come.
            if s == STAGES // 2 - 1:
                code = look_up(absmax_code_ptr, index, NESTED)
            if s == STAGES - 2:
                store_scales(scales.index(1 - parity), code, stored, offset, NESTED)
        row0, column0, step0 = next_row0, next_column0, next_step0
        next_row0, next_column0, next_step0 = place(turn + 2, tile_turns, across, ROWS, COLUMNS, STAGES)
    async_copy.wait_group(0)


@gluon.jit
def _consume(
    bias_ptr,
    out_ptr,
    parts_ptr,
    flags_ptr,
    w_ptr,
    inner_ptr,
    M,
    N,
    K,
    r,
    xs,
    weights,
    inner,
    x_full,
    w_full,
    empty,
    BACKWARD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    DECODED: gl.constexpr,
    RANK: gl.constexpr,
    INNER_PARTS: gl.constexpr,
):
    """Multiply step by step, and write each tile, or give its part to the program that writes it."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, COLUMNS, 16])
    R = K if BACKWARD else N
    all_turns, tile_turns, across = share(M, N, K, BACKWARD, ROWS, COLUMNS, STAGES)
    program = gl.program_id(0)
    begin = first_turn(program, all_turns)
    end = first_turn(program + 1, all_turns)
    turn = begin
    while turn < end:
        tile_end = (turn // tile_turns + 1) * tile_turns
        stop = gl.minimum(tile_end, end)
        row0, column0, step0 = place(turn, tile_turns, across, ROWS, COLUMNS, STAGES)
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, mma)
        if RANK:  # noqa: SIM102 (what is not compiled, and what is not run)
            if step0 == 0:  # once a tile
                store_inner(inner_ptr, inner, column0, M, INNER_PARTS, ROWS // 16)
                block_barrier()
                acc = add_adapter(acc, w_ptr, inner, row0, R, r, BACKWARD, gl.DotOperandLayout(0, mma, 2))
        acc = warpgroup_mma_init(acc)
        for step in range(turn * STAGES, stop * STAGES):
            slot = step % STAGES
            parity = (step // STAGES - begin) & 1
            mbarrier.wait(x_full.index(slot), parity)
            mbarrier.wait(w_full.index(slot), parity)
            # For what the others have stored.  Theirs would wait for the loads that they have under way.
            fence_async_shared()
            w = weights.index(slot % DECODED)
            w = w.permute((1, 0)) if BACKWARD else w
            acc = warpgroup_mma(w, xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > turn * STAGES)
        done = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(STAGES - 1), count=1)
        if step0 == 0 or not SPLIT:
            if SPLIT:
                given = stop
                giver = program
                while given < tile_end:
                    giver += 1
                    done = take_part(done, parts_ptr, flags_ptr, giver, mma)
                    given = first_turn(giver + 1, all_turns)
            store_tile(done, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS, mma)
        elif SPLIT:
            give_part(done, parts_ptr, flags_ptr, program, mma)
        turn = stop


@gluon.jit(do_not_specialize=["M", "r"])
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
    flags_ptr,
    w_ptr,
    inner_ptr,
    M,
    N,
    K,
    r,
    BACKWARD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NESTED: gl.constexpr,
    SPLIT: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    NF4: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    DECODED: gl.constexpr,
    DECODING_WARPS: gl.constexpr,
    REGISTERS: gl.constexpr,
    RANK: gl.constexpr,
    INNER_PARTS: gl.constexpr,
):
    LINES: gl.constexpr = STEP if BACKWARD else ROWS
    BLOCKS: gl.constexpr = ROWS // STEP if BACKWARD else 1
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, COLUMNS, STEP], x_desc.layout)
    weights = gl.allocate_shared_memory(x_desc.dtype, [DECODED, LINES, BLOCKS * STEP], swizzled)
    # One allocation a stage, so that Gluon sees which of them an instruction touches and adds no barrier.
    words = ()
    for _ in gl.static_range(STAGES):
        words += (  # type: ignore[assignment]
            gl.allocate_shared_memory(
                gl.int32, [LINES, BLOCKS, STEP // 8], gl.SwizzledSharedLayout(4, 1, 1, [2, 1, 0])
            ),
        )
    scales = gl.allocate_shared_memory(
        gl.float32, [2, STAGES * LINES, BLOCKS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    inner = xs  # not read
    if RANK:
        inner = gl.allocate_shared_memory(x_desc.dtype, [RANK // 16, COLUMNS, 16], INNER_LAYOUT)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(x_full.index(s), count=1)
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    block_barrier()
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (
                bias_ptr, out_ptr, parts_ptr, flags_ptr, w_ptr, inner_ptr, M, N, K, r, xs, weights, inner,
                x_full, w_full, empty,
                BACKWARD, HAS_BIAS, SPLIT, ROWS, COLUMNS, STAGES, DECODED, RANK, INNER_PARTS,
            )),
            (_produce, (
                x_desc, packed_ptr, absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr, M, N, K,
                xs, weights, words, scales, x_full, w_full, empty,
                BACKWARD, NESTED, QUANT_BLOCK, NF4, ROWS, COLUMNS, STAGES, DECODED, DECODING_WARPS,
            )),
        ],
        [DECODING_WARPS],
        [REGISTERS],
    )
    # fmt: on


_launch = Launcher(_matmul_wgmma_kernel, views={0: torch.int32}, enable_fp_fusion=False)
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
        "NF4": quant_type == "nf4",
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "DECODED": config.decoded,
        "DECODING_WARPS": config.decoding_warps,
        "REGISTERS": config.registers,
        "RANK": inner_shape[1],
        "INNER_PARTS": inner_shape[0],
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
    (N, K), M = shape, out.shape[0]
    w, inner, r, inner_shape = None, None, 0, (0, 0)
    if adapter is not None:
        w, inner = adapter
        r, inner_shape = w.shape[0 if backward else 1], (inner.shape[0], inner.shape[2])
    parts = flags = None
    if config.split:
        parts = torch.empty(config.programs * config.rows * config.columns, dtype=torch.float32, device=x.device)
        flags = torch.zeros(config.programs, dtype=torch.int32, device=x.device)
    has_bias, nested = bias is not None, absmax_8bit is not None
    constants = wgmma_constants(config, blocksize, quant_type, nested, has_bias, backward, inner_shape)
    _launch(
        (config.programs, 1, 1),
        (packed, absmax, absmax_8bit, absmax_code, absmax_offset, bias, out, parts, flags, w, inner),
        (M, N, K, r),
        tuple(constants.values()),
        config,
        (TensorDescriptor.from_tensor(x, [config.columns, 64], X_LAYOUT),),
    )
