"""The fused product of one chunk of 128 k: look up, multiply, scale; and x of the next chunk in its place.

The kernel and the reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._lanes import from_neighbour, load_shared, look_up, mma
from ._skinny_inputs import load_x, load_x_paired


@gluon.jit
def zeros(lane):
    zero = (lane * 0).to(gl.float32)
    return (zero, zero, zero, zero)


@gluon.jit
def _add_scaled(acc, ACC: gl.constexpr, part, scale, scale_8):
    """acc[ACC : ACC + 4] plus the sums of row g (two columns) and of row g + 8, each times its scale."""
    return (
        gl.fma(part[0], scale, acc[ACC]),
        gl.fma(part[1], scale, acc[ACC + 1]),
        gl.fma(part[2], scale_8, acc[ACC + 2]),
        gl.fma(part[3], scale_8, acc[ACC + 3]),
    )


@gluon.jit
def _paired_chunk(acc, w, x, scales, lane, BLOCK: gl.constexpr, TILES: gl.constexpr, KIND: gl.constexpr):
    """Add a chunk's product for M <= 4: lanes 0 and 1 of a quad have the sums of the first block of 64, lanes 2 and 3
    those of the second.  With blocks of 32, M <= 2, each has those of its own."""
    SCALES: gl.constexpr = 128 // BLOCK
    sums = ()
    for tile in gl.static_range(TILES):
        part = zeros(lane)
        for word in gl.static_range(4):
            a = look_up(w[8 * tile + word], w[8 * tile + 4 + word], lane * 4)
            part = mma(a, x, 4 * word, part, KIND)
        here = scales + 64 * SCALES * tile + lane % 4 // (4 // SCALES) * 4
        sums = sums + _add_scaled(acc, 4 * tile, part, load_shared(here), load_shared(here + 32 * SCALES))
    return sums


@gluon.jit
def _swapped(w, lane, TILES: gl.constexpr):
    """Of four words of a row, of which lanes t < 2 have the first block of 64 and the others the second: two words of
    the first block and two of the second, in every lane.  Even words go to lanes t < 2 and odd words to the others, so
    that four lanes' loads of x fill whole sectors of 32 bytes."""
    low = lane % 4 < 2
    swapped = ()
    for i in gl.static_range(2 * TILES):
        other = from_neighbour(gl.where(low, w[4 * i + 1], w[4 * i]), 2)
        other_1 = from_neighbour(gl.where(low, w[4 * i + 3], w[4 * i + 2]), 2)
        swapped = swapped + (gl.where(low, w[4 * i], other), gl.where(low, w[4 * i + 2], other_1))
        swapped = swapped + (gl.where(low, other, w[4 * i + 1]), gl.where(low, other_1, w[4 * i + 3]))
    return swapped


@gluon.jit
def _exchanged(low, a, b, STEP: gl.constexpr):
    """The first lane of a pair gets both a, the other both b."""
    other = from_neighbour(gl.where(low, b, a), STEP)
    return gl.where(low, a, other), gl.where(low, other, b)


@gluon.jit
def _transposed(w, lane, TILES: gl.constexpr):
    """Of four words of a row, which are a lane's own block of 32: one word of each of the quad's blocks."""
    even = lane % 2 == 0
    low = lane % 4 < 2
    transposed = ()
    for i in gl.static_range(2 * TILES):
        a, b = _exchanged(even, w[4 * i], w[4 * i + 1], 1)
        c, d = _exchanged(even, w[4 * i + 2], w[4 * i + 3], 1)
        a, c = _exchanged(low, a, c, 2)
        b, d = _exchanged(low, b, d, 2)
        transposed = transposed + (a, b, c, d)
    return transposed


@gluon.jit
def _shared_out(w, lane, BLOCK: gl.constexpr, TILES: gl.constexpr):
    """The words of a chunk so that those at one place are of one block in all lanes of a quad."""
    if BLOCK == 64:
        w = _swapped(w, lane, TILES)
    else:
        w = _transposed(w, lane, TILES)
    return w


@gluon.jit
def _half_chunk(
    acc,
    w,
    x,
    scales,
    lane,
    HALF: gl.constexpr,
    BLOCK: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    KIND: gl.constexpr,
):
    """Add the product of half a chunk, 64 k, for all columns of x."""
    SCALES: gl.constexpr = 128 // BLOCK
    sums = ()
    for tile in gl.static_range(TILES):
        a = look_up(w[8 * tile + 2 * HALF], w[8 * tile + 4 + 2 * HALF], lane * 4)
        a_1 = look_up(w[8 * tile + 2 * HALF + 1], w[8 * tile + 5 + 2 * HALF], lane * 4)
        here = scales + 64 * SCALES * tile + 2 * SCALES * HALF
        scale = load_shared(here)
        scale_8 = load_shared(here + 32 * SCALES)
        if BLOCK == 32:
            scale_1 = load_shared(here + 4)
            scale_9 = load_shared(here + 4 + 32 * SCALES)
        for j in gl.static_range(GROUPS):
            if BLOCK == 64:
                part = mma(a_1, x, 8 * j + 4, mma(a, x, 8 * j, zeros(lane), KIND), KIND)
                sums = sums + _add_scaled(acc, 4 * (GROUPS * tile + j), part, scale, scale_8)
            else:
                part = mma(a, x, 8 * j, zeros(lane), KIND)
                first = _add_scaled(acc, 4 * (GROUPS * tile + j), part, scale, scale_8)
                sums = sums + _add_scaled(first, 0, mma(a_1, x, 8 * j + 4, zeros(lane), KIND), scale_1, scale_9)
    return sums


@gluon.jit
def add_chunk(
    w,
    x,
    x_1,
    acc,
    scales,
    lane,
    first,
    this_k_warp,
    end,
    x_place,
    following,
    inside,
    M,
    form: gl.constexpr,
):
    """Add a chunk's product, in a warp whose chunk, `first` and as many more as its number along K, is below `end`; and
    load x of the chunk `following` where it is `inside`.

    Returns:
        The sums, [tile][eight columns][4], and the halves of x that are there now, as `load_x` gives them (PAIRED:
        the whole, and nothing).
    """
    BLOCK: gl.constexpr = form.BLOCK
    TILES: gl.constexpr = form.TILES
    GROUPS: gl.constexpr = form.GROUPS
    KIND: gl.constexpr = form.KIND
    if form.PAIRED:
        then = load_x_paired(x_place, following, lane % 4, inside, form)
        if first + this_k_warp < end:
            acc = _paired_chunk(acc, w, x, scales, lane, BLOCK, TILES, KIND)
        x = then
    elif form.ONE_BRANCH:
        if first + this_k_warp < end:
            w = _shared_out(w, lane, BLOCK, TILES)
            acc = _half_chunk(acc, w, x, scales, lane, 0, BLOCK, TILES, GROUPS, KIND)
            x = load_x(x_place, following, inside, M, 0, form)
            acc = _half_chunk(acc, w, x_1, scales, lane, 1, BLOCK, TILES, GROUPS, KIND)
            x_1 = load_x(x_place, following, inside, M, 1, form)
    else:  # ptxas moves the loads of the next chunk's weights between the two
        if first + this_k_warp < end:
            w = _shared_out(w, lane, BLOCK, TILES)
            acc = _half_chunk(acc, w, x, scales, lane, 0, BLOCK, TILES, GROUPS, KIND)
        x = load_x(x_place, following, inside, M, 0, form)
        if first + this_k_warp < end:
            acc = _half_chunk(acc, w, x_1, scales, lane, 1, BLOCK, TILES, GROUPS, KIND)
        x_1 = load_x(x_place, following, inside, M, 1, form)
    return acc, x, x_1
