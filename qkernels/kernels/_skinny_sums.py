"""The end of a program of the fused product: the sums of its warps, added up and stored.

The kernel and the reasons are in `matmul_skinny.py`.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from ._lanes import load_shared


@gluon.jit
def add_and_store(
    shared,
    bias_ptr,
    out_ptr,
    thread,
    rows,
    M,
    N,
    HAS_BIAS: gl.constexpr,
    ALPHA: gl.constexpr,
    form: gl.constexpr,
):
    """Add up the warps along K, in their order, and store.  Shared memory holds [value][thread], float32.

    `rows` are the program's first row, and where rows begin anywhere its phase and the rows of that.  Of K in parts
    they are this program's part of the results, [m][row] in float32.
    """
    SUMS: gl.constexpr = form.SCALES if form.PAIRED else 1  # lanes with a sum of the same result
    first_row = rows[0]
    TILES: gl.constexpr = form.TILES
    GROUPS: gl.constexpr = form.GROUPS
    ROW_WARPS: gl.constexpr = form.ROW_WARPS
    K_WARPS: gl.constexpr = form.K_WARPS
    THREADS: gl.constexpr = form.THREADS
    VALUES: gl.constexpr = TILES * GROUPS * 4
    RESULTS: gl.constexpr = VALUES * ROW_WARPS * 32
    for first in gl.static_range(0, RESULTS, THREADS):
        result = first + thread
        lane = result % 32
        row_warp = result // 32 % ROW_WARPS
        value = gl.minimum(result // (32 * ROW_WARPS), VALUES - 1)
        address = shared + (value * THREADS + row_warp * (32 * K_WARPS) + lane) * 4
        total = load_shared(address)
        for k_warp in gl.static_range(1, K_WARPS):
            total += load_shared(address + 128 * k_warp)
        column = value // 4 % GROUPS * 8 + lane % 4 * 2 + value % 2
        inside = result < RESULTS
        for block in gl.static_range(1, SUMS):  # those of the second block of 64 are two lanes further on
            second = load_shared(address + 16 // SUMS * block)
            for k_warp in gl.static_range(1, K_WARPS):
                second += load_shared(address + 16 // SUMS * block + 128 * k_warp)
            total += second
        if form.PAIRED:
            inside = inside & (lane % 4 < 4 // SUMS)
        row = first_row + (row_warp * TILES + value // (4 * GROUPS)) * 16 + value // 2 % 2 * 8 + lane // 4
        inside = inside & (column < M)
        if form.PHASES > 0:
            inside = inside & (row < rows[2])
            row = row * form.PHASES + rows[1]
        total = total * (1.0 / ALPHA)
        if HAS_BIAS:
            with_bias = inside & (gl.program_id(2) == 0) if form.PARTS > 1 else inside
            total += gl.load(bias_ptr + row, mask=with_bias, other=0.0).to(gl.float32)
        if form.PARTS > 1:
            gl.store(out_ptr + column * (16 * TILES * ROW_WARPS) + (row - first_row), total, mask=inside)
        else:
            gl.store(out_ptr + column.to(gl.int64) * N + row, total.to(out_ptr.dtype.element_ty), mask=inside)
