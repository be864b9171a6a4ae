"""Launch configurations of the fused product for few rows of x: pure functions of shape and compute capability.

Room: tables as reviewed Python.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

TABLE_BYTES = 32768  # two 16-bit codes of 256 bytes, for each of 32 lanes
MAP_BYTES = 1024  # the 8-bit map of nested scales
CHUNK = 128  # k that a quad of lanes loads of a row at once
# The most a program can have.
SHARED_LIMIT_BYTES = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What a program has besides its own.
_RESERVED_BYTES = 1024
# Of how many warps with one tile, for M <= 4, a multiprocessor holds the registers.
_ROOM_WARPS = 24
# Multiprocessors of a T4, an A100, an RTX 3090, an H100, a B200, an RTX 5090; others of their kind count as these.
PROCESSORS = {75: 40, 80: 108, 86: 82, 90: 132, 100: 148, 120: 170}


class SkinnyConfig(NamedTuple):
    """Attributes:
    columns: rows of x that a program takes, a multiple of 8; other programs take the others.
    tiles: tiles of 16 rows of W a warp.
    row_warps: warps that share the rows of a program; the others share K.
    num_warps: warps a program.
    paired: eight columns hold x, M <= 4, twice: for the first and for the second half of a chunk; with blocks of 32,
        M <= 2, four times.
    turing: the instruction is sm_75's m16n8k8, else m16n8k16.
    one_branch: a step is one branch for the warps that have it, before which W is loaded for the next one; else it is
        two with that between them, which takes fewer registers.
    early: it begins while the kernel before it ends (`kernels/_early.py`).
    parts: into which K is shared out over programs, where there are whole blocks and programs' rows; a launch of its
        own adds them.
    shared_bytes: shared memory of a program.
    arranged: a launch before it puts x in the order in which it is read (`kernels/_arrange.py`).
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    columns: int
    tiles: int
    row_warps: int
    num_warps: int
    paired: bool
    turing: bool
    one_branch: bool
    early: bool
    parts: int
    shared_bytes: int
    arranged: bool = False
    max_registers: int | None = None

    @property
    def rows(self) -> int:
        """Rows of W a program."""
        return 16 * self.tiles * self.row_warps


def phases(K: int, blocksize: int) -> int:
    """How many rows of W begin each in their own way in W's windows of 64 weights (`kernels/_ragged_rows.py`): the rows
    after them repeat it.  0 where every row is whole windows and blocks, which is another code."""
    return 0 if K % 64 == 0 and blocksize >= 64 else 64 // min(K & -K, 64)


def chunks(K: int) -> int:
    """Chunks of a row, which may begin with weights that are not its own."""
    return -(-(K + 64 - min(K & -K, 64)) // CHUNK)


def programs(N: int, K: int, blocksize: int, rows: int) -> int:
    """Programs of so many rows of W [N, K], each of one phase."""
    apart = min(max(1, phases(K, blocksize)), N)
    together = -(-N // apart)  # rows of a phase
    return apart * -(-together // rows)


def shared_bytes(
    K: int, columns: int, tiles: int, row_warps: int, num_warps: int, blocksize: int = 64, parts: int = 1
) -> int:
    """Shared memory of a program: the table, the map and the scales of each row and chunk of K; later the sums, one a
    thread and value.  Whole rows of one float32 a thread."""
    scales = (-(-chunks(K) // parts) + 1) * (16 * tiles * row_warps + 1) * 4 * (CHUNK // min(blocksize, 64))
    row = 4 * 32 * num_warps
    return -(-max(TABLE_BYTES + MAP_BYTES + scales, 4 * tiles * (columns // 8) * row) // row) * row


# The most rows of x for which the fused product is taken; on an H100 more of them are the wgmma product's.  Elsewhere,
# not measured but counted: decoding writes 2 bytes a weight and cuBLAS reads them, as much as eight readings of the
# half byte, and from 33 rows on each 32 read W again.
_LIMIT = {75: 128, 80: 128, 86: 128, 90: 32, 100: 128, 120: 128}

# (tiles, row_warps, num_warps, least programs a multiprocessor) by the most rows of x, from few rows of W a program to
# many; measured on an H100 (`docs/log.md`).  Two programs a multiprocessor and more: while one fills its table and
# waits for its first weights, another computes.
_SHAPES = {
    4: ((1, 1, 8, 0), (1, 2, 8, 1.9), (2, 1, 4, 3.8)),
    8: ((1, 1, 8, 0), (2, 1, 8, 1.9), (3, 1, 8, 1.6), (3, 1, 4, 2.5)),
    16: ((1, 1, 8, 0), (2, 1, 4, 1.9), (3, 1, 4, 2.5)),
    32: ((1, 1, 8, 0), (2, 1, 8, 0.9), (3, 1, 4, 1.6), (2, 1, 4, 3.8)),
}
# (columns, tiles, row_warps, num_warps, least programs a multiprocessor) likewise where rows are no multiple of 64, and
# x is arranged first from some number of rows on; and for blocks of 32 in rows that are.
_RAGGED_SHAPES = {
    8: ((8, 1, 1, 8, 0),),
    16: ((16, 1, 1, 8, 0), (16, 2, 1, 4, 2.5)),
    32: ((16, 1, 1, 8, 0), (32, 2, 1, 8, 0.9), (32, 3, 1, 4, 1.6)),
    64: ((32, 2, 1, 8, 0), (32, 2, 1, 4, 0.9), (32, 3, 1, 4, 1.6)),
    128: ((32, 2, 1, 4, 0),),
}
_SMALL_BLOCK_SHAPES = {
    8: ((8, 1, 1, 8, 0),),
    16: ((16, 1, 1, 8, 0), (16, 2, 1, 4, 2.5)),
    32: ((16, 1, 1, 8, 0), (32, 2, 1, 8, 0.9)),
    64: ((32, 2, 1, 4, 0),),
}
# With a long K fewer programs of 32 rows are enough, as each has more to do, by more warps.
_LONG_K, _LONG_WARPS, _LONG_PROGRAMS = 8192, 8, 0.9
# (tiles, row_warps, num_warps, parts) for more than 16 rows of x and a long K: fewer programs read the same x, as each
# has more rows of W.
_SPLIT_SHAPES = ((2, 2, 4, 4), (2, 4, 8, 4))
# (tiles, row_warps, num_warps, parts if not 1) by N, K and the most rows of x, a power of two, where `benchmarks.tune`,
# or a trial (`docs/log.md`), found on an H100 what is faster by more than 3%.
_MEASURED = {
    (4096, 4096, 1): (1, 1, 16),
    (4096, 4096, 16): (2, 1, 8),
    (4096, 4096, 64): (2, 1, 4),
    (16384, 4096, 8): (2, 1, 4),
    (4096, 11008, 4): (2, 1, 8),
    (4096, 11008, 8): (1, 1, 8),
    (4096, 11008, 16): (1, 1, 8),
    (4096, 11008, 32): (2, 2, 4, 4),
    (4096, 16384, 32): (2, 4, 8, 4),
    (1152, 4304, 8): (1, 1, 16),
    (1280, 3420, 4): (1, 1, 16),
    (1280, 3420, 8): (1, 1, 16),
    (1152, 4304, 16): (1, 1, 16),
    (1280, 3420, 16): (1, 1, 16),
}
# Tiles and warps with which a step in one branch was faster, by columns, where rows are whole blocks; and by N, K and
# columns where it was not.  Three tiles of 32 columns would spill.
_ONE_BRANCH = {8: {(1, 8), (2, 8)}, 16: {(1, 8), (1, 16), (2, 4), (2, 8), (3, 4)}, 32: {(2, 4)}}
_TWO_BRANCHES = {(4096, 11008, 16)}
# By N and K, where that found more rows of x faster so.
_MEASURED_LIMIT = {(4096, 4096): 64}
# Where rows are no multiple of 64; where some multiprocessors besides are left without a program, and rows of W are
# multiples of 16 bytes as cuBLAS likes them; for blocks of 32 in rows that are.  Beyond, decoding apart is faster.
_RAGGED_LIMIT, _SMALL_LIMIT, _SMALL_BLOCK_LIMIT = 128, 64, 64
MEASURED_ON = 90


def generation(sm: int) -> int:
    """The newest GPU of the tables that `sm` is not older than; 0 where it is older than all."""
    return max((known for known in _LIMIT if known <= sm), default=0)


def skinny_limit(sm: int, N: int = 0, K: int = 0, blocksize: int = 64) -> int:
    """The largest M; N, K and its blocks tell of a weight [N, K] for which it is another."""
    known = generation(sm)
    limit = _LIMIT.get(known, 0)
    if limit and phases(K, blocksize):
        if K % 32 == 0 and blocksize == 32:  # whole blocks: on Hopper more rows of x are the wgmma product's too
            return min(limit, _SMALL_BLOCK_LIMIT)
        small = programs(N, K, blocksize, 16) < PROCESSORS[known] and K % 8 == 0
        return _SMALL_LIMIT if small else _RAGGED_LIMIT
    return _MEASURED_LIMIT.get((N, K), limit) if known == MEASURED_ON else limit


def _most_rows(M: int) -> int:
    """The table's key; what is beyond the last goes to several programs of so many rows."""
    return next((rows for rows in _SHAPES if rows >= M), max(_SHAPES))


def _config(
    M: int, N: int, K: int, blocksize: int, known: int, tiles: int, row_warps: int, num_warps: int, parts: int = 1
) -> SkinnyConfig:
    columns = max(8, _most_rows(M))
    paired = 1 <= M <= (4 if blocksize >= 64 else 2)
    shared = shared_bytes(K, columns, tiles, row_warps, num_warps, blocksize, parts)
    # Where registers leave a multiprocessor room for more programs than its share, those of a kernel that begins early
    # crowd where there is room first, and an H100 took up to 25% longer.  For M <= 4 they ask for the shared memory of
    # a share then.  For 5 to 8 rows that left too little of it to the cache, and neither way was faster everywhere.
    early = known >= 90 and not 4 < M <= 8
    share = -(-programs(N, K, blocksize, 16 * tiles * row_warps) // PROCESSORS[known])
    if early and M <= 4 and share * num_warps * tiles < _ROOM_WARPS:
        row = 4 * 32 * num_warps
        too_many = (SHARED_LIMIT_BYTES[known] + _RESERVED_BYTES) // (share + 1) - _RESERVED_BYTES
        shared = max(shared, (too_many // row + 1) * row)
    one_branch = phases(K, blocksize) == 0 and ((tiles, num_warps) in _ONE_BRANCH[columns] or parts > 1)
    one_branch &= (N, K, columns) not in _TWO_BRANCHES and not paired
    return SkinnyConfig(
        columns,
        tiles,
        row_warps,
        num_warps,
        paired,
        known == 75,
        one_branch,
        early,
        parts,
        shared,
        _arranged(M, K),
    )


def _fits(config: SkinnyConfig, N: int, known: int) -> bool:
    whole = config.parts == 1 or N % config.rows == 0
    return whole and config.rows <= N and config.shared_bytes <= SHARED_LIMIT_BYTES[known]


def skinny_candidates(M: int, N: int, K: int, sm: int, blocksize: int = 64) -> list[SkinnyConfig]:
    """Every configuration for x [M, K] and W [N, K] that gives half of the multiprocessors a program.

    None where no GPU takes so many rows of x by the fused product, or this one takes none.
    """
    known = generation(sm)
    if known == 0 or max(_LIMIT.values()) < M:
        return []
    ragged = phases(K, blocksize) > 0
    columns = {max(8, _most_rows(M)), *(shape[0] for shape in _ragged_shapes(M, K) if ragged)}
    found = []
    for own, tiles, row_warps, num_warps in product(sorted(columns), (1, 2, 3), (1, 2), (4, 8, 16)):
        config = _config(M, N, K, blocksize, known, tiles, row_warps, num_warps)
        config = config._replace(columns=own)
        across = -(-M // own) if ragged else 1
        enough = config.rows == 16 or PROCESSORS[known] <= 2 * across * programs(N, K, blocksize, config.rows)
        if _fits(config, N, known) and enough:
            found.append(config)
    whole = phases(K, blocksize) == 0 and K >= _LONG_K and M > 16
    for tiles, row_warps, num_warps, parts in _SPLIT_SHAPES if whole else ():
        config = _config(M, N, K, blocksize, known, tiles, row_warps, num_warps, parts)
        if _fits(config, N, known):
            found.append(config)
    return found


def _ragged_shapes(M: int, K: int) -> tuple[tuple[int, int, int, int, float], ...]:
    shapes = _RAGGED_SHAPES if K % 64 else _SMALL_BLOCK_SHAPES
    return shapes[next((rows for rows in shapes if rows >= M), max(shapes))]


def _arranged(M: int, K: int) -> bool:
    """Whether a launch that arranges x is worth it: vectors of x that are shifted lie in more lines of the cache, and
    where K is no multiple of 4 they are read in pieces of 4 bytes and less."""
    return K % 64 != 0 and (M > 8 or (M > 4 and K % 4 != 0))


def _ragged_config(M: int, N: int, K: int, blocksize: int, known: int) -> SkinnyConfig | None:
    if N < 16 or K < 64:
        return None
    best = None
    for columns, tiles, row_warps, num_warps, least in _ragged_shapes(M, K):
        if tiles == 2 and 8 < M <= 16 and K % 64 == 0 and K >= _LONG_K:
            num_warps, least = _LONG_WARPS, _LONG_PROGRAMS
        config = _config(M, N, K, blocksize, known, tiles, row_warps, num_warps)
        config = config._replace(columns=columns)
        count = programs(N, K, blocksize, config.rows)
        # Tiles that would only be emptier are no reason for fewer warps or more registers.
        fewer = best is None or config.rows == best.rows or count < programs(N, K, blocksize, best.rows)
        spills = tiles == 3 and blocksize < 64  # twice the scales
        enough = count >= least * PROCESSORS[known]
        if config.shared_bytes <= SHARED_LIMIT_BYTES[known] and enough and fewer and not spills:
            best = config
    return best


@lru_cache(maxsize=4096)
def skinny_config(M: int, N: int, K: int, sm: int, blocksize: int = 64) -> SkinnyConfig | None:
    """Configuration for x [M, K] and W [N, K]: the most rows of W a program that leave enough programs.

    Args:
        M: 1 to `skinny_limit(sm)`.
        sm: compute capability, 75 for 7.5.

    Returns:
        None where no program fits: N is below 16, or the scales of a whole row of W exceed shared memory.
    """
    known = generation(sm)
    measured = _MEASURED.get((N, K, 1 << (M - 1).bit_length()))
    if measured is not None and known == MEASURED_ON and blocksize >= 64:
        return _config(M, N, K, blocksize, known, *measured)
    if phases(K, blocksize):
        return _ragged_config(M, N, K, blocksize, known)
    best = None
    for tiles, row_warps, num_warps, programs in _SHAPES[_most_rows(M)]:
        if (tiles, row_warps) == (2, 1) and M > 4 and K >= _LONG_K:
            num_warps, programs = _LONG_WARPS, _LONG_PROGRAMS
        config = _config(M, N, K, 64, known, tiles, row_warps, num_warps)
        if _fits(config, N, known) and config.rows * programs * PROCESSORS[known] <= N:
            best = config
    return best
