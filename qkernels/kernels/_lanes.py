"""Instructions that a kernel gives lane by lane: loads of 16 bytes, shared memory by address, shuffles, tensor cores.

A tensor here has one element a thread, `[32 num_warps]`, so an operation on it is one instruction a lane.  Tensor cores
are reached by `mma.sync` itself: Triton's `tl.dot` becomes scalar code on sm_75, and layouts of whole tiles would not
let a thread decode its own bytes straight into its fragment.

Shared memory is the kernel's one Gluon allocation, whose address is the symbol `global_smem`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

# Weights are read once: they must not push x out of the first-level cache.
_LOAD_ONCE = gl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_IF = gl.constexpr(
    "{ .reg .pred inside; setp.ne.b32 inside, $5, 0;"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @inside ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
_STORE_SHARED_PAIR = gl.constexpr("{ st.shared.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }")
_FROM_LANE = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
_SWAP_1 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")
_SWAP = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;")


@gluon.constexpr_function
def entry_asm(word: str, byte: int, lane_offset: str) -> list[str]:
    """`address` of a byte's entry in a table of rows of 128 bytes, at which each lane has its own place.

    The sum of four products of bytes, of which one is 128 and the others are 0: one instruction, and not of the integer
    unit, which is the busier one.
    """
    return [
        f"dp4a.u32.u32 address, {word}, {0x80 << 8 * byte:#x}, {lane_offset};",
        "add.u32 address, address, table;",
    ]


def _look_up_asm() -> str:
    """Four bytes of row g and four of row g + 8 ($8, $9) to the eight registers of two m16n8k16 fragments.

    A byte's entry is at 128 byte + 4 lane ($10): each lane has a bank of its own.
    """
    lines = ["{ .reg .b32 address, table;", "mov.u32 table, global_smem;"]
    for step in range(2):
        for register, (row, byte) in enumerate((("$8", 0), ("$9", 0), ("$8", 1), ("$9", 1))):
            lines += entry_asm(row, 2 * step + byte, "$10")
            lines.append(f"ld.shared.b32 ${4 * step + register}, [address];")
    return "\n".join(lines) + "\n}"


def _mma_asm(kind: str) -> str:
    """$0..$3 = $16..$19 + two k16 steps of fragments $4..$11 (W) and $12..$15 (x); kind "f16", "bf16" or "sm_75"."""
    lines = []
    for step in range(2):
        a = [f"${4 + 4 * step + register}" for register in range(4)]
        b = [f"${12 + 2 * step + register}" for register in range(2)]
        added = "{$16, $17, $18, $19}" if step == 0 else "{$0, $1, $2, $3}"
        out = "{$0, $1, $2, $3}"
        if kind == "sm_75":
            name = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
            lines += [
                f"{name} {out}, {{{a[0]}, {a[1]}}}, {{{b[0]}}}, {added};",
                f"{name} {out}, {{{a[2]}, {a[3]}}}, {{{b[1]}}}, {out};",
            ]
        else:
            name = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
            lines.append(f"{name} {out}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {added};")
    return "\n".join(lines)


_LOOK_UP = gl.constexpr(_look_up_asm())
_MMA_F16 = gl.constexpr(_mma_asm("f16"))
_MMA_BF16 = gl.constexpr(_mma_asm("bf16"))
_MMA_SM75 = gl.constexpr(_mma_asm("sm_75"))


@gluon.jit
def load_once(address):
    """16 bytes at an int64 address that no one reads again: four int32."""
    return gl.inline_asm_elementwise(
        _LOAD_ONCE, "=r,=r,=r,=r,l", [address], dtype=[gl.int32] * 4, is_pure=False, pack=1
    )


@gluon.jit
def load_if(address, inside):
    """16 bytes at an int64 address where `inside`, int32, is not zero; else zeros."""
    return gl.inline_asm_elementwise(
        _LOAD_IF, "=&r,=&r,=&r,=&r,l,r", [address, inside], dtype=[gl.int32] * 4, is_pure=False, pack=1
    )


@gluon.jit
def load_vector(address):
    """16 bytes at an int64 address: four int32."""
    return gl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [address],
        dtype=[gl.int32] * 4,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def shared_address(thread):
    """Where shared memory begins; `thread` gives the result its shape."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_shared(address):
    return gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def store_shared(address, value):
    gl.inline_asm_elementwise(
        "{ st.shared.b32 [$1], $2; mov.b32 $0, 0; }", "=r,r,r", [address, value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store_shared_pair(address, first, second):
    gl.inline_asm_elementwise(
        _STORE_SHARED_PAIR, "=r,r,f,f", [address, first, second], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_all(thread):
    """A barrier of the program's warps."""
    gl.inline_asm_elementwise("{ bar.sync 0; mov.b32 $0, 0; }", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warp_number(WARPS: gl.constexpr):
    """This thread's warp, modulo a power of two: a scalar to Gluon though it differs between warps, for branches that a
    whole warp takes.  The compiler knows nothing of its range."""
    return gl.inline_asm_elementwise(
        "{ mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; and.b32 $0, $0, $1; }",
        "=&r,r",
        [WARPS - 1],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def from_neighbour(value, STEP: gl.constexpr):
    """The value of lane ^ STEP, 1 or 2."""
    return gl.inline_asm_elementwise(
        _SWAP if STEP == 2 else _SWAP_1, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def from_lane(value, lane):
    """The value of another lane of the warp."""
    return gl.inline_asm_elementwise(_FROM_LANE, "=r,r,r", [value, lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def code_of_lane(lane, CODES: gl.constexpr):
    """The code of number lane % 16, of 16 integers."""
    code = lane * 0
    for index in gl.static_range(16):
        code = gl.where(lane % 16 == index, CODES[index], code)
    return code


@gluon.jit
def look_up(row, row8, lane4):
    """Decode four bytes of a row and four of the row eight below it: eight fragment registers."""
    return gl.inline_asm_elementwise(
        _LOOK_UP,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
        [row, row8, lane4],
        dtype=[gl.int32] * 8,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def mma(a, x, FIRST: gl.constexpr, acc, KIND: gl.constexpr):
    """acc (4 float32) plus 16 x 32 weights `a` (8 registers) times x[FIRST : FIRST + 4]."""
    return gl.inline_asm_elementwise(
        _MMA_SM75 if KIND == "sm_75" else (_MMA_BF16 if KIND == "bf16" else _MMA_F16),
        "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        a + (x[FIRST], x[FIRST + 1], x[FIRST + 2], x[FIRST + 3]) + acc,
        dtype=[gl.float32] * 4,
        is_pure=True,
        pack=1,
    )
