"""The backward product for few rows where W's rows are not whole blocks: K no multiple of 64, or blocks of 32.

Rows then begin anywhere (`_dx_rows.py`), and blocks anywhere in them.  A lane's bytes of a row lie in one block or in
two: it takes both blocks' scales, and the k at which the second begins, a multiple of the largest power of two in K.

The kernel and the reasons are in `matmul_skinny_dx.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._dx_lanes import eight_weights_asm, load_shared_vector, wait_for_warp, weights_asm
from ._dx_rows import load_ragged_rows, ragged_halves
from ._dx_scales import SCALE_PITCH, leave_scales, load_one, load_together
from ._lanes import load_shared, store_shared


@gluon.jit
def load_ragged_step(pointers, place, sizes, first, inside, form: gl.constexpr):
    """A step's words of W and stored scales."""
    packed_ptr, absmax_ptr, absmax_8bit_ptr = pointers[:3]
    N = sizes[1]
    w = load_ragged_rows(packed_ptr, place, N, first, inside, form.K, form.ALIGNED, form.BYTES)
    return w, _load_stored(absmax_ptr, absmax_8bit_ptr, first + place[0], place[2], N, inside, form)


@gluon.jit
def _load_stored(absmax_ptr, absmax_8bit_ptr, row, first_k, N, inside, form: gl.constexpr):
    """What is stored for the blocks in which a warp's k of a row lie; as `load_stored`.  Rows after the last have 0."""
    first = ((row.to(gl.int64) * form.K + first_k) // form.QUANT_BLOCK).to(gl.int32)
    last = ((N.to(gl.int64) * form.K - 1) // form.QUANT_BLOCK).to(gl.int32)
    mask = (inside != 0) & (row < N)
    stored = ()
    COUNT: gl.constexpr = form.MOST_BLOCKS
    # Where a row's blocks are a multiple of COUNT, a power of two then, they lie in one word and have one scale.
    TOGETHER: gl.constexpr = form.NESTED and COUNT <= 4 and form.K % (COUNT * form.QUANT_BLOCK) == 0
    if TOGETHER:
        at = gl.minimum(first, last - (COUNT - 1))
        stored = load_together(absmax_ptr, absmax_8bit_ptr, at, mask, mask, COUNT, form.NESTED_BLOCK)
    else:
        for i in gl.static_range(COUNT):
            at = gl.minimum(first + i, last)
            stored = stored + load_one(absmax_ptr, absmax_8bit_ptr, at, mask, form.NESTED, form.NESTED_BLOCK)
    return stored


@gluon.jit
def ragged_scales_of_lane(stored, area, map_address, offset, lane, first, first_k, form: gl.constexpr):
    """Of this lane's bytes of eight rows the scales of the first block and, where it may end there, of the next, and
    how many k are before that one."""
    COUNT: gl.constexpr = form.MOST_BLOCKS
    DIVIDED: gl.constexpr = form.DIVIDED
    QUANT_BLOCK: gl.constexpr = form.QUANT_BLOCK
    wait_for_warp(lane)  # the last step's are read
    scale = leave_scales(stored, area, map_address, offset, lane, COUNT, form.NESTED)
    if DIVIDED:  # read beside the last block's, and not used
        store_shared(area + (SCALE_PITCH * COUNT + lane) * 4, scale.to(gl.int32, bitcast=True))
    wait_for_warp(lane)
    lane_k = lane // 4 * (2 * form.BYTES)
    here = area + lane % 4 * 32
    if form.K % QUANT_BLOCK == 0:
        here += lane_k // QUANT_BLOCK * (SCALE_PITCH * 4)
        scales = load_shared_vector(here) + load_shared_vector(here + 16)
    else:
        # A step's 32 rows are whole blocks mostly: then the places are the same in each step.
        n = lane % 4 * 8 if 32 * form.K % QUANT_BLOCK == 0 else first + lane % 4 * 8
        scales = ()
        then = ()
        switches = ()
        for i in gl.static_range(8):
            k = (((n + i) * form.K + first_k) & (QUANT_BLOCK - 1)) + lane_k
            address = here + (k // QUANT_BLOCK * SCALE_PITCH + i) * 4
            scales = scales + (load_shared(address),)
            if DIVIDED:
                then = then + (load_shared(address + SCALE_PITCH * 4),)
                switches = switches + (QUANT_BLOCK - (k & (QUANT_BLOCK - 1)),)
        scales = scales + then + switches
    return scales


@gluon.constexpr_function
def _decode_asm(kind, grain, first_k):
    """Four bytes of pairs of even k ($8) and four of odd k ($9): eight fragment registers, as `decode_pair` gives.

    Each row has its scale and the next ($10, $11; $13, $14), which begins after so many k ($12, $15), a multiple of
    `grain`; those of $8 and $9 are at first_k and after.  $16 is the lane's place.
    """
    lines = [
        "{ .reg .b32 address, table; .reg .f32 code, code_1, scale, scale_1; .reg .pred before;",
        "mov.u32 table, global_smem;",
    ]
    for number in range(4):
        for half, word in enumerate(("$8", "$9")):
            k = first_k + 2 * number + half
            if k % grain == 0 or k == first_k:
                lines.append(f"setp.gt.s32 before, $12, {k}; selp.f32 scale, $10, $11, before;")
                lines.append(f"setp.gt.s32 before, $15, {k}; selp.f32 scale_1, $13, $14, before;")
            lines += weights_asm(word, number, f"${2 * number + half}", ("scale", "scale_1"), "$16", kind)
    return "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _decode_whole_asm(kind):
    """The same where each row has one scale ($10, $11); $12 is the lane's place."""
    lines = ["{ .reg .b32 address, table; .reg .f32 code, code_1;", "mov.u32 table, global_smem;"]
    lines += eight_weights_asm("$8", "$9", ("$10", "$11"), "$12", kind)
    return "\n".join(lines) + "\n}"


@gluon.jit
def _scale_at(scales, ROW: gl.constexpr, FIRST: gl.constexpr, DIVIDED: gl.constexpr):
    """Of a row's word that begins at this k of the lane's, and in which no block ends."""
    scale = scales[ROW]
    if DIVIDED and FIRST > 0:
        scale = gl.where(scales[16 + ROW] > FIRST, scale, scales[8 + ROW])
    return scale


@gluon.jit
def ragged_pairs(w, scales, lane8, form: gl.constexpr):
    """All of a step's fragment registers, as `decode_pair` gives them, [word][pair of rows][8]."""
    GRAIN: gl.constexpr = form.GRAIN
    DIVIDED: gl.constexpr = form.DIVIDED
    KIND: gl.constexpr = form.KIND
    K: gl.constexpr = form.K
    BYTES: gl.constexpr = form.BYTES
    pairs = ()
    for word in gl.static_range(BYTES // 4):
        for row in gl.static_range(0, 8, 2):
            even = ragged_halves(w, row, word, 0, K, BYTES)
            odd = ragged_halves(w, row, word, 1, K, BYTES)
            if GRAIN >= 8:
                scale = _scale_at(scales, row, 8 * word, DIVIDED)
                scale_1 = _scale_at(scales, row + 1, 8 * word, DIVIDED)
                pairs = pairs + gl.inline_asm_elementwise(
                    _decode_whole_asm(KIND),
                    "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,f,f,r",
                    [even, odd, scale, scale_1, lane8],
                    dtype=[gl.int32] * 8,
                    is_pure=False,
                    pack=1,
                )
            else:
                pairs = pairs + gl.inline_asm_elementwise(
                    _decode_asm(KIND, GRAIN, 8 * word),
                    "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,f,f,r,f,f,r,r",
                    [
                        even,
                        odd,
                        scales[row],
                        scales[8 + row],
                        scales[16 + row],
                        scales[row + 1],
                        scales[9 + row],
                        scales[17 + row],
                        lane8,
                    ],
                    dtype=[gl.int32] * 8,
                    is_pure=False,
                    pack=1,
                )
    return pairs
