"""Tiles of the Hopper product: pure functions of its shape.

Room: as `tuning/`; the kernel is `kernels/matmul_wgmma.py`.  The times are those of an H100 in `docs/log.md`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

_PROCESSORS = 132
ROWS = 128  # two warp groups, which take turns at decoding and multiplying
STAGES = 4
# Columns of a tile: microseconds a step of 64 of the contraction.
_TILES = {64: 0.45, 128: 0.5, 256: 0.65}
# Filling a program's pipeline and writing a tile; and giving a part to another program, which adds it.
_TILE_US = 3.0
_SPLIT_US = 5.0


class WgmmaConfig(NamedTuple):
    """Attributes:
    rows: of the transposed output a tile has, 64 for each warp group.
    columns: of the transposed output, rows of x.
    stages: tiles of x in shared memory; the contraction goes in turns of as many steps.
    programs: which share all turns of all tiles evenly.
    split: whether a tile lies with several programs.
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    rows: int
    columns: int
    stages: int
    programs: int
    split: bool
    tabled: int = 3
    max_registers: int | None = None

    @property
    def num_warps(self) -> int:
        """Warps a program: each has 16 rows."""
        return self.rows // 16


def _turns(M: int, R: int, C: int, columns: int, stages: int) -> tuple[int, int]:
    """Turns of all tiles, and of one."""
    tile_turns = -(-C // (64 * stages))
    return -(-M // columns) * -(-R // ROWS) * tile_turns, tile_turns


def tiling(M: int, R: int, C: int, columns: int, programs: int) -> WgmmaConfig:
    """Out[M, R] with a contraction of C in tiles of so many columns, shared by at most so many programs."""
    turns, tile_turns = _turns(M, R, C, columns, STAGES)
    programs = max(1, min(programs, turns))
    split = any(program * turns // programs % tile_turns for program in range(programs))
    return WgmmaConfig(ROWS, columns, STAGES, programs, split)


def expected_us(config: WgmmaConfig, M: int, R: int, C: int) -> float:
    """Time by the busiest program's steps and tiles."""
    turns, tile_turns = _turns(M, R, C, config.columns, config.stages)
    busiest = -(-turns // config.programs)
    us = busiest * config.stages * _TILES[config.columns]
    return us + -(-busiest // tile_turns) * _TILE_US + config.split * _SPLIT_US


def wgmma_candidates(M: int, N: int, K: int, backward: bool) -> list[WgmmaConfig]:
    """Every configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W; the one expected fastest first."""
    R, C = (K, N) if backward else (N, K)
    found = set()
    for columns in _TILES:
        tiles = -(-M // columns) * -(-R // ROWS)
        # All multiprocessors, or as many as can have the same number of whole tiles.
        for programs in {_PROCESSORS, -(-tiles // -(-tiles // _PROCESSORS))}:
            found.add(tiling(M, R, C, columns, programs))
    return sorted(found, key=lambda config: (expected_us(config, M, R, C), config))


@lru_cache(maxsize=4096)
def wgmma_config(M: int, N: int, K: int, backward: bool) -> WgmmaConfig:
    """Configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W."""
    return wgmma_candidates(M, N, K, backward)[0]


def wgmma_limit(N: int, K: int) -> int:
    """The most rows of x for which the fused product was faster than decoding W apart and cuBLAS."""
    return 512 if N * K >= 2**25 else 256
