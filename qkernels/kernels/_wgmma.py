"""Parts of the Hopper product: the table of bytes in shared memory, W decoded into operands, the sum of split tiles.

A byte is decoded by one load from a table of float32 pairs, its two codes, multiplied by the scale and rounded: bit for
bit the weight that `dequantize_4bit` gives.  The table stands 16 times in shared memory, entry b for lane l at
b * 128 + l % 16 * 8 bytes, so the lanes of half a warp, which a load of 8 bytes serves at a time, never meet in a bank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig

# Triton 3.6 puts no barrier between those of the kernel.  3.9 does, which makes three or four of the two a step, and
# then warp groups that take turns would wait for each other: there they go together.
TAKE_TURNS = gl.constexpr(hasattr(gl, "thread_barrier"))
# Gluon's names in Triton 3.6 and in 3.9.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
copy_bytes = async_copy.async_load if hasattr(tma, "async_load") else async_copy.async_copy_global_to_shared
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

TABLE_BYTES = 32768
SUM_CONFIG = LaunchConfig(rows=1, num_warps=4)
# Declared in assembly because a table look-up by address has no other way to it; counted by the driver, not by Triton.
_TABLE_ADDRESS = gl.constexpr(f"{{ .shared .align 128 .b8 qk_byte_table[{TABLE_BYTES}]; mov.u32 $0, qk_byte_table; }}")
_STORE_WORD = gl.constexpr("st.shared.b32 [$1], $2; mov.u32 $0, $2;")


def _decode_byte(cvt: str) -> str:
    """Byte $2, scale $3, table $4 to the even and the odd weight."""
    return (
        "{ .reg .b32 a, t; .reg .f32 e, o; mad.lo.u32 a, $2, 128, $4; ld.shared.v2.f32 {e, o}, [a]; "
        f"mul.rn.f32 e, e, $3; mul.rn.f32 o, o, $3; {cvt} t, o, e; mov.b32 {{$0, $1}}, t; }}"
    )


def _decode_two_rows(cvt: str) -> str:
    """Bytes $4, $5 of rows n, n + 1, their scales $6, $7, table $8 to even k of both rows, then odd k of both rows."""
    return (
        "{ .reg .b32 a, t; .reg .f32 e, o, f, p; "
        "mad.lo.u32 a, $4, 128, $8; ld.shared.v2.f32 {e, o}, [a]; "
        "mad.lo.u32 a, $5, 128, $8; ld.shared.v2.f32 {f, p}, [a]; "
        "mul.rn.f32 e, e, $6; mul.rn.f32 o, o, $6; mul.rn.f32 f, f, $7; mul.rn.f32 p, p, $7; "
        f"{cvt} t, f, e; mov.b32 {{$0, $1}}, t; {cvt} t, p, o; mov.b32 {{$2, $3}}, t; }}"
    )


_BYTE_FP16 = gl.constexpr(_decode_byte("cvt.rn.f16x2.f32"))
_BYTE_BF16 = gl.constexpr(_decode_byte("cvt.rn.bf16x2.f32"))
_TWO_ROWS_FP16 = gl.constexpr(_decode_two_rows("cvt.rn.f16x2.f32"))
_TWO_ROWS_BF16 = gl.constexpr(_decode_two_rows("cvt.rn.bf16x2.f32"))
_HALF_A_TURN = gl.constexpr(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; and.b32 t, t, 1; setp.eq.u32 p, t, $1; "
    "@p bar.sync 0; mov.u32 $0, t; }"
)


@gluon.constexpr_function
def is_bf16(dtype):
    return dtype.is_bf16()


@gluon.constexpr_function
def copying_layout(rows, backward):
    """W's bytes of a step, 16 a thread: [rows of n, 32], backward [64 of n, rows / 2]."""
    threads = [1024 // rows, rows // 32] if backward else [16, 2]
    return gl.BlockedLayout([1, 16], threads, [rows // 16, 1], [1, 0])


@gluon.constexpr_function
def packed_layout(rows, backward):
    """The same in shared memory, 16-byte vectors permuted so that `reading_layout` meets no bank twice."""
    per_phase, max_phase = ((4, 2) if rows == 64 else (2, 4)) if backward else (4, 2)
    return gl.SwizzledSharedLayout(16, per_phase, max_phase, [1, 0])


@gluon.constexpr_function
def reading_layout(rows, backward):
    """The same as a tensor core's operand wants them, a byte a lane; backward as [64 of n, rows / 64, 32]."""
    groups = (rows // 64).bit_length() - 1
    if backward:
        reg_bases = [[1, 0, 0], [8, 0, 0], [16, 0, 0], [32, 0, 0]]
        lane_bases = [[2, 0, 0], [4, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
        warp_bases = [[0, 0, 8], [0, 0, 16]] + [[0, 1 << i, 0] for i in range(groups)]
        return gl.DistributedLinearLayout(reg_bases, lane_bases, warp_bases, [], [64, rows // 64, 32])
    reg_bases = [[8, 0], [0, 4], [0, 8], [0, 16]]
    lane_bases = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warp_bases = [[16 << i, 0] for i in range(groups + 2)]
    return gl.DistributedLinearLayout(reg_bases, lane_bases, warp_bases, [], [rows, 32])


@gluon.constexpr_function
def scaling_layout(rows, stages, backward):
    """Scales of as many steps as there are stages: [rows of n, stages], backward [64 * stages of n, rows / 64]."""
    if backward:
        return gl.BlockedLayout([1, 1], [2048 // rows, rows // 64], [rows // 16, 1], [1, 0])
    return gl.BlockedLayout([1, stages // 2], [16, 2], [rows // 16, 1], [1, 0])


@gluon.constexpr_function
def storing_layout(rows):
    """A tile of the transposed output, eight neighbours in memory a thread."""
    return gl.BlockedLayout([8, 1], [8, 4] if rows == 64 else [16, 2], [1, rows // 16], [0, 1])


@gluon.jit
def half_a_turn(odd_groups: gl.constexpr):
    """One more barrier for every second warp group: it then runs one barrier behind (or catches up with) the others."""
    gl.inline_asm_elementwise(_HALF_A_TURN, "=r,r", [odd_groups], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fill_table(table_ptr, WARPS: gl.constexpr):
    """Copy float32[256, 2] into shared memory 16 times; the address of this lane's copy.  A barrier must follow."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    entry = gl.arange(0, 256, gl.SliceLayout(1, layout))[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    base = gl.inline_asm_elementwise(_TABLE_ADDRESS, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    value = gl.load(table_ptr + entry * 2 + word % 2).to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        _STORE_WORD, "=r,r,r", [base + entry * 128 + word * 4, value], dtype=gl.int32, is_pure=False, pack=1
    )
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [0], dtype=gl.int32, is_pure=True, pack=1)
    return base + lane % 16 * 8


@gluon.jit
def copy_step(target, source, wanted):
    """Begin to copy W of a step; zeros for what is not wanted."""
    copy_bytes(target, source, mask=wanted)
    async_copy.commit_group()


@gluon.jit
def load_scales(
    absmax_ptr,
    absmax_8bit_ptr,
    n,
    block,
    limits,
    PER_SCALE: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
):
    """What is stored of the scales of rows n and blocks of 64 k: (8-bit index, its float32 scale), or (nothing, scale).

    `limits` are the ends of n and of block, and the blocks of a row of W.
    """
    offs = (n * limits[2] + block) // PER_SCALE
    mask = (n < limits[0]) & (block < limits[1])
    if NESTED:
        index = gl.load(absmax_8bit_ptr + offs, mask=mask, other=0)
        scale = gl.load(absmax_ptr + offs // NESTED_BLOCK, mask=mask, other=0.0)
    else:
        index = gl.zeros_like(offs).to(gl.uint8)
        scale = gl.load(absmax_ptr + offs, mask=mask, other=0.0)
    return index, scale


@gluon.jit
def look_up(absmax_code_ptr, index, NESTED: gl.constexpr):
    """The entry of the 8-bit map, float32."""
    if NESTED:
        code = gl.load(absmax_code_ptr + index.to(gl.int32))
    else:
        code = gl.zeros_like(index).to(gl.float32)
    return code


@gluon.jit
def store_scales(target, code, stored, offset, NESTED: gl.constexpr):
    """The scales themselves, float32, to shared memory."""
    target.store(code * stored + offset if NESTED else stored)


@gluon.jit
def decode_rows(packed, scales, table, layout: gl.constexpr, operand: gl.constexpr, DTYPE: gl.constexpr):
    """[ROWS, 32] bytes in shared memory, a scale a row, to the operand [ROWS of n, 64 of k]."""
    asm: gl.constexpr = _BYTE_BF16 if is_bf16(DTYPE) else _BYTE_FP16
    ROWS: gl.constexpr = packed.shape[0]
    byte = packed.load(layout).to(gl.int32)
    scale = scales.load(layout)
    even, odd = gl.inline_asm_elementwise(
        asm, "=h,=h,r,f,r", [byte, scale, table], dtype=[DTYPE.value] * 2, is_pure=True, pack=1
    )
    return gl.convert_layout(gl.join(even, odd).reshape([ROWS, 64]), operand, assert_trivial=True)


@gluon.jit
def decode_columns(packed, scales, table, layout: gl.constexpr, operand: gl.constexpr, DTYPE: gl.constexpr):
    """[64, ROWS / 2] bytes of 64 rows n, [64, ROWS / 64] scales, to the operand [ROWS of k, 64 of n].

    Row 16 v + 8 h + g of the operand is k = 16 v + 2 g + h: a byte's two weights stay in one thread, which has rows g
    and g + 8 of its tensor-core operand.
    """
    asm: gl.constexpr = _TWO_ROWS_BF16 if is_bf16(DTYPE) else _TWO_ROWS_FP16
    GROUPS: gl.constexpr = packed.shape[1] // 32
    byte = packed.reshape([64, GROUPS, 32]).load(layout).to(gl.int32)
    byte0, byte1 = byte.reshape([32, 2, GROUPS, 32]).permute((0, 2, 3, 1)).split()
    pairs: gl.constexpr = byte0.type.layout
    scale = scales.load(gl.SliceLayout(2, layout))
    scale0, scale1 = scale.reshape([32, 2, GROUPS]).permute((0, 2, 1)).split()
    scale0 = gl.convert_layout(scale0, gl.SliceLayout(2, pairs), assert_trivial=True)[:, :, None]
    scale1 = gl.convert_layout(scale1, gl.SliceLayout(2, pairs), assert_trivial=True)[:, :, None]
    even0, even1, odd0, odd1 = gl.inline_asm_elementwise(
        asm,
        "=h,=h,=h,=h,r,r,f,f,r",
        [byte0, byte1, scale0, scale1, table],
        dtype=[DTYPE.value] * 4,
        is_pure=True,
        pack=1,
    )
    weights = gl.join(gl.join(even0, even1), gl.join(odd0, odd1))  # [pair of n, group, byte, n, k]
    weights = weights.reshape([32, GROUPS * 4, 8, 2, 2]).permute((1, 4, 2, 0, 3)).reshape([GROUPS * 64, 64])
    return gl.convert_layout(weights, operand, assert_trivial=True)


@gluon.jit
def in_order_of_k(acc):
    """Rows as `decode_columns` leaves them to rows in the order of k."""
    ROWS: gl.constexpr = acc.shape[0]
    return acc.reshape([ROWS // 16, 2, 8, acc.shape[1]]).permute((0, 2, 1, 3)).reshape([ROWS, acc.shape[1]])


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    M,
    R,
    first_tile,
    columns_of_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the parts of split tiles in order, and the bias, to out[M, R]; a program takes PIECE columns of a tile.

    EARLY as in `_early.py`.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    at = parts_ptr + tile.to(tl.int64) * (PARTS * ROWS * COLUMNS) + columns[:, None] * ROWS + rows[None, :]
    total = tl.load(at)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * ROWS * COLUMNS)
    r = (first_tile + tile) // columns_of_tiles * ROWS + rows
    m = (first_tile + tile) % columns_of_tiles * COLUMNS + columns
    if HAS_BIAS:
        total += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])
