"""What a program of the fused product reads: its weights and x into registers, table and scales into shared memory.

The kernel and the reasons for these layouts are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tuning.skinny import CHUNK as _CHUNK_SIZE
from ._early import fetch
from ._lanes import from_lane, load_if, load_once, load_shared, store_shared, store_shared_pair

CHUNK = gl.constexpr(_CHUNK_SIZE)
SCALE_BATCH = gl.constexpr(4)  # pairs of scales that a lane loads at once


@gluon.jit
def load_weights(address, K: gl.constexpr, TILES: gl.constexpr):
    """16 bytes of rows g and g + 8 of each tile: 8 TILES registers."""
    w = load_once(address) + load_once(address + 8 * (K // 2))
    for tile in gl.static_range(1, TILES):
        w = w + load_once(address + 16 * tile * (K // 2)) + load_once(address + (16 * tile + 8) * (K // 2))
    return w


@gluon.jit
def fetch_weights(address, K: gl.constexpr, TILES: gl.constexpr):
    """Bring what `load_weights` would load into the L2 cache."""
    for tile in gl.static_range(TILES):
        fetch(address + 16 * tile * (K // 2))
        fetch(address + (16 * tile + 8) * (K // 2))


@gluon.jit
def chunk_offset(chunk, t, K: gl.constexpr):
    """Bytes from a row's start to a chunk; where the last is half a chunk, lanes past its end stay within it."""
    offset = chunk * (CHUNK // 2)
    if K % CHUNK:
        offset -= ((chunk == K // CHUNK) & (t >= 2)).to(gl.int32) * (CHUNK // 4)
    return offset


@gluon.jit
def load_x_paired(address, chunk, t, inside, K: gl.constexpr):
    """x of one chunk for M <= 4, in the fragments' order of k: 16 registers."""
    if K % CHUNK:
        inside = inside & ((chunk < K // CHUNK) | (t < 2)).to(gl.int32)
    x = ()
    for part in gl.static_range(4):
        x = x + load_if(address + chunk * (2 * CHUNK) + 16 * part, inside)
    return x


@gluon.jit
def load_x(address, chunk, column, inside, M, HALF: gl.constexpr, K: gl.constexpr, COLUMNS: gl.constexpr):
    """x of the first or second half of a chunk, in the fragments' order of k: 8 registers for each 8 columns."""
    if HALF == 1 and K % CHUNK:
        inside = inside & (chunk < K // CHUNK).to(gl.int32)
    x = ()
    for j in gl.static_range(COLUMNS // 8):
        here = address + chunk * (2 * CHUNK) + HALF * CHUNK + 16 * j * K
        group = inside & (column + 8 * j < M).to(gl.int32)
        x = x + load_if(here, group) + load_if(here + 32, group)
    return x


@gluon.jit
def fill_table(shared, warp, lane, CODES: gl.constexpr, num_warps: gl.constexpr):
    """The entry of every byte, 256 / num_warps a warp, for each lane's bank: high nibble in the low 16 bits."""
    code = lane * 0
    for index in gl.static_range(16):
        code = gl.where(lane % 16 == index, CODES[index], code)
    for i in gl.static_range(256 // num_warps):
        byte = warp * (256 // num_warps) + i
        pair = from_lane(code, byte // 16) | (from_lane(code, byte % 16) << 16)
        store_shared(shared + byte * 128 + lane * 4, pair)


@gluon.jit
def load_map(absmax_code_ptr, thread, THREADS: gl.constexpr):
    """The 8-bit map of nested scales, so many entries a thread; threads past its end take its beginning again."""
    entries = ()
    for first in gl.static_range(0, 256, THREADS):
        entries = entries + (gl.load(absmax_code_ptr + (first + thread) % 256),)
    return entries


@gluon.jit
def store_map(map_address, entries, thread, THREADS: gl.constexpr):
    for i in gl.static_range((256 + THREADS - 1) // THREADS):
        store_shared(map_address + (i * THREADS + thread) % 256 * 4, entries[i].to(gl.int32, bitcast=True))


@gluon.jit
def _scale_place(BATCH: gl.constexpr, i: gl.constexpr, warp, lane, K: gl.constexpr, num_warps: gl.constexpr):
    """Row of the program and chunk of the scales that a lane has in a turn: lanes over chunks, warps over rows."""
    SPANS: gl.constexpr = (K // 64 + 63) // 64  # of 32 chunks
    return (BATCH * SCALE_BATCH + i) // SPANS * num_warps + warp, (BATCH * SCALE_BATCH + i) % SPANS * 32 + lane


@gluon.jit
def load_scales(
    absmax_ptr,
    absmax_8bit_ptr,
    first_row,
    warp,
    lane,
    BATCH: gl.constexpr,
    K: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Two scales for each chunk of 128 k: (first, second), nested (first's and second's index, and their scales)."""
    PER_BLOCK: gl.constexpr = QUANT_BLOCK // 64
    loaded = ()
    for i in gl.static_range(SCALE_BATCH):
        row, chunk = _scale_place(BATCH, i, warp, lane, K, num_warps)
        half = (first_row + row) * (K // 64) + chunk * 2  # counted in 64 weights
        inside = (chunk * 2 < K // 64) & (row < ROWS)
        inside_2 = (chunk * 2 + 1 < K // 64) & (row < ROWS)
        if NESTED:
            loaded = loaded + (
                gl.load(absmax_8bit_ptr + half // PER_BLOCK, mask=inside, other=0),
                gl.load(absmax_8bit_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0),
                gl.load(absmax_ptr + half // (PER_BLOCK * NESTED_BLOCK), mask=inside, other=0.0),
            )
            if K % CHUNK:
                second = gl.load(absmax_ptr + (half + 1) // (PER_BLOCK * NESTED_BLOCK), mask=inside_2, other=0.0)
                loaded = loaded + (second,)
            else:  # an even first half: both are in the same block of scales
                loaded = loaded + (loaded[4 * i + 2],)
        else:
            loaded = loaded + (
                gl.load(absmax_ptr + half // PER_BLOCK, mask=inside, other=0.0),
                gl.load(absmax_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0.0),
            )
    return loaded


@gluon.jit
def fetch_scales(
    absmax_8bit_ptr,
    first_row,
    thread,
    K: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    THREADS: gl.constexpr,
):
    """Bring the program's 8-bit scales into the L2 cache, sector by sector of 32 bytes."""
    BLOCKS: gl.constexpr = K // QUANT_BLOCK
    if K % QUANT_BLOCK == 0:
        for first in gl.static_range(0, ROWS * BLOCKS, 32 * THREADS):
            block = gl.minimum(first + 32 * thread, ROWS * BLOCKS - 1)
            fetch((absmax_8bit_ptr + first_row * BLOCKS + block).to(gl.int64))


@gluon.jit
def store_scales(
    shared,
    loaded,
    map_address,
    offset,
    warp,
    lane,
    BATCH: gl.constexpr,
    K: gl.constexpr,
    NESTED: gl.constexpr,
    ROWS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Decode what `load_scales` loaded and lay it out as [chunk][row][2], float32."""
    CHUNKS: gl.constexpr = (K + CHUNK - 1) // CHUNK
    for i in gl.static_range(SCALE_BATCH):
        if NESTED:
            scale = load_shared(map_address + loaded[4 * i].to(gl.int32) * 4) * loaded[4 * i + 2] + offset
            scale_2 = load_shared(map_address + loaded[4 * i + 1].to(gl.int32) * 4) * loaded[4 * i + 3] + offset
        else:
            scale = loaded[2 * i]
            scale_2 = loaded[2 * i + 1]
        row, chunk = _scale_place(BATCH, i, warp, lane, K, num_warps)
        # What is outside goes behind the last chunk.  8 more bytes a chunk keep the lanes' banks apart.
        inside = (chunk < CHUNKS) & (row < ROWS)
        place = gl.where(inside, chunk * (ROWS * 8 + 8) + row * 8, CHUNKS * (ROWS * 8 + 8))
        store_shared_pair(shared + place, scale, scale_2)
