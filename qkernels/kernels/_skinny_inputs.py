"""What a program of the fused product reads: which rows of W and of x, both into registers; the table's entries.

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
from ._lanes import code_of_lane, from_lane, load_if, load_once, load_vector, store_shared
from ._ragged_rows import fetch_ragged, load_eight, load_ragged, phase_of, row_addresses

CHUNK = gl.constexpr(_CHUNK_SIZE)
FRONT = gl.constexpr(_FRONT)
chunks_of = triton.constexpr_function(chunks)


@gluon.jit
def rows_of(packed_ptr, g, t, row_warp, begin, N, form: gl.constexpr):
    """The rows of W that a program has.

    Returns:
        (for all lanes the first row, and where rows begin anywhere its phase and the rows of that, else the first chunk
        `begin`; this lane's first row; where its bytes begin; the weights before a row in its first window).
    """
    if form.PHASES > 0:
        phase, number, phase_rows, shift = phase_of(gl.program_id(1), N, form.K, form.PHASES)
        first_row = number * form.ROWS
        row = first_row + row_warp * (16 * form.TILES) + g
        rows = (first_row, phase, phase_rows)
        address = row_addresses(packed_ptr, row, t, phase, phase_rows, form.K, form.PHASES, form.TILES)
    else:
        # The last program takes whole tiles too: where N is no multiple it computes rows again that its neighbour has.
        first_row = gl.minimum(gl.program_id(1) * form.ROWS, N - form.ROWS)
        row = first_row + row_warp * (16 * form.TILES) + g
        rows = (first_row, begin)
        address = packed_ptr.to(gl.int64) + row.to(gl.int64) * (form.K // 2) + t * 16
        shift = 0
    return rows, row, address, shift


@gluon.jit
def load_weights(address, chunk, t, shift, last, form: gl.constexpr):
    """16 bytes of rows g and g + 8 of each tile: 8 TILES registers."""
    if form.PHASES > 0:
        w = load_ragged(address, chunk, t, shift, last, form.K, form.TAIL, form.TILES)
    else:
        w = _load_whole(address + _chunk_offset(chunk, t, form.K), form.K, form.TILES)
    return w


@gluon.jit
def _load_whole(address, K: gl.constexpr, TILES: gl.constexpr):
    w = load_once(address) + load_once(address + 8 * (K // 2))
    for tile in gl.static_range(1, TILES):
        w = w + load_once(address + 16 * tile * (K // 2)) + load_once(address + (16 * tile + 8) * (K // 2))
    return w


@gluon.jit
def fetch_weights(address, chunk, t, shift, form: gl.constexpr):
    """Bring what `load_weights` would load into the L2 cache."""
    TILES: gl.constexpr = form.TILES
    if form.PHASES > 0:
        fetch_ragged(address, chunk, t, shift, form.K, TILES)
    else:
        address += _chunk_offset(chunk, t, form.K)
        for tile in gl.static_range(TILES):
            fetch(address + 16 * tile * (form.K // 2))
            fetch(address + (16 * tile + 8) * (form.K // 2))


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
def place_in_x(x_ptr, g, t, shift, M, form: gl.constexpr):
    """What a lane reads of x: ((address of its first k of a chunk, that k in the row, its column), where it reads any,
    int32)."""
    if form.PAIRED:
        column = g % (8 // form.SCALES)
        inside = ((column < M) & (g // (8 // form.SCALES) == t // (4 // form.SCALES))).to(gl.int32)
        x_row = column * form.K
        lane_k = t * 32
    else:
        column = g
        inside = g * 0 + 1
        x_row = column * form.K
        lane_k = t % 2 * 32 + t // 2 * 8 if form.BLOCK == 64 else t * 8
    if form.ARRANGED:
        address = _arranged_address(x_ptr, lane_k, g, shift, form.K, form.BLOCK, form.COLUMNS)
    else:
        address = x_ptr.to(gl.int64) + (x_row + lane_k - shift) * 2
    return (address, lane_k - shift, column), inside


@gluon.jit
def load_x_paired(place, chunk, t, inside, form: gl.constexpr):
    """x of one chunk for M <= 4, in the fragments' order of k: 16 registers."""
    address, first_k, _ = place
    if form.PHASES == 0 and form.K % CHUNK:
        inside = inside & ((chunk < form.K // CHUNK) | (t < 2)).to(gl.int32)
    k = first_k + chunk * CHUNK
    x = ()
    for part in gl.static_range(4):
        x = x + _load_eight(address + chunk * (2 * CHUNK) + 16 * part, k + 8 * part, inside, form.K, form.PHASES)
    return x


@gluon.jit
def load_x(place, chunk, inside, M, HALF: gl.constexpr, form: gl.constexpr):
    """x of the first or second half of a chunk, in the fragments' order of k: 8 registers for each 8 columns."""
    address, first_k, column = place
    GROUPS: gl.constexpr = form.GROUPS
    if HALF == 1 and form.PHASES == 0 and form.K % CHUNK:
        inside = inside & (chunk < form.K // CHUNK).to(gl.int32)
    SECOND: gl.constexpr = 16 if form.BLOCK == 64 else 32
    k = first_k + chunk * CHUNK + HALF * (CHUNK // 2)
    x = ()
    for j in gl.static_range(GROUPS):
        if form.ARRANGED:
            there = address[0] + chunk * (CHUNK * 16) + (HALF * (CHUNK * 8) + j * (_groups_of(form.K) * 128))
            x = x + load_vector(there) + load_vector(there + address[1])
        else:
            here = address + chunk * (2 * CHUNK) + HALF * CHUNK + 16 * j * form.K
            group = inside & (column + 8 * j < M).to(gl.int32)
            x = x + _load_eight(here, k, group, form.K, form.PHASES)
            x = x + _load_eight(here + 2 * SECOND, k + SECOND, group, form.K, form.PHASES)
    return x


@gluon.jit
def _groups_of(K: gl.constexpr):
    """Groups of eight k in x as `_arrange.py` leaves it."""
    return chunks_of(K) * (CHUNK // 8) + FRONT


@gluon.jit
def _place_of(group, column, BLOCK: gl.constexpr):
    """As `_arrange.place_of`, for Gluon."""
    turn = group // 4 % 2 * 2 + group % 2 if BLOCK == 64 else group % 4
    return column ^ (2 * turn)


@gluon.jit
def _arranged_address(x_ptr, lane_k, g, shift, K: gl.constexpr, BLOCK: gl.constexpr, COLUMNS: gl.constexpr):
    """Where this lane's first eight k of a chunk lie in x as `_arrange.py` leaves it, [copy][8 columns][group][column];
    and how many bytes further on its second eight."""
    SECOND: gl.constexpr = 2 if BLOCK == 64 else 4
    STEP: gl.constexpr = min(K & -K, 8)
    blocks = gl.num_programs(0) * (COLUMNS // 8)
    block = shift % 8 // STEP * blocks + gl.program_id(0) * (COLUMNS // 8)
    group = lane_k // 8 + FRONT - shift // 8
    place = _place_of(group, g, BLOCK) * 16
    further = 128 * SECOND + _place_of(group + SECOND, g, BLOCK) * 16 - place
    return x_ptr.to(gl.int64) + block.to(gl.int64) * (_groups_of(K) * 128) + group * 128 + place, further


@gluon.jit
def fill_table(shared, warp, lane, CODES: gl.constexpr, num_warps: gl.constexpr):
    """The entry of every byte, 256 / num_warps a warp, for each lane's bank: high nibble in the low 16 bits."""
    code = code_of_lane(lane, CODES)
    for i in gl.static_range(256 // num_warps):
        byte = warp * (256 // num_warps) + i
        pair = from_lane(code, byte // 16) | (from_lane(code, byte % 16) << 16)
        store_shared(shared + byte * 128 + lane * 4, pair)
