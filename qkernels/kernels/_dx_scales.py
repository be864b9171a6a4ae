"""The scales of the backward product for few rows: a warp's 32 rows of W by one, two or four blocks of 64 k.

A lane has a row: it loads what is stored of the row's neighbouring blocks, decodes it, and leaves the scales in shared
memory, from where each lane takes those of its eight rows and its own block.

The kernel and the reasons are in `matmul_skinny_dx.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tuning.skinny_dx import SCALE_PITCH as _PITCH
from ._dx_lanes import load_shared_vector, wait_for_warp
from ._lanes import load_shared, store_shared

SCALE_PITCH = gl.constexpr(_PITCH)


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
def load_one(absmax_ptr, absmax_8bit_ptr, block, mask, NESTED: gl.constexpr, NESTED_BLOCK: gl.constexpr):
    """What is stored for a block: (its scale), nested (its 8-bit index, and the scale of that)."""
    if NESTED:
        index = gl.load(absmax_8bit_ptr + block, mask=mask, other=0).to(gl.int32)
        stored = (index, gl.load(absmax_ptr + block // NESTED_BLOCK, mask=mask, other=0.0))
    else:
        stored = (gl.load(absmax_ptr + block, mask=mask, other=0.0),)
    return stored


@gluon.jit
def load_together(absmax_ptr, absmax_8bit_ptr, first, mask, inside, COUNT: gl.constexpr, NESTED_BLOCK: gl.constexpr):
    """As `load_one` for nested COUNT blocks that lie in one word and have one scale; `inside` is the mask, or it as
    int32."""
    word = _load_bytes((absmax_8bit_ptr + first).to(gl.int64), inside.to(gl.int32), COUNT)
    scale = gl.load(absmax_ptr + first // NESTED_BLOCK, mask=mask, other=0.0)
    stored = ()
    for i in gl.static_range(COUNT):
        stored = stored + ((word >> (8 * i)) & 255, scale)
    return stored


@gluon.jit
def load_stored(absmax_ptr, absmax_8bit_ptr, row, block, inside, form: gl.constexpr):
    """What is stored for a warp's blocks of a row: the scales, nested (bytes of 8-bit indices, and scales of these).

    Where a row's blocks are a multiple of them, those of a lane lie in one word and have one scale of their own.
    """
    K: gl.constexpr = form.K
    BLOCKS: gl.constexpr = form.WORDS
    PER_BLOCK: gl.constexpr = form.QUANT_BLOCK // 64
    TOGETHER: gl.constexpr = form.QUANT_BLOCK == 64 and K % (64 * BLOCKS) == 0
    mask = inside != 0
    stored = ()
    if form.NESTED and TOGETHER:
        here = row * (K // 64) + gl.minimum(block, K // 64 - BLOCKS)
        stored = load_together(absmax_ptr, absmax_8bit_ptr, here, mask, inside, BLOCKS, form.NESTED_BLOCK)
    else:
        for i in gl.static_range(BLOCKS):
            # Blocks past the end of a row are its last one again, as its bytes are.
            at = (row * (K // 64) + gl.minimum(block + i, K // 64 - 1)) // PER_BLOCK
            stored = stored + load_one(absmax_ptr, absmax_8bit_ptr, at, mask, form.NESTED, form.NESTED_BLOCK)
    return stored


@gluon.jit
def leave_scales(stored, area, map_address, offset, lane, COUNT: gl.constexpr, NESTED: gl.constexpr):
    """Decode what a lane has loaded for COUNT blocks of its row and leave it in `area`; the last one's scale."""
    scale = 0.0
    for i in gl.static_range(COUNT):
        if NESTED:
            scale = load_shared(map_address + stored[2 * i] * 4) * stored[2 * i + 1] + offset
        else:
            scale = stored[i]
        store_shared(area + (SCALE_PITCH * i + lane) * 4, scale.to(gl.int32, bitcast=True))
    return scale


@gluon.jit
def scales_of_lane(stored, area, map_address, offset, lane, form: gl.constexpr):
    """The eight scales of this lane's rows and block.  `area` is this warp's, of two in turn: one barrier is enough."""
    BLOCKS: gl.constexpr = form.WORDS
    leave_scales(stored, area, map_address, offset, lane, BLOCKS, form.NESTED)
    wait_for_warp(lane)
    here = area + (lane // (32 // BLOCKS) * SCALE_PITCH + lane % 4 * 8) * 4
    return load_shared_vector(here) + load_shared_vector(here + 16)


@gluon.jit
def store_map(map_address, absmax_code_ptr, thread, THREADS: gl.constexpr):
    """The 8-bit map into shared memory."""
    for i in gl.static_range(256 // THREADS):
        entry = i * THREADS + thread
        store_shared(map_address + entry * 4, gl.load(absmax_code_ptr + entry).to(gl.int32, bitcast=True))


@gluon.jit
def scale_area(map_address, warp, turn, BLOCKS: gl.constexpr, num_warps: gl.constexpr):
    """Where a warp's lanes leave scales, one of two areas in turn, behind the map."""
    return map_address + 1024 + (turn % 2 * num_warps + warp) * (BLOCKS * SCALE_PITCH * 4)
