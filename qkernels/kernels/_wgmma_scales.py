"""Scales in the Hopper product: a turn's into shared memory, and a step's from there to the threads that decode.

A step has 64 neighbours of k in a row of W, which are one block or a part of one, or two blocks of 32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..format import NESTED_BLOCKSIZE
from ._wgmma_codes import code_unit

_NESTED_BLOCK = gl.constexpr(NESTED_BLOCKSIZE)


class StoredScales(NamedTuple):
    """How a turn's scales are stored and loaded.

    Attributes:
        backward: of which product they are.
        nested: double quantization.
        quant_block: weights that share a stored scale.
        rows: rows n of a turn.
        across: scales of each.
        layout: `scaling_layout`.
    """

    backward: bool
    nested: bool
    quant_block: int
    rows: int
    across: int
    layout: Any


@gluon.constexpr_function
def stored_scales(backward, nested, quant_block, rows, across, layout):
    """That, for a kernel."""
    return StoredScales(backward, nested, quant_block, rows, across, layout)


@gluon.constexpr_function
def scale_unit(quant_block):
    """Neighbours in k that share a scale in a step."""
    return min(quant_block, 64)


@gluon.constexpr_function
def scaling_layout(rows, scales, backward):
    """Scales of a turn: [rows of n, scales of a row], backward [n, scales of `rows` of k]."""
    if backward:
        return gl.BlockedLayout([1, 1], [32 // scales, scales], [rows // 16, 1], [1, 0])
    return gl.BlockedLayout([1, scales // 2], [16, 2], [rows // 16, 1], [1, 0])


@gluon.constexpr_function
def _paired_lanes_layout(rows):
    """`lanes_layout` with a group's warps as pairs, which have 32 neighbours of k backward: [groups, 2, 2, 8, 4]."""
    groups = (rows // 64).bit_length() - 1
    lane_bases = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 4, 0]]
    warp_bases = [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]] + [[1 << i, 0, 0, 0, 0] for i in range(groups)]
    return gl.DistributedLinearLayout([], lane_bases, warp_bases, [], [rows // 64, 2, 2, 8, 4])


@gluon.constexpr_function
def _scales_layout(rows, per_step, backward):
    """Scales of a step as the operand's threads want them: [rows, per_step], backward [64 of n, groups * per_step]."""
    groups = (rows // 64).bit_length() - 1
    if backward:
        lane_bases = [[2, 0], [4, 0], [0, 0], [0, 0], [0, 0]]
        warp_bases = [[0, 0], [0, per_step // 2]] + [[0, per_step << i] for i in range(groups)]
        return gl.DistributedLinearLayout(
            [[1, 0], [8, 0], [16, 0], [32, 0]], lane_bases, warp_bases, [], [64, rows // 64 * per_step]
        )
    lane_bases = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    warp_bases = [[16 << i, 0] for i in range(groups + 2)]
    return gl.DistributedLinearLayout([[8, 0], [0, 1]][:per_step], lane_bases, warp_bases, [], [rows, per_step])


@gluon.jit
def load_scales(stores, row0, step, wanted, N, blocks, stored_as: gl.constexpr):
    """A turn's scales as stored: (8-bit index, its float32 scale), or (nothing, scale)."""
    absmax_ptr, absmax_8bit_ptr = stores
    UNIT: gl.constexpr = scale_unit(stored_as.quant_block)
    n = gl.arange(0, stored_as.rows, gl.SliceLayout(1, stored_as.layout))[:, None]
    block = gl.arange(0, stored_as.across, gl.SliceLayout(0, stored_as.layout))[None, :]
    if stored_as.backward:
        n += step * 64
        block += row0 // UNIT
    else:
        n += row0
        block += step * (64 // UNIT)
    at = (n * blocks + block) // (stored_as.quant_block // UNIT)
    mask = (n < N) & (block < blocks) & wanted
    if stored_as.nested:
        index = gl.load(absmax_8bit_ptr + at, mask=mask, other=0)
        stored = gl.load(absmax_ptr + at // _NESTED_BLOCK, mask=mask, other=0.0)
    else:
        index = gl.zeros_like(at).to(gl.uint8)
        stored = gl.load(absmax_ptr + at, mask=mask, other=0.0)
    return index, stored


@gluon.jit
def look_up(absmax_code_ptr, index, NESTED: gl.constexpr):
    """The entry of the 8-bit map, float32."""
    return gl.load(absmax_code_ptr + index.to(gl.int32)) if NESTED else gl.zeros_like(index).to(gl.float32)


@gluon.jit
def store_scales(target, code, stored, offset, NESTED: gl.constexpr, QUANT_TYPE: gl.constexpr):
    """Scales to shared memory, for codes as integers, rounded to 22 bits: three times one is exact in float32."""
    unit: gl.constexpr = code_unit(QUANT_TYPE)
    scale = (code * stored + offset if NESTED else stored) * unit
    bits = (scale.to(gl.int32, bitcast=True) + 2) & -4
    target.store(bits.to(gl.float32, bitcast=True))


@gluon.jit
def scales_of_rows(scales):
    """[groups, 4, 8] by (row / 8, k / 32)."""
    ROWS: gl.constexpr = scales.shape[0]
    PER_STEP: gl.constexpr = scales.shape[1]
    scale = scales.load(_scales_layout(ROWS, PER_STEP, False))
    if PER_STEP == 1:
        upper, lower = scale.reshape([ROWS // 64, 4, 2, 8]).permute((0, 1, 3, 2)).split()
        result = (upper, upper, lower, lower)
    else:
        result = _split(scale.reshape([ROWS // 64, 4, 2, 8, 2]).permute((0, 1, 3, 4, 2)), 2)
    return result


@gluon.jit
def scales_of_columns(scales, lanes: gl.constexpr, GROUPS: gl.constexpr):
    """As the bytes of a word are laid out, by (n / 32, n / 16, n / 8, n)."""
    PER_STEP: gl.constexpr = scales.shape[1] // GROUPS
    scale = scales.load(_scales_layout(GROUPS * 64, PER_STEP, True))
    result = ()
    if PER_STEP == 1:
        of_lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, lanes))
        scale = _split(scale.reshape([2, 2, 2, 4, 2, GROUPS]).permute((5, 3, 4, 2, 1, 0)), 4)
        for i in gl.static_range(16):
            result += (gl.convert_layout(scale[i], of_lanes, assert_trivial=True)[:, None, None, :],)
    else:
        paired: gl.constexpr = _paired_lanes_layout(GROUPS * 64)
        of_pairs: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, paired))
        scale = _split(scale.reshape([2, 2, 2, 4, 2, GROUPS, 2]).permute((5, 6, 3, 4, 2, 1, 0)), 4)
        for i in gl.static_range(16):
            value = gl.convert_layout(scale[i], of_pairs, assert_trivial=True)[:, :, None, None, :]
            value = value.broadcast_to([GROUPS, 2, 2, 8, 4]).reshape([GROUPS, 4, 8, 4])
            result += (gl.convert_layout(value, lanes, assert_trivial=True),)
    return result


@gluon.jit
def _split(value, times: gl.constexpr):
    """By the last dimensions, each of two, the last one first."""
    low, high = value.split()
    if times == 1:
        result = (low, high)
    else:
        result = _split(low, times - 1) + _split(high, times - 1)
    return result
