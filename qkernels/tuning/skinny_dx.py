"""Launch configurations of the backward product for few rows of dy: pure functions of shape and compute capability.

Room: as `tuning/`; the kernel is `kernels/matmul_skinny_dx.py`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import gcd
from typing import NamedTuple

from .skinny import MAP_BYTES, MEASURED_ON, PROCESSORS, SHARED_LIMIT_BYTES, generation

STEP = 32  # rows of W that a warp's lanes have at a time, eight a lane
SCALE_PITCH = 36  # float32 from one block's 32 scales to the next block's: no bank is met twice
TABLE_BYTES = 32768  # float32 pairs of 256 bytes, for each of 16 lanes


class SkinnyDxConfig(NamedTuple):
    """Attributes:
    columns: rows of dy that a program takes, a multiple of 8; other programs take the others.
    bytes: that a lane loads of a row of W: 4, 8 or 16, an instruction's 16 rows of k each.
    k_warps: warps beside each other along k; the others share the rows of W.
    num_warps: warps a program, at most 8.
    parts: into which the contraction is split; more than one are added by a launch of its own.
    early: launches begin while the one before them ends.
    turing: the instruction is sm_75's m16n8k8, else m16n8k16.
    max_registers: registers a thread may use; None leaves it to ptxas.
    ragged: rows of W are not whole blocks of 64, and a warp keeps more scales of each.
    """

    columns: int
    bytes: int
    k_warps: int
    num_warps: int
    parts: int
    early: bool
    turing: bool
    max_registers: int | None = None
    ragged: bool = False

    @property
    def rows(self) -> int:
        """Columns of W, k, a program."""
        return 16 * self.bytes * self.k_warps

    def part_steps(self, N: int) -> int:
        """Steps of 32 rows of W [N, K] a program."""
        steps = -(-N // STEP)
        return -(-steps // self.parts)

    def turns(self, N: int) -> int:
        """Steps a warp."""
        return -(-self.part_steps(N) // (self.num_warps // self.k_warps))

    @property
    def shared_bytes(self) -> int:
        """The table, the map and each warp's scales; later sums, a thread's two for each of its bytes.

        Whole rows of one word a thread.
        """
        row = 4 * 32 * self.num_warps
        # Blocks of 32, which begin anywhere, and one to read beside the last; of 64, in two areas.
        blocks = self.bytes // 2 + 2 if self.ragged else 2 * (self.bytes // 4)
        decoding = TABLE_BYTES + MAP_BYTES + self.num_warps * blocks * SCALE_PITCH * 4
        return -(-max(decoding, 2 * self.bytes * (row + 4)) // row) * row


# (bytes, k_warps, num_warps) by the most rows of dy; more go to several programs of so many.  Measured on an H100.
_SHAPES = {8: (8, 1, 8), 16: (8, 1, 4), 32: (8, 1, 4), 64: (4, 2, 4)}
# Of many rows of dy the sums are large too: where programs of more warps fill the GPU without a second launch, these.
_MANY_ROWS, _WHOLE_SHAPE = 64, (4, 2, 8)
# A T4 has 64 KiB of shared memory, one program's.
_TURING_SHAPES = {8: (8, 1, 8), 16: (8, 1, 8), 32: (8, 1, 8)}
# Ragged rows of which a lane's 16 weights may lie in two blocks: with two scales of each row it has fewer registers.
_UNDIVIDED = 16
_DIVIDED_SHAPES = {8: (8, 1, 8), 16: (8, 1, 4), 32: (4, 2, 4)}
_DIVIDED_HOPPER_SHAPES = {**_DIVIDED_SHAPES, 64: (4, 2, 8)}
_DIVIDED_TURING_SHAPES = {8: (8, 1, 8), 16: (8, 1, 8), 32: (4, 2, 8)}
# The same by N, K and the most rows of dy, where `benchmarks.tune` found on an H100 what is faster by more than 3%.
_MEASURED = {
    (4096, 11008, 8): (8, 2, 8),
    (4096, 11008, 16): (8, 2, 8),
    (4096, 16384, 8): (16, 1, 4),
    (4096, 16384, 16): (16, 1, 4),
    (4096, 16384, 32): (8, 1, 8),
}
# A multiprocessor has registers for so many warps of the larger ones; more of the small ones gain nothing.
_WARPS = 8
# A program's begin and end, the table and the sums, in turns of its warps.
_FIXED_TURNS = 3
_TURN_BYTES = 8  # bytes a lane of such a turn; of fewer it takes that much less
# The most rows of dy for which the fused product is taken; counted but for an H100, as the forward product's.
_LIMIT = {75: 128, 80: 128, 86: 128, 90: 64, 100: 128, 120: 128}
# Hopper's other product does not take ragged rows, so cuBLAS is next: slower where K is no multiple of 8, or where a
# weight so large is decoded first.
_RAGGED_LIMIT, _FAST_K, _LARGE = 128, 8, 32 << 20
# Ragged weights so small, and rows of dy so few, that adding the parts is a good deal of the time.
_SMALL, _SMALL_COLUMNS = 8 << 20, 16
FEWEST_ROWS = 8  # of W: what a lane takes
# Where rows of dy do not begin on 16 bytes: loaded one by one, more of them would leave no registers.
_ALIGNED_N, _UNALIGNED_COLUMNS = 8, 16
_TRIED_SPLITS = 3


def skinny_dx_limit(sm: int, N: int, K: int, blocksize: int) -> int:
    """The largest M."""
    known = generation(sm)
    others_slower = K % _FAST_K != 0 or N * K >= _LARGE
    if known == 90 and K % min(blocksize, 64) and N % _ALIGNED_N == 0 and others_slower:
        return _RAGGED_LIMIT
    return _LIMIT.get(known, 0)


def _columns(M: int, N: int, K: int, known: int, blocksize: int) -> int:
    shapes = _shapes(K, known, blocksize)
    most = _UNALIGNED_COLUMNS if N % _ALIGNED_N and known != 75 else max(shapes)
    return next((columns for columns in shapes if columns >= min(M, most)), most)


def is_ragged(K: int, blocksize: int) -> bool:
    """Whether the rows of a weight are not whole blocks of 64 that share a scale."""
    return K % 64 != 0 or blocksize < 64


def _is_divided(K: int, blocksize: int) -> bool:
    return gcd(K, blocksize) < _UNDIVIDED


def _shapes(K: int, known: int, blocksize: int) -> dict[int, tuple[int, int, int]]:
    if not _is_divided(K, blocksize):
        return _TURING_SHAPES if known == 75 else _SHAPES
    if known == 75:
        return _DIVIDED_TURING_SHAPES
    return _DIVIDED_HOPPER_SHAPES if known == 90 else _DIVIDED_SHAPES


def _shape(N: int, K: int, columns: int, known: int, blocksize: int) -> tuple[int, int, int]:
    """Bytes, k_warps and num_warps for so many rows of dy."""
    if known == MEASURED_ON and not is_ragged(K, blocksize) and (N, K, columns) in _MEASURED:
        return _MEASURED[N, K, columns]
    return _shapes(K, known, blocksize)[columns]


def _splits(M: int, N: int, K: int, known: int, shape: tuple[int, int, int], blocksize: int) -> list[SkinnyDxConfig]:
    """Programs of this shape in one part and in more, as many as give every warp work; those expected fastest first.

    What counts is what the busiest place of a multiprocessor does, one program after the other.
    """
    width, k_warps, num_warps = shape
    columns = _columns(M, N, K, known, blocksize)
    whole = SkinnyDxConfig(columns, width, k_warps, num_warps, 1, known >= 90, known == 75)
    whole = whole._replace(ragged=is_ragged(K, blocksize))
    tiles = -(-M // whole.columns) * -(-K // whole.rows)
    places = PROCESSORS[known] * _WARPS // num_warps
    most = -(-N // STEP) // (num_warps // k_warps)
    found = [whole._replace(parts=parts) for parts in range(1, max(1, most) + 1)]
    return sorted(
        found,
        key=lambda one: (-(-tiles * one.parts // places) * (_FIXED_TURNS + one.turns(N)), one.parts),
    )


def _expected_turns(config: SkinnyDxConfig, M: int, N: int, K: int, known: int) -> float:
    """What the busiest place of a multiprocessor does, for shapes of different width."""
    programs = -(-M // config.columns) * -(-K // config.rows) * config.parts
    places = PROCESSORS[known] * _WARPS // config.num_warps
    return -(-programs // places) * (_FIXED_TURNS + config.turns(N) * config.bytes / _TURN_BYTES)


def skinny_dx_candidates(M: int, N: int, K: int, sm: int, blocksize: int = 64) -> list[SkinnyDxConfig]:
    """Configurations for dy [M, N] and W [N, K]: of every shape of program that does not spill the best splits.

    None where no GPU takes so many rows of dy by the fused product, or this one takes none.
    """
    known = generation(sm)
    if known == 0 or max(_LIMIT.values()) < M or N < FEWEST_ROWS:
        return []
    return [
        config
        for shape in product((4, 8, 16), (1, 2), (4, 8))
        if shape[0] * _columns(M, N, K, known, blocksize)
        <= (128 if shape[0] > 4 and _is_divided(K, blocksize) else 256)
        for config in _splits(M, N, K, known, shape, blocksize)[:_TRIED_SPLITS]
        if config.shared_bytes <= SHARED_LIMIT_BYTES[known]
    ]


@lru_cache(maxsize=4096)
def skinny_dx_config(M: int, N: int, K: int, sm: int, blocksize: int = 64) -> SkinnyDxConfig | None:
    """Configuration for dy [M, N] and W [N, K].

    Args:
        M: 1 to `skinny_dx_limit`.
        sm: compute capability, 75 for 7.5.
        blocksize: quantization block.

    Returns:
        None where N is below the eight rows that a lane takes.
    """
    known = generation(sm)
    if N < FEWEST_ROWS:
        return None
    columns = _columns(M, N, K, known, blocksize)
    whole = _splits(M, N, K, known, _WHOLE_SHAPE, blocksize)[0]
    if columns == _MANY_ROWS and whole.parts == 1:
        return whole
    shape = _shape(N, K, columns, known, blocksize)
    config = _splits(M, N, K, known, shape, blocksize)[0]
    if is_ragged(K, blocksize) and columns < _MANY_ROWS:
        # Warps beside each other take two narrow turns for one, so fewer steps may be left over; more warps may need no
        # second launch.
        others = [(4, 2, shape[2]), (shape[0], shape[1], 8)]
        small = N * K < _SMALL and columns <= _SMALL_COLUMNS
        if small:
            others += [(4, 2, 8), (4, 1, 8)] if columns == 8 else [(4, 2, 8)]
        found = [config, *(_splits(M, N, K, known, other, blocksize)[0] for other in others)]

        def order(one: SkinnyDxConfig) -> tuple[float, bool, int]:
            return _expected_turns(one, M, N, K, known), one.parts > 1, one.parts if small else 0

        return min(found, key=order)
    return config
