"""W in the Hopper product: from packed bytes to the operand of a tensor core, in registers.

TABLED of four bytes are looked up in shared memory, whose bandwidth the products want too: a table of float32 pairs
stands there 16 times, entry b for lane l at b * 128 + l % 16 * 8 bytes, so that lanes which a load serves at a time
never meet in a bank.  The others are decoded without it.  The sixteen codes are 16-bit integers, held as low and as
high bytes in eight registers, from which a nibble selects by byte permutation.  An integer is made float32 by adding it
to the bits of 3 * 2^22, which `dp2a` does beside taking it out of its pair.  Either way it is multiplied by the scale
and rounded to 16 bits.  So a weight is that of `dequantize_4bit`, or sometimes its neighbour: the codes as integers,
which the table holds too, are off by less than a thirtieth of the rounding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ._wgmma_scales import scales_of_columns, scales_of_rows

# Codes of 4 bits as 16-bit integers, code = integer / divisor.  Of all divisors, NF4's errs least where weights are
# normally distributed: 3.5e-6 in root mean square.  FP4's are exact.
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
W_SLOTS = 4
_W_ADDRESS = gl.constexpr("{ .shared .align 128 .b8 qk_packed[16384]; mov.u32 $0, qk_packed; }")
_TABLE_ADDRESS = gl.constexpr("{ .shared .align 128 .b8 qk_byte_table[32768]; mov.u32 $0, qk_byte_table; }")
_STORE_WORD = gl.constexpr("st.shared.b32 [$1], $2; mov.u32 $0, $2;")
_COPY = gl.constexpr("cp.async.cg.shared.global [$1], [$2], 16, $3; mov.u32 $0, 0;")
_READ_ROWS = gl.constexpr(
    "{ .reg .b32 b; xor.b32 b, $16, 16; "
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$16]; ld.shared.v4.b32 {$4, $5, $6, $7}, [b]; "
    "ld.shared.v4.b32 {$8, $9, $10, $11}, [$16 + 256]; ld.shared.v4.b32 {$12, $13, $14, $15}, [b + 256]; }"
)
_READ_COLUMNS = gl.constexpr(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$8]; "
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$4, $5, $6, $7}, [$8 + 2048];"
)


def _look_up(cvt: str, backward: bool) -> str:
    """Assembly: words from $8 on, the byte's place, table, scales to eight weights $0 to $7, pairs of a register."""
    words = 2 if backward else 4
    place, table, scale = 8 + words, 9 + words, 10 + words
    lines = [".reg .b32 a, b, p, q; .reg .f32 e, o, f, g;"]
    if backward:
        lines.append(f"shl.b32 q, ${place}, 16;")
        for word in (0, 1):
            even, odd = scale + 2 * word, scale + 2 * word + 1
            lines.append(f"dp4a.u32.u32 a, ${8 + word}, ${place}, ${table}; dp4a.u32.u32 b, ${8 + word}, q, ${table};")
            lines.append("ld.shared.v2.f32 {e, o}, [a]; ld.shared.v2.f32 {f, g}, [b];")
            lines.append(f"mul.rn.f32 e, e, ${even}; mul.rn.f32 o, o, ${even};")
            lines.append(f"mul.rn.f32 f, f, ${odd}; mul.rn.f32 g, g, ${odd};")
            lines.append(f"{cvt} p, f, e; mov.b32 {{${4 * word}, ${4 * word + 1}}}, p;")
            lines.append(f"{cvt} p, g, o; mov.b32 {{${4 * word + 2}, ${4 * word + 3}}}, p;")
    else:
        for word in range(4):
            lines.append(f"dp4a.u32.u32 a, ${8 + word}, ${place}, ${table}; ld.shared.v2.f32 {{e, o}}, [a];")
            lines.append(f"mul.rn.f32 e, e, ${scale}; mul.rn.f32 o, o, ${scale};")
            lines.append(f"{cvt} p, o, e; mov.b32 {{${2 * word}, ${2 * word + 1}}}, p;")
    return "{ " + " ".join(lines) + " }"


def _decode(quant_type: str, cvt: str, backward: bool) -> str:
    """Assembly: eight nibbles $8, their scales from $9 on, to eight weights $0 to $7, pairs of a register."""
    codes = CODES16[quant_type][1]
    low, high = (
        [sum((code >> shift & 255) << 8 * i for i, code in enumerate(codes[q : q + 4])) for q in (0, 4, 8, 12)]
        for shift in (0, 8)
    )
    words = 2 if backward else 4
    chosen, scale0 = 8 + words, 10 + words
    # The even or the odd bytes of two words, by the place of the first one.
    gather = "shr.u32 g, $10, 15; mad.lo.u32 g, g, 0x1111, 0x6420; prmt.b32 g, $8, $9, g;"
    if not backward:
        gather = f"prmt.b32 g, $8, $9, ${chosen}; prmt.b32 s, $10, $11, ${chosen}; prmt.b32 g, g, s, 0x5410;"
    scales = range(4 if backward else 1)
    lines = [
        ".reg .b32 g, s, h, a, b, c, d, p, i, j; .reg .f32 e, o, f<4>;",
        # The low three bits of a nibble select from each half of the table, the highest selects the half.
        gather,
        "and.b32 s, g, 0x77777777; shr.u32 h, g, 1; lop3.b32 h, h, 0x44444444, 0x32103210, 0xea;",
        *(f"mul.rn.f32 f{scale}, ${scale0 + scale}, 0fCB400000;" for scale in scales),
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
            lines.append(f"fma.rn.f32 e, e, ${scale0 + even}, f{even}; fma.rn.f32 o, o, ${scale0 + odd}, f{odd};")
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


_LOOK_UP = gl.constexpr(
    {
        (bf16, backward): _look_up(f"cvt.rn.{'bf16x2' if bf16 else 'f16x2'}.f32", backward)
        for bf16 in (False, True)
        for backward in (False, True)
    }
)
_EIGHT = gl.constexpr("=&r," * 8 + "r")
_SIXTEEN = gl.constexpr("=&r," * 16 + "r")
_EIGHT_OF_ONE = gl.constexpr("=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,f")
_EIGHT_OF_FOUR = gl.constexpr("=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,f,f,f,f")


@gluon.constexpr_function
def decoding(quant_type, dtype, backward, tabled):
    """Assembly that decodes eight nibbles, by a table or by byte permutation."""
    if tabled:
        return _LOOK_UP.value[dtype.is_bf16(), backward]
    return _DECODE.value[quant_type, dtype.is_bf16(), backward]


@gluon.constexpr_function
def code_unit(quant_type):
    """By which a code as an integer is multiplied."""
    return 1.0 / CODES16[quant_type][0]


@gluon.constexpr_function
def lanes_layout(rows):
    """A value a thread, [groups, warps of a group, 8, 4]: as a tensor core's operand has them."""
    groups = (rows // 64).bit_length() - 1
    lane_bases = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    warp_bases = [[0, 1, 0, 0], [0, 2, 0, 0]] + [[1 << i, 0, 0, 0] for i in range(groups)]
    return gl.DistributedLinearLayout([], lane_bases, warp_bases, [], [rows // 64, 4, 8, 4])


@gluon.jit
def packed_memory():
    """Address in shared memory of W's bytes, W_SLOTS tiles of 4 KiB."""
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
        place = none + (128 << warp % 2 * 8)
        chosen = place  # not read
    else:
        line = none + group * 64 + warp * 16 + lane // 2
        chunk = none + lane % 2
        target = memory + line * 32 + (chunk ^ (line // 4 & 1)) * 16
        read = none + memory + (group * 64 + warp * 16 + g) * 32 + g // 4 * 16
        chosen = none + 0x40 + 0x11 * t
        place = none + (128 << t * 8)
    return line, chunk, target, read, chosen, place


@gluon.jit
def copy_step(
    target, packed_ptr, line, chunk, row0, step, wanted, N, blocks, UNIT: gl.constexpr, BACKWARD: gl.constexpr
):
    """Begin to copy W of one step, 16 bytes a thread, to shared memory; zeros beyond the edges of W."""
    if BACKWARD:
        n = step * 64 + line
        byte = row0 // 2 + chunk * 16
    else:
        n = row0 + line
        byte = step * 32 + chunk * 16
    HALF: gl.constexpr = UNIT // 2
    size = gl.where((n < N) & (byte < blocks * HALF) & wanted, 16, 0)
    source = packed_ptr + (n.to(gl.int64) * (blocks * HALF) + byte)
    gl.inline_asm_elementwise(_COPY, "=r,r,l,r", [target, source.to(gl.int64), size], gl.int32, is_pure=False, pack=1)
    async_copy.commit_group()


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
def fill_table(table_ptr, WARPS: gl.constexpr, QUANT_TYPE: gl.constexpr):
    """Codes float32[256, 2] of bytes, as integers, into shared memory 16 times; the address of this lane's copy."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    entry = gl.arange(0, 256, gl.SliceLayout(1, layout))[:, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    base = gl.inline_asm_elementwise(_TABLE_ADDRESS, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    divisor: gl.constexpr = 1.0 / code_unit(QUANT_TYPE)
    value = gl.floor(gl.load(table_ptr + entry * 2 + word % 2) * divisor + 0.5).to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        _STORE_WORD, "=r,r,r", [base + entry * 128 + word * 4, value], dtype=gl.int32, is_pure=False, pack=1
    )
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [0], dtype=gl.int32, is_pure=True, pack=1)
    return base + lane % 16 * 8


@gluon.jit
def _eight(asm: gl.constexpr, words, places, scales, DTYPE: gl.constexpr):
    """Four bytes a thread and their scale, or four scales, to eight weights."""
    BACKWARD: gl.constexpr = len(scales) == 4
    constraints: gl.constexpr = _EIGHT_OF_FOUR if BACKWARD else _EIGHT_OF_ONE
    if BACKWARD:
        arguments = [words[0], words[1], places[0], places[1], scales[0], scales[1], scales[2], scales[3]]
    else:
        arguments = [words[0], words[1], words[2], words[3], places[0], places[1], scales[0]]
    return gl.inline_asm_elementwise(asm, constraints, arguments, dtype=[DTYPE.value] * 8, is_pure=True, pack=1)


@gluon.jit
def decode_rows(address, spots, scales, how: gl.constexpr):
    """Bytes of 64 weights of W's rows, scales [ROWS, 1 or 2], to the operand [ROWS of n, 64 of k]."""
    chosen, place, table = spots
    QUANT_TYPE: gl.constexpr = how[0]
    lanes: gl.constexpr = how[1]
    operand: gl.constexpr = how[2]
    DTYPE: gl.constexpr = how[3]
    TABLED: gl.constexpr = how[4]
    ROWS: gl.constexpr = scales.shape[0]
    words = gl.inline_asm_elementwise(  # [row / 8, k / 32, k / 8]
        _READ_ROWS, _SIXTEEN, [address], dtype=[gl.int32] * 16, is_pure=False, pack=1
    )
    scale = scales_of_rows(scales)
    of_lanes: gl.constexpr = gl.SliceLayout(3, lanes)
    parts = ()
    for i in gl.static_range(4):
        scale_i = gl.convert_layout(scale[i], of_lanes, assert_trivial=True)[:, :, :, None]
        four = (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
        if i % 2 * 2 + i // 2 < TABLED:
            parts += _eight(decoding(QUANT_TYPE, DTYPE, False, True), four, (place, table), (scale_i,), DTYPE)
        else:
            parts += _eight(decoding(QUANT_TYPE, DTYPE, False, False), four, (chosen, chosen), (scale_i,), DTYPE)
    return _operand(parts, ROWS, operand)


@gluon.jit
def decode_columns(address, spots, scales, how: gl.constexpr):
    """Bytes of 64 rows n, scales [64, groups or twice as many], to the operand [ROWS of k, 64 of n].

    Row 32 v + 16 w + 8 h + g of the operand is k = 32 v + 4 g + 2 w + h: a byte's two weights stay in one thread.
    """
    _, place, table = spots
    QUANT_TYPE: gl.constexpr = how[0]
    lanes: gl.constexpr = how[1]
    operand: gl.constexpr = how[2]
    DTYPE: gl.constexpr = how[3]
    TABLED: gl.constexpr = how[4]
    GROUPS: gl.constexpr = address.shape[0]
    words = gl.inline_asm_elementwise(  # [n / 8]
        _READ_COLUMNS, _EIGHT, [address], dtype=[gl.int32] * 8, is_pure=False, pack=1
    )
    scale = scales_of_columns(scales, lanes, GROUPS)
    upper = ()  # rows g, and g + 8
    lower = ()
    for i in gl.static_range(4):
        four = ()
        for j in gl.static_range(4):
            four += (scale[4 * i + j],)
        two = (words[2 * i], words[2 * i + 1])
        if i < TABLED:
            part = _eight(
                decoding(QUANT_TYPE, DTYPE, True, True), two, (place, table), four, DTYPE
            )  # [n / 8, row / 8, n]
        else:
            part = _eight(decoding(QUANT_TYPE, DTYPE, True, False), two, (place, place), four, DTYPE)
        upper += (part[0], part[1], part[4], part[5])
        lower += (part[2], part[3], part[6], part[7])
    return _operand(upper + lower, GROUPS * 64, operand)
