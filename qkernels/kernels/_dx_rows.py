"""Rows of W that begin anywhere, for the backward product: the words in which a lane's bytes lie, and their halves.

Eight rows have a multiple of four bytes.  So where each of them begins within a word is known when it is compiled, in
the middle of a byte too, and so are the words that a lane loads of it.  Two words shifted by a constant are what it
takes out; the shift also brings a half byte to its place, so it takes the place of the one that whole rows need.

A lane may read on into the next row, as no sum holds what is past its own k.  Past W's end nothing is read.
"""

from __future__ import annotations

import math

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._dx_lanes import load_words

_FAR = gl.constexpr(1 << 30)  # bytes, more than a lane reads at once
_FAR_ROWS = gl.constexpr(64)  # so many rows are longer than that, of whatever K


@gluon.constexpr_function
def _first_word(K, row):
    """The word, from the first of eight rows on, in which one of them begins."""
    return row * K // 8


@gluon.constexpr_function
def _words_of(K, BYTES, row):
    """Words in which a lane's bytes of one of eight rows lie."""
    return (row * K % 8 + 2 * BYTES - 1) // 8 + 1


@gluon.constexpr_function
def _words_before(K, BYTES, row):
    return sum(_words_of(K, BYTES, i) for i in range(row))


@gluon.constexpr_function
def _vector_of(K, BYTES, word, end):
    """Words that one load takes from `word` on: a vector begins at a multiple of its size, as each lane's bytes do."""
    aligned = math.gcd(4 * K, BYTES)
    fitting = (size for size in (4, 2) if word + size <= end and word % size == 0 and aligned % (4 * size) == 0)
    return next(fitting, 1)


@gluon.constexpr_function
def _begins_vector(K, BYTES, first, end, word):
    """Whether a load begins at this word of a row."""
    at = first
    while at < word:
        at += _vector_of(K, BYTES, at, end)
    return at == word


@gluon.constexpr_function
def _load_or_tail_asm(end):
    return (
        f"{{ .reg .pred inside; setp.ge.s32 inside, $2, {end};"
        " mov.b32 $0, $3; @inside ld.global.L1::evict_first.b32 $0, [$1]; }"
    )


@gluon.jit
def _load_row(address, left, tail, ROW: gl.constexpr, K: gl.constexpr, ALIGNED: gl.constexpr, BYTES: gl.constexpr):
    FIRST: gl.constexpr = _first_word(K, ROW)
    END: gl.constexpr = FIRST + _words_of(K, BYTES, ROW)
    w = ()
    for word in gl.static_range(FIRST, END):
        if not ALIGNED:
            one = gl.inline_asm_elementwise(
                _load_or_tail_asm(4 * word + 4),
                "=&r,l,r,r",
                [address + 4 * word, left, tail],
                dtype=gl.int32,
                is_pure=False,
                pack=1,
            )
            w = w + (one,)
        elif _begins_vector(K, BYTES, FIRST, END, word):
            w = w + load_words(
                address + 4 * word,
                left,
                _vector_of(K, BYTES, word, END),
                4 * (word + _vector_of(K, BYTES, word, END)),
                "evict_first",
            )
    return w


@gluon.jit
def load_ragged_rows(packed_ptr, place, N, first, inside, K: gl.constexpr, ALIGNED: gl.constexpr, BYTES: gl.constexpr):
    """A lane's words of its eight rows, the rows' first words as `first_word` says.

    Where N is no multiple of eight, W may end within a word, and that word is the tail.
    """
    lane, column, _, _, tail = place
    n = first + lane % 4 * 8
    begin = n.to(gl.int64) // 2 * K + column
    # Only near the end is it counted, where the difference has 32 bits.
    left = (((N.to(gl.int64) * K + 1) // 2 // 4 * 4) - begin).to(gl.int32)
    left = gl.where(inside == 0, 0, gl.where(n + _FAR_ROWS <= N, _FAR, left))
    address = packed_ptr.to(gl.int64) + begin
    w = ()
    for row in gl.static_range(8):
        w = w + _load_row(address, left, tail, row, K, ALIGNED, BYTES)
    return w


@gluon.jit
def load_tail(packed_ptr, lane, N, K: gl.constexpr):
    """The bytes of W after its last whole word, as a word; int32, the same in each lane."""
    size = (N.to(gl.int64) * K + 1) // 2
    tail = lane * 0
    for i in gl.static_range(3):
        at = size // 4 * 4 + i
        tail |= gl.load(packed_ptr + at, mask=at < size, other=0).to(gl.int32) << (8 * i)
    return tail


@gluon.constexpr_function
def _shift_of(K, row, word, half):
    """Bits from where a row's words begin to a half byte, so that it comes to its half of the byte of a pair.

    The first of two rows has the upper half, as the first of two elements has.
    """
    element = row * K % 8 + half
    place = 4 * element + (4 if element % 2 == 0 else -4)
    return 32 * word + place - (4 if row % 2 == 0 else 0)


@gluon.jit
def _bits_from(w, FROM: gl.constexpr, COUNT: gl.constexpr, BIT: gl.constexpr):
    """32 bits of w[FROM : FROM + COUNT] from BIT on, which may be a few before the first or end after the last."""
    WORD: gl.constexpr = BIT // 32
    BITS: gl.constexpr = BIT % 32
    if WORD < 0:
        bits = w[FROM] << (32 - BITS)
    elif BITS == 0:
        bits = w[FROM + WORD]
    elif WORD + 1 < COUNT:
        bits = gl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [w[FROM + WORD], w[FROM + WORD + 1], BITS],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        bits = w[FROM + WORD] >> BITS
    return bits


@gluon.jit
def ragged_halves(w, ROW: gl.constexpr, WORD: gl.constexpr, HALF: gl.constexpr, K: gl.constexpr, BYTES: gl.constexpr):
    """Of two rows' four bytes the even or odd k, a byte each, the first row's in the upper half."""
    upper = _bits_from(w, _words_before(K, BYTES, ROW), _words_of(K, BYTES, ROW), _shift_of(K, ROW, WORD, HALF))
    lower = _bits_from(
        w, _words_before(K, BYTES, ROW + 1), _words_of(K, BYTES, ROW + 1), _shift_of(K, ROW + 1, WORD, HALF)
    )
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0xF0F0F0F0, 0xE4;", "=r,r,r", [upper, lower], dtype=gl.int32, is_pure=True, pack=1
    )
