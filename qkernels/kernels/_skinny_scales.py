"""The scales of the fused product: loaded, decoded once, and laid out in shared memory for the whole program.

Lanes are shared out over pairs of scales and warps over rows; a lane has SCALE_BATCH pairs in flight.

The kernel and the reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._early import fetch
from ._lanes import load_shared, store_shared, store_shared_pair
from ._ragged_rows import window_of
from ._skinny_inputs import CHUNK

SCALE_BATCH = gl.constexpr(4)


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
def _scale_place(BATCH: gl.constexpr, i: gl.constexpr, warp, lane, PAIRS: gl.constexpr, num_warps: gl.constexpr):
    """Row of the program and pair of its scales that a lane has in a turn: lanes over pairs, warps over rows."""
    SPANS: gl.constexpr = (PAIRS + 31) // 32
    return (BATCH * SCALE_BATCH + i) // SPANS * num_warps + warp, (BATCH * SCALE_BATCH + i) % SPANS * 32 + lane


@gluon.jit
def load_batch(absmax_ptr, absmax_8bit_ptr, rows, warp, lane, BATCH: gl.constexpr, form: gl.constexpr):
    """Two scales for each 128 k, four in blocks of 32: of two (first, second), nested (first's and second's index, and
    their scales).  `rows` are the program's first row, and where rows begin anywhere its phase and the rows of that;
    else the first of its PART chunks."""
    BLOCK: gl.constexpr = form.BLOCK
    PER_BLOCK: gl.constexpr = form.QUANT_BLOCK // BLOCK
    loaded = ()
    for i in gl.static_range(SCALE_BATCH):
        row, pair = _scale_place(BATCH, i, warp, lane, form.PART * (64 // BLOCK), form.WARPS)
        here = (pair < form.PART * (64 // BLOCK)) & (row < form.ROWS)
        if form.PHASES > 0:
            window = window_of(gl.minimum(rows[0] + row, rows[2] - 1), rows[1], form.K, form.PHASES)
            half = window * (64 // BLOCK) + pair * 2
            shift = rows[1] * (form.K % 64) % 64
            begin = shift // BLOCK  # a block of 32 before it is all of the row before
            halves = (shift + (form.K - 1)) // BLOCK + 1
        else:
            pair += rows[1]
            half = (rows[0] + row) * (form.K // 64) + pair * 2  # counted in 64 weights
            begin = 0
            halves = form.K // 64
        inside = (pair * 2 < halves) & here
        if BLOCK == 32:
            inside = inside & (pair * 2 >= begin)
        inside_2 = (pair * 2 + 1 < halves) & here
        if form.NESTED:
            loaded = loaded + (
                gl.load(absmax_8bit_ptr + half // PER_BLOCK, mask=inside, other=0),
                gl.load(absmax_8bit_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0),
                gl.load(absmax_ptr + half // (PER_BLOCK * form.NESTED_BLOCK), mask=inside, other=0.0),
            )
            if form.K % CHUNK or form.PHASES > 0:
                second = gl.load(absmax_ptr + (half + 1) // (PER_BLOCK * form.NESTED_BLOCK), mask=inside_2, other=0.0)
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
def fetch_scales(absmax_8bit_ptr, first_row, thread, form: gl.constexpr):
    """Bring the program's 8-bit scales into the L2 cache, sector by sector of 32 bytes."""
    BLOCKS: gl.constexpr = form.K // form.QUANT_BLOCK
    STEP: gl.constexpr = 32 * form.THREADS
    SIZE: gl.constexpr = form.ROWS * BLOCKS
    if form.K % form.QUANT_BLOCK == 0:
        for first in gl.static_range(0, SIZE, STEP):
            block = gl.minimum(first + 32 * thread, SIZE - 1)
            fetch((absmax_8bit_ptr + first_row * BLOCKS + block).to(gl.int64))


@gluon.jit
def _store_batch(shared, loaded, map_address, offset, warp, lane, BATCH: gl.constexpr, form: gl.constexpr):
    """Decode what `load_batch` loaded and lay it out as [chunk][row][SCALES], float32."""
    PAIRS: gl.constexpr = form.SCALES // 2  # of a chunk
    ROWS: gl.constexpr = form.ROWS
    PART: gl.constexpr = form.PART
    for i in gl.static_range(SCALE_BATCH):
        if form.NESTED:
            scale = load_shared(map_address + loaded[4 * i].to(gl.int32) * 4) * loaded[4 * i + 2] + offset
            scale_2 = load_shared(map_address + loaded[4 * i + 1].to(gl.int32) * 4) * loaded[4 * i + 3] + offset
        else:
            scale = loaded[2 * i]
            scale_2 = loaded[2 * i + 1]
        row, pair = _scale_place(BATCH, i, warp, lane, PART * PAIRS, form.WARPS)
        # What is outside goes behind the last chunk.  A row more a chunk keeps the lanes' banks apart.
        inside = (pair < PART * PAIRS) & (row < ROWS)
        place = pair // PAIRS * ((ROWS + 1) * 8 * PAIRS) + row * (8 * PAIRS) + pair % PAIRS * 8
        place = gl.where(inside, place, PART * (ROWS + 1) * 8 * PAIRS)
        store_shared_pair(shared + place, scale, scale_2)


@gluon.jit
def store_scales(
    shared, loaded, map_address, offset, absmax_ptr, absmax_8bit_ptr, rows, warp, lane, form: gl.constexpr
):
    """Store the batch that is loaded, the first; load and store the others."""
    WARPS: gl.constexpr = form.WARPS
    TURNS: gl.constexpr = (form.ROWS + WARPS - 1) // WARPS * ((form.PART * form.SCALES // 2 + 31) // 32)
    _store_batch(shared, loaded, map_address, offset, warp, lane, 0, form)
    for batch in gl.static_range(1, (TURNS + SCALE_BATCH - 1) // SCALE_BATCH):
        following = load_batch(absmax_ptr, absmax_8bit_ptr, rows, warp, lane, batch, form)
        _store_batch(shared, following, map_address, offset, warp, lane, batch, form)
