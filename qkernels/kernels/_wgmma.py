"""Parts of the Hopper product: what a program computes, W and its scales fetched and decoded, tiles and parts written.

A thread decodes a whole quantization block or half of one.  It multiplies the sixteen codes by the block's scale and
rounds them, the weights that `dequantize_4bit` gives to the bit, and keeps the bytes of these in eight registers; a
nibble then selects from them by byte permutation.  Nothing is looked up in memory.
"""

from __future__ import annotations

import struct

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..format import NESTED_BLOCKSIZE, code_table

# Gluon's names in Triton 3.6 and in 3.9.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
copy_bytes = async_copy.async_load if hasattr(tma, "async_load") else async_copy.async_copy_global_to_shared
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

# A step of the contraction: 64 weights of a row, which have one scale.
STEP = gl.constexpr(64)
_WORDS = gl.constexpr(8)  # of 32 bits, in which 64 weights are packed
_TABLE_BLOCK = gl.constexpr(NESTED_BLOCKSIZE)


def _scaled_table(quant_type: str, convert: str) -> str:
    """Assembly: scale $8 to the weights of all codes, the low bytes of four each in $0 to $3, the high in $4 to $7."""
    codes = ["0f" + struct.pack(">f", code).hex() for code in code_table(quant_type, torch.device("cpu")).tolist()]
    lines = [".reg .f32 a, b; .reg .b32 p<8>;"]
    for pair in range(8):
        lines.append(f"mul.rn.f32 a, $8, {codes[2 * pair]}; mul.rn.f32 b, $8, {codes[2 * pair + 1]};")
        lines.append(f"{convert} p{pair}, b, a;")
    for quarter in range(4):
        pairs = f"p{2 * quarter}, p{2 * quarter + 1}"
        lines.append(f"prmt.b32 ${quarter}, {pairs}, 0x6420; prmt.b32 ${quarter + 4}, {pairs}, 0x7531;")
    return "{ " + " ".join(lines) + " }"


def _select() -> str:
    """Assembly: eight nibbles $4 to pairs of weights $0 to $3, by the table in $5 to $12."""
    lines = [
        ".reg .b32 s, h, a, b, c, d;",
        # The low three bits of a nibble select from each half of the table, the highest selects the half.
        "and.b32 s, $4, 0x77777777; shr.u32 h, $4, 1; and.b32 h, h, 0x44444444; or.b32 h, h, 0x32103210;",
    ]
    for pair in (0, 2):
        if pair:
            lines.append("shr.u32 s, s, 16; shr.u32 h, h, 16;")
        lines.append("prmt.b32 a, $5, $6, s; prmt.b32 b, $7, $8, s; prmt.b32 a, a, b, h;")
        lines.append("prmt.b32 c, $9, $10, s; prmt.b32 d, $11, $12, s; prmt.b32 c, c, d, h;")
        # A byte's high nibble is the even weight.
        lines.append(f"prmt.b32 ${pair}, a, c, 0x4051; prmt.b32 ${pair + 1}, a, c, 0x6273;")
    return "{ " + " ".join(lines) + " }"


_SELECT = gl.constexpr(_select())
_NF4_FP16 = gl.constexpr(_scaled_table("nf4", "cvt.rn.f16x2.f32"))
_NF4_BF16 = gl.constexpr(_scaled_table("nf4", "cvt.rn.bf16x2.f32"))
_FP4_FP16 = gl.constexpr(_scaled_table("fp4", "cvt.rn.f16x2.f32"))
_FP4_BF16 = gl.constexpr(_scaled_table("fp4", "cvt.rn.bf16x2.f32"))


@gluon.constexpr_function
def is_bf16(dtype):
    return dtype.is_bf16()


@gluon.constexpr_function
def words_layout(backward, warps):
    """Packed words [lines, blocks, 8] of a step: a block a thread, or half a block of twice the threads."""
    if warps == 4:
        return gl.BlockedLayout([1, 1, 8], [32, 1, 1], [2, 2, 1] if backward else [4, 1, 1], [2, 1, 0])
    return gl.BlockedLayout([1, 1, 4], [16, 1, 2], [4, 2, 1] if backward else [8, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def scaling_layout(backward, warps):
    """Scales [stages, lines, blocks]: neighbours in memory are neighbouring threads."""
    if backward:
        return gl.BlockedLayout([1, 1, 1], [1, 16, 2], [warps // 2, 2, 1], [2, 1, 0])
    return gl.BlockedLayout([2, 1, 1], [2, 16, 1], [1, warps, 1], [0, 1, 2])


@gluon.constexpr_function
def storing_layout(rows):
    """A tile of the transposed output, eight neighbours in memory a thread."""
    return gl.BlockedLayout([8, 1], [16, 2], [1, rows // 16], [0, 1])


@gluon.jit
def share(M, N, K, BACKWARD: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """Turns of all tiles, of a tile, and columns of tiles.  Turns of STAGES steps are counted tile by tile."""
    R = K if BACKWARD else N
    steps = (N + STEP - 1) // STEP if BACKWARD else K // STEP
    tile_turns = (steps + STAGES - 1) // STAGES
    across = (M + COLUMNS - 1) // COLUMNS
    return (R + ROWS - 1) // ROWS * across * tile_turns, tile_turns, across


@gluon.jit
def first_turn(program, all_turns):
    """Where a program begins; it ends where the next one begins."""
    return program * all_turns // gl.num_programs(0)


@gluon.jit
def place(turn, tile_turns, across, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """First row and column of a turn's tile of the transposed output, and the turn's first step."""
    tile = turn // tile_turns
    return tile // across * ROWS, tile % across * COLUMNS, turn % tile_turns * STAGES


@gluon.jit
def copy_words(target, packed_ptr, row0, step, wanted, N, blocks, BACKWARD: gl.constexpr, layout: gl.constexpr):
    """Begin to copy W of one step, [lines of n, blocks of k, 8], to shared memory; zeros beyond the edges of W."""
    line = gl.arange(0, target.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    block = gl.arange(0, target.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    word = gl.arange(0, _WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    line += step * STEP if BACKWARD else row0
    block += row0 // STEP if BACKWARD else step
    source = packed_ptr + line.to(gl.int64) * (blocks * _WORDS) + (block * _WORDS + word)
    copy_bytes(target, source, mask=(line < N) & (block < blocks) & wanted)
    async_copy.commit_group()


@gluon.jit
def load_scales(
    absmax_ptr,
    absmax_8bit_ptr,
    row0,
    step,
    wanted,
    N,
    blocks,
    BACKWARD: gl.constexpr,
    NESTED: gl.constexpr,
    PER_SCALE: gl.constexpr,
    shape: gl.constexpr,
    layout: gl.constexpr,
):
    """A turn's scales as stored, [steps, lines, blocks]: (8-bit index, its float32 scale), or (nothing, scale)."""
    s = gl.arange(0, shape[0], gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    line = gl.arange(0, shape[1], gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    block = gl.arange(0, shape[2], gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    if BACKWARD:
        line += (step + s) * STEP
        block += row0 // STEP
    else:
        line += row0
        block += step + s
    at = (line * blocks + block) // PER_SCALE
    mask = (line < N) & (block < blocks) & wanted
    if NESTED:
        index = gl.load(absmax_8bit_ptr + at, mask=mask, other=0)
        stored = gl.load(absmax_ptr + at // _TABLE_BLOCK, mask=mask, other=0.0)
    else:
        index = gl.zeros_like(at).to(gl.uint8)
        stored = gl.load(absmax_ptr + at, mask=mask, other=0.0)
    return index, stored


@gluon.jit
def look_up(absmax_code_ptr, index, NESTED: gl.constexpr):
    """The entry of the 8-bit map, float32."""
    return gl.load(absmax_code_ptr + index.to(gl.int32)) if NESTED else gl.zeros_like(index).to(gl.float32)


@gluon.jit
def store_scales(target, code, stored, offset, NESTED: gl.constexpr):
    """Decoded scales to shared memory, [steps * lines, blocks]; without a block, an offset alone is no scale."""
    target.store((code * stored + offset if NESTED else stored).reshape(target.shape))


@gluon.jit
def decode(word, scale, DTYPE: gl.constexpr, NF4: gl.constexpr):
    """Words [lines, blocks, 8] and scales [lines, blocks] to pairs of weights, int32[lines, 32 * blocks]."""
    fp16: gl.constexpr = _NF4_FP16 if NF4 else _FP4_FP16
    bf16: gl.constexpr = _NF4_BF16 if NF4 else _FP4_BF16
    table: gl.constexpr = bf16 if is_bf16(DTYPE) else fp16
    t0, t1, t2, t3, t4, t5, t6, t7 = gl.inline_asm_elementwise(
        table, "=r,=r,=r,=r,=r,=r,=r,=r,f", [scale], dtype=[gl.int32] * 8, is_pure=True, pack=1
    )
    low = [word, t0[:, :, None], t1[:, :, None], t2[:, :, None], t3[:, :, None]]
    high = [t4[:, :, None], t5[:, :, None], t6[:, :, None], t7[:, :, None]]
    p0, p1, p2, p3 = gl.inline_asm_elementwise(
        _SELECT, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", low + high, dtype=[gl.int32] * 4, is_pure=True, pack=1
    )
    return gl.join(gl.join(p0, p2), gl.join(p1, p3)).reshape([word.shape[0], word.shape[1] * 32])


@gluon.jit
def store_pairs(target, pairs):
    """Pairs of weights to shared memory of 16-bit numbers."""
    same_bytes: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    if _REINTERPRET:
        target.reinterpret(gl.int32, pairs.shape, same_bytes).store(pairs)
    else:
        target._reinterpret(gl.int32, pairs.shape, same_bytes).store(pairs)


@gluon.jit
def part_offsets(ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Where float32[ROWS, COLUMNS] is kept between programs: a warp's stores from its accumulator are contiguous."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    c = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    return ((c // 8 * 2 + r // 8 % 2) * (ROWS // 16) + r // 16) * 64 + r % 8 * 8 + c % 8


@gluon.jit
def give_part(acc, parts_ptr, flags_ptr, program, layout: gl.constexpr):
    """Leave a program's part of a tile to the one that has the tile's beginning."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    at = parts_ptr + program.to(gl.int64) * SIZE
    gl.store(at + part_offsets(acc.shape[0], acc.shape[1], layout), acc)
    block_barrier()
    gl.atomic_xchg(flags_ptr + program, 1, sem="release")


@gluon.jit
def take_part(acc, parts_ptr, flags_ptr, program, layout: gl.constexpr):
    """Wait for another program's part, and add it."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    while gl.atomic_add(flags_ptr + program, 0, sem="acquire") == 0:
        pass
    block_barrier()
    at = parts_ptr + program.to(gl.int64) * SIZE
    return acc + gl.load(at + part_offsets(acc.shape[0], acc.shape[1], layout), cache_modifier=".cg")


@gluon.jit
def store_tile(acc, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS: gl.constexpr, mma: gl.constexpr):
    """Write a tile of the transposed output to out[M, R], with the bias."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if HAS_BIAS:
        r = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        acc += gl.load(bias_ptr + r, mask=r < R, other=0.0).to(gl.float32)[:, None]
    layout: gl.constexpr = storing_layout(ROWS)
    value = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    r = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    m = column0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    gl.store(out_ptr + m.to(gl.int64) * R + r, value, mask=(r < R) & (m < M))
