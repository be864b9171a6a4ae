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

# Triton 3.6 puts no barrier between those of the kernel.  3.9 does, which makes three or four of the two a step, and
# then warp groups that take turns would wait for each other: there they go together.
TAKE_TURNS = gl.constexpr(hasattr(gl, "thread_barrier"))
# Gluon's names in Triton 3.6 and in 3.9.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Codes of 4 bits as 16-bit integers: code = CODE / A.  Found by search over A: of all, these err least on normal weights.
CODES16 = {
    "nf4": (
        25544.940331178313,
        (-25545, -17784, -13413, -10088, -7266, -4720, -2326, 0, 2033, 4111, 6287, 8632, 11258, 14372, 18468, 25545),
    ),
    "fp4": (
        19200.0,
        (0, 100, 12800, 19200, 6400, 9600, 3200, 4800, 0, -100, -12800, -19200, -6400, -9600, -3200, -4800),
    ),
}
W_STAGES = gl.constexpr(8)
_W_ADDRESS = gl.constexpr("{ .shared .align 128 .b8 qk_packed[32768]; mov.u32 $0, qk_packed; }")
_COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16, $3; mov.u32 $0, 0;")
_READ_ROWS = gl.constexpr(
    "{ .reg .b32 b, x, y, w<8>, v<8>; xor.b32 b, $4, 16; "
    "ld.shared.v4.b32 {w0, w1, w2, w3}, [$4]; ld.shared.v4.b32 {v0, v1, v2, v3}, [$4 + 256]; "
    "ld.shared.v4.b32 {w4, w5, w6, w7}, [b]; ld.shared.v4.b32 {v4, v5, v6, v7}, [b + 256]; "
    "prmt.b32 x, w0, w1, $5; prmt.b32 y, w2, w3, $5; prmt.b32 $0, x, y, 0x5410; "
    "prmt.b32 x, w4, w5, $5; prmt.b32 y, w6, w7, $5; prmt.b32 $1, x, y, 0x5410; "
    "prmt.b32 x, v0, v1, $5; prmt.b32 y, v2, v3, $5; prmt.b32 $2, x, y, 0x5410; "
    "prmt.b32 x, v4, v5, $5; prmt.b32 y, v6, v7, $5; prmt.b32 $3, x, y, 0x5410; }"
)
_READ_COLUMNS = gl.constexpr(
    "{ .reg .b32 r<8>; "
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {r0, r1, r2, r3}, [$4]; "
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {r4, r5, r6, r7}, [$4 + 2048]; "
    "prmt.b32 $0, r0, r1, $5; prmt.b32 $1, r2, r3, $5; prmt.b32 $2, r4, r5, $5; prmt.b32 $3, r6, r7, $5; }"
)


def _decode(quant_type: str, cvt: str, backward: bool) -> str:
    """Eight nibbles $8, scales from $9 on, to eight weights $0 to $7, in pairs of a register."""
    codes = [code + 32768 for code in CODES16[quant_type][1]]
    low, high = (
        [sum((code >> shift & 255) << 8 * i for i, code in enumerate(codes[q : q + 4])) for q in (0, 4, 8, 12)]
        for shift in (0, 8)
    )
    lines = [
        ".reg .b32 s, h, a, b, c, d, p; .reg .f32 e, o;",
        "and.b32 s, $8, 0x77777777; shr.u32 h, $8, 1; and.b32 h, h, 0x44444444; or.b32 h, h, 0x32103210;",
    ]
    for half in (0, 1):
        if half:
            lines.append("shr.u32 s, s, 16; shr.u32 h, h, 16;")
        lines.append(f"prmt.b32 a, {low[0]}, {low[1]}, s; prmt.b32 b, {low[2]}, {low[3]}, s; prmt.b32 a, a, b, h;")
        lines.append(f"prmt.b32 c, {high[0]}, {high[1]}, s; prmt.b32 d, {high[2]}, {high[3]}, s; prmt.b32 c, c, d, h;")
        for pair, selector in enumerate(("0x7351", "0x6240") if backward else ("0x4051", "0x6273")):
            out = 4 * half + 2 * pair
            scale = (9 + 2 * half, 10 + 2 * half) if backward else (9, 9)
            lines.append(f"prmt.b32 p, a, c, {selector};")
            lines.append("prmt.b32 s1, p, 0x4b000000, 0x7610; prmt.b32 s2, p, 0x4b000000, 0x7632;")
            lines.append("mov.b32 e, s1; mov.b32 o, s2; add.rn.f32 e, e, 0fCB008000; add.rn.f32 o, o, 0fCB008000;")
            lines.append(f"mul.rn.f32 e, e, ${scale[0]}; mul.rn.f32 o, o, ${scale[1]};")
            lines.append(f"{cvt} p, o, e; mov.b32 {{${out}, ${out + 1}}}, p;")
    return "{ .reg .b32 s1, s2; " + " ".join(lines) + " }"


_DECODE = gl.constexpr(
    {
        (quant_type, bf16, backward): _decode(quant_type, f"cvt.rn.{'bf16x2' if bf16 else 'f16x2'}.f32", backward)
        for quant_type in CODES16
        for bf16 in (False, True)
        for backward in (False, True)
    }
)
_HALF_A_TURN = gl.constexpr(
    "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; and.b32 t, t, 1; setp.eq.u32 p, t, $1; "
    "@p bar.sync 0; mov.u32 $0, t; }"
)


@gluon.constexpr_function
def decoding(quant_type, dtype, backward):
    return _DECODE.value[quant_type, dtype.is_bf16(), backward]


@gluon.constexpr_function
def code_unit(quant_type):
    return 1.0 / CODES16[quant_type][0]


@gluon.constexpr_function
def lanes_layout(rows):
    """A value a thread, [groups, warps of a group, 8, 4]: as a tensor core's operand has them."""
    groups = (rows // 64).bit_length() - 1
    lane_bases = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    warp_bases = [[0, 1, 0, 0], [0, 2, 0, 0]] + [[1 << i, 0, 0, 0] for i in range(groups)]
    return gl.DistributedLinearLayout([], lane_bases, warp_bases, [], [rows // 64, 4, 8, 4])


@gluon.constexpr_function
def scales_layout(rows, backward):
    """Scales of a step as the operand's threads want them: [rows, 1], backward [64 of n, groups]."""
    groups = (rows // 64).bit_length() - 1
    if backward:
        lane_bases = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
        warp_bases = [[0, 0], [0, 0]] + [[0, 1 << i] for i in range(groups)]
        return gl.DistributedLinearLayout([[1, 0], [8, 0], [16, 0], [32, 0]], lane_bases, warp_bases, [], [64, rows // 64])
    lane_bases = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lane_bases, [[16 << i, 0] for i in range(groups + 2)], [], [rows, 1])


@gluon.constexpr_function
def is_bf16(dtype):
    return dtype.is_bf16()


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
def packed_memory():
    """Address in shared memory of W's bytes, W_STAGES tiles of 4 KiB."""
    return gl.inline_asm_elementwise(_W_ADDRESS, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_bytes(target, source, wanted):
    """Begin to copy 16 bytes a thread to shared memory, zeros where not wanted."""
    size = gl.where(wanted, 16, 0)
    gl.inline_asm_elementwise(
        _COPY, "=r,r,l,r", [target, source.to(gl.int64), size], dtype=gl.int32, is_pure=False, pack=1
    )
    async_copy.commit_group()


@gluon.jit
def load_scales(absmax_ptr, absmax_8bit_ptr, offs, mask, NESTED: gl.constexpr, NESTED_BLOCK: gl.constexpr):
    """What is stored of the scales: (8-bit index, its float32 scale), or (nothing, float32 scale)."""
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
def _operand(parts, ROWS: gl.constexpr, operand: gl.constexpr):
    """32 tensors of a value a thread, by (row / 8, k / 32, k / 16, k / 8, k) in their order, to [ROWS, 64]."""
    whole = _joined(parts, 0, 32)  # [group, warp, 8, 4, k, k / 8, k / 16, k / 32, row / 8]
    whole = whole.permute((0, 1, 8, 2, 7, 6, 5, 3, 4)).reshape([ROWS, 64])
    return gl.convert_layout(whole, operand, assert_trivial=True)


@gluon.jit
def _joined(parts, begin: gl.constexpr, end: gl.constexpr):
    middle: gl.constexpr = (begin + end) // 2
    if end - begin == 2:
        result = gl.join(parts[begin], parts[begin + 1])
    else:
        result = gl.join(_joined(parts, begin, middle), _joined(parts, middle, end))
    return result


@gluon.jit
def decode_rows(address, chosen, scales, asm: gl.constexpr, lanes: gl.constexpr, operand: gl.constexpr, DTYPE: gl.constexpr):
    """Bytes of 64 weights of W's rows, a scale a row, to the operand [ROWS of n, 64 of k]."""
    ROWS: gl.constexpr = scales.shape[0]
    GROUPS: gl.constexpr = ROWS // 64
    b00, b01, b10, b11 = gl.inline_asm_elementwise(
        _READ_ROWS, "=&r,=&r,=&r,=&r,r,r", [address, chosen], dtype=[gl.int32] * 4, is_pure=False, pack=1
    )
    scale = scales.load(scales_layout(ROWS, False))
    scale0, scale1 = scale.reshape([GROUPS, 4, 2, 8]).permute((0, 1, 3, 2)).split()
    slice_: gl.constexpr = gl.SliceLayout(3, lanes)
    scale0 = gl.convert_layout(scale0, slice_, assert_trivial=True)[:, :, :, None]
    scale1 = gl.convert_layout(scale1, slice_, assert_trivial=True)[:, :, :, None]
    parts = ()
    parts += gl.inline_asm_elementwise(asm, "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,f", [b00, scale0], dtype=[DTYPE.value] * 8, is_pure=True, pack=1)
    parts += gl.inline_asm_elementwise(asm, "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,f", [b01, scale0], dtype=[DTYPE.value] * 8, is_pure=True, pack=1)
    parts += gl.inline_asm_elementwise(asm, "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,f", [b10, scale1], dtype=[DTYPE.value] * 8, is_pure=True, pack=1)
    parts += gl.inline_asm_elementwise(asm, "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,f", [b11, scale1], dtype=[DTYPE.value] * 8, is_pure=True, pack=1)
    return _operand(parts, ROWS, operand)


@gluon.jit
def _four(bytes_, scale, asm: gl.constexpr, lanes: gl.constexpr, DTYPE: gl.constexpr):
    """Scales [GROUPS, 4, 2, 2] of n."""
    slice_: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, lanes))
    s0, s1 = scale.split()  # n0
    s00, s80 = s0.split()
    s01, s81 = s1.split()
    s00 = gl.convert_layout(s00, slice_, assert_trivial=True)[:, None, None, :]
    s01 = gl.convert_layout(s01, slice_, assert_trivial=True)[:, None, None, :]
    s80 = gl.convert_layout(s80, slice_, assert_trivial=True)[:, None, None, :]
    s81 = gl.convert_layout(s81, slice_, assert_trivial=True)[:, None, None, :]
    return gl.inline_asm_elementwise(
        asm, "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,f,f,f,f", [bytes_, s00, s01, s80, s81], dtype=[DTYPE.value] * 8, is_pure=True, pack=1
    )


@gluon.jit
def decode_columns(address, chosen, scales, asm: gl.constexpr, lanes: gl.constexpr, operand: gl.constexpr, DTYPE: gl.constexpr):
    """Bytes of 64 rows n, [64, GROUPS] scales, to the operand [ROWS of k, 64 of n].

    Row 32 v + 16 w + 8 h + g of the operand is k = 32 v + 4 g + 2 w + h.
    """
    GROUPS: gl.constexpr = scales.shape[1]
    b0, b1, b2, b3 = gl.inline_asm_elementwise(
        _READ_COLUMNS, "=&r,=&r,=&r,=&r,r,r", [address, chosen], dtype=[gl.int32] * 4, is_pure=False, pack=1
    )
    scale = scales.load(scales_layout(GROUPS * 64, True))
    scale = scale.reshape([2, 2, 2, 4, 2, GROUPS]).permute((5, 3, 2, 4, 1, 0))  # [group, t, n3, n0, n4, n5]
    low, high = scale.split()
    q0, q1 = low.split()
    q2, q3 = high.split()
    p0 = _four(b0, q0, asm, lanes, DTYPE)
    p1 = _four(b1, q1, asm, lanes, DTYPE)
    p2 = _four(b2, q2, asm, lanes, DTYPE)
    p3 = _four(b3, q3, asm, lanes, DTYPE)
    # A piece has (k / 8 of n, row / 8, n): rows of the lower eight of every piece first.
    parts = ()
    parts += (p0[0], p0[1], p0[4], p0[5], p1[0], p1[1], p1[4], p1[5])
    parts += (p2[0], p2[1], p2[4], p2[5], p3[0], p3[1], p3[4], p3[5])
    parts += (p0[2], p0[3], p0[6], p0[7], p1[2], p1[3], p1[6], p1[7])
    parts += (p2[2], p2[3], p2[6], p2[7], p3[2], p3[3], p3[6], p3[7])
    return _operand(parts, GROUPS * 64, operand)


@gluon.jit
def in_order_of_k(acc):
    """Rows as `decode_columns` leaves them to rows in the order of k."""
    ROWS: gl.constexpr = acc.shape[0]
    return acc.reshape([ROWS // 32, 2, 2, 8, acc.shape[1]]).permute((0, 3, 1, 2, 4)).reshape([ROWS, acc.shape[1]])


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
):
    """Add the parts of split tiles in order, and the bias, to out[M, R]; a program takes PIECE columns of a tile."""
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
