"""Instructions of the backward product for few rows, lane by lane: W's bytes into registers and into fragments.

The kernel and the reasons are in `matmul_skinny_dx.py`; what the forward product has too is in `_lanes.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._lanes import code_of_lane, entry_asm, from_lane, load_if, store_shared_pair


@gluon.constexpr_function
def _load_asm(words, LEAST, CACHE):
    """So many words at $words, by $(words + 1) as `load_words` says."""
    registers = ", ".join(f"${word}" for word in range(words))
    kind = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[words]
    to = registers if words == 1 else f"{{{registers}}}"
    test = f"ge.s32 inside, ${words + 1}, {LEAST}" if LEAST else f"ne.b32 inside, ${words + 1}, 0"
    return f"{{ .reg .pred inside; setp.{test}; @inside ld.global.L1::{CACHE}.{kind} {to}, [${words}]; }}"


@gluon.constexpr_function
def _load_registers(words):
    return "=r," * words + "l,r"


@gluon.constexpr_function
def weights_asm(word: str, byte: int, out: str, scales: tuple[str, str], lane_offset: str, kind: str) -> list[str]:
    """A byte's two codes times the scales of their rows, rounded, as the fragment register `out`."""
    scale, scale_1 = scales
    lines = [
        *entry_asm(word, byte, lane_offset),
        "ld.shared.v2.f32 {code, code_1}, [address];",
        f"mul.rn.f32 code, code, {scale}; mul.rn.f32 code_1, code_1, {scale_1};",
    ]
    if kind != "sm_75":
        return [*lines, f"cvt.rn.{kind}x2.f32 {out}, code_1, code;"]
    return [
        *lines,
        "{ .reg .b16 low, high; cvt.rn.f16.f32 low, code; cvt.rn.f16.f32 high, code_1;",
        f"mov.b32 {out}, {{low, high}}; }}",
    ]


@gluon.constexpr_function
def eight_weights_asm(even: str, odd: str, scales: tuple[str, str], lane_offset: str, kind: str) -> list[str]:
    """Four bytes of pairs of even k and four of odd k to the fragment registers $0 to $7, as of `decode_pair`."""
    lines = []
    for number in range(4):
        for half, word in enumerate((even, odd)):
            lines += weights_asm(word, number, f"${2 * number + half}", scales, lane_offset, kind)
    return lines


@gluon.constexpr_function
def _decode_asm(kind):
    """Four bytes of rows n and n + 1 ($8, $9), their scales ($10, $11): eight fragment registers.

    Of each byte first the even k of both rows, then the odd k.  The nibbles of two rows are put together to one byte,
    whose two codes a table has in float32, entry b for this lane at 128 b + $12.
    """
    lines = [
        "{ .reg .b32 even, odd, address, table; .reg .f32 code, code_1;",
        "mov.u32 table, global_smem;",
        "shr.b32 even, $9, 4; lop3.b32 even, $8, even, 0xF0F0F0F0, 0xE4;",
        "shl.b32 odd, $8, 4; lop3.b32 odd, odd, $9, 0xF0F0F0F0, 0xE4;",
        *eight_weights_asm("even", "odd", ("$10", "$11"), "$12", kind),
    ]
    return "\n".join(lines) + "\n}"


_LOAD_SHARED_VECTOR = gl.constexpr("ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];")


@gluon.jit
def load_words(address, inside, WORDS: gl.constexpr, LEAST: gl.constexpr, CACHE: gl.constexpr):
    """4 WORDS bytes at an int64 address where `inside`, int32, is at least LEAST, or for LEAST 0 not zero: a tuple of
    int32.  Elsewhere they are as they were, and no one reads them.  CACHE is what the first-level cache does."""
    return gl.inline_asm_elementwise(
        _load_asm(WORDS, LEAST, CACHE),
        _load_registers(WORDS),
        [address, inside],
        dtype=[gl.int32] * WORDS,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def decode_pair(row, row_1, scale, scale_1, lane8, KIND: gl.constexpr):
    """Four bytes of two neighbouring rows: for each byte the pair of its even k and the pair of its odd k."""
    return gl.inline_asm_elementwise(
        _decode_asm(KIND),
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,f,f,r",
        [row, row_1, scale, scale_1, lane8],
        dtype=[gl.int32] * 8,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_shared_vector(address):
    """16 bytes: four float32."""
    return gl.inline_asm_elementwise(
        _LOAD_SHARED_VECTOR, "=f,=f,=f,=f,r", [address], dtype=[gl.float32] * 4, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_warp(thread):
    """A barrier of a warp's lanes."""
    gl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, 0; }", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fill_table(shared, warp, lane, CODES: gl.constexpr, num_warps: gl.constexpr):
    """The two codes of every byte, high nibble first, two entries at a time; `CODES` are the bits of float32."""
    code = code_of_lane(lane, CODES)
    for i in gl.static_range(128 // num_warps):
        byte = (warp * (128 // num_warps) + i) * 2 + lane // 16
        first = from_lane(code, byte // 16).to(gl.float32, bitcast=True)
        second = from_lane(code, byte % 16).to(gl.float32, bitcast=True)
        store_shared_pair(shared + byte * 128 + lane % 16 * 8, first, second)


@gluon.jit
def load_dy(dy_ptr, m, first, n, inside, M, N, ALIGNED: gl.constexpr, RAGGED: gl.constexpr, COLUMNS: gl.constexpr):
    """dy[m + 8 j, first : first + 8] of every j, of it what is at n and after: four registers each.

    RAGGED: first + 8 may be past the end of a row.
    """
    dy = ()
    for j in gl.static_range(COLUMNS // 8):
        row = m + 8 * j
        here = dy_ptr + (row.to(gl.int64) * N + first)
        if ALIGNED:
            dy = dy + load_if(here.to(gl.int64), inside & ((row < M) & (first >= n)).to(gl.int32))
        else:
            for pair in gl.static_range(4):
                word = row * 0
                for half in gl.static_range(2):
                    i = 2 * pair + half
                    mask = (row < M) & (first + i >= n) & (inside != 0)
                    if RAGGED:
                        mask = mask & (first + i < N)
                    value = gl.load(here + i, mask=mask, other=0.0).to(gl.int16, bitcast=True)
                    word |= (value.to(gl.int32) & 0xFFFF) << (16 * half)
                dy = dy + (word,)
    return dy
