"""The codes of the Hopper product, and how four bytes become eight weights: by a table, or without it.

TABLED of four bytes are looked up in shared memory, whose bandwidth the products want too: a table of float32 pairs
stands there 16 times, entry b for lane l at b * 128 + l % 16 * 8 bytes, so that lanes which a load serves at a time
never meet in a bank.  The others are decoded without it.  The sixteen codes are 16-bit integers, held as low and as
high bytes in eight registers, from which a nibble selects by byte permutation.  An integer is made float32 by adding it
to the bits of 3 * 2^22, which `dp2a` does beside taking it out of its pair.  Either way it is multiplied by the scale
and rounded to 16 bits.  So a weight is that of `dequantize_4bit`, or sometimes its neighbour: the codes as integers,
which the table holds too, are off by less than a thirtieth of the rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
_TABLE_ADDRESS = gl.constexpr("{ .shared .align 128 .b8 qk_byte_table[32768]; mov.u32 $0, qk_byte_table; }")
_STORE_WORD = gl.constexpr("st.shared.b32 [$1], $2; mov.u32 $0, $2;")
_EIGHT_OF_ONE = gl.constexpr("=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,f")
_EIGHT_OF_FOUR = gl.constexpr("=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,f,f,f,f")


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


class Decoding(NamedTuple):
    """What decoding needs to know when it is compiled.

    Attributes:
        quant_type: "nf4" or "fp4".
        dtype: the weights', float16 or bfloat16.
        tabled: how many of four bytes are looked up.
        lanes: `lanes_layout`.
        operand: the layout of the instruction's operand.
    """

    quant_type: str
    dtype: Any
    tabled: int
    lanes: Any
    operand: Any


@gluon.constexpr_function
def decoding(quant_type, dtype, tabled, lanes, operand):
    """That, for a kernel."""
    return Decoding(quant_type, dtype, tabled, lanes, operand)


@gluon.constexpr_function
def _assembly(how, backward, tabled):
    """That decodes eight nibbles, by the table or by byte permutation."""
    if tabled:
        return _LOOK_UP.value[how.dtype.is_bf16(), backward]
    return _DECODE.value[how.quant_type, how.dtype.is_bf16(), backward]


@gluon.constexpr_function
def code_unit(quant_type):
    """By which a code as an integer is multiplied."""
    return 1.0 / CODES16[quant_type][0]


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
def eight_weights(words, spots, scales, how: gl.constexpr, TABLED: gl.constexpr):
    """Four bytes a thread and their scale, or backward four scales, to eight weights.  `spots` are which bytes of the
    words they are, their place for a product of bytes, and the table's address."""
    chosen, place, table = spots
    BACKWARD: gl.constexpr = len(scales) == 4
    if TABLED:
        places = (place, table)
    else:
        places = (chosen, chosen)
    return gl.inline_asm_elementwise(
        _assembly(how, BACKWARD, TABLED),
        _EIGHT_OF_FOUR if BACKWARD else _EIGHT_OF_ONE,
        words + places + scales,
        dtype=[how.dtype] * 8,
        is_pure=True,
        pack=1,
    )
