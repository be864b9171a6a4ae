"""Tiles of the Hopper product: pure functions of its shape.

Room: as `tuning/`; the kernel is `kernels/matmul_wgmma.py`.  The times are those of an H100 in `docs/log.md`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

_PROCESSORS = 132
ROWS = 128  # two warp groups, which take turns at decoding and multiplying
# Columns of a tile: (stages, microseconds a step of 64 of the contraction).  A wide tile decodes W for more columns.
_TILES = {64: (8, 0.49), 128: (8, 0.58), 256: (4, 0.77)}
# The parts of split tiles are written and read again, from the L2 cache, by a launch of its own.
_SUM_LAUNCH_US = 3.5
_SUM_BYTES_PER_US = 2.0e6
_MOST_PARTS = 8


class WgmmaConfig(NamedTuple):
    """Attributes:
    rows: of the transposed output a program computes, 64 for each of its warp groups.
    columns: of the transposed output, rows of x.
    stages: tiles of x in shared memory; the contraction goes in turns of as many steps.
    parts: into which the contraction is split where tiles are split.
    whole_tiles: tiles, from the first, that are not split.
    part_steps: steps of 64 that a part takes, a multiple of `stages`; 0 where nothing is split.
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    rows: int
    columns: int
    stages: int
    parts: int
    whole_tiles: int
    part_steps: int
    max_registers: int | None = None

    @property
    def num_warps(self) -> int:
        """Warps a program: each has 16 rows."""
        return self.rows // 16


def tiling(M: int, R: int, C: int, columns: int, parts: int, whole_tiles: int) -> WgmmaConfig:
    """Out[M, R] with a contraction of C in tiles of so many columns, those after `whole_tiles` split in `parts`."""
    stages = _TILES[columns][0]
    tiles = -(-M // columns) * -(-R // ROWS)
    if parts == 1 or whole_tiles >= tiles:
        return WgmmaConfig(ROWS, columns, stages, 1, tiles, 0)
    turns = -(-C // (64 * stages))
    part_steps = -(-turns // parts) * stages
    return WgmmaConfig(ROWS, columns, stages, -(-(turns * stages) // part_steps), whole_tiles, part_steps)


def expected_us(config: WgmmaConfig, M: int, R: int, C: int) -> float:
    """Time by the busiest multiprocessor's steps, and of adding what was split."""
    tiles = -(-M // config.columns) * -(-R // config.rows)
    split = tiles - config.whole_tiles
    steps = -(-C // (64 * config.stages)) * config.stages
    # Parts start as soon as whole tiles leave a multiprocessor free, so what counts is the work a multiprocessor.
    waves = -(-config.whole_tiles // _PROCESSORS)
    us = waves * steps * _TILES[config.columns][1]
    if split:
        us += -(-split * config.parts // _PROCESSORS) * config.part_steps * _TILES[config.columns][1]
        us += _SUM_LAUNCH_US + split * config.parts * config.rows * config.columns * 8 / _SUM_BYTES_PER_US
    return us


def wgmma_candidates(M: int, N: int, K: int, backward: bool) -> list[WgmmaConfig]:
    """Every configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W; the one expected fastest first."""
    R, C = (K, N) if backward else (N, K)
    found = set()
    for columns in _TILES:
        tiles = -(-M // columns) * -(-R // ROWS)
        for whole_tiles in {tiles, tiles - tiles % _PROCESSORS}:
            for parts in range(1, _MOST_PARTS + 1):
                found.add(tiling(M, R, C, columns, parts, whole_tiles))
    return sorted(found, key=lambda config: (expected_us(config, M, R, C), config))


@lru_cache(maxsize=4096)
def wgmma_config(M: int, N: int, K: int, backward: bool) -> WgmmaConfig:
    """Configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W."""
    return wgmma_candidates(M, N, K, backward)[0]


def begins_early(config: WgmmaConfig, backward: bool) -> bool:
    """Whether product and sum begin while the kernel before them ends (`kernels/_early.py`).

    It gained up to 3% for y in narrow tiles.  Programs of wide ones leave registers for one of the sum's each, the few
    idle multiprocessors take all others, and dX took 10% longer.
    """
    return not backward and config.columns == 64


def wgmma_limit(N: int, K: int) -> int:
    """The most rows of x for which the fused product was faster than decoding W apart and cuBLAS."""
    return 512 if N * K >= 2**25 else 256
