"""Tiles of the Hopper product: pure functions of its shape.

Room: as `tuning/`; the kernel is `kernels/matmul_wgmma.py`.  The times are those of an H100 in `docs/log.md`.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from . import skinny

PROCESSORS = skinny.PROCESSORS[90]
ROWS = 128  # two warp groups, which take turns at decoding and multiplying
STAGES = 4
# Columns of a tile: microseconds a step of 64 of the contraction, forward and backward.
_STEP_US = {64: (0.42, 0.6), 128: (0.56, 0.72), 256: (0.85, 0.88)}
# Filling a program's pipeline and writing a tile; giving parts of tiles away; and taking one of 256 columns.
_TILE_US = 2.5
_GIVE_US = 1.6
_TAKE_US = 3.1
# Of four bytes, how many are decoded by a table.
_TABLED = {64: 3, 128: 3, 256: 2}

# The most rows of x of the fused product, where the weight is large.
_LIMIT = 1024
# A tile of cuBLAS' products of thousands of rows: of the transposed output's rows and columns.
_DENSE_TILE = (256, 128)
_LARGEST_SHARE = 0.15
_SHARE_COLUMNS = 256


class WgmmaConfig(NamedTuple):
    """Attributes:
    rows: of the transposed output a tile has, 64 for each warp group.
    columns: of the transposed output, rows of x.
    stages: tiles of x in shared memory; the contraction goes in turns of as many steps.
    programs: which share all turns of all tiles evenly.
    split: whether a tile lies with several programs.
    tabled: of four bytes, how many are decoded by a table, the others by byte permutation.
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    rows: int
    columns: int
    stages: int
    programs: int
    split: bool
    tabled: int
    max_registers: int | None = None

    @property
    def num_warps(self) -> int:
        """Warps a program: each has 16 rows."""
        return self.rows // 16


def turns(M: int, R: int, C: int, columns: int) -> tuple[int, int, int]:
    """Turns of all tiles, turns of a tile, and tiles side by side, of out[M, R] with a contraction of C."""
    tile_turns, across = -(-C // (64 * STAGES)), -(-M // columns)
    return across * -(-R // ROWS) * tile_turns, tile_turns, across


def tiling(M: int, R: int, C: int, columns: int, programs: int) -> WgmmaConfig:
    """Out[M, R] with a contraction of C in tiles of so many columns, shared by at most so many programs."""
    all_turns, tile_turns, _ = turns(M, R, C, columns)
    programs = max(1, min(programs, all_turns, PROCESSORS))
    split = any(program * all_turns // programs % tile_turns for program in range(programs))
    return WgmmaConfig(ROWS, columns, STAGES, programs, split, _TABLED[columns])


def expected_us(config: WgmmaConfig, M: int, R: int, C: int, backward: bool) -> float:
    """Time by the busiest program's steps and tiles, and by the tile that most programs share."""
    all_turns, tile_turns, _ = turns(M, R, C, config.columns)
    busiest = -(-all_turns // config.programs)
    us = busiest * config.stages * _STEP_US[config.columns][backward] + -(-busiest // tile_turns) * _TILE_US
    begins = [program * all_turns // config.programs for program in range(config.programs)]
    taken = Counter(begin // tile_turns for begin in begins if begin % tile_turns)
    if taken:
        us += _GIVE_US + max(taken.values()) * _TAKE_US * config.columns / 256
    return us


def wgmma_candidates(M: int, N: int, K: int, backward: bool) -> list[WgmmaConfig]:
    """Every configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W; the one expected fastest first."""
    R, C = (K, N) if backward else (N, K)
    found = set()
    for columns in _STEP_US:
        tiles = -(-M // columns) * -(-R // ROWS)
        # All multiprocessors; a number that halves and quarters of tiles fill; or as many as can have whole tiles.
        for programs in {PROCESSORS, 128, -(-tiles // -(-tiles // PROCESSORS))}:
            found.add(tiling(M, R, C, columns, programs))
    return sorted(found, key=lambda config: (expected_us(config, M, R, C, backward), config))


# (columns, programs) by N, K, the most rows, a power of two, and the direction, where `benchmarks.tune` found what is
# faster than the one expected to be by more than 3%.
_MEASURED = {(4096, 16384, 64, False): (64, 132), (11008, 4096, 512, True): (256, 128)}


@lru_cache(maxsize=4096)
def wgmma_config(M: int, N: int, K: int, backward: bool) -> WgmmaConfig:
    """Configuration for x [M, K] and W [N, K]; backward, for dy [M, N] and W."""
    measured = _MEASURED.get((N, K, 1 << (M - 1).bit_length(), backward))
    if measured is not None:
        R, C = (K, N) if backward else (N, K)
        return tiling(M, R, C, *measured)
    return wgmma_candidates(M, N, K, backward)[0]


def begins_early(config: WgmmaConfig, backward: bool) -> bool:
    """Whether the product begins while the kernel before it ends (`kernels/_early.py`).

    It gained 1 to 4% for y in narrow tiles.  In wide ones and for dX it gained and lost.
    """
    return not backward and config.columns < 256


def wgmma_share(M: int, R: int) -> int:
    """Columns of out[M, R] that leave cuBLAS whole waves of tiles, so that it takes one wave less.

    They are computed by the fused product while W is decoded, on as many multiprocessors as they have tiles.  It is 0
    where the fused product takes all M, and where there are so many that no wave is gained.
    """
    if M <= _LIMIT:
        return 0
    rows, columns = _DENSE_TILE
    across = -(-M // columns)
    waves = across * -(-R // rows) // PROCESSORS
    share = -(-(R - waves * PROCESSORS // across * rows) // ROWS) * ROWS
    tiles = -(-M // _SHARE_COLUMNS) * (share // ROWS)
    return share if share <= R * _LARGEST_SHARE and tiles <= PROCESSORS else 0


def share_tiling(M: int, share: int, C: int) -> WgmmaConfig:
    """Whole tiles, each of a program."""
    return tiling(M, share, C, _SHARE_COLUMNS, -(-M // _SHARE_COLUMNS) * (share // ROWS))


def wgmma_limit(N: int, K: int) -> int:
    """The most rows of x for which the fused product was faster than decoding W apart and cuBLAS."""
    return _LIMIT if N * K >= 2**24 else 256
