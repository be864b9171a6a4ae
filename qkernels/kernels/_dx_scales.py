"""The scales of the backward product for few rows: a program's rows of W by its blocks of 64 k.

Before it multiplies, a thread loads what is stored of a row's neighbouring blocks, decodes it, and leaves the scales in
shared memory, from where each lane takes those of its eight rows and its own block in every step.

The kernel and the reasons are in `matmul_skinny_dx.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._dx_lanes import load_shared_vector
from ._lanes import load_shared, store_shared, wait_for_all


def _load_asm(kind: str) -> str:
    return f"{{ .reg .pred inside; setp.ne.b32 inside, $2, 0; mov.b32 $0, 0; @inside ld.global.{kind} $0, [$1]; }}"


_LOAD_8, _LOAD_16, _LOAD_32 = (gl.constexpr(_load_asm(kind)) for kind in ("u8", "u16", "u32"))


@gluon.jit
def _load_bytes(address, inside, COUNT: gl.constexpr):
    """One, two or four bytes, int32, at an int64 address where `inside` is not zero; else zero."""
    return gl.inline_asm_elementwise(
        _LOAD_32 if COUNT == 4 else (_LOAD_16 if COUNT == 2 else _LOAD_8),
        "=&r,l,r",
        [address, inside],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_stored(
    absmax_ptr,
    absmax_8bit_ptr,
    row,
    block,
    inside,
    BLOCKS: gl.constexpr,
    K: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
):
    """What is stored for BLOCKS blocks of a row: the scales, nested (bytes of 8-bit indices, and scales of these).

    Where a row's blocks are a multiple of BLOCKS, those of a lane lie in one word and have one scale of their own.
    """
    PER_BLOCK: gl.constexpr = QUANT_BLOCK // 64
    TOGETHER: gl.constexpr = QUANT_BLOCK == 64 and K % (64 * BLOCKS) == 0
    mask = inside != 0
    stored = ()
    if NESTED and TOGETHER:
        here = row * (K // 64) + gl.minimum(block, K // 64 - BLOCKS)
        word = _load_bytes((absmax_8bit_ptr + here).to(gl.int64), inside, BLOCKS)
        scale = gl.load(absmax_ptr + here // NESTED_BLOCK, mask=mask, other=0.0)
        for i in gl.static_range(BLOCKS):
            stored = stored + ((word >> (8 * i)) & 255, scale)
    else:
        for i in gl.static_range(BLOCKS):
            # Blocks past the end of a row are its last one again, as its bytes are.
            at = (row * (K // 64) + gl.minimum(block + i, K // 64 - 1)) // PER_BLOCK
            if NESTED:
                index = gl.load(absmax_8bit_ptr + at, mask=mask, other=0).to(gl.int32)
                stored = stored + (index, gl.load(absmax_ptr + at // NESTED_BLOCK, mask=mask, other=0.0))
            else:
                stored = stored + (gl.load(absmax_ptr + at, mask=mask, other=0.0),)
    return stored


@gluon.jit
def _decoded(stored, NUMBER: gl.constexpr, map_address, offset, NESTED: gl.constexpr):
    if NESTED:
        scale = load_shared(map_address + stored[2 * NUMBER] * 4) * stored[2 * NUMBER + 1] + offset
    else:
        scale = stored[NUMBER]
    return scale


@gluon.jit
def keep_scales(
    pointers,
    first_block,
    N,
    thread,
    area,
    map_address,
    first_row,
    rows,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    K: gl.constexpr,
    BLOCKS: gl.constexpr,
    K_WARPS: gl.constexpr,
    KEPT_ROWS: gl.constexpr,
    THREADS: gl.constexpr,
):
    """Decode the scales of a program's `rows` rows from `first_row` on, by all of its blocks, into shared memory:
    [block][row], float32.

    A thread loads those of many rows at once, so that memory is waited for once.  `pointers` are to the two kinds of
    scales, the 8-bit map and the offset.  All threads meet here.
    """
    absmax_ptr, absmax_8bit_ptr, absmax_code_ptr, absmax_offset_ptr = pointers
    AT_ONCE: gl.constexpr = min((KEPT_ROWS + THREADS - 1) // THREADS, 2048 // THREADS)
    offset = 0.0
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
    for batch in range((rows + (AT_ONCE * THREADS - 1)) // (AT_ONCE * THREADS)):
        stored = ()
        for i in gl.static_range(AT_ONCE):
            here = (batch * AT_ONCE + i) * THREADS + thread
            # Rows after the last are the last eight again, as their bytes are.
            row = gl.minimum(first_row + here // 8 * 8, N - 8) + here % 8
            for k in gl.static_range(K_WARPS):
                stored = stored + load_stored(
                    absmax_ptr,
                    absmax_8bit_ptr,
                    row,
                    first_block + k * BLOCKS,
                    (here < rows).to(gl.int32),
                    BLOCKS,
                    K,
                    NESTED,
                    NESTED_BLOCK,
                    QUANT_BLOCK,
                )
        if NESTED:
            store_map(map_address, absmax_code_ptr, thread, THREADS)
            wait_for_all(thread)
        for i in gl.static_range(AT_ONCE):
            here = gl.minimum((batch * AT_ONCE + i) * THREADS + thread, KEPT_ROWS)
            for block in gl.static_range(BLOCKS * K_WARPS):
                scale = _decoded(stored, i * BLOCKS * K_WARPS + block, map_address, offset, NESTED)
                store_shared(area + ((KEPT_ROWS + 4) * block + here) * 4, scale.to(gl.int32, bitcast=True))
    wait_for_all(thread)


@gluon.jit
def kept_scales(area, block, row, KEPT_ROWS: gl.constexpr):
    """Those of eight rows by a block."""
    here = area + ((KEPT_ROWS + 4) * block + row) * 4
    return load_shared_vector(here) + load_shared_vector(here + 16)


@gluon.jit
def store_map(map_address, absmax_code_ptr, thread, THREADS: gl.constexpr):
    """The 8-bit map into shared memory."""
    for i in gl.static_range(256 // THREADS):
        entry = i * THREADS + thread
        store_shared(map_address + entry * 4, gl.load(absmax_code_ptr + entry).to(gl.int32, bitcast=True))
