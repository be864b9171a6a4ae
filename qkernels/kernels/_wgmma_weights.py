"""W in the Hopper product: its packed bytes into shared memory, and from there to the operand of a tensor core.

The operand is in registers; how four bytes become eight weights is in `_wgmma_codes.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ._wgmma_codes import eight_weights
from ._wgmma_scales import scales_of_columns, scales_of_rows

_W_ADDRESS = gl.constexpr("{ .shared .align 128 .b8 qk_packed[16384]; mov.u32 $0, qk_packed; }")
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
_EIGHT = gl.constexpr("=&r," * 8 + "r")
_SIXTEEN = gl.constexpr("=&r," * 16 + "r")


@gluon.constexpr_function
def lanes_layout(rows):
    """A value a thread, [groups, warps of a group, 8, 4]: as a tensor core's operand has them."""
    groups = (rows // 64).bit_length() - 1
    lane_bases = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    warp_bases = [[0, 1, 0, 0], [0, 2, 0, 0]] + [[1 << i, 0, 0, 0] for i in range(groups)]
    return gl.DistributedLinearLayout([], lane_bases, warp_bases, [], [rows // 64, 4, 8, 4])


@gluon.jit
def packed_memory():
    """Address in shared memory of W's bytes, four tiles of 4 KiB."""
    return gl.inline_asm_elementwise(_W_ADDRESS, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def places(memory, BACKWARD: gl.constexpr, ROWS: gl.constexpr, lanes: gl.constexpr):
    """A thread's place in W's bytes of a step.

    Returns:
        (its line of n and 16 bytes of it that it copies, the address for these, the address at which it reads, which
        bytes of what it reads, and their place for a product of bytes).
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
        chosen = place
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
def _operand(parts, ROWS: gl.constexpr, how: gl.constexpr):
    """32 tensors of a value a thread, by (row / 8, k / 32, k / 16, k / 8, k) in their order, to [ROWS, 64]."""
    whole = _joined(parts, 0, 32)  # [group, warp, 8, 4, k, k / 8, k / 16, k / 32, row / 8]
    whole = whole.permute((0, 1, 8, 2, 7, 6, 5, 3, 4)).reshape([ROWS, 64])
    return gl.convert_layout(whole, how.operand, assert_trivial=True)


@gluon.jit
def _joined(parts, begin: gl.constexpr, end: gl.constexpr):
    middle: gl.constexpr = (begin + end) // 2
    if end - begin == 2:
        result = gl.join(parts[begin], parts[begin + 1])
    else:
        result = gl.join(_joined(parts, begin, middle), _joined(parts, middle, end))
    return result


@gluon.jit
def decode_rows(address, spots, scales, how: gl.constexpr):
    """Bytes of 64 weights of W's rows, scales [ROWS, 1 or 2], to the operand [ROWS of n, 64 of k]."""
    ROWS: gl.constexpr = scales.shape[0]
    words = gl.inline_asm_elementwise(  # [row / 8, k / 32, k / 8]
        _READ_ROWS, _SIXTEEN, [address], dtype=[gl.int32] * 16, is_pure=False, pack=1
    )
    scale = scales_of_rows(scales)
    of_lanes: gl.constexpr = gl.SliceLayout(3, how.lanes)
    parts = ()
    for i in gl.static_range(4):
        scale_i = gl.convert_layout(scale[i], of_lanes, assert_trivial=True)[:, :, :, None]
        four = (words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
        parts += eight_weights(four, spots, (scale_i,), how, i % 2 * 2 + i // 2 < how.tabled)
    return _operand(parts, ROWS, how)


@gluon.jit
def decode_columns(address, spots, scales, how: gl.constexpr):
    """Bytes of 64 rows n, scales [64, groups or twice as many], to the operand [ROWS of k, 64 of n].

    Row 32 v + 16 w + 8 h + g of the operand is k = 32 v + 4 g + 2 w + h: a byte's two weights stay in one thread.
    """
    GROUPS: gl.constexpr = address.shape[0]
    words = gl.inline_asm_elementwise(  # [n / 8]
        _READ_COLUMNS, _EIGHT, [address], dtype=[gl.int32] * 8, is_pure=False, pack=1
    )
    lanes: gl.constexpr = how.lanes  # Triton 3.6 takes an attribute for no constant where a jit function is called
    scale = scales_of_columns(scales, lanes, GROUPS)
    upper = ()  # rows g, and g + 8
    lower = ()
    for i in gl.static_range(4):
        four = (scale[4 * i], scale[4 * i + 1], scale[4 * i + 2], scale[4 * i + 3])
        two = (words[2 * i], words[2 * i + 1])
        part = eight_weights(two, spots, four, how, i < how.tabled)  # [n / 8, row / 8, n]
        upper += (part[0], part[1], part[4], part[5])
        lower += (part[2], part[3], part[6], part[7])
    return _operand(upper + lower, GROUPS * 64, how)
