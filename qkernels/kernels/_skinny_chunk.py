"""The fused product of one chunk of 128 k: look up, multiply, scale.

The kernel and the reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._lanes import load_shared, look_up, mma, swap_halves


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
def paired_chunk(acc, w, x, scales, lane, TILES: gl.constexpr, KIND: gl.constexpr):
    """Add a chunk's product for M <= 4: lanes 0 and 1 of a quad have the sums of the first block of 64, lanes 2 and 3
    those of the second."""
    sums = ()
    for tile in gl.static_range(TILES):
        part = zeros(lane)
        for word in gl.static_range(4):
            a = look_up(w[8 * tile + word], w[8 * tile + 4 + word], lane * 4)
            part = mma(a, x, 4 * word, part, KIND)
        here = scales + 128 * tile + lane % 4 // 2 * 4
        sums = sums + _add_scaled(acc, 4 * tile, part, load_shared(here), load_shared(here + 64))
    return sums


@gluon.jit
def swapped(w, lane, TILES: gl.constexpr):
    """Of four words of a row, of which lanes t < 2 have the first block of 64 and the others the second: two words of
    the first block and two of the second, in every lane.  Even words go to lanes t < 2 and odd words to the others, so
    that four lanes' loads of x fill whole sectors of 32 bytes."""
    low = lane % 4 < 2
    swapped = ()
    for i in gl.static_range(2 * TILES):
        other = swap_halves(gl.where(low, w[4 * i + 1], w[4 * i]))
        other_1 = swap_halves(gl.where(low, w[4 * i + 3], w[4 * i + 2]))
        swapped = swapped + (gl.where(low, w[4 * i], other), gl.where(low, w[4 * i + 2], other_1))
        swapped = swapped + (gl.where(low, other, w[4 * i + 1]), gl.where(low, other_1, w[4 * i + 3]))
    return swapped


@gluon.jit
def half_chunk(
    acc,
    w,
    x,
    scales,
    lane,
    HALF: gl.constexpr,
    TILES: gl.constexpr,
    GROUPS: gl.constexpr,
    KIND: gl.constexpr,
):
    """Add the product of half a chunk, 64 k, for all columns of x."""
    sums = ()
    for tile in gl.static_range(TILES):
        a = look_up(w[8 * tile + 2 * HALF], w[8 * tile + 4 + 2 * HALF], lane * 4)
        a_1 = look_up(w[8 * tile + 2 * HALF + 1], w[8 * tile + 5 + 2 * HALF], lane * 4)
        scale = load_shared(scales + 128 * tile + 4 * HALF)
        scale_8 = load_shared(scales + 128 * tile + 64 + 4 * HALF)
        for j in gl.static_range(GROUPS):
            part = mma(a_1, x, 8 * j + 4, mma(a, x, 8 * j, zeros(lane), KIND), KIND)
            sums = sums + _add_scaled(acc, 4 * (GROUPS * tile + j), part, scale, scale_8)
    return sums
