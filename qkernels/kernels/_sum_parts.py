"""The sum of a product's parts, where its contraction is split over programs: kernel and launch, after the product's.

The parts are added in their order, so two runs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..tuning import LaunchConfig
from ..tuning.skinny import SkinnyConfig
from ..tuning.skinny_dx import SkinnyDxConfig
from ._launch import Launch, early_and_late

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
    EARLY: tl.constexpr,
):
    """Add the parts of tiles in order to out[M, R]; a program takes one column of a tile.

    EARLY as in `_early.py`.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) + tl.arange(0, 1)
    at = parts_ptr + tile.to(tl.int64) * (PARTS * ROWS * COLUMNS) + columns[:, None] * ROWS + rows[None, :]
    total = tl.load(at)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * ROWS * COLUMNS)
    r = tile // columns_of_tiles * ROWS + rows
    m = tile % columns_of_tiles * COLUMNS + columns
    out = out_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


_LAUNCHERS = early_and_late(sum_parts_kernel)


def sum_constants(config: SkinnyConfig | SkinnyDxConfig) -> dict[str, object]:
    """The kernel's compile-time arguments, in its order."""
    return {"ROWS": config.rows, "COLUMNS": config.columns, "PARTS": config.parts, "EARLY": config.early}


class PartsSum:
    """The parts of products out[M, R] of one configuration, more than one of each tile.

    Attributes:
        add: the launch that adds them in order and rounds, a function of (parts, out).
    """

    def __init__(self, M: int, R: int, config: SkinnyConfig | SkinnyDxConfig) -> None:
        across = -(-M // config.columns)
        tiles = across * -(-R // config.rows)
        self._size = tiles * config.parts * config.rows * config.columns
        grid, constants = (tiles, config.columns, 1), tuple(sum_constants(config).values())
        self.add = Launch(_LAUNCHERS[config.early], grid, (M, R, across), constants, SUM_CONFIG)

    def empty(self, device: torch.device) -> torch.Tensor:
        """Memory for them: float32[tiles, parts, columns, rows], as one dimension."""
        return torch.empty(self._size, dtype=torch.float32, device=device)


@lru_cache(maxsize=4096, typed=True)  # a configuration of one kind equals no other, of whatever values
def parts_sum(M: int, R: int, dtype: torch.dtype, config: SkinnyConfig | SkinnyDxConfig) -> PartsSum:
    """That of products of this kind, made once; `dtype` is the output's, which a launch must keep."""
    return PartsSum(M, R, config)
