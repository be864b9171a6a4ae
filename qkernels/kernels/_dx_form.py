"""What a program of the backward product for few rows knows when it is compiled, by name: constants and what follows.

The kernel and the reasons are in `matmul_skinny_dx.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from triton.experimental import gluon

from ..tuning.skinny_dx import is_ragged


class DxForm(NamedTuple):
    """The kernel's compile-time arguments, but for codes, launch and memory; `SkinnyDxConfig` says more."""

    K: int
    NESTED: bool
    NESTED_BLOCK: int
    QUANT_BLOCK: int
    ALIGNED: bool
    KIND: str
    COLUMNS: int
    BYTES: int
    K_WARPS: int
    SPLIT: bool
    WARPS: int

    @property
    def THREADS(self) -> int:
        """Of a program."""
        return 32 * self.WARPS

    @property
    def N_WARPS(self) -> int:
        """Warps that share W's rows."""
        return self.WARPS // self.K_WARPS

    @property
    def ROWS(self) -> int:
        """Columns of W, k, a program."""
        return 16 * self.BYTES * self.K_WARPS

    @property
    def WORDS(self) -> int:
        """That a lane loads of a row of W; also the blocks of 64 that a warp's k of a whole row are."""
        return self.BYTES // 4

    @property
    def GROUPS(self) -> int:
        """Of eight rows of dy."""
        return self.COLUMNS // 8

    @property
    def RAGGED(self) -> bool:
        """Whether rows are not whole blocks of 64."""
        return is_ragged(self.K, self.QUANT_BLOCK)

    @property
    def MOST_BLOCKS(self) -> int:
        """The most blocks that a warp's k of a ragged row lie in."""
        span = 16 * self.BYTES
        last = self.QUANT_BLOCK - math.gcd(self.K, self.QUANT_BLOCK, span)  # where they begin in a block, at most
        return (last + span - 1) // self.QUANT_BLOCK + 1

    @property
    def GRAIN(self) -> int:
        """Blocks begin at multiples of it in every row."""
        return math.gcd(self.K, self.QUANT_BLOCK)

    @property
    def DIVIDED(self) -> bool:
        """Whether a block may end within a lane's bytes of a row."""
        return self.GRAIN < 2 * self.BYTES

    @property
    def AREAS(self) -> int:
        """Scales of a row that a warp keeps in shared memory: one more where a lane reads on beside the last."""
        return self.MOST_BLOCKS + self.DIVIDED if self.RAGGED else self.WORDS


@gluon.constexpr_function
def dx_form_of(*constants):
    """The form of a kernel, of its constants in that order."""
    return DxForm(*constants)
