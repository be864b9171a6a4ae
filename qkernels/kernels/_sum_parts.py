"""The sum of a product's parts, where its contraction is split over programs: a launch after the product's own.

The parts are added in their order, so two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig

SUM_CONFIG = LaunchConfig(rows=1, num_warps=4)


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    out_ptr,
    M,
    R,
    columns_of_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the parts of tiles in order to out[M, R]; a program takes PIECE columns of a tile.

    EARLY as in `_early.py`.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    at = parts_ptr + tile.to(tl.int64) * (PARTS * ROWS * COLUMNS) + columns[:, None] * ROWS + rows[None, :]
    total = tl.load(at)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * ROWS * COLUMNS)
    r = tile // columns_of_tiles * ROWS + rows
    m = tile % columns_of_tiles * COLUMNS + columns
    out = out_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])
