"""An adapter's update within Hopper's product: one more short step of the contraction, out^T += w u^T.

w is B [N, r], backward A [r, K] with its rows as the product's; u [M, r] is what `lora.py` sums up.  Neither y nor dx
is read or written again for it.  The rank goes in slices of 16, as deep as an instruction.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from ._wgmma import same_bytes

_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))


@gluon.jit
def inner_memory(stage, RANK: gl.constexpr, BACKWARD: gl.constexpr):
    """Shared memory for u, [RANK / 16, COLUMNS, 16]: its own, backward that of a tile of x.

    Either is right for both.  With these none of the kernel's variants needs a register more than there are.
    """
    shape: gl.constexpr = [RANK // 16, stage.shape[0], 16]
    if not BACKWARD:
        memory = gl.allocate_shared_memory(stage.dtype, shape, _LAYOUT)
    else:
        memory = same_bytes(stage, stage.dtype, shape, _LAYOUT)
    return memory


@gluon.jit
def store_inner(inner_ptr, shared, column0, M, PARTS: gl.constexpr, WARPS: gl.constexpr):
    """u of a tile's columns to shared memory, its parts added in order.  A barrier must follow."""
    PIECES: gl.constexpr = shared.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    m = column0 + gl.arange(0, shared.shape[1], gl.SliceLayout(1, layout))[:, None]
    at = inner_ptr + m.to(gl.int64) * (16 * PIECES) + gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :]
    mask = m < M
    for piece in range(PIECES):
        total = gl.load(at + 16 * piece, mask=mask, other=0.0).to(gl.float32)
        for part in gl.static_range(1, PARTS):
            total += gl.load(at + 16 * piece + part * M.to(gl.int64) * (16 * PIECES), mask=mask, other=0.0)
        shared.index(piece).store(total.to(shared.dtype))
    fence_async_shared()


@gluon.jit
def add_adapter(acc, w_ptr, shared, row0, R, r, BACKWARD: gl.constexpr, operand: gl.constexpr):
    """acc[ROWS, COLUMNS] + w[ROWS, RANK] u^T, w rounded to u's dtype."""
    PIECES: gl.constexpr = shared.shape[0]
    row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, operand))
    if BACKWARD:  # the order of rows that `decode_columns` leaves
        row = row // 32 * 32 + row % 8 * 4 + row // 16 % 2 * 2 + row // 8 % 2
    row = (row0 + row)[:, None]
    for piece in range(PIECES):
        j = 16 * piece + gl.arange(0, 16, gl.SliceLayout(0, operand))[None, :]
        at = j * R + row if BACKWARD else row * r + j  # far below 2^31: r is at most 64
        w = gl.load(w_ptr + at, mask=(row < R) & (j < r), other=0.0).to(shared.dtype)
        acc = warpgroup_mma(w, shared.index(piece).permute((1, 0)), acc)
    return acc
