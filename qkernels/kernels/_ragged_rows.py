"""Rows of W that are not whole blocks: which rows begin alike, and what a lane reads of W and of x then.

W is cut into blocks without regard to its rows, and a row may begin anywhere, even in the middle of a byte.  So rows
are read in windows of 64 weights that are W's and not theirs: each begins at a multiple of 32 bytes and lies in one
block.  A row's first window holds `shift` weights of the row before it, its last one some of the row after it; there x
is zero.  The shift is n K mod 64, which rows n, n + PHASES, n + 2 PHASES ... have in common.  A program takes rows of
one such phase: then only x is read from another place, and all else is as with rows that are whole blocks.

Blocks of 32 are read in the same windows, of two blocks each.

The kernel and the other reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._early import fetch
from ._lanes import load_once

_OUTSIDE = gl.constexpr(1 << 30)  # a k that no row has


@gluon.jit
def phase_of(program, N, K: gl.constexpr, PHASES: gl.constexpr):
    """What a program has: (phase, its number in the phase, rows of the phase, shift)."""
    phases = gl.minimum(PHASES, N)  # with fewer rows the others have none
    phase = program % phases
    return phase, program // phases, (N - phase + (PHASES - 1)) // PHASES, phase * (K % 64) % 64


@gluon.jit
def window_of(i, phase, K: gl.constexpr, PHASES: gl.constexpr):
    """The first window of row i of a phase, counted from W's beginning."""
    return i * (PHASES * K // 64) + phase * K // 64


@gluon.jit
def row_addresses(packed_ptr, i, t, phase, phase_rows, K: gl.constexpr, PHASES: gl.constexpr, TILES: gl.constexpr):
    """Where this lane's bytes of rows i and i + 8 of each tile begin.  Rows past the last are the last one again."""
    addresses = ()
    for eight in gl.static_range(2 * TILES):
        window = window_of(gl.minimum(i + 8 * eight, phase_rows - 1), phase, K, PHASES)
        addresses = addresses + (packed_ptr.to(gl.int64) + window.to(gl.int64) * 32 + t * 16,)
    return addresses


@gluon.jit
def load_last(packed_ptr, i, phase, phase_rows, N, K: gl.constexpr, PHASES: gl.constexpr):
    """Where W's bytes are no multiple of 16: (how many rows of this phase lie before W's last one, less this lane's i,
    and the last bytes with zeros after them, four int32)."""
    size = (N.to(gl.int64) * K + 1) // 2
    before = gl.where(phase == (N - 1) % PHASES, phase_rows - 1, N) - i
    last = (before,)
    for word in gl.static_range(4):
        value = i * 0
        for byte in gl.static_range(4):
            at = (i * 0).to(gl.int64) + size // 16 * 16 + (4 * word + byte)
            value |= gl.load(packed_ptr + at, mask=at < size, other=0).to(gl.int32) << (8 * byte)
        last = last + (value,)
    return last


@gluon.jit
def load_ragged(addresses, chunk, t, shift, last, K: gl.constexpr, TAIL: gl.constexpr, TILES: gl.constexpr):
    """16 bytes of each row; past a row's end its last 16 bytes again, which are W's.

    TAIL says that W's last row has fewer there: those are in `last`, from `load_last`.
    """
    offset = _offset(chunk, t, shift, K)
    w = ()
    for eight in gl.static_range(2 * TILES):
        if TAIL:
            ends = (8 * eight >= last[0]) & (offset == _last(t, shift, K))
            loaded = load_once(addresses[eight] + offset - ends.to(gl.int32) * 16)
            for word in gl.static_range(4):
                w = w + (gl.where(ends, last[1 + word], loaded[word]),)
        else:
            w = w + load_once(addresses[eight] + offset)
    return w


@gluon.jit
def fetch_ragged(addresses, chunk, t, shift, K: gl.constexpr, TILES: gl.constexpr):
    """Bring what `load_ragged` would load into the L2 cache."""
    for eight in gl.static_range(2 * TILES):
        fetch(addresses[eight] + _offset(chunk, t, shift, K))


@gluon.jit
def _last(t, shift, K: gl.constexpr):
    return ((shift + (K - 1)) // 32 - t) * 16


@gluon.jit
def _offset(chunk, t, shift, K: gl.constexpr):
    """Bytes from a lane's first ones to those of a chunk."""
    return gl.minimum(chunk * 64, _last(t, shift, K))


def _load_x_asm(width: int) -> str:
    """$0..$3 = eight 16-bit values from $4 on, so many at once; $5 is the first one's k, and zero is what is not in 0
    to $6."""
    names = [f"${i}" for i in range(4)] if width > 1 else [f"value_{i}" for i in range(8)]
    lines = ["{ .reg .pred inside; .reg .b32 k;"]
    if width == 1:
        lines.append(f".reg .b32 {', '.join(names)};")
    at_once = max(1, width // 2)  # registers
    lines += [f"mov.b32 {name}, 0;" for name in names]
    for part in range(8 // width):
        to = names[at_once * part : at_once * (part + 1)]
        vector, register = ("", to[0]) if at_once == 1 else (f".v{at_once}", f"{{{', '.join(to)}}}")
        lines += [
            f"add.u32 k, $5, {width * part}; setp.lt.u32 inside, k, $6;",
            f"@inside ld.global{vector}.{'u16' if width == 1 else 'b32'} {register}, [$4+{2 * width * part}];",
        ]
    if width == 1:
        lines += [f"prmt.b32 ${i}, value_{2 * i}, value_{2 * i + 1}, 0x5410;" for i in range(4)]
    return "\n".join(lines) + "\n}"


_LOAD_X_1, _LOAD_X_2, _LOAD_X_4, _LOAD_X_8 = (gl.constexpr(_load_x_asm(width)) for width in (1, 2, 4, 8))


@gluon.jit
def load_eight(address, k, inside, K: gl.constexpr):
    """x[k : k + 8] of a row where `inside` is not zero, zeros outside of the row: four registers.

    `address` is that of x[k], and k and rows of x are aligned as K is.
    """
    return gl.inline_asm_elementwise(
        _LOAD_X_8 if K % 8 == 0 else (_LOAD_X_4 if K % 4 == 0 else (_LOAD_X_2 if K % 2 == 0 else _LOAD_X_1)),
        "=&r,=&r,=&r,=&r,l,r,r",
        [address, gl.where(inside != 0, k, _OUTSIDE), K],
        dtype=[gl.int32] * 4,
        is_pure=False,
        pack=1,
    )
