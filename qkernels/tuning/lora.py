"""Launch configurations of an adapter's products: pure functions of the shape.

Room: tables as reviewed Python; the kernels are `kernels/lora.py` and `lora_grads.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# Rows and rank up to which u is kept in parts, which who adds them holds in registers; and the parts.
_PARTS_ROWS, _PARTS_RANK, _PARTS = 512, 16, 8
_REGISTERS = 255  # left to itself, ptxas squeezes some variants into 72 and spills
# Of more rows, whose parts are added by a launch of its own: programs that fill any GPU.
_PROGRAMS = 264


class DownConfig(NamedTuple):
    """Attributes:
    rows: of x a program.
    columns: of the contraction a step.
    parts: into which the contraction is split.
    part_steps: steps of a part.
    summed: whether the parts are added by a launch of its own.
    """

    rows: int
    columns: int
    parts: int
    part_steps: int
    summed: bool
    num_warps: int = 4
    max_registers: int | None = None


class TileConfig(NamedTuple):
    """Attributes:
    rows, columns: of an activation that a program holds at a time.
    """

    rows: int
    columns: int
    num_warps: int = 4
    max_registers: int | None = None


def padded_rank(r: int) -> int:
    """Columns that u has: a power of two, as much as a tensor core takes at least."""
    return max(16, 1 << (r - 1).bit_length())


def inner_parts(M: int, C: int, r: int) -> int:
    """In how many parts u of M rows and rank r is kept, the contraction being C long."""
    return down_config(1, C, r, False).parts if M <= _PARTS_ROWS and r <= _PARTS_RANK else 1


@lru_cache(maxsize=4096)
def down_config(M: int, C: int, r: int, dropout: bool) -> DownConfig:
    """For x [M, C] times a factor of rank r.

    An operand that is computed, as a dropped one is, would make ptxas serialize Hopper's wgmma; 32 rows are below it.
    """
    few = M <= _PARTS_ROWS
    rows, columns = (16 if few else 32 if dropout else 64), 128
    steps = -(-C // columns)
    parts = min(_PARTS, steps) if few else max(1, min(_PARTS, steps, _PROGRAMS * rows // M))
    part_steps = -(-steps // parts)
    parts = -(-steps // part_steps)
    return DownConfig(
        rows, columns, parts, part_steps, not few or r > _PARTS_RANK or parts == 1, max_registers=_REGISTERS
    )


def up_config(M: int) -> TileConfig:
    """For rank r to [M, C]."""
    return TileConfig(16 if M <= 16 else 64, 128)


def grads_config(M: int, dropout: bool) -> TileConfig:
    """For the gradients of the factors from M rows.

    With dropout 32 columns, as 32 rows for `down`.  Parts of u are held in registers, for fewer rows.
    """
    return TileConfig(64 if M <= _PARTS_ROWS else 128, 32 if dropout else 64)
