"""What a program of the fused product reads: its weights and x into registers, table and scales into shared memory.

The kernel and the reasons for these layouts are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tuning.skinny import CHUNK as _CHUNK_SIZE
from ._lanes import from_lane, load_if, load_once, store_shared, store_shared_pair

CHUNK = gl.constexpr(_CHUNK_SIZE)


@gluon.jit
def load_weights(address, K: gl.constexpr, TILES: gl.constexpr):
    """16 bytes of rows g and g + 8 of each tile: 8 TILES registers."""
    w = load_once(address) + load_once(address + 8 * (K // 2))
    for tile in gl.static_range(1, TILES):
        w = w + load_once(address + 16 * tile * (K // 2)) + load_once(address + (16 * tile + 8) * (K // 2))
    return w


@gluon.jit
def chunk_offset(chunk, t, K: gl.constexpr):
    """Bytes from a row's start to a chunk; where the last is half a chunk, lanes past its end stay within it."""
    offset = chunk * (CHUNK // 2)
    if K % CHUNK:
        offset -= ((chunk == K // CHUNK) & (t >= 2)).to(gl.int32) * (CHUNK // 4)
    return offset


@gluon.jit
def load_x(address, chunk, column, t, inside, M, K: gl.constexpr, PAIRED: gl.constexpr, COLUMNS: gl.constexpr):
    """x of one chunk in the fragments' order of k: 16 registers for each 8 columns."""
    here = address + chunk * (2 * CHUNK)
    if PAIRED:
        if K % CHUNK:
            inside = inside & ((chunk < K // CHUNK) | (t < 2)).to(gl.int32)
        x = ()
        for part in gl.static_range(4):
            x = x + load_if(here + 16 * part, inside)
    else:
        inside_2 = inside
        if K % CHUNK:
            inside_2 = inside & (chunk < K // CHUNK).to(gl.int32)
        x = ()
        for j in gl.static_range(COLUMNS // 8):
            row = here + 16 * j * K
            group = (column + 8 * j < M).to(gl.int32)
            x = x + load_if(row, inside & group) + load_if(row + 16, inside & group)
            x = x + load_if(row + 128, inside_2 & group) + load_if(row + 144, inside_2 & group)
    return x


@gluon.jit
def fill_table(shared, warp, lane, CODES: gl.constexpr, STRIDE: gl.constexpr, num_warps: gl.constexpr):
    """The entry of every byte, 256 / num_warps a warp, for each lane's bank: high nibble in the low 16 bits."""
    code = lane * 0
    for index in gl.static_range(16):
        code = gl.where(lane % 16 == index, CODES[index], code)
    for i in gl.static_range(256 // num_warps):
        byte = warp * (256 // num_warps) + i
        pair = from_lane(code, byte // 16) | (from_lane(code, byte % 16) << 16)
        store_shared(shared + byte * STRIDE + lane * 4, pair)


@gluon.jit
def decode_scales(
    shared,
    absmax_ptr,
    absmax_8bit_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    first_row,
    warp,
    lane,
    K: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Two float32 scales for each row and chunk of 128 k: lanes over chunks, warps over rows."""
    CHUNKS: gl.constexpr = (K + CHUNK - 1) // CHUNK
    PER_BLOCK: gl.constexpr = QUANT_BLOCK // 64
    if NESTED:
        offset = gl.load(absmax_offset_ptr)
    for first in range(0, ROWS, num_warps):
        for chunk in range(0, CHUNKS, 32):
            row = first + warp
            here = chunk + lane
            half = (first_row + row) * (K // 64) + here * 2  # counted in 64 weights
            inside = (here < CHUNKS) & (row < ROWS)
            inside_2 = inside & (here * 2 + 1 < K // 64)
            if NESTED:
                index = gl.load(absmax_8bit_ptr + half // PER_BLOCK, mask=inside, other=0).to(gl.int32)
                index_2 = gl.load(absmax_8bit_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0).to(gl.int32)
                nested = gl.load(absmax_ptr + half // (PER_BLOCK * NESTED_BLOCK), mask=inside, other=0.0)
                nested_2 = gl.load(absmax_ptr + (half + 1) // (PER_BLOCK * NESTED_BLOCK), mask=inside_2, other=0.0)
                scale = gl.load(absmax_code_ptr + index) * nested + offset
                scale_2 = gl.load(absmax_code_ptr + index_2) * nested_2 + offset
            else:
                scale = gl.load(absmax_ptr + half // PER_BLOCK, mask=inside, other=0.0)
                scale_2 = gl.load(absmax_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0.0)
            # What is outside goes behind the last chunk.  8 more bytes a chunk keep the lanes' banks apart.
            place = gl.where(inside, here * (ROWS * 8 + 8) + row * 8, CHUNKS * (ROWS * 8 + 8))
            store_shared_pair(shared + place, scale, scale_2)
