"""Parts of the Hopper product: the table of bytes in shared memory, W decoded into operands, the sum of split tiles.

A byte is decoded by one load from a table of float32 pairs, its two codes, multiplied by the scale and rounded: bit for
bit the weight that `dequantize_4bit` gives.  The table stands 16 times in shared memory, entry b for lane l at
b * 128 + l % 16 * 8 bytes, so the lanes of half a warp, which a load of 8 bytes serves at a time, never meet in a bank.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..format import NESTED_BLOCKSIZE

# Triton 3.6 puts no barrier between those of the kernel.  3.9 does, which makes three or four of the two a step, and
# then warp groups that take turns would wait for each other: there they go together.
TAKE_TURNS = gl.constexpr(hasattr(gl, "thread_barrier"))
# Gluon's names in Triton 3.6 and in 3.9.
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_UNDERSCORED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))
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
_NESTED_BLOCK = gl.constexpr(NESTED_BLOCKSIZE)
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
    """Assembly: eight nibbles $8, their scales from $9 on, to eight weights $0 to $7, pairs of a register."""
    codes = CODES16[quant_type][1]
    low, high = (
        [sum((code >> shift & 255) << 8 * i for i, code in enumerate(codes[q : q + 4])) for q in (0, 4, 8, 12)]
        for shift in (0, 8)
    )
    scales = range(9, 13) if backward else range(9, 10)
    lines = [
        ".reg .b32 s, h, a, b, c, d, p, i, j; .reg .f32 e, o, f<4>;",
        # The low three bits of a nibble select from each half of the table, the highest selects the half.
        "and.b32 s, $8, 0x77777777; shr.u32 h, $8, 1; lop3.b32 h, h, 0x44444444, 0x32103210, 0xea;",
        *(f"mul.rn.f32 f{scale - 9}, ${scale}, 0fCB400000;" for scale in scales),
    ]
    for half in (0, 1):
        if half:
            lines.append("shr.u32 s, s, 16; shr.u32 h, h, 16;")
        lines.append(f"prmt.b32 a, {low[0]}, {low[1]}, s; prmt.b32 b, {low[2]}, {low[3]}, s; prmt.b32 a, a, b, h;")
        lines.append(f"prmt.b32 c, {high[0]}, {high[1]}, s; prmt.b32 d, {high[2]}, {high[3]}, s; prmt.b32 c, c, d, h;")
        for pair, selector in enumerate(("0x7351", "0x6240") if backward else ("0x4051", "0x6273")):
            out = 4 * half + 2 * pair
            even, odd = (2 * half, 2 * half + 1) if backward else (0, 0)
            lines.append(f"prmt.b32 p, a, c, {selector};")
            # An integer added to the bits of 3 * 2^22 makes that number plus the integer, of which this subtracts it.
            lines.append("dp2a.lo.s32.u32 i, p, 0x0001, 0x4b400000; dp2a.lo.s32.u32 j, p, 0x0100, 0x4b400000;")
            lines.append("mov.b32 e, i; mov.b32 o, j;")
            lines.append(f"fma.rn.f32 e, e, ${9 + even}, f{even}; fma.rn.f32 o, o, ${9 + odd}, f{odd};")
            lines.append(f"{cvt} p, o, e; mov.b32 {{${out}, ${out + 1}}}, p;")
    return "{ " + " ".join(lines) + " }"


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
def storing_layout(rows, columns, backward):
    """A tile of the output [columns, rows], eight neighbours in memory a thread: backward before `in_order_of_k`."""
    order = [0, 1, 2, 3, 4, 5, 6]
    if backward:  # the bits of a row in which the bits of k lie
        order = [3, 4, 0, 1, 2, 5, 6]
    bits = [[0, 1 << bit] for bit in order[: rows.bit_length() - 1]]
    columns_bits = [[1 << bit, 0] for bit in range(columns.bit_length() - 1)]
    warps = (rows // 16).bit_length() - 1
    lanes = bits[3:] + columns_bits[: 5 - len(bits[3:])]
    rest = columns_bits[5 - len(bits[3:]) :]
    return gl.DistributedLinearLayout(bits[:3] + rest[warps:], lanes, rest[:warps], [], [columns, rows])


@gluon.jit
def half_a_turn(odd_groups: gl.constexpr):
    """One more barrier for every second warp group: it then runs one barrier behind (or catches up with) the others."""
    gl.inline_asm_elementwise(_HALF_A_TURN, "=r,r", [odd_groups], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def packed_memory():
    """Address in shared memory of W's bytes, W_STAGES tiles of 4 KiB."""
    return gl.inline_asm_elementwise(_W_ADDRESS, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def places(memory, BACKWARD: gl.constexpr, ROWS: gl.constexpr, lanes: gl.constexpr):
    """A thread's place in W's bytes of a step.

    Returns:
        (its line of n and 16 bytes of it that it copies, the address for these, the address at which it reads, which
        bytes of what it reads).
    """
    GROUPS: gl.constexpr = ROWS // 64
    group = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, lanes))))[:, None, None, None]
    warp = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, lanes))))[None, :, None, None]
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, lanes))))[None, None, :, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, lanes))))[None, None, None, :]
    lane = g * 4 + t
    none = group * 0 + warp * 0 + lane * 0
    if BACKWARD:
        line = none + warp * 16 + lane // 2  # of 64 rows n, in which a group has 32 bytes
        chunk = none + group * 2 + lane % 2
        target = memory + line * (32 * GROUPS) + (chunk ^ (line // 2 & 3)) * 16
        read = memory + lane * (32 * GROUPS) + ((group * 2 + warp // 2) ^ (lane // 2 & 3)) * 16
        chosen = none + gl.where(warp % 2 == 1, 0x7531, 0x6420)
    else:
        line = none + group * 64 + warp * 16 + lane // 2
        chunk = none + lane % 2
        target = memory + line * 32 + (chunk ^ (line // 4 & 1)) * 16
        read = none + memory + (group * 64 + warp * 16 + g) * 32 + g // 4 * 16
        chosen = none + 0x40 + 0x11 * t
    return line, chunk, target, read, chosen


@gluon.jit
def copy_step(target, packed_ptr, line, chunk, row0, step, wanted, N, blocks, BACKWARD: gl.constexpr):
    """Begin to copy W of one step, 16 bytes a thread, to shared memory; zeros beyond the edges of W."""
    if BACKWARD:
        n = step * 64 + line
        byte = row0 // 2 + chunk * 16
    else:
        n = row0 + line
        byte = step * 32 + chunk * 16
    size = gl.where((n < N) & (byte < blocks * 32) & wanted, 16, 0)
    source = packed_ptr + (n.to(gl.int64) * (blocks * 32) + byte)
    gl.inline_asm_elementwise(_COPY, "=r,r,l,r", [target, source.to(gl.int64), size], gl.int32, is_pure=False, pack=1)
    async_copy.commit_group()


@gluon.jit
def share(M, N, K, BACKWARD: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """Turns of all tiles, of a tile, and columns of tiles.  Turns of STAGES steps are counted tile by tile."""
    R = K if BACKWARD else N
    steps = (N + 63) // 64 if BACKWARD else K // 64
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
    """A turn's scales as stored: (8-bit index, its float32 scale), or (nothing, scale)."""
    n = gl.arange(0, shape[0], gl.SliceLayout(1, layout))[:, None]
    block = gl.arange(0, shape[1], gl.SliceLayout(0, layout))[None, :]
    if BACKWARD:
        n += step * 64
        block += row0 // 64
    else:
        n += row0
        block += step
    at = (n * blocks + block) // PER_SCALE
    mask = (n < N) & (block < blocks) & wanted
    if NESTED:
        index = gl.load(absmax_8bit_ptr + at, mask=mask, other=0)
        stored = gl.load(absmax_ptr + at // _NESTED_BLOCK, mask=mask, other=0.0)
    else:
        index = gl.zeros_like(at).to(gl.uint8)
        stored = gl.load(absmax_ptr + at, mask=mask, other=0.0)
    return index, stored


@gluon.jit
def look_up(absmax_code_ptr, index, NESTED: gl.constexpr):
    """The entry of the 8-bit map, float32."""
    return gl.load(absmax_code_ptr + index.to(gl.int32)) if NESTED else gl.zeros_like(index).to(gl.float32)


@gluon.jit
def store_scales(target, code, stored, offset, NESTED: gl.constexpr, QUANT_TYPE: gl.constexpr):
    """Scales to shared memory, for codes as integers, rounded to 22 bits: three times one is exact in float32."""
    unit: gl.constexpr = code_unit(QUANT_TYPE)
    scale = (code * stored + offset if NESTED else stored) * unit
    bits = (scale.to(gl.int32, bitcast=True) + 2) & -4
    target.store(bits.to(gl.float32, bitcast=True))


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
def store_tile(acc, memory, bias_ptr, out_ptr, row0, column0, M, R, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr):
    """Write a tile of the transposed output to out[M, R], with the bias, through two free tiles of x in shared memory."""
    ROWS: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1] // 2
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        r = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias_ptr + r, mask=r < R, other=0.0).to(gl.float32)[:, None]
    halves = acc.to(DTYPE).reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
    for half in gl.static_range(2):
        same_bytes(memory[half], DTYPE, [HALF, ROWS]).permute((1, 0)).store(halves[half])
    block_barrier()
    for half in gl.static_range(2):
        value = same_bytes(memory[half], DTYPE, [HALF, ROWS]).load(storing_layout(ROWS, HALF, BACKWARD))
        _store_half(in_order_of_k(value) if BACKWARD else value, out_ptr, row0, column0 + half * HALF, M, R)
    # What comes there next comes by TMA.
    fence_async_shared()


@gluon.jit
def _store_half(value, out_ptr, row0, column0, M, R):
    layout: gl.constexpr = value.type.layout
    r = row0 + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))[None, :]
    m = column0 + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))[:, None]
    gl.store(out_ptr + m.to(gl.int64) * R + r, value, mask=(r < R) & (m < M))


@gluon.jit
def in_order_of_k(value):
    """Columns in the order of `decode_columns`' rows to the order of k."""
    COLUMNS: gl.constexpr = value.shape[1]
    value = value.reshape([value.shape[0], COLUMNS // 32, 2, 2, 8]).permute((0, 1, 4, 2, 3))
    return value.reshape([value.shape[0], COLUMNS])


@gluon.jit
def same_bytes(memory, dtype: gl.constexpr, shape: gl.constexpr):
    """Shared memory under another type and shape."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if _UNDERSCORED:
        result = memory._reinterpret(dtype, shape, layout)
    else:
        result = memory.reinterpret(dtype, shape, layout)
    return result
