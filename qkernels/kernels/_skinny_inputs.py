"""What a program of the fused product reads: its weights and x into registers, table and scales into shared memory.

The kernel and the reasons for these layouts are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ..tuning.skinny import CHUNK as _CHUNK_SIZE
from ..tuning.skinny import chunks
from ._arrange import FRONT as _FRONT
from ._early import fetch
from ._lanes import from_lane, load_if, load_once, load_shared, load_vector, store_shared, store_shared_pair
from ._ragged_rows import fetch_ragged, load_eight, load_ragged, window_of

CHUNK = gl.constexpr(_CHUNK_SIZE)
FRONT = gl.constexpr(_FRONT)
chunks_of = triton.constexpr_function(chunks)
SCALE_BATCH = gl.constexpr(4)  # pairs of scales that a lane loads at once


@gluon.jit
def load_weights(
    address,
    chunk,
    t,
    shift,
    last,
    K: gl.constexpr,
    PHASES: gl.constexpr,
    TAIL: gl.constexpr,
    TILES: gl.constexpr,
):
    """16 bytes of rows g and g + 8 of each tile: 8 TILES registers."""
    if PHASES > 0:
        w = load_ragged(address, chunk, t, shift, last, K, TAIL, TILES)
    else:
        w = _load_whole(address + _chunk_offset(chunk, t, K), K, TILES)
    return w


@gluon.jit
def _load_whole(address, K: gl.constexpr, TILES: gl.constexpr):
    w = load_once(address) + load_once(address + 8 * (K // 2))
    for tile in gl.static_range(1, TILES):
        w = w + load_once(address + 16 * tile * (K // 2)) + load_once(address + (16 * tile + 8) * (K // 2))
    return w


@gluon.jit
def fetch_weights(address, chunk, t, shift, K: gl.constexpr, PHASES: gl.constexpr, TILES: gl.constexpr):
    """Bring what `load_weights` would load into the L2 cache."""
    if PHASES > 0:
        fetch_ragged(address, chunk, t, shift, K, TILES)
    else:
        address += _chunk_offset(chunk, t, K)
        for tile in gl.static_range(TILES):
            fetch(address + 16 * tile * (K // 2))
            fetch(address + (16 * tile + 8) * (K // 2))


@gluon.jit
def _chunk_offset(chunk, t, K: gl.constexpr):
    """Bytes from a row's start to a chunk; where the last is half a chunk, lanes past its end stay within it."""
    offset = chunk * (CHUNK // 2)
    if K % CHUNK:
        offset -= ((chunk == K // CHUNK) & (t >= 2)).to(gl.int32) * (CHUNK // 4)
    return offset


@gluon.jit
def _load_eight(address, k, inside, K: gl.constexpr, PHASES: gl.constexpr):
    """Eight elements of x from k on: four registers."""
    if PHASES > 0:
        x = load_eight(address, k, inside, K)
    else:
        x = load_if(address, inside)
    return x


@gluon.jit
def load_x_paired(address, first_k, chunk, t, inside, K: gl.constexpr, PHASES: gl.constexpr):
    """x of one chunk for M <= 4, in the fragments' order of k: 16 registers."""
    if PHASES == 0 and K % CHUNK:
        inside = inside & ((chunk < K // CHUNK) | (t < 2)).to(gl.int32)
    k = first_k + chunk * CHUNK
    x = ()
    for part in gl.static_range(4):
        x = x + _load_eight(address + chunk * (2 * CHUNK) + 16 * part, k + 8 * part, inside, K, PHASES)
    return x


@gluon.jit
def load_x(
    address,
    first_k,
    chunk,
    column,
    inside,
    M,
    HALF: gl.constexpr,
    K: gl.constexpr,
    BLOCK: gl.constexpr,
    ARRANGED: gl.constexpr,
    PHASES: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """x of the first or second half of a chunk, in the fragments' order of k: 8 registers for each 8 columns."""
    if HALF == 1 and PHASES == 0 and K % CHUNK:
        inside = inside & (chunk < K // CHUNK).to(gl.int32)
    SECOND: gl.constexpr = 16 if BLOCK == 64 else 32
    k = first_k + chunk * CHUNK + HALF * (CHUNK // 2)
    x = ()
    for j in gl.static_range(COLUMNS // 8):
        if ARRANGED:
            there = address[0] + chunk * (CHUNK * 16) + (HALF * (CHUNK * 8) + j * (_groups_of(K) * 128))
            x = x + load_vector(there) + load_vector(there + address[1])
        else:
            here = address + chunk * (2 * CHUNK) + HALF * CHUNK + 16 * j * K
            group = inside & (column + 8 * j < M).to(gl.int32)
            x = x + _load_eight(here, k, group, K, PHASES)
            x = x + _load_eight(here + 2 * SECOND, k + SECOND, group, K, PHASES)
    return x


@gluon.jit
def _groups_of(K: gl.constexpr):
    """Groups of eight k in x as `_arrange.py` leaves it."""
    return chunks_of(K) * (CHUNK // 8) + FRONT


@gluon.jit
def place_of(group, column, BLOCK: gl.constexpr):
    """As `_arrange.place_of`, for Gluon."""
    turn = group // 4 % 2 * 2 + group % 2 if BLOCK == 64 else group % 4
    return column ^ (2 * turn)


@gluon.jit
def arranged_address(x_ptr, lane_k, g, shift, K: gl.constexpr, BLOCK: gl.constexpr, COLUMNS: gl.constexpr):
    """Where this lane's first eight k of a chunk lie in x as `_arrange.py` leaves it, [copy][8 columns][group][column];
    and how many bytes further on its second eight."""
    SECOND: gl.constexpr = 2 if BLOCK == 64 else 4
    STEP: gl.constexpr = min(K & -K, 8)
    blocks = gl.num_programs(0) * (COLUMNS // 8)
    block = shift % 8 // STEP * blocks + gl.program_id(0) * (COLUMNS // 8)
    group = lane_k // 8 + FRONT - shift // 8
    place = place_of(group, g, BLOCK) * 16
    further = 128 * SECOND + place_of(group + SECOND, g, BLOCK) * 16 - place
    return x_ptr.to(gl.int64) + block.to(gl.int64) * (_groups_of(K) * 128) + group * 128 + place, further


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
def _scale_place(BATCH: gl.constexpr, i: gl.constexpr, warp, lane, PAIRS: gl.constexpr, num_warps: gl.constexpr):
    """Row of the program and pair of its scales that a lane has in a turn: lanes over pairs, warps over rows."""
    SPANS: gl.constexpr = (PAIRS + 31) // 32
    return (BATCH * SCALE_BATCH + i) // SPANS * num_warps + warp, (BATCH * SCALE_BATCH + i) % SPANS * 32 + lane


@gluon.jit
def load_scales(
    absmax_ptr,
    absmax_8bit_ptr,
    rows,
    warp,
    lane,
    BATCH: gl.constexpr,
    K: gl.constexpr,
    NESTED: gl.constexpr,
    NESTED_BLOCK: gl.constexpr,
    QUANT_BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    PHASES: gl.constexpr,
    CHUNKS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Two scales for each 128 k, four in blocks of 32: of two (first, second), nested (first's and second's index, and
    their scales).  `rows` are the program's first row, and where rows begin anywhere its phase and the rows of that;
    else the first of its CHUNKS chunks."""
    BLOCK: gl.constexpr = min(QUANT_BLOCK, 64)
    PER_BLOCK: gl.constexpr = QUANT_BLOCK // BLOCK
    loaded = ()
    for i in gl.static_range(SCALE_BATCH):
        row, pair = _scale_place(BATCH, i, warp, lane, CHUNKS * (64 // BLOCK), num_warps)
        here = (pair < CHUNKS * (64 // BLOCK)) & (row < ROWS)
        if PHASES > 0:
            window = window_of(gl.minimum(rows[0] + row, rows[2] - 1), rows[1], K, PHASES)
            half = window * (64 // BLOCK) + pair * 2
            shift = rows[1] * (K % 64) % 64
            begin = shift // BLOCK  # a block of 32 before it is all of the row before
            halves = (shift + (K - 1)) // BLOCK + 1
        else:
            pair += rows[1]
            half = (rows[0] + row) * (K // 64) + pair * 2  # counted in 64 weights
            begin = 0
            halves = K // 64
        inside = (pair * 2 < halves) & here
        if BLOCK == 32:
            inside = inside & (pair * 2 >= begin)
        inside_2 = (pair * 2 + 1 < halves) & here
        if NESTED:
            loaded = loaded + (
                gl.load(absmax_8bit_ptr + half // PER_BLOCK, mask=inside, other=0),
                gl.load(absmax_8bit_ptr + (half + 1) // PER_BLOCK, mask=inside_2, other=0),
                gl.load(absmax_ptr + half // (PER_BLOCK * NESTED_BLOCK), mask=inside, other=0.0),
            )
            if K % CHUNK or PHASES > 0:
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
    NESTED: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    CHUNKS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Decode what `load_scales` loaded and lay it out as [chunk][row][CHUNK / BLOCK], float32."""
    PAIRS: gl.constexpr = 64 // BLOCK  # of a chunk
    for i in gl.static_range(SCALE_BATCH):
        if NESTED:
            scale = load_shared(map_address + loaded[4 * i].to(gl.int32) * 4) * loaded[4 * i + 2] + offset
            scale_2 = load_shared(map_address + loaded[4 * i + 1].to(gl.int32) * 4) * loaded[4 * i + 3] + offset
        else:
            scale = loaded[2 * i]
            scale_2 = loaded[2 * i + 1]
        row, pair = _scale_place(BATCH, i, warp, lane, CHUNKS * PAIRS, num_warps)
        # What is outside goes behind the last chunk.  A row more a chunk keeps the lanes' banks apart.
        inside = (pair < CHUNKS * PAIRS) & (row < ROWS)
        place = pair // PAIRS * ((ROWS + 1) * 8 * PAIRS) + row * (8 * PAIRS) + pair % PAIRS * 8
        place = gl.where(inside, place, CHUNKS * (ROWS + 1) * 8 * PAIRS)
        store_shared_pair(shared + place, scale, scale_2)
