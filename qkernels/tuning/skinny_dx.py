"""Launch configurations of the backward product for few rows of dy: pure functions of shape and compute capability.

Room: as `tuning/`; the kernel is `kernels/matmul_skinny_dx.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from .skinny import PROCESSORS, SHARED_LIMIT_BYTES, generation

STEP = 32  # rows of W that a warp's lanes have at a time, eight a lane
SCALE_PITCH = 36  # float32 from one block's 32 scales to the next block's: no bank is met twice
_MAP_BYTES = 1024  # the 8-bit map of nested scales


class SkinnyDxConfig(NamedTuple):
    """Attributes:
    columns: rows of dy that a program takes, a multiple of 8; other programs take the others.
    bytes: that a lane loads of a row of W: 4, 8 or 16, an instruction's 16 rows of k each.
    k_warps: warps beside each other along k; the others share the rows of W.
    num_warps: warps a program, at most 8.
    parts: into which the contraction is split; more than one are added by a launch of its own.
    stride: bytes from one entry of the table to the next: 256 (fewer instructions) or 128.
    early: launches begin while the one before them ends.
    turing: the instruction is sm_75's m16n8k8, else m16n8k16.
    max_registers: registers a thread may use; None leaves it to ptxas.
    """

    columns: int
    bytes: int
    k_warps: int
    num_warps: int
    parts: int
    stride: int
    early: bool
    turing: bool
    max_registers: int | None = None

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
        """The table, the map and two areas of scales a warp; later sums, a thread's two for each of its bytes.

        Whole rows of one word a thread.
        """
        row = 4 * 32 * self.num_warps
        decoding = 256 * self.stride + _MAP_BYTES + 2 * self.num_warps * self.bytes // 4 * SCALE_PITCH * 4
        return -(-max(decoding, 2 * self.bytes * (row + 4)) // row) * row


class Shape(NamedTuple):
    """A program's, as the table has it; attributes as of `SkinnyDxConfig`, and

    Attributes:
        resident: programs of it that a multiprocessor holds at once.
    """

    bytes: int
    k_warps: int
    num_warps: int
    stride: int
    resident: int


# By the most rows of dy; more go to several programs of so many.
_SHAPES = {
    8: Shape(8, 1, 8, 128, 1),
    16: Shape(8, 1, 4, 128, 2),
    32: Shape(8, 1, 4, 128, 2),
}
# A T4 has registers for 8 warps of these, and 64 KiB of shared memory for one program.
_TURING_SHAPES = {8: Shape(8, 1, 8, 128, 1), 16: Shape(8, 1, 8, 128, 1), 32: Shape(8, 1, 8, 128, 1)}
# A program's begin and end, the table and the sums, in turns of its warps.
_FIXED_TURNS = 3
# The share of its warps' turns that a split must fill to be tried.
_WORTH = 0.8
# The most rows of dy for which the fused product is taken; counted but for an H100, as the forward product's.
_LIMIT = {75: 128, 80: 128, 86: 128, 90: 32, 100: 128, 120: 128}
_FEWEST_ROWS = 8  # of W: what a lane takes


def skinny_dx_limit(sm: int) -> int:
    """The largest M."""
    return _LIMIT.get(generation(sm), 0)


def _shape(M: int, known: int) -> tuple[int, Shape]:
    shapes = _TURING_SHAPES if known == 75 else _SHAPES
    columns = next((rows for rows in shapes if rows >= M), max(shapes))
    return columns, shapes[columns]


def _splits(config: SkinnyDxConfig, N: int) -> Iterator[SkinnyDxConfig]:
    """In one part and in more, as many as give every warp work."""
    most = -(-N // STEP) // (config.num_warps // config.k_warps)
    for parts in range(1, max(1, most) + 1):
        yield config._replace(parts=parts)


def skinny_dx_candidates(M: int, N: int, K: int, sm: int) -> list[SkinnyDxConfig]:
    """Every configuration for dy [M, N] and W [N, K] that keeps the multiprocessors busy and whose warps end together.

    None where no GPU takes so many rows of dy by the fused product, or this one takes none.
    """
    known = generation(sm)
    if known == 0 or max(_LIMIT.values()) < M or N < _FEWEST_ROWS:
        return []
    columns = next((columns for columns in (8, 16, 32) if columns >= M), 32)
    found = []
    for width, k_warps, num_warps, stride in product((4, 8, 16), (1, 2), (4, 8), (128, 256)):
        whole = SkinnyDxConfig(columns, width, k_warps, num_warps, 1, stride, known >= 90, known == 75)
        if width * columns > 256 or whole.shared_bytes > SHARED_LIMIT_BYTES[known]:
            continue
        for config in _splits(whole, N):
            warps = -(-M // columns) * -(-K // config.rows) * config.parts * num_warps / PROCESSORS[known]
            worth = -(-N // STEP) / (config.parts * config.turns(N) * (num_warps // k_warps))
            if config.parts == 1 or (worth >= _WORTH and 4 <= warps <= 20):
                found.append(config)
    return found


@lru_cache(maxsize=4096)
def skinny_dx_config(M: int, N: int, K: int, sm: int) -> SkinnyDxConfig | None:
    """Configuration for dy [M, N] and W [N, K]: the split of the contraction that keeps a multiprocessor shortest.

    Args:
        M: 1 to `skinny_dx_limit(sm)`.
        sm: compute capability, 75 for 7.5.

    Returns:
        None where N is below the eight rows that a lane takes.
    """
    known = generation(sm)
    if N < _FEWEST_ROWS:
        return None
    columns, (width, k_warps, num_warps, stride, resident) = _shape(M, known)
    whole = SkinnyDxConfig(columns, width, k_warps, num_warps, 1, stride, known >= 90, known == 75)
    tiles = -(-M // columns) * -(-K // whole.rows)

    def busy(config: SkinnyDxConfig) -> tuple[int, int]:
        """What the busiest place of a multiprocessor does, one program after the other; then the fewer parts."""
        waves = -(-tiles * config.parts // (PROCESSORS[known] * resident))
        return waves * (_FIXED_TURNS + config.turns(N)), config.parts

    return min(_splits(whole, N), key=busy)
