"""What a program of the backward product for few rows does in each step of 32 rows of W, and with its sums at the end.

The kernel and the reasons are in `matmul_skinny_dx.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._dx_lanes import decode_pair, load_dy, load_words
from ._dx_ragged import load_ragged_step, ragged_pairs, ragged_scales_of_lane
from ._dx_scales import load_stored, scales_of_lane
from ._lanes import load_shared, mma, store_shared


@gluon.jit
def _load_whole_step(pointers, place, sizes, first, inside, form: gl.constexpr):
    """As `load_step`.  Rows after the last are the last eight again, of a dy that is 0."""
    packed_ptr, absmax_ptr, absmax_8bit_ptr = pointers[:3]
    lane, column, first_block = place[:3]
    N = sizes[1]
    n = first + lane % 4 * 8
    row = gl.minimum(n, N - 8)
    address = packed_ptr.to(gl.int64) + row.to(gl.int64) * (form.K // 2) + column
    w = ()
    for i in gl.static_range(8):
        w = w + load_words(address + i * (form.K // 2), inside, form.WORDS, 0, "no_allocate")
    lanes_row = gl.minimum(first + lane // 8 * 8, N - 8) + lane % 8
    return w, load_stored(absmax_ptr, absmax_8bit_ptr, lanes_row, first_block, inside, form)


@gluon.jit
def load_step(pointers, place, sizes, first, inside, form: gl.constexpr):
    """A step's words of W and stored scales.

    `pointers` are to W, to the two kinds of scales and to dy, `place` is the lane, its first byte of a row of W, its
    first block of 64 k, the program's first row of dy and W's tail (of ragged rows its warp's first k, and the tail is
    read), `sizes` are M and N.
    """
    if form.RAGGED:
        loaded = load_ragged_step(pointers, place, sizes, first, inside, form)
    else:
        loaded = _load_whole_step(pointers, place, sizes, first, inside, form)
    return loaded


@gluon.jit
def step_scales(stored, area, map_address, offset, place, first, form: gl.constexpr):
    """The scales of a lane's rows and bytes, of what `load_step` gave for the step that began at `first`."""
    if form.RAGGED:
        scales = ragged_scales_of_lane(stored, area, map_address, offset, place[0], first, place[2], form)
    else:
        scales = scales_of_lane(stored, area, map_address, offset, place[0], form)
    return scales


@gluon.jit
def _four(acc, FIRST: gl.constexpr):
    return (acc[FIRST], acc[FIRST + 1], acc[FIRST + 2], acc[FIRST + 3])


@gluon.jit
def _two(pairs, FIRST: gl.constexpr):
    return (pairs[FIRST], pairs[FIRST + 1])


@gluon.jit
def load_columns(pointers, place, sizes, first, inside, FIRST: gl.constexpr, COLUMNS: gl.constexpr, form: gl.constexpr):
    """A step's COLUMNS rows of dy from the program's row FIRST on: four registers for each eight."""
    lane = place[0]
    M, N = sizes
    n = first + lane % 4 * 8
    m = place[3] + FIRST + lane // 4
    if form.RAGGED and not form.ALIGNED:
        begin = n  # as its rows of W do
    else:
        begin = gl.minimum(n, N - 8)
    return load_dy(pointers[3], m, begin, n, inside, M, N, form.ALIGNED, form.RAGGED, COLUMNS)


@gluon.jit
def _whole_pairs(w, scales, lane8, form: gl.constexpr):
    """All of a step's fragment registers, [word][pair of rows][8]."""
    WORDS: gl.constexpr = form.WORDS
    KIND: gl.constexpr = form.KIND
    pairs = ()
    for word in gl.static_range(WORDS):
        for pair in gl.static_range(4):
            row = w[2 * pair * WORDS + word]
            row_1 = w[(2 * pair + 1) * WORDS + word]
            pairs = pairs + decode_pair(row, row_1, scales[2 * pair], scales[2 * pair + 1], lane8, KIND)
    return pairs


@gluon.jit
def multiply(acc, w, scales, dy, lane8, pointers, place, sizes, first, inside, form: gl.constexpr):
    """Add the product of 32 rows of W, eight rows of dy after the other.

    Of more than eight, those of the step that begins at `first` are loaded as soon as those before them are used: so
    one step's registers are enough.

    Returns:
        The sums, [8 rows of dy][byte][4], and the dy that is there now.
    """
    BYTES: gl.constexpr = form.BYTES
    GROUPS: gl.constexpr = form.GROUPS
    KIND: gl.constexpr = form.KIND
    if form.RAGGED:
        pairs = ragged_pairs(w, scales, lane8, form)
    else:
        pairs = _whole_pairs(w, scales, lane8, form)
    sums = ()
    then = ()
    for j in gl.static_range(GROUPS):
        for byte in gl.static_range(BYTES):
            a = ()
            for pair in gl.static_range(4):
                a = a + _two(pairs, 32 * (byte // 4) + 8 * pair + byte % 4 * 2)
            sums = sums + mma(a, dy, 4 * j, _four(acc, 4 * (j * BYTES + byte)), KIND)
        if GROUPS > 1:
            then = then + load_columns(pointers, place, sizes, first, inside, 8 * j, 8, form)
    if GROUPS == 1:
        then = dy
    return sums, then


@gluon.jit
def store_sums(shared, acc, thread, COLUMN: gl.constexpr, BYTES: gl.constexpr, THREADS: gl.constexpr):
    """A thread's sums of one m, 8 j or 8 j + 1 and 0, 2, 4 or 6 more for COLUMN = 2 j or 2 j + 1: [k][thread]."""
    for value in gl.static_range(2 * BYTES):
        one = acc[4 * (COLUMN // 2 * BYTES + value // 2) + value % 2 * 2 + COLUMN % 2]
        store_shared(shared + (value * (THREADS + 1) + thread) * 4, one.to(gl.int32, bitcast=True))


@gluon.jit
def add_warps(shared, out_ptr, thread, first_k, first_m, M, COLUMN: gl.constexpr, form: gl.constexpr):
    """Add up the warps that share the rows, in their order, for what `store_sums` has stored.

    The sums are the results, or this program's part of them, [m][k] in float32.
    """
    THREADS: gl.constexpr = form.THREADS
    ROWS: gl.constexpr = form.ROWS
    BYTES: gl.constexpr = form.BYTES
    N_WARPS: gl.constexpr = form.N_WARPS
    for first in gl.static_range(0, 4 * ROWS, THREADS):
        result = first + thread
        k = result % ROWS
        t = result // ROWS % 4
        value = k % (2 * BYTES)
        lane = k // (2 * BYTES) % 8 * 4 + t
        address = shared + (value * (THREADS + 1) + k // (16 * BYTES) * 32 + lane) * 4
        total = load_shared(address)
        for n_warp in gl.static_range(1, N_WARPS):
            total += load_shared(address + n_warp * (128 * form.K_WARPS))
        m = COLUMN // 2 * 8 + COLUMN % 2 + 2 * t
        inside = (result < 4 * ROWS) & (first_m + m < M) & (first_k + k < form.K)
        if form.SPLIT:
            at = (m * ROWS + k).to(gl.int64)
        else:
            at = (first_m + m).to(gl.int64) * form.K + first_k + k
        gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
